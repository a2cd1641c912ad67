// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// @title IERC3009
/// @notice The functions of EIP-3009 the vault calls, in the overload that USDC has since version 2.2.
/// @dev Source: https://eips.ethereum.org/EIPS/eip-3009 and circlefin/stablecoin-evm, FiatTokenV2_2. In both,
///      `validAfter` and `validBefore` are exclusive, and `signature` is 65 bytes r ‖ s ‖ v of a key, or what
///      the contract `from` accepts by ERC-1271.
interface IERC3009 {
    /// @notice Moves `value` from `from` to `to`, as `from` has signed; anyone may submit.
    function transferWithAuthorization(
        address from,
        address to,
        uint256 value,
        uint256 validAfter,
        uint256 validBefore,
        bytes32 nonce,
        bytes calldata signature
    ) external;

    /// @notice Moves `value` from `from` to the caller, who must be `to`, as `from` has signed.
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
