"""Many models, many callers, a flood and a model that dies: nobody's answer is another's, and nobody is forgotten."""

from __future__ import annotations

import os

import pytest

from divault.workers.memory import memory_of
from tests.many_models import Seen, crowd


def check(seen: Seen, callers: int) -> None:
    assert seen.crossed == []
    assert len(seen.seconds) + seen.refused.total() == callers
    assert set(seen.refused) <= {"overloaded"}
    assert len(seen.seconds) > 0.9 * callers, seen.refused


async def test_a_flood_and_a_traitor_cost_the_others_no_answer() -> None:
    async with crowd(6) as many:
        check(await many.serve(400, trouble=False), 400)
        check(await many.serve(400, trouble=True), 400)
        assert {loaded.state for loaded in many.pool.loaded()} == {"ready"}
        callers = {one.model: one.callers for one in many.pool.figures()}  # in the order in which they were used

    assert min(callers["m0"], callers["m1"]) > callers["m5"] + 50, "there was a flood"


@pytest.mark.soak
@pytest.mark.timeout(0)
async def test_fifty_models_and_ten_thousand_callers() -> None:
    async with crowd(50) as many:
        before = sum(one.memory_bytes for one in many.pool.figures())
        check(await many.serve(10_000, trouble=True), 10_000)
        after = sum(one.memory_bytes for one in many.pool.figures())
        mine = memory_of(os.getpid())

    assert after < 1.2 * before
    assert mine < 3_000_000_000
