"""RLP (Ethereum yellow paper, appendix B), the encoding of transactions and headers. Decoding takes one spelling only.

>>> decode(encode([b"cat", [b"", b"dog"]]))
[b'cat', [b'', b'dog']]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

Item: TypeAlias = "bytes | list[Item]"
Source: TypeAlias = "bytes | int | Sequence[Source]"
_MAX_DEPTH = 16
"""Deepest nesting decoded: transactions use four levels."""


def encode(item: Source) -> bytes:
    """RLP of bytes, of a whole number >= 0 (big-endian, without leading zeros) or of a sequence of such."""
    if isinstance(item, int):
        item = item.to_bytes((item.bit_length() + 7) // 8, "big")
    if isinstance(item, bytes):
        return item if len(item) == 1 and item[0] < 0x80 else _length(len(item), 0x80) + item
    body = b"".join(encode(part) for part in item)
    return _length(len(body), 0xC0) + body


def decode(data: bytes) -> Item:
    """The one item that `data` is. Raises ValueError for trailing bytes and for anything not canonical."""
    item, end = _item(data, 0, 0)
    if end != len(data):
        raise ValueError("bytes after the RLP item")
    return item


def _length(size: int, offset: int) -> bytes:
    if size < 56:
        return bytes([offset + size])
    digits = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([offset + 55 + len(digits)]) + digits


def _item(data: bytes, at: int, depth: int) -> tuple[Item, int]:
    if at >= len(data) or depth > _MAX_DEPTH:
        raise ValueError("RLP ends early or nests too deeply")
    first = data[at]
    if first < 0x80:
        return data[at : at + 1], at + 1
    start, end = _extent(data, at, 0xC0 if first >= 0xC0 else 0x80)
    if first >= 0xC0:
        return _items(data, start, end, depth), end
    value = data[start:end]
    if len(value) == 1 and value[0] < 0x80:
        raise ValueError("a single small byte is its own RLP")
    return value, end


def _items(data: bytes, at: int, end: int, depth: int) -> list[Item]:
    items: list[Item] = []
    while at < end:
        item, at = _item(data, at, depth + 1)
        items.append(item)
    if at != end:
        raise ValueError("an RLP item is longer than its list")
    return items


def _extent(data: bytes, at: int, offset: int) -> tuple[int, int]:
    size, start = data[at] - offset, at + 1
    if size > 55:
        digits = data[start : start + size - 55]
        start += size - 55
        size = int.from_bytes(digits, "big")
        if digits[:1] in (b"", b"\0") or size < 56:
            raise ValueError("an RLP length is not minimal")
    if start + size > len(data):
        raise ValueError("RLP ends early")
    return start, start + size
