"""Bodies that don't come: whoever stops sending holds nothing that others need, and is dropped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import orjson
from starlette.types import Message, Receive, Scope, Send

from divault.api.guard import Guard
from divault.api.measured import Measured, Routes
from divault.limits import PeerLimits
from divault.metrics import Metrics

MAX = 1 << 20


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"%d" % len(body)})


async def call(guard: Guard, pieces: Iterable[bytes], declared: int, *, then: asyncio.Event | None = None) -> Any:
    """Send these pieces, and with `then` no end before it happens; gives status and body."""
    answer: list[Message] = []
    headers = [(b"content-length", str(declared).encode())]
    scope = {"type": "http", "client": ("peer", 1), "headers": headers, "method": "POST", "path": "/"}

    async def messages() -> AsyncIterator[Message]:
        for piece in pieces:
            yield {"type": "http.request", "body": piece, "more_body": True}
        if then is not None:
            await then.wait()
        yield {"type": "http.request", "body": b"", "more_body": False}

    coming = messages()

    async def send(message: Message) -> None:
        answer.append(message)

    await guard(scope, lambda: anext(coming), send)
    return answer[0]["status"], answer[1]["body"]


async def test_large_bodies_that_were_only_announced_keep_nobody_out() -> None:
    guard = Guard(echo, limits=PeerLimits(6000, 2 * MAX), max_body_bytes=MAX)
    end = asyncio.Event()
    silent = [asyncio.create_task(call(guard, [b"x"], MAX, then=end)) for _ in range(16)]
    await asyncio.sleep(0)

    assert await call(guard, [b"12345"], 5) == (200, b"5")
    end.set()
    assert await asyncio.gather(*silent) == [(200, b"1")] * 16


async def test_bytes_that_are_here_count_until_the_request_is_over() -> None:
    guard = Guard(echo, limits=PeerLimits(6000, MAX), max_body_bytes=MAX)
    end = asyncio.Event()
    full = asyncio.create_task(call(guard, [bytes(MAX)], MAX, then=end))
    await asyncio.sleep(0)

    status, body = await call(guard, [b"1"], 1)
    assert (status, orjson.loads(body)["code"]) == (503, "overloaded")
    end.set()
    assert await full == (200, b"%d" % MAX)
    assert await call(guard, [b"1"], 1) == (200, b"1")


async def test_who_leaves_within_his_body_is_told_nothing_and_counts_as_gone() -> None:
    metrics = Metrics()
    guard = Guard(echo, limits=PeerLimits(6000, MAX), max_body_bytes=MAX)
    measured = Measured(guard, metrics, Routes(["/"]))
    scope = {"type": "http", "client": ("peer", 1), "headers": [], "method": "POST", "path": "/"}
    coming = iter([{"type": "http.request", "body": bytes(MAX // 2), "more_body": True}, {"type": "http.disconnect"}])
    answer: list[Message] = []

    async def receive() -> Message:
        return next(coming)

    async def send(message: Message) -> None:
        answer.append(message)

    await measured(scope, receive, send)
    told = metrics.text().decode()

    assert answer == []
    assert 'divault_requests_total{method="POST",route="/",status="499"} 1.0' in told
    assert "divault_refusals_total{" not in told
    assert await call(guard, [bytes(MAX)], MAX) == (200, b"%d" % MAX), "and holds nothing"


async def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    guard = Guard(echo, limits=PeerLimits(6000, MAX), max_body_bytes=MAX, patience_s=0.05)

    status, body = await call(guard, [b"x"], MAX, then=asyncio.Event())

    assert (status, orjson.loads(body)["code"]) == (400, "bad_request")
    assert await call(guard, [bytes(MAX)], MAX) == (200, b"%d" % MAX), "nothing is held any more"
