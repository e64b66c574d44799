"""dag-pb nodes, strictly: links and data exactly as canonical or legacy writers lay them out (IPLD dag-pb).

Rules:

1. PBNode is Data (1) and Links (2); Data stands before all links or behind all of them, never between.
2. PBLink is Hash (1), Name (2), Tsize (3), in this order, each at most once; Hash is there and is a CID to its end.
3. No unknown field, no other wire type, no length beyond the end: each is DagPbMalformed.

>>> decode_node(bytes.fromhex("0a0568656c6c6f"))
Node(links=(), data=(2, 7))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from divault.errors import DagPbMalformed, InvalidCID, TooManyLinks
from divault.ipfs import varint
from divault.ipfs.cid import CidParts, split_cid
from divault.ipfs.limits import Limits

_read = varint.reader(DagPbMalformed, varint.PROTOBUF_MAX)
_BYTES = 2  # protobuf wire type of a length-delimited field
_DATA = 1 << 3 | _BYTES
_LINK = 2 << 3 | _BYTES
_HASH = 1 << 3 | _BYTES
_NAME = 2 << 3 | _BYTES
_TSIZE = 3 << 3


class Link(NamedTuple):
    """A child: its CID, its name (None when the field is absent) and the size hint, which may lie."""

    cid: CidParts
    name: bytes | None
    tsize: int | None


class Node(NamedTuple):
    """Links, and where in the block the data lies (None when the field is absent)."""

    links: tuple[Link, ...]
    data: tuple[int, int] | None


def decode_node(block: bytes | bytearray | memoryview, limits: Limits | None = None) -> Node:
    """The node that this block is. Raises DagPbMalformed, TooManyLinks."""
    view, max_links = memoryview(block), (limits or Limits()).max_links
    links: list[Link] = []
    data: tuple[int, int] | None = None
    at, end, links_closed = 0, len(view), False
    while at < end:
        key, at = _read(view, at, end)
        start, at = _span(view, at, end)
        if key == _DATA:
            if data is not None:
                raise DagPbMalformed("a node with two Data fields")
            data, links_closed = (start, at), bool(links)
        elif key == _LINK:
            if links_closed:
                raise DagPbMalformed("a link behind the Data that followed other links")
            if len(links) >= max_links:
                raise TooManyLinks(f"a node with more than {max_links} links")
            links.append(_link(view, start, at))
        else:
            raise DagPbMalformed(f"unknown field or wire type 0x{key:x}")
    return Node(tuple(links), data)


def encode_node(links: Sequence[tuple[bytes, bytes, int]], data: bytes) -> bytes:
    """The canonical block: links (raw CID, name, tsize) first, then data. An empty name is written, as kubo does."""
    out = bytearray()
    for raw_cid, name, tsize in links:
        body = b"\x0a" + _sized(raw_cid) + b"\x12" + _sized(name) + b"\x18" + varint.encode(tsize)
        out += b"\x12" + _sized(body)
    return bytes(out + b"\x0a" + _sized(data))


def _sized(data: bytes) -> bytes:
    return varint.encode(len(data)) + data


def _span(view: memoryview, at: int, end: int) -> tuple[int, int]:
    length, at = _read(view, at, end)
    if length > end - at:
        raise DagPbMalformed("a field that ends behind its node")
    return at, at + length


def _link(view: memoryview, at: int, end: int) -> Link:
    cid: CidParts | None = None
    name: bytes | None = None
    tsize: int | None = None
    last = 0
    while at < end:
        key, at = _read(view, at, end)
        if key <= last:
            raise DagPbMalformed("link fields out of order or repeated")
        last = key
        if key == _TSIZE:
            tsize, at = _read(view, at, end)
            continue
        start, at = _span(view, at, end)
        if key == _HASH:
            cid = _link_cid(view[start:at])
        elif key == _NAME:
            name = bytes(view[start:at])
        else:
            raise DagPbMalformed(f"unknown field or wire type 0x{key:x} in a link")
    if cid is None:
        raise DagPbMalformed("a link without a hash")
    return Link(cid, name, tsize)


def _link_cid(data: memoryview) -> CidParts:
    try:
        parts, end = split_cid(data)
    except InvalidCID as err:
        raise DagPbMalformed(f"a link whose hash is no CID: {err.detail}") from err
    if end != len(data):
        raise DagPbMalformed("bytes behind the CID of a link")
    return parts
