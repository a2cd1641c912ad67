// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { Address } from "@openzeppelin/contracts/utils/Address.sol";

import { PlainToken } from "./PlainToken.sol";

/// @title ReentrantToken
/// @notice Once armed, calls back in the middle of its next transfer, when the tokens have already moved.
contract ReentrantToken is PlainToken(6) {
    address private _target;
    bytes private _data;

    function arm(address target, bytes calldata data) external {
        _target = target;
        _data = data;
    }

    /// @dev Any signature will do: it is the vault that is under test.
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

    /// @dev As above.
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

    function _update(address from, address to, uint256 value) internal override {
        super._update(from, to, value);
        if (_target == address(0)) return;

        address target = _target;
        _target = address(0);
        Address.functionCall(target, _data);
    }
}
