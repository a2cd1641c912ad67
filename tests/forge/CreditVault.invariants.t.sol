// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { CreditVault } from "../../contracts/CreditVault.sol";
import { ICreditVault } from "../../contracts/interfaces/ICreditVault.sol";
import { PlainToken } from "../../contracts/mocks/PlainToken.sol";
import { TestUSDC } from "../../contracts/mocks/TestUSDC.sol";

import { Books } from "./Books.sol";
import { BooksInvariants } from "./BooksInvariants.sol";
import { VaultHandler } from "./VaultHandler.sol";

/// @dev What holds after any sequence of calls.
contract CreditVaultInvariants is BooksInvariants {
    VaultHandler private _handler;

    function setUp() external {
        TestUSDC token = new TestUSDC(address(this));
        _handler = new VaultHandler(new CreditVault(address(token)), token, new PlainToken(6));
        _target(_handler, _handler.selectors());
    }

    /// @dev All in one, as forge would otherwise play the same calls again for each.
    function invariant_books() external view {
        _assertBooks();
    }

    function afterInvariant() external view {
        _assertIds();
    }

    /// @dev The calls above are worth nothing if they never get anywhere.
    function test_handler_manyCalls_meetEveryOutcome() external {
        bytes4[] memory selectors = _handler.selectors();
        for (uint256 i = 0; i < 2000; ++i) {
            uint256 seed = uint256(keccak256(abi.encode(i)));
            // Of those that take one number, the second is not looked at.
            bytes memory call = abi.encodeWithSelector(
                selectors[seed % selectors.length], seed >> 8, keccak256(abi.encode(seed))
            );
            (bool success,) = address(_handler).call(call);
            assertTrue(success, "a call of the handler");
        }
        _assertBooks();
        _assertIds();

        for (uint256 reason = 0; reason <= uint256(type(ICreditVault.Rejection).max); ++reason) {
            assertLe(1, _handler.rejections(ICreditVault.Rejection(reason)), "rejections");
        }
        assertLe(1, _handler.times("charged"), "charged");
        assertLe(1, _handler.times("drawn"), "drawn");
        assertLe(1, _handler.times("drawn to zero"), "drawn to zero");
        assertLe(1, _handler.times("voided"), "voided");
        string[13] memory both = [
            "depositFromInbox",
            "requestExit",
            "cancelExit",
            "finalizeExit",
            "setAllowanceBySignature",
            "rescue",
            "rescueFromInbox",
            "refund",
            "allocate",
            "exitWithConsent",
            "bookInbox",
            "withdrawEarnings",
            "stranger"
        ];
        for (uint256 i = 0; i < both.length; ++i) {
            assertLe(1, _handler.attempts(both[i], true), both[i]);
            assertLe(1, _handler.attempts(both[i], false), both[i]);
        }
        assertLe(1, _handler.attempts("acceptPlatform", true), "acceptPlatform");
        assertLe(1, _handler.attempts("addMeter", true), "addMeter");
        assertLe(1, _handler.attempts("addMeter", false), "addMeter");
        Books.Tenant[] memory tenants = _handler.tenants();
        for (uint256 i = 0; i < tenants.length; ++i) {
            assertLe(1, tenants[i].retiredKeys.length, "retired");
            assertLe(1, tenants[i].charged, "charged");
            assertLe(1, tenants[i].refunded, "refunded");
            assertLe(1, tenants[i].withdrawn, "withdrawn");
        }
    }
}
