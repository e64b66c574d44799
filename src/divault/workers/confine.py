"""What a worker gives up before it reads a byte of the model, and what of that the kernel really enforces.

The seam is `confine(policy) -> Report`: it runs once in the worker, in order, and a step that fails ends the worker.
This release reaches the level `partial`: no privileges to gain, no core dumps, not readable by others, limited memory,
no file to write, no descriptor but the socket and the model. Files can still be read and sockets opened, which
the report says (`not_enforced`); that is why formats that carry code are refused.

A check is `enforced` only if the forbidden act was tried here and the kernel refused it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from divault.workers.wire import Policy

LEVEL = "partial"
NOT_ENFORCED = ("fs_read", "net_tcp", "net_udp", "unix", "spawn", "signal", "ptrace", "proc", "proc_limit", "pid_ns", "net_ns")
"""Checks of the full sandbox that nothing here holds."""
TRIED = ("mem_limit", "fs_write", "core_dump", "no_new_privs", "unreadable")
CHECKS = (*TRIED, *NOT_ENFORCED)

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_GET_DUMPABLE = 1, 4, 3
_PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS = 38, 39
_SETTLED = 3
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Report:
    """The level that is really there, and each check: `enforced` or `not_enforced`."""

    level: str
    checks: dict[str, str]


def settle(descriptors: list[int]) -> list[int]:
    """Move the descriptors to 3, 4, ... in their order and close all others above stderr; gives the new numbers."""
    above = _SETTLED + len(descriptors)
    # Copies above all targets first, so that no target overwrites one that still has to be moved.
    copies = [_above(descriptor, above) for descriptor in descriptors]
    settled = [os.dup2(copy, _SETTLED + place, inheritable=False) for place, copy in enumerate(copies)]
    os.closerange(above, _most_descriptors())
    return settled


def confine(policy: Policy) -> Report:
    """Give up what a worker doesn't need, and report what was proved. Raises OSError when a step fails."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        sys.exit("the gateway is gone")
    os.umask(0o077)
    # Before dumpable 0, which hands the files below /proc/self to root.
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    _prctl(_PR_SET_DUMPABLE, 0)
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: policy.open_files,
        resource.RLIMIT_AS: policy.address_space,
        resource.RLIMIT_DATA: policy.address_space,
    }
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    return Report(LEVEL, _tried(policy) | dict.fromkeys(NOT_ENFORCED, "not_enforced"))


def unknown() -> Report:
    """The report before any worker was started."""
    return Report(LEVEL, dict.fromkeys(TRIED, "unknown") | dict.fromkeys(NOT_ENFORCED, "not_enforced"))


def _tried(policy: Policy) -> dict[str, str]:
    acts = {
        "mem_limit": _memory_is_limited(policy.address_space),
        "fs_write": _writing_is_refused(),
        "core_dump": resource.getrlimit(resource.RLIMIT_CORE) == (0, 0),
        "no_new_privs": _libc.prctl(_PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1,
        "unreadable": _libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) == 0,
    }
    return {name: "enforced" if holds else "not_enforced" for name, holds in acts.items()}


def _memory_is_limited(address_space: int) -> bool:
    """Map one MiB more than allowed, without access: it counts as address space and touches no memory."""
    try:
        mmap.mmap(-1, address_space + (1 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0).close()
    except (OSError, MemoryError):
        return True
    return False


def _writing_is_refused() -> bool:
    """Write one byte to a file of its own in memory, which counts as any file does."""
    file = os.memfd_create("probe", os.MFD_CLOEXEC)
    try:
        os.write(file, b"x")
    except OSError as err:
        return err.errno == errno.EFBIG
    finally:
        os.close(file)
    return False


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def _above(descriptor: int, lowest: int) -> int:
    import fcntl

    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, lowest)


def _most_descriptors() -> int:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 1 << 20 if most == resource.RLIM_INFINITY else most
