"""One loaded model: its queue, its process, and how that comes back after it died.

| state | what | requests |
|---|---|---|
| `ready` | the process answers | run in the order in which they came, one at a time |
| `restarting` | the process died or was stopped at a deadline; the next one loads from the same memory files | wait |
| `failed` | five deaths within a minute | NotReady, until a new attempt after another minute |
| `closed` | unloaded | NotReady |

A request waits at most one predict deadline in the queue and runs at most one. A process that dies takes the request
in flight along and no other. A caller who went away is dropped from the queue unrun.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import msgspec

from divault.errors import BadRequest, DeadlineExceeded, DivaultError, ModelFailed, NotReady, Overloaded
from divault.messages import canonical
from divault.models.base import Description
from divault.telemetry import log
from divault.values import OpenedModel
from divault.workers import wire
from divault.workers.confinement import Confinement
from divault.workers.process import COMMAND, Process
from divault.workers.sandbox import level_of

_log = log("workers")
T = TypeVar("T")
State = Literal["ready", "restarting", "failed", "closed"]


@dataclass(frozen=True, slots=True)
class Tuning:
    """Figures of a pool that no operator needs to set."""

    command: tuple[str, ...] = COMMAND
    threads: int = field(default_factory=lambda: min(4, len(os.sched_getaffinity(0))))
    """Of numerical libraries in one worker: more than four gain little for one request at a time."""
    max_queue: int = 64
    """Requests that may wait for one model; beyond it they are told to come back."""
    ping_s: float = 2.0
    first_pause_s: float = 0.1
    longest_pause_s: float = 5.0
    """Before a restart: doubles with each death within the window."""
    deaths: int = 5
    window_s: float = 60.0
    """So many deaths within the window make a model `failed`, for as long as the window."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that a load and a run may take."""

    load_s: float
    predict_s: float


@dataclass(slots=True, eq=False)
class _Job:
    request: wire.Request
    limit_s: float
    read: Callable[[wire.Reply], Any]
    """What the caller gets out of the reply; raises ModelFailed where the reply breaks the rules."""
    done: asyncio.Future[Any]
    expiry: asyncio.TimerHandle | None = None


class Worker:
    """A model that is loaded, or about to be. Owns the descriptors of `opened` from its making to `close`."""

    def __init__(
        self, opened: OpenedModel, device: str, deadlines: Deadlines, tuning: Tuning, confinement: Confinement
    ) -> None:
        self.opened = opened
        self._confinement = confinement
        self.checks: dict[str, str] = {}
        self._device = device
        self._deadlines = deadlines
        self._tuning = tuning
        self._queue: deque[_Job] = deque()
        self._wake = asyncio.Event()
        self._process: Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._state: State = "restarting"
        self._deaths: deque[float] = deque()
        self._failed_at = 0.0
        self._mean_s = 0.0
        self._excused = False
        self._busy = False
        self._description: Description | None = None

    @property
    def state(self) -> State:
        """As in the table above."""
        return self._state

    @property
    def pid(self) -> int | None:
        """Id of the process that holds the model now."""
        return self._process.pid if self._process is not None and not self._process.lost else None

    @property
    def sandbox(self) -> str:
        """The level that the process of this model saw to hold."""
        return level_of(self.checks, self._confinement.level)

    @property
    def idle(self) -> bool:
        """True when it is ready and nothing waits or runs."""
        return self._state == "ready" and not self._queue and not self._busy

    @property
    def description(self) -> Description:
        """What the model said of itself when it was loaded."""
        if self._description is None:
            raise self._not_ready()
        return self._description

    async def start(self) -> None:
        """Load the model. On any failure, and when cancelled, the process is gone and the files are closed.

        Raises UnsupportedModel, SealedFileDamaged, ModelFailed, DeadlineExceeded, NotReady.
        """
        try:
            self._description = await self._load()
            self._state = "ready"
        finally:
            if self._state != "ready":
                await self.close()
        self._task = asyncio.create_task(self._serve(), name=f"worker of {self.opened.model.text}")

    async def run(self, item: wire.Item) -> wire.Success:
        """Answer one caller. Raises what the model said, ModelFailed, DeadlineExceeded, Overloaded, NotReady."""
        request = wire.Run(id=wire.new_id(), items=[item])
        outcome = await self._queued(request, self._deadlines.predict_s, _outcome)
        if isinstance(outcome, DivaultError):
            raise outcome
        return outcome

    async def ping(self) -> None:
        """Return when the process itself answered. Raises ModelFailed, DeadlineExceeded, NotReady."""
        await self._queued(wire.Ping(id=wire.new_id()), self._tuning.ping_s, _pong)

    async def close(self) -> None:
        """End the process, close the model's files, and tell whoever waits. Does nothing the second time."""
        if self._state == "closed":
            return
        self._state = "closed"
        try:
            if self._task is not None:
                self._task.cancel()
                await asyncio.wait([self._task])
            self._refuse_waiting(self._not_ready())
            if self._process is not None:
                await self._process.kill()
        finally:
            if self._process is not None:
                self._process.stop()
            for file in self.opened.files:
                os.close(file.fd)

    # --- requests ---

    async def _queued(self, request: wire.Request, limit_s: float, read: Callable[[wire.Reply], T]) -> T:
        if self._state in ("failed", "closed"):
            raise self._not_ready()
        if len(self._queue) >= self._tuning.max_queue:
            raise Overloaded(
                f"{len(self._queue)} requests wait for {self.opened.model} already: come back",
                retry_after=max(1, math.ceil(self._mean_s * len(self._queue))),
            )
        loop = asyncio.get_running_loop()
        job = _Job(request, limit_s, read, loop.create_future())
        job.expiry = loop.call_later(limit_s, self._expire, job)
        self._queue.append(job)
        self._wake.set()
        try:
            answer: T = await job.done
            return answer
        finally:
            job.expiry.cancel()
            if job in self._queue:
                self._queue.remove(job)

    def _expire(self, job: _Job) -> None:
        """Drop a request that waited for as long as it might have run."""
        if job in self._queue and not job.done.done():
            limit = f"{job.limit_s:g}"
            job.done.set_exception(
                DeadlineExceeded(f"the request waited {limit} s for its turn and was not run", limit_s=limit)
            )

    def _refuse_waiting(self, error: DivaultError) -> None:
        for job in self._queue:
            if not job.done.done():
                job.done.set_exception(type(error)(error.detail, **error.data))
        self._queue.clear()

    def _not_ready(self) -> NotReady:
        if self._state == "closed":
            return NotReady(f"{self.opened.model} was unloaded", retry_after=1)
        left = self._failed_at + self._tuning.window_s - time.monotonic()
        return NotReady(
            f"the worker of {self.opened.model} died {self._tuning.deaths} times within "
            f"{self._tuning.window_s:g} s; it is tried again later",
            retry_after=max(1, math.ceil(left)),
        )

    # --- the process ---

    async def _load(self) -> Description:
        """Start a process and have it load the model, within the load deadline."""
        limit_s = self._deadlines.load_s
        try:
            async with asyncio.timeout(limit_s):
                # The mapped file, the model made of it, and as much again while it is made and at work.
                request = self._confinement.order(self.opened.files, self._device, 3 * self.opened.size)
                self._process = await Process.start(
                    self._tuning.command,
                    self.opened.files,
                    self._tuning.threads,
                    self._lost,
                    separate=self._confinement.separate,
                )
                reply = await self._process.ask(request)
        except TimeoutError:
            limit = f"{limit_s:g}"
            raise DeadlineExceeded(f"loading the model took longer than {limit} s", limit_s=limit) from None
        if isinstance(reply, wire.Failed):
            raise wire.reported(reply.problem, wire.LOAD_ERRORS)
        ready = wire.expect(reply, wire.Ready)
        self.checks = dict(ready.checks)
        return _described(ready.description)

    def _lost(self) -> None:
        self._wake.set()

    async def _serve(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while True:
                if self._process is None or self._process.lost:
                    await self._revive()
                job = self._next()
                if job is None:
                    break
                await self._answer(job)

    def _next(self) -> _Job | None:
        while self._queue:
            job = self._queue.popleft()
            if not job.done.done():
                return job
        return None

    async def _answer(self, job: _Job) -> None:
        if job.expiry is not None:
            job.expiry.cancel()
        began = time.monotonic()
        self._busy = True
        try:
            answer = await self._ask(job)
        except DivaultError as err:
            if not job.done.done():
                job.done.set_exception(err)
        except asyncio.CancelledError:
            if not job.done.done():
                job.done.set_exception(self._not_ready())
            raise
        else:
            self._mean_s += 0.1 * (time.monotonic() - began - self._mean_s)
            if not job.done.done():
                job.done.set_result(answer)
        finally:
            self._busy = False

    async def _ask(self, job: _Job) -> Any:
        process = self._process
        if process is None:
            raise self._not_ready()
        try:
            async with asyncio.timeout(job.limit_s):
                return job.read(await process.ask(job.request))
        except TimeoutError:
            # The worker did what it was asked to: this is the model's slowness and no death to be counted.
            self._excused = True
            await process.kill()
            limit = f"{job.limit_s:g}"
            raise DeadlineExceeded(f"the model was stopped after {limit} s", limit_s=limit) from None
        except ModelFailed:
            await process.kill()
            raise

    async def _revive(self) -> None:
        """Start the process anew, after a pause that grows with the deaths; returns only when the model is loaded."""
        self._state = "restarting"
        if self._process is not None:
            await self._process.kill()
            if not self._excused:
                self._count_death()
                _log.warning("worker died", model_id=self.opened.model.text, stderr=self._process.words())
        self._excused = False
        while True:
            await self._pause()
            try:
                await self._load()
            except DivaultError as err:
                self._count_death()
                _log.warning("worker could not be restarted", model_id=self.opened.model.text, code=err.code)
                if self._process is not None:
                    await self._process.kill()
            else:
                self._state = "ready"
                return

    def _count_death(self) -> None:
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - self._tuning.window_s:
            self._deaths.popleft()

    async def _pause(self) -> None:
        if len(self._deaths) >= self._tuning.deaths:
            self._state = "failed"
            self._failed_at = time.monotonic()
            _log.error("model failed", model_id=self.opened.model.text, deaths=len(self._deaths))
            self._refuse_waiting(self._not_ready())
            await asyncio.sleep(self._tuning.window_s)
            self._deaths.clear()
            self._state = "restarting"
        elif self._deaths:
            pause = self._tuning.first_pause_s * 2 ** (len(self._deaths) - 1)
            await asyncio.sleep(min(pause, self._tuning.longest_pause_s))


def _outcome(reply: wire.Reply) -> wire.Success | DivaultError:
    """One caller's answer, or what the worker said against it. Raises ModelFailed."""
    items = wire.expect(reply, wire.Answers).items
    if len(items) != 1:
        raise wire.broken("it answered another number of callers than it was asked for")
    if isinstance(items[0], wire.Problem):
        return wire.reported(items[0], wire.RUN_ERRORS)
    wire.check_json(items[0].result)
    return items[0]


def _pong(reply: wire.Reply) -> None:
    wire.expect(reply, wire.Pong)


def _described(raw: bytes) -> Description:
    """What the worker says of its model, typed, and with a runtime that has a canonical form. Raises ModelFailed."""
    try:
        description = msgspec.json.decode(raw, type=Description)
        canonical(dict(description.runtime))
    except (msgspec.MsgspecError, RecursionError, BadRequest):
        raise wire.broken("what it says of its model is malformed") from None
    return description
