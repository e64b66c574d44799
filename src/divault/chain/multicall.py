"""Multicall3's `aggregate3`, packed and read strictly: many reads in one `eth_call`. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from divault.chain.answers import Reverted
from divault.chain.records import Malformed
from divault.values import Address

SELECTOR = bytes.fromhex("82ad56cb")  # aggregate3((address,bool,bytes)[])


def aggregate(calls: Sequence[tuple[Address, bytes]]) -> bytes:
    """Calldata of one aggregate in which every inner call may fail on its own."""
    from eth_abi.abi import encode

    return SELECTOR + encode(["(address,bool,bytes)[]"], [[(to.raw, True, data) for to, data in calls]])


def parse_aggregate(returned: bytes, count: int) -> list[bytes | Reverted]:
    """Outcomes in the order of the calls. Raises Malformed."""
    from eth_abi.abi import decode
    from eth_abi.exceptions import DecodingError

    try:
        (results,) = decode(["(bool,bytes)[]"], returned)
    except (DecodingError, OverflowError) as err:
        raise Malformed("an aggregate that doesn't decode") from err
    if len(results) != count:
        raise Malformed("an aggregate of another length")
    return [data if succeeded else Reverted(data) for succeeded, data in results]
