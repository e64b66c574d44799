"""A process of its own that serves paid calls from a ledger, to be killed.

`python -m tests.ledger_child FOLDER POINT [session]`. It says `at POINT` and then stands still there, in whatever
thread it is; without a point it serves call after call and says `answered N SHA256` after each.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
import time
from pathlib import Path
from typing import Any

from divault.state import State
from divault.values import Hold, SignedCall
from tests.counter import PRICE, Counter, digest_of, of_session, signed

POINTS = (
    "before-write-1",
    "inside-write-1",
    "after-write-1",
    "running",
    "before-write-2",
    "inside-write-2",
    "after-write-2",
    "before-answer",
)
"""Reserve is the first write, charge the second; "inside" is in its transaction, before the commit."""


LOGIN = digest_of("a session")


def call_number(counter: Counter, number: int, *, session: bool = False) -> SignedCall:
    """The same call in every process: a transfer of its own, and its nonce, or its idempotency key."""
    tx = counter.chain.pay(PRICE.atomic)
    return of_session(LOGIN, f"crash {number}", tx=tx) if session else signed(tx=tx, nonce=f"crash {number}")[1]


def stand_still(name: str, wanted: str) -> None:
    if name == wanted:
        print(f"at {name}", flush=True)  # noqa: T201 - what the parent waits for
        time.sleep(600)


def stop_at(point: str) -> None:
    """Wrap `State.write` so that this process stops at the point."""
    original, seen = State.write, 0

    async def write(self: State, work: Any, then: Any = None, **how: Any) -> Any:
        nonlocal seen
        seen += 1
        number = seen

        def inside(db: Any) -> Any:
            result = work(db)
            stand_still(f"inside-write-{number}", point)
            return result

        stand_still(f"before-write-{number}", point)
        result = await original(self, inside, then, **how)
        stand_still(f"after-write-{number}", point)
        return result

    State.write = write  # type: ignore[method-assign]  # this process exists to be stopped there


async def serve_one(folder: Path, point: str, *, session: bool) -> None:
    if session:
        async with Counter(folder) as counter:
            await counter.allow(LOGIN, 2 * PRICE.atomic)
    stop_at(point)

    async def work(_: Hold) -> bytes:
        stand_still("running", point)
        return b'"from the child"'

    async with Counter(folder) as counter:
        await counter.infer(call_number(counter, 0, session=session), work)
        stand_still("before-answer", point)


async def serve_many(folder: Path) -> None:
    async with Counter(folder) as counter:

        async def one(number: int) -> None:
            answer = await counter.infer(call_number(counter, number))
            print("answered", number, hashlib.sha256(answer.body).hexdigest(), flush=True)  # noqa: T201

        for first in range(0, 10_000, 4):
            await asyncio.gather(*(one(first + n) for n in range(4)))


if __name__ == "__main__":
    told = [*sys.argv[1:], "", ""]
    one = serve_one(Path(told[0]), told[1], session=told[2] == "session") if told[1] else serve_many(Path(told[0]))
    asyncio.run(one)
