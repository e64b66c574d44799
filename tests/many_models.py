"""Many models and many callers over one pool, some of them up to no good: what everybody else gets to see."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from msgspec.structs import replace

from divault.errors import DivaultError, ModelFailed, NotReady, Overloaded
from divault.values import Address, OpenedModel
from divault.workers.pool import WorkerPool
from tests.worker_models import call, hold, hostile, opened

AT_ONCE = 64
FLOOD = 200
"""Calls that the hostile caller keeps under way for each model that he floods."""


@dataclass
class Seen:
    """What honest callers saw."""

    seconds: list[float] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    crossed: list[str] = field(default_factory=list)
    """Answers that carried somebody else's tag."""

    def p99(self) -> float:
        """Seconds within which 99 % of the answers came."""
        return sorted(self.seconds)[int(len(self.seconds) * 0.99) - 1]


class Crowd:
    """Loaded models that give each caller his tag back, and one that dies with every call."""

    def __init__(self, pool: WorkerPool, models: list[OpenedModel], traitors: WorkerPool, traitor: OpenedModel) -> None:
        self.pool = pool
        self.models = models
        self._traitors = traitors
        self._traitor = traitor

    async def serve(self, callers: int, *, trouble: bool) -> Seen:
        """Let so many wallets call once each; with `trouble` beside a flood on two models and a model that dies."""
        seen, numbers = Seen(), iter(range(callers))
        bad = [asyncio.create_task(work) for work in self._trouble()] if trouble else []

        async def honest() -> None:
            for number in numbers:
                await self._ask(number, seen)

        await asyncio.gather(*(honest() for _ in range(AT_ONCE)))
        for task in bad:
            task.cancel()
        await asyncio.gather(*bad, return_exceptions=True)
        return seen

    async def _ask(self, number: int, seen: Seen) -> None:
        model, wallet = self.models[number % len(self.models)], Address(number.to_bytes(20, "big"))
        tag = f"{model.model.text}/{number}"
        asked = replace(call(model, {"tag": tag}), user=wallet)
        began = time.perf_counter()
        try:
            answer = json.loads((await self.pool.run(model, hold(model), asked)).result)
        except DivaultError as err:
            seen.refused[err.code] += 1
            return
        seen.seconds.append(time.perf_counter() - began)
        if answer["tag"] != tag:
            seen.crossed.append(f"{tag} got {answer['tag']}")

    def _trouble(self) -> list[object]:
        flood = [self._flood(model) for model in self.models[:2] for _ in range(FLOOD)]
        return [*flood, *(self._betray() for _ in range(4))]

    async def _flood(self, model: OpenedModel) -> None:
        asked = replace(call(model, {"tag": "flood"}), user=Address(b"\xff" * 20))
        while True:
            try:
                await self.pool.run(model, hold(model), asked)
            except Overloaded:
                await asyncio.sleep(0.01)

    async def _betray(self) -> None:
        while True:
            try:
                await self._traitors.run(self._traitor, hold(self._traitor), call(self._traitor, {}))
            except (ModelFailed, NotReady):
                await asyncio.sleep(0.05)


@asynccontextmanager
async def crowd(models: int) -> AsyncIterator[Crowd]:
    """So many models in processes of their own."""
    pool = WorkerPool(predict_timeout_s=30, load_timeout_s=120, tuning=hostile("tagged"))
    traitors = WorkerPool(predict_timeout_s=30, load_timeout_s=120, tuning=hostile("exit"))
    held, traitor = [opened(b"any", f"m{number}") for number in range(models)], opened(b"any", "traitor")
    try:
        for at in range(0, models, 8):
            await asyncio.gather(*(pool.load(model) for model in held[at : at + 8]))
        await traitors.load(traitor)
        yield Crowd(pool, held, traitors, traitor)
    finally:
        await pool.close()
        await traitors.close()
