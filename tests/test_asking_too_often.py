"""Who asks more often than he may waits for his refusal, so that a flood of them takes no time from others."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from divault.api import measured
from divault.api.guard import Guard
from divault.api.measured import Measured, Routes
from divault.api.problems import problem_response
from divault.errors import RateLimited
from divault.limits import PeerLimits
from divault.metrics import Metrics

MAX = 1 << 20


def node(app: ASGIApp | None = None, *, per_minute: int = 1, in_flight: int = MAX) -> ASGIApp:
    guard = Guard(app or served, limits=PeerLimits(per_minute, in_flight), max_body_bytes=MAX)
    return Measured(guard, Metrics(), Routes(["/"]))


async def served(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def spent(scope: Scope, receive: Receive, send: Send) -> None:
    """Refuses whoever it is, who is known by then, as one who asks too often."""
    await problem_response(RateLimited("too many calls", retry_after=1), "id")(scope, receive, send)


def asked(
    app: ASGIApp, peer: str, *headers: tuple[bytes, bytes], body: bytes = b""
) -> tuple[asyncio.Task[None], list[Message]]:
    """A request that is under way, and what was answered until now."""
    answer: list[Message] = []
    scope = {"type": "http", "client": (peer, 1), "headers": headers, "method": "POST", "path": "/"}

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        answer.append(message)

    async def serve() -> None:
        await app(scope, receive, send)

    return asyncio.create_task(serve()), answer


def status(answer: list[Message]) -> Any:
    return answer[0]["status"]


async def test_a_refusal_for_too_many_requests_waits_and_everything_else_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measured, "TOO_OFTEN_S", 3600)
    guard = node()
    first, greeting = asked(guard, "flood")
    await first
    flood = [asked(guard, "flood") for _ in range(50)]
    other, answer = asked(guard, "other")
    wrong, problem = asked(guard, "third", (b"content-encoding", b"gzip"))
    async with asyncio.timeout(60):
        await asyncio.gather(other, wrong)

    assert (status(greeting), status(answer), status(problem)) == (200, 200, 400)
    assert not any(answer for _, answer in flood)
    for task, _ in flood:
        task.cancel()
    await asyncio.gather(*(task for task, _ in flood), return_exceptions=True)


async def test_the_refusal_comes_and_says_when_to_come_back() -> None:
    guard = node()
    await asked(guard, "flood")[0]
    task, answer = asked(guard, "flood")
    async with asyncio.timeout(60):
        await task

    headers = dict(answer[0]["headers"])
    assert status(answer) == 429
    assert 1 <= int(headers[b"retry-after"]) <= 60
    assert json.loads(answer[1]["body"])["code"] == "rate_limited"


async def test_who_waits_for_his_refusal_holds_no_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "TOO_OFTEN_S", 3600)
    app = node(spent, per_minute=100)
    waiting = [asked(app, "flood", body=bytes(MAX)) for _ in range(3)]
    await asyncio.sleep(0.01)
    monkeypatch.setattr(measured, "TOO_OFTEN_S", 0)
    last, answer = asked(app, "flood", body=bytes(MAX))
    async with asyncio.timeout(60):
        await last

    assert (status(answer), [said for _, said in waiting]) == (429, [[]] * 3), "there was room for its body"
    for task, _ in waiting:
        task.cancel()
    await asyncio.gather(*(task for task, _ in waiting), return_exceptions=True)
