"""From a CID to a verified file: the cache first, then the sources, each byte checked before it is written.

Rules:

1. A `VerifiedBlob` is made here and nowhere else, after the last block of its DAG was verified.
2. The size is refused from the root block, before the transfer (`SizeExceeded`).
3. Unverified bytes never reach a file; the final name appears when everything is there, by rename.
4. Concurrent fetches of one content share one transfer; it ends when the last who waits for it leaves.
5. Every failure is a StorageFailed that names the CID and the host of the source.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from divault.errors import ContentInvalid, StorageFailed
from divault.ipfs.cid import check_policy, multihash
from divault.ipfs.limits import Limits
from divault.ipfs.verifier import Verifier
from divault.storage.cache import CiphertextCache, Entry, Part
from divault.storage.source import Storage
from divault.storage.transfer import NODE_REASONS, SOURCE_FAULTS, Progress, Quarantine, Transfer, in_thread, named
from divault.values import Cid, VerifiedBlob


@dataclass(slots=True)
class _Running:
    """A transfer and those who wait for it."""

    task: asyncio.Task[Entry]
    waiting: int = 0
    listeners: list[Progress] = field(default_factory=list)


class Fetcher:
    """Fetches files by CID. Use it from one event loop."""

    def __init__(
        self,
        sources: Sequence[Storage],
        cache: CiphertextCache,
        *,
        max_model_bytes: int,
        limits: Limits | None = None,
    ) -> None:
        """Sources are asked in this order; `max_model_bytes` bounds a file (it replaces `limits.max_size_bytes`)."""
        self._sources, self._cache = tuple(sources), cache
        self._limits = replace(limits or Limits(), max_size_bytes=max_model_bytes)
        self._running: dict[tuple[int, bytes], _Running] = {}
        self._quarantine = Quarantine()

    async def fetch(self, cid: Cid, *, progress: Progress | None = None) -> VerifiedBlob:
        """The verified file, kept from eviction while the returned object lives.

        From the cache when it is there (every byte hashed again), else from the sources. Raises StorageFailed with the
        reason, ContentInvalid where bytes or structure were refused: SizeExceeded, NotAFile for a directory, ...
        """
        try:
            check_policy(cid)
        except ContentInvalid as err:
            raise named(err, cid) from err
        path, size, lock = await self._shared(cid, progress)
        blob = VerifiedBlob(cid, path, size)
        weakref.finalize(blob, os.close, lock)
        return blob

    async def _shared(self, cid: Cid, progress: Progress | None) -> tuple[Path, int, int]:
        """Path, size and a descriptor of our own that shares the entry's lock."""
        key = (cid.codec, multihash(cid))
        running = self._running.get(key)
        if running is None:
            running = _Running(asyncio.create_task(self._obtain(cid, key)))
            self._running[key] = running
        if progress is not None:
            running.listeners.append(progress)
        running.waiting += 1
        try:
            entry = await asyncio.shield(running.task)
            return entry.path, entry.size, os.dup(entry.fd)
        finally:
            running.waiting -= 1
            if not running.waiting:
                await self._leave(key, running)

    async def _leave(self, key: tuple[int, bytes], running: _Running) -> None:
        """The last waiter goes: nobody needs the transfer any more, and its own hold on the entry ends."""
        if self._running.get(key) is running:
            del self._running[key]
        running.task.cancel()
        (outcome,) = await asyncio.gather(running.task, return_exceptions=True)
        if isinstance(outcome, Entry):
            outcome.close()

    async def _obtain(self, cid: Cid, key: tuple[int, bytes]) -> Entry:
        entry = await in_thread(self._cache.open, cid, self._limits)
        if entry is not None:
            return entry
        try:
            return await self._download(cid, await in_thread(self._cache.begin, cid), self._tell(key))
        except StorageFailed as err:
            raise named(err, cid) from err

    async def _download(self, cid: Cid, part: Part, progress: Progress) -> Entry:
        keep = False
        try:
            verifier = Verifier(cid, part, self._limits)
            keep = True
            await in_thread(part.restore, verifier)
            await Transfer(cid, self._sources, verifier, part, progress, self._quarantine).run()
            return await in_thread(part.commit, verifier)
        except StorageFailed as err:
            refused = isinstance(err, ContentInvalid) and not isinstance(err, SOURCE_FAULTS)
            keep = not refused and err.data.get("reason") not in NODE_REASONS
            raise
        finally:
            part.close(remove=not (keep and verifier.bytes_written))

    def _tell(self, key: tuple[int, bytes]) -> Progress:
        def tell(done: int, total: int) -> None:
            """Pass on to whoever listens now."""
            running = self._running.get(key)
            for listener in running.listeners if running else ():
                listener(done, total)

        return tell
