// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IERC1271} from "@openzeppelin/contracts/interfaces/IERC1271.sol";

/// @notice Says whether a contract wallet takes a signature for its own (ERC-1271), also before it is deployed (ERC-6492).
/// @dev Never deployed: `eth_call` runs its creation code, which returns one byte, 1 for yes and 0 for no. Whoever is asked
/// gets half of the gas, so that enough is left to say no.
contract WalletSignature {
    /// @param factory Deploys the wallet, or readies it, when called with `prepare`; zero for a signature without wrapper.
    constructor(address wallet, bytes32 hash, address factory, bytes memory prepare, bytes memory signature) {
        bool valid = _accepts(wallet, hash, signature);
        if (!valid && factory != address(0)) {
            (bool done,) = factory.call{gas: gasleft() / 2}(prepare);
            valid = done && _accepts(wallet, hash, signature);
        }
        assembly ("memory-safe") {
            mstore(0, valid)
            return(31, 1)
        }
    }

    function _accepts(address wallet, bytes32 hash, bytes memory signature) private view returns (bool) {
        if (wallet.code.length == 0) return false;
        bytes memory question = abi.encodeCall(IERC1271.isValidSignature, (hash, signature));
        (bool done, bytes memory answer) = wallet.staticcall{gas: gasleft() / 2}(question);
        return done && answer.length >= 32 && bytes32(answer) == bytes32(IERC1271.isValidSignature.selector);
    }
}
