// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { IERC3009 } from "../interfaces/IERC3009.sol";
import { PlainToken } from "./PlainToken.sol";

/// @title TrustingToken
/// @notice Moves what it is told by EIP-3009, whatever the signature: it is the vault that is under test.
contract TrustingToken is PlainToken(6), IERC3009 {
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

    function receiveWithAuthorization(
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
