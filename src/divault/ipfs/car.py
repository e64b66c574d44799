"""CARv1 streams: an incremental reader that never buffers more than one block, and a writer (IPLD CARv1).

Rules:

1. Header first: varint length (at most 1 MiB) and dag-cbor `{roots: [CID], version: 1}`; its roots are ignored.
2. Then sections: varint length, CID, data. Length 0, a broken varint or a broken CID is CarMalformed.
3. A length that no block may have is BlockTooLarge at once, before a byte of the section is stored.
4. The format has no end mark: `finish` finds only a cut inside a section. What is missing, the DAG walk tells.
5. CARv2 is refused (CarMalformed): gateways answer with version 1.

>>> car = car_header([]) + car_section(bytes.fromhex("015500026869"), b"hi")
>>> reader = CarReader()
>>> [bytes(section.data) for section in reader.feed(car)]
[b'hi']
>>> reader.finish()
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from divault.errors import BlockTooLarge, CarMalformed, InvalidCID, Truncated
from divault.ipfs import varint
from divault.ipfs.cid import CidParts, split_cid
from divault.ipfs.limits import Limits

_MAX_CID_BYTES = 9 + 9 + 9 + 9 + 128
"""Room for a section's CID in front of its block: four varints and the longest identity digest."""


class Section(NamedTuple):
    """A block and the CID that the stream claims for it. `data` is valid until the next step of the reader."""

    cid: CidParts
    data: memoryview


class CarReader:
    """Takes a CAR in pieces of any size and gives its sections, unverified. Reuses one buffer."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self.roots: tuple[CidParts, ...] | None = None
        """Roots that the header names, once it is read: a claim, not a promise."""
        self._varint = bytearray()
        self._buffer = memoryview(bytearray())
        self._have = 0
        self._need: int | None = None

    def feed(self, piece: bytes | bytearray | memoryview) -> Iterator[Section]:
        """The sections that end in this piece; exhaust it before the next call.

        Raises CarMalformed, BlockTooLarge.
        """
        view, at = memoryview(piece), 0
        while at < len(view):
            if self._need is None:
                at = self._take_length(view, at)
                continue
            taken = min(self._need - self._have, len(view) - at)
            body = self._take_body(view[at : at + taken])
            at += taken
            if body is None:
                continue
            self._need, self._have = None, 0
            if self.roots is None:
                self.roots = _header_roots(body)
            else:
                yield self._section(body)

    def finish(self) -> None:
        """Nothing, when the stream ended between sections. Raises Truncated."""
        if self.roots is None or self._need is not None or self._varint:
            raise Truncated("the CAR ends inside its header or a section")

    def _take_length(self, view: memoryview, at: int) -> int:
        byte = view[at]
        self._varint.append(byte)
        if byte >= 0x80 and len(self._varint) < varint.MULTIFORMATS_MAX:
            return at + 1
        try:
            length, _ = varint.read(self._varint, 0, len(self._varint))
        except ValueError as err:
            raise CarMalformed(f"section length: {err}") from err
        self._varint.clear()
        self._check_length(length)
        self._need = length
        return at + 1

    def _check_length(self, length: int) -> None:
        if length == 0:
            raise CarMalformed("an empty header or section")
        if self.roots is None:
            if length > self._limits.max_car_header_bytes:
                raise CarMalformed(f"a header of {length} bytes, or this is no CAR")
        elif length > self._limits.max_block_bytes + _MAX_CID_BYTES:
            raise BlockTooLarge(f"a section of {length} bytes; a block has at most {self._limits.max_block_bytes}")

    def _take_body(self, part: memoryview) -> memoryview | None:
        """The whole body when `part` completes it; without a copy when it came in one piece."""
        need = self._need or 0
        if len(part) == need:
            return part
        if len(self._buffer) < need:
            self._buffer = memoryview(bytearray(need))
        end = self._have + len(part)
        self._buffer[self._have : end] = part  # between views: a bytearray would make a copy of the part first
        self._have = end
        return self._buffer[:end] if end == need else None

    def _section(self, body: memoryview) -> Section:
        try:
            cid, at = split_cid(body)
        except InvalidCID as err:
            raise CarMalformed(f"a section without a CID: {err.detail}") from err
        if len(body) - at > self._limits.max_block_bytes:
            raise BlockTooLarge(f"a block of {len(body) - at} bytes; {self._limits.max_block_bytes} are allowed")
        return Section(cid, body[at:])


def car_header(roots: Sequence[bytes]) -> bytes:
    """The first bytes of a CARv1 with these roots (binary CIDs)."""
    tagged = b"".join(b"\xd8\x2a" + _cbor_head(2, len(root) + 1) + b"\x00" + root for root in roots)
    body = b"\xa2\x65roots" + _cbor_head(4, len(roots)) + tagged + b"\x67version\x01"
    return varint.encode(len(body)) + body


def car_section(raw_cid: bytes, data: bytes | memoryview) -> bytes:
    """A section: length, CID, block."""
    return b"".join((section_head(raw_cid, len(data)), data))


def section_head(raw_cid: bytes, size: int) -> bytes:
    """What stands before the `size` bytes of the block."""
    return varint.encode(len(raw_cid) + size) + raw_cid


def _cbor_head(major: int, value: int) -> bytes:
    if value < 24:
        return bytes([major << 5 | value])
    width = 1 if value < 1 << 8 else 2 if value < 1 << 16 else 4
    return bytes([major << 5 | 23 + width.bit_length()]) + value.to_bytes(width, "big")


def _header_roots(body: memoryview) -> tuple[CidParts, ...]:
    """Strict reading of the header map; keys in either order, each once."""
    at, pairs = _cbor(body, 0, 5)
    roots: tuple[CidParts, ...] | None = None
    version: int | None = None
    for _ in range(min(pairs, 2)):
        at, length = _cbor(body, at, 3)
        key, at = bytes(body[at : at + length]), at + length
        if key == b"version" and version is None:
            at, version = _cbor(body, at, 0)
        elif key == b"roots" and roots is None:
            at, roots = _cid_array(body, at)
    if version == 2 and roots is None:
        raise CarMalformed("CARv2 is not read; ask for version 1")
    if version != 1 or roots is None or pairs != 2 or at != len(body):
        raise CarMalformed("the header is not {roots, version: 1}")
    return roots


def _cid_array(body: memoryview, at: int) -> tuple[int, tuple[CidParts, ...]]:
    at, count = _cbor(body, at, 4)
    roots = []
    for _ in range(count):
        at, tag = _cbor(body, at, 6)
        at, length = _cbor(body, at, 2)
        item, at = body[at : at + length], at + length
        if tag != 42 or len(item) != length or length == 0 or item[0] != 0:
            raise CarMalformed("a root that is no CID")
        try:
            parts, end = split_cid(item, 1)
        except InvalidCID as err:
            raise CarMalformed(f"a root that is no CID: {err.detail}") from err
        if end != length:
            raise CarMalformed("bytes behind a root's CID")
        roots.append(parts)
    return at, tuple(roots)


def _cbor(body: memoryview, at: int, major: int) -> tuple[int, int]:
    """Position behind, and argument of, a dag-cbor head of this major type."""
    if at >= len(body) or body[at] >> 5 != major:
        raise CarMalformed("the header is not the dag-cbor map of a CAR")
    low, at = body[at] & 31, at + 1
    if low < 24:
        return at, low
    width = 1 << low - 24
    if low > 27 or at + width > len(body):
        raise CarMalformed("a broken number in the header")
    return at + width, int.from_bytes(body[at : at + width], "big")
