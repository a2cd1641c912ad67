// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { CreditVault } from "../../contracts/CreditVault.sol";
import { ICreditVault } from "../../contracts/interfaces/ICreditVault.sol";
import { PlainToken } from "../../contracts/mocks/PlainToken.sol";
import { TestUSDC } from "../../contracts/mocks/TestUSDC.sol";

import { AllowanceModel } from "./AllowanceModel.sol";
import { Vm } from "./Harness.sol";
import { Signing } from "./Signing.sol";

// Numbers drawn are cut to size all over.
// forge-lint: disable-start(unsafe-typecast)

/// @dev Two platforms and their people, with books of our own of what went in and out. What was charged and
///      voided they learn from the logs, as the world does; all else from what was asked for and what moved.
abstract contract Books is Signing {
    struct Tenant {
        uint128 id;
        uint256 exitDelay;
        address owner;
        address pendingOwner;
        address payout;
        /// @dev Keys of the valid meters, and of those retired.
        uint256[] meterKeys;
        uint256[] retiredKeys;
        /// @dev Ghosts, credit.
        uint256 charged;
        uint256 refunded;
        uint256 withdrawn;
        /// @dev Ghost, token base units that lie in the inbox.
        uint256 inbox;
    }

    struct Holder {
        uint256 tenant;
        /// @dev 0: held by the platform.
        uint256 key;
        address owner;
        bytes32 label;
        bytes32 account;
        /// @dev Ghosts, credit.
        uint256 deposited;
        uint256 charged;
        uint256 refunded;
        uint256 received;
        uint256 given;
        uint256 paidOut;
        uint256 exit;
        uint256 exitMaturesAt;
        uint256 consentsFrom;
        /// @dev Ghost, lines of the statement that the logs have told.
        uint256 entries;
        /// @dev Ghosts of the window limit: the window, what was spent in it, and the most that may be.
        uint256 windowSeconds;
        uint256 window;
        uint256 spent;
        uint256 ceiling;
        AllowanceModel allowance;
    }

    /// @dev An EIP-3009 payment to an inbox.
    struct Payment {
        uint256 holder;
        bytes32 nonce;
        uint256 tokens;
        bool booked;
    }

    uint256 internal constant CREDIT_PER_TOKEN = 1e6;
    uint256 public constant HOLDERS_PER_TENANT = 4;
    /// @dev Few ids, so that they are often used again, on both sides of a word's edge.
    uint64 public constant FIRST_ID = 192;
    uint64 public constant IDS = 128;
    address internal constant RECIPIENT = address(0x4001);

    CreditVault public immutable vault;
    TestUSDC public immutable token;
    PlainToken public immutable wrongToken;

    Tenant[] internal _tenants;
    Holder[] internal _holders;
    Payment[] internal _payments;
    uint256 public donated;
    mapping(uint256 tenant => mapping(uint64 id => uint256)) public timesCharged;
    mapping(uint256 tenant => mapping(uint64 id => uint256)) public timesVoided;
    mapping(uint256 tenant => mapping(uint64 id => uint256)) public timesRefunded;
    mapping(uint256 tenant => uint64[]) internal _usedIds;
    /// @dev How often each thing happened, and how often each was refused.
    mapping(ICreditVault.Rejection reason => uint256) public rejections;
    mapping(bytes32 what => uint256) public times;
    uint256 internal _salt;

    /// @dev The logs of what is done have the next line of each account they touch.
    modifier logged() {
        vm.recordLogs();
        _;
        _readLogs();
    }

    constructor(CreditVault vault_, TestUSDC token_, PlainToken wrongToken_) {
        (vault, token, wrongToken) = (vault_, token_, wrongToken_);
        for (uint256 tenant = 0; tenant < 2; ++tenant) {
            Tenant storage record = _tenants.push();
            record.owner = address(uint160(0x1000 + tenant));
            record.payout = address(uint160(0x2000 + tenant));
            record.meterKeys.push(0xA11 + tenant * 0x1000);
            record.exitDelay = 1 hours + tenant * 1 days;
            vm.prank(record.owner);
            record.id = vault.registerPlatform(
                "", record.payout, vm.addr(record.meterKeys[0]), uint32(record.exitDelay)
            );
            _open(tenant, 0, "main");
            _open(tenant, 0, "spare");
            _open(tenant, 0xB0B1, "");
            _open(tenant, 0xB0B2, "");
        }
    }

    function tenants() external view returns (Tenant[] memory) {
        return _tenants;
    }

    function holders() external view returns (Holder[] memory) {
        return _holders;
    }

    // ──────────────────────────────────────────── Internal ───────────────────────────────────────────

    function _open(uint256 tenant, uint256 key, bytes32 label) private {
        Holder storage holder = _holders.push();
        (holder.tenant, holder.key, holder.label) = (tenant, key, label);
        holder.owner = key == 0 ? address(0) : vm.addr(key);
        holder.account = vault.accountId(_tenants[tenant].id, holder.owner, label);
        holder.allowance.start();
    }

    function _mint(address to, uint256 tokens) internal {
        vm.prank(token.masterMinter());
        token.mint(to, tokens);
    }

    function _readLogs() internal {
        Vm.Log[] memory logs = vm.getRecordedLogs();
        for (uint256 i = 0; i < logs.length; ++i) {
            if (logs[i].emitter != address(vault)) continue;
            bytes32 kind = logs[i].topics[0];
            if (kind == ICreditVault.Charged.selector) {
                _readCharge(logs[i]);
            } else if (kind == ICreditVault.ExitDrawn.selector) {
                _readDraw(logs[i]);
            } else if (kind == ICreditVault.ChargeRejected.selector) {
                _readRejection(logs[i]);
            } else if (kind == ICreditVault.ChargeVoided.selector) {
                _readVoiding(logs[i]);
            } else if (kind == ICreditVault.Deposited.selector) {
                _readLine(logs[i].topics[2], logs[i], 3);
            } else if (kind == ICreditVault.Refunded.selector) {
                _readLine(logs[i].topics[2], logs[i], 3);
            } else if (kind == ICreditVault.ExitRequested.selector) {
                _readLine(logs[i].topics[2], logs[i], 3);
            } else if (kind == ICreditVault.ExitCancelled.selector) {
                _readLine(logs[i].topics[2], logs[i], 1);
            } else if (kind == ICreditVault.ExitFinalized.selector) {
                _readLine(logs[i].topics[2], logs[i], 2);
            } else if (kind == ICreditVault.ExitedWithConsent.selector) {
                _readLine(logs[i].topics[2], logs[i], 2);
            } else if (kind == ICreditVault.Allocated.selector) {
                _readLine(logs[i].topics[2], logs[i], 3);
                _readLine(logs[i].topics[3], logs[i], 4);
            }
        }
    }

    /// @dev Line numbers are gapless: entry = entries before + 1.
    function _readLine(bytes32 account, Vm.Log memory log, uint256 word) private {
        assertEq(_word(log, word), ++_holderOf(account).entries, "line numbers have no gap");
    }

    function _readCharge(Vm.Log memory log) private {
        _readLine(log.topics[1], log, 1);
        uint256 amount = _word(log, 0);
        Holder storage holder = _holderOf(log.topics[1]);
        uint64 id = uint64(uint256(log.topics[2]));
        assertEq(timesVoided[holder.tenant][id], 0, "never charged after it was voided");
        if (++timesCharged[holder.tenant][id] == 1) _usedIds[holder.tenant].push(id);
        _tenants[holder.tenant].charged += amount;
        holder.charged += amount;
        times["charged"]++;

        holder.allowance.charge(amount);
        assertLe(holder.allowance.spent, holder.allowance.capNow(), "spent under the allowance that bound");
        assertLe(block.timestamp + 1, holder.allowance.expiryNow(), "charged before the allowance's expiry");

        if (holder.windowSeconds == 0) return;
        uint256 window = block.timestamp / holder.windowSeconds;
        if (window != holder.window) {
            holder.window = window;
            holder.spent = 0;
            holder.ceiling = _view(holder).policy.maxPerWindow;
        }
        holder.spent += amount;
    }

    function _readDraw(Vm.Log memory log) private {
        Holder storage holder = _holderOf(log.topics[1]);
        assertLe(block.timestamp + 1, holder.exitMaturesAt, "a matured exit is the owner's alone");
        holder.exit -= _word(log, 0);
        times["drawn"]++;
        if (holder.exit == 0) times["drawn to zero"]++;
    }

    function _readRejection(Vm.Log memory log) private {
        rejections[ICreditVault.Rejection(_word(log, 0))]++;
    }

    function _readVoiding(Vm.Log memory log) private {
        uint256 tenant = _tenants[0].id == uint256(log.topics[1]) ? 0 : 1;
        uint64 id = uint64(uint256(log.topics[2]));
        if (++timesVoided[tenant][id] == 1) _usedIds[tenant].push(id);
        times["voided"]++;
    }

    function _word(Vm.Log memory log, uint256 index) private pure returns (uint256 word) {
        bytes memory data = log.data;
        assembly {
            word := mload(add(data, mul(0x20, add(index, 1))))
        }
    }

    /// @dev Does what the vault has to accept, or to refuse, as foreseen.
    function _attempt(address sender, bytes memory data, bool foreseen, string memory what)
        internal
        returns (bool success)
    {
        vm.prank(sender);
        (success,) = address(vault).call(data);
        assertTrue(success == foreseen, what);
        times[keccak256(abi.encode(what, success))]++;
    }

    /// @dev How often an attempt went well, or was refused.
    function attempts(string calldata what, bool success) external view returns (uint256) {
        return times[keccak256(abi.encode(what, success))];
    }

    function _view(Holder storage holder) internal view returns (ICreditVault.AccountView memory) {
        return vault.accountOf(_tenants[holder.tenant].id, holder.account);
    }

    function _actor(Holder storage holder) internal view returns (address) {
        return holder.owner == address(0) ? _tenants[holder.tenant].owner : holder.owner;
    }

    function _holder(uint256 seed) internal view returns (Holder storage) {
        return _holders[seed % _holders.length];
    }

    /// @dev One with a key of its own: it can sign.
    function _signer(uint256 seed) internal pure returns (uint256) {
        return seed % 2 * HOLDERS_PER_TENANT + 2 + (seed >> 1) % 2;
    }

    function _tenant(uint256 seed) internal view returns (Tenant storage) {
        return _tenants[seed % _tenants.length];
    }

    /// @dev A key of a valid meter; 0 if there is none.
    function _meterKey(Tenant storage tenant, uint256 seed) internal view returns (uint256) {
        uint256 length = tenant.meterKeys.length;
        return length == 0 ? 0 : tenant.meterKeys[seed % length];
    }

    function _deadline(uint256 seed, uint256 longest) internal view returns (uint40) {
        return uint40(block.timestamp + seed % (longest + 1));
    }

    function _holderOf(bytes32 account) private view returns (Holder storage) {
        uint256 i = 0;
        while (_holders[i].account != account) ++i;
        return _holders[i];
    }
}
