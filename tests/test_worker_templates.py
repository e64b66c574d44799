"""Workers that are forked: as confined, as clean and as alone as those that are started, and sooner there."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from signal import SIGKILL
from typing import Any

import numpy as np
import pytest
import torch
import xgboost
from sklearn.linear_model import LogisticRegression

from divault.errors import ModelFailed, UnsupportedModel
from divault.models.base import CPU
from divault.models.libraries import LIBRARIES
from divault.values import MemoryFile, OpenedModel
from divault.workers import template as templates
from divault.workers.confinement import Confinement
from divault.workers.pool import WorkerPool
from divault.workers.process import Process
from divault.workers.sandbox import needed_for
from divault.workers.template import Templates
from divault.workers.worker import Deadlines, Surroundings, Tuning, Worker
from tests import onnx_models
from tests.memory_models import as_json, state_dict_file
from tests.worker_models import HOSTILE, alive, answer, dumped, opened

ROWS = np.random.default_rng(3).normal(size=(40, 4))
TARGET = (ROWS[:, 0] > 0).astype(int)
INPUT = {"inputs": ROWS[:1].tolist()}
MakePool = Callable[..., WorkerPool]


@pytest.fixture
async def make_pool() -> AsyncIterator[MakePool]:
    pools: list[WorkerPool] = []

    def make(level: Any = "standard", **tuning: Any) -> WorkerPool:
        quick = Tuning(first_pause_s=0.01, **tuning)
        pools.append(WorkerPool(predict_timeout_s=10, load_timeout_s=60, tuning=quick, confinement=Confinement(level)))
        return pools[-1]

    yield make
    for pool in pools:
        await pool.close()


def classifier(name: str = "m") -> OpenedModel:
    return opened(onnx_models.classifier(), name)


def network() -> OpenedModel:
    told = {"architecture": {"type": "mlp", "sizes": [4, 8, 3], "activation": "relu"}}
    torch.manual_seed(1)
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    return opened({"weights.bin": state_dict_file(module.state_dict()), "divault.json": as_json(told)})


def parent_of(pid: int | None) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def gone(pid: int) -> None:
    async with asyncio.timeout(10):
        while alive(pid):
            await asyncio.sleep(0.02)


async def back(pool: WorkerPool, name: str, before: int | None) -> None:
    """Return when another process has the model."""
    async with asyncio.timeout(20):
        while {one.model.text: one.pid for one in pool.loaded() if one.state == "ready"}.get(name) in (None, before):
            await asyncio.sleep(0.02)


def booster() -> OpenedModel:
    trained = xgboost.train({"objective": "binary:logistic"}, xgboost.DMatrix(ROWS, TARGET), 3)
    return opened(bytes(trained.save_raw("ubj")))


@pytest.mark.parametrize(
    ("make", "data"),
    [(classifier, INPUT), (network, {"tensor": ROWS[0].tolist()}), (booster, {"features": ROWS[0].tolist()})],
)
async def test_who_was_forked_answers_like_who_was_started(
    make_pool: MakePool, make: Callable[[], OpenedModel], data: Any
) -> None:
    forking, starting = make_pool(), make_pool(templates=False)
    forked, started = make(), make()
    fork, start = await forking.load(forked), await starting.load(started)

    assert parent_of(fork.pid) != os.getpid()
    assert parent_of(start.pid) == os.getpid()
    assert await answer(forking, forked, data) == await answer(starting, started, data)
    assert fork.description == start.description, "the runtime that receipts hash is the same"


@pytest.mark.parametrize("level", ["standard", "strict"])
async def test_who_was_forked_is_confined_like_who_was_started(make_pool: MakePool, level: str) -> None:
    forking, starting = make_pool(level), make_pool(level, templates=False)
    assert await forking.prove_sandbox() == level
    await starting.prove_sandbox()
    fork, start = await forking.load(classifier()), await starting.load(classifier())

    assert parent_of(fork.pid) != parent_of(start.pid)
    assert forking.sandbox_report() == starting.sandbox_report()
    needed = needed_for(level)
    assert {forking.sandbox_report()["checks"][name] for name in needed} == {"enforced"}
    assert fork.sandbox == start.sandbox == level


async def test_it_holds_its_socket_and_the_model_and_nothing_of_its_template(make_pool: MakePool) -> None:
    pool = make_pool()
    pids = [(await pool.load(classifier(name))).pid for name in ("one", "two")]

    for pid in pids:
        held = {entry.name: str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()}
        assert set(held) == {"0", "1", "2", "3", "4"}
        assert held["3"].startswith("socket:")
        assert held["4"].startswith("/memfd:")
        assert os.getsid(pid or 0) == os.getpgid(pid or 0) == pid


async def test_pickles_and_programs_have_a_process_of_their_own(make_pool: MakePool) -> None:
    pool = make_pool()
    loaded = await pool.load(opened(dumped(LogisticRegression().fit(ROWS, TARGET))))

    assert parent_of(loaded.pid) == os.getpid()


async def test_what_nobody_loads_is_named_by_the_one_who_looked(make_pool: MakePool) -> None:
    pool = make_pool()
    with pytest.raises(UnsupportedModel):
        await pool.load(opened(b"not a model at all"))

    assert pool.loaded() == []


async def test_one_template_serves_all_models_of_its_libraries(make_pool: MakePool) -> None:
    pool = make_pool()
    models = [classifier(f"m{number}") for number in range(4)]
    loaded = await asyncio.gather(*map(pool.load, models))

    assert len({parent_of(one.pid) for one in loaded}) == 1
    assert len({one.pid for one in loaded}) == 4


async def test_a_killed_fork_comes_back_from_the_same_template(make_pool: MakePool) -> None:
    pool, model, other = make_pool(), classifier(), classifier("other")
    first, bystander = await pool.load(model), await pool.load(other)
    template = parent_of(first.pid)
    before = await answer(pool, model, INPUT)
    os.kill(first.pid or 0, SIGKILL)
    await back(pool, "m", first.pid)

    assert await answer(pool, model, INPUT) == before
    again = {one.model.text: one.pid for one in pool.loaded()}
    assert again["m"] != first.pid
    assert parent_of(again["m"]) == template
    assert again["other"] == bystander.pid


async def test_a_dead_template_takes_its_workers_along_and_all_come_back(make_pool: MakePool) -> None:
    pool, model = make_pool(), classifier()
    loaded = await pool.load(model)
    template = parent_of(loaded.pid)
    os.kill(template, SIGKILL)
    await back(pool, "m", loaded.pid)

    assert (await answer(pool, model, INPUT)).keys()
    assert parent_of(pool.loaded()[0].pid) not in (template, os.getpid())


async def test_unloading_leaves_no_process_but_the_template(make_pool: MakePool) -> None:
    pool, model = make_pool(), classifier()
    loaded = await pool.load(model)
    template = parent_of(loaded.pid)
    await pool.unload(model.model.key)

    assert not alive(loaded.pid or 0)
    assert alive(template)
    async with asyncio.timeout(5):
        while Path(f"/proc/{loaded.pid}").exists():  # its template reaps it
            await asyncio.sleep(0.01)
    await pool.close()
    assert not alive(template)


async def test_a_template_that_nobody_uses_ends(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, model = make_pool(), classifier()
    pool._templates = Templates(lambda: None, idle_s=0.3)
    loaded = await pool.load(model)
    template = parent_of(loaded.pid)
    await asyncio.sleep(0.6)
    assert alive(template), "not while it has a worker"
    await pool.unload(model.model.key)
    await gone(template)

    assert (await pool.load(classifier())).state == "ready", "and comes when it is wanted"


async def test_loads_that_are_given_up_leave_nothing(make_pool: MakePool) -> None:
    pool, stays = make_pool(), classifier("stays")
    await pool.load(stays)
    processes, descriptors = _descendants(), _descriptors()
    for wait in (0.0, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03):
        model = classifier("left")
        task = asyncio.create_task(pool.load(model))
        await asyncio.sleep(wait)
        task.cancel()
        await asyncio.wait([task])
        await pool.unload(model.model.key)
    async with asyncio.timeout(10):
        while _descendants() != processes or _descriptors() > descriptors:
            await asyncio.sleep(0.02)

    assert (await answer(pool, stays, INPUT)).keys()


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _descendants() -> set[int]:
    found, todo = set(), [os.getpid()]
    while todo:
        pid = todo.pop()
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            young = {int(one) for one in task.read_text().split()}
            todo += young
            found |= {one for one in young if alive(one)}
    return found


NODE = """
import asyncio, sys
from divault.workers.confinement import Confinement
from divault.workers.pool import WorkerPool
from tests.test_worker_templates import _descendants, classifier

async def main():
    pool = WorkerPool(predict_timeout_s=9, load_timeout_s=60, confinement=Confinement(sys.argv[1]))
    await pool.prove_sandbox()
    await pool.load(classifier())
    print(*_descendants(), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("level", ["standard", "strict"])
def test_a_node_that_is_killed_leaves_neither_template_nor_worker(level: str) -> None:
    command = (sys.executable, "-c", NODE, level)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent) as node:
        assert node.stdout is not None
        pids = [int(pid) for pid in node.stdout.readline().split()]
        assert len(pids) >= 3, "two templates and a worker"
        assert all(map(alive, pids))
        node.kill()
    for pid in pids:
        asyncio.run(gone(pid))


async def test_a_template_that_died_unnoticed_is_replaced_at_once(make_pool: MakePool) -> None:
    pool = make_pool()
    first = await pool.load(classifier("one"))
    template = parent_of(first.pid)
    os.kill(template, SIGKILL)
    second = await pool.load(classifier("two"))

    assert parent_of(second.pid) not in (template, os.getpid())


async def test_without_a_template_workers_are_started(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "_COMMAND", (sys.executable, "-c", "raise SystemExit('no')"))
    pool, model = make_pool(), classifier()
    loaded = await pool.load(model)

    assert parent_of(loaded.pid) == os.getpid()
    assert (await answer(pool, model, INPUT)).keys()


async def test_a_model_of_more_files_than_a_message_takes_is_started(make_pool: MakePool) -> None:
    told = {f"notes/README{number}": b"x" for number in range(260)}
    pool, model = make_pool(), opened({"model.onnx": onnx_models.classifier()} | told)
    loaded = await pool.load(model)

    assert parent_of(loaded.pid) == os.getpid()
    assert (await answer(pool, model, INPUT)).keys()


class _Lying(Templates):
    """Forks what says that a model has a template of some name."""

    name = ""

    async def fork(
        self,
        name: str,
        files: Sequence[MemoryFile],
        on_loss: Callable[[], None],
    ) -> Process | None:
        command = (sys.executable, "-I", str(HOSTILE), f"load_known={self.name}")
        return await Process.start(command, files, 1, on_loss)


@pytest.mark.parametrize("name", ["nobody", "os", "x" * 50])
async def test_a_template_that_there_is_not_is_never_asked_for(name: str) -> None:
    confinement = Confinement("off")
    lying = _Lying(lambda: None)
    lying.name = name
    around = Surroundings(Tuning(), confinement, lying)
    worker = Worker(classifier(), CPU, Deadlines(20, 5), around)
    with pytest.raises(ModelFailed) as caught:
        await worker.start()
    confinement.close()

    assert caught.value.data["kind"] == "protocol"


def test_what_templates_import_is_there() -> None:
    """A name that was misspelt, or that a newer library dropped, would be left out in silence."""
    names = sorted({name for modules in LIBRARIES.values() for name in modules})
    code = f"import importlib.util\nprint([name for name in {names!r} if importlib.util.find_spec(name) is None])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)

    assert (found.stdout.strip(), found.returncode) == ("[]", 0), found.stderr[-500:]
