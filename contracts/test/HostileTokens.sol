// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// @dev What the ERC-20s below have in common: balances, allowances, open mint. Test use only.
abstract contract BareToken {
    mapping(address => uint256) internal _balances;
    mapping(address => mapping(address => uint256)) public allowance;
    uint256 public totalSupply;

    event Transfer(address indexed from, address indexed to, uint256 value);

    function mint(address to, uint256 amount) external virtual {
        _balances[to] += amount;
        totalSupply += amount;
        emit Transfer(address(0), to, amount);
    }

    function approve(address spender, uint256 amount) external returns (bool) {
        allowance[msg.sender][spender] = amount;
        return true;
    }

    function _move(address from, address to, uint256 amount) internal virtual {
        _balances[from] -= amount;
        _balances[to] += amount;
        emit Transfer(from, to, amount);
    }

    function _spend(address from, uint256 amount) internal {
        allowance[from][msg.sender] -= amount;
    }
}

/// @dev Standard in everything but the part that a child replaces.
abstract contract PlainToken is BareToken {
    function balanceOf(address user) public view virtual returns (uint256) {
        return _balances[user];
    }

    function transfer(address to, uint256 amount) external virtual returns (bool) {
        _move(msg.sender, to, amount);
        return true;
    }

    function transferFrom(address from, address to, uint256 amount) external virtual returns (bool) {
        _spend(from, amount);
        _move(from, to, amount);
        return true;
    }
}

/// @notice `transfer` and `transferFrom` return nothing at all, as some old tokens do.
contract NoReturnToken is BareToken {
    function balanceOf(address user) external view returns (uint256) {
        return _balances[user];
    }

    function transfer(address to, uint256 amount) external {
        _move(msg.sender, to, amount);
    }

    function transferFrom(address from, address to, uint256 amount) external {
        _spend(from, amount);
        _move(from, to, amount);
    }
}

/// @notice Says false instead of reverting, and moves nothing.
contract FalseToken is PlainToken {
    function transfer(address, uint256) external pure override returns (bool) {
        return false;
    }

    function transferFrom(address, address, uint256) external pure override returns (bool) {
        return false;
    }
}

/// @notice Every transfer reverts, without a reason.
contract RevertingToken is PlainToken {
    function transfer(address, uint256) external pure override returns (bool) {
        revert();
    }

    function transferFrom(address, address, uint256) external pure override returns (bool) {
        revert();
    }
}

/// @notice One percent of what is sent never arrives.
contract FeeToken is PlainToken {
    function _move(address from, address to, uint256 amount) internal override {
        uint256 fee = amount / 100;
        super._move(from, to, amount - fee);
        _balances[from] -= fee;
        totalSupply -= fee;
        emit Transfer(from, address(0), fee);
    }
}

/// @notice `balanceOf` returns as many bytes as it is told, all of them 0xff.
contract OddBalanceToken is BareToken {
    uint256 private immutable _size;

    constructor(uint256 size) {
        _size = size;
    }

    function balanceOf(address) external view {
        uint256 size = _size;
        assembly ("memory-safe") {
            let data := mload(0x40)
            mstore(data, not(0))
            mstore(add(data, 0x20), not(0))
            return(data, size)
        }
    }
}

/// @notice `balanceOf` reverts.
contract RevertingBalanceToken is BareToken {
    error NoBalanceForYou(address user);

    function balanceOf(address user) external pure returns (uint256) {
        revert NoBalanceForYou(user);
    }
}

/// @notice Its Transfer event has no indexed fields: one topic, everything in the data.
contract UnindexedToken {
    mapping(address => uint256) public balanceOf;

    event Transfer(address from, address to, uint256 value);

    function mint(address to, uint256 amount) external {
        balanceOf[to] += amount;
        emit Transfer(address(0), to, amount);
    }

    function transfer(address to, uint256 amount) external returns (bool) {
        balanceOf[msg.sender] -= amount;
        balanceOf[to] += amount;
        emit Transfer(msg.sender, to, amount);
        return true;
    }
}

/// @notice Emits a perfectly shaped Transfer and moves nothing: only its address tells it from the real token.
contract LyingToken is PlainToken {
    function transfer(address to, uint256 amount) external override returns (bool) {
        emit Transfer(msg.sender, to, amount);
        return true;
    }
}
