"""What a directory holds: its dag-pb blocks fetched, verified and kept, the bytes of its files left alone.

This module alone makes `VerifiedFolder`, after the last block of the directory was verified. The rules of names, shards
and limits are the verifier's.
"""

from __future__ import annotations

from collections.abc import Sequence

from divault.errors import ContentInvalid
from divault.ipfs.car import car_header, car_section
from divault.ipfs.cid import DAG_PB, cid_bytes, make_cid
from divault.ipfs.limits import Limits
from divault.ipfs.verifier import Bytes, CarStream, Shell, Verifier
from divault.storage.cache import CiphertextCache
from divault.storage.source import Storage
from divault.storage.threads import in_thread
from divault.storage.transfer import Quarantine, Transfer
from divault.values import Cid, VerifiedFolder


class _Blocks:
    """Output of a listing: its blocks, as they came."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, bytes] = {}

    def begin(self, path: str, size: int) -> None:
        """A listing begins no file."""

    def node(self, multihash: bytes, shell: Shell) -> None:
        """Keep the block; a listing has no file data inside."""
        self.blocks[multihash] = shell.head

    def write(self, path: str, offset: int, data: Bytes) -> None:
        """A listing writes no file."""

    def read(self, path: str, offset: int, size: int) -> bytes:  # noqa: ARG002  # nothing was written
        """Nothing."""
        return b""

    def flush(self) -> None:
        """Nothing is held back."""


async def fetch_folder(
    cid: Cid, sources: Sequence[Storage], cache: CiphertextCache, limits: Limits, quarantine: Quarantine
) -> VerifiedFolder:
    """The files below a directory, from the sources; its blocks are kept in the cache.

    Raises StorageFailed, and ContentInvalid of a kind that says what is wrong: UnsafeName, SymlinkRefused, ...
    """
    output = _Blocks()
    verifier = Verifier(cid, output, limits, directory=True, listing=True)
    await Transfer(cid, sources, verifier, output, _to_nobody, quarantine).run()
    await in_thread(cache.keep_folder, cid, _car_of(cid, output))
    return _proof(cid, verifier)


def kept_folder(cid: Cid, cache: CiphertextCache, limits: Limits) -> VerifiedFolder | None:
    """The files below a directory, as the cache kept it and verified anew; a damaged one is dropped. Blocking."""
    kept = cache.folder(cid)
    if kept is None:
        return None
    try:
        return read_folder(cid, kept, limits)
    except ContentInvalid:
        cache.keep_folder(cid, None)
        return None


def read_folder(cid: Cid, car: bytes, limits: Limits) -> VerifiedFolder:
    """The files below a directory whose blocks are in this CAR. Raises ContentInvalid for anything amiss."""
    verifier = Verifier(cid, _Blocks(), limits, directory=True, listing=True)
    stream = CarStream(verifier)
    stream.feed(car)
    stream.finish()
    verifier.finish()
    return _proof(cid, verifier)


def _car_of(cid: Cid, output: _Blocks) -> bytes:
    codec = bytes([1, DAG_PB])
    sections = (car_section(codec + key, data) for key, data in output.blocks.items())
    return car_header([cid_bytes(cid)]) + b"".join(sections)


def _proof(cid: Cid, verifier: Verifier) -> VerifiedFolder:
    named = ((path, make_cid(1, p.codec, p.hash_code, p.digest)) for path, p in sorted(verifier.entries.items()))
    return VerifiedFolder(cid, tuple(named))


def _to_nobody(done: int, total: int) -> None:
    """A list has no progress worth telling."""
