"""One worker process as the gateway sees it: started clean or forked, asked, and killed with all that it started.

Rules:

1. It inherits its socket, its stderr and the memory files of one model, nothing else; its environment is spelled out.
2. It leads a session and a process group of its own, and is killed as a group; its id stays reserved until then.
3. What it writes to stderr before its first run is kept up to a bound, shown escaped in the log, and never put into an
   answer. What it writes later is read and thrown away: a model may write there what a caller sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from signal import SIGKILL
from typing import Protocol

import divault
from divault.errors import ModelFailed, NotReady
from divault.values import MemoryFile
from divault.workers import wire
from divault.workers.libraries import library_paths
from divault.workers.line import Line


def command_of(module: str) -> tuple[str, ...]:
    """What starts `main` of a module beside this one, in a Python that takes nothing from its surroundings."""
    source = (
        "import sys; root = sys.argv[1]; root in sys.path or sys.path.insert(0, root); "
        f"from divault.workers.{module} import main; main()"
    )
    return (sys.executable, "-I", "-B", "-c", source, str(Path(divault.__file__).parent.parent))


COMMAND = command_of("child")
"""Starts a worker; the descriptor of its socket comes as one more argument."""
_NOBODY = "65534"
_STDERR_KEPT = 64 << 10
_STDERR_READ = 1 << 20
"""Of one process; beyond it the pipe is closed, so that a flood costs the gateway nothing more."""


def environment(threads: int) -> dict[str, str]:
    """Everything that a worker finds in its environment; `threads` bounds those of numerical libraries."""
    return {
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        # Threads that wait would otherwise spin, at the cost of the other workers on the machine. For a moment (about
        # 50 us) they do: the next part of the same pass mostly comes by then, and waking them takes as long.
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "2000",
        # joblib must not look for semaphores and shared memory: one worker is one unit of parallel work.
        "JOBLIB_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # torch makes its compiler's cache folder when it is imported: one that is there already, and can't be written.
        "TORCHINDUCTOR_CACHE_DIR": "/usr",
    }


def bubblewrap(threads: int) -> tuple[str, ...]:
    """What stands between bubblewrap and a worker's command: namespaces of its own, and an empty root of libraries.

    Nothing is writable: the root, with its temporary folder, is remounted read-only before the worker starts.
    """
    binds = [part for path in (*library_paths(), "/sys/devices/system/cpu") for part in ("--ro-bind", path, path)]
    links = [part for name in ("lib", "lib64", "bin") for part in _link(name)]
    variables = [part for name, value in environment(threads).items() for part in ("--setenv", name, value)]
    return (
        "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--uid", _NOBODY,
        "--gid", _NOBODY, "--hostname", "w", "--clearenv", *variables, "--tmpfs", "/", "--dev", "/dev",
        "--proc", "/proc", *binds, *links, "--remount-ro", "/", "--chdir", "/", "--",
    )  # fmt: skip


def _link(name: str) -> tuple[str, ...]:
    """`/lib` and the like, as links into /usr where this system has them so."""
    path = Path("/", name)
    return ("--symlink", os.readlink(path), str(path)) if path.is_symlink() else ()  # noqa: PTH115  # relative, as it is


class Body(Protocol):
    """The process itself: how it is ended, and who buries it."""

    pid: int
    pidfd: int
    """Readable when it ended. Whoever gets the body closes it."""

    def kill(self) -> None:
        """End it with everything in its group, unless it is gone."""

    def bury(self) -> None:
        """What is left to do when it has ended."""


class Process:
    """A worker. `await Process.start(...)` or `Template.fork` makes one; whoever made it calls `kill`."""

    def __init__(
        self, body: Body, line: Line, stderr: Tail, files: Sequence[MemoryFile], on_loss: Callable[[], None]
    ) -> None:
        self._body = body
        self._line = line
        self._on_loss = on_loss
        self._gone = asyncio.Event()
        self._stderr = stderr
        self.files = tuple(files)
        """The model's, by the numbers that they have in the process."""
        asyncio.get_running_loop().add_reader(body.pidfd, self._ended)

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        files: Sequence[MemoryFile],
        threads: int,
        on_loss: Callable[[], None],
        *,
        separate: str | None = None,
    ) -> Process:
        """A process that has not been asked anything yet. `on_loss` is called when it can't answer any more.

        `separate`: the path of bubblewrap, for namespaces of its own as the level `strict` has them.

        Raises NotReady when the system has no room for another process or its descriptors.
        """
        whole = command if separate is None else (separate, *bubblewrap(threads), *command)

        async def started(channel: int, stderr: int) -> Body:
            inherited = (channel, *(file.fd for file in files))
            return _Started(spawn((*whole, str(channel)), inherited, threads, stderr))

        return await cls.made(started, files, on_loss)

    @classmethod
    async def made(
        cls,
        make: Callable[[int, int], Awaitable[Body]],
        files: Sequence[MemoryFile],
        on_loss: Callable[[], None],
    ) -> Process:
        """The same of a process that `make` makes, given its socket and its stderr."""
        with no_room_is_not_ready(), contextlib.ExitStack() as ours:
            near, far, reading, writing = channels(socket.SOCK_STREAM, ours)
            try:
                with far:
                    body = await make(far.fileno(), writing)
            finally:
                os.close(writing)
            line = Line(on_loss)
            process = cls(body, line, Tail(reading), files, on_loss)
            ours.pop_all()
        connected = False
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: line, sock=near)
            connected = True
            return process
        finally:
            if not connected:
                near.close()
                await process.kill()

    @property
    def pid(self) -> int:
        """Id of the process, which is the id of its group too."""
        return self._body.pid

    @property
    def lost(self) -> bool:
        """True when it can't answer any more."""
        return self._gone.is_set() or self._line.lost

    async def ask(self, request: wire.Request) -> wire.Reply:
        """Give the answer to one request. Raises ModelFailed; after that, and when cancelled, kill it."""
        return await self._line.ask(request)

    def post(
        self,
        request: wire.Request,
        answered: Callable[[wire.Reply | ModelFailed], None],
        on_part: Callable[[wire.Part], None] | None = None,
    ) -> None:
        """As `Line.post`."""
        if isinstance(request, wire.Run):
            self._stderr.freeze()
        self._line.post(request, answered, on_part)

    def stop_run(self) -> None:
        """Ask for the end of a run whose pieces nobody wants any more."""
        self._line.stop()

    def words(self) -> str:
        """The end of what it wrote to stderr before its first run, escaped: for the log of the node alone."""
        return self._stderr.text()

    def stop(self) -> None:
        """Kill it with everything in its group. Does nothing the second time."""
        if not self._gone.is_set():
            self._body.kill()

    async def kill(self) -> None:
        """The same, and return when it is gone."""
        self.stop()
        await self._gone.wait()

    def _ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._body.pidfd)
        os.close(self._body.pidfd)
        self._body.bury()
        self._gone.set()
        self._line.close()
        self._stderr.close()
        self._on_loss()


class _Started:
    """A process that this one started."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self.pid = popen.pid
        self.pidfd = pidfd_of(popen)
        self._popen = popen

    def kill(self) -> None:
        kill_group(self.pid)

    def bury(self) -> None:
        # Not reaped yet, so the id of the group can't have passed to anybody else.
        kill_group(self.pid)
        self._popen.wait()


def spawn(command: Sequence[str], inherited: Sequence[int], threads: int, stderr: int) -> subprocess.Popen[bytes]:
    """A process with nothing but these descriptors and `environment`. Returns as soon as the program is loaded.

    Raises OSError when the system has no room for another process.
    """
    return subprocess.Popen(
        command,
        pass_fds=inherited,
        env=environment(threads),
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        start_new_session=True,
    )


@contextlib.contextmanager
def no_room_is_not_ready() -> Iterator[None]:
    """For what needs a process, a thread or a descriptor. Raises NotReady where the system has none left."""
    try:
        yield
    except OSError as err:
        raise NotReady(f"can't start a worker process: {err.strerror}", retry_after=5) from None
    except RuntimeError as err:
        if str(err) != "can't start new thread":  # what Python says of a thread has no type of its own
            raise
        raise NotReady("can't start a thread: too many run already", retry_after=5) from None


def channels(kind: socket.SocketKind, ours: contextlib.ExitStack) -> tuple[socket.socket, socket.socket, int, int]:
    """A pair of sockets, and both ends of a pipe for what the process writes to stderr.

    The first socket and the pipe's first end are this process', and closed with `ours`. Raises OSError.
    """
    near, far = socket.socketpair(socket.AF_UNIX, kind)
    ours.enter_context(near)
    near.setblocking(False)  # noqa: FBT003 - the standard library's signature
    try:
        reading, writing = os.pipe()
    except OSError:
        far.close()
        raise
    ours.callback(os.close, reading)
    return near, far, reading, writing


def pidfd_of(popen: subprocess.Popen[bytes]) -> int:
    """A descriptor of the process, readable when it ended. Raises OSError; then the process is gone."""
    try:
        return os.pidfd_open(popen.pid)
    except OSError:
        kill_group(popen.pid)
        popen.wait()
        raise


def kill_group(pid: int) -> None:
    """End the group that this process leads; it must not have been reaped."""
    try:
        os.killpg(pid, SIGKILL)
    except ProcessLookupError:
        return


class Tail:
    """The last 64 KiB that came through a pipe, whose reading end it owns."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._kept = bytearray()
        self._read = 0
        self._open = True
        self._frozen = False
        os.set_blocking(fd, False)
        asyncio.get_running_loop().add_reader(fd, self._more)

    def text(self) -> str:
        """The end of it, escaped."""
        return wire.escaped(bytes(self._kept[-400:]).decode("utf-8", "backslashreplace"), 400)

    def freeze(self) -> None:
        """Keep what came until now, and nothing that comes later. Does nothing the second time."""
        if not self._frozen:
            self._more()
            self._frozen = True

    def close(self) -> None:
        """Read what is there, and no more."""
        self._more()
        self._stop()

    def _more(self) -> None:
        if not self._open:
            return
        try:
            data = os.read(self._fd, _STDERR_KEPT)
        except BlockingIOError:
            return
        self._read += len(data)
        if not self._frozen:
            self._kept = (self._kept + data)[-_STDERR_KEPT:]
        if not data or self._read > _STDERR_READ:
            self._stop()

    def _stop(self) -> None:
        if self._open:
            self._open = False
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
