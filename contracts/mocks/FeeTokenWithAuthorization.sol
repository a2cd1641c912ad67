// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { FeeToken } from "./FeeToken.sol";

/// @title FeeTokenWithAuthorization
/// @notice A FeeToken that can be paid with by EIP-3009.
contract FeeTokenWithAuthorization is FeeToken {
    /// @dev Any signature will do: it is the vault that is under test.
    function transferWithAuthorization(
        address from,
        address to,
        uint256 value,
        uint256,
        uint256,
        bytes32,
        bytes calldata
    ) external {
        _transfer(from, to, value);
    }
}
