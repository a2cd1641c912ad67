// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { CreditVault } from "../../contracts/CreditVault.sol";
import { ICreditVault } from "../../contracts/interfaces/ICreditVault.sol";
import { TestUSDC } from "../../contracts/mocks/TestUSDC.sol";

import { Harness, Vm } from "./Harness.sol";

// Numbers drawn are cut to size all over.
// forge-lint: disable-start(unsafe-typecast)

/// @dev Calls the vault as its people would, never in a way that reverts, and keeps its own books of what
///      went in and out. What was charged it learns from the logs, as the world does.
contract VaultHandler is Harness {
    struct Tenant {
        uint128 id;
        address owner;
        address payout;
        uint256 meterKey;
        /// @dev Ghosts, credit.
        uint256 charged;
        uint256 withdrawn;
    }

    struct Holder {
        uint256 tenant;
        address owner;
        bytes32 account;
        /// @dev Ghosts, credit.
        uint256 deposited;
        uint256 charged;
        uint256 paidOut;
        uint256 entries;
        /// @dev Ghosts of the window limit: the window, what was spent in it, and the most that may be.
        uint256 windowSeconds;
        uint256 window;
        uint256 spent;
        uint256 ceiling;
    }

    uint256 private constant CREDIT_PER_TOKEN = 1e6;
    /// @dev Few ids, so that they are often used again, on both sides of a word's edge.
    uint64 public constant FIRST_ID = 192;
    uint64 public constant IDS = 128;
    bytes32 private constant LABEL = "label";
    uint256 private constant PAYER_KEY = 0xFA7E;

    CreditVault public immutable vault;
    TestUSDC public immutable token;

    Tenant[] private _tenants;
    Holder[] private _holders;
    uint256 public donated;
    mapping(uint256 tenant => mapping(uint64 id => uint256)) public timesCharged;
    /// @dev How often each thing happened that a batch can lead to.
    mapping(ICreditVault.Rejection reason => uint256) public rejections;
    uint256 public draws;
    uint256 private _salt;

    constructor() {
        token = new TestUSDC(address(this));
        vault = new CreditVault(address(token));
        for (uint256 tenant = 0; tenant < 2; ++tenant) {
            uint256 meterKey = 0xA11 + tenant;
            address owner = address(uint160(0x1000 + tenant));
            address payout = address(uint160(0x2000 + tenant));
            vm.prank(owner);
            uint128 id =
                vault.registerPlatform("", payout, vm.addr(meterKey), uint32(1 hours + tenant * 1 days));
            _tenants.push(Tenant(id, owner, payout, meterKey, 0, 0));
            _open(tenant, address(0)); // held by the platform
            _open(tenant, address(0x3001));
            _open(tenant, address(0x3002));
        }
    }

    // ──────────────────────────────────────────── Actions ────────────────────────────────────────────

    function deposit(uint256 seed, uint256 tokens) external {
        Holder storage holder = _holder(seed);
        tokens = bound(tokens, 1, 1000e6);
        token.mint(address(this), tokens);
        token.approve(address(vault), tokens);
        vault.deposit(_tenants[holder.tenant].id, holder.owner, LABEL, tokens);
        _booked(holder, tokens);
    }

    function depositWithAuthorization(uint256 seed, uint256 tokens) external {
        Holder storage holder = _holder(seed);
        uint128 platform = _tenants[holder.tenant].id;
        tokens = bound(tokens, 1, 1000e6);
        address payer = vm.addr(PAYER_KEY);
        token.mint(payer, tokens);
        bytes32 salt = bytes32(++_salt);
        bytes32 digest = keccak256(
            abi.encodePacked(
                hex"1901",
                token.DOMAIN_SEPARATOR(),
                keccak256(
                    abi.encode(
                        token.RECEIVE_WITH_AUTHORIZATION_TYPEHASH(),
                        payer,
                        address(vault),
                        tokens,
                        0,
                        type(uint256).max,
                        vault.depositNonce(platform, holder.owner, LABEL, salt)
                    )
                )
            )
        );
        vault.depositWithAuthorization(
            platform, holder.owner, LABEL, payer, tokens, 0, type(uint256).max, salt, sign(PAYER_KEY, digest)
        );
        _booked(holder, tokens);
    }

    function sweep(uint256 seed, uint256 tokens) external {
        Holder storage holder = _holder(seed);
        uint128 platform = _tenants[holder.tenant].id;
        tokens = bound(tokens, 1, 1000e6);
        token.mint(vault.depositAddress(platform, holder.owner, LABEL), tokens);
        vault.sweep(platform, holder.owner, LABEL);
        _booked(holder, tokens);
    }

    function donate(uint256 tokens) external {
        tokens = bound(tokens, 1, 10e6);
        token.mint(address(vault), tokens);
        donated += tokens;
    }

    /// @dev A batch for one platform: any of its accounts, ids that may be used, amounts around what is there.
    function settle(uint256 seed) external {
        uint256 tenant = seed % _tenants.length;
        uint128 platform = _tenants[tenant].id;
        ICreditVault.Charge[] memory charges = new ICreditVault.Charge[](1 + (seed >> 8) % 8);
        for (uint256 i = 0; i < charges.length; ++i) {
            uint256 dice = uint256(keccak256(abi.encode(seed, i)));
            // Mostly an account of this platform, sometimes one of the other, where it must find nothing.
            bytes32 account =
                _holders[dice % 8 == 0 ? (dice >> 8) % _holders.length : tenant * 3 + (dice >> 8) % 3].account;
            charges[i] = ICreditVault.Charge({
                account: account,
                id: FIRST_ID + uint64((dice >> 16) % IDS),
                amount: _amount(dice >> 32, vault.accountOf(platform, account)),
                receiptHash: bytes32(dice)
            });
        }

        ICreditVault.AccountView[] memory before = _views();
        uint40 deadline = uint40(block.timestamp + 10 minutes);
        bytes memory signature =
            sign(_tenants[tenant].meterKey, vault.hashSettlement(platform, charges, deadline));
        vm.recordLogs();
        vault.settle(platform, charges, deadline, signature);
        _readLogs(tenant);
        _assertMaturedExitsUntouched(before);
    }

    function setPolicy(uint256 seed, uint256 dice) external {
        Holder storage holder = _holder(seed);
        uint8 limits = uint8(dice % 8);
        ICreditVault.Policy memory policy;
        if (limits & vault.LIMIT_PER_CHARGE() != 0) policy.maxPerCharge = uint80((dice >> 8) % 300e12);
        if (limits & vault.LIMIT_PER_WINDOW() != 0) {
            policy.maxPerWindow = uint80((dice >> 64) % 1000e12);
            policy.windowSeconds = uint32(bound(dice >> 128, 60, 2 days));
        }
        if (limits & vault.LIMIT_EXPIRY() != 0) {
            policy.expiresAt = uint40(block.timestamp + (dice >> 192) % 10 days);
        }
        vm.prank(_tenants[holder.tenant].owner);
        vault.setPolicy(_tenants[holder.tenant].id, holder.account, limits, policy);

        bool counts = holder.windowSeconds != 0 && policy.windowSeconds != 0
            && holder.window == block.timestamp / holder.windowSeconds;
        holder.spent = counts ? holder.spent : 0;
        holder.windowSeconds = policy.windowSeconds;
        holder.window = policy.windowSeconds == 0 ? 0 : block.timestamp / policy.windowSeconds;
        // What was spent under a wider limit stays spent, but nothing can be added to it.
        holder.ceiling = holder.spent > policy.maxPerWindow ? holder.spent : policy.maxPerWindow;
    }

    function requestExit(uint256 seed, uint256 tokens) external {
        Holder storage holder = _holder(seed);
        uint256 most = _view(holder).balance / CREDIT_PER_TOKEN;
        if (most == 0) return;
        vm.prank(_actor(holder));
        vault.requestExit(_tenants[holder.tenant].id, holder.owner, LABEL, bound(tokens, 1, most));
        holder.entries++;
    }

    function cancelExit(uint256 seed) external {
        Holder storage holder = _holder(seed);
        if (_view(holder).exitAmount == 0) return;
        vm.prank(_actor(holder));
        vault.cancelExit(_tenants[holder.tenant].id, holder.owner, LABEL);
        holder.entries++;
    }

    function finalizeExit(uint256 seed, uint256 time) external {
        Holder storage holder = _holder(seed);
        ICreditVault.AccountView memory state = _view(holder);
        if (state.exitAmount == 0) return;
        if (block.timestamp < state.exitMaturesAt) {
            vm.warp(bound(time, state.exitMaturesAt, state.exitMaturesAt + 1));
        }
        address to = address(0x4001);
        uint256 before = token.balanceOf(to);
        vm.prank(_actor(holder));
        vault.finalizeExit(_tenants[holder.tenant].id, holder.owner, LABEL, to);
        holder.paidOut += (token.balanceOf(to) - before) * CREDIT_PER_TOKEN;
        holder.entries++;
    }

    function withdrawEarnings(uint256 seed, uint256 tokens) external {
        Tenant storage tenant = _tenants[seed % _tenants.length];
        uint256 most = vault.platformOf(tenant.id).earnings / CREDIT_PER_TOKEN;
        if (most == 0) return;
        uint256 before = token.balanceOf(tenant.payout);
        vm.prank(tenant.owner);
        vault.withdrawEarnings(tenant.id, bound(tokens, 1, most));
        tenant.withdrawn += (token.balanceOf(tenant.payout) - before) * CREDIT_PER_TOKEN;
    }

    function wait(uint256 time) external {
        vm.warp(block.timestamp + bound(time, 1, 12 hours));
    }

    // ──────────────────────────────────────────── Reading ────────────────────────────────────────────

    function tenants() external view returns (Tenant[] memory) {
        return _tenants;
    }

    function holders() external view returns (Holder[] memory) {
        return _holders;
    }

    function selectors() external pure returns (bytes4[] memory list) {
        list = new bytes4[](11);
        list[0] = this.deposit.selector;
        list[1] = this.depositWithAuthorization.selector;
        list[2] = this.sweep.selector;
        list[3] = this.donate.selector;
        list[4] = this.settle.selector;
        list[5] = this.setPolicy.selector;
        list[6] = this.requestExit.selector;
        list[7] = this.cancelExit.selector;
        list[8] = this.finalizeExit.selector;
        list[9] = this.withdrawEarnings.selector;
        list[10] = this.wait.selector;
    }

    // ──────────────────────────────────────────── Internal ───────────────────────────────────────────

    function _open(uint256 tenant, address owner) private {
        Holder storage holder = _holders.push();
        holder.tenant = tenant;
        holder.owner = owner;
        holder.account = vault.accountId(_tenants[tenant].id, owner, LABEL);
    }

    function _booked(Holder storage holder, uint256 tokens) private {
        holder.deposited += tokens * CREDIT_PER_TOKEN;
        holder.entries++;
    }

    function _readLogs(uint256 tenant) private {
        Vm.Log[] memory logs = vm.getRecordedLogs();
        for (uint256 i = 0; i < logs.length; ++i) {
            bytes32 kind = logs[i].topics[0];
            if (kind == ICreditVault.Charged.selector) _readCharge(tenant, logs[i]);
            else if (kind == ICreditVault.ExitDrawn.selector) draws++;
            else rejections[abi.decode(logs[i].data, (ICreditVault.Rejection))]++;
        }
    }

    function _readCharge(uint256 tenant, Vm.Log memory log) private {
        (uint256 amount, uint256 entry,) = abi.decode(log.data, (uint256, uint256, bytes32));
        Holder storage holder = _holderOf(log.topics[1]);
        assertEq(holder.tenant, tenant, "charged by its own platform only");
        timesCharged[tenant][uint64(uint256(log.topics[2]))]++;
        _tenants[tenant].charged += amount;
        holder.charged += amount;
        assertEq(entry, ++holder.entries, "line numbers have no gap");
        if (holder.windowSeconds == 0) return;

        uint256 window = block.timestamp / holder.windowSeconds;
        if (window != holder.window) {
            holder.window = window;
            holder.spent = 0;
            holder.ceiling = _view(holder).policy.maxPerWindow;
        }
        holder.spent += amount;
    }

    function _assertMaturedExitsUntouched(ICreditVault.AccountView[] memory before) private view {
        for (uint256 i = 0; i < before.length; ++i) {
            if (block.timestamp < before[i].exitMaturesAt) continue;
            assertEq(
                _view(_holders[i]).exitAmount, before[i].exitAmount, "a matured exit is the owner's alone"
            );
        }
    }

    function _views() private view returns (ICreditVault.AccountView[] memory views) {
        views = new ICreditVault.AccountView[](_holders.length);
        for (uint256 i = 0; i < views.length; ++i) {
            views[i] = _view(_holders[i]);
        }
    }

    function _view(Holder storage holder) private view returns (ICreditVault.AccountView memory) {
        return vault.accountOf(_tenants[holder.tenant].id, holder.account);
    }

    function _amount(uint256 dice, ICreditVault.AccountView memory state) private pure returns (uint96) {
        uint256 available = uint256(state.balance) + state.exitAmount;
        if (dice % 16 == 0) return 0;
        if (dice % 16 == 1) return type(uint96).max - uint96(dice >> 8);
        if (dice % 16 == 2) return uint96(available);
        if (dice % 16 == 3) return uint96(available + 1);
        return uint96(bound(dice >> 8, 1, available / 3 + 1));
    }

    function _actor(Holder storage holder) private view returns (address) {
        return holder.owner == address(0) ? _tenants[holder.tenant].owner : holder.owner;
    }

    function _holder(uint256 seed) private view returns (Holder storage) {
        return _holders[seed % _holders.length];
    }

    function _holderOf(bytes32 account) private view returns (Holder storage) {
        uint256 i = 0;
        while (_holders[i].account != account) ++i;
        return _holders[i];
    }
}
