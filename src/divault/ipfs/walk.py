"""Reading a DAG that we hold: its blocks in depth-first order, or the bytes of its file, whole or for some ranges.

`get` gives a block by multihash or raises; the blocks are trusted to match (the store checked them when they came).
Ranges are `range(first, end)` of the file's bytes, ascending and disjoint; none at all means everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from divault.errors import DepthExceeded, NotAFile, TooManyNodes
from divault.ipfs.cid import IDENTITY, RAW, CidParts, check_policy, cid_bytes, make_cid, split_cid
from divault.ipfs.limits import Limits
from divault.ipfs.unixfs import Kind, UnixFS, decode_unixfs
from divault.values import Cid

Get = Callable[[bytes], bytes]


class Piece(NamedTuple):
    """A block on the way, and where its own file bytes lie: `data` in the block, `offset` in the file."""

    cid: CidParts
    block: bytes
    data: tuple[int, int]
    offset: int


class _Step(NamedTuple):
    cid: CidParts
    offset: int
    size: int | None
    depth: int


def walk(root: Cid, get: Get, ranges: Sequence[range] = (), limits: Limits | None = None) -> Iterator[Piece]:
    """The blocks under the root, depth first, repeats repeated, leaving out what lies outside all ranges.

    Directories are walked whole. Raises what is wrong with the DAG, DepthExceeded and TooManyNodes among it.
    """
    bounds = limits or Limits()
    stack = [_Step(split_cid(cid_bytes(root))[0], 0, None, 0)]
    visits = 0
    while stack:
        step = stack.pop()
        visits += 1
        if visits > bounds.max_visits:
            raise TooManyNodes(f"over {bounds.max_visits} links to follow")
        if step.depth > bounds.max_depth:
            raise DepthExceeded(f"links nested over {bounds.max_depth} deep")
        if not _touches(step, ranges):
            continue
        check_policy(step.cid)
        block = step.cid.digest if step.cid.hash_code == IDENTITY else get(step.cid.multihash)
        if step.cid.codec == RAW:
            yield Piece(step.cid, block, (0, len(block)), step.offset)
            continue
        node = decode_unixfs(block, bounds)
        data = node.data if node.kind in (Kind.FILE, Kind.RAW) else (0, 0)
        yield Piece(step.cid, block, data, step.offset)
        stack += reversed(_children(node, step))


def file_bytes(root: Cid, get: Get, ranges: Sequence[range] = (), limits: Limits | None = None) -> Iterator[memoryview]:
    """The file's bytes, the ranges back to back. Raises NotAFile for a directory."""
    file_size(root, get)
    for piece in walk(root, get, ranges, limits):
        own = memoryview(piece.block)[piece.data[0] : piece.data[1]]
        if not ranges:
            yield own
            continue
        for wanted in ranges:
            first, end = max(0, wanted.start - piece.offset), wanted.stop - piece.offset
            if first < min(end, len(own)):
                yield own[first:end]


def file_size(root: Cid, get: Get) -> int:
    """Bytes of the file, from its root block. Raises NotAFile for a directory."""
    check_policy(root)
    parts, _ = split_cid(cid_bytes(root))
    block = parts.digest if parts.hash_code == IDENTITY else get(parts.multihash)
    if parts.codec == RAW:
        return len(block)
    node = decode_unixfs(block)
    if node.kind not in (Kind.FILE, Kind.RAW):
        raise NotAFile("the root is a directory, not a file")
    return node.size


def raw_cid(parts: CidParts) -> bytes:
    """The binary CID of a walked block."""
    return cid_bytes(make_cid(parts.version, parts.codec, parts.hash_code, parts.digest))


def _children(node: UnixFS, step: _Step) -> list[_Step]:
    if node.kind not in (Kind.FILE, Kind.RAW):
        return [_Step(link.cid, 0, None, step.depth + 1) for link in node.links]
    offset = step.offset + node.data[1] - node.data[0]
    children = []
    for link, size in zip(node.links, node.child_sizes, strict=True):
        children.append(_Step(link.cid, offset, size, step.depth + 1))
        offset += size
    return children


def _touches(step: _Step, ranges: Sequence[range]) -> bool:
    """True for a root, for parts of unknown size and for parts that overlap a range."""
    if not ranges or step.size is None:
        return True
    return any(step.offset < r.stop and r.start < step.offset + step.size for r in ranges)
