"""Who asks more often than he may waits for his refusal, so that a flood of them takes no time from others."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from divault.api import problems
from divault.api.guard import Guard
from divault.limits import PeerLimits


async def served(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def asked(guard: Guard, peer: str, *headers: tuple[bytes, bytes]) -> tuple[asyncio.Task[None], list[Message]]:
    """A request that is under way, and what was answered until now."""
    answer: list[Message] = []
    scope = {"type": "http", "client": (peer, 1), "headers": headers, "method": "POST", "path": "/"}

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        answer.append(message)

    return asyncio.create_task(guard(scope, receive, send)), answer


def status(answer: list[Message]) -> Any:
    return answer[0]["status"]


async def test_a_refusal_for_too_many_requests_waits_and_everything_else_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(problems, "TOO_OFTEN_S", 3600)
    guard = Guard(served, limits=PeerLimits(1, 1 << 20), max_body_bytes=1 << 20)
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
    guard = Guard(served, limits=PeerLimits(1, 1 << 20), max_body_bytes=1 << 20)
    await asked(guard, "flood")[0]
    task, answer = asked(guard, "flood")
    async with asyncio.timeout(60):
        await task

    headers = dict(answer[0]["headers"])
    assert status(answer) == 429
    assert 1 <= int(headers[b"retry-after"]) <= 60
    assert json.loads(answer[1]["body"])["code"] == "rate_limited"
