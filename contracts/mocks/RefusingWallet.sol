// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { IERC1271 } from "@openzeppelin/contracts/interfaces/IERC1271.sol";

/// @title RefusingWallet
/// @notice Code that accepts no signature, nor anything else: what a key may delegate to by EIP-7702.
contract RefusingWallet is IERC1271 {
    error Refused();

    bool private immutable _reverts;

    constructor(bool reverts) {
        _reverts = reverts;
    }

    fallback() external {
        revert Refused();
    }

    function isValidSignature(bytes32, bytes calldata) external view returns (bytes4) {
        if (_reverts) revert Refused();
        return 0xffffffff;
    }
}
