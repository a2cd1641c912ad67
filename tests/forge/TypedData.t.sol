// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { ICreditVault } from "../../contracts/interfaces/ICreditVault.sol";
import { TypedData } from "../../contracts/libraries/TypedData.sol";

import { Signing } from "./Signing.sol";

/// @dev The library against a plain encoding of the same values.
contract TypedDataTest is Signing {
    function testFuzz_hashSettlement_anyCharges_isThePlainHash(
        uint128 platform,
        ICreditVault.Charge[] calldata charges,
        uint40 deadline
    ) external pure {
        assertTrue(
            TypedData.hashSettlement(platform, charges, deadline)
                == settlementHash(platform, charges, deadline),
            "settlement"
        );
    }

    /// @dev The hashes are laid out past the free pointer: what was in memory stays, what comes after is clean.
    function testFuzz_hashSettlement_anyCharges_spoilsNoMemory(
        ICreditVault.Charge[] calldata charges,
        bytes calldata data,
        uint8 length
    ) external pure {
        bytes memory before = data;
        bytes32 first = TypedData.hashSettlement(1, charges, 2);
        bytes memory then = new bytes(length);
        for (uint256 i = 0; i < length; ++i) {
            assertTrue(then[i] == 0, "clean");
        }
        assertTrue(keccak256(before) == keccak256(data), "kept");
        assertTrue(TypedData.hashSettlement(1, charges, 2) == first, "the same again");
    }

    function testFuzz_hashVoiding_anyIds_isThePlainHash(
        uint128 platform,
        uint64[] calldata ids,
        uint40 deadline
    ) external pure {
        assertTrue(
            TypedData.hashVoiding(platform, ids, deadline) == voidingHash(platform, ids, deadline), "voiding"
        );
    }

    function testFuzz_hashInboxBooking_anyValues_isThePlainHash(
        uint128 platform,
        address payer,
        bytes32 nonce,
        uint256 tokens,
        uint40 deadline
    ) external pure {
        assertTrue(
            TypedData.hashInboxBooking(platform, payer, nonce, tokens, deadline)
                == inboxBookingHash(platform, payer, nonce, tokens, deadline),
            "inbox booking"
        );
    }

    function testFuzz_hashExitConsent_anyValues_isThePlainHash(
        uint128 platform,
        bytes32 account,
        uint256 tokens,
        address to,
        bytes32 nonce,
        uint40 deadline
    ) external pure {
        assertTrue(
            TypedData.hashExitConsent(platform, account, tokens, to, nonce, deadline)
                == exitConsentHash(platform, account, tokens, to, nonce, deadline),
            "exit consent"
        );
    }

    function testFuzz_hashAllowanceChange_anyValues_isThePlainHash(
        uint128 platform,
        bytes32 account,
        uint96 cap,
        uint40 expiresAt,
        uint64 nonce,
        uint40 deadline
    ) external pure {
        assertTrue(
            TypedData.hashAllowanceChange(platform, account, cap, expiresAt, nonce, deadline)
                == allowanceChangeHash(platform, account, cap, expiresAt, nonce, deadline),
            "allowance change"
        );
    }
}
