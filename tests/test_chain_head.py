"""The head is fresh, shared, and never guessed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from divault.chain.chain import Chain
from divault.chain.rpc import Rpc, RpcLimits
from divault.errors import ChainStale, ChainUnavailable
from tests.rpc_stub import CHAIN_ID, Stub, serving
from tests.test_chain_rpc_faults import html


class Clock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@contextlib.asynccontextmanager
async def chain_of(stub: Stub, **options: Any) -> AsyncIterator[Chain]:
    chain = Chain(Rpc([stub.url], CHAIN_ID, limits=RpcLimits(timeout_s=0.5)), **options)
    await chain.connect()
    stub.counted.clear()
    try:
        yield chain
    finally:
        await chain.close()


HEADS = "eth_getBlockByNumber"


async def test_a_head_is_used_for_its_time_to_live_and_not_longer() -> None:
    clock = Clock()
    async with serving() as stub, chain_of(stub, head_ttl_s=1.0, monotonic=clock) as chain:
        first = await chain.head()
        stub.number += 1
        clock.now += 1.0
        within = await chain.head()
        clock.now += 0.01
        after = await chain.head()

    assert (first.number, within.number, after.number) == (7, 7, 8)
    assert stub.counted[HEADS] == 2


async def until(number: int, chain: Chain) -> None:
    async with asyncio.timeout(10):
        while chain.last_head is None or chain.last_head.number != number:
            await asyncio.sleep(0.01)


async def test_a_head_that_is_asked_for_is_read_again_before_its_time_is_over() -> None:
    clock = Clock()
    async with serving() as stub, chain_of(stub, head_ttl_s=1.0, monotonic=clock) as chain:
        await chain.head()
        stub.number, stub.delay_s = 8, 0.05
        clock.now += 0.7
        await chain.head()
        assert stub.counted[HEADS] == 1, "too early"
        clock.now += 0.1
        soon = await asyncio.gather(*(chain.head() for _ in range(20)))
        assert {head.number for head in soon} == {7}, "nobody waits for it"
        await until(8, chain)
        clock.now += 0.9  # over for the first head, not for the one that was read meanwhile
        later = await asyncio.wait_for(chain.head(), 0.04)

    assert later.number == 8
    assert stub.counted[HEADS] in (2, 3)


async def test_who_asks_no_more_has_nothing_read() -> None:
    clock = Clock()
    async with serving() as stub, chain_of(stub, head_ttl_s=1.0, monotonic=clock) as chain:
        await chain.head()
        clock.now += 0.9
        await asyncio.sleep(0.05)

        assert stub.counted[HEADS] == 1


async def test_a_read_ahead_that_fails_is_nobodys_failure() -> None:
    clock = Clock()
    async with serving() as stub, chain_of(stub, head_ttl_s=1.0, monotonic=clock) as chain:
        await chain.head()
        stub.breaks = html
        clock.now += 0.9
        assert (await chain.head()).number == 7
        assert chain._ahead is not None
        async with asyncio.timeout(10):
            while chain._ahead is not None:
                await asyncio.sleep(0.01)
        assert (await chain.head()).number == 7, "it still has its time"
        stub.breaks = None
        clock.now += 0.2

        assert (await chain.head()).number == 7, "and then it is read anew at once"


async def test_a_chain_is_closed_while_it_reads_ahead() -> None:
    clock = Clock()
    async with serving() as stub, chain_of(stub, head_ttl_s=1.0, monotonic=clock) as chain:
        await chain.head()
        stub.delay_s = 0.3
        clock.now += 0.9
        await chain.head()
        await asyncio.sleep(0.02)

    assert chain._ahead is None


async def test_fresh_reads_anew() -> None:
    clock = Clock()
    async with serving() as stub, chain_of(stub, head_ttl_s=60, monotonic=clock) as chain:
        await chain.head()
        stub.number += 1
        clock.now += 0.001

        assert (await chain.head()).number == 7
        assert (await chain.head(fresh=True)).number == 8
        assert (await chain.head()).number == 8


async def test_fifty_callers_share_one_read() -> None:
    async with serving() as stub, chain_of(stub) as chain:
        stub.delay_s = 0.05
        heads = await asyncio.gather(*(chain.head() for _ in range(50)))

    assert {head.number for head in heads} == {7}
    assert stub.counted[HEADS] == 1


async def test_a_cancelled_reader_does_not_take_the_others_along() -> None:
    async with serving() as stub, chain_of(stub) as chain:
        stub.delay_s = 0.1
        first = asyncio.create_task(chain.head())
        await asyncio.sleep(0.02)
        second = asyncio.create_task(chain.head())
        await asyncio.sleep(0.02)
        first.cancel()

        assert (await second).number == 7


async def test_an_outage_ends_the_use_of_the_last_head() -> None:
    clock = Clock()
    async with serving() as stub, chain_of(stub, head_ttl_s=1.0, monotonic=clock) as chain:
        await chain.head()
        stub.breaks = html
        assert (await chain.head()).number == 7  # within its time to live nobody asks
        clock.now += 1.1
        with pytest.raises(ChainUnavailable):
            await chain.head()
        stub.breaks = None
        clock.now += 1.1

        assert (await chain.head()).number == 7


async def test_waiting_callers_share_a_failure_as_errors_of_their_own() -> None:
    async with serving() as stub, chain_of(stub) as chain:
        stub.delay_s = 1.0  # over the timeout
        outcomes = await asyncio.gather(*(chain.head() for _ in range(20)), return_exceptions=True)

    assert all(isinstance(outcome, ChainUnavailable) for outcome in outcomes)
    assert len({id(outcome) for outcome in outcomes}) == 20
    assert stub.counted[HEADS] <= 1


@pytest.mark.parametrize(("age", "stale"), [(299, False), (300, False), (301, True)])
async def test_a_head_older_than_the_limit_is_stale(age: int, *, stale: bool) -> None:
    async with serving() as stub, chain_of(stub, max_head_age_s=300, clock=lambda: stub.timestamp + age) as chain:
        if stale:
            with pytest.raises(ChainStale, match="301 s old"):
                await chain.head()
        else:
            assert (await chain.head()).number == 7


async def test_a_cached_head_grows_stale_too() -> None:
    clock = Clock()
    async with serving() as stub:
        clock.now = stub.timestamp
        async with chain_of(stub, head_ttl_s=10**6, max_head_age_s=300, clock=clock, monotonic=Clock()) as chain:
            await chain.head()
            clock.now += 301
            with pytest.raises(ChainStale):
                await chain.head()


async def test_an_old_head_is_fine_without_a_limit() -> None:
    async with serving() as stub, chain_of(stub, clock=lambda: stub.timestamp + 10**6) as chain:
        assert (await chain.head()).number == 7
