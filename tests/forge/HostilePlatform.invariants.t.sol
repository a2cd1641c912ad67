// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { CreditVault } from "../../contracts/CreditVault.sol";
import { PlainToken } from "../../contracts/mocks/PlainToken.sol";
import { TestUSDC } from "../../contracts/mocks/TestUSDC.sol";

import { Books } from "./Books.sol";
import { BooksInvariants } from "./BooksInvariants.sol";
import { HostilePlatformHandler } from "./HostilePlatformHandler.sol";

/// @dev Whatever a platform and its meters do, a matured exit is the owner's alone.
contract HostilePlatformInvariants is BooksInvariants {
    HostilePlatformHandler private _handler;
    TestUSDC private _token;

    function setUp() external {
        _token = new TestUSDC(address(this));
        _handler = new HostilePlatformHandler(new CreditVault(address(_token)), _token, new PlainToken(6));
        _target(_handler, _handler.selectors());
    }

    /// @dev exit = requested − drawn before it was mature, with all the other books.
    function invariant_books() external view {
        _assertBooks();
    }

    /// @dev Each user who asked to leave gets floor(exit / 10⁶) tokens after the delay, though the platform tries
    ///      to take all there is in that very second.
    function afterInvariant() external {
        _leave();
    }

    function test_finalizeExit_hostilePlatform_paysWhatWasNotChargedInTime() external {
        for (uint256 i = 0; i < 16; ++i) {
            _handler.deposit(i, 50e6);
            _handler.requestExit(i, 20e6);
        }
        for (uint256 i = 0; i < 4; ++i) {
            _handler.drain(i);
            _handler.drain(i << 8 | i);
        }
        assertLe(1, _handler.times("charged"), "charged");
        assertLe(1, _handler.times("drawn"), "drawn");
        for (uint256 i = 0; i < 8; ++i) {
            _handler.deposit(i, 50e6 + i);
            _handler.requestExit(i, 20e6 + i);
        }
        assertLe(8, _leave(), "exits paid");
    }

    function _leave() private returns (uint256 paid) {
        for (uint256 i = 0; i < _handler.holders().length; ++i) {
            // Earlier turns may have drawn on it, but not after it was mature.
            Books.Holder memory before = _handler.holders()[i];
            if (before.exit == 0) continue;
            if (block.timestamp < before.exitMaturesAt) vm.warp(before.exitMaturesAt);
            _handler.drain(before.tenant);
            _handler.finalizeExit(i, 0);
            uint256 paidOut = _handler.holders()[i].paidOut - before.paidOut;
            assertEq(paidOut, before.exit - before.exit % 1e6, "paid, to the last whole token");
            paid++;
        }
        _assertBooks();
    }
}
