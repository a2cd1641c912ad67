// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { Clones } from "@openzeppelin/contracts/proxy/Clones.sol";
import { IERC20 } from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import { IERC20Metadata } from "@openzeppelin/contracts/token/ERC20/extensions/IERC20Metadata.sol";
import { SafeERC20 } from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import { ReentrancyGuardTransient } from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import { ECDSA } from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import { EIP712 } from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";

import { DepositAddress } from "./DepositAddress.sol";
import { ICreditVault } from "./interfaces/ICreditVault.sol";
import { IReceiveWithAuthorization } from "./interfaces/IReceiveWithAuthorization.sol";
import { AccountState } from "./libraries/AccountState.sol";

/// @title CreditVault
/// @notice See ICreditVault.
/// @dev Invariant: token balance × CREDIT_PER_TOKEN ≥ Σ balances + Σ exits + Σ earnings. Only `_credit`
///      raises the right side, by what it measured, and only while the left side fits uint96: therefore no
///      sum of credit can overflow anywhere.
contract CreditVault is ICreditVault, EIP712, ReentrancyGuardTransient {
    using SafeERC20 for IERC20;

    /// @dev `owner` and `exitDelay` share a slot, and so do `payout` and `earnings`.
    struct Platform {
        address owner;
        uint32 exitDelay;
        address payout;
        uint96 earnings;
        /// @dev Reserved: who may accept the ownership.
        address pendingOwner;
    }

    /// @dev Four slots; all but the first are read only when their flag is set in it.
    struct Account {
        AccountState state;
        Policy policy;
        Allowance allowance;
        Exit exit;
    }

    /// @dev Reserved: the limit that the account's owner sets.
    struct Allowance {
        uint96 cap;
        uint96 spent;
        uint40 expiresAt;
    }

    struct Exit {
        uint96 amount;
        uint40 maturesAt;
    }

    bytes32 private constant CHARGE_TYPEHASH =
        keccak256("Charge(bytes32 account,uint64 id,uint96 amount,bytes32 receiptHash)");
    bytes32 private constant SETTLEMENT_TYPEHASH = keccak256(
        "Settlement(uint128 platform,Charge[] charges,uint40 deadline)"
        "Charge(bytes32 account,uint64 id,uint96 amount,bytes32 receiptHash)"
    );
    bytes32 private constant USAGE_RECEIPT_TYPEHASH = keccak256(
        "UsageReceipt(uint128 platform,bytes32 account,uint64 chargeId,bytes32 requestHash,"
        "bytes32 responseHash,string model,uint64 inputTokens,uint64 cachedInputTokens,uint64 outputTokens,"
        "uint64 reasoningTokens,bytes32 usageHash,bytes32 priceId,uint96 amount,uint40 issuedAt,bool complete)"
    );

    /// @inheritdoc ICreditVault
    uint8 public constant LIMIT_PER_CHARGE = 1;
    /// @inheritdoc ICreditVault
    uint8 public constant LIMIT_PER_WINDOW = 2;
    /// @inheritdoc ICreditVault
    uint8 public constant LIMIT_EXPIRY = 4;
    uint8 private constant LIMITS = LIMIT_PER_CHARGE | LIMIT_PER_WINDOW | LIMIT_EXPIRY;
    /// @dev Flag 8 is reserved for `Account.allowance`.
    uint8 private constant EXIT_PENDING = 16;

    /// @inheritdoc ICreditVault
    uint32 public constant MIN_WINDOW = 60 seconds;
    /// @inheritdoc ICreditVault
    uint32 public constant MIN_EXIT_DELAY = 1 hours;
    /// @inheritdoc ICreditVault
    uint32 public constant MAX_EXIT_DELAY = 7 days;
    /// @inheritdoc ICreditVault
    uint32 public constant MAX_DEADLINE = 1 hours;
    /// @inheritdoc ICreditVault
    uint256 public constant MAX_CHARGES = 1000;

    /// @dev Credit (10**-12 USD) in one token base unit (10**-6 USD).
    uint96 private constant CREDIT_PER_TOKEN = 1e6;
    /// @dev Token base units whose credit fits uint96: 79 quadrillion USD.
    uint256 private constant MAX_TOKENS = type(uint96).max / CREDIT_PER_TOKEN;

    /// @dev Salts carry what the address is for, so that no other kind can meet it.
    bytes32 private constant ACCOUNT_SALT_TAG = keccak256("waterfall.deposit-address.account");

    /// @inheritdoc ICreditVault
    address public immutable token;
    /// @dev What deposit addresses are clones of.
    address private immutable _depositAddressImplementation;

    mapping(uint128 platform => Platform) private _platforms;
    mapping(uint128 platform => mapping(address meter => Meter)) private _meters;
    mapping(uint128 platform => mapping(bytes32 account => Account)) private _accounts;
    /// @dev One bit per charge id: word number `id >> 8`, bit `id & 0xff`.
    mapping(uint128 platform => mapping(uint256 word => uint256 bits)) private _usedIds;

    modifier onlyPlatformOwner(uint128 platform) {
        if (msg.sender != _platforms[platform].owner) revert NotPlatformOwner(platform, msg.sender);
        _;
    }

    modifier onlyRegistered(uint128 platform) {
        if (_platforms[platform].owner == address(0)) revert UnknownPlatform(platform);
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
        uint80 spent;
        uint32 window;
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
        IReceiveWithAuthorization(token)
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
        uint256 balanceBefore = _tokenBalance();
        bytes32 salt = _depositAddressSalt(platform, owner, label);
        address source = Clones.predictDeterministicAddress(_depositAddressImplementation, salt);
        if (source.code.length == 0) Clones.cloneDeterministic(_depositAddressImplementation, salt);
        DepositAddress(source).send(IERC20(token), address(this), IERC20(token).balanceOf(source));
        return _credit(platform, owner, label, source, balanceBefore);
    }

    /// @inheritdoc ICreditVault
    function settle(
        uint128 platform,
        Charge[] calldata charges,
        uint40 deadline,
        bytes calldata meterSignature
    ) external {
        if (charges.length == 0) revert EmptyBatch();
        if (charges.length > MAX_CHARGES) revert BatchTooLarge(charges.length, MAX_CHARGES);
        if (block.timestamp > deadline) revert DeadlinePassed(deadline, block.timestamp);
        if (deadline > block.timestamp + MAX_DEADLINE) {
            revert DeadlineTooFar(deadline, block.timestamp + MAX_DEADLINE);
        }
        address meter = ECDSA.recoverCalldata(hashSettlement(platform, charges, deadline), meterSignature);
        if (!_isValid(_meters[platform][meter])) revert NotAMeter(platform, meter);

        mapping(bytes32 account => Account) storage accounts = _accounts[platform];
        mapping(uint256 word => uint256 bits) storage usedIds = _usedIds[platform];
        // Ids are dense: the bits of one word are kept at hand while charge follows charge in it.
        uint256 word = charges[0].id >> 8;
        uint256 bits = usedIds[word];
        uint256 earned;
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
    function requestExit(uint128 platform, address owner, bytes32 label, uint256 tokens) external {
        bytes32 account = _requireAccountOwner(platform, owner, label);
        uint96 amount = _toCredit(tokens);
        Account storage record = _accounts[platform][account];
        AccountState state = record.state;
        if (amount > state.balance()) revert ExceedsBalance(amount, state.balance());

        uint96 total = amount;
        if (state.has(EXIT_PENDING)) total += record.exit.amount;
        uint40 maturesAt = uint40(block.timestamp + _platforms[platform].exitDelay);
        state = state.setBalance(state.balance() - amount).setFlags(state.flags() | EXIT_PENDING).addEntry();
        record.state = state;
        record.exit = Exit({ amount: total, maturesAt: maturesAt });
        emit ExitRequested(platform, account, amount, total, maturesAt, state.entries());
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
        check.digest = _hashReceipt(receipt);
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
            owner: record.owner, payout: record.payout, exitDelay: record.exitDelay, earnings: record.earnings
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
        Exit memory exit;
        if (state.has(EXIT_PENDING)) exit = record.exit;
        return AccountView({
            balance: state.balance(),
            spentInWindow: state.spentInWindow(),
            window: state.window(),
            entries: state.entries(),
            limits: state.flags() & LIMITS,
            policy: record.policy,
            exitAmount: exit.amount,
            exitMaturesAt: exit.maturesAt
        });
    }

    /// @inheritdoc ICreditVault
    function isSettled(uint128 platform, uint64 id) public view returns (bool) {
        return _usedIds[platform][id >> 8] & (1 << (id & 0xff)) != 0;
    }

    /// @inheritdoc ICreditVault
    function hashSettlement(uint128 platform, Charge[] calldata charges, uint40 deadline)
        public
        view
        returns (bytes32)
    {
        return _hashTypedDataV4(
            keccak256(abi.encode(SETTLEMENT_TYPEHASH, platform, _hashCharges(charges), deadline))
        );
    }

    /// @inheritdoc ICreditVault
    function depositAddress(uint128 platform, address owner, bytes32 label) public view returns (address) {
        return Clones.predictDeterministicAddress(
            _depositAddressImplementation, _depositAddressSalt(platform, owner, label)
        );
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
        Account storage record = _accounts[platform][account];
        AccountState state = record.state;
        state = state.setBalance(state.balance() + amount).addEntry();
        record.state = state;
        emit Deposited(platform, account, payer, owner, label, amount, state.entries());
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
        address actor = owner == address(0) ? _platforms[platform].owner : owner;
        if (msg.sender != actor) revert NotAccountOwner(account, msg.sender);
    }

    /// @dev The three that could never send the tokens on.
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

    /// @dev EIP-712 encoding of `Charge[]`: keccak256 of the concatenated hashes of its elements. A charge's
    ///      four words in calldata are already its EIP-712 encoding, so each is copied as it stands: 130 gas
    ///      a charge, 960 through abi.encode. Words too wide for their field are hashed here like any other,
    ///      but `settle` reads every field it uses through the ABI decoder, which refuses them.
    function _hashCharges(Charge[] calldata charges) private pure returns (bytes32 hash) {
        bytes32 typeHash = CHARGE_TYPEHASH;
        assembly ("memory-safe") {
            // Past the free pointer: the hashes of the elements, then one element being encoded.
            let hashes := mload(0x40)
            let hashesLength := shl(5, charges.length)
            let encoding := add(hashes, hashesLength)
            mstore(encoding, typeHash)

            let source := charges.offset
            for { let offset := 0 } lt(offset, hashesLength) { offset := add(offset, 0x20) } {
                calldatacopy(add(encoding, 0x20), source, 0x80)
                mstore(add(hashes, offset), keccak256(encoding, 0xa0))
                source := add(source, 0x80)
            }
            hash := keccak256(hashes, hashesLength)
        }
    }

    function _hashReceipt(UsageReceipt calldata receipt) private view returns (bytes32) {
        return _hashTypedDataV4(
            keccak256(
                abi.encode(
                    USAGE_RECEIPT_TYPEHASH,
                    receipt.platform,
                    receipt.account,
                    receipt.chargeId,
                    receipt.requestHash,
                    receipt.responseHash,
                    keccak256(bytes(receipt.model)),
                    receipt.inputTokens,
                    receipt.cachedInputTokens,
                    receipt.outputTokens,
                    receipt.reasoningTokens,
                    receipt.usageHash,
                    receipt.priceId,
                    receipt.amount,
                    receipt.issuedAt,
                    receipt.complete
                )
            )
        );
    }
}
