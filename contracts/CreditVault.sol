// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { Clones } from "@openzeppelin/contracts/proxy/Clones.sol";
import { IERC20 } from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import { IERC20Metadata } from "@openzeppelin/contracts/token/ERC20/extensions/IERC20Metadata.sol";
import { SafeERC20 } from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import { ReentrancyGuardTransient } from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import { ECDSA } from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import { EIP712 } from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";
import { SignatureChecker } from "@openzeppelin/contracts/utils/cryptography/SignatureChecker.sol";
import { Math } from "@openzeppelin/contracts/utils/math/Math.sol";

import { DepositAddress } from "./DepositAddress.sol";
import { ICreditVault } from "./interfaces/ICreditVault.sol";
import { IERC3009 } from "./interfaces/IERC3009.sol";
import { AccountState } from "./libraries/AccountState.sol";
import { TypedData } from "./libraries/TypedData.sol";

/// @title CreditVault
/// @notice See ICreditVault.
/// @dev Invariant: token balance × CREDIT_PER_TOKEN ≥ Σ balances + Σ exits + Σ earnings. Only `_credit`
///      raises the right side, by what it measured, and only while the left side fits uint96: therefore no
///      sum of credit can overflow anywhere, if the token's balances do not shrink by themselves.
contract CreditVault is ICreditVault, EIP712, ReentrancyGuardTransient {
    using SafeERC20 for IERC20;

    /// @dev `owner` and `exitDelay` share a slot, and so do `payout` and `earnings`.
    struct Platform {
        address owner;
        uint32 exitDelay;
        address payout;
        uint96 earnings;
        address pendingOwner;
    }

    /// @dev Five slots; in a charge, all but the first are read only when their flag is set in it.
    struct Account {
        AccountState state;
        Policy policy;
        Allowance allowance;
        Exit exit;
        AllowanceChange allowanceChange;
    }

    /// @dev The last change of the allowance: what binds from `effectiveAt` on, while ALLOWANCE_TIGHTENS.
    struct AllowanceChange {
        uint96 cap;
        uint40 expiresAt;
        uint40 effectiveAt;
        /// @dev Changes so far.
        uint64 nonce;
    }

    struct Exit {
        uint96 amount;
        uint40 maturesAt;
        /// @dev Kept whether an exit is pending or not.
        uint40 consentsFrom;
    }

    /// @inheritdoc ICreditVault
    uint8 public constant LIMIT_PER_CHARGE = 1;
    /// @inheritdoc ICreditVault
    uint8 public constant LIMIT_PER_WINDOW = 2;
    /// @inheritdoc ICreditVault
    uint8 public constant LIMIT_EXPIRY = 4;
    uint8 private constant LIMITS = LIMIT_PER_CHARGE | LIMIT_PER_WINDOW | LIMIT_EXPIRY;
    /// @dev `Account.allowance` binds.
    uint8 private constant ALLOWANCE = 8;
    uint8 private constant EXIT_PENDING = 16;
    /// @dev `Account.allowanceChange` is to bind in the place of `allowance`.
    uint8 private constant ALLOWANCE_TIGHTENS = 32;

    /// @inheritdoc ICreditVault
    uint32 public constant MIN_WINDOW = 60 seconds;
    /// @inheritdoc ICreditVault
    uint32 public constant MIN_EXIT_DELAY = 1 hours;
    /// @inheritdoc ICreditVault
    uint32 public constant MAX_EXIT_DELAY = 7 days;
    /// @inheritdoc ICreditVault
    uint32 public constant MAX_DEADLINE = 1 hours;
    /// @inheritdoc ICreditVault
    uint32 public constant MAX_CONSENT = 10 minutes;
    /// @inheritdoc ICreditVault
    uint256 public constant MAX_CHARGES = 1000;

    /// @dev Credit (10**-12 USD) in one token base unit (10**-6 USD).
    uint96 private constant CREDIT_PER_TOKEN = 1e6;
    /// @dev Token base units whose credit fits uint96: 79 quadrillion USD.
    uint256 private constant MAX_TOKENS = type(uint96).max / CREDIT_PER_TOKEN;

    /// @dev Salts carry what the address is for, so that no other kind can meet it.
    bytes32 private constant ACCOUNT_SALT_TAG = keccak256("waterfall.deposit-address.account");
    bytes32 private constant INBOX_SALT_TAG = keccak256("waterfall.deposit-address.inbox");

    /// @inheritdoc ICreditVault
    address public immutable token;
    /// @dev What deposit addresses are clones of.
    address private immutable _depositAddressImplementation;

    mapping(uint128 platform => Platform) private _platforms;
    mapping(uint128 platform => mapping(address meter => Meter)) private _meters;
    // slither-disable-next-line uninitialized-state: written through references, which slither does not follow
    mapping(uint128 platform => mapping(bytes32 account => Account)) private _accounts;
    /// @dev One bit per charge id: word number `id >> 8`, bit `id & 0xff`.
    // slither-disable-next-line uninitialized-state: written through references, which slither does not follow
    mapping(uint128 platform => mapping(uint256 word => uint256 bits)) private _usedIds;
    mapping(uint128 platform => mapping(uint64 id => bool)) private _refundedIds;
    /// @dev EIP-3009 authorizations whose money was credited through the platform's inbox.
    mapping(uint128 platform => mapping(address payer => mapping(bytes32 nonce => bool))) private _booked;
    mapping(uint128 platform => mapping(bytes32 nonce => bool)) private _usedConsents;

    modifier onlyPlatformOwner(uint128 platform) {
        if (msg.sender != _ownerOf(platform)) revert NotPlatformOwner(platform, msg.sender);
        _;
    }

    modifier onlyRegistered(uint128 platform) {
        _ownerOf(platform);
        _;
    }

    constructor(address token_) EIP712("Waterfall CreditVault", "1") {
        if (token_.code.length == 0 || IERC20Metadata(token_).decimals() != 6) {
            revert NotATokenWithSixDecimals(token_);
        }
        token = token_;
        _depositAddressImplementation = address(new DepositAddress());
    }

    /// @inheritdoc ICreditVault
    function registerPlatform(bytes32 salt, address payout, address meter, uint32 exitDelay)
        external
        returns (uint128 platform)
    {
        platform = platformId(msg.sender, salt);
        if (_platforms[platform].owner != address(0)) revert PlatformExists(platform);
        _requireRecipient(payout);
        if (exitDelay < MIN_EXIT_DELAY || exitDelay > MAX_EXIT_DELAY) {
            revert ExitDelayOutOfRange(exitDelay, MIN_EXIT_DELAY, MAX_EXIT_DELAY);
        }

        _platforms[platform] = Platform({
            owner: msg.sender, exitDelay: exitDelay, payout: payout, earnings: 0, pendingOwner: address(0)
        });
        emit PlatformRegistered(platform, msg.sender, payout, exitDelay, salt);
        _addMeter(platform, meter);
    }

    /// @inheritdoc ICreditVault
    function transferPlatform(uint128 platform, address newOwner) external onlyPlatformOwner(platform) {
        if (newOwner == address(0)) revert ZeroAddress();
        _platforms[platform].pendingOwner = newOwner;
        emit PlatformTransferStarted(platform, msg.sender, newOwner);
    }

    /// @inheritdoc ICreditVault
    function acceptPlatform(uint128 platform) external {
        address previousOwner = _ownerOf(platform);
        Platform storage record = _platforms[platform];
        if (msg.sender != record.pendingOwner) revert NotPendingOwner(platform, msg.sender);
        record.owner = msg.sender;
        record.pendingOwner = address(0);
        emit PlatformTransferred(platform, previousOwner, msg.sender);
    }

    /// @inheritdoc ICreditVault
    function setPayout(uint128 platform, address payout) external onlyPlatformOwner(platform) {
        _requireRecipient(payout);
        _platforms[platform].payout = payout;
        emit PayoutSet(platform, payout);
    }

    /// @inheritdoc ICreditVault
    function addMeter(uint128 platform, address meter) external onlyPlatformOwner(platform) {
        _addMeter(platform, meter);
    }

    /// @inheritdoc ICreditVault
    function retireMeter(uint128 platform, address meter, uint40 compromisedSince)
        external
        onlyPlatformOwner(platform)
    {
        Meter storage record = _meters[platform][meter];
        if (!_isValid(record)) revert NotAMeter(platform, meter);
        if (
            compromisedSince != 0 && (compromisedSince < record.addedAt || compromisedSince > block.timestamp)
        ) {
            revert CompromisedSinceOutOfRange(compromisedSince, record.addedAt, block.timestamp);
        }

        record.retiredAt = uint40(block.timestamp);
        record.compromisedSince = compromisedSince;
        emit MeterRetired(platform, meter, compromisedSince);
    }

    /// @inheritdoc ICreditVault
    function setPolicy(uint128 platform, bytes32 account, uint8 limits, Policy calldata policy)
        external
        onlyPlatformOwner(platform)
    {
        _requireFlagsMatch(limits, policy);

        Account storage record = _accounts[platform][account];
        AccountState state = record.state;
        uint80 spent = 0;
        uint32 window = 0;
        if (limits & LIMIT_PER_WINDOW != 0) {
            window = _currentWindow(policy.windowSeconds);
            if (state.has(LIMIT_PER_WINDOW) && state.window() == _currentWindow(record.policy.windowSeconds))
            {
                spent = state.spentInWindow();
            }
        }

        record.state = state.setSpentInWindow(spent, window).setFlags((state.flags() & ~LIMITS) | limits);
        record.policy = policy;
        emit PolicySet(platform, account, limits, policy);
    }

    /// @inheritdoc ICreditVault
    function deposit(uint128 platform, address owner, bytes32 label, uint256 tokens)
        external
        nonReentrant
        onlyRegistered(platform)
        returns (bytes32 account)
    {
        uint256 balanceBefore = _tokenBalance();
        IERC20(token).safeTransferFrom(msg.sender, address(this), tokens);
        return _credit(platform, owner, label, msg.sender, balanceBefore);
    }

    /// @inheritdoc ICreditVault
    function depositWithAuthorization(
        uint128 platform,
        address owner,
        bytes32 label,
        address payer,
        uint256 tokens,
        uint256 validAfter,
        uint256 validBefore,
        bytes32 salt,
        bytes calldata signature
    ) external nonReentrant onlyRegistered(platform) returns (bytes32 account) {
        uint256 balanceBefore = _tokenBalance();
        IERC3009(token)
            .receiveWithAuthorization(
                payer,
                address(this),
                tokens,
                validAfter,
                validBefore,
                depositNonce(platform, owner, label, salt),
                signature
            );
        return _credit(platform, owner, label, payer, balanceBefore);
    }

    /// @inheritdoc ICreditVault
    function sweep(uint128 platform, address owner, bytes32 label)
        external
        nonReentrant
        onlyRegistered(platform)
        returns (bytes32 account)
    {
        address source = _deployed(_depositAddressSalt(platform, owner, label));
        return _creditFrom(source, platform, owner, label, source, IERC20(token).balanceOf(source));
    }

    /// @inheritdoc ICreditVault
    function depositFromInbox(
        uint128 platform,
        address payer,
        uint256 tokens,
        uint256 validAfter,
        uint256 validBefore,
        bytes32 nonce,
        bytes calldata signature
    ) external nonReentrant onlyRegistered(platform) returns (bytes32 account) {
        _book(platform, payer, nonce);
        address source = _deployed(_inboxSalt(platform));
        uint256 sourceBefore = IERC20(token).balanceOf(source);
        IERC3009(token)
            .transferWithAuthorization(payer, source, tokens, validAfter, validBefore, nonce, signature);
        uint256 arrived = IERC20(token).balanceOf(source) - sourceBefore;
        return _creditFrom(source, platform, payer, bytes32(0), payer, arrived);
    }

    /// @inheritdoc ICreditVault
    function bookInbox(
        uint128 platform,
        address payer,
        bytes32 nonce,
        uint256 tokens,
        uint40 deadline,
        bytes calldata meterSignature
    ) external nonReentrant onlyRegistered(platform) returns (bytes32 account) {
        if (payer == address(0)) revert ZeroAddress();
        _requireDeadline(deadline, MAX_DEADLINE);
        _requireMeter(
            platform, TypedData.hashInboxBooking(platform, payer, nonce, tokens, deadline), meterSignature
        );
        _book(platform, payer, nonce);
        address source = _deployed(_inboxSalt(platform));
        uint256 held = IERC20(token).balanceOf(source);
        if (tokens > held) revert ExceedsInbox(tokens, held);
        // The meter alone says whose this is: until its owner could have seen it, the meter alone cannot let it out.
        _accounts[platform][accountId(platform, payer, bytes32(0))].exit.consentsFrom =
            uint40(block.timestamp + _platforms[platform].exitDelay);
        return _creditFrom(source, platform, payer, bytes32(0), payer, tokens);
    }

    /// @inheritdoc ICreditVault
    function rescue(uint128 platform, address owner, bytes32 label, address wrongToken, address to)
        external
        nonReentrant
    {
        _requireAccountOwner(platform, owner, label);
        _rescue(platform, _depositAddressSalt(platform, owner, label), wrongToken, to);
    }

    /// @inheritdoc ICreditVault
    function rescueFromInbox(uint128 platform, address wrongToken, address to)
        external
        nonReentrant
        onlyPlatformOwner(platform)
    {
        _rescue(platform, _inboxSalt(platform), wrongToken, to);
    }

    /// @inheritdoc ICreditVault
    function setAllowance(uint128 platform, address owner, bytes32 label, uint96 cap, uint40 expiresAt)
        external
    {
        _requireAccountOwner(platform, owner, label);
        _setAllowance(platform, owner, label, cap, expiresAt);
    }

    /// @inheritdoc ICreditVault
    function setAllowanceBySignature(
        uint128 platform,
        address owner,
        bytes32 label,
        uint96 cap,
        uint40 expiresAt,
        uint64 nonce,
        uint40 deadline,
        bytes calldata signature
    ) external {
        if (block.timestamp > deadline) revert DeadlinePassed(deadline, block.timestamp);
        bytes32 account = accountId(platform, owner, label);
        uint64 expected = _accounts[platform][account].allowanceChange.nonce;
        if (nonce != expected) revert WrongAllowanceNonce(nonce, expected);
        bytes32 structHash = TypedData.hashAllowanceChange(platform, account, cap, expiresAt, nonce, deadline);
        address signer = _actorOf(platform, owner);
        if (!_isSignedBy(signer, _hashTypedDataV4(structHash), signature)) {
            revert NotSignedByOwner(account, signer);
        }
        _setAllowance(platform, owner, label, cap, expiresAt);
    }

    /// @inheritdoc ICreditVault
    function settle(
        uint128 platform,
        Charge[] calldata charges,
        uint40 deadline,
        bytes calldata meterSignature
    ) external {
        _requireBatch(charges.length);
        _requireDeadline(deadline, MAX_DEADLINE);
        _requireMeter(platform, TypedData.hashSettlement(platform, charges, deadline), meterSignature);

        mapping(bytes32 account => Account) storage accounts = _accounts[platform];
        mapping(uint256 word => uint256 bits) storage usedIds = _usedIds[platform];
        // Ids are dense: the bits of one word are kept at hand while charge follows charge in it.
        uint256 word = charges[0].id >> 8;
        uint256 bits = usedIds[word];
        uint256 earned = 0;
        for (uint256 i = 0; i < charges.length; ++i) {
            Charge calldata charge = charges[i];
            uint64 id = charge.id;
            if (id >> 8 != word) {
                usedIds[word] = bits;
                word = id >> 8;
                bits = usedIds[word];
            }
            uint256 bit = 1 << (id & 0xff);
            if (bits & bit != 0) continue;
            (uint256 amount, Rejection reason) = _charge(accounts[charge.account], charge, id);
            if (amount != 0) {
                bits |= bit;
                unchecked {
                    earned += amount; // MAX_CHARGES of uint96
                }
            } else {
                emit ChargeRejected(platform, charge.account, id, reason);
            }
        }
        usedIds[word] = bits;
        // forge-lint: disable-next-line(unsafe-typecast): no more than all the credit there is
        _platforms[platform].earnings += uint96(earned);
    }

    /// @inheritdoc ICreditVault
    function voidCharges(
        uint128 platform,
        uint64[] calldata ids,
        uint40 deadline,
        bytes calldata meterSignature
    ) external {
        _requireBatch(ids.length);
        _requireDeadline(deadline, MAX_DEADLINE);
        _requireMeter(platform, TypedData.hashVoiding(platform, ids, deadline), meterSignature);

        mapping(uint256 word => uint256 bits) storage usedIds = _usedIds[platform];
        for (uint256 i = 0; i < ids.length; ++i) {
            uint64 id = ids[i];
            if (isSettled(platform, id)) continue;
            usedIds[id >> 8] |= 1 << (id & 0xff);
            emit ChargeVoided(platform, id);
        }
    }

    /// @inheritdoc ICreditVault
    function refund(uint128 platform, uint64 id, address owner, bytes32 label, uint96 amount)
        external
        onlyPlatformOwner(platform)
        returns (bytes32 account)
    {
        if (amount == 0) revert ZeroAmount();
        if (!isSettled(platform, id)) revert IdNotUsed(platform, id);
        if (_refundedIds[platform][id]) revert AlreadyRefunded(platform, id);
        Platform storage record = _platforms[platform];
        if (amount > record.earnings) revert ExceedsEarnings(amount, record.earnings);

        _refundedIds[platform][id] = true;
        record.earnings -= amount;
        account = accountId(platform, owner, label);
        uint40 entry = _addToBalance(platform, account, amount);
        emit Refunded(platform, account, id, owner, label, amount, entry);
    }

    /// @inheritdoc ICreditVault
    function allocate(uint128 platform, bytes32 sourceLabel, address owner, bytes32 label, uint96 amount)
        external
        onlyPlatformOwner(platform)
        returns (bytes32 account)
    {
        if (amount == 0) revert ZeroAmount();
        bytes32 source = accountId(platform, address(0), sourceLabel);
        account = accountId(platform, owner, label);
        if (account == source) revert SameAccount(account);

        uint40 sourceEntry = _takeFromBalance(platform, source, amount);
        uint40 entry = _addToBalance(platform, account, amount);
        emit Allocated(platform, source, account, owner, label, amount, sourceEntry, entry);
    }

    /// @inheritdoc ICreditVault
    function requestExit(uint128 platform, address owner, bytes32 label, uint256 tokens) external {
        bytes32 account = _requireAccountOwner(platform, owner, label);
        uint96 amount = _toCredit(tokens);
        uint40 entry = _takeFromBalance(platform, account, amount);

        Account storage record = _accounts[platform][account];
        AccountState state = record.state;
        uint96 total = amount;
        if (state.has(EXIT_PENDING)) total += record.exit.amount;
        uint40 maturesAt = uint40(block.timestamp + _platforms[platform].exitDelay);
        record.state = state.setFlags(state.flags() | EXIT_PENDING);
        (record.exit.amount, record.exit.maturesAt) = (total, maturesAt);
        emit ExitRequested(platform, account, amount, total, maturesAt, entry);
    }

    /// @inheritdoc ICreditVault
    function cancelExit(uint128 platform, address owner, bytes32 label) external {
        bytes32 account = _requireAccountOwner(platform, owner, label);
        Account storage record = _accounts[platform][account];
        AccountState state = record.state;
        if (!state.has(EXIT_PENDING)) revert NoExit(account);

        uint96 amount = record.exit.amount;
        state = state.setBalance(state.balance() + amount).setFlags(state.flags() & ~EXIT_PENDING).addEntry();
        record.state = state;
        emit ExitCancelled(platform, account, amount, state.entries());
    }

    /// @inheritdoc ICreditVault
    function finalizeExit(uint128 platform, address owner, bytes32 label, address to) external nonReentrant {
        bytes32 account = _requireAccountOwner(platform, owner, label);
        _requireRecipient(to);
        Account storage record = _accounts[platform][account];
        AccountState state = record.state;
        if (!state.has(EXIT_PENDING)) revert NoExit(account);
        Exit memory exit = record.exit;
        if (block.timestamp < exit.maturesAt) revert ExitNotMature(exit.maturesAt, block.timestamp);

        uint256 tokens = exit.amount / CREDIT_PER_TOKEN;
        // Charges that drew on the exit may have left less than one token base unit of it.
        uint96 remainder = exit.amount % CREDIT_PER_TOKEN;
        state =
            state.setBalance(state.balance() + remainder).setFlags(state.flags() & ~EXIT_PENDING).addEntry();
        record.state = state;
        emit ExitFinalized(platform, account, to, tokens, remainder, state.entries());

        IERC20(token).safeTransfer(to, tokens);
    }

    /// @inheritdoc ICreditVault
    function exitWithConsent(
        uint128 platform,
        address owner,
        bytes32 label,
        uint256 tokens,
        address to,
        bytes32 nonce,
        uint40 deadline,
        bytes calldata meterSignature
    ) external nonReentrant {
        bytes32 account = _requireAccountOwner(platform, owner, label);
        _requireRecipient(to);
        _requireDeadline(deadline, MAX_CONSENT);
        _requireMeter(
            platform,
            TypedData.hashExitConsent(platform, account, tokens, to, nonce, deadline),
            meterSignature
        );
        if (_usedConsents[platform][nonce]) revert ConsentUsed(platform, nonce);
        uint40 consentsFrom = _accounts[platform][account].exit.consentsFrom;
        if (block.timestamp < consentsFrom) revert ConsentTooEarly(consentsFrom, block.timestamp);

        _usedConsents[platform][nonce] = true;
        uint40 entry = _takeFromBalance(platform, account, _toCredit(tokens));
        emit ExitedWithConsent(platform, account, to, tokens, nonce, entry);

        IERC20(token).safeTransfer(to, tokens);
    }

    /// @inheritdoc ICreditVault
    function withdrawEarnings(uint128 platform, uint256 tokens)
        external
        nonReentrant
        onlyPlatformOwner(platform)
    {
        Platform storage record = _platforms[platform];
        uint96 amount = _toCredit(tokens);
        if (amount > record.earnings) revert ExceedsEarnings(amount, record.earnings);

        record.earnings -= amount;
        address payout = record.payout;
        emit EarningsWithdrawn(platform, payout, tokens);

        IERC20(token).safeTransfer(payout, tokens);
    }

    /// @inheritdoc ICreditVault
    function verifyReceipt(UsageReceipt calldata receipt, bytes calldata signature)
        external
        view
        returns (ReceiptCheck memory check)
    {
        check.digest = _hashTypedDataV4(TypedData.hashReceipt(receipt));
        // slither-disable-next-line unused-return: of a malformed signature, the signer is zero
        (check.signer,,) = ECDSA.tryRecoverCalldata(check.digest, signature);
        Meter storage meter = _meters[receipt.platform][check.signer];
        check.validAtIssue = _wasValid(meter, receipt.issuedAt);
        check.validNow = _isValid(meter);
        check.used = isSettled(receipt.platform, receipt.chargeId);
    }

    /// @inheritdoc ICreditVault
    function platformOf(uint128 platform) external view returns (PlatformView memory) {
        Platform storage record = _platforms[platform];
        return PlatformView({
            owner: record.owner,
            payout: record.payout,
            exitDelay: record.exitDelay,
            earnings: record.earnings,
            pendingOwner: record.pendingOwner
        });
    }

    /// @inheritdoc ICreditVault
    function meterOf(uint128 platform, address meter) external view returns (Meter memory) {
        return _meters[platform][meter];
    }

    /// @inheritdoc ICreditVault
    function accountOf(uint128 platform, bytes32 account) external view returns (AccountView memory) {
        Account storage record = _accounts[platform][account];
        AccountState state = record.state;
        // slither-disable-next-line uninitialized-local: zero is what it is to be without an exit
        Exit memory exit;
        if (state.has(EXIT_PENDING)) exit = record.exit;
        AllowanceChange memory next = record.allowanceChange;
        (Allowance memory allowance, AccountState current) = _allowanceOf(record, state);
        return AccountView({
            balance: state.balance(),
            spentInWindow: state.spentInWindow(),
            window: state.window(),
            entries: state.entries(),
            limits: state.flags() & LIMITS,
            policy: record.policy,
            exitAmount: exit.amount,
            exitMaturesAt: exit.maturesAt,
            allowance: allowance,
            nextCap: next.cap,
            nextExpiresAt: next.expiresAt,
            allowanceChangesAt: current.has(ALLOWANCE_TIGHTENS) ? next.effectiveAt : 0,
            allowanceNonce: next.nonce,
            consentsFrom: record.exit.consentsFrom
        });
    }

    /// @inheritdoc ICreditVault
    function available(uint128 platform, bytes32 account) external view returns (uint256 most) {
        Account storage record = _accounts[platform][account];
        AccountState state = record.state;
        most = uint256(state.balance()) + _chargeableExit(record, state);

        (uint256 inWindow,) = remainingInWindow(platform, account);
        most = Math.min(most, inWindow);
        if (state.has(LIMIT_PER_CHARGE)) most = Math.min(most, record.policy.maxPerCharge);
        if (state.has(LIMIT_EXPIRY) && block.timestamp >= record.policy.expiresAt) most = 0;

        if (state.has(ALLOWANCE)) {
            (Allowance memory allowance,) = _allowanceOf(record, state);
            most = Math.min(most, Math.saturatingSub(allowance.cap, allowance.spent));
            if (block.timestamp >= allowance.expiresAt) most = 0;
        }
    }

    /// @inheritdoc ICreditVault
    function remainingInWindow(uint128 platform, bytes32 account)
        public
        view
        returns (uint256 credit, uint256 endsAt)
    {
        Account storage record = _accounts[platform][account];
        AccountState state = record.state;
        if (!state.has(LIMIT_PER_WINDOW)) return (type(uint256).max, 0);

        Policy memory policy = record.policy;
        uint256 window = _currentWindow(policy.windowSeconds);
        uint256 spent = window == state.window() ? state.spentInWindow() : 0;
        credit = Math.saturatingSub(policy.maxPerWindow, spent);
        endsAt = (window + 1) * policy.windowSeconds;
    }

    /// @inheritdoc ICreditVault
    function isSettled(uint128 platform, uint64 id) public view returns (bool) {
        return _usedIds[platform][id >> 8] & (1 << (id & 0xff)) != 0;
    }

    /// @inheritdoc ICreditVault
    function hashSettlement(uint128 platform, Charge[] calldata charges, uint40 deadline)
        external
        view
        returns (bytes32)
    {
        return _hashTypedDataV4(TypedData.hashSettlement(platform, charges, deadline));
    }

    /// @inheritdoc ICreditVault
    function depositAddress(uint128 platform, address owner, bytes32 label) public view returns (address) {
        return Clones.predictDeterministicAddress(
            _depositAddressImplementation, _depositAddressSalt(platform, owner, label)
        );
    }

    /// @inheritdoc ICreditVault
    function inbox(uint128 platform) external view returns (address) {
        return Clones.predictDeterministicAddress(_depositAddressImplementation, _inboxSalt(platform));
    }

    /// @inheritdoc ICreditVault
    function platformId(address registrant, bytes32 salt) public pure returns (uint128) {
        return uint128(uint256(keccak256(abi.encode(registrant, salt))));
    }

    /// @inheritdoc ICreditVault
    function accountId(uint128 platform, address owner, bytes32 label) public pure returns (bytes32) {
        return keccak256(abi.encode(platform, owner, label));
    }

    /// @inheritdoc ICreditVault
    function depositNonce(uint128 platform, address owner, bytes32 label, bytes32 salt)
        public
        pure
        returns (bytes32)
    {
        return keccak256(abi.encode(platform, owner, label, salt));
    }

    function _addMeter(uint128 platform, address meter) private {
        if (meter == address(0)) revert ZeroAddress();
        Meter storage record = _meters[platform][meter];
        if (record.addedAt != 0) revert MeterExists(platform, meter);

        record.addedAt = uint40(block.timestamp);
        emit MeterAdded(platform, meter);
    }

    /// @dev Credits what the vault's token balance grew by since `balanceBefore`. The tokens have to be here
    ///      before they can be measured, so callers interact first: they are all non-reentrant.
    function _credit(uint128 platform, address owner, bytes32 label, address payer, uint256 balanceBefore)
        private
        returns (bytes32 account)
    {
        uint256 balanceAfter = _tokenBalance();
        if (balanceAfter > MAX_TOKENS) revert AmountTooLarge(balanceAfter, MAX_TOKENS);
        uint96 amount = _toCredit(balanceAfter - balanceBefore);

        account = accountId(platform, owner, label);
        uint40 entry = _addToBalance(platform, account, amount);
        emit Deposited(platform, account, payer, owner, label, amount, entry);
    }

    /// @dev Has `tokens` sent here from a deposit address or inbox, and credits them.
    function _creditFrom(
        address source,
        uint128 platform,
        address owner,
        bytes32 label,
        address payer,
        uint256 tokens
    ) private returns (bytes32 account) {
        uint256 balanceBefore = _tokenBalance();
        DepositAddress(source).send(IERC20(token), address(this), tokens);
        return _credit(platform, owner, label, payer, balanceBefore);
    }

    /// @return entry the line number this has in the statement
    function _addToBalance(uint128 platform, bytes32 account, uint96 amount) private returns (uint40 entry) {
        Account storage record = _accounts[platform][account];
        AccountState state = record.state;
        state = state.setBalance(state.balance() + amount).addEntry();
        record.state = state;
        return state.entries();
    }

    /// @return entry the line number this has in the statement
    function _takeFromBalance(uint128 platform, bytes32 account, uint96 amount)
        private
        returns (uint40 entry)
    {
        Account storage record = _accounts[platform][account];
        AccountState state = record.state;
        if (amount > state.balance()) revert ExceedsBalance(amount, state.balance());
        state = state.setBalance(state.balance() - amount).addEntry();
        record.state = state;
        return state.entries();
    }

    function _book(uint128 platform, address payer, bytes32 nonce) private {
        if (_booked[platform][payer][nonce]) revert AlreadyBooked(platform, payer, nonce);
        _booked[platform][payer][nonce] = true;
        emit InboxBooked(platform, payer, nonce);
    }

    /// @dev The deposit address or inbox of this salt, with its code.
    function _deployed(bytes32 salt) private returns (address source) {
        source = Clones.predictDeterministicAddress(_depositAddressImplementation, salt);
        if (source.code.length == 0) {
            source = Clones.cloneDeterministic(_depositAddressImplementation, salt);
        }
    }

    function _rescue(uint128 platform, bytes32 salt, address wrongToken, address to) private {
        bool native = wrongToken == address(0);
        if (wrongToken == token || (!native && wrongToken.code.length == 0)) revert NotRescuable(wrongToken);
        _requireRecipient(to);
        address source = _deployed(salt);
        uint256 amount = native ? source.balance : IERC20(wrongToken).balanceOf(source);
        if (amount == 0) revert ZeroAmount();
        emit Rescued(platform, source, wrongToken, to, amount);

        if (native) DepositAddress(source).sendNative(payable(to), amount);
        else DepositAddress(source).send(IERC20(wrongToken), to, amount);
    }

    function _setAllowance(uint128 platform, address owner, bytes32 label, uint96 cap, uint40 expiresAt)
        private
    {
        bytes32 account = accountId(platform, owner, label);
        Account storage record = _accounts[platform][account];
        (Allowance memory allowance, AccountState state) = _allowanceOf(record, record.state);
        bool tightens = cap < allowance.cap || expiresAt < allowance.expiresAt;
        bool exists = tightens || cap != type(uint96).max || expiresAt != type(uint40).max;
        if (cap > allowance.cap) allowance.cap = cap;
        if (expiresAt > allowance.expiresAt) allowance.expiresAt = expiresAt;

        uint8 flags = state.flags() & ~(ALLOWANCE | ALLOWANCE_TIGHTENS);
        if (exists) flags |= ALLOWANCE;
        if (tightens) flags |= ALLOWANCE_TIGHTENS;
        uint64 nonce = record.allowanceChange.nonce;
        uint40 effectiveAt = uint40(block.timestamp + (tightens ? _platforms[platform].exitDelay : 0));
        record.state = state.setFlags(flags);
        record.allowance = allowance;
        record.allowanceChange =
            AllowanceChange({ cap: cap, expiresAt: expiresAt, effectiveAt: effectiveAt, nonce: nonce + 1 });
        emit AllowanceSet(platform, account, owner, label, cap, expiresAt, effectiveAt, nonce);
    }

    /// @dev Charges an account if it can bear it; the caller marks the id and books the earnings.
    /// @return charged the amount, or 0 if the charge is refused
    /// @return reason why it is refused
    function _charge(Account storage record, Charge calldata charge, uint64 id)
        private
        returns (uint256 charged, Rejection reason)
    {
        // Amounts are uint256 here, as masking narrower ones costs more than the arithmetic does. Each is cast
        // back only after a comparison with a field as narrow.
        // forge-lint: disable-start(unsafe-typecast)
        AccountState state = record.state;
        uint256 amount = charge.amount;
        if (amount == 0) return (0, Rejection.ZeroAmount);

        if (state.has(LIMITS)) {
            Policy storage policy = record.policy;
            // All at once: one read of the slot.
            (uint256 maxPerCharge, uint256 maxPerWindow, uint256 windowSeconds, uint256 expiresAt) =
                (policy.maxPerCharge, policy.maxPerWindow, policy.windowSeconds, policy.expiresAt);
            if (state.has(LIMIT_PER_CHARGE)) {
                if (amount > maxPerCharge) return (0, Rejection.MaxPerCharge);
            }
            if (state.has(LIMIT_PER_WINDOW)) {
                uint32 window = _currentWindow(windowSeconds);
                uint256 spent = amount;
                unchecked {
                    if (window == state.window()) spent += state.spentInWindow();
                }
                if (spent > maxPerWindow) return (0, Rejection.MaxPerWindow);
                state = state.setSpentInWindow(uint80(spent), window);
            }
            if (state.has(LIMIT_EXPIRY)) {
                if (block.timestamp >= expiresAt) return (0, Rejection.PolicyExpired);
            }
        }

        if (state.has(ALLOWANCE)) {
            Allowance memory allowance;
            (allowance, state) = _allowanceOf(record, state);
            uint256 spent;
            unchecked {
                spent = amount + allowance.spent;
            }
            if (spent > allowance.cap) return (0, Rejection.AllowanceCap);
            if (block.timestamp >= allowance.expiresAt) return (0, Rejection.AllowanceExpired);
            if (amount > uint256(state.balance()) + _chargeableExit(record, state)) {
                return (0, Rejection.Balance);
            }
            allowance.spent = uint96(spent);
            record.allowance = allowance;
        }

        if (amount > state.balance()) {
            uint96 missing = uint96(amount - state.balance());
            if (missing > _chargeableExit(record, state)) return (0, Rejection.Balance);
            state = _drawExit(record, state, missing);
            emit ExitDrawn(charge.account, id, missing);
        }
        unchecked {
            state = state.setBalance(uint96(state.balance() - amount)).addEntry();
        }
        record.state = state;
        emit Charged(charge.account, id, uint96(amount), state.entries(), charge.receiptHash);
        charged = amount;
        // forge-lint: disable-end(unsafe-typecast)
    }

    /// @dev Moves `amount` of the pending exit back to the balance.
    function _drawExit(Account storage record, AccountState state, uint96 amount)
        private
        returns (AccountState)
    {
        uint96 left = record.exit.amount - amount;
        record.exit.amount = left;
        if (left == 0) state = state.setFlags(state.flags() & ~EXIT_PENDING);
        return state.setBalance(state.balance() + amount);
    }

    /// @dev What a charge may draw from the pending exit. A matured one is the owner's alone.
    function _chargeableExit(Account storage record, AccountState state) private view returns (uint96) {
        if (!state.has(EXIT_PENDING)) return 0;
        return block.timestamp < record.exit.maturesAt ? record.exit.amount : 0;
    }

    /// @dev What binds now, and the state without a change that has come to bind by now. Not stored yet.
    function _allowanceOf(Account storage record, AccountState state)
        private
        view
        returns (Allowance memory allowance, AccountState current)
    {
        allowance = record.allowance;
        current = state;
        if (!state.has(ALLOWANCE)) {
            // Nothing binds, but what was spent under an earlier allowance stays counted.
            (allowance.cap, allowance.expiresAt) = (type(uint96).max, type(uint40).max);
        } else if (state.has(ALLOWANCE_TIGHTENS)) {
            AllowanceChange memory next = record.allowanceChange;
            if (block.timestamp >= next.effectiveAt) {
                (allowance.cap, allowance.expiresAt) = (next.cap, next.expiresAt);
                current = state.setFlags(state.flags() & ~ALLOWANCE_TIGHTENS);
            }
        }
    }

    /// @dev A key's signature counts for an owner with code too, as that may be an EIP-7702 delegation.
    function _isSignedBy(address signer, bytes32 digest, bytes calldata signature)
        private
        view
        returns (bool)
    {
        // slither-disable-next-line unused-return: what is wrong with a signature is told by its not being the owner's
        (address recovered, ECDSA.RecoverError problem,) = ECDSA.tryRecoverCalldata(digest, signature);
        if (problem == ECDSA.RecoverError.NoError && recovered == signer) return true;
        return SignatureChecker.isValidERC1271SignatureNowCalldata(signer, digest, signature);
    }

    function _currentWindow(uint256 windowSeconds) private view returns (uint32) {
        // forge-lint: disable-next-line(unsafe-typecast): with MIN_WINDOW seconds, fits until the year 10135
        return uint32(block.timestamp / windowSeconds);
    }

    function _requireFlagsMatch(uint8 limits, Policy calldata policy) private pure {
        if (limits & ~LIMITS != 0) revert UnknownLimits(limits);
        if (limits & LIMIT_PER_CHARGE == 0 && policy.maxPerCharge != 0) {
            revert LimitWithoutFlag(LIMIT_PER_CHARGE);
        }
        if (limits & LIMIT_PER_WINDOW == 0) {
            if (policy.maxPerWindow != 0 || policy.windowSeconds != 0) {
                revert LimitWithoutFlag(LIMIT_PER_WINDOW);
            }
        } else if (policy.windowSeconds < MIN_WINDOW) {
            revert WindowTooShort(policy.windowSeconds, MIN_WINDOW);
        }
        if (limits & LIMIT_EXPIRY == 0 && policy.expiresAt != 0) revert LimitWithoutFlag(LIMIT_EXPIRY);
    }

    /// @return account the id, if the caller acts for it
    function _requireAccountOwner(uint128 platform, address owner, bytes32 label)
        private
        view
        returns (bytes32 account)
    {
        account = accountId(platform, owner, label);
        if (msg.sender != _actorOf(platform, owner)) revert NotAccountOwner(account, msg.sender);
    }

    /// @dev Who acts for the accounts of `owner` on the platform.
    function _actorOf(uint128 platform, address owner) private view returns (address) {
        address platformOwner = _ownerOf(platform);
        return owner == address(0) ? platformOwner : owner;
    }

    /// @dev Never zero.
    function _ownerOf(uint128 platform) private view returns (address owner) {
        owner = _platforms[platform].owner;
        if (owner == address(0)) revert UnknownPlatform(platform);
    }

    function _requireBatch(uint256 length) private pure {
        if (length == 0) revert EmptyBatch();
        if (length > MAX_CHARGES) revert BatchTooLarge(length, MAX_CHARGES);
    }

    function _requireDeadline(uint40 deadline, uint256 longest) private view {
        if (block.timestamp > deadline) revert DeadlinePassed(deadline, block.timestamp);
        uint256 last = block.timestamp + longest;
        if (deadline > last) revert DeadlineTooFar(deadline, last);
    }

    function _requireMeter(uint128 platform, bytes32 structHash, bytes calldata signature) private view {
        address meter = ECDSA.recoverCalldata(_hashTypedDataV4(structHash), signature);
        if (!_isValid(_meters[platform][meter])) revert NotAMeter(platform, meter);
    }

    /// @dev Three that could never send the tokens on, and that somebody may name by mistake.
    function _requireRecipient(address to) private view {
        if (to == address(0) || to == address(this) || to == token) revert BadRecipient(to);
    }

    function _isValid(Meter storage meter) private view returns (bool) {
        return meter.addedAt != 0 && meter.retiredAt == 0;
    }

    function _wasValid(Meter storage meter, uint40 timestamp) private view returns (bool) {
        return meter.addedAt != 0 && meter.addedAt <= timestamp
            && (meter.retiredAt == 0 || timestamp < meter.retiredAt)
            && (meter.compromisedSince == 0 || timestamp < meter.compromisedSince);
    }

    function _tokenBalance() private view returns (uint256) {
        return IERC20(token).balanceOf(address(this));
    }

    function _toCredit(uint256 tokens) private pure returns (uint96) {
        if (tokens == 0) revert ZeroAmount();
        if (tokens > MAX_TOKENS) revert AmountTooLarge(tokens, MAX_TOKENS);
        // forge-lint: disable-next-line(unsafe-typecast): MAX_TOKENS fit
        return uint96(tokens * CREDIT_PER_TOKEN);
    }

    function _depositAddressSalt(uint128 platform, address owner, bytes32 label)
        private
        pure
        returns (bytes32)
    {
        return keccak256(abi.encode(ACCOUNT_SALT_TAG, accountId(platform, owner, label)));
    }

    function _inboxSalt(uint128 platform) private pure returns (bytes32) {
        return keccak256(abi.encode(INBOX_SALT_TAG, platform));
    }
}
