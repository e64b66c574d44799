// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Wallet1271} from "./Wallet1271.sol";

/// @notice Deploys `Wallet1271` at an address that is known before (CREATE2). Test use only.
contract WalletFactory {
    function create(address signer, bytes32 salt) external returns (address) {
        return address(new Wallet1271{salt: salt}(signer));
    }

    function addressOf(address signer, bytes32 salt) external view returns (address) {
        bytes32 code = keccak256(abi.encodePacked(type(Wallet1271).creationCode, abi.encode(signer)));
        return address(uint160(uint256(keccak256(abi.encodePacked(bytes1(0xff), address(this), salt, code)))));
    }
}

/// @notice A contract at a wallet's place that answers in one of the ways that are no yes. Test use only.
contract OddWallet {
    uint256 public immutable kind;

    constructor(uint256 kind_) {
        kind = kind_;
    }

    fallback() external {
        uint256 how = kind;
        if (how == 0) revert("no");
        if (how == 1) {
            while (true) {} // until the gas is spent
        }
        assembly ("memory-safe") {
            switch how
            case 2 { return(0, 0) } // nothing
            case 3 {
                mstore(0, shl(224, 0x1626ba7e))
                return(0, 4) // the magic value, cut short
            }
            case 4 {
                mstore(0, 1)
                return(0, 32) // true
            }
            case 5 {
                mstore(0, or(shl(224, 0x1626ba7e), 1))
                return(0, 32) // the magic value and something behind it
            }
            case 6 { return(0, 1000000) } // a megabyte
            case 7 {
                sstore(0, 1) // what a view can't do
                mstore(0, shl(224, 0x1626ba7e))
                return(0, 32)
            }
            case 8 {
                // yes to whoever seems to simulate
                if iszero(origin()) {
                    mstore(0, shl(224, 0x1626ba7e))
                    return(0, 32)
                }
                return(0, 32)
            }
            default {
                mstore(0, shl(224, 0x1626ba7e))
                return(0, 32) // yes to everybody: the one that is a yes
            }
        }
    }
}
