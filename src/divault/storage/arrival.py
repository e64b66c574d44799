"""A file on its way: what of it is verified so far, for those who can use its beginning before its end is there.

This module alone makes `VerifiedBlob`, after the last block of the DAG was verified.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Callable, Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from divault.errors import DivaultError
from divault.storage.cache import Entry, OnDisk
from divault.values import Cid, VerifiedBlob, VerifiedFolder

Progress = Callable[[int, int], None]
"""Called with verified bytes and total bytes, from the event loop."""


class FileReplaced(Exception):
    """The cached file was found damaged on the way; the content comes anew, in another file: begin again."""


class Flow:
    """One transfer, or the check of a cached file, and those who wait for it. It ends when the last of them leaves."""

    def __init__(self, work: Callable[[Flow], Coroutine[Any, Any, Entry]]) -> None:
        self.listeners: list[Progress] = []
        self.waiting = 0
        self.stored: OnDisk | None = None
        self.moved = asyncio.Event()
        self.task = asyncio.create_task(work(self))
        self.task.add_done_callback(lambda _: self._tell())

    def at(self, stored: OnDisk) -> None:
        """The content is in this file, as far as its prefix goes."""
        self.stored = stored
        self._tell()

    def progress(self, done: int, total: int) -> None:
        """Pass on to whoever listens now."""
        for listener in self.listeners:
            listener(done, total)
        self._tell()

    def outcome(self) -> Entry:
        """What the work gave, now that it is done. Raises what it raised, each caller an error of his own."""
        try:
            return self.task.result()
        except DivaultError as err:
            raise err.copy() from err

    def _tell(self) -> None:
        self.moved.set()
        self.moved = asyncio.Event()

    async def end(self) -> None:
        """Stop the work; its own hold on the entry ends."""
        self.task.cancel()
        (outcome,) = await asyncio.gather(self.task, return_exceptions=True)
        if isinstance(outcome, Entry):
            outcome.close()


class Arrival:
    """A caller's share in a flow. Use it as an async context manager, from one task."""

    def __init__(self, cid: Cid, flow: Flow, leave: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.cid = cid
        self._flow, self._leave = flow, leave
        self._stored: OnDisk | Entry | None = None
        self._fd = -1

    async def __aenter__(self) -> Self:
        self._flow.waiting += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restart()
        self._flow.waiting -= 1
        if not self._flow.waiting:
            await self._leave()

    @property
    def fd(self) -> int:
        """Of the file, after `upto` gave something: read it by position, and only below what `upto` said.

        It keeps the file from eviction while this object is in use.
        """
        return self._fd

    async def size(self) -> int:
        """Bytes of the file, known and within the limits once the root block is verified. Raises as `Fetcher.fetch`."""
        while not self._flow.task.done():
            stored, moved = self._flow.stored, self._flow.moved
            if stored is not None and stored.expected is not None:
                return stored.expected
            await moved.wait()
        return self._flow.outcome().size

    async def upto(self, count: int) -> int:
        """How many bytes from the start are verified, once they are `count` or all.

        Raises as `Fetcher.fetch`, and FileReplaced.
        """
        while not self._flow.task.done():
            stored, moved = self._flow.stored, self._flow.moved
            if stored is not None and stored.expected is not None:
                ready = stored.prefix
                if ready >= min(count, stored.expected):
                    self._hold(stored)
                    return ready
            await moved.wait()
        entry = self._flow.outcome()
        self._hold(self._flow.stored or entry)
        return entry.size

    async def blob(self) -> VerifiedBlob:
        """The file, complete; kept from eviction while the returned object lives. Raises as `Fetcher.fetch`."""
        await asyncio.wait([self._flow.task])
        entry = self._flow.outcome()
        blob = VerifiedBlob(self.cid, entry.path, entry.size)
        weakref.finalize(blob, os.close, os.dup(entry.fd))
        return blob

    def restart(self) -> None:
        """After FileReplaced: forget the file that was read so far."""
        with suppress(OSError):
            os.close(self._fd)
        self._stored, self._fd = None, -1

    def _hold(self, stored: OnDisk | Entry) -> None:
        if self._stored is None:
            self._stored, self._fd = stored, os.dup(stored.fd)
        elif self._stored is not stored:
            raise FileReplaced


class FolderArrival:
    """A directory whose list is verified, and whose files come when they are asked for."""

    def __init__(self, folder: VerifiedFolder, file: Callable[[Cid], Arrival]) -> None:
        self.folder = folder
        self._file = file

    @property
    def cid(self) -> Cid:
        """Of the directory."""
        return self.folder.cid

    @property
    def names(self) -> tuple[str, ...]:
        """Paths of its files, in order."""
        return tuple(name for name, _ in self.folder.files)

    def file(self, name: str) -> Arrival:
        """The file of that path; use it as an async context manager."""
        return self._file(dict(self.folder.files)[name])
