"""From a CID to a verified file: the cache first, then the sources, each byte checked before it is written.

Rules:

1. The size is refused from the root block, before the transfer (`SizeExceeded`).
2. Unverified bytes never reach a file; the final name appears when everything is there, by rename.
3. What is verified can be used from its start while the rest is on its way (`Arrival`); a `VerifiedBlob` is its end.
4. Concurrent fetches of one content share one transfer; it ends when the last who waits for it leaves.
5. Every failure is a StorageFailed that names the CID and the host of the source.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

from divault.errors import ContentInvalid, NotAFile, StorageFailed
from divault.ipfs.cid import DAG_PB, check_policy, multihash
from divault.ipfs.limits import Limits
from divault.ipfs.verifier import Verifier
from divault.storage.arrival import Arrival, Flow, FolderArrival, Progress
from divault.storage.cache import CiphertextCache, Entry, Part
from divault.storage.folders import fetch_folder, kept_folder
from divault.storage.source import Storage
from divault.storage.threads import in_thread
from divault.storage.transfer import NODE_REASONS, SOURCE_FAULTS, Quarantine, Transfer, named
from divault.values import Cid, VerifiedBlob, VerifiedFolder


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
        self._flows: dict[tuple[int, bytes], Flow] = {}
        self._quarantine = Quarantine()

    async def fetch(self, cid: Cid, *, progress: Progress | None = None) -> VerifiedBlob:
        """The verified file, kept from eviction while the returned object lives.

        From the cache when it is there (every byte hashed again), else from the sources. Raises StorageFailed with the
        reason, ContentInvalid where bytes or structure were refused: SizeExceeded, NotAFile for a directory, ...
        """
        async with self.file(cid, progress=progress) as arrival:
            return await arrival.blob()

    def file(self, cid: Cid, *, progress: Progress | None = None) -> Arrival:
        """The file while it comes, as a context manager; what is wrong shows when it is waited for, as in `fetch`."""
        _check(cid)
        key = (cid.codec, multihash(cid))
        flow = self._flows.get(key)
        if flow is None:
            flow = self._flows[key] = Flow(partial(self._obtain, cid))
        if progress is not None:
            flow.listeners.append(progress)
        return Arrival(cid, flow, partial(self._leave, key, flow))

    @asynccontextmanager
    async def arriving(self, cid: Cid) -> AsyncIterator[Arrival | FolderArrival]:
        """What the root is while it comes: a file, or a directory whose list is complete. Raises as `fetch`."""
        _check(cid)
        folder = await in_thread(kept_folder, cid, self._cache, self._limits) if cid.codec == DAG_PB else None
        if folder is None:
            async with self.file(cid) as arrival:
                if await _is_file(arrival):
                    yield arrival
                    return
            folder = await self._folder(cid)
        yield FolderArrival(folder, self.file)

    async def _folder(self, cid: Cid) -> VerifiedFolder:
        try:
            return await fetch_folder(cid, self._sources, self._cache, self._limits, self._quarantine)
        except StorageFailed as err:
            raise named(err, cid) from err

    async def _leave(self, key: tuple[int, bytes], flow: Flow) -> None:
        """The last waiter goes: nobody needs the transfer any more."""
        if self._flows.get(key) is flow:
            del self._flows[key]
        await flow.end()

    async def _obtain(self, cid: Cid, flow: Flow) -> Entry:
        loop = asyncio.get_running_loop()
        entry = await in_thread(
            self._cache.open, cid, self._limits, lambda stored: loop.call_soon_threadsafe(flow.at, stored)
        )
        if entry is not None:
            return entry
        try:
            # Not in a thread: it opens two files at most, and a part that nobody takes over would stay open.
            return await self._download(cid, self._cache.begin(cid), flow)
        except StorageFailed as err:
            raise named(err, cid) from err

    async def _download(self, cid: Cid, part: Part, flow: Flow) -> Entry:
        keep = False
        try:
            verifier = Verifier(cid, part, self._limits)
            keep = True
            await in_thread(part.restore, verifier)
            flow.at(part)
            await Transfer(cid, self._sources, verifier, part, flow.progress, self._quarantine).run()
            return await in_thread(part.commit, verifier)
        except StorageFailed as err:
            refused = isinstance(err, ContentInvalid) and not isinstance(err, SOURCE_FAULTS)
            keep = not refused and err.data.get("reason") not in NODE_REASONS
            raise
        finally:
            part.close(remove=not (keep and verifier.bytes_written))


def _check(cid: Cid) -> None:
    try:
        check_policy(cid)
    except ContentInvalid as err:
        raise named(err, cid) from err


async def _is_file(arrival: Arrival) -> bool:
    """Once its root block is verified. Raises what else is wrong with it."""
    try:
        await arrival.size()
    except NotAFile:
        return False
    return True
