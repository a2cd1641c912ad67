// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { CreditVault } from "../../contracts/CreditVault.sol";
import { ICreditVault } from "../../contracts/interfaces/ICreditVault.sol";
import { PlainToken } from "../../contracts/mocks/PlainToken.sol";
import { TestUSDC } from "../../contracts/mocks/TestUSDC.sol";

import { Books } from "./Books.sol";
import { VaultHandler } from "./VaultHandler.sol";

// Numbers drawn are cut to size all over.
// forge-lint: disable-start(unsafe-typecast)

/// @dev People as ever, and platforms that stop at nothing.
contract HostilePlatformHandler is VaultHandler {
    /// @dev Of charges for nothing: as many as it likes.
    uint64 private _lastId = 1_000_000;

    constructor(CreditVault vault_, TestUSDC token_, PlainToken wrongToken_)
        VaultHandler(vault_, token_, wrongToken_)
    { }

    /// @dev Lifts the limits of all its accounts and charges all that is there, exits and all: whole, in halves,
    ///      to the last unit. Other accounts it names too.
    function drain(uint256 seed) external {
        uint256 tenant = seed % _tenants.length;
        uint256 key = _meterKey(_tenants[tenant], seed >> 16);
        if (key == 0) return;
        if ((seed >> 8) % 2 == 0) _liftLimits(tenant);
        ICreditVault.Charge[] memory charges = new ICreditVault.Charge[](3 * _holders.length);
        for (uint256 i = 0; i < _holders.length; ++i) {
            ICreditVault.AccountView memory state = _view(_holders[i]);
            uint96[3] memory amounts =
                [state.balance + state.exitAmount, (state.balance + state.exitAmount) / 2, state.balance + 1];
            for (uint256 j = 0; j < 3; ++j) {
                charges[3 * i + j] = ICreditVault.Charge(
                    _holders[i].account, ++_lastId, amounts[(j + (seed >> 24)) % 3], bytes32(seed)
                );
            }
        }
        _settle(tenant, key, charges, _deadline(seed, 1 hours));
    }

    /// @dev With no meter left, nobody can be charged, and nobody be kept either.
    function retireAll(uint256 seed) external {
        Tenant storage tenant = _tenant(seed);
        while (tenant.meterKeys.length != 0) _retire(tenant, 0, seed >> 8);
    }

    function selectors() external pure override returns (bytes4[] memory list) {
        list = new bytes4[](20);
        list[0] = this.deposit.selector;
        list[1] = this.depositFromInbox.selector;
        list[2] = this.requestExit.selector;
        list[3] = this.requestExit.selector;
        list[4] = this.requestExit.selector;
        list[5] = this.cancelExit.selector;
        list[6] = this.finalizeExit.selector;
        list[7] = this.setAllowance.selector;
        list[8] = this.wait.selector;
        list[9] = this.drain.selector;
        list[10] = this.drain.selector;
        list[11] = this.settle.selector;
        list[12] = this.setPolicy.selector;
        list[13] = this.refund.selector;
        list[14] = this.allocate.selector;
        list[15] = this.withdrawEarnings.selector;
        list[16] = this.transferPlatform.selector;
        list[17] = this.acceptPlatform.selector;
        list[18] = this.addMeter.selector;
        list[19] = this.retireAll.selector;
    }

    function _liftLimits(uint256 tenant) private {
        ICreditVault.Policy memory none;
        for (uint256 i = 0; i < _holders.length; ++i) {
            Holder storage holder = _holders[i];
            if (holder.tenant != tenant) continue;
            vm.prank(_tenants[tenant].owner);
            vault.setPolicy(_tenants[tenant].id, holder.account, 0, none);
            (holder.windowSeconds, holder.window, holder.spent, holder.ceiling) = (0, 0, 0, 0);
        }
    }
}
