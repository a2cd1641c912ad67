// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { IERC20 } from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import { SafeERC20 } from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import { Address } from "@openzeppelin/contracts/utils/Address.sol";

/// @title DepositAddress
/// @notice An address tokens can be sent to before any code is there. The vault clones this contract to it
///         and has the tokens sent on. It can do nothing else.
contract DepositAddress {
    using SafeERC20 for IERC20;

    /// @notice The only caller; in the code, and so the same for every clone.
    address public immutable vault;

    error NotVault(address caller, address vault);

    modifier onlyVault() {
        if (msg.sender != vault) revert NotVault(msg.sender, vault);
        _;
    }

    constructor() {
        vault = msg.sender;
    }

    /// @notice Sends `amount` of `token` to `to`. Vault only.
    function send(IERC20 token, address to, uint256 amount) external onlyVault {
        token.safeTransfer(to, amount);
    }

    /// @notice Sends the chain's own coin, which is not taken any more once the code is here, to `to`. Vault only.
    /// @param amount wei
    function sendNative(address payable to, uint256 amount) external onlyVault {
        Address.sendValue(to, amount);
    }
}
