"""What was read at a block hash never changes, so it is read once: a bounded cache; concurrent misses share a read.

Keys hold the block hash; nothing is ever invalidated, only forgotten. A new head means new keys.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from divault.errors import DivaultError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class BlockCache(Generic[K, V]):
    """At most `limit` values, the least recently used forgotten first. For one event loop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: OrderedDict[K, V] = OrderedDict()
        self._reading: dict[K, asyncio.Task[V]] = {}

    def __len__(self) -> int:
        return len(self._values)

    async def get(self, key: K, read: Callable[[], Awaitable[V]]) -> V:
        """The value of the key, read by `read` if it isn't here; a failed read is not kept.

        Everyone who asks meanwhile shares that read, and it goes on when the one who began it is cancelled.
        Raises what `read` raises, each caller an error of his own.
        """
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        task = self._reading.get(key)
        if task is None:
            task = asyncio.ensure_future(self._read(key, read))
            self._reading[key] = task
            task.add_done_callback(lambda done: self._finished(key, done))
        try:
            return await asyncio.shield(task)
        except DivaultError as err:
            raise err.copy() from err

    def put(self, key: K, value: V) -> None:
        """Keep a value that was read otherwise."""
        self._values[key] = value
        if len(self._values) > self._limit:
            self._values.popitem(last=False)

    async def _read(self, key: K, read: Callable[[], Awaitable[V]]) -> V:
        value = await read()
        self.put(key, value)
        return value

    def _finished(self, key: K, task: asyncio.Task[V]) -> None:
        self._reading.pop(key, None)
        if not task.cancelled():
            task.exception()  # seen, even when every caller has left


class Asked(Generic[K, V]):
    """What was asked for lately, each once: the newest `most` of it, to be read ahead."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: dict[K, V] = {}

    def note(self, key: K, value: V) -> None:
        """It is asked for now."""
        self._values.pop(key, None)
        self._values[key] = value
        if len(self._values) > self._most:
            del self._values[next(iter(self._values))]

    def take(self) -> list[V]:
        """All of it, and begin anew."""
        found, self._values = list(self._values.values()), {}
        return found
