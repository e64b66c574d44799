"""One loaded model: its memory files, its worker process, and the queue in front of it.

    loading -> ready <-> restarting -> ready
                            |  5 deaths in 60 s
                            v
                          failed -> restarting (when the oldest death is 60 s old)

1. One task owns the process: it takes the oldest question that somebody still waits for, asks it, and starts the
   process anew when it ended. A batch would be taken in `_take`.
2. A death fails only the question under way. Questions in the queue wait for the next process.
3. A question that isn't started before its patience ends is answered `overloaded`, and never runs.
4. Whoever stops waiting takes his question out of the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from divault.errors import (
    DeadlineExceeded,
    DivaultError,
    InputInvalid,
    ModelFailed,
    ModelNotLoaded,
    NotReady,
    Overloaded,
    UnsupportedModel,
    from_code,
)
from divault.models.descriptions import Description
from divault.telemetry import log
from divault.values import OpenedModel
from divault.workers import wire
from divault.workers.confine import Report
from divault.workers.process import PROGRAM, BadWorker, WorkerEnded, WorkerProcess

_log = log("workers")
_GIB = 1 << 30
_FIRST_BACK_OFF_S, _LAST_BACK_OFF_S = 0.1, 5.0
_DEATHS, _WINDOW_S = 5, 60.0
_ANSWER_MARGIN = 4096
"""Room for the frame around the JSON of an answer."""
_PING_S = 2.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What one model may use."""

    predict_timeout_s: float
    load_timeout_s: float
    max_queue: int = 64
    max_answer_bytes: int = 16 << 20
    threads: int = 1
    program: tuple[str, ...] = PROGRAM


@dataclass(slots=True, eq=False)
class _Question:
    """Something to ask the worker, and who waits for it."""

    ask: Callable[[WorkerProcess], Awaitable[Any]]
    answer: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Runner:
    """A model that is loaded, or being loaded. Belongs to one event loop."""

    def __init__(self, opened: OpenedModel, limits: Limits, on_report: Callable[[Report], None]) -> None:
        """Takes over the descriptors of `opened`: they are closed by `close`."""
        self.opened = opened
        self.state = "loading"
        self.last_used = time.monotonic()
        self._limits = limits
        self._on_report = on_report
        self._descriptors = [file.fd for file in opened.files]
        self._description: Description | None = None
        self._process: WorkerProcess | None = None
        self._queue: deque[_Question] = deque()
        self._wake = asyncio.Event()
        self._deaths: deque[float] = deque(maxlen=_DEATHS)
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self._running_s = 0.0

    @property
    def description(self) -> Description:
        """What the model said of itself when it was loaded."""
        if self._description is None:
            raise ModelNotLoaded("the model is still being loaded", model_id=self.opened.model.text)
        return self._description

    @property
    def pid(self) -> int | None:
        """Process id of the worker; None while there is none."""
        return self._process.pid if self._process is not None and self._process.alive else None

    @property
    def busy(self) -> bool:
        """True while anybody waits for an answer."""
        return bool(self._queue) or self.state != "ready"

    async def load(self) -> None:
        """Start the worker and load the model; after an error nothing of it is left.

        Raises UnsupportedModel, ModelFailed, DeadlineExceeded.
        """
        try:
            self._process = await self._started()
        except BaseException:
            await self.close()
            raise
        self.state = "ready"
        self._task = asyncio.create_task(self._serve())

    async def run(self, input_data: bytes, parameters: bytes | None, patience_s: float) -> wire.Result:
        """The answer, whose JSON was checked. `patience_s`: how long it may wait before it starts.

        Raises InputInvalid, ModelFailed, DeadlineExceeded, Overloaded, NotReady, ModelNotLoaded.
        """
        if self._closing:
            raise self._gone()
        if self.state == "failed":
            raise NotReady(
                f"the worker of this model died {_DEATHS} times within {_WINDOW_S:.0f} s: try later",
                retry_after=self._rest_s(),
            )
        if len(self._queue) >= self._limits.max_queue:
            raise self._overloaded(f"{len(self._queue)} calls wait for this model already")
        self.last_used = time.monotonic()
        question = _Question(lambda process: self._predict(process, input_data, parameters))
        answer: wire.Result = await self._asked(question, patience_s)
        return answer

    async def ping(self) -> bool:
        """True when the worker answers, or is at work within its deadline."""
        if self.state != "ready":
            return False
        if self._queue or self._running_s:
            return self.pid is not None
        question = _Question(_ping)
        try:
            await self._asked(question, _PING_S)
        except DivaultError:
            return False
        return True

    async def close(self, drain_s: float = 0.0) -> None:
        """End the worker and close the files. Calls under way finish; waiting ones too, within `drain_s`."""
        if drain_s and self._task is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(drain_s):
                    while self._queue:
                        await asyncio.wait([waiting.answer for waiting in self._queue])
        self._closing = True
        self._fail_waiting(self._gone)
        self._wake.set()
        if self._task is not None:
            await self._task
            self._task = None
        if self._process is not None:
            await self._process.end()
        while self._descriptors:
            os.close(self._descriptors.pop())

    async def _asked(self, question: _Question, patience_s: float) -> Any:
        self._queue.append(question)
        self._wake.set()
        timer = asyncio.get_running_loop().call_later(patience_s, self._give_up, question)
        try:
            return await question.answer
        finally:
            timer.cancel()
            if question in self._queue:
                self._queue.remove(question)

    def _give_up(self, question: _Question) -> None:
        if question in self._queue and not question.answer.done():
            question.answer.set_exception(self._overloaded("other calls for this model took too long"))

    async def _serve(self) -> None:
        while not self._closing:
            if self._process is None or not self._process.alive:
                await self._revive()
            elif (question := self._take()) is not None:
                await self._answer(question, self._process)
            else:
                self._wake.clear()
                await self._wake.wait()

    def _take(self) -> _Question | None:
        """The oldest question that somebody still waits for."""
        while self._queue:
            question = self._queue.popleft()
            if not question.answer.done():
                return question
        return None

    async def _answer(self, question: _Question, process: WorkerProcess) -> None:
        started = time.monotonic()
        self._running_s = self._running_s or 1e-3
        try:
            found = await question.ask(process)
        except DivaultError as err:
            if not question.answer.done():
                question.answer.set_exception(err)
        else:
            if not question.answer.done():
                question.answer.set_result(found)
        finally:
            self._seconds = time.monotonic() - started
            self._running_s = 0.0

    async def _predict(self, process: WorkerProcess, input_data: bytes, parameters: bytes | None) -> wire.Result:
        most, limit = self._limits.max_answer_bytes, self._limits.predict_timeout_s
        run = wire.Run(wire.VERSION, wire.new_id(), input_data, parameters, most)
        with _explained("answered", limit, "the prediction"):
            reply = await process.ask(run, most=most + _ANSWER_MARGIN, timeout_s=limit)
            return _result(reply, process)

    async def _revive(self) -> None:
        """Wait as long as the deaths so far demand, and start the process anew."""
        now = time.monotonic()
        self._deaths.append(now)
        recent = [then for then in self._deaths if now - then < _WINDOW_S]
        self.state = "restarting"
        delay = min(_LAST_BACK_OFF_S, _FIRST_BACK_OFF_S * 2 ** (len(recent) - 1))
        _log.warning("worker ended", model_id=self.opened.model.text, deaths=len(recent), again_in_s=delay)
        if len(recent) == _DEATHS:
            self.state = "failed"
            delay = self._rest_s()
            self._fail_waiting(lambda: NotReady("the worker of this model keeps dying: try later", retry_after=delay))
        if await self._sleep(delay):
            return
        self.state = "restarting"
        try:
            self._process = await self._started()
        except DivaultError as err:
            _log.warning("worker did not restart", model_id=self.opened.model.text, code=err.code)
            return
        self.state = "ready"

    async def _sleep(self, seconds: float) -> bool:
        """True when the model is being unloaded."""
        end = time.monotonic() + seconds
        while not self._closing and (left := end - time.monotonic()) > 0:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._wake.wait()
        return self._closing

    async def _started(self) -> WorkerProcess:
        """A confined process with the model loaded. Raises UnsupportedModel, ModelFailed, DeadlineExceeded."""
        limits = self._limits
        process = await WorkerProcess.start(self._descriptors, limits.threads, limits.program, self._wake.set)
        try:
            with _explained("loaded", limits.load_timeout_s, "loading the model"):
                async with asyncio.timeout(limits.load_timeout_s):
                    self._on_report(await confined(process, policy(self.opened.size), limits.load_timeout_s))
                    self._description = await self._told(process)
        except BaseException:
            await process.end()
            # No input was ever near this process, so what it printed may be shown to the operator.
            _log.warning("model not loaded", model_id=self.opened.model.text, printed=process.stderr_tail())
            raise
        return process

    async def _told(self, process: WorkerProcess) -> Description:
        notes = [wire.FileNote(file.name, file.size) for file in self.opened.files]
        load = wire.Load(wire.VERSION, wire.new_id(), notes, self._limits.threads)
        reply = await process.ask(load, most=wire.CONTROL_BYTES, timeout_s=self._limits.load_timeout_s)
        if isinstance(reply, wire.Loaded):
            return wire.read_description(reply.description)
        raise _error(reply, UnsupportedModel)

    def _fail_waiting(self, error: Callable[[], DivaultError]) -> None:
        for question in self._queue:
            if not question.answer.done():
                question.answer.set_exception(error())

    def _rest_s(self) -> float:
        return max(1.0, math.ceil(self._deaths[0] + _WINDOW_S - time.monotonic()))

    def _gone(self) -> ModelNotLoaded:
        return ModelNotLoaded("the model was unloaded", model_id=self.opened.model.text)

    def _overloaded(self, why: str) -> Overloaded:
        return Overloaded(f"{why}: come back later", retry_after=max(1, math.ceil(len(self._queue) * self._seconds)))

    _seconds = 0.1
    """How long the last question took."""


async def confined(process: WorkerProcess, wanted: wire.Policy, timeout_s: float) -> Report:
    """What the process proved after it confined itself."""
    start = wire.Start(wire.VERSION, wire.new_id(), wanted)
    reply = await process.ask(start, most=wire.SMALL_BYTES, timeout_s=timeout_s)
    if isinstance(reply, wire.Ready):
        return Report(reply.level, reply.checks)
    raise _error(reply)


def policy(model_bytes: int) -> wire.Policy:
    """Limits for a model of this size: libraries take up to 1 GiB of addresses, formats up to three copies."""
    return wire.Policy(address_space=3 * _GIB + 3 * model_bytes)


async def _ping(process: WorkerProcess) -> None:
    with _explained("answered", _PING_S, "a sign of life"):
        await process.ask(wire.Ping(wire.VERSION, wire.new_id()), most=wire.SMALL_BYTES, timeout_s=_PING_S)


def _result(reply: wire.Reply, process: WorkerProcess) -> wire.Result:
    if not isinstance(reply, wire.Result):
        raise _error(reply, InputInvalid)
    try:
        wire.check_result(reply.result)
    except wire.ProtocolError:
        process.kill()
        raise
    return reply


def _error(reply: wire.Reply, *allowed: type[DivaultError]) -> DivaultError:
    """What the worker reported, if it is something that it can know. Raises ProtocolError otherwise."""
    if isinstance(reply, wire.Failed):
        return ModelFailed(f"the model failed: {_shown(reply.type)}: {_shown(reply.text)}", kind=_shown(reply.type))
    if isinstance(reply, wire.Refused):
        fields = {
            name: _shown(value) if isinstance(value, str) else value
            for name, value in wire.read_fields(reply.data).items()
        }
        error = from_code(reply.code, _shown(reply.detail), fields)
        if isinstance(error, allowed):
            return error
    raise wire.ProtocolError("an answer to another question than the one asked")


def _shown(text: str) -> str:
    """The text with everything unprintable replaced: it goes to terminals too."""
    return "".join(char if char.isprintable() else "?" for char in text)


@contextlib.contextmanager
def _explained(verb: str, limit_s: float, what: str) -> Any:
    """Errors of processes and wires as errors for callers."""
    try:
        yield
    except TimeoutError:
        raise DeadlineExceeded(
            f"{what} took longer than {limit_s:g} s and was stopped", limit_s=f"{limit_s:g}"
        ) from None
    except WorkerEnded:
        raise ModelFailed(f"the worker process ended before it {verb}", kind="crash") from None
    except (BadWorker, wire.ProtocolError, msgspec.MsgspecError):
        raise ModelFailed("the worker broke the protocol and was ended", kind="protocol") from None
