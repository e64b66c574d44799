"""Blocks, transactions, receipts and logs as a node reports them, parsed strictly. Pure.

Rules:

1. A quantity is `0x` and hex digits without leading zeros, at most 256 bits; data is `0x` and whole bytes.
2. A field that is missing or of another shape makes the whole record `Malformed`; nothing is filled in.
3. Fields that this project doesn't read are ignored.

>>> quantity("0x1f")
31
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from divault.values import Address, BlockRef, Digest

_QUANTITY = re.compile(r"0x(0|[1-9a-fA-F][0-9a-fA-F]{0,63})", re.ASCII)
_DATA = re.compile(r"0x(?:[0-9a-fA-F]{2})*", re.ASCII)

T = TypeVar("T")


class Malformed(ValueError):
    """An endpoint's answer that breaks the rules above. Stays inside `divault.chain`."""


@dataclass(frozen=True, slots=True)
class Log:
    """One event of a mined transaction."""

    address: Address
    topics: tuple[Digest, ...]
    data: bytes
    block_number: int
    block_hash: Digest
    transaction_hash: Digest
    index: int
    """Position in the block (not in the transaction): with the transaction's hash it names the log for good."""


@dataclass(frozen=True, slots=True)
class Transaction:
    """A transaction as sent; block fields are None while it is pending."""

    hash: Digest
    chain_id: int | None
    """None for one signed without replay protection (before EIP-155)."""
    sender: Address
    to: Address | None
    """None: it creates a contract."""
    nonce: int
    value: int
    data: bytes
    block_number: int | None
    block_hash: Digest | None


@dataclass(frozen=True, slots=True)
class TransactionReceipt:
    """What a mined transaction did. It is evidence only while `block_hash` is canonical at `block_number`."""

    transaction_hash: Digest
    succeeded: bool
    block_number: int
    block_hash: Digest
    sender: Address
    to: Address | None
    contract: Address | None
    """The contract that it created."""
    gas_used: int
    logs: tuple[Log, ...]


@dataclass(frozen=True, slots=True)
class Fees:
    """What the chain asks for, in wei per gas; `base` is None where blocks carry no base fee (legacy pricing)."""

    base: int | None
    gas_price: int


def quantity(value: Any) -> int:
    """A non-negative number. Raises Malformed."""
    if not isinstance(value, str) or not _QUANTITY.fullmatch(value):
        raise Malformed("not a quantity")
    return int(value, 16)


def data(value: Any) -> bytes:
    """Bytes of any length. Raises Malformed."""
    if not isinstance(value, str) or not _DATA.fullmatch(value):
        raise Malformed("not hex data")
    return bytes.fromhex(value[2:])


def digest(value: Any) -> Digest:
    """Exactly 32 bytes. Raises Malformed."""
    raw = data(value)
    if len(raw) != 32:
        raise Malformed("not 32 bytes")
    return Digest(raw)


def address(value: Any) -> Address:
    """Exactly 20 bytes, any letter case. Raises Malformed."""
    raw = data(value)
    if len(raw) != 20:
        raise Malformed("not 20 bytes")
    return Address(raw)


def optional(parse: Callable[[Any], T]) -> Callable[[Any], T | None]:
    """A parser that gives None for JSON null."""
    return lambda value: None if value is None else parse(value)


def block(value: Any) -> BlockRef:
    """A mined block's reference. Raises Malformed, also for a pending block (null hash)."""
    fields = _object(value)
    return BlockRef(
        quantity(fields.get("number")), digest(fields.get("hash")), _seconds(quantity(fields.get("timestamp")))
    )


def log(value: Any) -> Log:
    """A mined, not removed log. Raises Malformed."""
    fields = _object(value)
    topics = _array(fields.get("topics"))
    if len(topics) > 4 or fields.get("removed", False) is not False:
        raise Malformed("a log that can't be")
    return Log(
        address(fields.get("address")),
        tuple(digest(topic) for topic in topics),
        data(fields.get("data")),
        quantity(fields.get("blockNumber")),
        digest(fields.get("blockHash")),
        digest(fields.get("transactionHash")),
        quantity(fields.get("logIndex")),
    )


def logs(value: Any) -> tuple[Log, ...]:
    """A list of logs. Raises Malformed."""
    return tuple(log(item) for item in _array(value))


def receipt(value: Any) -> TransactionReceipt:
    """A receipt whose logs belong to it. Raises Malformed."""
    fields = _object(value)
    status = quantity(fields.get("status"))
    if status not in (0, 1):
        raise Malformed("a status other than 0 and 1")
    parsed = TransactionReceipt(
        digest(fields.get("transactionHash")),
        status == 1,
        quantity(fields.get("blockNumber")),
        digest(fields.get("blockHash")),
        address(fields.get("from")),
        optional(address)(fields.get("to")),
        optional(address)(fields.get("contractAddress")),
        quantity(fields.get("gasUsed")),
        logs(fields.get("logs")),
    )
    mine = (parsed.transaction_hash, parsed.block_hash, parsed.block_number)
    if any((entry.transaction_hash, entry.block_hash, entry.block_number) != mine for entry in parsed.logs):
        raise Malformed("a receipt with another transaction's log")
    return parsed


def transaction(value: Any) -> Transaction:
    """A transaction, mined or pending. Raises Malformed."""
    fields = _object(value)
    return Transaction(
        digest(fields.get("hash")),
        optional(quantity)(fields.get("chainId")),
        address(fields.get("from")),
        optional(address)(fields.get("to")),
        quantity(fields.get("nonce")),
        quantity(fields.get("value")),
        data(fields.get("input")),
        optional(quantity)(fields.get("blockNumber")),
        optional(digest)(fields.get("blockHash")),
    )


def base_fee(value: Any) -> int | None:
    """Base fee of a block in wei per gas, None where it has none. Raises Malformed."""
    return optional(quantity)(_object(value).get("baseFeePerGas"))


def _seconds(value: int) -> int:
    if value >= 2**63:  # no clock gets there; SQLite and JSON consumers can't hold it
        raise Malformed("a time beyond any clock")
    return value


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Malformed("not an object")
    return value


def _array(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise Malformed("not a list")
    return value
