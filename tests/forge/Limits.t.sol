// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { ICreditVault } from "../../contracts/interfaces/ICreditVault.sol";
import { PlainToken } from "../../contracts/mocks/PlainToken.sol";

import { AllowanceModel } from "./AllowanceModel.sol";
import { VaultFixture } from "./VaultFixture.sol";

// Numbers drawn are cut to size all over.
// forge-lint: disable-start(unsafe-typecast)

/// @dev What policies and allowances let through, against models of them, by settling.
contract LimitsTest is VaultFixture {
    /// @dev Windows of 60 seconds are numbered in uint32 until then.
    uint256 private constant LAST_TIME = 60 * 2 ** 32 - 1;

    bytes32 private _account;
    AllowanceModel private _model;

    /// @dev With more credit than any window limit.
    function setUp() external {
        PlainToken token = new PlainToken(6);
        _open(address(token));
        token.mint(address(this), MAX_TOKENS);
        token.approve(address(_vault), MAX_TOKENS);
        _account = _vault.deposit(_platform, USER, "", MAX_TOKENS);
        _model.start();
    }

    /// @dev Σ charges in [n × windowSeconds, (n + 1) × windowSeconds) ≤ maxPerWindow, for each n by itself.
    function testFuzz_settle_acrossWindows_countsEachByItself(
        uint32 windowSeconds,
        uint256 time,
        uint80 limit,
        uint256[12] calldata dice
    ) external {
        windowSeconds = uint32(bound(windowSeconds, 60, type(uint32).max));
        vm.warp(bound(time, 1, LAST_TIME));
        _setWindow(windowSeconds, limit);

        uint256 start = block.timestamp - block.timestamp % windowSeconds;
        uint256 spent;
        for (uint256 i = 0; i < dice.length; ++i) {
            uint256 end = start + windowSeconds;
            _move(dice[i], end, windowSeconds);
            if (block.timestamp >= end) {
                start = block.timestamp - block.timestamp % windowSeconds;
                spent = 0;
            }
            uint256 amount = _amountAround(dice[i] >> 128, limit - spent);
            bool charged = _charge(_account, amount);
            assertTrue(charged == (amount != 0 && spent + amount <= limit), "charged");
            if (charged) spent += amount;

            (uint256 left, uint256 endsAt) = _vault.remainingInWindow(_platform, _account);
            assertEq(left, limit - spent, "left");
            assertEq(endsAt, start + windowSeconds, "ends at");
        }
    }

    /// @dev What was spent in a window that is not over counts in full against the one that takes its place.
    function testFuzz_setPolicy_withAnotherWindow_keepsWhatIsSpentInThisOne(
        uint32 before,
        uint32 then,
        uint256 time,
        uint80 spent,
        uint80 limit,
        uint256 dice
    ) external {
        before = uint32(bound(before, 60, type(uint32).max));
        then = uint32(bound(then, 60, type(uint32).max));
        vm.warp(bound(time, 1, LAST_TIME));
        _setWindow(before, type(uint80).max);
        if (spent != 0) _charge(_account, spent);
        uint256 window = block.timestamp / before;
        _move(dice, (window + 1) * before, before);
        uint256 kept = block.timestamp / before == window ? spent : 0;

        _setWindow(then, limit);
        uint256 expected = kept < limit ? limit - kept : 0;
        (uint256 left, uint256 endsAt) = _vault.remainingInWindow(_platform, _account);
        assertEq(left, expected, "left");
        assertEq(endsAt, (block.timestamp / then + 1) * then, "ends at");
        assertTrue(!_charge(_account, expected + 1), "no more");
        if (expected != 0) assertTrue(_charge(_account, expected), "all of it");
    }

    /// @dev spent ≤ cap that binds, time < expiry that binds: a change that loosens at once, one that tightens
    ///      after the exit delay, each in the place of the one before.
    function testFuzz_setAllowance_anyChangesAndCharges_bindsAsItSays(uint256[16] calldata dice) external {
        for (uint256 i = 0; i < dice.length; ++i) {
            uint256 what = dice[i] % 4;
            if (what == 0) {
                vm.warp(block.timestamp + bound(dice[i] >> 8, 1, 2 * EXIT_DELAY));
            } else if (what == 1 && _model.changesAt() != 0) {
                vm.warp(_model.changesAt() - dice[i] / 256 % 2);
            } else if (what == 2) {
                _changeAllowance(dice[i] >> 8);
            }
            uint256 left = _model.capNow() < _model.spent ? 0 : _model.capNow() - _model.spent;
            uint256 amount = _amountAround(dice[i] >> 128, left < 1e24 ? left : 1e24);
            bool allowed = amount <= left && block.timestamp < _model.expiryNow();
            assertTrue(_charge(_account, amount) == (amount != 0 && allowed), "charged");
            if (amount != 0 && allowed) _model.charge(amount);
            _assertModel();
        }
    }

    /// @dev The largest uint96 and uint40, and neither: the extremes of each field.
    function testFuzz_setAllowance_anyNumbers_bindsAsItSays(uint96[4] calldata caps, uint40[4] calldata times)
        external
    {
        for (uint256 i = 0; i < caps.length; ++i) {
            vm.prank(USER);
            _vault.setAllowance(_platform, USER, "", caps[i], times[i]);
            _model.change(caps[i], times[i], EXIT_DELAY);
            _assertModel();
            vm.warp(block.timestamp + (uint256(times[i]) + caps[i]) % (2 * EXIT_DELAY));
            _assertModel();
        }
    }

    /// @dev available = the largest charge that settle makes.
    function testFuzz_available_anyAccount_isTheLargestCharge(uint256 dice, uint256 more) external {
        if (dice & 1 == 0) {
            vm.prank(USER);
            _vault.requestExit(_platform, USER, "", MAX_TOKENS - bound(dice >> 8, 0, 1000));
        }
        uint256 scale = 10 ** (dice >> 16 & 15) * 1e6;
        if (dice >> 1 & 1 == 0) {
            vm.prank(USER);
            _vault.setAllowance(
                _platform,
                USER,
                "",
                more >> 1 & 3 == 0 ? type(uint96).max : uint96(bound(more >> 8, 0, 8 * scale)),
                more & 1 == 0 ? type(uint40).max : uint40(block.timestamp + (more >> 96) % (3 * EXIT_DELAY))
            );
        }
        uint8 limits = uint8(dice >> 24 & 7);
        ICreditVault.Policy memory policy;
        if (limits & 1 != 0) policy.maxPerCharge = uint80(bound(dice >> 32, 0, 8 * scale) % 2 ** 80);
        if (limits & 2 != 0) {
            policy.maxPerWindow = uint80(bound(dice >> 64, 0, 8 * scale) % 2 ** 80);
            policy.windowSeconds = uint32(bound(dice >> 128, 60, EXIT_DELAY));
        }
        if (limits & 4 != 0) policy.expiresAt = uint40(block.timestamp + (dice >> 192) % (3 * EXIT_DELAY));
        _vault.setPolicy(_platform, _account, limits, policy);

        for (uint256 i = 0; i < 3; ++i) {
            _charge(_account, bound(uint256(keccak256(abi.encode(more, i))), 0, scale));
            vm.warp(block.timestamp + bound(more >> (64 * i), 0, EXIT_DELAY));
            uint256 available = _vault.available(_platform, _account);
            assertTrue(!_charge(_account, available + 1), "a unit more");
            if (more >> i & 1 == 0) {
                assertTrue(_charge(_account, available / 2) == (available / 2 != 0), "half of it");
                available = _vault.available(_platform, _account);
            }
            assertTrue(_charge(_account, available) == (available != 0), "all of it");
        }
    }

    // ──────────────────────────────────────────── Internal ───────────────────────────────────────────

    function _setWindow(uint32 windowSeconds, uint80 limit) private {
        _vault.setPolicy(_platform, _account, 2, ICreditVault.Policy(0, limit, windowSeconds, 0));
    }

    /// @dev Nowhere, to a window's last second, to the next one's first, or somewhere in the next two.
    function _move(uint256 dice, uint256 end, uint256 windowSeconds) private {
        uint256 to = block.timestamp;
        if (dice % 4 == 1) to = end - 1;
        if (dice % 4 == 2) to = end;
        if (dice % 4 == 3) to += (dice >> 2) % (2 * windowSeconds);
        if (to <= LAST_TIME) vm.warp(to);
    }

    /// @dev All that is left, a unit more, or any part of it.
    function _amountAround(uint256 dice, uint256 left) private pure returns (uint256) {
        if (dice % 4 == 0) return left;
        if (dice % 4 == 1) return left + 1;
        return bound(dice >> 2, 0, left);
    }

    function _changeAllowance(uint256 dice) private {
        uint256 cap = dice % 8 == 0 ? type(uint96).max : _model.spent + (dice >> 8) % 1e24;
        if (dice % 8 == 1) cap = _model.spent / 2;
        uint256 expiry =
            dice >> 128 & 1 == 0 ? type(uint40).max : block.timestamp + (dice >> 136) % (4 * EXIT_DELAY);
        vm.prank(USER);
        _vault.setAllowance(_platform, USER, "", uint96(cap), uint40(expiry));
        _model.change(cap, expiry, EXIT_DELAY);
    }

    function _assertModel() private view {
        ICreditVault.AccountView memory state = _vault.accountOf(_platform, _account);
        assertEq(state.allowance.cap, _model.capNow(), "cap");
        assertEq(state.allowance.spent, _model.spent, "spent");
        assertEq(state.allowance.expiresAt, _model.expiryNow(), "expiry");
        assertEq(state.allowanceChangesAt, _model.changesAt(), "changes at");
        assertEq(state.allowanceNonce, _model.nonce, "nonce");
        if (_model.changesAt() == 0) return;
        assertEq(state.nextCap, _model.cap, "next cap");
        assertEq(state.nextExpiresAt, _model.expiry, "next expiry");
    }
}
