// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { CreditVault } from "../../contracts/CreditVault.sol";
import { ICreditVault } from "../../contracts/interfaces/ICreditVault.sol";

import { AllowanceModel } from "./AllowanceModel.sol";
import { Books } from "./Books.sol";
import { Harness } from "./Harness.sol";

/// @dev The vault against the books of a handler.
abstract contract BooksInvariants is Harness {
    uint256 private constant CREDIT_PER_TOKEN = 1e6;

    Books private _books;
    CreditVault private _vault;
    bytes4[] private _selectors;

    function targetContracts() external view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(_books);
    }

    function targetSelectors() external view returns (FuzzSelector[] memory targets) {
        targets = new FuzzSelector[](1);
        targets[0] = FuzzSelector(address(_books), _selectors);
    }

    function _target(Books books, bytes4[] memory selectors) internal {
        (_books, _vault, _selectors) = (books, books.vault(), selectors);
    }

    function _assertBooks() internal view {
        Books.Tenant[] memory tenants = _books.tenants();
        Books.Holder[] memory holders = _books.holders();
        ICreditVault.AccountView[] memory states = new ICreditVault.AccountView[](holders.length);
        for (uint256 i = 0; i < holders.length; ++i) {
            states[i] = _vault.accountOf(tenants[holders[i].tenant].id, holders[i].account);
        }
        _assertPlatforms(tenants);
        _assertSolvency(tenants, states);
        _assertConservation(tenants, holders, states);
        for (uint256 i = 0; i < holders.length; ++i) {
            _assertAccount(holders[i], states[i]);
            _assertWindow(holders[i], states[i]);
            _assertAllowance(holders[i].allowance, states[i]);
        }
    }

    /// @dev Each id: times charged + times voided ≤ 1, and = 1 if and only if it is used; times refunded ≤ that.
    function _assertIds() internal view {
        Books.Tenant[] memory tenants = _books.tenants();
        uint64 first = _books.FIRST_ID();
        for (uint256 i = 0; i < tenants.length; ++i) {
            for (uint64 id = first; id < first + _books.IDS(); ++id) {
                uint256 uses = _books.timesCharged(i, id) + _books.timesVoided(i, id);
                assertLe(uses, 1, "charged or voided, once");
                assertTrue(_vault.isSettled(tenants[i].id, id) == (uses == 1), "used if charged or voided");
                assertLe(_books.timesRefunded(i, id), uses, "refunded once, and only what is used");
            }
        }
    }

    /// @dev Each platform: earnings = charged − refunded − withdrawn, and it is whose it was last accepted by.
    function _assertPlatforms(Books.Tenant[] memory tenants) private view {
        for (uint256 i = 0; i < tenants.length; ++i) {
            ICreditVault.PlatformView memory platform = _vault.platformOf(tenants[i].id);
            uint256 earnings = tenants[i].charged - tenants[i].refunded - tenants[i].withdrawn;
            assertEq(platform.earnings, earnings, "earnings");
            assertTrue(platform.owner == tenants[i].owner, "owner");
            assertTrue(platform.pendingOwner == tenants[i].pendingOwner, "pending owner");
            assertTrue(platform.payout == tenants[i].payout, "payout");
            assertEq(platform.exitDelay, tenants[i].exitDelay, "exit delay");
        }
    }

    /// @dev token balance × 10⁶ = Σ balances + Σ exits + Σ earnings + donations × 10⁶, and each inbox holds what
    ///      came into it and was not booked.
    function _assertSolvency(Books.Tenant[] memory tenants, ICreditVault.AccountView[] memory states)
        private
        view
    {
        uint256 credit;
        for (uint256 i = 0; i < tenants.length; ++i) {
            credit += _vault.platformOf(tenants[i].id).earnings;
            uint256 held = _books.token().balanceOf(_vault.inbox(tenants[i].id));
            assertEq(held, tenants[i].inbox, "inbox");
        }
        for (uint256 i = 0; i < states.length; ++i) {
            credit += uint256(states[i].balance) + states[i].exitAmount;
        }
        uint256 backing = _books.token().balanceOf(address(_vault)) * CREDIT_PER_TOKEN;
        assertLe(credit, backing, "credit is backed");
        assertEq(credit + _books.donated() * CREDIT_PER_TOKEN, backing, "and nothing else is lost or made");
    }

    /// @dev Σ deposits = Σ charges − Σ refunds + Σ paid out + Σ (balances + exits), for each platform.
    function _assertConservation(
        Books.Tenant[] memory tenants,
        Books.Holder[] memory holders,
        ICreditVault.AccountView[] memory states
    ) private pure {
        for (uint256 tenant = 0; tenant < tenants.length; ++tenant) {
            uint256 deposited;
            uint256 left;
            uint256 paidOut;
            for (uint256 i = 0; i < holders.length; ++i) {
                if (holders[i].tenant != tenant) continue;
                deposited += holders[i].deposited;
                paidOut += holders[i].paidOut;
                left += uint256(states[i].balance) + states[i].exitAmount;
            }
            uint256 earned = tenants[tenant].charged - tenants[tenant].refunded;
            assertEq(deposited, earned + paidOut + left, "deposits");
        }
    }

    /// @dev Each account: balance + exit = deposited + refunded + allocated to it − allocated from it − charged
    ///      − paid out; exit = requested − drawn − cancelled − finalized; lines = money events.
    function _assertAccount(Books.Holder memory holder, ICreditVault.AccountView memory state) private pure {
        uint256 came = holder.deposited + holder.refunded + holder.received;
        uint256 went = holder.given + holder.charged + holder.paidOut;
        assertEq(uint256(state.balance) + state.exitAmount, came - went, "balance and exit");
        assertEq(state.exitAmount, holder.exit, "exit");
        if (holder.exit != 0) assertEq(state.exitMaturesAt, holder.exitMaturesAt, "maturity");
        assertEq(state.entries, holder.entries, "entries");
    }

    /// @dev Spent in the window ≤ its limit, by the logs and by what the vault says.
    function _assertWindow(Books.Holder memory holder, ICreditVault.AccountView memory state) private pure {
        assertLe(holder.spent, holder.ceiling, "spent in window");
        assertEq(state.policy.windowSeconds, holder.windowSeconds, "window length");
        assertEq(state.window, holder.window, "window number");
        assertEq(state.spentInWindow, holder.spent, "spent in window as the vault says");
    }

    /// @dev Until a change binds, cap = max(cap that bound, new cap), and so the expiry; then, the new ones. That
    ///      spent ≤ cap that bound, the books see with each charge.
    function _assertAllowance(AllowanceModel memory model, ICreditVault.AccountView memory state)
        private
        view
    {
        assertEq(state.allowance.spent, model.spent, "spent under an allowance");
        assertEq(state.allowance.cap, model.capNow(), "cap");
        assertEq(state.allowance.expiresAt, model.expiryNow(), "allowance expiry");
        assertEq(state.allowanceChangesAt, model.changesAt(), "allowance change");
        assertEq(state.allowanceNonce, model.nonce, "allowance nonce");
        if (model.changesAt() == 0) return;
        assertEq(state.nextCap, model.cap, "next cap");
        assertEq(state.nextExpiresAt, model.expiry, "next allowance expiry");
    }
}
