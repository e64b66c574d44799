"""The judge of fetched content: blocks in, verified file bytes out, nothing else ever (UnixFS v1, trustless gateways).

How it works: the verifier keeps the blocks that the DAG still *wants*, each with the place of its bytes in the
output. It starts with the root. A block that arrives for a wanted multihash is hashed, then read as its link's codec
says: a leaf is written at its known offset, a node is replaced by wants for its children. In depth-first order the
wants are a stack; other orders work as long as parents come first, and early children are held up to a cap.

Rules:

1. A byte is written only after its block matched its multihash and its parent's size.
2. The size of a file is known, and refused, from its root block.
3. Depth, visits, links, entries, node bytes, unasked-for bytes and total size are capped (`Limits`).
4. The walk is iterative; a repeated block is read again from the output, not asked for twice.
5. A block that fails its hash changes nothing: the next source may deliver the right one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from enum import Enum, auto
from typing import NamedTuple, Protocol

from divault.errors import (
    BlockTooLarge,
    DepthExceeded,
    DuplicateName,
    HashMismatch,
    MissingBlock,
    NotADirectory,
    NotAFile,
    SizeExceeded,
    TooManyExtraBytes,
    TooManyNodes,
    UnixFSInvalid,
)
from divault.ipfs.car import CarReader
from divault.ipfs.cid import IDENTITY, RAW, CidParts, check_hash, check_policy, cid_bytes, split_cid
from divault.ipfs.dagpb import Link
from divault.ipfs.limits import Limits
from divault.ipfs.unixfs import Kind, UnixFS, decode_unixfs, folded, safe_name, shard_entry
from divault.values import Cid

Bytes = bytes | bytearray | memoryview
_SECTION_BYTES = 64
"""What a block counts beside its data, so that floods of empty ones end too: about a section's length and CID."""
_SHARD_HASH_BITS = 64
"""murmur3-x64-64 gives 64 bits, so at fanout 256 a tree of shards has at most 8 levels."""


class Shell(NamedTuple):
    """A dag-pb block without the file data inside it, which is in the output: `head + data[:size] + tail`."""

    head: bytes
    tail: bytes
    size: int


class Output(Protocol):
    """Where verified content goes. `path` is empty for a single file; entries of a directory have slashes."""

    def begin(self, path: str, size: int) -> None:
        """A file of this size, within the limits, is about to be written."""

    def node(self, multihash: bytes, shell: Shell) -> None:
        """A dag-pb block was verified: with the file's bytes, enough to verify everything again."""

    def write(self, path: str, offset: int, data: Bytes) -> None:
        """Keep these verified bytes of the file."""

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Bytes written before, for blocks that occur twice."""


class Wanted(NamedTuple):
    """A block that is still missing; `size` and `offset` of its file bytes, size None where only the block tells."""

    multihash: bytes
    codec: int
    path: str
    offset: int
    size: int | None


class CheckedBlock(NamedTuple):
    """A block whose bytes have the hash that its multihash says; `check_block` makes it. The bytes stay as they are."""

    multihash: bytes
    data: Bytes


def check_block(multihash: bytes, data: Bytes, limits: Limits) -> CheckedBlock:
    """The proof that these bytes belong to the multihash; needs no verifier, so blocks are hashed side by side.

    Raises BlockTooLarge, HashMismatch.
    """
    if len(data) > limits.max_block_bytes:
        raise BlockTooLarge(f"a block of {len(data)} bytes; {limits.max_block_bytes} are allowed")
    check_hash(multihash, data)
    return CheckedBlock(multihash, data)


class _Role(Enum):
    ROOT_FILE = auto()
    ROOT_DIRECTORY = auto()
    PART = auto()
    ENTRY = auto()
    SHARD = auto()


class _Want(NamedTuple):
    cid: CidParts
    role: _Role
    depth: int
    path: str
    offset: int = 0
    size: int | None = None
    fanout: int = 0
    hash_bits: int = 0
    names: set[str] | None = None


class _Place(NamedTuple):
    """Where the file bytes of a block lie in the output."""

    path: str
    offset: int
    size: int


class Verifier:
    """Assembles the file (or, with `directory=True`, all files) under a root from blocks of any origin.

    With `listing=True` as well only the directory itself: `entries` names its files, whose bytes are not asked for.
    Not thread-safe; use it from one thread at a time (`check_block`, the costly part, from any).
    """

    def __init__(
        self,
        root: Cid,
        output: Output,
        limits: Limits | None = None,
        *,
        directory: bool = False,
        listing: bool = False,
    ) -> None:
        """Raises UnsupportedCodec, UnsupportedHash, InsecureHash for the root; with an identity root anything."""
        self.limits = limits or Limits()
        self.files: dict[str, int] = {}
        """Sizes of the files found so far, by path; the single file has the empty path."""
        self.entries: dict[str, CidParts] = {}
        """Of a listing: the files by path, each by the content id that its directory names."""
        self.bytes_written = 0
        """Verified file bytes in the output."""
        self.node_bytes = 0
        """Bytes of all distinct nodes, without file data."""
        self.visited_bytes = 0
        """Bytes of all blocks used, repeats counted."""
        self.nodes: dict[bytes, Shell] = {}
        """Verified dag-pb blocks by multihash, in the order in which they came."""
        self._output, self._listing = output, listing
        self._wants: dict[bytes, list[_Want]] = {}
        self._leaves: dict[bytes, _Place] = {}
        self._inline: dict[bytes, _Place] = {}
        self._held: dict[bytes, bytes] = {}
        self._held_bytes = 0
        self._ready: list[tuple[_Want, bytes | None]] = []
        self._visits = 0
        self._total = 0
        self._bad_held: HashMismatch | None = None
        self._unsettled = True
        parts, _ = split_cid(cid_bytes(root))
        self._want(_Want(parts, _Role.ROOT_DIRECTORY if directory else _Role.ROOT_FILE, 0, ""))
        self._drain()
        self._unsettled = False

    @property
    def complete(self) -> bool:
        """Everything under the root is verified and written."""
        return not self._wants and not self._unsettled

    @property
    def size(self) -> int | None:
        """Bytes of the single file, known from the root block on."""
        return self.files.get("")

    def missing(self) -> Iterator[Wanted]:
        """The blocks that are wanted now, each place once, in no order."""
        for multihash, wants in self._wants.items():
            for want in wants:
                yield Wanted(multihash, want.cid.codec, want.path, want.offset, want.size)

    def wants(self, multihash: bytes) -> bool:
        """True for a block that is asked for and not yet there."""
        return multihash in self._wants

    def knows(self, multihash: bytes) -> bool:
        """True for a block that was verified before."""
        return multihash in self._leaves or multihash in self.nodes

    def place(self, multihash: bytes) -> Wanted | None:
        """Where the file bytes of a block stand that is asked for (its first place); None when nobody asks for it."""
        want = next(iter(self._wants.get(multihash, ())), None)
        return None if want is None else Wanted(multihash, want.cid.codec, want.path, want.offset, want.size)

    def leaf_offset(self, multihash: bytes) -> int | None:
        """Where a verified leaf stands in its file (its first place); None for what is no such leaf."""
        place = self._leaves.get(multihash)
        return None if place is None else place.offset

    def accept(self, multihash: bytes, data: Bytes) -> bool:
        """True when the block was wanted and is now used; False when nobody asks for it (nothing is looked at).

        Raises HashMismatch (state unchanged, another source may help), or what is wrong with the content itself.
        """
        return multihash in self._wants and self.use(check_block(multihash, data, self.limits))

    def use(self, block: CheckedBlock) -> bool:
        """As `accept`, for a block that was hashed already, perhaps in another thread."""
        multihash, data = block
        if multihash not in self._wants:
            return False
        self._unsettled = True  # for good, if an error of the content or the output ends this
        for want in self._wants.pop(multihash):
            self._visit(want, data)
        self._drain()
        self._unsettled = False
        self._complain()
        return True

    def hold(self, multihash: bytes, data: Bytes) -> None:
        """Keep an unasked-for block, unverified, in case its parent comes later. Raises TooManyExtraBytes."""
        if multihash in self._held:
            return
        self._held_bytes += len(data) + _SECTION_BYTES
        if self._held_bytes > self.limits.max_extra_bytes:
            raise TooManyExtraBytes(f"over {self.limits.max_extra_bytes} bytes of blocks that no link asks for")
        self._held[multihash] = bytes(data)

    def finish(self) -> None:
        """Nothing, when everything is there. Raises MissingBlock."""
        if not self.complete:
            first = next(iter(self._wants), b"").hex()[:20]
            raise MissingBlock(f"{len(self._wants)} blocks never came, {first}... first")

    # --- the walk -------------------------------------------------------------------------------------------------

    def _want(self, want: _Want) -> None:
        """Ask for a block, or line up the one we have."""
        check_policy(want.cid)
        self._visits += 1
        if self._visits > self.limits.max_visits:
            raise TooManyNodes(f"over {self.limits.max_visits} links to follow")
        if want.depth > self.limits.max_depth:
            raise DepthExceeded(f"links nested over {self.limits.max_depth} deep")
        key = want.cid.multihash
        if want.cid.hash_code == IDENTITY:
            self._ready.append((want, want.cid.digest))
        elif self.knows(key):
            self._ready.append((want, None))
        elif (data := self._from_held(key)) is not None:
            self._ready.append((want, data))
        else:
            self._wants.setdefault(key, []).append(want)

    def _from_held(self, key: bytes) -> bytes | None:
        """The early block, now that it is asked for; one that fails its hash is dropped and complained of later."""
        data = self._held.pop(key, None)
        if data is None:
            return None
        self._held_bytes -= len(data) + _SECTION_BYTES
        try:
            check_hash(key, data)
        except HashMismatch as err:
            self._bad_held = err
            return None
        return data

    def _complain(self) -> None:
        if self._bad_held is not None:
            err, self._bad_held = self._bad_held, None
            raise err

    def _drain(self) -> None:
        while self._ready:
            want, data = self._ready.pop()
            self._visit(want, self._recall(want.cid.multihash) if data is None else data)

    def _recall(self, multihash: bytes) -> bytes:
        if (place := self._leaves.get(multihash)) is not None:
            block = self._output.read(*place)
        else:
            shell, place = self.nodes[multihash], self._inline.get(multihash)
            block = shell.head + (self._output.read(*place) if place else b"") + shell.tail
        check_hash(multihash, block)
        return block

    def _visit(self, want: _Want, block: Bytes) -> None:
        self.visited_bytes += len(block) + _SECTION_BYTES
        if want.cid.codec == RAW:
            self._leaf(want, block)
            return
        node = decode_unixfs(block, self.limits)
        if node.kind in (Kind.FILE, Kind.RAW):
            self._file(want, node, block)
        else:
            self._remember_shell(want.cid, block, (len(block), len(block)))
            self._directory(want, node)

    def _leaf(self, want: _Want, block: Bytes) -> None:
        if want.role is _Role.ROOT_DIRECTORY:
            raise NotADirectory("the root is a file")
        if want.role is _Role.SHARD:
            raise UnixFSInvalid("a shard that is a raw block")
        self._begin_file(want, len(block))
        self._write(want, block, self._leaves)

    def _file(self, want: _Want, node: UnixFS, block: Bytes) -> None:
        if want.role is _Role.ROOT_DIRECTORY:
            raise NotADirectory("the root is a file")
        if want.role is _Role.SHARD:
            raise UnixFSInvalid("a shard that is a file")
        if self._listing:
            self._remember_shell(want.cid, block, (len(block), len(block)))
            self._list(want.path, want.cid)
            return
        self._begin_file(want, node.size)
        self._remember_shell(want.cid, block, node.data)
        start, end = node.data
        if end > start:
            self._write(want, memoryview(block)[start:end], self._inline)
        offset = want.offset + end - start
        children = []
        for link, size in zip(node.links, node.child_sizes, strict=True):
            children.append(_Want(link.cid, _Role.PART, want.depth + 1, want.path, offset, size))
            offset += size
        for child in reversed(children):  # the first child is on top of what is ready
            self._want(child)

    def _begin_file(self, want: _Want, size: int) -> None:
        """The size against what the parent said, or, for the root of a file, against the limit."""
        if want.size is not None:
            if size != want.size:
                raise UnixFSInvalid(f"a part of {size} bytes where its parent says {want.size}")
            return
        self._total += size
        if self._total > self.limits.max_size_bytes:
            raise SizeExceeded(
                f"{self._total} bytes; {self.limits.max_size_bytes} are allowed",
                limit_bytes=self.limits.max_size_bytes,
                have_bytes=self._total,
            )
        if len(self.files) >= self.limits.max_entries:
            raise TooManyNodes(f"over {self.limits.max_entries} files")
        self.files[want.path] = size
        self._output.begin(want.path, size)

    def _write(self, want: _Want, data: Bytes, places: dict[bytes, _Place]) -> None:
        self._output.write(want.path, want.offset, data)
        self.bytes_written += len(data)
        places.setdefault(want.cid.multihash, _Place(want.path, want.offset, len(data)))

    def _remember_shell(self, cid: CidParts, block: Bytes, data: tuple[int, int]) -> None:
        if cid.multihash in self.nodes or cid.hash_code == IDENTITY:
            return
        shell = Shell(bytes(block[: data[0]]), bytes(block[data[1] :]), data[1] - data[0])
        self.node_bytes += len(shell.head) + len(shell.tail)
        if self.node_bytes > self.limits.max_node_bytes:
            raise TooManyNodes(f"over {self.limits.max_node_bytes} bytes of nodes")
        self.nodes[cid.multihash] = shell
        self._output.node(cid.multihash, shell)

    # --- directories ----------------------------------------------------------------------------------------------

    def _directory(self, want: _Want, node: UnixFS) -> None:
        if want.role is _Role.ROOT_FILE:
            raise NotAFile("the root is a directory, not a file")
        if want.role is _Role.PART:
            raise UnixFSInvalid("a directory inside a file")
        if node.kind is Kind.HAMT_SHARD:
            self._shard(want, node)
            return
        if want.role is _Role.SHARD:
            raise UnixFSInvalid("a shard that is a plain directory")
        names: set[str] = set()
        for link in node.links:
            self._entry(want, link, link.name, names)

    def _shard(self, want: _Want, node: UnixFS) -> None:
        sub_shard = want.role is _Role.SHARD
        if sub_shard and node.fanout != want.fanout:
            raise UnixFSInvalid("the fanout changes between shards")
        hash_bits = (want.hash_bits if sub_shard else 0) + node.fanout.bit_length() - 1
        if hash_bits > _SHARD_HASH_BITS:
            raise DepthExceeded("shards nested deeper than their hash has bits")
        names = want.names if sub_shard and want.names is not None else set()
        for link in node.links:
            _, name = shard_entry(link, node.fanout)
            if name:
                self._entry(want, link, name, names)
            else:
                self._want(
                    _Want(link.cid, _Role.SHARD, want.depth + 1, want.path, 0, None, node.fanout, hash_bits, names)
                )

    def _entry(self, want: _Want, link: Link, raw_name: bytes | None, names: set[str]) -> None:
        name = safe_name(raw_name)
        if folded(name) in names:
            raise DuplicateName(
                "two directory entries with the same name, or names that some system takes for the same"
            )
        names.add(folded(name))
        path = f"{want.path}/{name}" if want.path else name
        if self._listing and link.cid.codec == RAW:
            check_policy(link.cid)
            self._list(path, link.cid)
            return
        self._want(_Want(link.cid, _Role.ENTRY, want.depth + 1, path))

    def _list(self, path: str, cid: CidParts) -> None:
        if len(self.entries) >= self.limits.max_entries:
            raise TooManyNodes(f"over {self.limits.max_entries} files")
        self.entries[path] = cid


class CarStream:
    """One CAR answer poured into a verifier: `feed` its pieces, then `finish` for a cut inside a section.

    What the DAG still lacks after it, `Verifier.finish` or `Verifier.missing` tells. Several streams may feed one
    verifier from threads of their own when they share a lock: blocks are hashed outside it.
    """

    def __init__(
        self, verifier: Verifier, lock: AbstractContextManager[object] | None = None, span: range | None = None
    ) -> None:
        """`span`: the bytes of the file that were asked for."""
        self._verifier, self._lock, self._span = verifier, lock or nullcontext(), span
        self._reader = CarReader(verifier.limits)
        self._received = 0
        self.last: Wanted | None = None
        """The block that was used last, with its place."""
        self.outside_bytes = 0
        """Of leaves that came although they lie outside the span."""

    def feed(self, piece: Bytes) -> None:
        """Verify and write what ends in this piece.

        Raises CarMalformed, BlockTooLarge, TooManyExtraBytes, HashMismatch (the source's fault), or ContentInvalid of
        another kind (the content's fault).
        """
        verifier = self._verifier
        for cid, data in self._reader.feed(piece):
            self._received += len(data) + _SECTION_BYTES
            block = check_block(cid.multihash, data, verifier.limits) if verifier.wants(cid.multihash) else None
            with self._lock:
                place = verifier.place(cid.multihash)
                offset = verifier.leaf_offset(cid.multihash) if place is None else place.offset
                if self._span and offset is not None and cid.codec == RAW and offset not in self._span:
                    self.outside_bytes += len(data)
                if block is not None and verifier.use(block):
                    self.last = place
                elif not verifier.accept(cid.multihash, data):  # asked for by now, when another stream brought its node
                    self._unasked(cid, data)

    def finish(self) -> None:
        """Nothing, when the answer ended between sections. Raises Truncated."""
        self._reader.finish()

    def _unasked(self, cid: CidParts, data: memoryview) -> None:
        verifier = self._verifier
        if not verifier.knows(cid.multihash):
            verifier.hold(cid.multihash, data)
        # Repeats of verified blocks: as many as the whole DAG sent once more, and its nodes for each of 8 ranges.
        due = max(verifier.visited_bytes, (verifier.size or 0) * 21 // 20) + 8 * verifier.node_bytes
        if self._received > due + verifier.limits.max_extra_bytes:
            raise TooManyExtraBytes("far more bytes than the content has")
