// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { CreditVault } from "../../contracts/CreditVault.sol";
import { ICreditVault } from "../../contracts/interfaces/ICreditVault.sol";
import { PlainToken } from "../../contracts/mocks/PlainToken.sol";
import { TestUSDC } from "../../contracts/mocks/TestUSDC.sol";

import { Books } from "./Books.sol";
import { PeopleHandler } from "./PeopleHandler.sol";

// Numbers drawn are cut to size all over.
// forge-lint: disable-start(unsafe-typecast)

/// @dev Calls the vault as its people, its platforms and their meters would. Nothing reverts, but what the books
///      say has to.
contract VaultHandler is PeopleHandler {
    mapping(uint256 tenant => mapping(bytes32 nonce => bool)) private _consented;

    constructor(CreditVault vault_, TestUSDC token_, PlainToken wrongToken_)
        Books(vault_, token_, wrongToken_)
    { }

    /// @dev A batch for one platform: any of its accounts, ids that may be used, amounts around what is there.
    function settle(uint256 seed) external {
        uint256 tenant = seed % _tenants.length;
        uint256 key = _meterKey(_tenants[tenant], seed >> 16);
        if (key == 0) return;
        uint128 platform = _tenants[tenant].id;
        ICreditVault.Charge[] memory charges = new ICreditVault.Charge[](1 + (seed >> 8) % 8);
        for (uint256 i = 0; i < charges.length; ++i) {
            uint256 dice = uint256(keccak256(abi.encode(seed, i)));
            // Mostly an account of this platform, sometimes one of the other, where it must find nothing.
            uint256 index = dice % 8 == 0
                ? (dice >> 8) % _holders.length
                : tenant * HOLDERS_PER_TENANT + (dice >> 8) % HOLDERS_PER_TENANT;
            bytes32 account = _holders[index].account;
            charges[i] = ICreditVault.Charge({
                account: account,
                id: FIRST_ID + uint64((dice >> 16) % IDS),
                amount: _amount(dice >> 32, vault.accountOf(platform, account)),
                receiptHash: bytes32(dice)
            });
        }
        _settle(tenant, key, charges, _deadline(seed, 1 hours));
    }

    function voidCharges(uint256 seed) external logged {
        Tenant storage tenant = _tenant(seed);
        uint256 key = _meterKey(tenant, seed >> 16);
        if (key == 0) return;
        uint64[] memory ids = new uint64[](1 + (seed >> 8) % 3);
        for (uint256 i = 0; i < ids.length; ++i) {
            ids[i] = FIRST_ID + uint64(uint256(keccak256(abi.encode(seed, i))) % IDS);
        }
        uint40 deadline = _deadline(seed, 1 hours);
        bytes memory signature = sign(key, digestOf(address(vault), voidingHash(tenant.id, ids, deadline)));
        vault.voidCharges(tenant.id, ids, deadline, signature);
    }

    /// @dev For any id, used and refunded or not, of as much as was earned and more.
    function refund(uint256 seed, uint256 amount) external logged {
        Holder storage holder = _holder(seed);
        Tenant storage tenant = _tenants[holder.tenant];
        uint64[] storage usedIds = _usedIds[holder.tenant];
        uint64 id = usedIds.length == 0 || seed % 4 == 0
            ? FIRST_ID + uint64((seed >> 8) % IDS)
            : usedIds[(seed >> 8) % usedIds.length];
        uint256 earnings = tenant.charged - tenant.refunded - tenant.withdrawn;
        amount = (seed >> 64) % 8 == 0 ? earnings + 1 : bound(amount, 0, earnings / 4);
        bool used = timesCharged[holder.tenant][id] + timesVoided[holder.tenant][id] != 0;
        bool foreseen = used && timesRefunded[holder.tenant][id] == 0 && amount != 0 && amount <= earnings;
        bytes memory call =
            abi.encodeCall(vault.refund, (tenant.id, id, holder.owner, holder.label, uint96(amount)));
        if (!_attempt(tenant.owner, call, foreseen, "refund")) return;
        timesRefunded[holder.tenant][id]++;
        tenant.refunded += amount;
        holder.refunded += amount;
    }

    /// @dev From a platform-held account to any of the same platform.
    function allocate(uint256 seed, uint256 amount) external logged {
        uint256 first = seed % _tenants.length * HOLDERS_PER_TENANT;
        Holder storage source = _holders[first + (seed >> 8) % 2];
        Holder storage target = _holders[first + (seed >> 16) % HOLDERS_PER_TENANT];
        Tenant storage tenant = _tenants[source.tenant];
        uint256 balance = _view(source).balance;
        amount = (seed >> 64) % 8 == 0 ? balance + 1 : bound(amount, 0, balance / 2);
        bool foreseen = source.account != target.account && amount != 0 && amount <= balance;
        bytes memory call = abi.encodeCall(
            vault.allocate, (tenant.id, source.label, target.owner, target.label, uint96(amount))
        );
        if (!_attempt(tenant.owner, call, foreseen, "allocate")) return;
        source.given += amount;
        target.received += amount;
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

    /// @dev Now and then more than there is, or with a consent used before.
    function exitWithConsent(uint256 seed, uint256 tokens) external logged {
        Holder storage holder = _holder(seed);
        Tenant storage tenant = _tenants[holder.tenant];
        uint256 key = _meterKey(tenant, seed >> 16);
        if (key == 0) return;
        uint256 most = _view(holder).balance / CREDIT_PER_TOKEN;
        tokens = (seed >> 64) % 8 == 0 ? most + 1 : bound(tokens, 1, most / 2 + 1);
        bytes32 nonce = (seed >> 8) % 4 == 0 ? bytes32(_salt / 2) : bytes32(++_salt);
        uint40 deadline = _deadline(seed, 10 minutes);
        bytes32 structHash = exitConsentHash(tenant.id, holder.account, tokens, RECIPIENT, nonce, deadline);
        bytes memory call = abi.encodeCall(
            vault.exitWithConsent,
            (
                tenant.id,
                holder.owner,
                holder.label,
                tokens,
                RECIPIENT,
                nonce,
                deadline,
                sign(key, digestOf(address(vault), structHash))
            )
        );
        bool foreseen =
            !_consented[holder.tenant][nonce] && tokens <= most && block.timestamp >= holder.consentsFrom;
        uint256 before = token.balanceOf(RECIPIENT);
        if (!_attempt(_actor(holder), call, foreseen, "exitWithConsent")) return;
        _consented[holder.tenant][nonce] = true;
        assertEq(token.balanceOf(RECIPIENT) - before, tokens, "what was consented to is paid");
        holder.paidOut += tokens * CREDIT_PER_TOKEN;
    }

    /// @dev Any payment there was, on its way through the inbox or stranded in it, booked or not.
    function bookInbox(uint256 seed) external logged {
        if (_payments.length == 0) return;
        Payment storage payment = _payments[seed % _payments.length];
        Holder storage holder = _holders[payment.holder];
        Tenant storage tenant = _tenants[holder.tenant];
        uint256 key = _meterKey(tenant, seed >> 16);
        if (key == 0) return;
        uint40 deadline = _deadline(seed, 1 hours);
        bytes32 structHash =
            inboxBookingHash(tenant.id, holder.owner, payment.nonce, payment.tokens, deadline);
        bytes memory call = abi.encodeCall(
            vault.bookInbox,
            (
                tenant.id,
                holder.owner,
                payment.nonce,
                payment.tokens,
                deadline,
                sign(key, digestOf(address(vault), structHash))
            )
        );
        if (!_attempt(address(this), call, !payment.booked, "bookInbox")) return;
        payment.booked = true;
        tenant.inbox -= payment.tokens;
        holder.deposited += payment.tokens * CREDIT_PER_TOKEN;
        holder.consentsFrom = block.timestamp + tenant.exitDelay;
    }

    function withdrawEarnings(uint256 seed, uint256 tokens) external {
        Tenant storage tenant = _tenant(seed);
        uint256 most = (tenant.charged - tenant.refunded - tenant.withdrawn) / CREDIT_PER_TOKEN;
        tokens = bound(tokens, 1, most + 1);
        uint256 before = token.balanceOf(tenant.payout);
        bytes memory call = abi.encodeCall(vault.withdrawEarnings, (tenant.id, tokens));
        if (!_attempt(tenant.owner, call, tokens <= most, "withdrawEarnings")) return;
        assertEq(token.balanceOf(tenant.payout) - before, tokens, "earnings go to the payout address");
        tenant.withdrawn += tokens * CREDIT_PER_TOKEN;
    }

    /// @dev To one of four, who may own the other platform too.
    function transferPlatform(uint256 seed) external {
        Tenant storage tenant = _tenant(seed);
        address newOwner = address(uint160(0x1000 + (seed >> 8) % 4));
        vm.prank(tenant.owner);
        vault.transferPlatform(tenant.id, newOwner);
        tenant.pendingOwner = newOwner;
    }

    function acceptPlatform(uint256 seed) external {
        Tenant storage tenant = _tenant(seed);
        address caller = tenant.pendingOwner == address(0) ? tenant.owner : tenant.pendingOwner;
        bytes memory call = abi.encodeCall(vault.acceptPlatform, (tenant.id));
        if (!_attempt(caller, call, tenant.pendingOwner != address(0), "acceptPlatform")) return;
        (tenant.owner, tenant.pendingOwner) = (tenant.pendingOwner, address(0));
    }

    function setPayout(uint256 seed) external {
        Tenant storage tenant = _tenant(seed);
        tenant.payout = address(uint160(0x2000 + (seed >> 8) % 4));
        vm.prank(tenant.owner);
        vault.setPayout(tenant.id, tenant.payout);
    }

    /// @dev One that is new, or was a meter before.
    function addMeter(uint256 seed) external {
        Tenant storage tenant = _tenant(seed);
        bool again = seed % 8 < 2 && tenant.retiredKeys.length != 0;
        uint256 key = again ? tenant.retiredKeys[seed % tenant.retiredKeys.length] : 0xA1100000000 + ++_salt;
        bytes memory call = abi.encodeCall(vault.addMeter, (tenant.id, vm.addr(key)));
        if (_attempt(tenant.owner, call, !again, "addMeter")) tenant.meterKeys.push(key);
    }

    /// @dev All but the last valid one.
    function retireMeter(uint256 seed) external {
        Tenant storage tenant = _tenant(seed);
        if (tenant.meterKeys.length > 1) _retire(tenant, (seed >> 8) % tenant.meterKeys.length, seed >> 16);
    }

    function selectors() external pure virtual returns (bytes4[] memory list) {
        list = new bytes4[](35);
        list[0] = this.deposit.selector;
        list[1] = this.depositWithAuthorization.selector;
        list[2] = this.sweep.selector;
        list[3] = this.donate.selector;
        list[4] = this.depositFromInbox.selector;
        list[5] = this.requestExit.selector;
        list[6] = this.cancelExit.selector;
        list[7] = this.finalizeExit.selector;
        list[8] = this.setAllowance.selector;
        list[9] = this.setAllowanceBySignature.selector;
        list[10] = this.rescue.selector;
        list[11] = this.wait.selector;
        list[12] = this.stranger.selector;
        list[13] = this.voidCharges.selector;
        list[14] = this.refund.selector;
        list[15] = this.allocate.selector;
        list[16] = this.setPolicy.selector;
        list[17] = this.exitWithConsent.selector;
        list[18] = this.bookInbox.selector;
        list[19] = this.withdrawEarnings.selector;
        list[20] = this.transferPlatform.selector;
        list[21] = this.acceptPlatform.selector;
        list[22] = this.setPayout.selector;
        list[23] = this.addMeter.selector;
        list[24] = this.retireMeter.selector;
        // What a platform does most.
        for (uint256 i = 25; i < list.length; ++i) {
            list[i] = i % 5 == 0 ? this.requestExit.selector : this.settle.selector;
        }
    }

    // ──────────────────────────────────────────── Internal ───────────────────────────────────────────

    function _settle(uint256 tenant, uint256 key, ICreditVault.Charge[] memory charges, uint40 deadline)
        internal
    {
        uint128 platform = _tenants[tenant].id;
        bytes32 structHash = settlementHash(platform, charges, deadline);
        bytes memory signature = sign(key, digestOf(address(vault), structHash));
        uint256 elsewhere = _tenants[1 - tenant].charged;
        vm.recordLogs();
        vault.settle(platform, charges, deadline, signature);
        _readLogs();
        assertEq(_tenants[1 - tenant].charged, elsewhere, "charged by its own platform only");
    }

    function _retire(Tenant storage tenant, uint256 index, uint256 seed) internal {
        uint256 key = tenant.meterKeys[index];
        tenant.meterKeys[index] = tenant.meterKeys[tenant.meterKeys.length - 1];
        tenant.meterKeys.pop();
        tenant.retiredKeys.push(key);
        uint40 compromisedSince = seed % 2 == 0 ? 0 : uint40(block.timestamp);
        vm.prank(tenant.owner);
        vault.retireMeter(tenant.id, vm.addr(key), compromisedSince);
    }

    function _amount(uint256 dice, ICreditVault.AccountView memory state) private pure returns (uint96) {
        uint256 available = uint256(state.balance) + state.exitAmount;
        if (dice % 16 == 0) return 0;
        if (dice % 16 == 1) return type(uint96).max - uint96(dice >> 8);
        if (dice % 16 == 2) return uint96(available);
        if (dice % 16 == 3) return uint96(available + 1);
        return uint96(bound(dice >> 8, 1, available / 3 + 1));
    }
}
