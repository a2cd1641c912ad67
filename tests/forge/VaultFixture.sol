// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { CreditVault } from "../../contracts/CreditVault.sol";
import { ICreditVault } from "../../contracts/interfaces/ICreditVault.sol";

import { Signing } from "./Signing.sol";

/// @dev One platform, which this contract owns, in a vault of any token.
abstract contract VaultFixture is Signing {
    uint256 internal constant METER_KEY = 0xA11;
    address internal constant USER = address(0x3001);
    address internal constant PAYOUT = address(0x2001);
    uint32 internal constant EXIT_DELAY = 1 days;
    /// @dev Token base units whose credit fits uint96.
    uint256 internal constant MAX_TOKENS = uint256(type(uint96).max) / 1e6;

    CreditVault internal _vault;
    uint128 internal _platform;
    uint64 internal _lastId;

    function _open(address token) internal {
        vm.warp(30 days);
        _vault = new CreditVault(token);
        _platform = _vault.registerPlatform("", PAYOUT, vm.addr(METER_KEY), EXIT_DELAY);
    }

    /// @return charged whether it was, and not rejected
    function _charge(bytes32 account, uint256 amount) internal returns (bool charged) {
        ICreditVault.Charge[] memory charges = new ICreditVault.Charge[](1);
        // forge-lint: disable-next-line(unsafe-typecast): credit there is fits
        charges[0] = ICreditVault.Charge(account, ++_lastId, uint96(amount), "");
        uint40 deadline = uint40(block.timestamp);
        bytes32 structHash = settlementHash(_platform, charges, deadline);
        _vault.settle(_platform, charges, deadline, sign(METER_KEY, digestOf(address(_vault), structHash)));
        return _vault.isSettled(_platform, _lastId);
    }

    function _balance(bytes32 account) internal view returns (uint256) {
        return _vault.accountOf(_platform, account).balance;
    }
}
