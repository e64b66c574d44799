"""Many models and many wallets at one real node over HTTP, some of them up to no good: what all others get to see.

The models are real: each adds a number of its own to what a caller sends, so an answer tells whose it is and which
model gave it. The hostile model is one too: plain data, that counts for as long as it is let.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import aiohttp
import numpy as np
import orjson
from onnx import helper

from divault.client.signing import Signer
from divault.messages import address_of
from divault.values import ModelId, Usdc
from tests.onnx_models import BOOL, INT64, model_file

PATH = "/api/v1/inference"
FLOOD = 16
"""Calls that the villain keeps under way at one model."""
FRESH = 1600
"""Calls that he has signed ahead; most are refused for their number, and he sends those again."""
STEP = 1_000_000
"""Model number n adds n times this, which is more than there are callers."""
_VILLAINS = 2


def adder(number: int) -> bytes:
    """A model that adds its number's share."""
    nodes = [helper.make_node("Add", ["x", "own"], ["y"])]
    return model_file(nodes, ([("x", INT64, ["n"])], [("y", INT64, ["n"])]), {"own": np.array([number * STEP])})


def endless() -> bytes:
    """A model that counts to 2^62."""
    state = [("i", INT64, []), ("on", BOOL, []), ("v", INT64, ["n"])]
    ends = [("still", BOOL, []), ("w", INT64, ["n"])]
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["still"]), helper.make_node("Identity", ["v"], ["w"])],
        "body",
        [helper.make_tensor_value_info(*port) for port in state],
        [helper.make_tensor_value_info(*port) for port in ends],
    )
    nodes = [helper.make_node("Loop", ["times", "yes", "x"], ["y"], body=body)]
    data: dict[str, Any] = {"times": np.array(2**62), "yes": np.array(True)}
    return model_file(nodes, ([("x", INT64, ["n"])], [("y", INT64, ["n"])]), data)


@dataclass
class Seen:
    """What honest callers saw."""

    seconds: list[float] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    crossed: list[str] = field(default_factory=list)
    """Answers that were not the caller's own."""

    def p99(self) -> float:
        """Seconds within which 99 % of the answers came."""
        return sorted(self.seconds)[int(len(self.seconds) * 0.99) - 1]


@dataclass(frozen=True)
class Town:
    """A node's models and the wallets that call them; the last model is the hostile one."""

    url: str
    models: Sequence[ModelId]
    signers: Sequence[Signer]
    hostile: ModelId
    villains: Sequence[Signer]
    """One floods a model; the other keeps the hostile model busy, and asks no oftener than he may."""
    homes: Sequence[aiohttp.ClientSession]
    """Where callers come from: each has an address of its own, the first are the villains'."""

    async def serve(self, *, trouble: bool) -> Seen:
        """Let each wallet call once. `trouble`: beside one who floods, and one who keeps the hostile model busy."""
        seen, calls = Seen(), enumerate(await asyncio.to_thread(self._calls))
        bad = [asyncio.create_task(work) for work in await asyncio.to_thread(self._trouble)] if trouble else []

        async def honest(home: aiohttp.ClientSession) -> None:
            for number, body in calls:
                await self._ask(home, number, body, seen)

        await asyncio.gather(*map(honest, self.homes[len(self.villains) :]))
        for task in bad:
            task.cancel()
        await asyncio.gather(*bad, return_exceptions=True)
        return seen

    def _calls(self) -> list[bytes]:
        """One of each wallet, signed ahead: what wallets take for it is time of other machines."""
        places = len(self.models)
        return [_signed(signer, self.models[number % places], number) for number, signer in enumerate(self.signers)]

    async def _ask(self, home: aiohttp.ClientSession, number: int, body: bytes, seen: Seen) -> None:
        place = number % len(self.models)
        began = time.perf_counter()
        status, told = await self._post(home, body)
        if status != 200:
            seen.refused[told["code"]] += 1
            return
        seen.seconds.append(time.perf_counter() - began)
        own = (self.models[place].text, number + place * STEP, str(address_of(self.signers[number].key)))
        found = (told["model_id"], told["result"]["outputs"]["y"][0], told["receipt"]["receipt"]["user"])
        if found != own:
            seen.crossed.append(f"{own} got {found}")

    def _trouble(self) -> list[Coroutine[Any, Any, None]]:
        """One wallet that sends whatever it can, without waiting for what it is told, and one that waits."""
        flood = cycle([_signed(self.villains[0], self.models[0], 1) for _ in range(FRESH)])
        busy = cycle([_signed(self.villains[1], self.hostile, 1) for _ in range(FRESH // FLOOD)])
        return [*(self._attack(0, flood) for _ in range(FLOOD)), self._attack(1, busy)]

    async def _attack(self, home: int, bodies: Iterator[bytes]) -> None:
        for body in bodies:
            await self._post(self.homes[home], body)

    async def _post(self, home: aiohttp.ClientSession, body: bytes) -> tuple[int, Any]:
        headers = {"content-type": "application/json"}
        async with home.post(self.url + PATH, data=body, headers=headers) as answer:
            return answer.status, orjson.loads(await answer.read())


def _signed(signer: Signer, model: ModelId, number: int) -> bytes:
    body = {"model_id": model.text, "user_address": str(address_of(signer.key)), "input_data": {"inputs": [number]}}
    return signer.post(PATH, model, body, Usdc(0)).exchange.body


@asynccontextmanager
async def town(
    url: str, models: Sequence[ModelId], signers: Sequence[Signer], hostile: ModelId, *, at_once: int
) -> AsyncIterator[Town]:
    """The wallets with their connections, so many at once; the last two wallets are the villains'."""
    async with AsyncExitStack() as stack:
        homes = []
        for number in range(at_once + _VILLAINS):
            connector = aiohttp.TCPConnector(limit=0, local_addr=(f"127.0.1.{number + 1}", 0))
            homes.append(await stack.enter_async_context(aiohttp.ClientSession(connector=connector)))
        yield Town(url, models, signers[:-_VILLAINS], hostile, signers[-_VILLAINS:], homes)
