"""Threads that fetch and hash: they give way to what answers callers, and to the process that opens what they fetch."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
NICE = 5
"""A third of the share of a process that competes for the same core; all of a core that is free."""
_MOST = 16
"""More wait for the same few cores and one disk."""


def background_pool(most: int, name: str) -> ThreadPoolExecutor:
    """Threads of low priority. They keep it: without privileges it can't be raised again."""
    return ThreadPoolExecutor(most, thread_name_prefix=name, initializer=_give_way)


def _give_way() -> None:
    with contextlib.suppress(OSError):  # where priorities are not per thread, all stay equal
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


_THREADS = background_pool(_MOST, "storage")


async def in_thread(step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The blocking step in a thread. Cancelling waits for its end: it may be writing to a file that we close next."""
    work = asyncio.wrap_future(_THREADS.submit(step, *args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([work])
        work.exception()  # looked at, so that nobody complains about it
        raise
