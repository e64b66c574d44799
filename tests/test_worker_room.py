"""A system that has no process, descriptor or thread left: who wants one waits or is told, and nobody else is hurt."""

from __future__ import annotations

import asyncio
import os
import resource
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP
from typing import Any

import pytest

from divault.errors import NotReady
from divault.vault.keys import NodeIdentity
from divault.workers import template as templates
from divault.workers.opening import Opener
from divault.workers.pool import WorkerPool
from divault.workers.process import pidfd_of, spawn
from divault.workers.template import Template
from divault.workers.worker import Tuning
from tests.sealed_models import ME, blob, grant, sealed
from tests.test_worker_templates import INPUT, back, classifier, gone, parent_of
from tests.worker_models import alive, answer, hostile, opened

MakePool = Callable[..., WorkerPool]
FAILING = """
import errno, os, sys
real, sign = os.fork, {sign!r}
def fork():
    if os.path.exists(sign):
        raise BlockingIOError(errno.EAGAIN, "no process is left")
    return real()
os.fork = fork
sys.path[:0] = {path!r}
from divault.workers.template_child import main
main()
"""


@pytest.fixture
async def make_pool() -> AsyncIterator[MakePool]:
    pools: list[WorkerPool] = []

    def make(tuning: Tuning | None = None) -> WorkerPool:
        quick = tuning or Tuning(first_pause_s=0.01, longest_pause_s=0.05, deaths=1000)
        pools.append(WorkerPool(predict_timeout_s=10, load_timeout_s=30, tuning=quick))
        return pools[-1]

    yield make
    for pool in pools:
        await pool.close()


@contextmanager
def no_descriptors_but(few: int) -> Iterator[None]:
    """This process gets so many more, and no others."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + few, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("few", range(9))
async def test_a_worker_comes_back_when_descriptors_do(make_pool: MakePool, few: int) -> None:
    """Wherever they end: at a socket, a pipe, the process or what tells of its end."""
    pool, model = make_pool(hostile("honest", deaths=1000)), opened(b"any")
    loaded = await pool.load(model)
    worker = pool._entries[model.model.key].worker
    before = descriptors()
    with no_descriptors_but(few):
        os.kill(loaded.pid or 0, SIGKILL)
        await until(lambda: worker.state == "restarting")
        await until(lambda: len(worker._deaths) > 2 or worker.state == "ready")
    await until(lambda: worker.state == "ready")

    assert await answer(pool, model, {}) == {"predictions": [1]}
    assert descriptors() == before
    assert await pool.probe()


async def test_a_load_without_room_is_told_and_leaves_nothing(make_pool: MakePool) -> None:
    pool, model = make_pool(hostile("honest")), opened(b"any")
    before = descriptors()
    with no_descriptors_but(0), pytest.raises(NotReady):
        await pool.load(model)

    assert descriptors() == before - 1, "the model's file"
    assert pool.loaded() == []


def test_a_process_that_nobody_could_watch_is_ended() -> None:
    with Path(os.devnull).open("wb") as nowhere:
        process = spawn(("sleep", "600"), (), 1, nowhere.fileno())
    with no_descriptors_but(0), pytest.raises(OSError, match="Too many open files"):
        pidfd_of(process)

    assert process.returncode == -SIGKILL


async def test_a_model_that_nobody_restarts_fails_the_probe(make_pool: MakePool) -> None:
    pool, model = make_pool(hostile("honest", first_pause_s=60.0, longest_pause_s=60.0)), opened(b"any")
    loaded = await pool.load(model)
    worker = pool._entries[model.model.key].worker
    os.kill(loaded.pid or 0, SIGKILL)
    await until(lambda: worker._reviving is not None)
    assert "1 restarting" in await pool.probe()
    worker._reviving.cancel()
    await asyncio.wait([worker._reviving])

    with pytest.raises(NotReady, match="m "):
        await pool.probe()


# --- forks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """While this file is there, no template has room for a child."""
    found = tmp_path / "full"
    source = FAILING.format(sign=str(found), path=sys.path)
    monkeypatch.setattr(templates, "_COMMAND", (sys.executable, "-I", "-B", "-c", source))
    return found


async def test_a_fork_that_fails_ends_no_other_worker(make_pool: MakePool, sign: Path) -> None:
    pool, model, other = make_pool(), classifier(), classifier("other")
    first, bystander = await pool.load(model), await pool.load(other)
    template = parent_of(first.pid)
    worker = pool._entries[model.model.key].worker
    sign.touch()
    os.kill(first.pid or 0, SIGKILL)
    await until(lambda: len(worker._deaths) > 3)

    assert alive(template)
    assert alive(bystander.pid or 0)
    assert (await answer(pool, other, INPUT)).keys()
    with pytest.raises(NotReady):
        await pool.load(classifier("third"))
    sign.unlink()
    await back(pool, "m", first.pid)
    again = {one.model.text: one.pid for one in pool.loaded()}
    assert {parent_of(pid) for pid in again.values()} == {template}
    assert again["other"] == bystander.pid


@pytest.mark.parametrize("few", [0, 2, 3])
async def test_a_template_without_descriptors_keeps_its_workers(make_pool: MakePool, few: int) -> None:
    """At what comes with the message, and, with room for that, at what tells of the child's end."""
    pool, other = make_pool(), classifier("other")
    bystander = await pool.load(other)
    template = parent_of(bystander.pid)
    limits = resource.prlimit(template, resource.RLIMIT_NOFILE)
    taken = {int(entry.name) for entry in Path(f"/proc/{template}/fd").iterdir()}
    highest = sorted(set(range(len(taken) + few + 1)) - taken)[few]
    resource.prlimit(template, resource.RLIMIT_NOFILE, (highest, limits[1]))
    model = classifier()
    with pytest.raises(NotReady):
        await pool.load(model)
    resource.prlimit(template, resource.RLIMIT_NOFILE, limits)

    assert parent_of((await pool.load(classifier())).pid) == template
    assert pool.loaded()[0].pid == bystander.pid


async def test_a_template_that_is_stopped_holds_up_no_load(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "_FORK_S", 0.3)
    pool, model = make_pool(), classifier("forked")
    forked = await pool.load(model)
    template = parent_of(forked.pid)
    os.kill(template, SIGSTOP)
    others = await asyncio.gather(*(pool.load(classifier(name)) for name in ("one", "two")))

    assert {parent_of(one.pid) for one in others} == {os.getpid()}
    assert (await answer(pool, model, INPUT)).keys(), "its own workers go on"
    os.kill(template, SIGCONT)
    assert alive(template)
    await pool.unload(model.model.key)
    await gone(template)


async def test_a_load_given_up_when_its_fork_is_there_keeps_no_descriptor(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, loads = make_pool(), []
    await pool.load(classifier("stays"))
    hear = Template._hear

    def heard(template: Template) -> None:
        hear(template)
        loads[-1].cancel()

    monkeypatch.setattr(Template, "_hear", heard)
    for template in pool._templates.there():
        asyncio.get_running_loop().add_reader(template._control.fileno(), template._hear)
    before = descriptors()
    for _ in range(3):
        loads.append(asyncio.create_task(pool.load(classifier())))
        await asyncio.wait(loads)

    assert [load.cancelled() for load in loads] == [True] * 3
    assert descriptors() == before


@pytest.mark.parametrize("wait_s", [0.0, 0.05, 0.2])
async def test_a_load_under_way_when_the_pool_closes_is_told(make_pool: MakePool, wait_s: float) -> None:
    pool = make_pool()
    load = asyncio.create_task(pool.load(classifier()))
    await asyncio.sleep(wait_s)
    await pool.close()

    with pytest.raises(NotReady):
        await load


async def test_who_gives_up_his_load_is_not_told_that_the_node_stops(make_pool: MakePool) -> None:
    pool = make_pool()
    load = asyncio.create_task(pool.load(classifier()))
    await asyncio.sleep(0.05)
    load.cancel()
    await asyncio.wait([load])

    assert load.cancelled()


# --- opening --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["descriptors", "threads"])
async def test_a_file_is_not_opened_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    opener = Opener(max_model_bytes=10**6, timeout_s=20)
    file = blob(tmp_path, sealed(b"weights"))

    async def no_thread(*command: str, **settings: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched, no_descriptors_but(1 if failing == "descriptors" else 20):
        if failing == "threads":  # of asyncio, which waits in one for the process' end
            patched.setattr(asyncio, "create_subprocess_exec", no_thread)
        with pytest.raises(NotReady):
            await opener.open(file, grant(), [NodeIdentity(ME)])
    found = await opener.open(file, grant(), [NodeIdentity(ME)])
    opener.close()
    for one in found.files:
        os.close(one.fd)
