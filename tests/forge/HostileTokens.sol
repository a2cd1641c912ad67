// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import { PlainToken } from "../../contracts/mocks/PlainToken.sol";

/// @dev Plain until it turns.
abstract contract TurningToken is PlainToken(6) {
    bool internal _hostile;

    function turn(bool hostile) external {
        _hostile = hostile;
    }

    /// @dev Any signature will do: it is the vault that is under test.
    function receiveWithAuthorization(
        address from,
        address to,
        uint256 value,
        uint256,
        uint256,
        bytes32,
        bytes calldata
    ) external {
        _move(from, to, value);
    }

    function transferWithAuthorization(
        address from,
        address to,
        uint256 value,
        uint256,
        uint256,
        bytes32,
        bytes calldata
    ) external {
        _move(from, to, value);
    }

    function _move(address from, address to, uint256 value) internal virtual {
        _transfer(from, to, value);
    }
}

/// @dev Answers false where others revert, and moves nothing.
contract FalseToken is TurningToken {
    function transfer(address to, uint256 value) public override returns (bool) {
        return !_hostile && super.transfer(to, value);
    }

    function transferFrom(address from, address to, uint256 value) public override returns (bool) {
        return !_hostile && super.transferFrom(from, to, value);
    }

    function _move(address from, address to, uint256 value) internal override {
        if (!_hostile) _transfer(from, to, value);
    }
}

/// @dev Answers nothing at all, as USDT does.
contract MuteToken is TurningToken {
    function transfer(address to, uint256 value) public override returns (bool) {
        super.transfer(to, value);
        assembly {
            return(0, 0)
        }
    }

    function transferFrom(address from, address to, uint256 value) public override returns (bool) {
        super.transferFrom(from, to, value);
        assembly {
            return(0, 0)
        }
    }
}

/// @dev Takes from who pays, gives to nobody, and says all is well.
contract TakingToken is TurningToken {
    function _update(address from, address to, uint256 value) internal override {
        super._update(from, _hostile ? address(0) : to, value);
    }
}

/// @dev Tells of one address a balance that is made up, or none.
contract LyingToken is TurningToken {
    address private _of;
    uint256[] private _told;

    error Silent();

    /// @dev The next balance is told from the next transfer from or to the address on, the last one for ever.
    function lie(address of_, uint256[] calldata balances) external {
        (_of, _told) = (of_, balances);
    }

    function fallSilent(address of_) external {
        _of = of_;
        delete _told;
    }

    function beHonest() external {
        _of = address(0);
    }

    function balanceOf(address account) public view override returns (uint256) {
        if (account != _of) return super.balanceOf(account);
        if (_told.length == 0) revert Silent();
        return _told[0];
    }

    function _update(address from, address to, uint256 value) internal override {
        super._update(from, to, value);
        if ((from != _of && to != _of) || _told.length < 2) return;
        for (uint256 i = 1; i < _told.length; ++i) {
            _told[i - 1] = _told[i];
        }
        _told.pop();
    }
}
