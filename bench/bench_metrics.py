"""What counting costs a call: the layer around everything, seven steps and a receipt, beside doing none of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from divault.api.measured import Measured, Routes
from divault.metrics import Metrics

_STEPS = ("authenticate", "known", "gate", "hold", "open", "run", "charge")
_HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"300"), (b"cache-control", b"no-store")]
_CALLS, _ROUNDS = 50_000, 5
_TARGET_US = 5.0


async def _answer(_: Any, __: Any, send: Any) -> None:
    """An application that does nothing."""
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    await send({"type": "http.response.body", "body": b""})


async def _nothing(*_: Any) -> None:
    """Neither receives nor sends."""


async def _cpu_us(call: Callable[[], Awaitable[None]]) -> float:
    """Microseconds of CPU that a call takes, in the best of some rounds."""
    taken = []
    for _ in range(_ROUNDS):
        before = time.process_time()
        for _ in range(_CALLS):
            await call()
        taken.append(time.process_time() - before)
    return min(taken) / _CALLS * 1e6


async def _measure() -> list[dict[str, Any]]:
    metrics = Metrics()
    scope = {"type": "http", "path": "/api/v1/inference", "method": "POST", "headers": []}

    async def counting(scope: Any, receive: Any, send: Any) -> None:
        lap = metrics.lap()
        for step in _STEPS:
            lap(step)
        metrics.receipt("ok", 20_000, "0x00")
        await _answer(scope, receive, send)

    measured = Measured(counting, metrics, Routes(["/api/v1/inference"]))
    bare_us = await _cpu_us(lambda: _answer(scope, _nothing, _nothing))
    figure = await _cpu_us(lambda: measured(scope, _nothing, _nothing)) - bare_us
    return [
        {
            "name": "metrics, cost of a call",
            "figure": round(figure, 2),
            "unit": "us",
            "yardstick": f"an answer that nobody counts: {bare_us:.2f} us",
            "ratio": round(figure / bare_us, 2),
            "target": f"<= {_TARGET_US:g} us",
            "holds": figure <= _TARGET_US,
        }
    ]


def run() -> list[dict[str, Any]]:
    """One row: CPU, so what else the machine does matters little."""
    return asyncio.run(_measure())
