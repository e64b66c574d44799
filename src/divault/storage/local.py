"""Blocks in a directory: a content store for one machine, and a source like any other.

A block is a file named by its multihash (hex), in one of 256 folders. It is checked when it comes in; whoever fetches
from here checks again, so damage on the disk is found there. Writes are atomic per block and not synced to the disk.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

from divault.errors import CarMalformed, ContentInvalid, MissingBlock, StorageFailed
from divault.ipfs.car import CarReader, car_header, car_section
from divault.ipfs.cid import IDENTITY, check_hash, check_policy, cid_bytes, multihash, parse_cid_bytes
from divault.ipfs.importer import UNIXFS_V1_2025, Importer, Profile
from divault.ipfs.walk import file_bytes, file_size, raw_cid, walk
from divault.storage.source import Form, refused
from divault.values import Cid

_READ_BYTES = 1024 * 1024
_TINY_BYTES = 64 * 1024
"""Smaller pieces are gathered to this size: handing one over costs about as much as copying it."""


class LocalStore:
    """A directory of blocks. Safe for several threads and processes."""

    def __init__(self, directory: Path) -> None:
        """Makes the directory (0700) where it does not exist. Raises StorageFailed."""
        self._blocks = directory / "blocks"
        try:
            self._blocks.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as err:
            raise StorageFailed(f"the local store can't be made: {err.strerror}", reason="disk") from err

    @property
    def trustless(self) -> bool:
        """Always."""
        return True

    @property
    def name(self) -> str:
        """How errors call it."""
        return "local store"

    def get(self, key: bytes) -> bytes:
        """The block with this multihash. Raises MissingBlock."""
        try:
            return self._path(key).read_bytes()
        except OSError as err:
            raise MissingBlock(f"the local store lacks block {key.hex()[:20]}...") from err

    def size(self, cid: Cid) -> int:
        """Bytes of the file under the CID. Raises MissingBlock, NotAFile, or what is wrong with its root."""
        return file_size(cid, self.get)

    def put_block(self, key: bytes, data: bytes | bytearray | memoryview) -> None:
        """Keep a block. Raises HashMismatch, StorageFailed."""
        check_hash(key, data)
        self._keep(key, data)

    def importer(self, profile: Profile = UNIXFS_V1_2025) -> Importer:
        """For a file that comes in pieces: `update` with each, then `finish`. Both raise StorageFailed."""
        return Importer([profile], lambda block: self._keep(block.cid[-34:], block.data))

    def put_file(self, source: BinaryIO, profile: Profile = UNIXFS_V1_2025) -> Cid:
        """Import a file, read to its end; its root CID. Raises StorageFailed."""
        importer = self.importer(profile)
        while piece := source.read(_READ_BYTES):
            importer.update(piece)
        return importer.finish()[profile]

    async def read(self, cid: Cid, ranges: Sequence[range] = (), form: Form = Form.CAR) -> AsyncGenerator[bytes, None]:
        """See `Storage.read`."""
        pieces = gathered(self.pieces(cid, ranges, form))
        while (piece := await asyncio.to_thread(partial(_next, self, cid, pieces))) is not None:
            yield piece

    def pieces(self, cid: Cid, ranges: Sequence[range], form: Form) -> Iterator[bytes | memoryview]:
        """The same, blocking, in the sizes of the blocks. Raises what is missing or wrong."""
        check_policy(cid)
        if form is Form.BLOCK:
            yield cid.digest if cid.hash_code == IDENTITY else self.get(multihash(cid))
        elif form is Form.FILE:
            yield from file_bytes(cid, self.get, ranges)
        else:
            yield from self._car(cid, ranges)

    def _car(self, cid: Cid, ranges: Sequence[range]) -> Iterator[bytes]:
        header = car_header([cid_bytes(cid)])
        for piece in walk(cid, self.get, ranges):
            section = b"" if piece.cid.hash_code == IDENTITY else car_section(raw_cid(piece.cid), piece.block)
            yield header + section
            header = b""

    def _keep(self, key: bytes, data: bytes | bytearray | memoryview) -> None:
        path = self._path(key)
        if path.exists():
            return
        temporary = path.with_name(f".{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            try:
                temporary.write_bytes(data)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as err:
            raise StorageFailed(f"the local store can't be written: {err.strerror}", reason="disk") from err

    def _path(self, key: bytes) -> Path:
        return self._blocks / key[-1:].hex() / key.hex()


class CarImport:
    """A CAR on its way into a store, in pieces. Each block is checked and kept as it comes."""

    def __init__(self, store: LocalStore) -> None:
        self._store, self._reader = store, CarReader()

    def update(self, piece: bytes) -> None:
        """Raises CarMalformed, HashMismatch, UnsupportedHash and the like, StorageFailed."""
        for section in self._reader.feed(piece):
            check_policy(section.cid)
            if section.cid.hash_code != IDENTITY:
                self._store.put_block(section.cid.multihash, section.data)

    def finish(self) -> Cid:
        """The one root that the header names, once everything under it is here.

        Raises Truncated, CarMalformed, MissingBlock, or what is wrong with the DAG.
        """
        self._reader.finish()
        if self._reader.roots is None or len(self._reader.roots) != 1:
            raise CarMalformed("a CAR for import names exactly one root")
        root = parse_cid_bytes(raw_cid(self._reader.roots[0]))
        for _ in walk(root, self._store.get):
            pass
        return root


def gathered(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """The same bytes in pieces of at least 64 KiB, but for the last."""
    small = bytearray()
    for piece in pieces:
        if len(piece) >= _TINY_BYTES and not small:
            yield bytes(piece)
            continue
        small += piece
        if len(small) >= _TINY_BYTES:
            yield bytes(small)
            small.clear()
    if small:
        yield bytes(small)


def _next(store: LocalStore, cid: Cid, pieces: Iterator[bytes]) -> bytes | None:
    try:
        return next(pieces, None)
    except MissingBlock as err:
        raise refused(store.name, cid, "not_found", err.detail) from err
    except ContentInvalid as err:
        raise refused(store.name, cid, "unsupported", err.detail) from err
