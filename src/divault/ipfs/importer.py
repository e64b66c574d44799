"""CIDs of local files: the trees that writers build, for one or several profiles in one pass (IPIP-499).

A tree is built level by level: chunks become leaves, each `width` nodes of a level get a parent, and a single trailing
child is wrapped too. A file of at most one chunk is the bare leaf.

>>> importer = Importer([UNIXFS_V1_2025, UNIXFS_V0_2015])
>>> importer.update(b"hello world")
>>> for profile, cid in importer.finish().items():
...     print(profile.name, cid)
unixfs-v1-2025 bafkreifzjut3te2nhyekklss27nh3k72ysco7y32koao5eei66wof36n5e
unixfs-v0-2015 Qmf412jQZiuVUtdgnB36FXFX7xg5V6KEbSJ4dpQuhkLyfD
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from divault.ipfs.cid import DAG_PB, RAW, SHA2_256, parse_cid_bytes
from divault.ipfs.dagpb import encode_node
from divault.ipfs.unixfs import encode_file
from divault.values import Cid

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Profile:
    """How a writer cuts and links a file; two profiles of one file usually give two CIDs."""

    name: str
    cid_version: Literal[0, 1]
    chunk_bytes: int
    raw_leaves: bool
    width: int
    """Most links of a node."""


UNIXFS_V1_2025 = Profile("unixfs-v1-2025", 1, 1024 * 1024, raw_leaves=True, width=1024)
"""IPIP-499; what divault publishes with."""
V1_256K_174 = Profile("v1-256k-174", 1, 256 * 1024, raw_leaves=True, width=174)
"""kubo with `--cid-version=1` and no profile."""
V1_1M_174 = Profile("v1-1m-174", 1, 1024 * 1024, raw_leaves=True, width=174)
"""kubo's profile test-cid-v1."""
UNIXFS_V0_2015 = Profile("unixfs-v0-2015", 0, 256 * 1024, raw_leaves=False, width=174)
"""IPIP-499; the `Qm...` of old uploads."""
PROFILES = (UNIXFS_V1_2025, V1_256K_174, V1_1M_174, UNIXFS_V0_2015)
"""Every root that a service may answer with for a file it was sent."""


class Block(NamedTuple):
    """A block of a tree: its CID in binary, its bytes (valid during the call that hands it over), and whose it is.

    `profile` is the first of those that share the block.
    """

    cid: bytes
    data: Bytes
    profile: Profile


Emit = Callable[[Block], None]


class _Child(NamedTuple):
    cid: bytes
    file_bytes: int
    tree_bytes: int


class _Tree:
    """Levels of one profile above its leaves; holds at most `width` children per level."""

    def __init__(self, profile: Profile, emit: Emit) -> None:
        self._profile, self._emit = profile, emit
        self._levels: list[list[_Child]] = []
        self._counts: list[int] = []

    def add(self, child: _Child, level: int = 0) -> None:
        """Append to a level; a full one becomes a node of the next."""
        if level == len(self._levels):
            self._levels.append([])
            self._counts.append(0)
        self._levels[level].append(child)
        self._counts[level] += 1
        if len(self._levels[level]) == self._profile.width:
            self._wrap(level)

    def root(self) -> bytes:
        """Wrap what is left, bottom up, until a level has one node; its binary CID."""
        level = 0
        while self._counts[level] > 1:
            if self._levels[level]:
                self._wrap(level)
            level += 1
        return self._levels[level][0].cid

    def _wrap(self, level: int) -> None:
        children, self._levels[level] = self._levels[level], []
        sizes = tuple(child.file_bytes for child in children)
        block = encode_node([(c.cid, b"", c.tree_bytes) for c in children], encode_file(b"", sizes))
        cid = _block_cid(self._profile.cid_version, DAG_PB, block)
        self._emit(Block(cid, block, self._profile))
        self.add(_Child(cid, sum(sizes), len(block) + sum(c.tree_bytes for c in children)), level + 1)


class _Leaves:
    """Chunks of one size and leaf form, hashed once for all profiles that share them."""

    def __init__(self, profile: Profile, trees: list[_Tree], emit: Emit) -> None:
        self._profile, self._trees, self._emit = profile, trees, emit
        self._pending = bytearray()
        self._count = 0

    def update(self, data: memoryview) -> None:
        """Cut the next bytes; a rest below one chunk waits."""
        size, at = self._profile.chunk_bytes, 0
        if self._pending:
            at = size - len(self._pending)
            self._pending += data[:at]
            if len(self._pending) == size:
                self._leaf(self._pending)
                self._pending = bytearray()
        while len(data) - at >= size:
            self._leaf(data[at : at + size])
            at += size
        self._pending += data[at:]

    def finish(self) -> None:
        """The last, shorter chunk; for an empty file an empty one."""
        if self._pending or not self._count:
            self._leaf(self._pending)

    def _leaf(self, chunk: Bytes) -> None:
        profile = self._profile
        block = chunk if profile.raw_leaves else encode_node([], encode_file(bytes(chunk)))
        cid = _block_cid(profile.cid_version, RAW if profile.raw_leaves else DAG_PB, block)
        self._count += 1
        self._emit(Block(cid, block, profile))
        for tree in self._trees:
            tree.add(_Child(cid, len(chunk), len(block)))


class Importer:
    """Takes a file in pieces of any size and gives its root for each profile. Holds one chunk per chunk size.

    `emit` gets every block (children before parents, blocks that profiles share once); the root comes from `finish`.
    """

    def __init__(self, profiles: Sequence[Profile] = (UNIXFS_V1_2025,), emit: Emit | None = None) -> None:
        take = emit or (lambda _block: None)
        self._trees = {profile: _Tree(profile, take) for profile in profiles}
        shared: dict[tuple[int, int, bool], list[Profile]] = {}
        for profile in profiles:
            shared.setdefault((profile.cid_version, profile.chunk_bytes, profile.raw_leaves), []).append(profile)
        self._leaves = [_Leaves(group[0], [self._trees[p] for p in group], take) for group in shared.values()]

    def update(self, data: Bytes) -> None:
        """The next bytes of the file."""
        view = memoryview(data)
        for leaves in self._leaves:
            leaves.update(view)

    def finish(self) -> dict[Profile, Cid]:
        """The root CIDs; call it once, at the end of the file."""
        for leaves in self._leaves:
            leaves.finish()
        return {profile: parse_cid_bytes(tree.root()) for profile, tree in self._trees.items()}


def _block_cid(version: Literal[0, 1], codec: int, block: Bytes) -> bytes:
    multihash = bytes((SHA2_256, 32)) + hashlib.sha256(block).digest()
    return multihash if version == 0 else bytes((1, codec)) + multihash
