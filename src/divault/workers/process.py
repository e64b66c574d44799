"""One worker process as the gateway sees it: started clean, asked one thing at a time, killed as a group.

1. The process gets an explicit environment, its socket and the model's descriptors, and nothing else.
2. `ask` has one deadline from the first byte sent to the last byte received; whoever misses it is killed.
3. Whatever breaks the wire's rules kills the process before the error is raised.
4. What it prints on stderr is kept escaped, at most 64 KiB of it, and never reaches an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import divault
from divault.workers import wire

STDERR_BYTES = 64 * 1024
_BOOTSTRAP = (
    "import sys; root = sys.argv[1]; root in sys.path or sys.path.insert(0, root); "
    "from divault.workers.child import main; main()"
)
PROGRAM = ("-I", "-B", "-c", _BOOTSTRAP, str(Path(divault.__file__).parent.parent))
"""What the interpreter runs: isolated from user paths and PYTHON* variables, and writing no byte code."""


class WorkerEnded(Exception):
    """The process is gone, and with it the answer."""


class BadWorker(Exception):
    """The process broke the protocol and was killed."""


class WorkerProcess:
    """A running worker. Belongs to one event loop; one `ask` at a time."""

    def __init__(self, process: subprocess.Popen[bytes], on_end: Callable[[], None]) -> None:
        self._process = process
        self._on_end = on_end
        self._channel: _Channel | None = None
        self._stderr = bytearray()
        self._ended = asyncio.Event()
        self._pidfd = os.pidfd_open(process.pid)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pidfd, self._reap)
        if process.stderr is None:
            raise TypeError("stderr has to be a pipe")
        os.set_blocking(process.stderr.fileno(), False)  # noqa: FBT003  # the standard library's signature
        loop.add_reader(process.stderr, self._drain)

    @classmethod
    async def start(
        cls, descriptors: Sequence[int], threads: int, program: Sequence[str], on_end: Callable[[], None]
    ) -> WorkerProcess:
        """A process with these descriptors, waiting for its first question; `on_end` is called when it ends."""
        near, far = socket.socketpair()
        with far:
            numbers = [far.fileno(), *descriptors]
            process = subprocess.Popen(  # noqa: ASYNC220  # a fork and an exec, a few ms; waited for by its pidfd
                [sys.executable, *program, ",".join(map(str, numbers))],
                pass_fds=numbers,
                env=environment(threads),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        worker = cls(process, on_end)
        near.setblocking(False)  # noqa: FBT003  # the standard library's signature
        _, channel = await asyncio.get_running_loop().create_unix_connection(_Channel, sock=near)
        worker._channel = channel
        return worker

    @property
    def pid(self) -> int:
        """Process id; the group has the same."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """True until the process was seen to end."""
        return not self._ended.is_set()

    async def ask(self, question: wire.Question, *, most: int, timeout_s: float) -> wire.Reply:
        """The answer, of at most `most` bytes. On every error the process is killed.

        Raises TimeoutError, WorkerEnded, BadWorker.
        """
        channel = cast(_Channel, self._channel)
        try:
            async with asyncio.timeout(timeout_s):
                body = await channel.exchange(wire.pack(question), most)
            return wire.read_reply(body, question.id)
        except wire.ProtocolError as err:
            raise BadWorker(str(err)) from err
        finally:
            if sys.exc_info()[0] is not None:
                self.kill()

    def kill(self) -> None:
        """SIGKILL to the whole group, if it still runs."""
        if self._process.returncode is None:
            # Not reaped yet, so the number still means this group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def end(self) -> None:
        """Kill it and wait until nothing of it is left."""
        self.kill()
        await self._ended.wait()

    def stderr_tail(self) -> str:
        """The last of what it printed, control characters escaped. Untrusted: for operators, never for answers."""
        return bytes(self._stderr[-2000:]).decode("utf-8", "replace").encode("unicode_escape").decode("ascii")

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        # Children that it may have started: the group's number is taken as long as the leader was not reaped.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._drain()
        self._close_stderr()
        if self._channel is not None:
            self._channel.close()
        self._ended.set()
        self._on_end()

    def _drain(self) -> None:
        stderr = self._process.stderr
        if stderr is None or stderr.closed:
            return
        try:
            data = os.read(stderr.fileno(), STDERR_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._close_stderr()
        self._stderr += data
        del self._stderr[:-STDERR_BYTES]

    def _close_stderr(self) -> None:
        stderr = self._process.stderr
        if stderr is not None and not stderr.closed:
            asyncio.get_running_loop().remove_reader(stderr)
            stderr.close()


class _Channel(asyncio.Protocol):
    """The near end of the socket: one exchange at a time, anything unasked is an error."""

    def __init__(self) -> None:
        self._assembler = wire.Assembler(0)
        self._waiting: asyncio.Future[bytes] | None = None
        self._transport: asyncio.Transport | None = None
        self._broken: Exception | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        within = self._assembler.inside
        self._fail(wire.ProtocolError("the stream ended within a frame") if within else WorkerEnded())

    async def exchange(self, frame: bytes, most: int) -> bytes:
        """Send and wait for the one answer. Raises WorkerEnded, ProtocolError."""
        if self._broken is not None or self._transport is None:
            raise self._broken or WorkerEnded()
        self._assembler.limit = most
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(frame)
        try:
            return await self._waiting
        finally:
            self._waiting = None
            self._assembler.limit = 0

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._assembler.feed(data):
                if self._waiting is None or self._waiting.done():
                    raise wire.ProtocolError("a frame that was not asked for")
                self._waiting.set_result(body)
            if self._assembler.inside and (self._waiting is None or self._waiting.done()):
                raise wire.ProtocolError("bytes that were not asked for")
        except wire.ProtocolError as err:
            self._fail(err)
            self.close()

    def close(self) -> None:
        """Close the socket; the worker ends when it sees that."""
        if self._transport is not None:
            self._transport.close()

    def _fail(self, err: Exception) -> None:
        self._broken = self._broken or err
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(err)


def environment(threads: int) -> dict[str, str]:
    """The whole environment of a worker: it shows in /proc for the life of the process, so nothing else is in it."""
    budget = str(threads)
    return {
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": budget,
        "OPENBLAS_NUM_THREADS": budget,
        "MKL_NUM_THREADS": budget,
        "JOBLIB_MULTIPROCESSING": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": "/nonexistent",
        "PYTHONHASHSEED": "0",
    }
