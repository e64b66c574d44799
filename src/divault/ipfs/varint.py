"""Unsigned LEB128 integers: the multiformats kind (at most 9 bytes) and the protobuf kind (at most 10)."""

from __future__ import annotations

from collections.abc import Callable

MULTIFORMATS_MAX = 9
"""Longest varint of a CID or a CAR, in bytes (multiformats/unsigned-varint)."""
PROTOBUF_MAX = 10
"""Longest varint of a protobuf field, in bytes: 64 bits."""


class VarintIncomplete(ValueError):
    """The bytes end inside the varint; more may come."""


def read(data: bytes | bytearray | memoryview, at: int, end: int, longest: int = MULTIFORMATS_MAX) -> tuple[int, int]:
    """The number that starts at `at`, and the position behind it.

    Raises ValueError when it is longer than `longest` bytes or not minimal, VarintIncomplete when `end` cuts it.
    """
    value = shift = 0
    for position in range(at, min(end, at + longest)):
        byte = data[position]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if byte == 0 and shift:
                raise ValueError("varint is not minimal")
            if value >> 64:
                raise ValueError("varint over 64 bits")
            return value, position + 1
        shift += 7
    if end - at >= longest:
        raise ValueError(f"varint is longer than {longest} bytes")
    raise VarintIncomplete("data ends inside a varint")


def encode(value: int) -> bytes:
    """The shortest spelling of the number."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def reader(error: Callable[[str], Exception], longest: int) -> Callable[[memoryview, int, int], tuple[int, int]]:
    """`read`, with every fault raised as the given error."""

    def typed_read(data: memoryview, at: int, end: int) -> tuple[int, int]:
        """See `read`."""
        if at < end and data[at] < 0x80:  # one byte: the usual case by far
            return data[at], at + 1
        try:
            return read(data, at, end, longest)
        except ValueError as err:
            raise error(str(err)) from err

    return typed_read
