// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { ICreditVault } from "../interfaces/ICreditVault.sol";

/// @dev EIP-712 `hashStruct` of everything that is signed for the vault. A type's name is what tells a
///      signature of one kind from all others: no two types encode alike.
///      Source: https://eips.ethereum.org/EIPS/eip-712
library TypedData {
    bytes32 private constant CHARGE =
        keccak256("Charge(bytes32 account,uint64 id,uint96 amount,bytes32 receiptHash)");
    bytes32 private constant SETTLEMENT = keccak256(
        "Settlement(uint128 platform,Charge[] charges,uint40 deadline)"
        "Charge(bytes32 account,uint64 id,uint96 amount,bytes32 receiptHash)"
    );
    bytes32 private constant VOIDING = keccak256("Voiding(uint128 platform,uint64[] ids,uint40 deadline)");
    bytes32 private constant INBOX_BOOKING = keccak256(
        "InboxBooking(uint128 platform,address payer,bytes32 nonce,uint256 tokens,uint40 deadline)"
    );
    bytes32 private constant EXIT_CONSENT = keccak256(
        "ExitConsent(uint128 platform,bytes32 account,uint256 tokens,address to,bytes32 nonce,uint40 deadline)"
    );
    bytes32 private constant ALLOWANCE_CHANGE = keccak256(
        "AllowanceChange(uint128 platform,bytes32 account,uint96 cap,uint40 expiresAt,uint64 nonce,uint40 deadline)"
    );
    bytes32 private constant USAGE_RECEIPT = keccak256(
        "UsageReceipt(uint128 platform,bytes32 account,uint64 chargeId,bytes32 requestHash,"
        "bytes32 responseHash,string model,uint64 inputTokens,uint64 cachedInputTokens,uint64 outputTokens,"
        "uint64 reasoningTokens,bytes32 usageHash,bytes32 priceId,uint96 amount,uint40 issuedAt,bool complete)"
    );

    function hashSettlement(uint128 platform, ICreditVault.Charge[] calldata charges, uint40 deadline)
        internal
        pure
        returns (bytes32)
    {
        return keccak256(abi.encode(SETTLEMENT, platform, _hashCharges(charges), deadline));
    }

    function hashVoiding(uint128 platform, uint64[] calldata ids, uint40 deadline)
        internal
        pure
        returns (bytes32)
    {
        // Packed, an array's elements still take a word each: its EIP-712 encoding.
        return keccak256(abi.encode(VOIDING, platform, keccak256(abi.encodePacked(ids)), deadline));
    }

    function hashInboxBooking(uint128 platform, address payer, bytes32 nonce, uint256 tokens, uint40 deadline)
        internal
        pure
        returns (bytes32)
    {
        return keccak256(abi.encode(INBOX_BOOKING, platform, payer, nonce, tokens, deadline));
    }

    function hashExitConsent(
        uint128 platform,
        bytes32 account,
        uint256 tokens,
        address to,
        bytes32 nonce,
        uint40 deadline
    ) internal pure returns (bytes32) {
        return keccak256(abi.encode(EXIT_CONSENT, platform, account, tokens, to, nonce, deadline));
    }

    function hashAllowanceChange(
        uint128 platform,
        bytes32 account,
        uint96 cap,
        uint40 expiresAt,
        uint64 nonce,
        uint40 deadline
    ) internal pure returns (bytes32) {
        return keccak256(abi.encode(ALLOWANCE_CHANGE, platform, account, cap, expiresAt, nonce, deadline));
    }

    function hashReceipt(ICreditVault.UsageReceipt calldata receipt) internal pure returns (bytes32) {
        // Two halves: one abi.encode of them all is beyond the stack of unoptimised code, which coverage needs.
        bytes memory call = abi.encode(
            USAGE_RECEIPT,
            receipt.platform,
            receipt.account,
            receipt.chargeId,
            receipt.requestHash,
            receipt.responseHash,
            keccak256(bytes(receipt.model))
        );
        bytes memory cost = abi.encode(
            receipt.inputTokens,
            receipt.cachedInputTokens,
            receipt.outputTokens,
            receipt.reasoningTokens,
            receipt.usageHash,
            receipt.priceId,
            receipt.amount,
            receipt.issuedAt,
            receipt.complete
        );
        return keccak256(bytes.concat(call, cost));
    }

    /// @dev EIP-712 encoding of `Charge[]`: keccak256 of the concatenated hashes of its elements. A charge's
    ///      four words in calldata are already its EIP-712 encoding, so each is copied as it stands: 130 gas
    ///      a charge, 960 through abi.encode. Words too wide for their field are hashed here like any other,
    ///      but `settle` reads every field it uses through the ABI decoder, which refuses them.
    function _hashCharges(ICreditVault.Charge[] calldata charges) private pure returns (bytes32 hash) {
        bytes32 typeHash = CHARGE;
        assembly ("memory-safe") {
            // Past the free pointer: the hashes of the elements, then one element being encoded.
            let hashes := mload(0x40)
            let hashesLength := shl(5, charges.length)
            let encoding := add(hashes, hashesLength)
            mstore(encoding, typeHash)

            let source := charges.offset
            for { let offset := 0 } lt(offset, hashesLength) { offset := add(offset, 0x20) } {
                calldatacopy(add(encoding, 0x20), source, 0x80)
                mstore(add(hashes, offset), keccak256(encoding, 0xa0))
                source := add(source, 0x80)
            }
            hash := keccak256(hashes, hashesLength)
        }
    }
}
