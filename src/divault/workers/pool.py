"""The pool: a worker process for every loaded model, and the proof that one of them ran.

The gateway's side imports no model library and unpickles nothing; see `wire` for what passes between the two, `worker`
for deadlines, queues and restarts, `sandbox` for what a worker gives up. This module alone makes `Output`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from divault.errors import (
    CidMismatch,
    DeadlineExceeded,
    InputInvalid,
    ModelFailed,
    ModelNotLoaded,
    NotReady,
    SettingsInvalid,
    TooLarge,
)
from divault.machine import cores
from divault.metrics import ModelFigures
from divault.models.base import CPU, Description, Piece, Place
from divault.telemetry import log
from divault.values import Cid, Digest, Hold, ModelId, OpenedModel, Output, SignedCall
from divault.workers import wire
from divault.workers.confinement import Confinement
from divault.workers.figures import SIZES
from divault.workers.process import Process, no_room_is_not_ready
from divault.workers.template import Templates
from divault.workers.users import Shared
from divault.workers.worker import Deadlines, Surroundings, Tuning, Worker

_log = log("workers")
_MOST_THREADS = 4
"""Of one worker: more gain little for one request at a time."""
_WORKER_BYTES = 64 << 20
"""What a worker takes before it has a model; measured, with scikit-learn or torch imported, it is 60 to 250 MB."""


class Executor(Protocol):
    """Where loaded models run: this pool's processes here; other machines' the same way."""

    async def run(
        self, opened: OpenedModel, hold: Hold, call: SignedCall, on_piece: Callable[[Piece], None] | None = None
    ) -> Output:
        """Run the call's input on the model. Raises as `WorkerPool.run`."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What is known of a loaded model now."""

    model: ModelId
    description: Description
    loaded_at: int
    """Unix seconds."""
    bytes: int
    """Of the opened model, which stays in memory as long as it is loaded."""
    sandbox: str
    """The level that its worker reported, proven in that process."""
    seconds: float
    """From the start of the process until the model was ready."""
    state: str
    """`ready`, `restarting` or `failed`."""
    pid: int | None
    """The process that holds it now; for operators and tests, not for answers."""


@dataclass(slots=True)
class _Entry:
    worker: Worker
    loaded_at: int
    seconds: float


class WorkerPool:
    """Worker processes of one node. All methods are safe to call concurrently on one event loop."""

    def __init__(
        self,
        *,
        predict_timeout_s: float,
        load_timeout_s: float,
        place: Place = CPU,
        tuning: Tuning | None = None,
        confinement: Confinement | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        """`predict_timeout_s` bounds one run and, apart from it, the wait in the queue before it.

        `memory_bytes`: what all loaded models may take together; without it there is no bound.

        `confinement`: how far workers are confined; without one at `standard`, as far as that holds here.
        """
        self._deadlines = Deadlines(load_s=load_timeout_s, predict_s=predict_timeout_s)
        self._place = place
        self._tuning = tuning or Tuning()
        self._entries: dict[Digest, _Entry] = {}
        self._coming: dict[Worker, int] = {}
        """Bytes that are kept for loads under way."""
        self._leaving: dict[Worker, asyncio.Task[None]] = {}
        """They were replaced, and answer whoever was sent to them before."""
        self._confinement = confinement or Confinement()
        self._templates = Templates(lambda: self._confinement.separate)
        self._memory_bytes = memory_bytes
        self._closed = False

    @property
    def sandbox_level(self) -> str:
        """How far workers are confined, as one of them saw it: `strict`, `standard`, `partial` or `off`."""
        return self._confinement.effective

    @property
    def shared_user(self) -> Shared | None:
        """Why workers have the user of the node; None where each has one of its own."""
        return self._confinement.why_shared

    def sandbox_report(self) -> dict[str, Any]:
        """What the newest worker saw to hold; `unknown` before the first one was started."""
        return self._confinement.report()

    def sandbox_lacking(self, level: str) -> str:
        """What keeps this level (`auto`: `strict`) from being reached: checks, or why it could not be tried."""
        confinement = self._confinement
        lacking = ", ".join(confinement.missing("strict" if level == "auto" else level))
        return confinement.why_not_strict if level == "strict" and confinement.why_not_strict else lacking

    async def prove_sandbox(self) -> str:
        """Confine workers without a model, and keep the best level that one of them proves; its name.

        Raises NotReady, DeadlineExceeded when no worker starts.
        """
        confinement = self._confinement
        *better, last = confinement.candidates()
        for level in better:
            confinement.level = level
            try:
                await self._trial()
            except (ModelFailed, NotReady) as err:
                confinement.why_not_strict = err.detail
                continue
            if confinement.effective == level:
                return level
            confinement.why_not_strict = ", ".join(confinement.missing(level))
        confinement.level = last
        await self._trial()
        return confinement.effective

    async def prove_device(self) -> None:
        """Return once a worker without a model found the device that was asked for; `auto` and `cpu` are everywhere.

        Raises SettingsInvalid where it isn't there, or torch isn't; NotReady, DeadlineExceeded when no worker starts.
        """
        if self._place.device not in ("auto", "cpu"):
            await self._trial(self._place)

    async def load(self, opened: OpenedModel) -> Loaded:
        """Start a worker for the model; the pool owns the descriptors from here on, whatever comes of it.

        A model that was loaded under another CID is replaced once the new one is ready; who waits for the old
        one, or runs on it, is answered before it ends. After a failure, and when the caller is cancelled,
        nothing is left: the process is gone and the descriptors are closed.

        Raises TooLarge, UnsupportedModel, SealedFileDamaged, ModelFailed, DeadlineExceeded, NotReady.
        """
        around = Surroundings(self._tuning, self._confinement, self._templates)
        worker = Worker(opened, self._place, self._deadlines, around)
        try:
            return await self._load(worker, opened)
        finally:
            self._coming.pop(worker, None)
            if self._worker(opened.model.key) is not worker:
                await worker.close()

    async def _load(self, worker: Worker, opened: OpenedModel) -> Loaded:
        began = time.monotonic()
        await self._make_room(worker, 2 * opened.size + _WORKER_BYTES)
        if not self._closed:
            worker.threads = self._tuning.threads or self.threads_left(worker)
            try:
                await worker.start()
            except SettingsInvalid as err:
                _log.error("the device is not there", device=self._place.device, why=err.detail)
                raise NotReady("the device of this node is not there: its operator has to set DIVAULT_DEVICE") from err
        if self._closed:
            raise NotReady("the node is stopping", retry_after=5)
        replaced = self._entries.get(opened.model.key)
        entry = _Entry(worker, int(time.time()), round(time.monotonic() - began, 3))
        self._entries[opened.model.key] = entry
        del self._coming[worker]
        if replaced is not None:
            await self._leave(replaced.worker)
        # It may have taken more than was thought: others make room, as far as they are idle.
        going, _ = self._choose(*await self._measured(), 0, opened.model.key)
        await self._evict(going)
        return _view(entry)

    async def _leave(self, worker: Worker) -> None:
        """Close a worker that was replaced: at once when it is unused, else when it is."""
        if worker.unused:
            await worker.close()
            return
        self._leaving[worker] = leaving = asyncio.create_task(worker.finish(), name=f"end of {worker.opened.model}")
        leaving.add_done_callback(lambda _: self._leaving.pop(worker, None))

    def threads_left(self, worker: Worker) -> int:
        """Threads for a worker that is to start: what the others left of the cores, at least 1 and at most 4.

        So there are no more threads than cores, as long as each can have one. A worker keeps its number.
        """
        key = worker.opened.model.key
        others = [one for one in (*self._workers(), *self._coming) if one.opened.model.key != key]
        taken = sum(other.threads for other in others)
        return max(1, min(_MOST_THREADS, cores() - taken))

    def figures(self) -> list[ModelFigures]:
        """What each loaded model's worker does and did; measures memory, in about 0.1 ms each."""
        return [_figures(entry.worker) for entry in list(self._entries.values())]

    def find(self, model: ModelId, cid: Cid) -> OpenedModel | None:
        """The loaded model, if it came from this CID."""
        found = self.loaded_as(model)
        return found if found is not None and found.cid == cid else None

    def loaded_as(self, model: ModelId) -> OpenedModel | None:
        """The loaded model, whatever it came from."""
        worker = self._worker(model.key)
        return worker.opened if worker is not None else None

    def describe(self, opened: OpenedModel) -> Loaded:
        """What is known of this model. Raises ModelNotLoaded when it was unloaded or replaced meanwhile."""
        return _view(self._entry(opened))

    def description(self, opened: OpenedModel) -> Description:
        """What this model said of itself. Raises ModelNotLoaded as `describe`."""
        return self._entry(opened).worker.description

    def loaded(self) -> list[Loaded]:
        """All loaded models, in the order of their loads."""
        return [_view(entry) for entry in self._entries.values()]

    async def run(
        self, opened: OpenedModel, hold: Hold, call: SignedCall, on_piece: Callable[[Piece], None] | None = None
    ) -> Output:
        """Run the call's input on the model: it is stopped at its deadline; only in company is it ever tried again.

        `on_piece` gets the pieces of a streamed answer; from the first one on, a priced answer is made whatever its
        caller's own deadline. A cancelled caller is dropped from the queue unrun.

        Raises CidMismatch, InputInvalid, TooLarge, ModelFailed,
        DeadlineExceeded, ModelNotLoaded, Overloaded, NotReady.
        """
        granted = hold.grant.model
        if opened.cid.text != granted.cid or opened.model.key != granted.model.key:
            raise CidMismatch("the opened model is not the granted one", have=opened.cid.text, need=granted.cid)
        entry = self._entry(opened)
        if call.input_data is None:
            example = dict(entry.worker.description.example)
            raise InputInvalid("the call has no input_data", field="input_data", expected="an object", example=example)
        item = wire.Item(call.input_data, call.parameters)
        if item.size > wire.MAX_ITEM_BYTES:
            raise TooLarge(
                f"the input has {item.size} bytes as JSON, a model takes {wire.MAX_ITEM_BYTES}",
                limit_bytes=wire.MAX_ITEM_BYTES,
                have_bytes=item.size,
            )
        answer = await entry.worker.run(
            item, call.user.raw, limit_s=call.limit_s, on_piece=on_piece, priced=hold.price.atomic > 0
        )
        return Output(
            result=answer.result,
            runtime=dict(entry.worker.description.runtime),
            plaintext_sha256=opened.plaintext_sha256,
            rows=answer.rows,
        )

    async def unload(self, key: Digest) -> bool:
        """End the model's process and give its memory back; False when it is not loaded."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            await entry.worker.close()
        await self._end_leaving(key)
        return entry is not None

    async def probe(self) -> str:
        """Have every idle worker answer, or start a worker without a model where there is none; a sentence about it.

        Raises NotReady naming the model whose worker was given up, ModelFailed where one does not answer.
        """
        if not self._entries:
            return await self._trial()
        workers = [entry.worker for entry in self._entries.values()]
        for worker in workers:
            if worker.abandoned:
                raise NotReady(f"{worker.opened.model} has no process, and none is being started", retry_after=5)
        await asyncio.gather(*(self._ping(worker) for worker in workers if worker.idle or worker.state == "failed"))
        restarting = sum(worker.state == "restarting" for worker in workers)
        models = "1 model is" if len(workers) == 1 else f"{len(workers)} models are"
        return f"{models} loaded; every idle worker answered" + (f", {restarting} restarting" if restarting else "")

    async def close(self) -> None:
        """Unload everything; whatever is being loaded ends with NotReady."""
        self._closed = True
        for key in list(self._entries):
            await self.unload(key)
        await self._end_leaving()
        await self._templates.close()
        self._confinement.close()

    async def _make_room(self, worker: Worker, size: int) -> None:
        """Keep `size` bytes for a model that is to be loaded, by unloading idle ones if need be.

        Raises NotReady when that is not enough, TooLarge when all of it would not be; then nobody is unloaded.
        """
        if self._memory_bytes is not None and size > self._memory_bytes:
            raise TooLarge(
                f"the model takes {size} bytes of memory while it is loaded, and this node gives all models together "
                f"{self._memory_bytes}: its operator has to raise DIVAULT_MODEL_MEMORY_MB",
                limit_bytes=self._memory_bytes,
                have_bytes=size,
            )
        going, enough = self._choose(*await self._measured(), size, worker.opened.model.key)
        if not enough:
            raise NotReady(
                "the models that are at work now leave no memory for another one: try again later", retry_after=5
            )
        self._coming[worker] = size
        await self._evict(going)

    async def _measured(self) -> tuple[dict[Worker, int], int]:
        """What each loaded model takes, and what templates take beside them; measured in a thread.

        A model's memory files count apart from its process: they may not be mapped there. Raises NotReady.
        """
        if self._memory_bytes is None:
            return {}, 0
        workers, there = self._workers(), self._templates.there()

        def measure() -> tuple[dict[Worker, int], int]:
            taken = {one: one.memory_bytes + one.opened.size for one in workers}
            return taken, sum(template.memory_bytes for template in there)

        with no_room_is_not_ready():
            measuring = asyncio.get_running_loop().run_in_executor(None, measure)
        return await measuring

    def _choose(self, taken: Mapping[Worker, int], templates: int, size: int, but: Digest) -> tuple[list[Digest], bool]:
        """Idle models to unload for `size` bytes more, and whether that is enough: first those that failed.

        Then the least recently used. Never one that has a queue, nor the model `but`, which is replaced.
        """
        if self._memory_bytes is None:
            return [], True
        sizes = {one: taken.get(one, one.opened.size) for one in self._workers()}
        free = self._memory_bytes - sum(sizes.values()) - sum(self._coming.values()) - templates
        idle = [(key, entry.worker) for key, entry in self._entries.items() if entry.worker.unused and key != but]
        going: list[Digest] = []
        for key, worker in sorted(idle, key=lambda one: (one[1].state != "failed", one[1].used_at)):
            if free >= size:
                break
            going.append(key)
            free += sizes[worker]
        return going, free >= size

    async def _evict(self, keys: Sequence[Digest]) -> None:
        """Unload these; nobody can use them any more when this first waits."""
        workers = [self._entries.pop(key).worker for key in keys]
        for worker in workers:
            _log.info("unloaded for another model", model_id=worker.opened.model.text)
        await asyncio.gather(*(worker.close() for worker in workers))

    async def _end_leaving(self, key: Digest | None = None) -> None:
        """End the workers, of this model or all, that were replaced and still answer somebody."""
        leaving = {worker: task for worker, task in self._leaving.items() if key in (None, worker.opened.model.key)}
        await asyncio.gather(*(worker.close() for worker in leaving))
        await asyncio.gather(*leaving.values())

    def _workers(self) -> list[Worker]:
        """All that have a model now."""
        return [*(entry.worker for entry in self._entries.values()), *self._leaving]

    def _worker(self, key: Digest) -> Worker | None:
        entry = self._entries.get(key)
        return entry.worker if entry is not None else None

    def _entry(self, opened: OpenedModel) -> _Entry:
        entry = self._entries.get(opened.model.key)
        if entry is None or entry.worker.opened.cid != opened.cid:
            raise ModelNotLoaded(f"{opened.model} was unloaded meanwhile: send it again", model_id=opened.model.text)
        return entry

    async def _ping(self, worker: Worker) -> None:
        try:
            await worker.ping()
        except (ModelFailed, DeadlineExceeded) as err:
            model = worker.opened.model
            raise ModelFailed(f"the worker of {model} does not answer: {err.detail}", kind="ping") from err
        except NotReady:
            if worker.state != "closed":  # else it was unloaded meanwhile, and nothing is wrong
                raise

    async def _trial(self, place: Place | None = None) -> str:
        """Start a worker that loads nothing: it can be started and confined, and has the device of the place."""
        limit_s = self._deadlines.load_s
        separate, tuning = self._confinement.separate, self._tuning
        process = await Process.start(tuning.command, (), 1, lambda: None, separate=separate)
        try:
            async with asyncio.timeout(limit_s):
                checks = await self._confinement.confine(process, 0)
                if place is not None:
                    reply = await process.ask(self._confinement.order((), place, 1, checks, recognise=False))
                    if isinstance(reply, wire.Failed):
                        raise wire.reported(reply.problem, wire.LOAD_ERRORS)
                    wire.expect(reply, wire.Ready)
        except TimeoutError:
            raise DeadlineExceeded(f"no worker started within {limit_s:g} s", limit_s=f"{limit_s:g}") from None
        finally:
            await process.kill()
        return "no model is loaded; a worker starts and answers"


def _figures(worker: Worker) -> ModelFigures:
    figures = worker.figures
    return ModelFigures(
        model=worker.opened.model.text,
        waiting=worker.waiting,
        oldest_s=worker.oldest_s,
        ready=worker.state == "ready",
        restarts=figures.restarts,
        bounds=SIZES,
        passes=tuple(figures.passes),
        callers=figures.callers,
        busy_s=figures.busy_s,
        memory_bytes=worker.memory_bytes,
    )


def _view(entry: _Entry) -> Loaded:
    worker = entry.worker
    return Loaded(
        model=worker.opened.model,
        description=worker.description,
        loaded_at=entry.loaded_at,
        bytes=worker.opened.size,
        sandbox=worker.sandbox,
        seconds=entry.seconds,
        state=worker.state,
        pid=worker.pid,
    )
