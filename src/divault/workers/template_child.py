"""The process that workers are forked from: it imports libraries, and from then on does nothing but fork.

It is started clean, holds no key and no model, and reads no byte of one: what it gets is descriptors, and what it makes
of them is a child that has nothing else. The child confines itself as every worker does (`child`). Steps:

1. Import the libraries of the template, and say `ready`.
2. For each message with descriptors, fork; answer with a descriptor of the child, or `busy` where there is no room for
   one. A child that ended is killed as a group before it is reaped, so that nothing of it is left and no number is
   mistaken.
3. End when the gateway hangs up or is gone; the children's death signals then end them.

In a child the socket is descriptor 3, the pipe of its stderr 2, and the model's files are 4 and on, in their order.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from divault.models.libraries import import_libraries
from divault.workers import child

MAX_MESSAGE, MAX_DESCRIPTORS = 1 << 16, 253
"""Descriptors that the kernel takes in one message (SCM_MAX_FD)."""
READY, UNFIT, FORKED, BUSY = b"ready", b"unfit", b"forked", b"busy"
CHANNEL, FIRST_FILE = 3, 4
_PR_SET_PDEATHSIG, _CLONE_NEWUSER = 1, 0x10000000
_NOBODY = 65534
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Entry of the process: the template's name, `own` or `shared`, and the descriptor of its socket are its arguments.

    `own`: each child has a user namespace of its own; says `unfit` where that is not allowed.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    name, namespaces, number = sys.argv[-3:]
    control = socket.socket(fileno=int(number))
    own = namespaces == "own"
    if own and not _own_namespaces_work():
        control.send(UNFIT)
        os._exit(0)
    import_libraries(name)
    # What is here now stays: a collection in a child would touch, and so copy, every page of it.
    gc.collect()
    gc.freeze()
    control.send(READY)
    _serve(control, own=own)
    os._exit(0)


def _serve(control: socket.socket, *, own: bool) -> None:
    children: dict[int, int] = {}
    poller = select.poll()
    poller.register(control, select.POLLIN)
    while True:
        for fd, _ in poller.poll():
            if fd != control.fileno():
                poller.unregister(fd)
                _reap(fd, children.pop(fd))
                continue
            message, descriptors, flags, _ = socket.recv_fds(control, MAX_MESSAGE, MAX_DESCRIPTORS)
            if not message:
                return
            try:
                _require_all(flags)
                pid, pidfd = _forked(descriptors, own=own)
            except OSError:
                control.send(BUSY)
                continue
            finally:
                for held in descriptors:
                    os.close(held)
            children[pidfd] = pid
            poller.register(pidfd, select.POLLIN)
            socket.send_fds(control, [FORKED], [pidfd])


def _require_all(flags: int) -> None:
    """Raises OSError when descriptors of a message were lost, for want of room for them."""
    if flags & socket.MSG_CTRUNC:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def _reap(pidfd: int, pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have ended before it led a group
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(pidfd)


def _forked(descriptors: Sequence[int], *, own: bool) -> tuple[int, int]:
    """Id of a new child, which never comes back from here, and a descriptor of it.

    Raises OSError when there is no room for one; then there is no child.
    """
    pid = os.fork()
    if not pid:
        try:
            os.setsid()
            if own:
                _own_user_namespace()
            channel, stderr, *files = descriptors
            _renumber({channel: CHANNEL, stderr: 2} | {fd: FIRST_FILE + place for place, fd in enumerate(files)})
            child.work(CHANNEL)
        except BaseException:  # noqa: BLE001 - the process ends here, and must not go on as a second template
            traceback.print_exc()
        finally:
            os._exit(1)
    try:
        return pid, os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _renumber(numbers: Mapping[int, int]) -> None:
    """Give each descriptor its number; what else is open the confinement closes."""
    above = max(*numbers, *numbers.values()) + 1
    moved = {fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above): number for fd, number in numbers.items()}
    for fd, number in moved.items():
        os.dup2(fd, number)


def _own_namespaces_work() -> bool:
    pid = os.fork()
    if not pid:
        with contextlib.suppress(OSError):
            _own_user_namespace()
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _own_user_namespace() -> None:
    """Threads are counted per user and namespace: without one, a worker's would count for its siblings too."""
    if _libc.unshare(_CLONE_NEWUSER) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    same = f"{_NOBODY} {_NOBODY} 1"
    for name, text in (("setgroups", "deny"), ("uid_map", same), ("gid_map", same)):
        Path("/proc/self", name).write_text(text, encoding="ascii")
