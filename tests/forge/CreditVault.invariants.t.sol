// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { CreditVault } from "../../contracts/CreditVault.sol";
import { ICreditVault } from "../../contracts/interfaces/ICreditVault.sol";

import { Harness } from "./Harness.sol";
import { VaultHandler } from "./VaultHandler.sol";

/// @dev What holds after any sequence of calls.
contract CreditVaultInvariants is Harness {
    uint256 private constant CREDIT_PER_TOKEN = 1e6;

    VaultHandler private _handler;
    CreditVault private _vault;

    function setUp() external {
        _handler = new VaultHandler();
        _vault = _handler.vault();
    }

    function targetContracts() external view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(_handler);
    }

    function targetSelectors() external view returns (FuzzSelector[] memory targets) {
        targets = new FuzzSelector[](1);
        targets[0] = FuzzSelector(address(_handler), _handler.selectors());
    }

    /// @dev All in one, as forge would otherwise play the same calls again for each.
    function invariant_books() external view {
        VaultHandler.Tenant[] memory tenants = _handler.tenants();
        VaultHandler.Holder[] memory holders = _handler.holders();
        ICreditVault.AccountView[] memory states = new ICreditVault.AccountView[](holders.length);
        for (uint256 i = 0; i < holders.length; ++i) {
            states[i] = _vault.accountOf(tenants[holders[i].tenant].id, holders[i].account);
        }
        _assertSolvency(tenants, states);
        _assertConservation(tenants, holders, states);
        _assertWindows(holders, states);
    }

    /// @dev Each id is charged at most once, and is used if and only if it was charged.
    function afterInvariant() external view {
        VaultHandler.Tenant[] memory tenants = _handler.tenants();
        uint64 first = _handler.FIRST_ID();
        for (uint256 i = 0; i < tenants.length; ++i) {
            for (uint64 id = first; id < first + _handler.IDS(); ++id) {
                uint256 times = _handler.timesCharged(i, id);
                assertLe(times, 1, "charged once");
                assertTrue(_vault.isSettled(tenants[i].id, id) == (times == 1), "used if charged");
            }
        }
    }

    /// @dev The calls above are worth nothing if they never get anywhere.
    function test_handler_manyBatches_meetEveryOutcome() external {
        for (uint256 i = 0; i < 100; ++i) {
            uint256 seed = uint256(keccak256(abi.encode(i)));
            if (i % 4 == 0) _handler.deposit(seed, seed >> 8);
            if (i % 4 == 1) _handler.requestExit(seed, seed >> 8);
            if (i % 16 == 2) _handler.setPolicy(seed, seed >> 8);
            if (i % 32 == 3) _handler.finalizeExit(seed, seed >> 8);
            if (i % 8 == 3) _handler.wait(seed);
            _handler.settle(seed);
        }
        assertLe(1, _handler.draws(), "draws");
        for (uint256 reason = 0; reason <= uint256(ICreditVault.Rejection.PolicyExpired); ++reason) {
            uint256 times = _handler.rejections(ICreditVault.Rejection(reason));
            assertLe(1, times, "rejections");
        }
        VaultHandler.Tenant[] memory tenants = _handler.tenants();
        for (uint256 i = 0; i < tenants.length; ++i) {
            assertLe(1, tenants[i].charged, "charged");
        }
    }

    /// @dev token balance × 10⁶ = Σ balances + Σ exits + Σ earnings + donations × 10⁶
    function _assertSolvency(VaultHandler.Tenant[] memory tenants, ICreditVault.AccountView[] memory states)
        private
        view
    {
        uint256 credit;
        for (uint256 i = 0; i < tenants.length; ++i) {
            credit += _vault.platformOf(tenants[i].id).earnings;
        }
        for (uint256 i = 0; i < states.length; ++i) {
            credit += uint256(states[i].balance) + states[i].exitAmount;
        }
        uint256 backing = _handler.token().balanceOf(address(_vault)) * CREDIT_PER_TOKEN;
        assertLe(credit, backing, "credit is backed");
        assertEq(credit + _handler.donated() * CREDIT_PER_TOKEN, backing, "and nothing else is lost or made");
    }

    /// @dev Each account: balance + exit = deposited − charged − paid out, and every money event has its line.
    ///      Each platform: earnings = charged − withdrawn.
    function _assertConservation(
        VaultHandler.Tenant[] memory tenants,
        VaultHandler.Holder[] memory holders,
        ICreditVault.AccountView[] memory states
    ) private view {
        for (uint256 i = 0; i < tenants.length; ++i) {
            uint256 earnings = _vault.platformOf(tenants[i].id).earnings;
            assertEq(earnings, tenants[i].charged - tenants[i].withdrawn, "earnings");
        }
        for (uint256 i = 0; i < holders.length; ++i) {
            uint256 left = holders[i].deposited - holders[i].charged - holders[i].paidOut;
            assertEq(uint256(states[i].balance) + states[i].exitAmount, left, "balance and exit");
            assertEq(states[i].entries, holders[i].entries, "entries");
        }
    }

    /// @dev Spent in the window ≤ its limit, by the logs and by what the vault says.
    function _assertWindows(VaultHandler.Holder[] memory holders, ICreditVault.AccountView[] memory states)
        private
        pure
    {
        for (uint256 i = 0; i < holders.length; ++i) {
            assertLe(holders[i].spent, holders[i].ceiling, "spent in window");
            assertEq(states[i].policy.windowSeconds, holders[i].windowSeconds, "window length");
            assertEq(states[i].window, holders[i].window, "window number");
            assertEq(states[i].spentInWindow, holders[i].spent, "spent in window as the vault says");
        }
    }
}
