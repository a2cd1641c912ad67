// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { Address } from "@openzeppelin/contracts/utils/Address.sol";

import { TrustingToken } from "./TrustingToken.sol";

/// @title ReentrantToken
/// @notice Once armed, calls back in the middle of its next transfer, when the tokens have already moved.
contract ReentrantToken is TrustingToken {
    address private _target;
    bytes private _data;

    function arm(address target, bytes calldata data) external {
        _target = target;
        _data = data;
    }

    function _update(address from, address to, uint256 value) internal override {
        super._update(from, to, value);
        if (_target == address(0)) return;

        address target = _target;
        _target = address(0);
        Address.functionCall(target, _data);
    }
}
