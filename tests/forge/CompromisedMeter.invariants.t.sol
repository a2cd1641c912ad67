// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { CreditVault } from "../../contracts/CreditVault.sol";
import { ICreditVault } from "../../contracts/interfaces/ICreditVault.sol";
import { TestUSDC } from "../../contracts/mocks/TestUSDC.sol";

import { Harness } from "./Harness.sol";
import { MeterThief } from "./MeterThief.sol";

// Small numbers fit their types.
// forge-lint: disable-start(unsafe-typecast)

/// @dev Whoever holds a meter's key can charge what policies and allowances leave, for the platform's own gain,
///      and say whose the money in the inbox is, but not take that out within the exit delay. It reaches nothing else.
contract CompromisedMeterInvariants is Harness {
    uint256 private constant CREDIT_PER_TOKEN = 1e6;
    uint256 private constant METER_KEY = 0xA11;
    /// @dev People, each with a deposit: who has no limit, a policy, an allowance, a policy that expires, an exit
    ///      under way, a matured exit; and the thief.
    uint256 private constant POLICY = 1;
    uint256 private constant ALLOWANCE = 2;
    uint256 private constant EXPIRY = 3;
    uint256 private constant EXITING = 4;
    uint256 private constant EXITED = 5;
    uint256 private constant THIEF = 6;

    uint256 private constant DEPOSIT = 1000e12;
    uint256 private constant IN_INBOX = 50e12;
    uint256 private constant EXIT = 400e12;
    uint80 private constant PER_CHARGE = 3e12;
    uint80 private constant PER_WINDOW = 7e12;
    uint32 private constant WINDOW = 1 hours;
    uint32 private constant LIFE = 8 hours;
    uint96 private constant CAP = 40e12;
    uint32 private constant EXIT_DELAY = 12 hours;

    CreditVault private _vault;
    TestUSDC private _token;
    MeterThief private _thief;
    uint128 private _platform;
    uint128 private _neighbour;
    uint256 private _start;
    bytes32[] private _accounts;
    bytes32 private _neighbours;

    function setUp() external {
        vm.warp(30 days);
        _token = new TestUSDC(address(this));
        _vault = new CreditVault(address(_token));
        _platform = _vault.registerPlatform("", address(0x2000), vm.addr(METER_KEY), EXIT_DELAY);
        _neighbour = _vault.registerPlatform("next", address(0x2000), vm.addr(0xB22), EXIT_DELAY);
        _token.mint(address(this), 10_000e6);
        _token.approve(address(_vault), 10_000e6);
        address[] memory people = new address[](7);
        for (uint256 i = 0; i < people.length; ++i) {
            people[i] = address(uint160(0x3000 + i));
            _accounts.push(_vault.deposit(_platform, people[i], "", DEPOSIT / CREDIT_PER_TOKEN));
        }
        _neighbours = _vault.deposit(_neighbour, people[0], "", DEPOSIT / CREDIT_PER_TOKEN);
        _token.mint(_vault.inbox(_platform), IN_INBOX / CREDIT_PER_TOKEN);
        _token.mint(_vault.inbox(_neighbour), IN_INBOX / CREDIT_PER_TOKEN);

        vm.prank(people[EXITED]);
        _vault.requestExit(_platform, people[EXITED], "", EXIT / CREDIT_PER_TOKEN);
        vm.prank(people[ALLOWANCE]);
        _vault.setAllowance(_platform, people[ALLOWANCE], "", CAP, type(uint40).max);
        vm.warp(block.timestamp + EXIT_DELAY);
        _start = 30 days + EXIT_DELAY;
        vm.prank(people[EXITING]);
        _vault.requestExit(_platform, people[EXITING], "", EXIT / CREDIT_PER_TOKEN);
        ICreditVault.Policy memory policy = ICreditVault.Policy(PER_CHARGE, PER_WINDOW, WINDOW, 0);
        _vault.setPolicy(_platform, _accounts[POLICY], 3, policy);
        policy = ICreditVault.Policy(0, 0, 0, uint40(_start + LIFE));
        _vault.setPolicy(_platform, _accounts[EXPIRY], 4, policy);

        _thief = new MeterThief(_vault, _platform, _neighbour, METER_KEY, people[THIEF], people, _accounts);
    }

    function targetContracts() external view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(_thief);
    }

    /// @dev All in one, as forge would otherwise play the same calls again for each.
    function invariant_thief_reachesNoFurtherThanTheMeter() external view {
        _assertLosses();
        _assertExits();
        _assertNeighbour();
    }

    function test_thief_manyCalls_reachesEachLimit() external {
        for (uint256 i = 0; i < 400; ++i) {
            uint256 seed = uint256(keccak256(abi.encode(i)));
            _thief.charge(seed);
            if (i % 8 == 0) _thief.takeOut(seed);
            if (i % 16 == 1) _thief.bookInbox(seed, seed >> 8);
            if (i % 16 == 2) _thief.voidCharges(seed);
            if (i % 16 == 3) _thief.wait(seed);
            if (i % 4 == 0) _thief.reachFurther(seed);
        }
        _assertLosses();
        _assertExits();
        _assertNeighbour();
        assertLe(CAP - 1e12, _lost(ALLOWANCE), "the allowance is as good as used up");
        assertLe(PER_WINDOW, _lost(POLICY), "more than a window's limit is charged in several");
        assertLe(DEPOSIT * 9 / 10, _lost(0), "without a limit, hardly anything is left");
        assertLe(1, _thief.booked(THIEF), "booked for itself");
        assertLe(1, _thief.taken(), "taken");
    }

    /// @dev Σ lost = earnings. With a policy: lost ≤ windows × maxPerWindow, a charge ≤ maxPerCharge, the last
    ///      one < expiry. With an allowance: lost ≤ cap. With a matured exit: lost ≤ the rest.
    function _assertLosses() private view {
        uint256 lost;
        for (uint256 i = 0; i < _accounts.length; ++i) {
            lost += _lost(i);
        }
        assertEq(_vault.platformOf(_platform).earnings, lost, "what is lost the platform has earned");

        uint256 windows = block.timestamp / WINDOW - _start / WINDOW + 1;
        assertLe(_lost(POLICY), windows * PER_WINDOW, "lost under a policy");
        assertLe(_thief.largestCharge(POLICY), PER_CHARGE, "charged at once");
        assertLe(_lost(ALLOWANCE), CAP, "lost under an allowance");
        assertLe(_thief.lastChargeAt(EXPIRY), _start + LIFE - 1, "charged before the expiry");
        assertLe(_lost(EXITED), DEPOSIT + _thief.booked(EXITED) - EXIT, "lost beside an exit");
    }

    /// @dev Matured exit = requested; exit under way ≤ requested. Tokens gone = what the thief took of its own, at
    ///      most deposit + booked for it.
    function _assertExits() private view {
        assertEq(_vault.accountOf(_platform, _accounts[EXITED]).exitAmount, EXIT, "matured exit");
        assertLe(_vault.accountOf(_platform, _accounts[EXITING]).exitAmount, EXIT, "exit under way");
        uint256 held = _token.balanceOf(address(_vault)) + _token.balanceOf(_vault.inbox(_platform));
        uint256 came = (_accounts.length + 1) * DEPOSIT + IN_INBOX;
        assertEq(held * CREDIT_PER_TOKEN, came - _thief.taken(), "tokens held");
        assertEq(_token.balanceOf(_thief.self()) * CREDIT_PER_TOKEN, _thief.taken(), "tokens gone");
        assertLe(_thief.taken(), DEPOSIT + _thief.booked(THIEF), "only its own");
    }

    /// @dev The neighbour: earnings = 0; account, ids and inbox as they were.
    function _assertNeighbour() private view {
        assertEq(_vault.platformOf(_neighbour).earnings, 0, "neighbour's earnings");
        ICreditVault.AccountView memory state = _vault.accountOf(_neighbour, _neighbours);
        assertEq(state.balance, DEPOSIT, "neighbour's account");
        assertEq(state.entries, 1, "neighbour's statement");
        uint256 held = _token.balanceOf(_vault.inbox(_neighbour));
        assertEq(held * CREDIT_PER_TOKEN, IN_INBOX, "neighbour's inbox");
        assertTrue(!_vault.isSettled(_neighbour, 1), "neighbour's ids");
    }

    /// @dev Credit that came and is neither there nor taken out by who it belongs to.
    function _lost(uint256 person) private view returns (uint256) {
        ICreditVault.AccountView memory state = _vault.accountOf(_platform, _accounts[person]);
        uint256 there = uint256(state.balance) + state.exitAmount;
        if (person == THIEF) there += _thief.taken();
        return DEPOSIT + _thief.booked(person) - there;
    }
}
