// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { ICreditVault } from "../../contracts/interfaces/ICreditVault.sol";
import { TestUSDC } from "../../contracts/mocks/TestUSDC.sol";

import { Harness } from "./Harness.sol";

/// @dev Everything that is signed, encoded the plain way of EIP-712: the contracts' own encoding is under test.
abstract contract Signing is Harness {
    function digestOf(address vault, bytes32 structHash) internal view returns (bytes32) {
        bytes32 domain = keccak256(
            abi.encode(
                keccak256(
                    "EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"
                ),
                keccak256("Waterfall CreditVault"),
                keccak256("1"),
                block.chainid,
                vault
            )
        );
        return keccak256(abi.encodePacked(hex"1901", domain, structHash));
    }

    function settlementHash(uint128 platform, ICreditVault.Charge[] memory charges, uint40 deadline)
        internal
        pure
        returns (bytes32)
    {
        bytes32[] memory hashes = new bytes32[](charges.length);
        for (uint256 i = 0; i < charges.length; ++i) {
            hashes[i] = keccak256(
                abi.encode(
                    keccak256("Charge(bytes32 account,uint64 id,uint96 amount,bytes32 receiptHash)"),
                    charges[i].account,
                    charges[i].id,
                    charges[i].amount,
                    charges[i].receiptHash
                )
            );
        }
        return keccak256(
            abi.encode(
                keccak256(
                    "Settlement(uint128 platform,Charge[] charges,uint40 deadline)"
                    "Charge(bytes32 account,uint64 id,uint96 amount,bytes32 receiptHash)"
                ),
                platform,
                keccak256(abi.encodePacked(hashes)),
                deadline
            )
        );
    }

    function voidingHash(uint128 platform, uint64[] memory ids, uint40 deadline)
        internal
        pure
        returns (bytes32)
    {
        bytes memory words;
        for (uint256 i = 0; i < ids.length; ++i) {
            words = bytes.concat(words, abi.encode(ids[i]));
        }
        return keccak256(
            abi.encode(
                keccak256("Voiding(uint128 platform,uint64[] ids,uint40 deadline)"),
                platform,
                keccak256(words),
                deadline
            )
        );
    }

    function inboxBookingHash(uint128 platform, address payer, bytes32 nonce, uint256 tokens, uint40 deadline)
        internal
        pure
        returns (bytes32)
    {
        return keccak256(
            abi.encode(
                keccak256(
                    "InboxBooking(uint128 platform,address payer,bytes32 nonce,uint256 tokens,uint40 deadline)"
                ),
                platform,
                payer,
                nonce,
                tokens,
                deadline
            )
        );
    }

    function exitConsentHash(
        uint128 platform,
        bytes32 account,
        uint256 tokens,
        address to,
        bytes32 nonce,
        uint40 deadline
    ) internal pure returns (bytes32) {
        return keccak256(
            abi.encode(
                keccak256(
                    "ExitConsent(uint128 platform,bytes32 account,uint256 tokens,address to,bytes32 nonce,"
                    "uint40 deadline)"
                ),
                platform,
                account,
                tokens,
                to,
                nonce,
                deadline
            )
        );
    }

    function allowanceChangeHash(
        uint128 platform,
        bytes32 account,
        uint96 cap,
        uint40 expiresAt,
        uint64 nonce,
        uint40 deadline
    ) internal pure returns (bytes32) {
        return keccak256(
            abi.encode(
                keccak256(
                    "AllowanceChange(uint128 platform,bytes32 account,uint96 cap,uint40 expiresAt,uint64 nonce,"
                    "uint40 deadline)"
                ),
                platform,
                account,
                cap,
                expiresAt,
                nonce,
                deadline
            )
        );
    }

    /// @dev An EIP-3009 authorization, valid for ever, of either kind.
    function authorizationDigest(
        TestUSDC token,
        bytes32 typeHash,
        address from,
        address to,
        uint256 tokens,
        bytes32 nonce
    ) internal view returns (bytes32) {
        bytes32 structHash = keccak256(abi.encode(typeHash, from, to, tokens, 0, type(uint256).max, nonce));
        return keccak256(abi.encodePacked(hex"1901", token.DOMAIN_SEPARATOR(), structHash));
    }
}
