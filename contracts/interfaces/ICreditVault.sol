// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// @title ICreditVault
/// @notice USDC-backed credit, charged per metered LLM call. One vault holds one 6-decimal token for many
///         platforms; each platform keeps accounts for its users, agents and teams.
/// @dev Units. *Credit*: 1 USD = 10**12 units, so that one token of a cheap model has an exact price.
///      *Token*: base units of the 6-decimal token; 1 token base unit = 10**6 credit units.
///      Amounts are credit unless a name says `tokens`. Times are Unix seconds of block time.
///      There is no global owner, no proxy and no pause: nobody but the roles below, and the token's issuer over
///      the token, has any power.
///      What is signed is EIP-712, in the domain ("Waterfall CreditVault", "1", chain id, this vault); see
///      `eip712Domain()` (EIP-5267).
///
///      - *Platform owner*: sets spend policies, names and retires meters, withdraws the platform's earnings to
///        the payout address it sets, refunds from earnings, allocates credit of the accounts the platform holds,
///        rescues other tokens from the platform's inbox, and hands the platform over in two steps. It reaches a user's credit only by a meter, but it can add one
///        of its own and lift any policy at once: what it cannot get at is what an allowance that binds protects,
///        and matured exits.
///      - *Meter* (a plain key of the platform): signs receipts and batches of charges, and so can move credit of
///        the platform's accounts into the platform's own earnings, within policies and allowances. It also voids
///        charge ids, lets an account's owner take credit out at once, and says whose the money in the platform's
///        inbox is; but what it has booked it cannot let out before the exit delay, in which the platform's owner
///        can retire it and have another meter charge it back.
///        What moves money is checked when it is submitted: from a meter's retirement on, nothing it ever signed
///        is accepted. Receipts are judged by their `issuedAt`.
///      - *Account owner*: limits what can be charged by an allowance, takes unspent credit out after the
///        platform's exit delay, rescues other tokens from its deposit address. Accounts whose owner is
///        `address(0)` are held by the platform: its *current* owner is meant wherever "account owner" stands. An
///        account's owner cannot be changed.
///      - *Anybody*: registers platforms, deposits into any account, sweeps deposit addresses, and submits what
///        others have signed.
interface ICreditVault {
    // ───────────────────────────────────────────── Types ─────────────────────────────────────────────

    /// @notice Limits a platform puts on an account. A limit exists by its flag, not by being non-zero.
    struct Policy {
        /// @dev Largest single charge, credit, inclusive. Exists with LIMIT_PER_CHARGE.
        uint80 maxPerCharge;
        /// @dev Largest sum of charges in one window, credit, inclusive. Exists with LIMIT_PER_WINDOW.
        uint80 maxPerWindow;
        /// @dev Length of a window, seconds, at least MIN_WINDOW. Windows are fixed: number n covers
        ///      [n × windowSeconds, (n + 1) × windowSeconds). Exists with LIMIT_PER_WINDOW.
        uint32 windowSeconds;
        /// @dev First second at which nothing may be charged any more (exclusive). Exists with LIMIT_EXPIRY.
        uint40 expiresAt;
    }

    /// @notice Limit that an account's owner puts on all its charges, over and above any policy.
    struct Allowance {
        /// @dev Largest `spent` there may be, credit, inclusive; not what is left.
        uint96 cap;
        /// @dev Credit charged while an allowance was set, from the block of the first `AllowanceSet` on, before it
        ///      binds. It only grows: a removal keeps it, a refund does not lower it.
        uint96 spent;
        /// @dev First second at which nothing may be charged any more (exclusive).
        uint40 expiresAt;
    }

    /// @notice One debit of one account for one metered call.
    struct Charge {
        /// @dev The account, as `accountId` derives it.
        bytes32 account;
        /// @dev Unique within the platform for ever. Dense ids make cheap batches: 256 share a storage slot.
        uint64 id;
        /// @dev Credit. Zero is rejected.
        uint96 amount;
        /// @dev EIP-712 digest of the UsageReceipt of the call.
        bytes32 receiptHash;
    }

    /// @notice What a meter says of one call; its EIP-712 digest is the charge's `receiptHash`.
    struct UsageReceipt {
        uint128 platform;
        bytes32 account;
        uint64 chargeId;
        /// @dev keccak256 of the request body as the gateway received it.
        bytes32 requestHash;
        /// @dev keccak256 of the answer as the upstream sent it.
        bytes32 responseHash;
        /// @dev The name the caller used.
        string model;
        /// @dev All input tokens, cached ones included.
        uint64 inputTokens;
        uint64 cachedInputTokens;
        /// @dev All output tokens, reasoning included.
        uint64 outputTokens;
        uint64 reasoningTokens;
        /// @dev keccak256 of the provider's usage object as RFC 8785 JSON.
        bytes32 usageHash;
        /// @dev keccak256 of the rate card as RFC 8785 JSON.
        bytes32 priceId;
        /// @dev Credit.
        uint96 amount;
        /// @dev Unix seconds.
        uint40 issuedAt;
        /// @dev False when the answer was cut and the usage is therefore not the provider's last word.
        bool complete;
    }

    /// @notice Why a charge of a batch was left out. The order is part of the interface.
    /// @dev Where several apply, the first in this order is named, but `Balance` only if no other does.
    enum Rejection {
        ZeroAmount,
        Balance,
        MaxPerCharge,
        MaxPerWindow,
        PolicyExpired,
        AllowanceCap,
        AllowanceExpired
    }

    struct PlatformView {
        /// @dev address(0): there is no such platform.
        address owner;
        /// @dev Where earnings go.
        address payout;
        /// @dev Seconds between an exit's request and its maturity.
        uint32 exitDelay;
        /// @dev Credit the platform has earned and not withdrawn.
        uint96 earnings;
        /// @dev Who may accept the platform; address(0) if it is not offered to anybody.
        address pendingOwner;
    }

    struct Meter {
        /// @dev First second of validity, inclusive; 0 if never added.
        uint40 addedAt;
        /// @dev First second after validity, exclusive; 0 while valid.
        uint40 retiredAt;
        /// @dev Signatures claiming this second or later are void although signed before retirement; 0 if none.
        uint40 compromisedSince;
    }

    struct AccountView {
        /// @dev Credit that can be charged or taken out, a pending exit not included.
        uint96 balance;
        /// @dev Credit charged in window number `window`; of no meaning without LIMIT_PER_WINDOW.
        uint80 spentInWindow;
        /// @dev Block time / windowSeconds at the last charge or change of policy; of no meaning without a window.
        uint32 window;
        /// @dev Lines in the account's statement so far; each event with an `entry` is one, from 1 on. An
        ///      `ExitDrawn` is none: it belongs to the `Charged` after it.
        uint40 entries;
        /// @dev LIMIT_* bits.
        uint8 limits;
        Policy policy;
        /// @dev Credit in the pending exit.
        uint96 exitAmount;
        /// @dev From this second on the exit cannot be charged any more, and can be finalized (inclusive).
        uint40 exitMaturesAt;
        /// @dev As it binds now; a cap and an expiry of their types' maxima if there is none.
        Allowance allowance;
        /// @dev The cap that binds from `allowanceChangesAt` on, credit.
        uint96 nextCap;
        /// @dev The expiry that binds from `allowanceChangesAt` on.
        uint40 nextExpiresAt;
        /// @dev Second from which on, inclusive, the change under way binds; 0 if there is none.
        uint40 allowanceChangesAt;
        /// @dev Changes of the allowance so far: the nonce of the next.
        uint64 allowanceNonce;
        /// @dev Second from which on, inclusive, a meter can consent to an exit: the platform's exit delay after the
        ///      last `bookInbox` into the account; 0 if there never was one.
        uint40 consentsFrom;
    }

    /// @notice What the chain says of a receipt. It proves a charge only together with a `Charged` log of the
    ///         same account, id and amount whose `receiptHash` is `digest`: `used` alone proves no amount.
    struct ReceiptCheck {
        bytes32 digest;
        /// @dev The key that signed; address(0) if the signature is malformed.
        address signer;
        /// @dev The signer was a valid meter of the platform at `issuedAt`, and not compromised by then.
        bool validAtIssue;
        /// @dev The signer is a valid meter of the platform now.
        bool validNow;
        /// @dev The charge id is used.
        bool used;
    }

    // ──────────────────────────────────────────── Events ─────────────────────────────────────────────

    /// @notice There is a new platform.
    /// @param exitDelay seconds between an exit's request and its maturity
    /// @param salt the registrant's own, of which the id was derived
    event PlatformRegistered(
        uint128 indexed platform, address indexed owner, address payout, uint32 exitDelay, bytes32 salt
    );
    /// @notice The platform is offered to `pendingOwner`, who has to accept.
    event PlatformTransferStarted(
        uint128 indexed platform, address indexed owner, address indexed pendingOwner
    );
    /// @notice The platform, with every account it holds, is `newOwner`'s.
    event PlatformTransferred(
        uint128 indexed platform, address indexed previousOwner, address indexed newOwner
    );
    /// @notice Earnings go to `payout` from now on.
    event PayoutSet(uint128 indexed platform, address indexed payout);
    /// @notice From this block's timestamp on, inclusive, the meter may sign for the platform.
    event MeterAdded(uint128 indexed platform, address indexed meter);
    /// @notice From this block's timestamp on, inclusive, nothing the meter signs counts.
    /// @param compromisedSince second since when, inclusive, its signatures are void; 0 if the key was not compromised
    event MeterRetired(uint128 indexed platform, address indexed meter, uint40 compromisedSince);

    /// @notice Credit arrived.
    /// @param payer where the tokens came from
    /// @param label which of `owner`'s accounts
    /// @param amount credit, measured from the vault's own token balance
    /// @param entry line number in the account's statement
    event Deposited(
        uint128 indexed platform,
        bytes32 indexed account,
        address indexed payer,
        address owner,
        bytes32 label,
        uint96 amount,
        uint40 entry
    );

    /// @notice The `Deposited` of the same transaction is what the payer's EIP-3009 authorization `nonce`, sent to
    ///         the platform's inbox, was credited as. Once for each payer and nonce.
    event InboxBooked(uint128 indexed platform, address indexed payer, bytes32 indexed nonce);
    /// @notice What the vault does not keep went from a deposit address or an inbox to `to`.
    /// @param source the deposit address or inbox
    /// @param token address(0): the chain's own coin
    /// @param amount base units of `token`
    event Rescued(
        uint128 indexed platform, address indexed source, address indexed token, address to, uint256 amount
    );

    /// @notice Other limits bind from now on.
    /// @param limits LIMIT_* bits of the limits that exist from now on
    event PolicySet(uint128 indexed platform, bytes32 indexed account, uint8 limits, Policy policy);

    /// @notice The account's owner changed its allowance. What loosens binds at once, what tightens from
    ///         `effectiveAt` on: until then the looser of the old and the new cap, and of the two expiries.
    /// @param owner the account's
    /// @param label which of `owner`'s accounts
    /// @param cap credit; with `expiresAt`, of their types' maxima: the allowance is removed
    /// @param effectiveAt second from which on, inclusive, all of it binds; this block's if nothing tightens
    /// @param nonce changes of this account's allowance before this one
    event AllowanceSet(
        uint128 indexed platform,
        bytes32 indexed account,
        address owner,
        bytes32 label,
        uint96 cap,
        uint40 expiresAt,
        uint40 effectiveAt,
        uint64 nonce
    );

    /// @notice A charge was made, once for its id.
    /// @param amount credit
    /// @param entry line number in the account's statement
    /// @param receiptHash EIP-712 digest of the call's UsageReceipt
    event Charged(
        bytes32 indexed account, uint64 indexed id, uint96 amount, uint40 entry, bytes32 receiptHash
    );
    /// @notice The balance being short of a charge, `amount` went back to it from the pending exit. The charge's
    ///         own `Charged` follows, with its whole amount. An exit drawn to zero is over.
    event ExitDrawn(bytes32 indexed account, uint64 indexed id, uint96 amount);
    /// @notice The charge was left out and its id left unused; the rest of the batch is settled. Not for good: whoever
    ///         submits the batch again before its deadline may have the charge made, or this emitted again.
    event ChargeRejected(
        uint128 indexed platform, bytes32 indexed account, uint64 indexed id, Rejection reason
    );

    /// @notice The id is used up without a charge, and can never be charged.
    event ChargeVoided(uint128 indexed platform, uint64 indexed id);
    /// @notice The platform gave credit back from its earnings, once for the charge id.
    /// @param owner the account's
    /// @param label which of `owner`'s accounts
    /// @param amount credit
    /// @param entry line number in the account's statement
    event Refunded(
        uint128 indexed platform,
        bytes32 indexed account,
        uint64 indexed id,
        address owner,
        bytes32 label,
        uint96 amount,
        uint40 entry
    );
    /// @notice The platform moved credit from an account it holds to another of its accounts.
    /// @param source the account it came from
    /// @param account the account it went to
    /// @param owner the latter's
    /// @param label which of `owner`'s accounts
    /// @param amount credit
    /// @param sourceEntry line number in the statement of `source`
    /// @param entry line number in the statement of `account`
    event Allocated(
        uint128 indexed platform,
        bytes32 indexed source,
        bytes32 indexed account,
        address owner,
        bytes32 label,
        uint96 amount,
        uint40 sourceEntry,
        uint40 entry
    );

    /// @notice Credit is on its way out; charges may still draw on it before `maturesAt`.
    /// @param amount credit moved from the balance by this request
    /// @param total credit in the pending exit afterwards
    /// @param maturesAt second from which on, inclusive, the exit can be finalized and not charged
    /// @param entry line number in the account's statement
    event ExitRequested(
        uint128 indexed platform,
        bytes32 indexed account,
        uint96 amount,
        uint96 total,
        uint40 maturesAt,
        uint40 entry
    );
    /// @notice The whole exit went back to the balance.
    /// @param amount credit
    /// @param entry line number in the account's statement
    event ExitCancelled(uint128 indexed platform, bytes32 indexed account, uint96 amount, uint40 entry);
    /// @notice The exit was paid out.
    /// @param tokens token base units sent to `to`
    /// @param remainder credit below one token base unit, returned to the balance
    /// @param entry line number in the account's statement
    event ExitFinalized(
        uint128 indexed platform,
        bytes32 indexed account,
        address indexed to,
        uint256 tokens,
        uint96 remainder,
        uint40 entry
    );
    /// @notice Credit was paid out at once, with a meter's consent.
    /// @param tokens token base units sent to `to`
    /// @param nonce the consent's
    /// @param entry line number in the account's statement
    event ExitedWithConsent(
        uint128 indexed platform,
        bytes32 indexed account,
        address indexed to,
        uint256 tokens,
        bytes32 nonce,
        uint40 entry
    );
    /// @notice The platform took earnings out.
    /// @param tokens token base units sent to `payout`
    event EarningsWithdrawn(uint128 indexed platform, address indexed payout, uint256 tokens);

    // ──────────────────────────────────────────── Errors ─────────────────────────────────────────────

    // Those of a comparison carry both of its sides; amounts are credit unless named `tokens`.

    /// @notice An owner, meter or payer is zero. (A recipient that is: BadRecipient.)
    error ZeroAddress();
    /// @notice Nothing would move.
    error ZeroAmount();
    /// @notice So many tokens, asked for or held by the vault afterwards, are more credit than fits uint96.
    error AmountTooLarge(uint256 tokens, uint256 max);
    /// @notice The vault's token must be a contract with 6 decimals.
    error NotATokenWithSixDecimals(address token);
    /// @notice The caller registered with this salt before.
    error PlatformExists(uint128 platform);
    /// @notice Nobody has registered this platform.
    error UnknownPlatform(uint128 platform);
    /// @notice Seconds; `min` and `max` are inclusive.
    error ExitDelayOutOfRange(uint256 exitDelay, uint256 min, uint256 max);
    /// @notice Only the platform's owner may do this.
    error NotPlatformOwner(uint128 platform, address caller);
    /// @notice The platform has been offered to somebody else, or to nobody.
    error NotPendingOwner(uint128 platform, address caller);
    /// @notice Only the account's owner may do this; of a platform-held account, the platform's owner.
    error NotAccountOwner(bytes32 account, address caller);
    /// @notice The key is, or was, a meter of the platform.
    error MeterExists(uint128 platform, address meter);
    /// @notice The key is not a meter of the platform, or not any more.
    error NotAMeter(uint128 platform, address meter);
    /// @notice Seconds; `min` and `max` are inclusive.
    error CompromisedSinceOutOfRange(uint256 compromisedSince, uint256 min, uint256 max);
    /// @notice Bits that are no LIMIT_*.
    error UnknownLimits(uint8 limits);
    /// @notice A policy field is set without the flag that makes it a limit.
    error LimitWithoutFlag(uint8 flag);
    /// @notice Seconds; `min` is inclusive.
    error WindowTooShort(uint256 windowSeconds, uint256 min);
    /// @notice The signature is not `owner`'s: neither its key's nor, by ERC-1271, its contract's.
    error NotSignedByOwner(bytes32 account, address owner);
    /// @notice The account's allowance was changed `expected` times; a signature is good for one such number.
    error WrongAllowanceNonce(uint256 nonce, uint256 expected);
    /// @notice A batch has at least one charge, or one id.
    error EmptyBatch();
    /// @notice So many charges, or ids, of at most `max`.
    error BatchTooLarge(uint256 length, uint256 max);
    /// @notice The last second of what was signed was before this block.
    error DeadlinePassed(uint256 deadline, uint256 timestamp);
    /// @notice The last second of what a meter signs may be `max` at most: block time and MAX_DEADLINE, or MAX_CONSENT.
    error DeadlineTooFar(uint256 deadline, uint256 max);
    /// @notice The charge id is neither charged nor voided.
    error IdNotUsed(uint128 platform, uint64 id);
    /// @notice The charge id was refunded before.
    error AlreadyRefunded(uint128 platform, uint64 id);
    /// @notice The payer's authorization was credited before.
    error AlreadyBooked(uint128 platform, address payer, bytes32 nonce);
    /// @notice The platform's inbox holds less.
    error ExceedsInbox(uint256 tokens, uint256 available);
    /// @notice Credit cannot be allocated from an account to itself.
    error SameAccount(bytes32 account);
    /// @notice Either the vault's own token, which is credited by `sweep` or the inbox, or no contract.
    error NotRescuable(address token);
    /// @notice The account's balance is less, a pending exit not included.
    error ExceedsBalance(uint256 amount, uint256 available);
    /// @notice The platform's earnings not yet withdrawn are less.
    error ExceedsEarnings(uint256 amount, uint256 available);
    /// @notice A consent with this nonce was used before.
    error ConsentUsed(uint128 platform, bytes32 nonce);
    /// @notice A meter booked money into the account so lately that it cannot consent to an exit before `from`.
    error ConsentTooEarly(uint256 from, uint256 timestamp);
    /// @notice The account has no exit under way.
    error NoExit(bytes32 account);
    /// @notice The exit can be finalized from second `maturesAt` on.
    error ExitNotMature(uint256 maturesAt, uint256 timestamp);
    /// @notice Zero, the vault and the token could never send tokens on.
    error BadRecipient(address to);

    // ─────────────────────────────────────────── Platforms ───────────────────────────────────────────

    /// @notice Registers the caller as owner of a new platform.
    /// @param salt tells one registrant's platforms apart
    /// @param payout where earnings go; none of: zero, the vault, the token
    /// @param meter first key that may sign receipts and batches; not zero
    /// @param exitDelay seconds, fixed for life: MIN_EXIT_DELAY to MAX_EXIT_DELAY, inclusive
    /// @return platform derived from caller and salt, so the number can never be someone else's
    function registerPlatform(bytes32 salt, address payout, address meter, uint32 exitDelay)
        external
        returns (uint128 platform);

    /// @notice Offers the platform to `newOwner`, in the place of any offer before. Platform owner only. The owner
    ///         takes an offer back by one to itself, and is then the pending owner.
    /// @param newOwner not zero
    function transferPlatform(uint128 platform, address newOwner) external;

    /// @notice Takes over a platform offered to the caller, with its earnings and every account it holds. Meters,
    ///         payout and policies stay as they are: retire meters that are not yours, and set the payout.
    function acceptPlatform(uint128 platform) external;

    /// @notice Sets where earnings go. Platform owner only.
    /// @param payout none of: zero, the vault, the token
    function setPayout(uint128 platform, address payout) external;

    /// @notice Adds a meter. Platform owner only. A key that was ever a meter of the platform is refused.
    function addMeter(uint128 platform, address meter) external;

    /// @notice Retires a meter at once, for ever; the last one too. Platform owner only. Receipts it signed before
    ///         stay verifiable, and settled charges stand.
    /// @param compromisedSince 0, or a second from the meter's addition to now (inclusive) since when its
    ///        signatures are void
    function retireMeter(uint128 platform, address meter, uint40 compromisedSince) external;

    /// @notice Sets which limits bind an account of the platform. Platform owner only. Takes effect at once.
    /// @dev What was spent in the current window stays counted; when the window's length changes, it counts
    ///      in full against the new current window. Removing the window limit forgets it.
    /// @param limits LIMIT_* bits of the limits that exist; 0 removes all. With a flagged limit of 0, every charge
    ///        is refused.
    /// @param policy values; those without their flag must be zero
    function setPolicy(uint128 platform, bytes32 account, uint8 limits, Policy calldata policy) external;

    // ─────────────────────────────────────────── Money in ────────────────────────────────────────────
    // Whoever pays decides platform and account; a submitter never does.
    // Every way credits what the vault's token balance grew by.

    /// @notice Pulls `tokens` from the caller into an account.
    /// @param platform a registered one
    /// @param owner the user's wallet, or address(0) for an account the platform holds
    /// @param label which of the owner's accounts
    /// @return account derived from platform, owner and label
    function deposit(uint128 platform, address owner, bytes32 label, uint256 tokens)
        external
        returns (bytes32 account);

    /// @notice Deposits with an EIP-3009 `receiveWithAuthorization` that `payer` signed; anyone may submit.
    /// @dev The authorization's nonce is `depositNonce(platform, owner, label, salt)`, which binds it to one
    ///      account; its `to` is the vault.
    /// @param platform a registered one
    /// @param owner the user's wallet, or address(0) for an account the platform holds
    /// @param label which of the owner's accounts
    /// @param payer who signed, and whose tokens move
    /// @param tokens token base units
    /// @param validAfter second after which the authorization is valid, exclusive
    /// @param validBefore second before which it is valid, exclusive
    /// @param salt tells the payer's authorizations for one account apart
    /// @param signature what the token takes: 65 bytes r ‖ s ‖ v, or an ERC-1271 signature
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
    ) external returns (bytes32 account);

    /// @notice Moves everything that was sent to `depositAddress(platform, owner, label)` into that account.
    ///         Anyone may call.
    function sweep(uint128 platform, address owner, bytes32 label) external returns (bytes32 account);

    /// @notice Moves a payment to a platform's inbox and on into the payer's account, in one transaction. For
    ///         clients that sign EIP-3009 `transferWithAuthorization` to `inbox(platform)` with a nonce of their
    ///         own, as those of x402 do; anyone may submit.
    /// @dev Credited is what this authorization brought: what was in the inbox before stays there.
    /// @param platform a registered one
    /// @param payer who signed; the credit goes to its account, label 0
    /// @param tokens token base units
    /// @param validAfter second after which the authorization is valid, exclusive
    /// @param validBefore second before which it is valid, exclusive
    /// @param nonce the authorization's
    /// @param signature what the token takes: 65 bytes r ‖ s ‖ v, or an ERC-1271 signature
    function depositFromInbox(
        uint128 platform,
        address payer,
        uint256 tokens,
        uint256 validAfter,
        uint256 validBefore,
        bytes32 nonce,
        bytes calldata signature
    ) external returns (bytes32 account);

    /// @notice Credits money that reached the inbox otherwise, as when somebody gave the payer's authorization to
    ///         the token directly, to the payer's account, label 0. Anyone may submit.
    /// @dev That the money is this payer's rests on the meter's word alone, given once the token's logs are final:
    ///      the token's `authorizationState` is no proof, as a cancelled authorization has it too.
    ///      It can be charged at once, but no meter can consent to its exit before the platform's exit delay: were
    ///      the key stolen, its thief could book it to himself.
    /// @param platform a registered one
    /// @param payer not zero
    /// @param nonce the authorization's; credited once for each payer and platform, here or by `depositFromInbox`
    /// @param tokens token base units, of those in the inbox
    /// @param deadline last second at which it may be booked (inclusive), at most MAX_DEADLINE ahead
    /// @param meterSignature 65 bytes r ‖ s ‖ v, low s, over
    ///        `InboxBooking(uint128 platform,address payer,bytes32 nonce,uint256 tokens,uint40 deadline)`
    function bookInbox(
        uint128 platform,
        address payer,
        bytes32 nonce,
        uint256 tokens,
        uint40 deadline,
        bytes calldata meterSignature
    ) external returns (bytes32 account);

    /// @notice Sends what was sent by mistake to an account's deposit address on. Account owner only.
    /// @param wrongToken any but the vault's; address(0): the chain's own coin, which an address takes until its
    ///        first `sweep` or rescue puts code there
    /// @param to none of: zero, the vault, its token
    function rescue(uint128 platform, address owner, bytes32 label, address wrongToken, address to) external;

    /// @notice Sends what was sent by mistake to the platform's inbox on, as `rescue` does. Platform owner only.
    function rescueFromInbox(uint128 platform, address wrongToken, address to) external;

    // ─────────────────────────────────────────── Allowance ───────────────────────────────────────────

    /// @notice Limits what may be charged to an account. Account owner only; no policy touches it.
    /// @dev What loosens binds at once. What tightens binds after the platform's exit delay, so that what the
    ///      platform has delivered by now can still be charged: the first allowance, a lower cap, an earlier
    ///      expiry. A change replaces the one under way, and its delay begins anew.
    ///      Both maxima limit nothing: they remove the allowance, at once. Refunds, allocations and exits are no
    ///      charges: neither allowance nor policy applies to them.
    /// @param cap largest sum of all charges there may be, credit, inclusive, counted from the first allowance
    ///        on; 0 refuses all
    /// @param expiresAt first second at which nothing may be charged any more (exclusive)
    function setAllowance(uint128 platform, address owner, bytes32 label, uint96 cap, uint40 expiresAt)
        external;

    /// @notice `setAllowance` by the account owner's signature; anyone may submit.
    /// @param nonce `allowanceNonce` of the account: any change voids all signatures made before it
    /// @param deadline last second at which it may be submitted (inclusive); as far ahead as the owner likes
    /// @param signature the owner's (of a platform-held account, its platform's owner's at submission), 65 bytes r ‖ s ‖ v with low s, or else what the owner accepts by ERC-1271,
    ///        over
    ///        `AllowanceChange(uint128 platform,bytes32 account,uint96 cap,uint40 expiresAt,uint64 nonce,uint40 deadline)`
    function setAllowanceBySignature(
        uint128 platform,
        address owner,
        bytes32 label,
        uint96 cap,
        uint40 expiresAt,
        uint64 nonce,
        uint40 deadline,
        bytes calldata signature
    ) external;

    // ────────────────────────────────────────── Settlement ───────────────────────────────────────────

    /// @notice Settles a batch of charges that a meter of the platform has signed. Anyone may submit.
    /// @dev An id already used is skipped without an event; a charge that its account cannot bear emits
    ///      `ChargeRejected` and leaves its id unused. Draws on the balance first, then on an exit that has
    ///      not matured. Makes no external call and never reverts on the state of an account.
    /// @param platform whose accounts are charged, and whose earnings grow
    /// @param charges 1 to MAX_CHARGES
    /// @param deadline last second at which the batch may be settled (inclusive), at most MAX_DEADLINE ahead
    /// @param meterSignature 65 bytes r ‖ s ‖ v over `hashSettlement(platform, charges, deadline)`, low s;
    ///        anything else reverts with an error of OpenZeppelin's ECDSA
    function settle(
        uint128 platform,
        Charge[] calldata charges,
        uint40 deadline,
        bytes calldata meterSignature
    ) external;

    /// @notice Uses ids up so that they can never be charged: how a rejected charge is written off. A meter signs,
    ///         anyone may submit. Ids already used are skipped without an event.
    /// @param ids 1 to MAX_CHARGES
    /// @param deadline last second at which they may be voided (inclusive), at most MAX_DEADLINE ahead
    /// @param meterSignature 65 bytes r ‖ s ‖ v, low s, over
    ///        `Voiding(uint128 platform,uint64[] ids,uint40 deadline)`
    function voidCharges(
        uint128 platform,
        uint64[] calldata ids,
        uint40 deadline,
        bytes calldata meterSignature
    ) external;

    /// @notice Gives credit back from the platform's earnings. Platform owner only, once for a charge id.
    /// @dev The vault keeps no amounts and accounts of charges: that it is what the id charged, to whom, is for
    ///      the logs to show. What was spent in a window or of an allowance stays spent.
    /// @param id a used one, charged or voided; even a part of it can be refunded once only
    /// @param owner of the account that gets it
    /// @param label which of the owner's accounts
    /// @param amount credit
    function refund(uint128 platform, uint64 id, address owner, bytes32 label, uint96 amount)
        external
        returns (bytes32 account);

    /// @notice Moves credit from an account the platform holds to any other of its accounts, as when a user without
    ///         a wallet comes to have one. Platform owner only. A pending exit stays where it is.
    /// @param sourceLabel label of the platform-held account it comes from
    /// @param owner of the account that gets it
    /// @param label which of the owner's accounts
    /// @param amount credit
    function allocate(uint128 platform, bytes32 sourceLabel, address owner, bytes32 label, uint96 amount)
        external
        returns (bytes32 account);

    // ─────────────────────────────────────────── Money out ───────────────────────────────────────────

    /// @notice Starts taking credit out, or adds to it: the timer restarts for the whole, matured or not.
    ///         Account owner only.
    /// @param tokens token base units
    function requestExit(uint128 platform, address owner, bytes32 label, uint256 tokens) external;

    /// @notice Returns the whole pending or matured exit to the balance. Account owner only.
    function cancelExit(uint128 platform, address owner, bytes32 label) external;

    /// @notice Sends a matured exit to `to`. Account owner only. Nothing can stop it but the token itself. Credit
    ///         below one token base unit goes back to the balance.
    /// @param to none of: zero, the vault, the token
    function finalizeExit(uint128 platform, address owner, bytes32 label, address to) external;

    /// @notice Sends credit of the balance to `to` at once, as a meter has consented. Account owner only. A pending
    ///         exit stays as it is. Not within the platform's exit delay after a `bookInbox` into the account.
    /// @param tokens token base units
    /// @param to none of: zero, the vault, the token
    /// @param nonce the consent's; used once on the platform
    /// @param deadline last second of the consent (inclusive), at most MAX_CONSENT ahead
    /// @param meterSignature 65 bytes r ‖ s ‖ v, low s, over
    ///        `ExitConsent(uint128 platform,bytes32 account,uint256 tokens,address to,bytes32 nonce,uint40 deadline)`
    function exitWithConsent(
        uint128 platform,
        address owner,
        bytes32 label,
        uint256 tokens,
        address to,
        bytes32 nonce,
        uint40 deadline,
        bytes calldata meterSignature
    ) external;

    /// @notice Sends earnings to the payout address. Platform owner only.
    /// @param tokens token base units
    function withdrawEarnings(uint128 platform, uint256 tokens) external;

    // ─────────────────────────────────────────── Reading ─────────────────────────────────────────────

    /// @notice Checks a receipt: digest, signer, the signer's validity, and whether its charge id is used.
    /// @param signature 65 bytes r ‖ s ‖ v, low s
    function verifyReceipt(UsageReceipt calldata receipt, bytes calldata signature)
        external
        view
        returns (ReceiptCheck memory);

    /// @notice EIP-712 digest that a meter signs for a batch:
    ///         `Settlement(uint128 platform,Charge[] charges,uint40 deadline)` followed by
    ///         `Charge(bytes32 account,uint64 id,uint96 amount,bytes32 receiptHash)`.
    function hashSettlement(uint128 platform, Charge[] calldata charges, uint40 deadline)
        external
        view
        returns (bytes32);

    /// @notice A platform as it stands; all zero if there is none.
    function platformOf(uint128 platform) external view returns (PlatformView memory);
    /// @notice Since when, and until when, a key may sign for a platform; all zero if it never could.
    function meterOf(uint128 platform, address meter) external view returns (Meter memory);
    /// @notice An account as it stands. If nothing ever happened to it, all is zero but `allowance`, which limits
    ///         nothing.
    /// @param account as `accountId` derives it
    function accountOf(uint128 platform, bytes32 account) external view returns (AccountView memory);

    /// @notice Largest charge of the account that `settle` would make in this block, credit: what balance and
    ///         pending exit, policy and allowance leave. 0: none.
    function available(uint128 platform, bytes32 account) external view returns (uint256);

    /// @notice What the policy's window limit leaves now, and until when.
    /// @return credit what may still be charged in the current window; the largest uint256 without such a limit
    /// @return endsAt first second of the next window; 0 without such a limit
    function remainingInWindow(uint128 platform, bytes32 account)
        external
        view
        returns (uint256 credit, uint256 endsAt);

    /// @notice Whether the charge id is used: it was charged, once, or voided.
    function isSettled(uint128 platform, uint64 id) external view returns (bool);

    /// @notice `uint128(uint256(keccak256(abi.encode(registrant, salt))))`.
    function platformId(address registrant, bytes32 salt) external pure returns (uint128);

    /// @notice `keccak256(abi.encode(platform, owner, label))`.
    function accountId(uint128 platform, address owner, bytes32 label) external pure returns (bytes32);

    /// @notice EIP-3009 nonce of a deposit: `keccak256(abi.encode(platform, owner, label, salt))`.
    function depositNonce(uint128 platform, address owner, bytes32 label, bytes32 salt)
        external
        pure
        returns (bytes32);

    /// @notice CREATE2 address of one account: tokens sent there are credited by `sweep`.
    function depositAddress(uint128 platform, address owner, bytes32 label) external view returns (address);

    /// @notice CREATE2 address of the platform's inbox: `payTo` of payments that `depositFromInbox` credits.
    function inbox(uint128 platform) external view returns (address);

    /// @notice The 6-decimal token that backs all credit.
    function token() external view returns (address);

    /// @notice Flag of `Policy.maxPerCharge`: 1.
    function LIMIT_PER_CHARGE() external view returns (uint8);
    /// @notice Flag of `Policy.maxPerWindow` and `windowSeconds`: 2.
    function LIMIT_PER_WINDOW() external view returns (uint8);
    /// @notice Flag of `Policy.expiresAt`: 4.
    function LIMIT_EXPIRY() external view returns (uint8);
    /// @notice 60 seconds.
    function MIN_WINDOW() external view returns (uint32);
    /// @notice 1 hour.
    function MIN_EXIT_DELAY() external view returns (uint32);
    /// @notice 7 days.
    function MAX_EXIT_DELAY() external view returns (uint32);
    /// @notice 1 hour.
    function MAX_DEADLINE() external view returns (uint32);
    /// @notice 10 minutes.
    function MAX_CONSENT() external view returns (uint32);
    /// @notice 1,000.
    function MAX_CHARGES() external view returns (uint256);
}
