// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

/// @title Many reads in one call, with the `aggregate3` interface of Multicall3
/// @notice Development chains carry it at the well-known address of Multicall3. It holds no state and no money.
contract Multicall {
    struct Call3 {
        address target;
        bool allowFailure;
        bytes callData;
    }

    struct Result {
        bool success;
        bytes returnData;
    }

    error CallFailed(uint256 index, bytes returnData);

    /// @notice The results in the order of the calls. A failure reverts everything unless its call allows it.
    function aggregate3(Call3[] calldata calls) external payable returns (Result[] memory results) {
        results = new Result[](calls.length);
        for (uint256 i = 0; i < calls.length; ++i) {
            (bool success, bytes memory data) = calls[i].target.call(calls[i].callData);
            if (!success && !calls[i].allowFailure) revert CallFailed(i, data);
            results[i] = Result(success, data);
        }
    }
}
