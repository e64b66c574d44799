"""One load of a model at a time: the others wait for it, and not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from divault.errors import NotReady, StorageFailed
from divault.values import Usdc
from tests.counter import PRICE, Counter, output_of, signed
from tests.small_service import service_of


@pytest.fixture
async def counter(tmp_path: Path) -> AsyncIterator[Counter]:
    async with Counter(tmp_path) as made:
        yield made


class Opening:
    """Opens a model when a test says so, or fails; and what has it loaded then."""

    def __init__(self) -> None:
        self.go, self.begun, self.error = asyncio.Event(), 0, None
        self.loaded: Any = None

    async def open(self, *_: object) -> Any:
        self.begun += 1
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return SimpleNamespace(plaintext_sha256=None, size=1)

    async def load(self, model: Any) -> None:
        self.loaded = model

    def find(self, *_: object) -> Any:
        return self.loaded

    def loaded_as(self, *_: object) -> Any:
        return self.loaded

    def description(self, _: object) -> Any:
        return SimpleNamespace(runtime={})

    async def run(self, *_: object) -> Any:
        return output_of(b'"yes"')


async def test_calls_that_come_while_a_model_is_loaded_share_the_load(counter: Counter) -> None:
    opening = Opening()
    service = service_of(counter, opening, price=Usdc(0), opener=opening)
    calls = [asyncio.create_task(service.infer(signed(max_price=0)[1], load=True)) for _ in range(5)]
    await asyncio.sleep(0.01)
    opening.go.set()
    answers = await asyncio.gather(*calls)

    assert opening.begun == 1
    assert all(b'"yes"' in answer.body for answer in answers)


async def test_who_waits_too_long_for_others_loads_holds_nothing_and_may_come_again(counter: Counter) -> None:
    await counter.infer(signed(tx=counter.chain.pay(3 * PRICE.atomic))[1])
    opening = Opening()
    service = service_of(counter, opening, opener=opening, load_wait_s=0.05)
    first = asyncio.create_task(service.infer(signed()[1], load=True))
    while not opening.begun:
        await asyncio.sleep(0.001)
    _, call = signed()
    with pytest.raises(NotReady, match="same bytes") as refused:
        await service.infer(call, load=True)

    assert refused.value.evidence is None
    assert await counter.credit() == PRICE.atomic, "the first alone holds its price"
    opening.go.set()
    await first
    assert b'"yes"' in (await service.infer(call, load=True)).body, "the same bytes"
    assert await counter.credit() == 0


async def test_a_load_that_fails_lets_the_next_one_try(counter: Counter) -> None:
    opening = Opening()
    opening.error = StorageFailed("no gateway answers")
    opening.go.set()
    service = service_of(counter, opening, price=Usdc(0), opener=opening)
    for _ in range(2):
        with pytest.raises(StorageFailed):
            await service.infer(signed(max_price=0)[1], load=True)

    assert opening.begun == 2
