// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// @dev First storage word of an account: everything a charge without limits reads and writes. From the
///      lowest bit:
///
///      balance uint96 | spentInWindow uint80 | window uint32 | entries uint40 | flags uint8
///
///      A value type rather than a struct: the word is loaded once, changed on the stack and stored once.
///      The parameters' types are the fields' widths, so no setter can reach into a neighbour.
type AccountState is uint256;

using AccountStateLibrary for AccountState global;

library AccountStateLibrary {
    uint256 private constant WINDOW_OFFSET = 176;
    uint256 private constant SPENT_OFFSET = 96;
    uint256 private constant ENTRIES_OFFSET = 208;
    uint256 private constant FLAGS_OFFSET = 248;

    uint256 private constant BALANCE_MASK = type(uint96).max;
    uint256 private constant SPENT_AND_WINDOW_MASK = uint256(type(uint112).max) << SPENT_OFFSET;
    uint256 private constant FLAGS_MASK = uint256(type(uint8).max) << FLAGS_OFFSET;

    // Getters cut their field out of the word.
    // forge-lint: disable-start(unsafe-typecast)

    function balance(AccountState self) internal pure returns (uint96) {
        return uint96(AccountState.unwrap(self));
    }

    function spentInWindow(AccountState self) internal pure returns (uint80) {
        return uint80(AccountState.unwrap(self) >> SPENT_OFFSET);
    }

    function window(AccountState self) internal pure returns (uint32) {
        return uint32(AccountState.unwrap(self) >> WINDOW_OFFSET);
    }

    function entries(AccountState self) internal pure returns (uint40) {
        return uint40(AccountState.unwrap(self) >> ENTRIES_OFFSET);
    }

    function flags(AccountState self) internal pure returns (uint8) {
        return uint8(AccountState.unwrap(self) >> FLAGS_OFFSET);
    }

    // forge-lint: disable-end(unsafe-typecast)

    /// @dev Whether any bit of `flag` is set.
    function has(AccountState self, uint8 flag) internal pure returns (bool) {
        return self.flags() & flag != 0;
    }

    function setBalance(AccountState self, uint96 value) internal pure returns (AccountState) {
        return _replace(self, BALANCE_MASK, value);
    }

    /// @dev What was spent means nothing without its window: the two are only ever set together.
    function setSpentInWindow(AccountState self, uint80 spent, uint32 number)
        internal
        pure
        returns (AccountState)
    {
        return _replace(
            self, SPENT_AND_WINDOW_MASK, uint256(spent) << SPENT_OFFSET | uint256(number) << WINDOW_OFFSET
        );
    }

    function setFlags(AccountState self, uint8 value) internal pure returns (AccountState) {
        return _replace(self, FLAGS_MASK, uint256(value) << FLAGS_OFFSET);
    }

    /// @dev Counts one more line of the statement. Stays at its maximum, as a carry would change the flags.
    function addEntry(AccountState self) internal pure returns (AccountState) {
        if (self.entries() == type(uint40).max) return self;
        unchecked {
            return AccountState.wrap(AccountState.unwrap(self) + (1 << ENTRIES_OFFSET));
        }
    }

    function _replace(AccountState self, uint256 mask, uint256 bits) private pure returns (AccountState) {
        return AccountState.wrap(AccountState.unwrap(self) & ~mask | bits);
    }
}
