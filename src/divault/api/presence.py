"""Who is still there: a call whose client hung up is cancelled, without a cost for those that are answered quickly.

Rules:

1. A call is looked at when it is 50 ms old, and watched from then on; a quicker one never is.
2. A client that hangs up cancels its call: what waits is taken out of its queue, what runs alone is finished unseen.
3. Nobody's hanging up touches another call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.types import Receive

LOOK_AFTER_S = 0.05


@dataclass(slots=True, eq=False)
class _Guest:
    task: asyncio.Task[None]
    receive: Receive
    since: float
    watcher: asyncio.Task[None] | None = None
    gone: bool = False


class Presence:
    """The calls under way. For one event loop."""

    def __init__(self) -> None:
        self._guests: dict[int, _Guest] = {}
        self._next: asyncio.TimerHandle | None = None

    @contextmanager
    def of(self, receive: Receive) -> Iterator[None]:
        """Cancel the current task when the client behind `receive` hangs up while the context lasts.

        A cancellation for that reason ends with the context; any other goes on.
        """
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("calls run in tasks")
        loop = asyncio.get_running_loop()
        guest = _Guest(task, receive, loop.time())
        self._guests[id(guest)] = guest
        if self._next is None:
            self._next = loop.call_later(LOOK_AFTER_S, self._look)
        try:
            yield
        except asyncio.CancelledError:
            if not guest.gone:
                raise
            task.uncancel()
        finally:
            del self._guests[id(guest)]
            if guest.watcher is not None:
                guest.watcher.cancel()

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        for guest in self._guests.values():
            if loop.time() - guest.since < LOOK_AFTER_S:
                break
            if guest.watcher is None:
                guest.watcher = loop.create_task(_watch(guest))
        self._next = loop.call_later(LOOK_AFTER_S, self._look) if self._guests else None


async def _watch(guest: _Guest) -> None:
    while (await guest.receive())["type"] != "http.disconnect":
        pass
    guest.gone = True
    guest.task.cancel()
