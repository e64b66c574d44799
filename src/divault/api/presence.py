"""Who is still there: a call whose client hung up is cancelled, without a cost for those that are answered quickly.

Rules:

1. A call is looked at when it is 50 ms old, and watched from then on; a quicker one never is.
2. A client that hangs up cancels its call: what waits is taken out of its queue, what runs alone is finished unseen.
3. Nobody's hanging up touches another call.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager
from dataclasses import dataclass

from starlette.types import Receive

LOOK_AFTER_S = 0.05


@dataclass(slots=True, eq=False)
class _Guest:
    """One call, and the context of it."""

    presence: Presence
    task: asyncio.Task[None]
    receive: Receive
    since: float
    watcher: asyncio.Task[None] | None = None
    gone: bool = False

    def __enter__(self) -> None:
        self.presence.enter(self)

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        self.presence.leave(self)
        hung_up = self.gone and isinstance(error, asyncio.CancelledError)
        if hung_up:
            self.task.uncancel()
        return hung_up


class Presence:
    """The calls under way. For one event loop."""

    def __init__(self) -> None:
        self._guests: dict[int, _Guest] = {}
        self._next: asyncio.TimerHandle | None = None

    def of(self, receive: Receive) -> AbstractContextManager[None]:
        """A context that cancels the current task when the client behind `receive` hangs up while it lasts.

        A cancellation for that reason ends with the context; any other goes on.
        """
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("calls run in tasks")
        return _Guest(self, task, receive, asyncio.get_running_loop().time())

    def enter(self, guest: _Guest) -> None:
        """A call has begun."""
        self._guests[id(guest)] = guest
        if self._next is None:
            self._next = asyncio.get_running_loop().call_later(LOOK_AFTER_S, self._look)

    def leave(self, guest: _Guest) -> None:
        """It has ended."""
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
