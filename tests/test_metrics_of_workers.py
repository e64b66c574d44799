"""Figures of real worker processes, as Prometheus reads them: queue and age, passes, restarts, memory, their end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs
from prometheus_client.parser import text_string_to_metric_families

from divault.errors import ModelFailed
from divault.metrics import Metrics, Sources
from divault.values import Address, OpenedModel
from divault.workers.pool import WorkerPool
from tests.worker_models import call, hold, hostile, opened


@pytest.fixture
async def pool() -> AsyncIterator[WorkerPool]:
    tuning = replace(hostile("tagged"), first_pause_s=0.5)  # long enough down to be seen
    made = WorkerPool(predict_timeout_s=10, load_timeout_s=60, tuning=tuning)
    yield made
    await made.close()


async def look(pool: WorkerPool, model: str | None = None) -> dict[str, float]:
    """Samples of one model, by name and upper bound; read in a thread, as the node does."""
    text = await asyncio.to_thread(Metrics(Sources(pool.figures)).text)
    samples = [one for family in text_string_to_metric_families(text.decode()) for one in family.samples]
    of_models = [one for one in samples if "model" in one.labels]
    return {
        one.name.removeprefix("divault_model_") + (f" <= {one.labels['le']}" if "le" in one.labels else ""): one.value
        for one in of_models
        if model is None or one.labels["model"] == model
    }


def ask(pool: WorkerPool, model: OpenedModel, wallet: int = 1, **data: Any) -> asyncio.Task[Any]:
    asked = structs.replace(call(model, data), user=Address(bytes([wallet]) * 20))

    async def said() -> Any:
        return json.loads((await pool.run(model, hold(model), asked)).result)

    return asyncio.create_task(said())


async def test_who_waits_and_how_long_is_seen_while_it_lasts(pool: WorkerPool) -> None:
    model = opened(b"any")
    await pool.load(model)
    assert (await look(pool))["oldest_seconds"] == 0

    callers = [ask(pool, model, 1, tag="x")]
    await asyncio.sleep(0.005)
    callers += [ask(pool, model, wallet, tag="x") for wallet in range(2, 10)]
    await asyncio.sleep(0)  # all of them have asked: one is in the worker, the others wait
    figures = pool.figures()[0]
    busy = await look(pool)
    await asyncio.gather(*callers)
    after = await look(pool)

    assert (figures.waiting, figures.ready) == (8, True)
    assert busy["up"] == 1
    assert (after["waiting"], after["oldest_seconds"]) == (0, 0)
    assert (after["pass_callers_count"], after["pass_callers_sum"]) == (2, 9)
    assert [after[f"pass_callers_bucket <= {bound}"] for bound in ("1", "4", "8", "+Inf")] == [1, 1, 2, 2]
    assert after["busy_seconds_total"] > 0
    assert after["memory_bytes"] > 1_000_000


async def test_the_age_is_that_of_the_one_who_waits_longest(pool: WorkerPool) -> None:
    model = opened(b"any")
    await pool.load(model)
    first = ask(pool, model, tag="x", act="hang")
    await asyncio.sleep(0)
    waiting = ask(pool, model, 2, tag="y")
    await asyncio.sleep(0.2)
    ages = (await look(pool))["oldest_seconds"], (await look(pool))["waiting"]
    for task in (first, waiting):
        task.cancel()

    assert 0.15 < ages[0] < 10
    assert ages[1] == 1


async def test_a_worker_that_dies_is_down_and_then_back_and_counted(pool: WorkerPool) -> None:
    model = opened(b"any")
    await pool.load(model)
    with pytest.raises(ModelFailed):
        await ask(pool, model, tag="x", act="die")
    down = await look(pool)
    assert (await ask(pool, model, tag="y"))["tag"] == "y"
    back = await look(pool)

    assert down["up"] == 0
    assert (back["up"], back["restarts_total"]) == (1, 1)


async def test_an_unloaded_model_has_no_figures(pool: WorkerPool) -> None:
    model = opened(b"any")
    await pool.load(model)
    assert await look(pool)
    await pool.unload(model.model.key)

    assert await look(pool) == {}
