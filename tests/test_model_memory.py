"""Memory of loaded models: a budget by what is measured, idle models make room, busy ones never; and the device."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable

import pytest
import torch

from divault.errors import ModelFailed, NotReady, SettingsInvalid, TooLarge
from divault.models import torch_runtime
from divault.models.base import CPU, Place
from divault.settings import Settings
from divault.workers.memory import memory_of
from divault.workers.pool import WorkerPool
from divault.workers.worker import Tuning
from tests import onnx_models
from tests.memory_models import as_json, state_dict_file
from tests.worker_models import alive, answer, children, hostile, opened

MB = 1_000_000
MakePool = Callable[..., WorkerPool]


@pytest.fixture
async def make_pool() -> AsyncIterator[MakePool]:
    before = children()
    pools: list[WorkerPool] = []

    def make(memory_mb: int | None = None, tuning: Tuning | None = None, place: Place = CPU) -> WorkerPool:
        memory = None if memory_mb is None else memory_mb * MB
        pools.append(
            WorkerPool(predict_timeout_s=10, load_timeout_s=60, tuning=tuning, memory_bytes=memory, place=place)
        )
        return pools[-1]

    yield make
    for pool in pools:
        await pool.close()
    assert children() <= before


def names(pool: WorkerPool) -> set[str]:
    return {loaded.model.text for loaded in pool.loaded()}


async def test_the_least_recently_used_makes_room(make_pool: MakePool) -> None:
    pool = make_pool(320, hostile("honest"))
    first, second = (opened(bytes(60 * MB), name) for name in ("first", "second"))
    await pool.load(first)
    await pool.load(second)
    assert names(pool) == {"first", "second"}
    assert await answer(pool, first, {})
    gone = next(loaded.pid for loaded in pool.loaded() if loaded.model.text == "second")

    await pool.load(opened(bytes(60 * MB), "third"))

    assert names(pool) == {"first", "third"}
    assert not alive(gone or 0)
    assert await answer(pool, first, {})


async def test_who_is_at_work_never_makes_room(make_pool: MakePool) -> None:
    pool = make_pool(320, hostile("slow"))
    busy = opened(bytes(100 * MB), "busy")
    await pool.load(busy)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    other = opened(bytes(100 * MB), "other")
    running = asyncio.create_task(answer(pool, busy, {}))
    while pool._entries[busy.model.key].worker.idle:
        await asyncio.sleep(0.005)
    with pytest.raises(NotReady, match="no memory") as caught:
        await pool.load(other)

    assert caught.value.data["retry_after"] >= 1
    assert len(os.listdir("/proc/self/fd")) == before, "the refused model's memory is given back"  # noqa: PTH208
    assert await running
    await pool.load(opened(bytes(100 * MB), "other"))
    assert names(pool) == {"other"}


@pytest.mark.parametrize(("state", "pause_s"), [("failed", 0.01), ("restarting", 30.0)])
async def test_who_has_no_process_makes_room(make_pool: MakePool, state: str, pause_s: float) -> None:
    """It would keep its memory for as long as its process dies, and that may be for ever."""
    pool = make_pool(320, hostile("unasked", first_pause_s=pause_s, longest_pause_s=pause_s))
    await pool.load(opened(bytes(100 * MB), "dying"))
    async with asyncio.timeout(20):
        while pool.loaded()[0].state != state:
            await asyncio.sleep(0.01)
    await pool.load(opened(bytes(100 * MB), "other"))

    assert names(pool) == {"other"}


async def test_who_failed_makes_room_before_who_works(make_pool: MakePool) -> None:
    pool = make_pool(360, hostile("exit", window_s=60.0))
    await pool.load(opened(bytes(60 * MB), "first"))
    second = opened(bytes(60 * MB), "second")
    await pool.load(second)
    for _ in range(5):
        with pytest.raises(ModelFailed):
            await answer(pool, second, {})
    async with asyncio.timeout(20):
        while pool.loaded()[1].state != "failed":
            await asyncio.sleep(0.01)
    await pool.load(opened(bytes(90 * MB), "third"))

    assert names(pool) == {"first", "third"}, "though the first was used longer ago"


async def test_who_is_waited_for_while_it_comes_back_keeps_its_room(make_pool: MakePool) -> None:
    pool = make_pool(320, hostile("unasked", first_pause_s=1.0, longest_pause_s=1.0))
    dying = opened(bytes(100 * MB), "dying")
    await pool.load(dying)
    async with asyncio.timeout(20):
        while pool.loaded()[0].state != "restarting":
            await asyncio.sleep(0.01)
    waiting = asyncio.create_task(answer(pool, dying, {}))
    await asyncio.sleep(0)
    with pytest.raises(NotReady, match="no memory"):
        await pool.load(opened(bytes(100 * MB), "other"))

    assert names(pool) == {"dying"}
    waiting.cancel()


async def test_what_never_fits_is_refused_and_nobody_is_unloaded_for_less(make_pool: MakePool) -> None:
    pool = make_pool(320, hostile("honest"))
    await pool.load(opened(b"small", "small"))
    with pytest.raises(TooLarge, match="DIVAULT_MODEL_MEMORY_MB") as caught:
        await pool.load(opened(bytes(200 * MB), "giant"))

    assert caught.value.data["limit_bytes"] == 320 * MB < caught.value.data["have_bytes"]
    assert names(pool) == {"small"}


async def test_loads_at_once_do_not_promise_the_same_memory(make_pool: MakePool) -> None:
    pool = make_pool(320, hostile("honest"))
    loads = (pool.load(opened(bytes(60 * MB), name)) for name in ("first", "second"))
    found = await asyncio.gather(*loads, return_exceptions=True)

    assert isinstance(found[1], NotReady)
    assert names(pool) == {"first"}
    await pool.load(opened(bytes(60 * MB), "second"))
    assert names(pool) == {"first", "second"}, "one after the other both fit"


async def test_what_workers_are_forked_from_counts(make_pool: MakePool) -> None:
    pool = make_pool(200)
    await pool.load(opened(onnx_models.classifier(), "first"))
    taken = sum(template.memory_bytes for template in pool._templates.there())
    assert taken > 20 * MB
    pool._memory_bytes = taken + 80 * MB
    with pytest.raises(NotReady):
        await pool.load(opened(bytes(10 * MB), "second"))
    assert names(pool) == {"first"}


async def test_who_leaves_while_room_is_made_leaves_nothing(make_pool: MakePool) -> None:
    pool = make_pool(320, hostile("honest"))
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    task = asyncio.create_task(pool.load(opened(bytes(MB), "left")))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])

    assert task.cancelled()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert pool._coming == {}


def test_memory_of_a_process_counts_its_children() -> None:
    code = (
        "import subprocess, sys; x = bytearray(30_000_000); c = subprocess.Popen([sys.executable, '-c', sys.argv[1]],"
    )
    code += " stdout=subprocess.PIPE); c.stdout.readline(); print(flush=True); sys.stdin.read(); c.kill(); c.wait()"
    inner = "import time; x = bytearray(b'1') * 50_000_000; print(flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", code, inner], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = memory_of(process.pid)
        process.communicate()

    assert 50 * MB < found < 150 * MB
    assert memory_of(process.pid) == 0


# --- devices ----------------------------------------------------------------------------------------------------------

TINY = {
    "weights.bin": state_dict_file({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}),
    "divault.json": as_json({"architecture": {"type": "linear", "in": 2, "out": 1}}),
}


@pytest.mark.parametrize("device", ["cuda:99", "mps"])
async def test_a_device_that_is_not_there_is_found_out_before_any_model_comes(device: str, make_pool: MakePool) -> None:
    pool = make_pool(place=Place(device))
    with pytest.raises(SettingsInvalid, match=f"'{device}' is not here") as caught:
        await pool.prove_device()

    assert caught.value.data["setting"] == "DIVAULT_DEVICE"
    assert await pool.probe() == "no model is loaded; a worker starts and answers"


@pytest.mark.parametrize("device", ["auto", "cpu"])
async def test_what_every_machine_has_needs_no_torch(device: str, make_pool: MakePool) -> None:
    await make_pool(tuning=Tuning(command=("/bin/false",)), place=Place(device)).prove_device()


def test_a_gpu_is_nothing_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SettingsInvalid, match="torch is not installed"):
        torch_runtime.require_device("cuda")
    torch_runtime.require_device("auto")


async def test_auto_is_the_cpu_where_there_is_nothing_else(make_pool: MakePool) -> None:
    pool, model = make_pool(place=Place("auto")), opened(TINY)
    loaded = await pool.load(model)

    assert loaded.description.device == "cpu"
    assert await answer(pool, model, {"tensor": [1.0, 2.0]}) == {"predictions": [[3.0]]}


async def test_a_device_that_is_not_there_is_the_nodes_fault_and_no_500(make_pool: MakePool) -> None:
    pool = make_pool(place=Place("cuda:7"))
    with pytest.raises(NotReady, match="DIVAULT_DEVICE"):
        await pool.load(opened(TINY))
    assert pool.loaded() == []


def test_auto_takes_a_gpu_that_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert torch_runtime._best() == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert torch_runtime._best() == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert torch_runtime._best() == "cpu"


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:11", "mps"])
def test_devices_that_can_be_set(device: str) -> None:
    assert Settings.load({"DIVAULT_DEVICE": device}, env_file=None).divault_device == device


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:-1", "CPU", "cuda:0;rm", "cuda:100"])
def test_devices_that_can_not(device: str) -> None:
    with pytest.raises(SettingsInvalid, match="DIVAULT_DEVICE"):
        Settings.load({"DIVAULT_DEVICE": device}, env_file=None)


def test_the_budget_is_what_is_set_or_most_of_the_machine() -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    assert Settings.load({"DIVAULT_MODEL_MEMORY_MB": "500"}, env_file=None).model_memory_bytes == 500 * MB
    assert 0 < Settings.load({}, env_file=None).model_memory_bytes <= whole * 4 // 5
