// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { AccountState } from "../../contracts/libraries/AccountState.sol";

import { Harness } from "./Harness.sol";

/// @dev The packed word against the compiler's own packing of the same fields.
contract AccountStateTest is Harness {
    struct Fields {
        uint96 balance;
        uint80 spentInWindow;
        uint32 window;
        uint40 entries;
        uint8 flags;
    }

    Fields private _fields;

    function testFuzz_getters_anyWord_readTheFields(uint256 word) external {
        _assertHolds(AccountState.wrap(word), _unpack(word));
    }

    function testFuzz_setBalance_anyWord_changesNothingElse(uint256 word, uint96 value) external {
        Fields memory fields = _unpack(word);
        fields.balance = value;
        _assertHolds(AccountState.wrap(word).setBalance(value), fields);
    }

    function testFuzz_setSpentInWindow_anyWord_changesNothingElse(uint256 word, uint80 spent, uint32 number)
        external
    {
        Fields memory fields = _unpack(word);
        (fields.spentInWindow, fields.window) = (spent, number);
        _assertHolds(AccountState.wrap(word).setSpentInWindow(spent, number), fields);
    }

    function testFuzz_setFlags_anyWord_changesNothingElse(uint256 word, uint8 value) external {
        Fields memory fields = _unpack(word);
        fields.flags = value;
        _assertHolds(AccountState.wrap(word).setFlags(value), fields);
    }

    function testFuzz_addEntry_anyWord_countsOne(uint256 word) external {
        Fields memory fields = _unpack(word);
        if (fields.entries != type(uint40).max) fields.entries++;
        _assertHolds(AccountState.wrap(word).addEntry(), fields);
    }

    function testFuzz_addEntry_atItsMaximum_staysThere(uint256 word) external {
        word |= uint256(type(uint40).max) << 208;
        _assertHolds(AccountState.wrap(word).addEntry(), _unpack(word));
    }

    function testFuzz_has_anyWord_isAnyOfTheBits(uint256 word, uint8 flag) external {
        assertTrue(AccountState.wrap(word).has(flag) == (_unpack(word).flags & flag != 0), "has");
    }

    function _unpack(uint256 word) private returns (Fields memory) {
        assembly {
            sstore(_fields.slot, word)
        }
        return _fields;
    }

    function _assertHolds(AccountState state, Fields memory fields) private {
        _fields = fields;
        uint256 word;
        assembly {
            word := sload(_fields.slot)
        }
        assertEq(AccountState.unwrap(state), word, "word");
        assertEq(state.balance(), fields.balance, "balance");
        assertEq(state.spentInWindow(), fields.spentInWindow, "spentInWindow");
        assertEq(state.window(), fields.window, "window");
        assertEq(state.entries(), fields.entries, "entries");
        assertEq(state.flags(), fields.flags, "flags");
    }
}
