"""Bodies that don't come: whoever stops sending holds nothing that others need, and is dropped."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import AsyncIterator, Iterable
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from starlette.types import Message, Receive, Scope, Send

from divault.api.guard import Guard
from divault.api.hot import HotRoutes
from divault.api.measured import Measured, Routes
from divault.api.openai_routes import _handler
from divault.api.presence import Presence
from divault.errors import Overloaded
from divault.limits import PeerLimits
from divault.metrics import Metrics
from divault.models.base import Piece
from divault.service import Dialect
from divault.values import Answer, SignedCall
from tests.counter import signed

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


class Unread:
    """A streaming call whose answer nobody reads, and whose run ends when a test says so."""

    def __init__(self, path: str = "/v1/completions", *, stream: bool = True) -> None:
        self.begun, self.go, self.sending, self.read = (asyncio.Event() for _ in range(4))
        asked = {"model": "m1", "prompt": "x", "stream": stream}
        self.body = orjson.dumps(asked).ljust(MAX)
        self.scope = {"type": "http", "client": ("peer", 1), "headers": [], "method": "POST", "path": path}
        self.scope |= {"raw_path": path.encode(), "query_string": b""}

    async def infer(self, call: SignedCall, *, load: bool, dialect: Dialect) -> Answer:
        await dialect.asked(call, SimpleNamespace(task="text-generation", input_schema={}))  # type: ignore[arg-type]
        self.begun.set()
        if dialect.on_piece is not None:
            dialect.on_piece(Piece("x", 0))
        await self.go.wait()
        choices = [{"index": 0, "text": "x", "finish_reason": "stop"}]
        return Answer(orjson.dumps({"choices": choices, "receipt": {}, "usage": {}}), None)

    async def asked(self, limits: PeerLimits) -> None:
        node: Any = SimpleNamespace(service=self, envelopes=SimpleNamespace(foreign=lambda *_: signed()[1]))
        hot = HotRoutes(echo, {self.scope["path"]: _handler(node, "completions")}.get, Presence())
        here = iter([True])

        async def receive() -> Message:
            if next(here, False):
                return {"type": "http.request", "body": self.body, "more_body": False}
            return await asyncio.Future()

        async def send(_: Message) -> None:
            self.sending.set()
            await self.read.wait()

        await Guard(hot, limits=limits, max_body_bytes=MAX)(self.scope, receive, send)


@pytest.mark.parametrize("stream", [True, False])
async def test_bytes_are_free_when_the_run_has_ended_whoever_reads_its_answer(stream: bool) -> None:
    limits = PeerLimits(6000, MAX)
    guard, unread = Guard(echo, limits=limits, max_body_bytes=MAX), Unread(stream=stream)
    asking = asyncio.create_task(unread.asked(limits))
    await (unread.sending if stream else unread.begun).wait()
    status, _ = await call(guard, [b"1"], 1)
    assert status == 503, "its run needs them"
    unread.go.set()
    async with asyncio.timeout(30):
        while (await call(guard, [bytes(MAX)], MAX))[0] != 200:
            await asyncio.sleep(0.001)

    assert not asking.done()
    unread.read.set()
    await asking
    assert await call(guard, [bytes(MAX)], MAX) == (200, b"%d" % MAX), "given back once"
    with pytest.raises(Overloaded):
        limits.take(MAX + 1)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_body_whose_run_has_ended_is_not_kept_while_its_answer_is_read(stream: bool) -> None:
    """Otherwise what is counted would be less than what is held."""
    unread = Unread(stream=stream)
    alone = sys.getrefcount(unread.body)
    asking = asyncio.create_task(unread.asked(PeerLimits(6000, MAX)))
    await (unread.sending if stream else unread.begun).wait()
    assert sys.getrefcount(unread.body) > alone, "its run needs it"
    unread.go.set()
    await unread.sending.wait()
    for _ in range(10):  # turns of the loop, until what hears of the run's end has heard
        await asyncio.sleep(0)
    gc.collect()
    kept = sys.getrefcount(unread.body) - alone
    unread.read.set()
    await asking

    assert kept == 0


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
