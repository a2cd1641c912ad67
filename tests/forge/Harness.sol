// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// @dev The cheatcodes used here.
interface Vm {
    struct Log {
        bytes32[] topics;
        bytes data;
        address emitter;
    }

    function warp(uint256 timestamp) external;
    function prank(address sender) external;
    function addr(uint256 key) external pure returns (address);
    function sign(uint256 key, bytes32 digest) external pure returns (uint8 v, bytes32 r, bytes32 s);
    function recordLogs() external;
    function getRecordedLogs() external returns (Log[] memory);
    function expectRevert(bytes calldata data) external;
}

/// @dev In place of forge-std, of which npm has no maintained package. Forge takes a test that reverts for one
///      that failed, and asks an invariant test for its targets by these names.
abstract contract Harness {
    Vm internal constant vm = Vm(0x7109709ECfa91a80626fF3989D68f67F5b1DD12D);

    struct FuzzSelector {
        address addr;
        bytes4[] selectors;
    }

    error NotEqual(string what, uint256 left, uint256 right);
    error Greater(string what, uint256 left, uint256 right);
    error False(string what);

    function assertEq(uint256 left, uint256 right, string memory what) internal pure {
        if (left != right) revert NotEqual(what, left, right);
    }

    function assertLe(uint256 left, uint256 right, string memory what) internal pure {
        if (left > right) revert Greater(what, left, right);
    }

    function assertTrue(bool condition, string memory what) internal pure {
        if (!condition) revert False(what);
    }

    /// @dev A number from `min` to `max`, both included.
    function bound(uint256 value, uint256 min, uint256 max) internal pure returns (uint256) {
        return min == 0 && max == type(uint256).max ? value : min + value % (max - min + 1);
    }

    function sign(uint256 key, bytes32 digest) internal pure returns (bytes memory) {
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(key, digest);
        return abi.encodePacked(r, s, v);
    }
}
