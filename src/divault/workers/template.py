"""Templates: processes that have imported the libraries of some formats, and fork a worker in milliseconds.

Rules:

1. A template is started when a model first needs it, clean and without a key or a model; it imports libraries and
   forks, and never reads a byte of a model (`template_child`).
2. A worker that was forked is confined like one that was started, proves it like that one, and is killed as a group; it
   ends with its template.
3. A template whose workers are gone, and that nobody was forked from for ten minutes, ends.
4. Where there is no template, workers are started one by one: slower, and otherwise the same.
5. A fork that fails, or is not answered, costs nobody else his worker: a template ends before its workers only when it
   is gone itself, or with the pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec.structs import replace

from divault.errors import DivaultError, NotReady
from divault.telemetry import log
from divault.values import MemoryFile
from divault.workers.memory import memory_of
from divault.workers.process import (
    Process,
    Tail,
    bubblewrap,
    channels,
    command_of,
    kill_group,
    no_room_is_not_ready,
    pidfd_of,
    spawn,
)
from divault.workers.template_child import FIRST_FILE, FORKED, MAX_DESCRIPTORS, MAX_MESSAGE, READY, UNFIT

_log = log("workers")
_COMMAND = command_of("template_child")
_FORK = b"fork"
IDLE_S = 600.0
"""How long a template stays without workers: its libraries take 20 to 330 MB."""
_THREADS = 1  # what a fork has until it is told: to have more started is easier than to have some ended
_PAUSE_S = 60.0
"""Before one that did not start, or that does not answer, is tried again."""
_FORK_S = 3.0
"""A fork takes some milliseconds: a template that is silent for so long is stopped, and not busy."""


class TemplateLost(Exception):
    """The template did not start, or is gone; the text is for the log."""


class TemplateSilent(Exception):
    """The template lives and does not answer."""


class Template:
    """One such process. `await Template.start(...)` makes one; whoever made it calls `close`."""

    def __init__(self, popen: subprocess.Popen[bytes], control: socket.socket, stderr: int, idle_s: float) -> None:
        self._popen = popen
        self._idle_s = idle_s
        self._workers: set[int] = set()
        self._rest: asyncio.TimerHandle | None = None
        self._retired = False
        self._pidfd = pidfd_of(popen)
        self._control = control
        self._stderr = Tail(stderr)
        self._asked: deque[asyncio.Future[tuple[bytes, list[int]]]] = deque()
        """Answers that are to come, in this order."""
        self._gone = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(control.fileno(), self._hear)
        loop.add_reader(self._pidfd, self._ended)

    @classmethod
    async def start(cls, name: str, separate: str | None, idle_s: float = IDLE_S) -> Template:
        """A template that is ready to fork. `separate`: the path of bubblewrap, for namespaces of its own.

        It ends when it had no workers for `idle_s`.

        Raises TemplateLost, NotReady.
        """
        around = () if separate is None else (separate, *bubblewrap(_THREADS))
        namespaces = "shared" if separate is None else "own"
        with no_room_is_not_ready(), contextlib.ExitStack() as ours:
            near, far, reading, writing = channels(socket.SOCK_SEQPACKET, ours)
            try:
                with far:
                    command = (*around, *_COMMAND, name, namespaces, str(far.fileno()))
                    popen = spawn(command, (far.fileno(),), _THREADS, writing)
            finally:
                os.close(writing)
            template = cls(popen, near, reading, idle_s)
            ours.pop_all()
        try:
            await template._be_ready()
        except BaseException:
            await template.close()
            raise
        template._rest_soon()
        return template

    @property
    def lost(self) -> bool:
        """True when it can't fork any more."""
        return self._gone.is_set()

    @property
    def memory_bytes(self) -> int:
        """What it takes beside its workers."""
        return 0 if self.lost else memory_of(self._popen.pid, but=self._workers)

    async def fork(self, files: Sequence[MemoryFile], on_loss: Callable[[], None]) -> Process:
        """A worker as `Process.start` gives one. When cancelled, the worker ends by itself.

        Raises NotReady where there is no room for a process, TemplateLost, TemplateSilent.
        """
        there = [replace(file, fd=FIRST_FILE + place) for place, file in enumerate(files)]

        async def forked(channel: int, stderr: int) -> _Forked:
            try:
                socket.send_fds(self._control, [_FORK], [channel, stderr, *(file.fd for file in files)])
            except ConnectionError as err:
                raise TemplateLost(f"it can't be asked: {err.strerror}") from err
            told, descriptors = await self._answer(_FORK_S)
            if told != FORKED or not descriptors:  # without a descriptor for it, the child ends by itself
                raise NotReady("there is no room for another worker process", retry_after=5)
            with contextlib.ExitStack() as ours:
                ours.callback(_close, descriptors)
                body = _Forked(descriptors[0], self._buried)
                ours.pop_all()
            self._workers.add(body.pid)
            return body

        try:
            return await Process.made(forked, there, on_loss)
        finally:
            self._rest_soon()

    def retire(self) -> None:
        """Have it end with the last of its workers: nobody is going to ask it again."""
        self._retired = True
        self._rest_soon()

    async def close(self) -> None:
        """End it, and its workers with it."""
        if not self._gone.is_set():
            kill_group(self._popen.pid)
        await self._gone.wait()

    async def _be_ready(self) -> None:
        told, _ = await self._answer()
        if told == UNFIT:
            raise TemplateLost("user namespaces of their own are not allowed within namespaces")
        if told != READY:
            raise TemplateLost("it said something else")

    def _buried(self, pid: int) -> None:
        self._workers.discard(pid)
        self._rest_soon()

    def _rest_soon(self) -> None:
        """End it later, unless somebody wants it by then."""
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None
        if self._workers or self.lost or (self._asked and not self._retired):
            return
        idle_s = 0.0 if self._retired else self._idle_s
        self._rest = asyncio.get_running_loop().call_later(idle_s, kill_group, self._popen.pid)

    async def _answer(self, limit_s: float | None = None) -> tuple[bytes, list[int]]:
        """Its next word, with the descriptors that came along. Raises TemplateLost, TemplateSilent."""
        if self.lost:
            raise TemplateLost("it is gone")
        answer: asyncio.Future[tuple[bytes, list[int]]] = asyncio.get_running_loop().create_future()
        self._asked.append(answer)
        self._rest_soon()
        try:
            async with asyncio.timeout(limit_s):
                return await answer
        except (TimeoutError, asyncio.CancelledError) as err:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                _close(answer.result()[1])  # it came in the very turn in which its caller went away
            if isinstance(err, TimeoutError):
                raise TemplateSilent from None
            raise

    def _hear(self) -> None:
        try:
            told, descriptors, _, _ = socket.recv_fds(self._control, MAX_MESSAGE, 1)
        except BlockingIOError:
            return
        except OSError:
            told, descriptors = b"", []
        if not told:  # it is ending: `_ended` does the rest
            asyncio.get_running_loop().remove_reader(self._control.fileno())
            kill_group(self._popen.pid)
            return
        answer = self._asked.popleft() if self._asked else None
        if answer is not None and not answer.done():
            answer.set_result((told, descriptors))
            return
        _close(descriptors)  # who asked went away; his end of the worker's socket is closed, so the worker ends

    def _ended(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfd)
        loop.remove_reader(self._control.fileno())
        if self._rest is not None:
            self._rest.cancel()
        os.close(self._pidfd)
        self._control.close()
        kill_group(self._popen.pid)
        self._popen.wait()
        self._stderr.close()
        self._gone.set()
        for answer in self._asked:
            if not answer.done():
                answer.set_exception(TemplateLost(f"it ended: {self._stderr.text()}"))


def _close(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        os.close(fd)


class _Forked:
    """A child of a template, which kills its group and reaps it."""

    def __init__(self, pidfd: int, on_end: Callable[[int], None]) -> None:
        self.pidfd = pidfd
        self.pid = _pid_of(pidfd)
        self._on_end = on_end

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def bury(self) -> None:
        self._on_end(self.pid)


def _pid_of(pidfd: int) -> int:
    """The number of the process in this one's namespace; -1 when it is gone."""
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == "Pid":
            return int(value)
    raise TemplateLost("the kernel does not tell a worker's number")


class Templates:
    """The templates of one pool, by name."""

    def __init__(self, separate: Callable[[], str | None], *, idle_s: float = IDLE_S) -> None:
        """`separate` says now whether, and by which program, processes get namespaces of their own."""
        self._separate = separate
        self._idle_s = idle_s
        self._starts: dict[str, asyncio.Task[Template]] = {}
        self._retired: list[Template] = []
        """Those that stay for their workers alone."""
        self._closed = False
        self._not_before: dict[str, float] = {}

    async def fork(self, name: str, files: Sequence[MemoryFile], on_loss: Callable[[], None]) -> Process | None:
        """A worker that has the libraries of the template; None where one has to be started instead.

        Raises NotReady.
        """
        loop = asyncio.get_running_loop()
        if len(files) + 2 > MAX_DESCRIPTORS or self._not_before.get(name, 0.0) > loop.time():
            return None
        try:
            template = await self._template(name)
            try:
                return await template.fork(files, on_loss)
            except TemplateSilent:
                self._retire(name, template)
                raise TemplateLost("it does not answer") from None
            except TemplateLost:  # it just died; another one is as good
                await template.close()
                return await (await self._template(name)).fork(files, on_loss)
        except (TemplateLost, TemplateSilent) as err:
            self._not_before[name] = loop.time() + _PAUSE_S
            _log.warning("workers are started one by one", template=name, why=str(err))
            return None

    async def close(self) -> None:
        """End all templates, and their workers with them; who waits for one hears NotReady."""
        self._closed = True
        for start in self._starts.values():
            start.cancel()
        await asyncio.gather(*(template.close() for template in self.there()))
        await asyncio.gather(*self._starts.values(), return_exceptions=True)

    async def _template(self, name: str) -> Template:
        """The one of this name; all who want it wait for one start, whoever of them goes away.

        Raises TemplateLost, NotReady.
        """
        if self._closed:
            raise _stopping()
        start = self._starts.get(name)
        if start is None or (start.done() and (start.cancelled() or start.exception() or start.result().lost)):
            work = Template.start(name, self._separate(), self._idle_s)
            start = self._starts[name] = asyncio.create_task(work, name=f"template {name}")
        try:
            return await asyncio.shield(start)
        except DivaultError as err:
            raise err.copy() from err
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if start.cancelled() and task is not None and not task.cancelling():
                raise _stopping() from None  # `close` cancelled the start, and nobody the one who waits for it
            raise

    def _retire(self, name: str, template: Template) -> None:
        """Leave it to its workers; another one is started when it is wanted."""
        if template not in self._retired:
            self._retired = [one for one in self._retired if not one.lost] + [template]
            self._starts.pop(name, None)
            template.retire()

    def there(self) -> list[Template]:
        """Those that were started."""
        done = [start for start in self._starts.values() if start.done() and not start.cancelled()]
        return [*self._retired, *(start.result() for start in done if start.exception() is None)]


def _stopping() -> NotReady:
    return NotReady("the node is stopping", retry_after=5)
