"""How many threads a worker's libraries have: no more in all than there are cores, and never another number later."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
import skops.io
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression

from divault.workers.pool import Loaded, WorkerPool
from divault.workers.worker import Tuning
from tests import onnx_models
from tests.memory_models import as_json, state_dict_file
from tests.worker_models import answer, opened

MakePool = Callable[..., WorkerPool]
WIDE = 512
NETWORK = {
    "weights.bin": state_dict_file({"weight": torch.ones(WIDE, WIDE), "bias": torch.zeros(WIDE)}),
    "divault.json": as_json({"architecture": {"type": "linear", "in": WIDE, "out": WIDE}}),
}
INPUT = {"tensor": [[1.0] * WIDE] * 64}


@pytest.fixture
async def make_pool(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MakePool]:
    pools: list[WorkerPool] = []

    def make(cores: int, threads: int | None = None) -> WorkerPool:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        tuning = Tuning(threads=threads, first_pause_s=0.01)
        pools.append(WorkerPool(predict_timeout_s=10, load_timeout_s=60, tuning=tuning))
        return pools[-1]

    yield make
    for pool in pools:
        await pool.close()


def told(loaded: Loaded) -> int:
    return int(loaded.description.runtime["threads"])


def tasks(loaded: Loaded) -> int:
    return len(list(Path(f"/proc/{loaded.pid}/task").iterdir()))


async def test_workers_share_the_cores_and_each_has_one(make_pool: MakePool) -> None:
    pool, models = make_pool(6), [opened(onnx_models.classifier(), f"m{number}") for number in range(5)]
    given = [told(await pool.load(model)) for model in models[:4]]
    assert given == [4, 2, 1, 1]

    await pool.unload(models[0].model.key)
    assert told(await pool.load(models[4])) == 2, "what the one that went had is there again"


async def test_a_model_that_is_replaced_does_not_count_beside_itself(make_pool: MakePool) -> None:
    pool = make_pool(4)
    assert told(await pool.load(opened(onnx_models.classifier(), "m"))) == 4
    assert told(await pool.load(opened(onnx_models.classifier(), "m"))) == 4


async def test_loads_at_once_do_not_take_the_same_cores(make_pool: MakePool) -> None:
    pool = make_pool(4)
    loads = await asyncio.gather(*(pool.load(opened(onnx_models.classifier(), f"m{number}")) for number in range(3)))
    assert sorted(map(told, loads)) == [1, 1, 4]


async def test_what_the_operator_says_is_for_every_worker(make_pool: MakePool) -> None:
    pool = make_pool(2, threads=3)
    assert [told(await pool.load(opened(NETWORK, name))) for name in ("a", "b")] == [3, 3]


@pytest.mark.parametrize("threads", [1, 2, 3])
async def test_a_forked_worker_has_the_threads_that_it_says(make_pool: MakePool, threads: int) -> None:
    pool, model = make_pool(2, threads=threads), opened(NETWORK)
    loaded = await pool.load(model)
    before = tasks(loaded)
    await answer(pool, model, INPUT)

    assert told(loaded) == threads
    assert tasks(loaded) - before == threads - 1


async def test_a_worker_that_is_started_anew_has_as_many_as_before(make_pool: MakePool) -> None:
    pool, model = make_pool(3), opened(NETWORK, "first")
    loaded = await pool.load(model)
    others = [await pool.load(opened(NETWORK, name)) for name in ("second", "third")]
    os.kill(loaded.pid or 0, signal.SIGKILL)
    while (again := pool.describe(model)).pid in (None, loaded.pid) or again.state != "ready":
        await asyncio.sleep(0.01)
    await answer(pool, model, INPUT)

    assert [told(one) for one in (again, *others)] == [3, 1, 1]
    assert tasks(again) > 2


async def test_libraries_that_a_worker_was_forked_with_are_told_too(make_pool: MakePool) -> None:
    """scikit-learn's own loops, which no argument reaches: their threads come with the first run, at the load."""
    rows = np.random.default_rng(1).normal(size=(400, 4))
    signs = rows[:, 0] > 0
    looping, plain = HistGradientBoostingClassifier(max_iter=20).fit(rows, signs), LogisticRegression().fit(rows, signs)

    loaded, without = [
        await make_pool(2, threads=3).load(opened({"model.skops": skops.io.dumps(estimator)}))
        for estimator in (looping, plain)
    ]

    assert told(loaded) == 3
    assert tasks(loaded) - tasks(without) == 2


def test_every_pool_of_threads_has_the_number() -> None:
    code = (
        "import sklearn.ensemble, threadpoolctl; from divault.models.runtimes import pin_threads, threads\n"
        "pin_threads({0}); print(threads(), {{pool['num_threads'] for pool in threadpoolctl.threadpool_info()}})"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    for count in (1, 2, 3):
        command = (sys.executable, "-c", code.format(count))
        found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert found.stdout.strip() == f"{count} {{{count}}}", found.stderr[-500:]
