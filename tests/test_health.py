"""The node's probes: what they decide, how often they run and by which clock, and what a failing one says."""

from __future__ import annotations

import asyncio

import pytest

from divault.errors import ChainUnavailable, NotReady, StorageFailed
from divault.health import MIN_INTERVAL_S, Health


async def fine() -> str:
    return "fine"


async def away() -> str:
    raise StorageFailed("no gateway answers")


async def test_what_only_loads_need_is_shown_and_takes_no_node_out() -> None:
    health = Health({"ledger": fine, "gateways": away, "chain": fine}, for_loads=["gateways", "key_nodes"])

    assert [(check.name, check.ok) for check in await health.checks()] == [
        ("ledger", True),
        ("gateways", False),
        ("chain", True),
    ]
    assert await health.ready()


@pytest.mark.parametrize("name", ["ledger", "chain"])
async def test_what_calls_need_takes_a_node_out(name: str) -> None:
    async def down() -> str:
        raise ChainUnavailable("no endpoint answers")

    health = Health({"ledger": fine, "gateways": fine, "chain": fine} | {name: down}, for_loads=["gateways"])

    assert not await health.ready()


async def test_readiness_does_not_wait_for_a_gateway_that_is_silent() -> None:
    health = Health({"ledger": fine, "gateways": asyncio.Event().wait}, for_loads=["gateways"])  # type: ignore[dict-item]

    assert await asyncio.wait_for(health.ready(), 1)


async def test_each_part_is_probed_once_in_five_seconds_whoever_asks() -> None:
    now, asked = 100.0, []

    async def chain() -> str:
        asked.append("chain")
        return "at block 1"

    async def gateways() -> str:
        asked.append("gateways")
        return "answers"

    health = Health({"chain": chain, "gateways": gateways}, for_loads=["gateways"], monotonic=lambda: now)
    await asyncio.gather(health.ready(), health.checks(), health.ready(), health.checks())
    assert sorted(asked) == ["chain", "gateways"]

    now += MIN_INTERVAL_S - 0.5
    await health.ready()
    assert sorted(asked) == ["chain", "gateways"]
    now += 0.5
    await health.ready()
    assert sorted(asked) == ["chain", "chain", "gateways"]


class Clock:
    now = 1_790_000_000.0

    def __call__(self) -> float:
        return self.now


class Disk:
    """A part of the node that fails when a test says so."""

    asked = 0
    fails = False

    async def probe(self) -> str:
        self.asked += 1
        await asyncio.sleep(0)
        if self.fails:
            raise NotReady("the disk failed", retry_after=5)
        return "wrote durably"


@pytest.mark.parametrize("step_s", [-3600, 3600])
async def test_a_clock_that_is_set_makes_no_news_of_old(step_s: int) -> None:
    disk, clock, since = Disk(), Clock(), Clock()
    health = Health({"ledger": disk.probe}, clock=clock, monotonic=since)
    (first,) = await health.checks()
    disk.fails = True
    clock.now += step_s
    assert await health.checks() == (first,), "nor does it make a hammer of it"
    since.now += MIN_INTERVAL_S
    (second,) = await health.checks()

    assert (first.word, first.checked_at) == ("active", 1_790_000_000)
    assert (second.word, second.detail, second.checked_at) == ("failed", "the disk failed", int(clock.now))
