// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// @dev An allowance as ICreditVault describes it: two pairs and the second at which the later one is alone.
struct AllowanceModel {
    /// @dev What bound when the last change was made.
    uint256 boundCap;
    uint256 boundExpiry;
    /// @dev The last change.
    uint256 cap;
    uint256 expiry;
    uint256 effectiveAt;
    uint256 spent;
    uint256 nonce;
}

using { start, change, charge, exists, capNow, expiryNow, changesAt } for AllowanceModel global;

function start(AllowanceModel storage self) {
    (self.cap, self.expiry) = (type(uint96).max, type(uint40).max);
}

function change(AllowanceModel storage self, uint256 cap, uint256 expiry, uint256 exitDelay) {
    (self.boundCap, self.boundExpiry) = (self.capNow(), self.expiryNow());
    bool tightens = cap < self.boundCap || expiry < self.boundExpiry;
    (self.cap, self.expiry) = (cap, expiry);
    self.effectiveAt = tightens ? block.timestamp + exitDelay : block.timestamp;
    self.nonce++;
}

function charge(AllowanceModel storage self, uint256 amount) {
    if (self.exists()) self.spent += amount;
}

function exists(AllowanceModel memory self) pure returns (bool) {
    return self.cap != type(uint96).max || self.expiry != type(uint40).max;
}

function capNow(AllowanceModel memory self) view returns (uint256) {
    if (block.timestamp >= self.effectiveAt) return self.cap;
    return self.cap > self.boundCap ? self.cap : self.boundCap;
}

function expiryNow(AllowanceModel memory self) view returns (uint256) {
    if (block.timestamp >= self.effectiveAt) return self.expiry;
    return self.expiry > self.boundExpiry ? self.expiry : self.boundExpiry;
}

function changesAt(AllowanceModel memory self) view returns (uint256) {
    return block.timestamp < self.effectiveAt ? self.effectiveAt : 0;
}
