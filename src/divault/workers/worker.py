"""One loaded model: who waits for it, its process, and how that comes back after it died.

| state | what | requests |
|---|---|---|
| `ready` | the process answers | run as they come, several in one pass where the format lets them share one |
| `restarting` | the process died or was stopped at a deadline; the next one loads from the same memory files | wait |
| `failed` | five deaths within a minute, or starts that failed in a row | NotReady, until an attempt a minute later |
| `closed` | unloaded | NotReady |

Rules:

1. An idle process gets what one turn of the loop brought at once; what comes while it works goes together in the next
   pass. After a pass with several callers the next one waits for them to come back, a sixth of the time that the last
   one took at most: whoever came meanwhile would otherwise go alone, and all of them wait for him. Where they don't
   come back so soon it hardly ever waits. A single caller never does.
2. A request waits at most one predict deadline and runs at most one; its caller's own deadline counts for both, and
   ends his wait alone: who sets a short one costs nobody else the process. A pass that nobody waits for any more is
   stopped when it goes on for longer than a restart takes.
3. A process that dies, or is stopped at a deadline, with several callers in flight: each who still waits runs again,
   once and alone, so that only the one who brings it down hears of it, even when he left before. Who was alone is not
   run again. They go before everybody else, and while they wait only their own deadlines count: those before them may
   take whole ones. But a process that isn't back after a load and a predict deadline is not waited for any longer. Who
   brings it down again has his other requests of that pass run last.
4. A caller who went away is taken out of the queue unrun; the end of a run that gives pieces is asked for.
5. Once a piece of an answer with a price was handed on, its caller's own deadline counts no more: otherwise he could
   set it to just before the end, and have read nearly all of it for nothing.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from divault.errors import DeadlineExceeded, DivaultError, ModelFailed, NotReady, Overloaded
from divault.models.base import Description, Piece, Place
from divault.models.libraries import LIBRARIES
from divault.telemetry import log
from divault.values import OpenedModel
from divault.workers import wire
from divault.workers.answers import answers_of, described, request_for
from divault.workers.confinement import Confinement
from divault.workers.figures import Figures
from divault.workers.memory import memory_of
from divault.workers.process import COMMAND, Process
from divault.workers.queue import Job, Queue
from divault.workers.sandbox import level_of
from divault.workers.template import Templates

_log = log("workers")
State = Literal["ready", "restarting", "failed", "closed"]


@dataclass(frozen=True, slots=True)
class Tuning:
    """Figures of a pool that no operator needs to set."""

    command: tuple[str, ...] = COMMAND
    """Starts a worker that isn't forked."""
    templates: bool = True
    """Fork workers from processes that have a format's libraries already, where it lets them."""
    threads: int | None = None
    """Of numerical libraries in one worker; without it see `WorkerPool.threads_left`."""
    max_queue: int | None = None
    """Requests that may wait for one model, whatever it takes; without it see `places`."""
    longest_wait_s: float = 0.8
    """So long the last in the queue should wait: what comes beyond it is told to come back instead."""
    pass_share: float = 0.25
    """Of the predict deadline, that a pass should take at most."""
    grace_s: float = 2.0
    """So long a pass may go on that nobody waits for; as long as the model's last start took, where that is longer."""
    ping_s: float = 2.0
    first_pause_s: float = 0.1
    longest_pause_s: float = 5.0
    """Before a restart: doubles with each death within the window."""
    deaths: int = 5
    window_s: float = 60.0
    """So many deaths within the window make a model `failed`, for as long as the window. Starts that fail after a death
    count with it however long they take: five that run into the load deadline take longer than any window here."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that a load and a run may take."""

    load_s: float
    predict_s: float


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the workers of a pool share."""

    tuning: Tuning
    confinement: Confinement
    templates: Templates


_HOLD_SHARE, _SHORTEST_HOLD_S, _LONGEST_HOLD_S = 1 / 6, 0.001, 0.01
"""Of a pass' time, that the next waits for the callers of the last: a loop's timers know no less than a millisecond."""
_MOST_NOT_HELD = 32
_FEWEST_PLACES, _PASSES_WAITING = 8, 8
_AWAY_RETRY_S = 5  # as long as the longest pause before a restart
_NOBODY = b""


class Worker:
    """A model that is loaded, or about to be. Owns the descriptors of `opened` from its making to `close`."""

    def __init__(self, opened: OpenedModel, place: Place, deadlines: Deadlines, surroundings: Surroundings) -> None:
        self.opened = opened
        self._confinement = surroundings.confinement
        self._templates = surroundings.templates
        self._tuning = surroundings.tuning
        self._template: str | None = None if self._tuning.templates else ""
        """What its process is forked from; empty: nothing; None: not known yet."""
        self.checks: Mapping[str, str] = {}
        """What its process saw to hold, before it was told of the model."""
        self.threads = surroundings.tuning.threads or 1
        """Of its libraries, for as long as it lives: another number may give other last digits. Set before `start`."""
        self._place = place
        self._deadlines = deadlines
        self._queue = Queue()
        self._flight: list[Job] = []
        """In the pass that is under way."""
        self._began = 0.0
        self._overrun: asyncio.TimerHandle | None = None
        self._gathering = False
        """A pass is about to be sent, when this turn of the loop ends."""
        self._hold: asyncio.TimerHandle | None = None
        """A pass waits until so many as are expected have come back, and not longer than this."""
        self._expected = 0
        self._in_vain = self._not_held = 0
        """How many passes wait for nobody after the next that waits in vain, and how many of the last are to come."""
        self._process: Process | None = None
        self._reviving: asyncio.Task[None] | None = None
        self._away: asyncio.TimerHandle | None = None
        """The process is away, and who goes again waits for it no longer than this."""
        self._state: State = "restarting"
        self._deaths: deque[float] = deque()
        self._failed_at = 0.0
        self._excused = False
        self._start_s = 0.0
        """How long the last start took."""
        self._description: Description | None = None
        self.figures = Figures()
        self.used_at = time.monotonic()
        """When a caller was last answered, or the model was loaded."""

    @property
    def state(self) -> State:
        """As in the table above."""
        return self._state

    @property
    def pid(self) -> int | None:
        """Id of the process that holds the model now."""
        return self._process.pid if self._process is not None and not self._process.lost else None

    @property
    def memory_bytes(self) -> int:
        """The process' share of memory; 0 while there is none."""
        pid = self.pid
        return memory_of(pid) if pid is not None else 0

    @property
    def sandbox(self) -> str:
        """The level that the process of this model saw to hold."""
        return level_of(self.checks, self._confinement.level)

    @property
    def idle(self) -> bool:
        """True when it is ready and nothing waits or runs."""
        return self._state == "ready" and self.unused

    @property
    def unused(self) -> bool:
        """True when nothing waits or runs, whatever its state: what it takes may be given to another model."""
        return not self._queue and not self._flight

    @property
    def abandoned(self) -> bool:
        """True when it has no process and nobody works on one: a fault of this program, and no state of a model."""
        return self._state == "restarting" and (self._reviving is None or self._reviving.done())

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def oldest_s(self) -> float:
        """How long the one who waits longest has waited; 0 where nobody waits."""
        oldest = self._queue.oldest()
        return 0.0 if oldest is None else max(0.0, time.monotonic() - oldest)

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
        self._go_on()

    async def run(
        self,
        item: wire.Item,
        owner: bytes = _NOBODY,
        *,
        limit_s: float | None = None,
        on_piece: Callable[[Piece], None] | None = None,
        priced: bool = False,
    ) -> wire.Success:
        """Answer one caller. `limit_s`: his own deadline for all of it; `on_piece`: gets the pieces of the answer.

        `priced`: rule 5 holds. Raises what the model said, ModelFailed, DeadlineExceeded, Overloaded, NotReady.
        """
        loop = asyncio.get_running_loop()
        job = Job(owner, item, loop.create_future(), loop.time(), self._deadlines.predict_s, limit_s, on_piece, priced)
        return await self._queued(job)

    async def ping(self) -> None:
        """Return when the process itself answered. Raises ModelFailed, DeadlineExceeded, NotReady."""
        loop = asyncio.get_running_loop()
        await self._queued(Job(_NOBODY, None, loop.create_future(), loop.time(), self._tuning.ping_s))

    async def finish(self) -> None:
        """Close it once all are answered who wait or run; for one that nobody is sent to any more."""
        while waiting := [job.done for job in (*self._queue, *self._flight) if not job.done.done()]:
            await asyncio.wait(waiting)
        await self.close()

    async def close(self) -> None:
        """End the process, close the model's files, and tell whoever waits. Does nothing the second time."""
        if self._state == "closed":
            return
        self._state = "closed"
        for timer in (self._hold, self._away):
            if timer is not None:
                timer.cancel()
        try:
            self._refuse(self._queue.take_all(), self._not_ready())
            self._refuse(self._landed(), self._not_ready())
            if self._reviving is not None:
                self._reviving.cancel()
                await asyncio.wait([self._reviving])
            if self._process is not None:
                await self._process.kill()
        finally:
            if self._process is not None:
                self._process.stop()
            for file in self.opened.files:
                os.close(file.fd)

    # --- requests ---

    async def _queued(self, job: Job) -> wire.Success:
        if self._state in ("failed", "closed"):
            raise self._not_ready()
        self._queue.put(job, self.places, self._overloaded)
        if self._flight or self._state != "ready" or job.limit_s is not None:
            self._set_expiry(job, job.latest(job.arrived), self._expire)
        if not self._flight and self._state == "ready":
            self._gather(asyncio.get_running_loop())
        try:
            return await job.done
        except asyncio.CancelledError:
            self._left(job)
            raise
        finally:
            if job.expiry is not None:
                job.expiry.cancel()
            self._queue.drop(job)

    @property
    def places(self) -> int:
        """How many may wait: as many as are answered in 0.8 s, between 8 and eight passes (at least 64)."""
        if self._tuning.max_queue is not None:
            return self._tuning.max_queue
        most = max(64, _PASSES_WAITING * self._together)
        if not self.figures.mean_s:
            return most
        return max(_FEWEST_PLACES, min(most, int(self._tuning.longest_wait_s / self.figures.mean_s)))

    @property
    def _together(self) -> int:
        return self._description.together if self._description is not None else 1

    def _overloaded(self) -> Overloaded:
        waiting = len(self._queue)
        return Overloaded(
            f"{waiting} requests wait for {self.opened.model} already: come back",
            retry_after=max(1, math.ceil(self.figures.mean_s * waiting)),
        )

    def _expire(self, job: Job) -> None:
        """Give up a request that waited for as long as it might have run, or that its caller gives up."""
        self._queue.drop(job)
        limit_s = job.run_s if job.limit_s is None else min(job.limit_s, job.run_s)
        limit = f"{limit_s:g}"
        if not job.done.done():
            job.done.set_exception(
                DeadlineExceeded(f"the request waited {limit} s for its turn and was not run", limit_s=limit)
            )

    def _left(self, job: Job) -> None:
        """Nobody waits for the job any more. Its pass goes on for the others in it; without any, not for long."""
        if job not in self._flight:
            return
        if job.on_piece is not None and self._process is not None:
            self._process.stop_run()
        if self._overrun is not None and all(one.done.done() for one in self._flight):
            loop = asyncio.get_running_loop()
            at = min(self._overrun.when(), loop.time() + max(self._tuning.grace_s, self._start_s))
            self._overrun.cancel()
            self._overrun = loop.call_at(at, self._overran)

    def _refuse(self, jobs: Sequence[Job], error: DivaultError) -> None:
        for job in jobs:
            if not job.done.done():
                job.done.set_exception(error.copy())

    def _not_ready(self) -> NotReady:
        if self._state == "closed":
            return NotReady(f"{self.opened.model} was unloaded", retry_after=1)
        left = self._failed_at + self._tuning.window_s - time.monotonic()
        return NotReady(
            f"the worker of {self.opened.model} died {self._tuning.deaths} times within "
            f"{self._tuning.window_s:g} s, or could not be started as often; it is tried again later",
            retry_after=max(1, math.ceil(left)),
        )

    # --- passes ---

    def _gather(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have the next pass sent when this turn of the loop ends, or when those are back who were just answered."""
        if self._hold is not None:
            if len(self._queue) < self._expected:
                return
            self._in_vain = 0
        if not self._gathering:
            self._gathering = True
            loop.call_soon(self._gathered)

    def _next(self, answered: int) -> None:
        """Send the next pass, or wait for the callers of the last one if they are several (rule 1)."""
        loop = asyncio.get_running_loop()
        hold_s = min(_LONGEST_HOLD_S, (loop.time() - self._began) * _HOLD_SHARE)
        self._expected = min(self._most(), answered + len(self._queue))
        holds = answered > 1 and hold_s >= _SHORTEST_HOLD_S and len(self._queue) < self._expected
        if holds and not self._not_held:
            self._hold = loop.call_later(hold_s, self._held_in_vain)
            return
        self._not_held -= holds
        self._pump()

    def _held_in_vain(self) -> None:
        """They did not come back in time. When that goes on, some passes wait for nobody, more of them each time."""
        self._not_held = self._in_vain
        self._in_vain = min(2 * self._in_vain or 1, _MOST_NOT_HELD)
        self._gathered()

    def _gathered(self) -> None:
        """Send what came together: the calls of one turn, or of a moment."""
        self._gathering = False
        self._pump()
        now = asyncio.get_running_loop().time()
        for job in self._queue:
            if job.expiry is None and not job.alone:
                self._set_expiry(job, job.latest(now), self._expire)

    def _pump(self) -> None:
        """Send the next pass, if the process is there and idle."""
        if self._hold is not None:
            self._hold.cancel()
            self._hold = None
        if self._flight or self._state != "ready" or self._process is None or self._process.lost:
            return
        jobs = [job for job in self._queue.take(self._most()) if not job.done.done()]
        if not jobs:
            if self._queue:
                self._pump()
            return
        loop = asyncio.get_running_loop()
        self._flight, self._began = jobs, loop.time()
        end = self._began + jobs[0].run_s
        for job in jobs:
            self._set_expiry(job, job.deadline if job.deadline < end else math.inf, self._give_up)
        self._overrun = loop.call_at(end, self._overran)
        try:
            self._process.post(request_for(jobs), self._replied, self._on_part(jobs[0]))
        except ModelFailed as err:
            self._went_wrong(err)

    def _most(self) -> int:
        """How many may share the next pass, by what a caller costs and has time for."""
        together, mean = self._together, self.figures.mean_s
        if together == 1 or not mean:
            return together
        return max(1, min(together, int(self._tuning.pass_share * self._deadlines.predict_s / mean)))

    def _set_expiry(self, job: Job, at: float, then: Callable[[Job], None]) -> None:
        if job.expiry is not None:
            job.expiry.cancel()
        job.expiry = None if at == math.inf else asyncio.get_running_loop().call_at(at, then, job)

    def _give_up(self, job: Job) -> None:
        """The caller's own deadline passed while his pass is under way, or after one that went wrong."""
        limit = f"{job.limit_s:g}"
        if not job.done.done():
            job.done.set_exception(DeadlineExceeded(f"no answer came within {limit} s", limit_s=limit))
        self._left(job)

    def _on_part(self, job: Job) -> Callable[[wire.Part], None] | None:
        if job.on_piece is None:
            return None
        told, on_piece = 0, job.on_piece

        def take(part: wire.Part) -> None:
            nonlocal told
            told += len(part.text) + 16
            if told > wire.MAX_RESULT_BYTES:
                self._went_wrong(wire.broken("its pieces are longer than an answer may be"))
            elif not job.done.done():
                if job.priced:
                    self._set_expiry(job, math.inf, self._give_up)
                on_piece(Piece(part.text, part.index))

        return take

    def _landed(self) -> list[Job]:
        """The pass is over."""
        jobs, self._flight = self._flight, []
        if self._overrun is not None:
            self._overrun.cancel()
            self._overrun = None
        return jobs

    def _replied(self, reply: wire.Reply | ModelFailed) -> None:
        if not self._flight:  # it was given up before
            return
        try:
            if isinstance(reply, ModelFailed):
                raise reply
            answers = answers_of(reply, self._flight)
        except ModelFailed as err:
            self._went_wrong(err)
            return
        jobs = self._landed()
        self.used_at = time.monotonic()
        if jobs[0].item is not None:
            self.figures.count(len(jobs), asyncio.get_running_loop().time() - self._began)
        for job, answer in zip(jobs, answers, strict=True):
            if job.done.done():
                continue
            if isinstance(answer, DivaultError):
                job.done.set_exception(answer)
            else:
                job.done.set_result(answer)
        self._next(len(jobs))

    def _overran(self) -> None:
        """The worker did what it was asked to: this is the model's slowness and no death to be counted."""
        self._excused = True
        limit = f"{self._flight[0].run_s:g}"
        self._went_wrong(DeadlineExceeded(f"the model was stopped after {limit} s", limit_s=limit))

    def _went_wrong(self, error: DivaultError) -> None:
        """The process is of no use any more: rule 3."""
        landed = self._landed()
        jobs = [job for job in landed if not job.done.done()]
        if len(landed) > 1 and self._state == "ready":  # whoever left it may be the one
            for job in jobs:
                job.alone = True
                self._set_expiry(job, job.deadline, self._give_up)
            self._queue.put_back(jobs)
            jobs = []
        elif landed:
            self._queue.put_last(landed[0].owner)
        if self._state == "ready" and self._process is not None:
            self._process.stop()
            self._revive_soon(jobs, error)
        else:
            self._refuse(jobs, error)

    # --- the process ---

    async def _load(self) -> Description:
        """Start a process and have it load the model, within the load deadline."""
        limit_s, began = self._deadlines.load_s, time.monotonic()
        try:
            async with asyncio.timeout(limit_s):
                if self._template is None:
                    self._template = await self._recognised()
                reply = await self._asked(self._template)
        except TimeoutError:
            limit = f"{limit_s:g}"
            raise DeadlineExceeded(f"loading the model took longer than {limit} s", limit_s=limit) from None
        ready = wire.expect(reply, wire.Ready)
        self._start_s = time.monotonic() - began
        return described(ready.description)

    async def _recognised(self) -> str:
        """The template that has the libraries for these files, by a process that is confined and has none of them."""
        reply = await self._asked("none", recognise=True)
        name = wire.expect(reply, wire.Known).template
        if name and name not in LIBRARIES:
            raise wire.broken("it names a template that there is not")
        if self._process is not None:
            await self._process.kill()
        return name

    async def _asked(self, template: str, *, recognise: bool = False) -> wire.Reply:
        """What a new process says to the model's files. Raises what it reports."""
        process = None
        if template:
            process = await self._templates.fork(template, self.opened.files, self._lost)
        if process is None:
            command, separate = self._tuning.command, self._confinement.separate
            process = await Process.start(command, self.opened.files, self.threads, self._lost, separate=separate)
        self._process = process
        # The mapped file, the model made of it, and as much again while it is made and at work.
        self.checks = await self._confinement.confine(process, 3 * self.opened.size)
        order = self._confinement.order(process.files, self._place, self.threads, self.checks, recognise=recognise)
        reply = await process.ask(order)
        if isinstance(reply, wire.Failed):
            raise wire.reported(reply.problem, wire.LOAD_ERRORS)
        return reply

    def _lost(self) -> None:
        if self._flight:  # told by `_replied`, which comes first
            return
        self._revive_soon()

    def _revive_soon(self, jobs: Sequence[Job] = (), error: DivaultError | None = None) -> None:
        """Have the process started anew, unless that is under way or nobody wants it.

        Who is refused because of it hears of it when the work has really ended.
        """
        if self._state != "ready":
            return
        self._state = "restarting"
        if self._away is None:  # else it died as soon as it was ready, and did nothing for whoever waits
            most_s = self._deadlines.load_s + self._deadlines.predict_s
            self._away = asyncio.get_running_loop().call_later(most_s, self._away_too_long)
        work = self._revive(jobs, error or self._not_ready())
        self._reviving = asyncio.create_task(work, name=f"restart of {self.opened.model.text}")

    def _away_too_long(self) -> None:
        """Tell who goes again, whose wait may have no other end: the restart fails, or takes longer than it may."""
        self._away = None
        again = [job for job in self._queue if job.alone]
        for job in again:
            self._queue.drop(job)
        detail = f"the worker of {self.opened.model} died and is not back yet: send the same bytes again"
        self._refuse(again, NotReady(detail, retry_after=_AWAY_RETRY_S))

    async def _revive(self, jobs: Sequence[Job], error: DivaultError) -> None:
        """Start the process anew, after a pause that grows with the deaths; returns only when the model is loaded."""
        self.figures.restarts += 1
        try:
            if self._process is not None:
                await self._process.kill()
        finally:
            self._refuse(jobs, error)
        self._forget_deaths()
        if not self._excused and self._process is not None:
            self._deaths.append(time.monotonic())
            _log.warning("worker died", model_id=self.opened.model.text, stderr=self._process.words())
        self._excused = False
        while True:
            await self._pause()
            try:
                await self._load()
            except Exception as err:  # noqa: BLE001 - whatever it is, there is a next attempt: nobody else makes one
                self._deaths.append(time.monotonic())
                code = err.code if isinstance(err, DivaultError) else type(err).__name__
                _log.warning("worker could not be restarted", model_id=self.opened.model.text, code=code)
                if self._process is not None:
                    await self._process.kill()
            else:
                self._state = "ready"
                self._go_on()
                return

    def _go_on(self) -> None:
        """Begin with what waits; a process that died as soon as it was ready was not missed before (`_lost`)."""
        if self._process is not None and self._process.lost:
            self._revive_soon()
            return
        if self._away is not None:
            self._away.cancel()
            self._away = None
        self._pump()

    def _forget_deaths(self) -> None:
        """Leave those of the window. Not while starts fail: were theirs forgotten, slow ones would never be enough."""
        oldest = time.monotonic() - self._tuning.window_s
        while self._deaths and self._deaths[0] < oldest:
            self._deaths.popleft()

    async def _pause(self) -> None:
        if len(self._deaths) >= self._tuning.deaths:
            self._state = "failed"
            self._failed_at = time.monotonic()
            _log.error("model failed", model_id=self.opened.model.text, deaths=len(self._deaths))
            self._refuse(self._queue.take_all(), self._not_ready())
            await asyncio.sleep(self._tuning.window_s)
            self._deaths.clear()
            self._state = "restarting"
        elif self._deaths:
            pause = self._tuning.first_pause_s * 2 ** (len(self._deaths) - 1)
            await asyncio.sleep(min(pause, self._tuning.longest_pause_s))
