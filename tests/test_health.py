"""Readiness is what calls of loaded models need; what only loads need is shown, and decides nothing."""

from __future__ import annotations

import asyncio

import pytest

from divault.errors import ChainUnavailable, StorageFailed
from divault.health import Health


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

    health = Health({"chain": chain, "gateways": gateways}, for_loads=["gateways"], clock=lambda: now)
    await asyncio.gather(health.ready(), health.checks(), health.ready(), health.checks())
    assert sorted(asked) == ["chain", "gateways"]

    now += 5
    await health.ready()
    assert sorted(asked) == ["chain", "chain", "gateways"]
