"""The forbidden acts, each tried: what the kernel refuses is enforced, what it lets pass is not, all else is unknown.

Only EPERM, EACCES and EROFS are a refusal, and ENOENT for a file that the node knows to exist: a connection that is
refused, a time-out or a process that is not there prove nothing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

Verdict = Literal["enforced", "not_enforced", "unknown"]

FORBIDDEN = ("fs_read", "fs_write", "net_tcp", "net_udp", "unix", "spawn", "signal", "ptrace", "proc")
"""Acts that a worker of any level from `standard` on is refused."""
OF_PATHS = ("fs_read", "fs_write", "proc")
"""Those of them that Landlock refuses, where there is no filter of system calls."""
SEPARATE = ("pid_ns", "net_ns")
"""Namespaces of its own."""
_REFUSED = (errno.EPERM, errno.EACCES, errno.EROFS)
_PTRACE_SEIZE = 0x4206
_DISCARD_PORT = 9
_libc = ctypes.CDLL(None, use_errno=True)


def attempt_all(canary: str, namespaces: Mapping[str, str]) -> dict[str, Verdict]:
    """The verdict for each of `FORBIDDEN` and `SEPARATE`. An act that succeeds is undone at once."""
    parent = os.getppid()
    acts: dict[str, Callable[[], object]] = {
        "fs_read": partial(_read_outside, canary),
        "fs_write": _write,
        "net_tcp": partial(_connect, socket.SOCK_STREAM),
        "net_udp": partial(_connect, socket.SOCK_DGRAM),
        "unix": _unix,
        "spawn": _fork,
        "signal": partial(os.kill, parent, 0),
        "ptrace": partial(_seize, parent),
        "proc": partial(_open, f"/proc/{parent}/environ"),
    }
    # In a namespace of its own the file is not even there; outside of one, absence would prove nothing.
    hidden = _own_namespace("mnt", namespaces) == "enforced"
    absent = {"fs_read", "fs_write", "proc"} if hidden else set()
    found = {name: _attempt(act, absence_counts=name in absent) for name, act in acts.items()}
    return found | {"pid_ns": _own_namespace("pid", namespaces), "net_ns": _own_namespace("net", namespaces)}


def namespaces_here() -> dict[str, str]:
    """The names of this process' namespaces, to compare a worker's with."""
    return {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in ("mnt", "net", "pid")}  # noqa: PTH115  # no path


def _attempt(act: Callable[[], object], *, absence_counts: bool) -> Verdict:
    try:
        act()
    except OSError as err:
        if err.errno in _REFUSED or (absence_counts and err.errno in (errno.ENOENT, errno.ENOTDIR)):
            return "enforced"
        return "not_enforced" if err.errno in (errno.ECONNREFUSED, errno.ENETUNREACH) else "unknown"
    return "not_enforced"


def _read_outside(canary: str) -> None:
    """Succeeds when either can be read. The list of the root is open to every user, wherever the canary lies."""
    try:
        _open("/")
    except PermissionError:
        _open(canary)


def _open(path: str) -> None:
    os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def _write() -> None:
    path = f"/var/tmp/divault-selfcheck-{os.getpid()}"  # noqa: S108  # it must not come to be
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.close(fd)
    os.unlink(path)  # noqa: PTH108  # the plain call


def _connect(kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.settimeout(1.0)
        probe.connect(("127.0.0.1", _DISCARD_PORT))
        probe.send(b"")


def _unix() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM):
        pass


def _fork() -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)


def _seize(process: int) -> None:
    if _libc.ptrace(_PTRACE_SEIZE, process, None, None) != 0:
        raise OSError(ctypes.get_errno(), "ptrace")


def _own_namespace(kind: str, outside: Mapping[str, str]) -> Verdict:
    if kind not in outside:
        return "unknown"
    try:
        here = os.readlink(f"/proc/self/ns/{kind}")  # noqa: PTH115  # its target is no path
    except OSError:
        return "unknown"
    return "enforced" if here != outside[kind] else "not_enforced"
