// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { CreditVault } from "../../contracts/CreditVault.sol";
import { ICreditVault } from "../../contracts/interfaces/ICreditVault.sol";
import { TestUSDC } from "../../contracts/mocks/TestUSDC.sol";

import { Vm } from "./Harness.sol";
import { Signing } from "./Signing.sol";

// Numbers drawn are cut to size all over.
// forge-lint: disable-start(unsafe-typecast)

/// @dev Has a meter's key and an account of its own on the platform, and no other power.
contract MeterThief is Signing {
    uint256 private constant CREDIT_PER_TOKEN = 1e6;

    CreditVault public immutable vault;
    TestUSDC public immutable token;
    uint128 public immutable platform;
    uint128 public immutable neighbour;
    address public immutable self;
    bytes32 public immutable account;
    uint256 private immutable _meterKey;

    address[] private _owners;
    /// @dev The last is the thief's own.
    bytes32[] private _accounts;
    /// @dev Ghosts, credit but for the time.
    mapping(uint256 person => uint256) public booked;
    mapping(uint256 person => uint256) public largestCharge;
    mapping(uint256 person => uint256) public lastChargeAt;
    mapping(uint256 person => uint256) public lastBookedAt;
    uint256 public taken;
    uint256 private _salt;

    constructor(
        CreditVault vault_,
        uint128 platform_,
        uint128 neighbour_,
        uint256 meterKey,
        address self_,
        address[] memory owners,
        bytes32[] memory accounts
    ) {
        (vault, token) = (vault_, TestUSDC(vault_.token()));
        (platform, neighbour) = (platform_, neighbour_);
        (self, _meterKey) = (self_, meterKey);
        (_owners, _accounts) = (owners, accounts);
        account = accounts[accounts.length - 1];
    }

    /// @dev Any accounts, small amounts and all there is.
    function charge(uint256 seed) public {
        ICreditVault.Charge[] memory charges = new ICreditVault.Charge[](1 + seed % 12);
        for (uint256 i = 0; i < charges.length; ++i) {
            uint256 dice = uint256(keccak256(abi.encode(seed, i)));
            bytes32 victim = _accounts[dice % _accounts.length];
            charges[i] = ICreditVault.Charge(victim, uint64(++_salt), _amount(dice >> 8, victim), "");
        }
        uint40 deadline = uint40(block.timestamp + 1 hours);
        vm.recordLogs();
        vault.settle(platform, charges, deadline, _sign(settlementHash(platform, charges, deadline)));
        _readCharges();
    }

    function takeOut(uint256 tokens) external {
        uint256 most = vault.accountOf(platform, account).balance / CREDIT_PER_TOKEN;
        if (most == 0) return;
        tokens = bound(tokens, 1, most);
        (bool success,) = _exit(platform, self, account, tokens);
        uint256 bookedAt = lastBookedAt[_owners.length - 1];
        bool waited = bookedAt == 0 || block.timestamp >= bookedAt + vault.platformOf(platform).exitDelay;
        assertTrue(success == waited, "its own credit it takes out, but not with what it has just booked");
        if (success) taken += tokens * CREDIT_PER_TOKEN;
    }

    function bookInbox(uint256 seed, uint256 tokens) external {
        uint256 held = token.balanceOf(vault.inbox(platform));
        if (held == 0) return;
        tokens = bound(tokens, 1, held);
        uint256 person = seed % _owners.length;
        bytes32 nonce = bytes32(++_salt);
        uint40 deadline = uint40(block.timestamp);
        bytes32 structHash = inboxBookingHash(platform, _owners[person], nonce, tokens, deadline);
        vault.bookInbox(platform, _owners[person], nonce, tokens, deadline, _sign(structHash));
        booked[person] += tokens * CREDIT_PER_TOKEN;
        lastBookedAt[person] = block.timestamp;
    }

    function voidCharges(uint256 seed) external {
        uint64[] memory ids = new uint64[](1 + seed % 5);
        for (uint256 i = 0; i < ids.length; ++i) {
            ids[i] = uint64(_salt + i);
        }
        uint40 deadline = uint40(block.timestamp);
        vault.voidCharges(platform, ids, deadline, _sign(voidingHash(platform, ids, deadline)));
    }

    /// @dev What the key is not good for: accounts of others to leave from, another platform, the owner's part.
    function reachFurther(uint256 seed) external {
        uint256 victim = seed % (_owners.length - 1);
        uint256 what = (seed >> 8) % 8;
        uint40 deadline = uint40(block.timestamp);
        bool success;
        if (what == 0) {
            (success,) = _exit(platform, _owners[victim], _accounts[victim], 1);
        } else if (what == 1) {
            bytes32 elsewhere = vault.accountId(neighbour, _owners[victim], "");
            (success,) = _exit(neighbour, _owners[victim], elsewhere, 1);
        } else if (what == 2) {
            ICreditVault.Charge[] memory charges = new ICreditVault.Charge[](1);
            charges[0] = ICreditVault.Charge(vault.accountId(neighbour, _owners[victim], ""), 1, 1, "");
            bytes memory signature = _sign(settlementHash(neighbour, charges, deadline));
            (success,) = _call(abi.encodeCall(vault.settle, (neighbour, charges, deadline, signature)));
        } else if (what == 3) {
            uint64[] memory ids = new uint64[](1);
            bytes memory signature = _sign(voidingHash(neighbour, ids, deadline));
            (success,) = _call(abi.encodeCall(vault.voidCharges, (neighbour, ids, deadline, signature)));
        } else if (what == 4) {
            bytes memory signature = _sign(inboxBookingHash(neighbour, self, "", 1, deadline));
            (success,) = _call(abi.encodeCall(vault.bookInbox, (neighbour, self, "", 1, deadline, signature)));
        } else if (what == 5) {
            (success,) = _call(abi.encodeCall(vault.withdrawEarnings, (platform, 1)));
        } else if (what == 6) {
            (success,) = _call(abi.encodeCall(vault.refund, (platform, 1, self, "", 1)));
        } else {
            (success,) =
                _call(abi.encodeCall(vault.finalizeExit, (platform, _owners[victim], bytes32(0), self)));
        }
        assertTrue(!success, "the key is good for its platform's charges only");
    }

    function wait(uint256 time) external {
        vm.warp(block.timestamp + bound(time, 1, 1 hours));
    }

    function _exit(uint128 where, address owner, bytes32 from, uint256 tokens)
        private
        returns (bool success, bytes memory)
    {
        uint40 deadline = uint40(block.timestamp);
        bytes32 nonce = bytes32(++_salt);
        bytes memory signature = _sign(exitConsentHash(where, from, tokens, self, nonce, deadline));
        return _call(
            abi.encodeCall(
                vault.exitWithConsent, (where, owner, bytes32(0), tokens, self, nonce, deadline, signature)
            )
        );
    }

    function _call(bytes memory data) private returns (bool success, bytes memory result) {
        vm.prank(self);
        return address(vault).call(data);
    }

    function _readCharges() private {
        Vm.Log[] memory logs = vm.getRecordedLogs();
        for (uint256 i = 0; i < logs.length; ++i) {
            if (logs[i].topics[0] != ICreditVault.Charged.selector) continue;
            uint256 person = 0;
            while (_accounts[person] != logs[i].topics[1]) ++person;
            (uint256 amount,,) = abi.decode(logs[i].data, (uint256, uint256, bytes32));
            if (amount > largestCharge[person]) largestCharge[person] = amount;
            lastChargeAt[person] = block.timestamp;
        }
    }

    function _amount(uint256 dice, bytes32 victim) private view returns (uint96) {
        if (dice % 4 != 0) return uint96(bound(dice >> 8, 1, 4e12));
        ICreditVault.AccountView memory state = vault.accountOf(platform, victim);
        return uint96((uint256(state.balance) + state.exitAmount) / (1 + (dice >> 8) % 3) + (dice >> 16) % 2);
    }

    function _sign(bytes32 structHash) private view returns (bytes memory) {
        return sign(_meterKey, digestOf(address(vault), structHash));
    }
}
