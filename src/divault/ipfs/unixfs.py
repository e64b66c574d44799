"""UnixFS nodes, strictly: files, directories and HAMT shards with every size and name checked (UnixFS v1).

Rules:

1. The message has fields 1 to 8, singular ones at most once; an unknown field is an error.
2. A file: `filesize == len(Data) + sum(blocksizes)` (absent means 0), one blocksize per link, links without names.
3. A directory lists safe names, each once, compared the way macOS and Windows would (NFC and casefold).
4. A HAMT shard: murmur3 (0x22), fanout a power of two, multiple of 8, at most 1024, one link for each set bit.
5. Symbolic links are refused, the Metadata type and types that do not exist too.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from divault.errors import SymlinkRefused, UnixFSInvalid, UnsafeName
from divault.ipfs import varint
from divault.ipfs.dagpb import Link, Node, decode_node
from divault.ipfs.limits import Limits

_read = varint.reader(UnixFSInvalid, varint.PROTOBUF_MAX)
_MURMUR3 = 0x22
MAX_FANOUT = 1024
"""Widest HAMT shard (kubo's own cap after CVE-2023-23625)."""
MAX_NAME_BYTES = 255
"""What common file systems take."""


class Kind(IntEnum):
    """Type of a UnixFS node. RAW is the legacy leaf type inside dag-pb, not the raw codec."""

    RAW = 0
    DIRECTORY = 1
    FILE = 2
    METADATA = 3
    SYMLINK = 4
    HAMT_SHARD = 5


class UnixFS(NamedTuple):
    """A checked node. `data` is where its own bytes lie in the block; `child_sizes` has one size per link of a file."""

    kind: Kind
    links: tuple[Link, ...]
    data: tuple[int, int]
    size: int
    child_sizes: tuple[int, ...]
    fanout: int


class _Message(NamedTuple):
    kind: int | None
    data: tuple[int, int] | None
    filesize: int
    blocksizes: tuple[int, ...]
    hash_type: int
    fanout: int


def decode_unixfs(block: bytes | bytearray | memoryview, limits: Limits | None = None) -> UnixFS:
    """The UnixFS node in this dag-pb block. Raises DagPbMalformed, TooManyLinks, UnixFSInvalid, SymlinkRefused."""
    node = decode_node(block, limits)
    if node.data is None:
        raise UnixFSInvalid("a dag-pb node without UnixFS data")
    message = _message(memoryview(block), *node.data)
    kind = _kind(message)
    data = message.data or (0, 0)
    if kind in (Kind.FILE, Kind.RAW):
        _check_file(node, message, data)
    elif kind is Kind.HAMT_SHARD:
        _check_shard(node, message, memoryview(block)[data[0] : data[1]])
    return UnixFS(kind, node.links, data, message.filesize, message.blocksizes, message.fanout)


def encode_file(data: bytes, child_sizes: tuple[int, ...] = ()) -> bytes:
    """The UnixFS message of a file node as kubo and the JS importer write it; `data` is left out when empty."""
    out = bytearray(b"\x08\x02")
    if data:
        out += b"\x12" + varint.encode(len(data)) + data
    out += b"\x18" + varint.encode(len(data) + sum(child_sizes))
    for size in child_sizes:
        out += b"\x20" + varint.encode(size)
    return bytes(out)


def safe_name(raw: bytes | None) -> str:
    """The name of a directory entry as text. Raises UnsafeName for one that could leave the directory or hide."""
    if not raw or raw in (b".", b".."):
        raise UnsafeName("a directory entry without a name of its own")
    if len(raw) > MAX_NAME_BYTES:
        raise UnsafeName(f"a name of {len(raw)} bytes; {MAX_NAME_BYTES} are allowed")
    try:
        name = raw.decode()
    except UnicodeDecodeError as err:
        raise UnsafeName("a name that is not UTF-8") from err
    if any(c in "/\\" or unicodedata.category(c) == "Cc" for c in name):
        raise UnsafeName("a name with a slash, a backslash or a control character")
    return name


def folded(name: str) -> str:
    """Equal for two names that one file system or another takes for the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def shard_entry(link: Link, fanout: int) -> tuple[int, bytes]:
    """The bucket that a shard link names, and the entry's name; that is empty for a sub-shard. Raises UnixFSInvalid."""
    width = len(f"{fanout - 1:X}")
    name = link.name or b""
    prefix = name[:width]
    if len(prefix) < width or any(c not in b"0123456789ABCDEF" for c in prefix) or int(prefix, 16) >= fanout:
        raise UnixFSInvalid(f"a shard link must start with {width} upper-case hex digits below its fanout")
    return int(prefix, 16), name[width:]


def _kind(message: _Message) -> Kind:
    try:
        kind = Kind(-1 if message.kind is None else message.kind)
    except ValueError as err:
        raise UnixFSInvalid(f"UnixFS type {message.kind} does not exist") from err
    if kind is Kind.SYMLINK:
        raise SymlinkRefused("symbolic links are not followed")
    if kind is Kind.METADATA:
        raise UnixFSInvalid("the Metadata type is not content")
    return kind


def _check_file(node: Node, message: _Message, data: tuple[int, int]) -> None:
    if len(message.blocksizes) != len(node.links):
        raise UnixFSInvalid(f"{len(message.blocksizes)} block sizes for {len(node.links)} links")
    if any(link.name for link in node.links):
        raise UnixFSInvalid("a named link inside a file")
    if message.filesize != data[1] - data[0] + sum(message.blocksizes):
        raise UnixFSInvalid("the size of a file is not the sum of its parts")


def _check_shard(node: Node, message: _Message, bitfield: memoryview) -> None:
    fanout = message.fanout
    if message.hash_type != _MURMUR3:
        raise UnixFSInvalid(f"shard hash 0x{message.hash_type:x} is not murmur3-x64-64")
    if not 8 <= fanout <= MAX_FANOUT or fanout & (fanout - 1):
        raise UnixFSInvalid(f"shard fanout {fanout} is no power of two from 8 to {MAX_FANOUT}")
    buckets = sum({1 << shard_entry(link, fanout)[0] for link in node.links})
    if buckets.bit_count() != len(node.links) or buckets != int.from_bytes(bitfield, "big"):
        raise UnixFSInvalid("the bit field of a shard does not tell its links")


def _message(view: memoryview, at: int, end: int) -> _Message:
    values: dict[int, int] = {}
    data: tuple[int, int] | None = None
    sizes: list[int] = []
    for key, first, last in _fields(view, at, end):
        if key in values:
            raise UnixFSInvalid(f"UnixFS field {key >> 3} twice")
        match key:
            case 0x20:  # blocksizes, one by one
                sizes.append(first)
                continue
            case 0x22:  # blocksizes, packed
                sizes += _packed(view, first, last)
                continue
            case 0x12:
                data = (first, last)
            case 0x42:
                _check_mtime(view, first, last)
            case 0x08 | 0x18 | 0x28 | 0x30 | 0x38:  # Type, filesize, hashType, fanout, mode
                pass
            case _:
                raise UnixFSInvalid(f"unknown UnixFS field or wire type 0x{key:x}")
        values[key] = first
    get = values.get
    return _Message(get(0x08), data, get(0x18, 0), tuple(sizes), get(0x28, 0), get(0x30, 0))


def _fields(view: memoryview, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Each field's key (number and wire type) with its number, twice, or where its bytes start and end."""
    while at < end:
        key, at = _read(view, at, end)
        if key & 7 == 0:
            value, at = _read(view, at, end)
            yield key, value, value
        elif key & 7 == 2:
            start, at = _span(view, at, end)
            yield key, start, at
        else:
            raise UnixFSInvalid(f"unknown UnixFS field or wire type 0x{key:x}")


def _span(view: memoryview, at: int, end: int) -> tuple[int, int]:
    length, at = _read(view, at, end)
    if length > end - at:
        raise UnixFSInvalid("a UnixFS field that ends behind its message")
    return at, at + length


def _packed(view: memoryview, at: int, end: int) -> list[int]:
    sizes = []
    while at < end:
        size, at = _read(view, at, end)
        sizes.append(size)
    return sizes


def _check_mtime(view: memoryview, at: int, end: int) -> None:
    """Checked and not used: Seconds (1, varint), FractionalNanoseconds (2, fixed32, 1 to 999,999,999)."""
    last = 0
    while at < end:
        key, at = _read(view, at, end)
        if key <= last:
            raise UnixFSInvalid("mtime fields out of order or repeated")
        last = key
        if key == 1 << 3:
            _, at = _read(view, at, end)
        elif key == 2 << 3 | 5 and end - at >= 4:
            if not 1 <= int.from_bytes(view[at : at + 4], "little") <= 999_999_999:
                raise UnixFSInvalid("nanoseconds outside 1 to 999,999,999")
            at += 4
        else:
            raise UnixFSInvalid(f"unknown mtime field 0x{key:x}")
