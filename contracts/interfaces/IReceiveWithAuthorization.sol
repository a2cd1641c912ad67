// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// @title IReceiveWithAuthorization
/// @notice The one function of EIP-3009 the vault calls, in the overload that USDC has since version 2.2.
interface IReceiveWithAuthorization {
    /// @notice Moves `value` from `from` to the caller, who must be `to`, as `from` has signed.
    /// @param signature 65 bytes r ‖ s ‖ v of a key, or what the contract `from` accepts by ERC-1271
    function receiveWithAuthorization(
        address from,
        address to,
        uint256 value,
        uint256 validAfter,
        uint256 validBefore,
        bytes32 nonce,
        bytes calldata signature
    ) external;
}
