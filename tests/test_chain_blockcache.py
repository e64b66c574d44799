"""What was read at a block hash is read once, shared by those who ask at once, and forgotten when there is too much."""

from __future__ import annotations

import asyncio

import pytest

from divault.chain.blockcache import Asked, BlockCache
from divault.errors import ChainUnavailable


class Source:
    """Counts its reads; fails when told; can be held back."""

    def __init__(self) -> None:
        self.reads = 0
        self.fails = False
        self.go = asyncio.Event()
        self.go.set()

    async def read(self) -> int:
        self.reads += 1
        await self.go.wait()
        if self.fails:
            raise ChainUnavailable("down", retry_after=2)
        return self.reads


async def test_a_value_is_read_once() -> None:
    source, cache = Source(), BlockCache[str, int](8)

    assert [await cache.get("k", source.read) for _ in range(3)] == [1, 1, 1]
    assert source.reads == 1


async def test_callers_at_once_share_a_read() -> None:
    source, cache = Source(), BlockCache[str, int](8)
    values = await asyncio.gather(*(cache.get("k", source.read) for _ in range(20)))

    assert set(values) == {1}
    assert source.reads == 1


async def test_a_failure_is_shared_as_separate_errors_and_not_kept() -> None:
    source, cache = Source(), BlockCache[str, int](8)
    source.fails = True
    outcomes = await asyncio.gather(*(cache.get("k", source.read) for _ in range(5)), return_exceptions=True)
    assert all(isinstance(o, ChainUnavailable) and o.data == {"retry_after": 2} for o in outcomes)
    assert len({id(outcome) for outcome in outcomes}) == 5
    source.fails = False

    assert await cache.get("k", source.read) == 2


async def test_the_read_survives_the_caller_who_began_it() -> None:
    source, cache = Source(), BlockCache[str, int](8)
    source.go.clear()
    first = asyncio.create_task(cache.get("k", source.read))
    await asyncio.sleep(0)
    second = asyncio.create_task(cache.get("k", source.read))
    await asyncio.sleep(0)
    first.cancel()
    source.go.set()

    assert await second == 1
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_a_failure_that_nobody_waits_for_is_silent() -> None:
    source, cache = Source(), BlockCache[str, int](8)
    source.go.clear()
    source.fails = True
    only = asyncio.create_task(cache.get("k", source.read))
    await asyncio.sleep(0)
    only.cancel()
    await asyncio.sleep(0)
    source.go.set()
    await asyncio.sleep(0.01)

    assert len(cache) == 0


async def test_the_least_recently_used_is_forgotten_first() -> None:
    source, cache = Source(), BlockCache[str, int](2)
    await cache.get("a", source.read)
    await cache.get("b", source.read)
    await cache.get("a", source.read)
    await cache.get("c", source.read)

    assert len(cache) == 2
    assert await cache.get("a", source.read) == 1
    assert await cache.get("b", source.read) == 4  # was forgotten, read again


def test_what_was_asked_last_is_kept_and_taken_once() -> None:
    asked: Asked[str, int] = Asked(2)
    for number, name in enumerate("abac"):
        asked.note(name, number)

    assert asked.take() == [2, 3]
    assert asked.take() == []
