// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { ICreditVault } from "../../contracts/interfaces/ICreditVault.sol";

import { Books } from "./Books.sol";

// Numbers drawn are cut to size all over.
// forge-lint: disable-start(unsafe-typecast)

/// @dev Those who pay and leave.
abstract contract PeopleHandler is Books {
    uint256 private constant STRANGER_KEY = 0x57A6;

    function deposit(uint256 seed, uint256 tokens) external logged {
        Holder storage holder = _holder(seed);
        tokens = bound(tokens, 1, 1000e6);
        _mint(address(this), tokens);
        token.approve(address(vault), tokens);
        vault.deposit(_tenants[holder.tenant].id, holder.owner, holder.label, tokens);
        holder.deposited += tokens * CREDIT_PER_TOKEN;
    }

    function depositWithAuthorization(uint256 seed, uint256 tokens) external logged {
        Holder storage holder = _holder(seed);
        uint128 platform = _tenants[holder.tenant].id;
        tokens = bound(tokens, 1, 1000e6);
        uint256 key = _holders[_signer(seed >> 8)].key;
        address payer = vm.addr(key);
        _mint(payer, tokens);
        bytes32 salt = bytes32(++_salt);
        bytes32 digest = authorizationDigest(
            token,
            token.RECEIVE_WITH_AUTHORIZATION_TYPEHASH(),
            payer,
            address(vault),
            tokens,
            keccak256(abi.encode(platform, holder.owner, holder.label, salt))
        );
        vault.depositWithAuthorization(
            platform, holder.owner, holder.label, payer, tokens, 0, type(uint256).max, salt, sign(key, digest)
        );
        holder.deposited += tokens * CREDIT_PER_TOKEN;
    }

    function sweep(uint256 seed, uint256 tokens) external logged {
        Holder storage holder = _holder(seed);
        uint128 platform = _tenants[holder.tenant].id;
        tokens = bound(tokens, 1, 1000e6);
        _mint(vault.depositAddress(platform, holder.owner, holder.label), tokens);
        vault.sweep(platform, holder.owner, holder.label);
        holder.deposited += tokens * CREDIT_PER_TOKEN;
    }

    /// @dev Into the vault, or into an inbox, where a meter may never say whose it is.
    function donate(uint256 seed, uint256 tokens) external {
        tokens = bound(tokens, 1, 10e6);
        if (seed % 2 == 0) {
            _mint(address(vault), tokens);
            donated += tokens;
        } else {
            Tenant storage tenant = _tenant(seed >> 1);
            _mint(vault.inbox(tenant.id), tokens);
            tenant.inbox += tokens;
        }
    }

    /// @dev A payment to the inbox; now and then somebody else gives it to the token first, and it stays there.
    function depositFromInbox(uint256 seed, uint256 tokens) external logged {
        uint256 index = _signer(seed);
        Holder storage holder = _holders[index];
        Tenant storage tenant = _tenants[holder.tenant];
        tokens = bound(tokens, 1, 1000e6);
        _mint(holder.owner, tokens);
        bytes32 nonce = bytes32(++_salt);
        address inbox = vault.inbox(tenant.id);
        bytes memory signature = sign(
            holder.key,
            authorizationDigest(
                token, token.TRANSFER_WITH_AUTHORIZATION_TYPEHASH(), holder.owner, inbox, tokens, nonce
            )
        );
        bool overtaken = (seed >> 2) % 2 == 0;
        if (overtaken) {
            token.transferWithAuthorization(
                holder.owner, inbox, tokens, 0, type(uint256).max, nonce, signature
            );
            tenant.inbox += tokens;
        }
        bytes memory call = abi.encodeCall(
            vault.depositFromInbox, (tenant.id, holder.owner, tokens, 0, type(uint256).max, nonce, signature)
        );
        if (_attempt(address(this), call, !overtaken, "depositFromInbox")) {
            holder.deposited += tokens * CREDIT_PER_TOKEN;
        }
        _payments.push(Payment(index, nonce, tokens, !overtaken));
    }

    function requestExit(uint256 seed, uint256 tokens) external logged {
        Holder storage holder = _holder(seed);
        uint256 most = _view(holder).balance / CREDIT_PER_TOKEN;
        tokens = bound(tokens, 1, most + 1);
        Tenant storage tenant = _tenants[holder.tenant];
        bytes memory call = abi.encodeCall(vault.requestExit, (tenant.id, holder.owner, holder.label, tokens));
        if (!_attempt(_actor(holder), call, tokens <= most, "requestExit")) return;
        holder.exit += tokens * CREDIT_PER_TOKEN;
        holder.exitMaturesAt = block.timestamp + tenant.exitDelay;
    }

    function cancelExit(uint256 seed) external logged {
        Holder storage holder = _holder(seed);
        bytes memory call =
            abi.encodeCall(vault.cancelExit, (_tenants[holder.tenant].id, holder.owner, holder.label));
        if (_attempt(_actor(holder), call, holder.exit != 0, "cancelExit")) holder.exit = 0;
    }

    /// @dev Mostly once it is mature.
    function finalizeExit(uint256 seed, uint256 time) public logged {
        Holder storage holder = _holder(seed);
        if (seed % 4 != 0 && holder.exit != 0 && block.timestamp < holder.exitMaturesAt) {
            vm.warp(bound(time, holder.exitMaturesAt, holder.exitMaturesAt + 1));
        }
        bool mature = holder.exit != 0 && block.timestamp >= holder.exitMaturesAt;
        bytes memory call = abi.encodeCall(
            vault.finalizeExit, (_tenants[holder.tenant].id, holder.owner, holder.label, RECIPIENT)
        );
        uint256 before = token.balanceOf(RECIPIENT);
        if (!_attempt(_actor(holder), call, mature, "finalizeExit")) return;
        uint256 tokens = token.balanceOf(RECIPIENT) - before;
        assertEq(tokens, holder.exit / CREDIT_PER_TOKEN, "a matured exit is paid, to the last whole token");
        holder.paidOut += tokens * CREDIT_PER_TOKEN;
        holder.exit = 0;
    }

    function setAllowance(uint256 seed, uint256 dice) external {
        Holder storage holder = _holder(seed);
        (uint96 cap, uint40 expiresAt) = _allowance(holder, dice);
        vm.prank(_actor(holder));
        vault.setAllowance(_tenants[holder.tenant].id, holder.owner, holder.label, cap, expiresAt);
        holder.allowance.change(cap, expiresAt, _tenants[holder.tenant].exitDelay);
    }

    /// @dev Twice: a signature is good for one change.
    function setAllowanceBySignature(uint256 seed, uint256 dice) external {
        Holder storage holder = _holders[_signer(seed)];
        uint128 platform = _tenants[holder.tenant].id;
        (uint96 cap, uint40 expiresAt) = _allowance(holder, dice);
        uint64 nonce = uint64(holder.allowance.nonce);
        uint40 deadline = _deadline(seed, 1 days);
        bytes memory call = abi.encodeCall(
            vault.setAllowanceBySignature,
            (
                platform,
                holder.owner,
                holder.label,
                cap,
                expiresAt,
                nonce,
                deadline,
                sign(
                    holder.key,
                    digestOf(
                        address(vault),
                        allowanceChangeHash(platform, holder.account, cap, expiresAt, nonce, deadline)
                    )
                )
            )
        );
        _attempt(address(this), call, true, "setAllowanceBySignature");
        holder.allowance.change(cap, expiresAt, _tenants[holder.tenant].exitDelay);
        _attempt(address(this), call, false, "setAllowanceBySignature");
    }

    /// @dev Of another token everything, of the vault's own nothing.
    function rescue(uint256 seed, uint256 amount) external {
        Holder storage holder = _holder(seed);
        uint128 platform = _tenants[holder.tenant].id;
        amount = bound(amount, 1, 1e30);
        bool wrong = seed % 4 != 0;
        bool inbox = (seed >> 8) % 2 == 0;
        address source =
            inbox ? vault.inbox(platform) : vault.depositAddress(platform, holder.owner, holder.label);
        if (wrong) wrongToken.mint(source, amount);
        address sent = wrong ? address(wrongToken) : address(token);
        uint256 held = wrongToken.balanceOf(source);
        uint256 before = wrongToken.balanceOf(RECIPIENT);
        if (inbox) {
            bytes memory call = abi.encodeCall(vault.rescueFromInbox, (platform, sent, RECIPIENT));
            _attempt(_tenants[holder.tenant].owner, call, wrong, "rescueFromInbox");
        } else {
            bytes memory call =
                abi.encodeCall(vault.rescue, (platform, holder.owner, holder.label, sent, RECIPIENT));
            _attempt(_actor(holder), call, wrong, "rescue");
        }
        assertEq(wrongToken.balanceOf(RECIPIENT) - before, wrong ? held : 0, "rescued");
    }

    function wait(uint256 time) external {
        vm.warp(block.timestamp + bound(time, 1, 12 hours));
    }

    /// @dev Whoever has no say calls everything: all but a platform of its own is refused.
    function stranger(uint256 seed, uint256 dice) external {
        Holder storage holder = _holder(seed);
        Tenant storage tenant = _tenants[holder.tenant];
        uint256 key = STRANGER_KEY;
        if (dice % 3 == 0 && tenant.retiredKeys.length != 0) {
            key = tenant.retiredKeys[dice % tenant.retiredKeys.length];
        } else if (dice % 3 == 1) {
            key = _meterKey(_tenants[1 - holder.tenant], dice);
        }
        if (key == 0) key = STRANGER_KEY;

        bytes32 before = _everything();
        uint256 what = (dice >> 8) % 23;
        bytes memory call =
            what < 13 ? _unsigned(what, holder, tenant) : _signedBy(key, what, holder, tenant, dice >> 16);
        _attempt(vm.addr(STRANGER_KEY), call, what == 0, "stranger");
        assertTrue(_everything() == before, "a stranger changes nothing");
    }

    // ──────────────────────────────────────────── Internal ───────────────────────────────────────────

    function _unsigned(uint256 what, Holder storage holder, Tenant storage tenant)
        private
        returns (bytes memory)
    {
        uint128 id = tenant.id;
        (address owner, bytes32 label) = (holder.owner, holder.label);
        address caller = vm.addr(STRANGER_KEY);
        if (what == 0) {
            return abi.encodeCall(vault.registerPlatform, (bytes32(++_salt), caller, caller, 1 hours));
        }
        if (what == 1) return abi.encodeCall(vault.transferPlatform, (id, caller));
        if (what == 2) return abi.encodeCall(vault.acceptPlatform, (id));
        if (what == 3) return abi.encodeCall(vault.setPayout, (id, caller));
        if (what == 4) return abi.encodeCall(vault.addMeter, (id, caller));
        if (what == 5) return abi.encodeCall(vault.retireMeter, (id, vm.addr(_meterKey(tenant, 0)), 0));
        if (what == 6) {
            ICreditVault.Policy memory policy;
            return abi.encodeCall(vault.setPolicy, (id, holder.account, 0, policy));
        }
        if (what == 7) return abi.encodeCall(vault.withdrawEarnings, (id, 1));
        if (what == 8) return abi.encodeCall(vault.requestExit, (id, owner, label, 1));
        if (what == 9) return abi.encodeCall(vault.cancelExit, (id, owner, label));
        if (what == 10) return abi.encodeCall(vault.finalizeExit, (id, owner, label, caller));
        if (what == 11) return abi.encodeCall(vault.setAllowance, (id, owner, label, 0, 0));
        return abi.encodeCall(vault.allocate, (id, "main", caller, "", 1));
    }

    function _signedBy(uint256 key, uint256 what, Holder storage holder, Tenant storage tenant, uint256 dice)
        private
        returns (bytes memory)
    {
        uint128 id = tenant.id;
        (address owner, bytes32 label, bytes32 account) = (holder.owner, holder.label, holder.account);
        address caller = vm.addr(STRANGER_KEY);
        uint40 deadline = _deadline(dice, 10 minutes);
        bytes32 nonce = bytes32(++_salt);
        if (what == 13) {
            ICreditVault.Charge[] memory charges = new ICreditVault.Charge[](1);
            charges[0] = ICreditVault.Charge(account, type(uint64).max, 1, "");
            return abi.encodeCall(
                vault.settle, (id, charges, deadline, _sign(key, settlementHash(id, charges, deadline)))
            );
        }
        if (what == 14) {
            uint64[] memory ids = new uint64[](1);
            ids[0] = type(uint64).max;
            return abi.encodeCall(
                vault.voidCharges, (id, ids, deadline, _sign(key, voidingHash(id, ids, deadline)))
            );
        }
        if (what == 15) {
            return abi.encodeCall(
                vault.bookInbox,
                (id, caller, nonce, 1, deadline, _sign(key, inboxBookingHash(id, caller, nonce, 1, deadline)))
            );
        }
        if (what == 16) {
            bytes32 structHash = exitConsentHash(id, account, 1, caller, nonce, deadline);
            return abi.encodeCall(
                vault.exitWithConsent, (id, owner, label, 1, caller, nonce, deadline, _sign(key, structHash))
            );
        }
        if (what == 17) {
            uint64 changes = uint64(holder.allowance.nonce);
            bytes32 structHash = allowanceChangeHash(id, account, 0, 0, changes, deadline);
            return abi.encodeCall(
                vault.setAllowanceBySignature,
                (id, owner, label, 0, 0, changes, deadline, _sign(key, structHash))
            );
        }
        if (what == 18) {
            address payer = _holders[_signer(dice)].owner;
            bytes32 digest = authorizationDigest(
                token, token.TRANSFER_WITH_AUTHORIZATION_TYPEHASH(), payer, vault.inbox(id), 1, nonce
            );
            _mint(payer, 1);
            return abi.encodeCall(
                vault.depositFromInbox, (id, payer, 1, 0, type(uint256).max, nonce, sign(key, digest))
            );
        }
        if (what == 19) {
            uint64 used = _usedIds[holder.tenant].length == 0 ? 0 : _usedIds[holder.tenant][0];
            return abi.encodeCall(vault.refund, (id, used, owner, label, 1));
        }
        if (what == 20) {
            wrongToken.mint(vault.depositAddress(id, owner, label), 1);
            return abi.encodeCall(vault.rescue, (id, owner, label, address(wrongToken), caller));
        }
        if (what == 21) {
            wrongToken.mint(vault.inbox(id), 1);
            return abi.encodeCall(vault.rescueFromInbox, (id, address(wrongToken), caller));
        }
        return abi.encodeCall(vault.sweep, (id, owner, label));
    }

    function _sign(uint256 key, bytes32 structHash) private view returns (bytes memory) {
        return sign(key, digestOf(address(vault), structHash));
    }

    /// @dev A cap near what is spent, an expiry in some days; now and then none, or nothing at all.
    function _allowance(Holder storage holder, uint256 dice)
        private
        view
        returns (uint96 cap, uint40 expiresAt)
    {
        (cap, expiresAt) = (type(uint96).max, type(uint40).max);
        if (dice % 4 != 0) cap = uint96(holder.allowance.spent + (dice >> 8) % 1500e12);
        if (dice % 16 == 1) cap = 0;
        if ((dice >> 128) % 4 == 0) expiresAt = uint40(block.timestamp + (dice >> 136) % 10 days);
    }

    function _everything() private view returns (bytes32 hash) {
        for (uint256 i = 0; i < _tenants.length; ++i) {
            hash = keccak256(abi.encode(hash, vault.platformOf(_tenants[i].id)));
            hash = keccak256(abi.encode(hash, token.balanceOf(vault.inbox(_tenants[i].id))));
        }
        for (uint256 i = 0; i < _holders.length; ++i) {
            hash = keccak256(abi.encode(hash, _view(_holders[i])));
        }
        hash = keccak256(abi.encode(hash, token.balanceOf(address(vault))));
    }
}
