"""All loaded models of a node, each in a worker process of its own.

Rules:

1. This process imports no model library and unpickles nothing (a test looks at its modules).
2. A model runs only for the CID that its grant names; the two are compared at every run.
3. A run ends before the lease of its hold: it is not started when the rest of the lease is shorter than a run may take.
4. Unloading ends the process and closes the memory files; models that nobody used longest make room for new ones.

This module alone makes `Output`.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from divault.errors import CidMismatch, DivaultError, InputInvalid, ModelNotLoaded, NotReady, Overloaded
from divault.models.descriptions import Description
from divault.telemetry import log
from divault.values import Cid, Digest, Hold, ModelId, OpenedModel, Output, SignedCall
from divault.workers import confine
from divault.workers.process import PROGRAM, BadWorker, WorkerEnded, WorkerProcess
from divault.workers.runner import Limits, Runner, confined, policy

_log = log("workers")
_LEASE_MARGIN_S = 2.0
"""For what stands around a run: sending, checking, the commit that charges it."""
_PROVE_S = 4.0


class Executor(Protocol):
    """Runs opened models; on this machine `WorkerPool` does."""

    async def run(self, opened: OpenedModel, hold: Hold, call: SignedCall) -> Output:
        """The answer to the call's input, or a typed error; the work ends with its deadline."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What there is to say of a loaded model. Never a key or a path."""

    model: ModelId
    cid: str
    description: Description
    bytes: int
    """Of its memory files."""
    sandbox: str
    """The level that its worker proved."""
    seconds: float
    """How long loading took."""
    loaded_at: int
    """Unix seconds."""
    state: str
    """`ready`, `restarting` or `failed`."""


class WorkerPool:
    """The models of one node. Belongs to one event loop; every method is safe to call concurrently there."""

    def __init__(
        self,
        *,
        predict_timeout_s: float,
        load_timeout_s: float,
        max_queue: int = 64,
        max_models_bytes: int | None = None,
        threads: int = 1,
        program: tuple[str, ...] = PROGRAM,
    ) -> None:
        """`predict_timeout_s` bounds one prediction, `load_timeout_s` start and load of a worker.

        `max_queue`: calls that may wait for one model. `max_models_bytes`: memory files of all models together.
        `threads`: of each worker. `program`: what the interpreter of a worker runs; tests put hostile ones there.
        """
        self._limits = Limits(predict_timeout_s, load_timeout_s, max_queue, threads=threads, program=program)
        self._max_models_bytes = max_models_bytes
        self._runners: dict[Digest, Runner] = {}
        self._facts: dict[Digest, tuple[float, int]] = {}
        self._report = confine.unknown()
        self._closed = False

    @property
    def sandbox_level(self) -> str:
        """The confinement that workers of this release reach."""
        return confine.LEVEL

    def sandbox_report(self) -> dict[str, Any]:
        """The level and checks that the last worker proved; `unknown` before the first one."""
        return {
            "effective": self._report.level,
            "checks": dict(self._report.checks),
            "memory_mechanism": "rlimit" if self._report.checks.get("mem_limit") == "enforced" else "none",
        }

    async def load(self, opened: OpenedModel) -> Loaded:
        """The model in a worker of its own. Takes over the descriptors of `opened`, also when it fails.

        A model that is loaded under the same id with another CID is replaced, once the new one stands.
        Raises UnsupportedModel, ModelFailed, DeadlineExceeded, Overloaded (no room), NotReady (closing).
        """
        started = time.monotonic()
        runner = Runner(opened, self._limits, self._note_report)
        await self._make_room(runner)
        await runner.load()
        key = opened.model.key
        old = self._runners.get(key)
        if self._closed or (old is not None and old.opened.cid.text == opened.cid.text):
            await runner.close()
            if old is None:
                raise NotReady("the node is closing", retry_after=5)
            return self._describe(old)
        self._runners[key] = runner
        self._facts[key] = (time.monotonic() - started, int(time.time()))
        if old is not None:
            await old.close()
        return self._describe(runner)

    async def run(self, opened: OpenedModel, hold: Hold, call: SignedCall) -> Output:
        """The answer to the call's input.

        Raises CidMismatch, ModelNotLoaded, InputInvalid, ModelFailed (it raised, died or answered what can't be sent),
        DeadlineExceeded (killed at the deadline), Overloaded, NotReady (its worker keeps dying).
        """
        granted = hold.grant.model
        if granted.cid != opened.cid.text:
            raise CidMismatch("the model that is loaded is not the one granted", have=opened.cid.text, need=granted.cid)
        if granted.model.key != opened.model.key:
            raise ModelNotLoaded("the model that is loaded is not the one granted", model_id=granted.model.text)
        runner = self._runner(opened)
        if call.input_data is None:
            example = runner.description.example
            raise InputInvalid("input_data is missing", field="input_data", expected="an object", example=example)
        patience_s = hold.lease_until - time.time() - self._limits.predict_timeout_s - _LEASE_MARGIN_S
        if patience_s <= 0:
            raise Overloaded("the reservation of this run ends too soon to start it: come back", retry_after=1)
        result = await runner.run(call.input_data, call.parameters, patience_s)
        return Output(
            result=result.result,
            runtime=msgspec.to_builtins(runner.description.runtime),
            plaintext_sha256=opened.plaintext_sha256,
            rows=result.rows,
        )

    def find(self, model: ModelId, cid: Cid) -> OpenedModel | None:
        """The loaded model of this id and content, to be handed to `run`."""
        runner = self._runners.get(model.key)
        return runner.opened if runner is not None and runner.opened.cid.text == cid.text else None

    def describe(self, opened: OpenedModel) -> Loaded:
        """What there is to say of it. Raises ModelNotLoaded."""
        return self._describe(self._runner(opened))

    def loaded(self) -> list[Loaded]:
        """All loaded models, in the order in which they came."""
        return [self._describe(runner) for runner in self._runners.values()]

    async def unload(self, model: Digest) -> bool:
        """End the model's worker and give its memory back; False when it is not loaded. A running call finishes."""
        runner = self._runners.pop(model, None)
        if runner is None:
            return False
        await runner.close()
        return True

    async def probe(self) -> str:
        """A sentence about what works, proved just now: every worker was asked, or a fresh one if there is none.

        Raises NotReady when no worker answers.
        """
        runners = list(self._runners.values())
        if not runners:
            await self._prove()
            return "no model is loaded; a worker started, confined itself and answered"
        lives = await asyncio.gather(*(runner.ping() for runner in runners))
        silent = [runner.opened.model.text for runner, alive in zip(runners, lives, strict=True) if not alive]
        if len(silent) == len(runners):
            raise NotReady(f"no worker answers ({len(silent)} models)", retry_after=5)
        if silent:
            return f"{len(runners) - len(silent)} of {len(runners)} models answer; not: {', '.join(silent[:5])}"
        return f"{len(runners)} models loaded, every worker answers"

    async def close(self) -> None:
        """Finish what waits, within one prediction's deadline, and end all workers."""
        self._closed = True
        runners, self._runners = list(self._runners.values()), {}
        await asyncio.gather(*(runner.close(self._limits.predict_timeout_s) for runner in runners))

    def _runner(self, opened: OpenedModel) -> Runner:
        runner = self._runners.get(opened.model.key)
        if runner is None or runner.opened.cid.text != opened.cid.text:
            raise ModelNotLoaded(f"{opened.model} is not loaded here any more", model_id=opened.model.text)
        return runner

    def _describe(self, runner: Runner) -> Loaded:
        seconds, at = self._facts[runner.opened.model.key]
        return Loaded(
            model=runner.opened.model,
            cid=runner.opened.cid.text,
            description=runner.description,
            bytes=runner.opened.size,
            sandbox=self._report.level,
            seconds=round(seconds, 3),
            loaded_at=at,
            state=runner.state,
        )

    def _note_report(self, report: confine.Report) -> None:
        self._report = report

    async def _make_room(self, new: Runner) -> None:
        """End idle models, the longest unused first, until the new one fits."""
        most, size = self._max_models_bytes, new.opened.size
        while most is not None and self._bytes() + size > most:
            idle = [runner for runner in self._runners.values() if not runner.busy]
            if size > most or not idle:
                await new.close()
                raise Overloaded(f"no room for a model of {size} bytes: {most} are set aside for all", retry_after=30)
            oldest = min(idle, key=lambda runner: runner.last_used)
            _log.info("unloaded to make room", model_id=oldest.opened.model.text)
            await self.unload(oldest.opened.model.key)

    def _bytes(self) -> int:
        return sum(runner.opened.size for runner in self._runners.values())

    async def _prove(self) -> None:
        process = await WorkerProcess.start([], 1, self._limits.program, lambda: None)
        try:
            self._note_report(await confined(process, policy(0), _PROVE_S))
        except (TimeoutError, WorkerEnded, BadWorker, DivaultError) as err:
            raise NotReady("a worker can't be started", retry_after=5) from err
        finally:
            await process.end()
