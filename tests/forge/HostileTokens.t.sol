// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { IERC20Errors } from "@openzeppelin/contracts/interfaces/draft-IERC6093.sol";
import { SafeERC20 } from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import { ReentrancyGuardTransient } from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";

import { ICreditVault } from "../../contracts/interfaces/ICreditVault.sol";
import { FeeToken } from "../../contracts/mocks/FeeToken.sol";
import { PlainToken } from "../../contracts/mocks/PlainToken.sol";
import { ReentrantToken } from "../../contracts/mocks/ReentrantToken.sol";
import { TestUSDC } from "../../contracts/mocks/TestUSDC.sol";

import { FalseToken, LyingToken, MuteToken, TakingToken, TurningToken } from "./HostileTokens.sol";
import { VaultFixture } from "./VaultFixture.sol";

/// @dev Tokens that do not behave. A call reverts as a whole or credits what arrived; nobody else's credit moves;
///      what needs no token goes on.
contract HostileTokensTest is VaultFixture {
    uint256 private constant TOKENS = 100e6;
    uint256 private constant CREDIT = 100e12;
    address private constant BYSTANDER = address(0x3002);
    address private constant ELSEWHERE = address(0x4001);

    PlainToken private _token;
    bytes32 private _account;
    bytes32 private _bystanders;
    uint256 private _nonce;

    /// @dev The books of the bystander are what they were.
    modifier leavesOthersAlone() {
        bytes32 before = keccak256(abi.encode(_vault.accountOf(_platform, _bystanders)));
        _;
        bytes32 then = keccak256(abi.encode(_vault.accountOf(_platform, _bystanders)));
        assertTrue(then == before, "nobody else's credit moves");
    }

    // ──────────────────────────────────────────── FeeToken ───────────────────────────────────────────

    function test_feeToken_everyWayIn_creditsWhatArrived() external {
        _open(address(new FeeToken()));
        _token = PlainToken(_vault.token());
        _fund(USER, TOKENS);
        vm.prank(USER);
        _account = _vault.deposit(_platform, USER, "", TOKENS);
        assertEq(_balance(_account), CREDIT * 9 / 10, "deposit");

        address source = _vault.depositAddress(_platform, USER, "");
        _token.mint(source, TOKENS);
        _vault.sweep(_platform, USER, "");
        assertEq(_balance(_account), CREDIT * 18 / 10, "sweep");

        _token.mint(_vault.inbox(_platform), TOKENS);
        _bookInbox(TOKENS / 2);
        assertEq(_balance(_account), CREDIT * 18 / 10 + CREDIT * 45 / 100, "inbox");
        assertEq(_token.balanceOf(address(_vault)) * 1e6, _balance(_account), "backed");
    }

    function test_feeToken_everyWayOut_takesWhatWasAskedFor() external {
        _open(address(new FeeToken()));
        _token = PlainToken(_vault.token());
        _fund(USER, TOKENS);
        vm.prank(USER);
        _account = _vault.deposit(_platform, USER, "", TOKENS);
        _charge(_account, CREDIT / 10);
        _vault.withdrawEarnings(_platform, TOKENS / 10);
        _leaveWith(TOKENS / 10, ELSEWHERE);
        assertEq(_token.balanceOf(PAYOUT), TOKENS * 9 / 100, "the fee is the payout's");
        assertEq(_token.balanceOf(ELSEWHERE), TOKENS * 9 / 100, "the fee is the leaver's");
        assertEq(_token.balanceOf(address(_vault)) * 1e6, _balance(_account), "backed");
    }

    // ─────────────────────────────────────────── FalseToken ──────────────────────────────────────────

    function test_falseToken_everyWayIn_revertsAsAWhole() external {
        _start(new FalseToken());
        _prepareWaysIn();
        _turn(true);
        bytes memory refused =
            abi.encodeWithSelector(SafeERC20.SafeERC20FailedOperation.selector, address(_token));
        _assertWaysInRevert(refused);
        // An authorization has no answer that could be false: that nothing came, the vault sees by itself.
        _assertAuthorizationsRevert(abi.encodeWithSelector(ICreditVault.ZeroAmount.selector), refused);
        _turn(false);
        _assertWaysInWork();
    }

    function test_falseToken_everyWayOut_revertsAsAWhole() external {
        _start(new FalseToken());
        _prepareWaysOut();
        _turn(true);
        _assertWaysOutRevert(
            abi.encodeWithSelector(SafeERC20.SafeERC20FailedOperation.selector, address(_token))
        );
        _turn(false);
        _assertWaysOutWork(ELSEWHERE);
    }

    // ──────────────────────────────────────────── MuteToken ──────────────────────────────────────────

    function test_muteToken_everyWay_works() external {
        _start(new MuteToken());
        _prepareWaysIn();
        _assertWaysInWork();
        _prepareWaysOut();
        _assertWaysOutWork(ELSEWHERE);
    }

    // ─────────────────────────────────────────── TakingToken ─────────────────────────────────────────

    function test_takingToken_everyWayIn_revertsAsAWhole() external {
        _start(new TakingToken());
        _prepareWaysIn();
        _turn(true);
        bytes memory nothingCame = abi.encodeWithSelector(ICreditVault.ZeroAmount.selector);
        _assertWaysInRevert(nothingCame);
        _assertAuthorizationsRevert(nothingCame);
        _turn(false);
        _assertWaysInWork();
    }

    // ─────────────────────────────────────────── LyingToken ──────────────────────────────────────────

    function test_lyingToken_withoutABalance_takesNothingInAndAllLeave() external {
        LyingToken token = new LyingToken();
        _start(token);
        _prepareWaysIn();
        token.fallSilent(address(_vault));
        _assertWaysInRevert(abi.encodeWithSelector(LyingToken.Silent.selector));
        _assertAuthorizationsRevert(abi.encodeWithSelector(LyingToken.Silent.selector));
        token.beHonest();
        _prepareWaysOut();
        token.fallSilent(address(_vault));
        _assertBooksGoOn();
        _assertWaysOutWork(ELSEWHERE);
    }

    function test_lyingToken_withAStandingBalance_creditsNothing() external {
        LyingToken token = new LyingToken();
        _start(token);
        _prepareWaysIn();
        token.lie(address(_vault), _list(1));
        bytes memory nothingCame = abi.encodeWithSelector(ICreditVault.ZeroAmount.selector);
        _assertWaysInRevert(nothingCame);
        _assertAuthorizationsRevert(nothingCame);
    }

    function test_lyingToken_withAFallingBalance_creditsNothing() external {
        LyingToken token = new LyingToken();
        _start(token);
        _prepareWaysIn();
        token.lie(address(_vault), _list(2, 1));
        bytes memory underflow = abi.encodeWithSignature("Panic(uint256)", 0x11);
        _assertWaysInRevert(underflow);
        _assertAuthorizationsRevert(underflow);
    }

    function test_lyingToken_withAHugeBalance_creditsNothing() external {
        LyingToken token = new LyingToken();
        _start(token);
        _prepareWaysIn();
        uint256[2] memory huge = [MAX_TOKENS + 1, type(uint256).max];
        for (uint256 i = 0; i < huge.length; ++i) {
            token.lie(address(_vault), _list(0, huge[i]));
            bytes memory tooLarge =
                abi.encodeWithSelector(ICreditVault.AmountTooLarge.selector, huge[i], MAX_TOKENS);
            _assertWaysInRevert(tooLarge);
            _assertAuthorizationsRevert(tooLarge);
        }
    }

    /// @dev Credit out of nothing, for which no books can answer; but that of others is as it was.
    function test_lyingToken_withAGrowingBalance_leavesOthersAlone() external {
        LyingToken token = new LyingToken();
        _start(token);
        _fund(USER, 1);
        bytes32 before = keccak256(abi.encode(_vault.accountOf(_platform, _bystanders)));
        token.lie(address(_vault), _list(0, MAX_TOKENS - TOKENS));
        vm.prank(USER);
        _vault.deposit(_platform, USER, "", 1);
        assertEq(_balance(_account), MAX_TOKENS * 1e6, "out of nothing");
        assertTrue(_charge(_account, MAX_TOKENS * 1e6), "charged");
        bytes32 then = keccak256(abi.encode(_vault.accountOf(_platform, _bystanders)));
        assertTrue(then == before, "nobody else's credit moves");
    }

    function test_lyingToken_ofTheInbox_isHeldToItsOwnWord() external {
        LyingToken token = new LyingToken();
        _start(token);
        address inbox = _vault.inbox(_platform);
        token.mint(inbox, TOKENS);
        token.lie(inbox, _list(TOKENS + 1));
        bytes memory call = _booking(TOKENS + 1);
        vm.expectRevert(
            abi.encodeWithSelector(IERC20Errors.ERC20InsufficientBalance.selector, inbox, TOKENS, TOKENS + 1)
        );
        _forward(call);
        token.lie(inbox, _list(TOKENS - 1));
        call = _booking(TOKENS);
        vm.expectRevert(abi.encodeWithSelector(ICreditVault.ExceedsInbox.selector, TOKENS, TOKENS - 1));
        _forward(call);
    }

    // ───────────────────────────────────────── ReentrantToken ────────────────────────────────────────

    function test_reentrantToken_finalizeExitWithinDeposit_revertsAsAWhole() external {
        ReentrantToken token = new ReentrantToken();
        _start(token);
        _prepareWaysOut();
        _fund(USER, TOKENS);
        token.arm(address(_vault), abi.encodeCall(_vault.finalizeExit, (_platform, USER, "", ELSEWHERE)));
        bytes32 before = _everything();
        vm.prank(USER);
        vm.expectRevert(
            abi.encodeWithSelector(ReentrancyGuardTransient.ReentrancyGuardReentrantCall.selector)
        );
        _vault.deposit(_platform, USER, "", TOKENS);
        assertTrue(_everything() == before, "as it was");
    }

    function test_reentrantToken_setPayoutWithinWithdrawal_isNotItsOwner() external {
        ReentrantToken token = new ReentrantToken();
        _start(token);
        _prepareWaysOut();
        token.arm(address(_vault), abi.encodeCall(_vault.setPayout, (_platform, ELSEWHERE)));
        vm.expectRevert(
            abi.encodeWithSelector(ICreditVault.NotPlatformOwner.selector, _platform, address(token))
        );
        _vault.withdrawEarnings(_platform, 1);
    }

    // ─────────────────────────────────────────── TestUSDC ────────────────────────────────────────────

    function test_usdc_blacklistsTheUser_itLeavesToAnotherAddress() external {
        TestUSDC token = _startUsdc();
        _prepareWaysOut();
        token.blacklist(USER);
        bytes memory blacklisted = _reason("Blacklistable: account is blacklisted");
        vm.prank(USER);
        vm.expectRevert(blacklisted);
        _vault.finalizeExit(_platform, USER, "", USER);
        vm.prank(BYSTANDER);
        vm.expectRevert(blacklisted);
        _vault.finalizeExit(_platform, BYSTANDER, "", USER);
        _assertBooksGoOn();
        _assertWaysOutWork(ELSEWHERE);
        vm.prank(BYSTANDER);
        _vault.finalizeExit(_platform, BYSTANDER, "", BYSTANDER);
        assertEq(token.balanceOf(BYSTANDER), TOKENS / 2, "others leave as ever");
    }

    function test_usdc_blacklistsThePayout_anotherIsSet() external {
        TestUSDC token = _startUsdc();
        _prepareWaysOut();
        token.blacklist(PAYOUT);
        uint256 earnings = _vault.platformOf(_platform).earnings;
        vm.expectRevert(_reason("Blacklistable: account is blacklisted"));
        _vault.withdrawEarnings(_platform, 1);
        assertEq(_vault.platformOf(_platform).earnings, earnings, "earnings");
        _assertBooksGoOn();

        _vault.setPayout(_platform, ELSEWHERE);
        _vault.withdrawEarnings(_platform, 1);
        assertEq(token.balanceOf(ELSEWHERE), 1, "paid to another address");
        vm.prank(USER);
        _vault.finalizeExit(_platform, USER, "", USER);
        assertEq(token.balanceOf(USER), TOKENS / 2, "users leave as ever");
    }

    function test_usdc_blacklistsTheVault_booksGoOnAndAllIsPaidAfterwards() external {
        TestUSDC token = _startUsdc();
        _prepareWaysOut();
        _prepareWaysIn();
        token.blacklist(address(_vault));
        bytes memory blacklisted = _reason("Blacklistable: account is blacklisted");
        _assertWaysInRevert(blacklisted);
        _assertWaysOutRevert(blacklisted);
        _assertBooksGoOn();
        token.unBlacklist(address(_vault));
        _assertWaysOutWork(ELSEWHERE);
    }

    function test_usdc_blacklistsAnInboxAndADepositAddress_theOtherWaysInWork() external {
        TestUSDC token = _startUsdc();
        _prepareWaysIn();
        token.blacklist(_vault.depositAddress(_platform, USER, ""));
        token.blacklist(_vault.inbox(_platform));
        bytes memory blacklisted = _reason("Blacklistable: account is blacklisted");
        vm.expectRevert(blacklisted);
        _vault.sweep(_platform, USER, "");
        bytes memory call = _booking(1);
        vm.expectRevert(blacklisted);
        _forward(call);

        vm.prank(USER);
        _vault.deposit(_platform, USER, "", TOKENS);
        address source = _vault.depositAddress(_platform, BYSTANDER, "");
        token.mint(source, 1);
        _vault.sweep(_platform, BYSTANDER, "");
        assertEq(_balance(_account), 2 * CREDIT, "deposit");
        assertEq(_balance(_bystanders), CREDIT + 1e6, "another's sweep");
    }

    function test_usdc_paused_booksGoOnAndAllIsPaidAfterwards() external {
        TestUSDC token = _startUsdc();
        _prepareWaysOut();
        _prepareWaysIn();
        token.pause();
        _assertWaysInRevert(_reason("Pausable: paused"));
        _assertWaysOutRevert(_reason("Pausable: paused"));
        _assertBooksGoOn();
        token.unpause();
        _assertWaysOutWork(ELSEWHERE);
    }

    // ─────────────────────────────────────────── PlainToken ──────────────────────────────────────────

    function test_plainToken_asMuchAsFits_isCreditedAndNothingMore() external {
        _open(address(new PlainToken(6)));
        _token = PlainToken(_vault.token());
        _fund(USER, MAX_TOKENS + 1);
        vm.prank(USER);
        _account = _vault.deposit(_platform, USER, "", MAX_TOKENS);
        assertEq(_balance(_account), MAX_TOKENS * 1e6, "credit");
        vm.prank(USER);
        vm.expectRevert(
            abi.encodeWithSelector(ICreditVault.AmountTooLarge.selector, MAX_TOKENS + 1, MAX_TOKENS)
        );
        _vault.deposit(_platform, USER, "", 1);

        // All of it once around: charged, refunded, on its way out and back, charged from the exit, earned.
        uint96 all = uint96(_balance(_account));
        assertTrue(_charge(_account, all), "charged");
        _vault.refund(_platform, _lastId, address(0), "", all);
        _vault.allocate(_platform, "", USER, "", all);
        vm.prank(USER);
        _vault.requestExit(_platform, USER, "", MAX_TOKENS);
        assertTrue(_charge(_account, all), "drawn");
        assertEq(_vault.platformOf(_platform).earnings, all, "earnings");
        _vault.withdrawEarnings(_platform, MAX_TOKENS);
        assertEq(_token.balanceOf(PAYOUT), MAX_TOKENS, "paid");
    }

    /// @dev Whoever gives the vault more than it can count stops deposits, at that price, and nothing else.
    function test_plainToken_hugeDonation_stopsNothingButDeposits() external {
        _start(new PlainToken(6));
        _prepareWaysOut();
        uint256 donation = type(uint256).max - _token.totalSupply() - TOKENS;
        _token.mint(address(_vault), donation);
        _fund(USER, TOKENS);
        uint256 held = _token.balanceOf(address(_vault)) + TOKENS;
        vm.prank(USER);
        vm.expectRevert(abi.encodeWithSelector(ICreditVault.AmountTooLarge.selector, held, MAX_TOKENS));
        _vault.deposit(_platform, USER, "", TOKENS);
        _assertBooksGoOn();
        _assertWaysOutWork(ELSEWHERE);
    }

    // ──────────────────────────────────────────── Internal ───────────────────────────────────────────

    /// @dev A user and a bystander have deposited.
    function _start(PlainToken token) private {
        _open(address(token));
        _token = token;
        _account = _depositFor(USER);
        _bystanders = _depositFor(BYSTANDER);
    }

    function _startUsdc() private returns (TestUSDC token) {
        token = new TestUSDC(address(this));
        _start(PlainToken(address(token)));
    }

    function _depositFor(address owner) private returns (bytes32 account) {
        _fund(owner, TOKENS);
        vm.prank(owner);
        return _vault.deposit(_platform, owner, "", TOKENS);
    }

    function _fund(address owner, uint256 tokens) private {
        _token.mint(owner, tokens);
        vm.prank(owner);
        _token.approve(address(_vault), tokens);
    }

    function _turn(bool hostile) private {
        TurningToken(address(_token)).turn(hostile);
    }

    /// @dev Tokens to deposit, to sweep, and in the inbox.
    function _prepareWaysIn() private {
        _fund(USER, 3 * TOKENS);
        _token.mint(_vault.depositAddress(_platform, USER, ""), TOKENS);
        _token.mint(_vault.inbox(_platform), TOKENS);
    }

    /// @dev Something earned, and half of each deposit in a matured exit.
    function _prepareWaysOut() private {
        assertTrue(_charge(_account, CREDIT / 10), "charged");
        vm.prank(USER);
        _vault.requestExit(_platform, USER, "", TOKENS / 2);
        vm.prank(BYSTANDER);
        _vault.requestExit(_platform, BYSTANDER, "", TOKENS / 2);
        vm.warp(block.timestamp + EXIT_DELAY);
    }

    function _assertWaysInRevert(bytes memory reason) private leavesOthersAlone {
        bytes memory booking = _booking(TOKENS);
        bytes32 before = _everything();
        vm.prank(USER);
        vm.expectRevert(reason);
        _vault.deposit(_platform, USER, "", TOKENS);
        vm.expectRevert(reason);
        _vault.sweep(_platform, USER, "");
        vm.expectRevert(reason);
        _forward(booking);
        assertTrue(_everything() == before, "as it was");
    }

    function _assertAuthorizationsRevert(bytes memory reason) private {
        _assertAuthorizationsRevert(reason, reason);
    }

    function _assertAuthorizationsRevert(bytes memory reason, bytes memory reasonOfInbox)
        private
        leavesOthersAlone
    {
        bytes32 before = _everything();
        vm.expectRevert(reason);
        _vault.depositWithAuthorization(_platform, USER, "", USER, TOKENS, 0, 1, "salt", "");
        vm.expectRevert(reasonOfInbox);
        _vault.depositFromInbox(_platform, USER, TOKENS, 0, 1, "nonce", "");
        assertTrue(_everything() == before, "as it was");
    }

    function _assertWaysInWork() private leavesOthersAlone {
        uint256 before = _balance(_account);
        vm.prank(USER);
        _vault.deposit(_platform, USER, "", TOKENS);
        _vault.sweep(_platform, USER, "");
        _bookInbox(TOKENS);
        _vault.depositWithAuthorization(_platform, USER, "", USER, TOKENS, 0, 1, "salt", "");
        _vault.depositFromInbox(_platform, USER, TOKENS, 0, 1, "nonce", "");
        assertEq(_balance(_account), before + 5 * CREDIT, "credited");
    }

    function _assertWaysOutRevert(bytes memory reason) private leavesOthersAlone {
        bytes32 before = _everything();
        bytes memory consented = _consented(1, ELSEWHERE);
        vm.prank(USER);
        vm.expectRevert(reason);
        _vault.finalizeExit(_platform, USER, "", ELSEWHERE);
        vm.prank(USER);
        vm.expectRevert(reason);
        _forward(consented);
        vm.expectRevert(reason);
        _vault.withdrawEarnings(_platform, 1);
        assertTrue(_everything() == before, "as it was");
    }

    /// @dev The exit, a consent and earnings.
    function _assertWaysOutWork(address to) private leavesOthersAlone {
        uint256 before = _token.balanceOf(to);
        vm.prank(USER);
        _vault.finalizeExit(_platform, USER, "", to);
        _leaveWith(1, to);
        assertEq(_token.balanceOf(to) - before, TOKENS / 2 + 1, "paid out");
        before = _token.balanceOf(PAYOUT);
        _vault.withdrawEarnings(_platform, 1);
        assertEq(_token.balanceOf(PAYOUT) - before, 1, "earnings");
    }

    /// @dev All that needs no token: charges, refunds, allocation, exits but their end, policies, allowances.
    function _assertBooksGoOn() private leavesOthersAlone {
        uint256 before = _balance(_account);
        assertTrue(_charge(_account, 1e6), "charged");
        _vault.refund(_platform, _lastId, address(0), "books", 1e6);
        _vault.requestExit(_platform, address(0), "books", 1);
        _vault.cancelExit(_platform, address(0), "books");
        _vault.allocate(_platform, "books", USER, "", 1e6);
        _vault.setPolicy(_platform, _account, 0, ICreditVault.Policy(0, 0, 0, 0));
        vm.prank(USER);
        _vault.setAllowance(_platform, USER, "", type(uint96).max - 1, type(uint40).max);
        assertEq(_balance(_account), before, "charged and given back");
    }

    function _leaveWith(uint256 tokens, address to) private {
        bytes memory call = _consented(tokens, to);
        vm.prank(USER);
        _forward(call);
    }

    function _bookInbox(uint256 tokens) private {
        _forward(_booking(tokens));
    }

    function _forward(bytes memory data) private {
        (bool success,) = address(_vault).call(data);
        assertTrue(success, "a call of the vault");
    }

    function _booking(uint256 tokens) private returns (bytes memory) {
        bytes32 nonce = bytes32(++_nonce);
        uint40 deadline = uint40(block.timestamp);
        bytes32 structHash = inboxBookingHash(_platform, USER, nonce, tokens, deadline);
        bytes memory signature = sign(METER_KEY, digestOf(address(_vault), structHash));
        return abi.encodeCall(_vault.bookInbox, (_platform, USER, nonce, tokens, deadline, signature));
    }

    function _consented(uint256 tokens, address to) private returns (bytes memory) {
        bytes32 nonce = bytes32(++_nonce);
        uint40 deadline = uint40(block.timestamp);
        bytes32 structHash = exitConsentHash(_platform, _account, tokens, to, nonce, deadline);
        bytes memory signature = sign(METER_KEY, digestOf(address(_vault), structHash));
        return abi.encodeCall(
            _vault.exitWithConsent, (_platform, USER, "", tokens, to, nonce, deadline, signature)
        );
    }

    /// @dev But what a token says of the vault: where its tokens would have come from, or gone to, is here.
    function _everything() private view returns (bytes32) {
        address[5] memory places =
            [USER, PAYOUT, ELSEWHERE, _vault.inbox(_platform), _vault.depositAddress(_platform, USER, "")];
        uint256[5] memory tokens;
        for (uint256 i = 0; i < places.length; ++i) {
            tokens[i] = _token.balanceOf(places[i]);
        }
        return keccak256(
            abi.encode(
                tokens,
                _vault.platformOf(_platform),
                _vault.accountOf(_platform, _account),
                _vault.accountOf(_platform, _bystanders)
            )
        );
    }

    function _list(uint256 only) private pure returns (uint256[] memory list) {
        list = new uint256[](1);
        list[0] = only;
    }

    function _list(uint256 first, uint256 then) private pure returns (uint256[] memory list) {
        list = new uint256[](2);
        (list[0], list[1]) = (first, then);
    }

    function _reason(string memory text) private pure returns (bytes memory) {
        return abi.encodeWithSignature("Error(string)", text);
    }
}
