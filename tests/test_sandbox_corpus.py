"""The containment corpus, runs 2 and 3: hostile models run with nothing but confinement in their way.

Evidence from outside decides, beside what the probes themselves say: files in the open folder, connections, datagrams,
the canary process, and whether another model of the same node still answers as before.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from divault.errors import DivaultError
from divault.models import example
from divault.values import OpenedModel
from divault.workers.confinement import Confinement
from divault.workers.pool import WorkerPool
from divault.workers.worker import Tuning
from tests.test_model_torch_worker import opened
from tests.unrestricted import COMMAND
from tests.vectors.test_sandbox import CASES, Canaries, canaries, corpus
from tests.worker_calls import run

__all__ = ["canaries", "corpus"]  # fixtures
LOAD_S, ANSWER_S = 8, 4
"""As in the documented runs: deadlines decide what hangs."""
AT_ONCE = 3
QUICK = ("pickle4", "pickle5", "safetensors")
"""Containers that need no second for their library; the others are part of the soak."""
LEVELS = ["standard", *(["strict"] if shutil.which("bwrap") else [])]


@dataclass
class Scene:
    """A node's workers: a hostile pool, and an ordinary model beside it."""

    hostile: WorkerPool
    ordinary: WorkerPool
    victim: OpenedModel
    row: list[float]
    expected: Any = None

    async def victim_answers(self) -> Any:
        return await run(self.ordinary, self.victim, {"features": self.row})

    async def try_model(self, path: Path) -> Any:
        """What a caller gets from it: an answer, or the error's code."""
        model = opened(path.name, {path.name: path.read_bytes()})
        try:
            await self.hostile.load(model)
        except DivaultError as err:
            return err.code
        try:
            return await run(self.hostile, model, {"x": 1})
        except DivaultError as err:
            return err.code
        finally:
            await self.hostile.unload(model.model.key)


def pool(level: Any, command: tuple[str, ...] | None = None) -> WorkerPool:
    tuning = Tuning(threads=1) if command is None else Tuning(command=command, threads=1)
    confinement = Confinement(level)
    return WorkerPool(predict_timeout_s=ANSWER_S, load_timeout_s=LOAD_S, tuning=tuning, confinement=confinement)


@pytest.fixture
async def scenes(tmp_path: Path, canaries: Canaries, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    monkeypatch.setenv("DIVAULT_CANARY", canaries.settings["secret"])
    made: list[Scene] = []

    async def make(level: str) -> Scene:
        trained = await asyncio.to_thread(example.train, tmp_path)
        victim = opened("victim", {"model": trained.path.read_bytes()})
        ordinary = replaced_deadline(pool("standard" if level == "off" else level))
        scene = Scene(pool(level, COMMAND), ordinary, victim, trained.rows[0])
        made.append(scene)
        assert await scene.hostile.prove_sandbox() == level
        await scene.ordinary.load(victim)
        scene.expected = await scene.victim_answers()
        return scene

    yield make
    for scene in made:
        await scene.hostile.close()
        await scene.ordinary.close()


def replaced_deadline(made: WorkerPool) -> WorkerPool:
    """An honest model on a busy machine may take longer than a hostile one is given."""
    made._deadlines = replace(made._deadlines, load_s=60, predict_s=30)
    return made


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def tree(pid: int) -> list[int]:
    """The process and everything below it."""
    below = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [pid, *(one for young in below for one in tree(young))]


def programs(pids: Sequence[int]) -> list[str]:
    return [Path(f"/proc/{pid}/comm").read_text().strip().rstrip("0123456789.") for pid in pids]


def resident() -> int:
    """Bytes of this process, which is the gateway here."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def chosen(containers: tuple[str, ...] | None) -> list[dict[str, Any]]:
    return [case for case in CASES if containers is None or case["container"] in containers]


def breached(answer: Any) -> bool:
    return answer == "FORGED" or (isinstance(answer, dict) and answer.get("breached") is True)


async def forks_ended(scene: Scene) -> list[list[int]]:
    """The processes of each template, once what it killed last is reaped, or ten seconds later."""
    for _ in range(100):
        templates = [tree(template._popen.pid) for template in scene.hostile._templates.there()]
        with contextlib.suppress(OSError):  # one ended between the look and its name
            if all(programs(pids).count("python") == 1 for pids in templates):
                break
        await asyncio.sleep(0.1)
    return templates


async def contain(scene: Scene, folder: Path, cases: list[dict[str, Any]], canaries: Canaries) -> None:
    memory = resident()
    before, turns, answers = children(), asyncio.Semaphore(AT_ONCE), dict[str, Any]()

    async def one(name: str) -> None:
        async with turns:
            answers[name] = await scene.try_model(folder / name)
            assert await scene.victim_answers() == scene.expected, f"another model answers otherwise after {name}"

    await asyncio.gather(*(one(case["file"]) for case in cases))

    assert {name: answer for name, answer in answers.items() if breached(answer)} == {}
    assert canaries.touched() == []
    templates = await forks_ended(scene)
    assert children() - {pids[0] for pids in templates} == before, "a process is left over"
    assert {name for pids in templates for name in programs(pids[1:])} <= {"bwrap", "python"}
    assert all(programs(pids).count("python") == 1 for pids in templates), "a fork is left over"
    assert resident() - memory < 10 << 20, "the node's own memory grew"
    # Probes that could act at all say that they were refused: the corpus did run.
    tried = [answer for answer in answers.values() if isinstance(answer, dict) and answer.get("breached") is False]
    assert len(tried) > len(cases) // 3


@pytest.mark.timeout(180)
@pytest.mark.parametrize("level", LEVELS)
async def test_every_hostile_file_is_contained(level: str, scenes: Any, corpus: Path, canaries: Canaries) -> None:
    await contain(await scenes(level), corpus, chosen(QUICK), canaries)


@pytest.mark.soak
@pytest.mark.parametrize("level", LEVELS)
async def test_every_hostile_file_of_every_container_is_contained(
    level: str, scenes: Any, corpus: Path, canaries: Canaries
) -> None:
    await contain(await scenes(level), corpus, chosen(None), canaries)


@pytest.mark.timeout(180)
async def test_without_confinement_the_probes_bite(scenes: Any, corpus: Path, canaries: Canaries) -> None:
    """A probe that no longer bites here would prove nothing above. What must never run unconfined is left out."""
    scene = await scenes("off")
    expected, found = {}, {}
    for case in chosen(("pickle4",)):
        if case["off"] == "skip" or not case["needs_code"] or case["class"] in ("hang", "disk"):
            continue
        answer = await scene.try_model(corpus / case["file"])
        expected[case["id"]] = case["off"]
        found[case["id"]] = "breach" if breached(answer) or canaries.touched() else "contained"
        for path in Path(canaries.settings["outside_dir"]).iterdir():
            path.unlink()
        _drain(canaries)

    assert sum(verdict == "breach" for verdict in expected.values()) > 8
    assert found == expected


def _drain(canaries: Canaries) -> None:
    """Make the listeners forget what reached them."""
    for listener in canaries.listeners:
        listener.setblocking(False)
        try:
            while True:
                if listener.type == socket.SOCK_DGRAM:
                    listener.recv(4096)
                else:
                    listener.accept()[0].close()
        except BlockingIOError:
            continue
