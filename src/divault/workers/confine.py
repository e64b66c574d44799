"""What a worker gives up before it touches a byte of a model, and the proof of each part.

`confine(policy)` is called once, in the worker, while it has one thread. A step that fails ends the worker. The report
says what was seen to hold, by the names of the node's public description; a name without a mechanism is `not_enforced`.

Descriptors bypass every later rule, so they are closed first; the death signal and the group make sure that nothing
outlives the node; dumpable 0 keeps siblings of one user from reading this memory, and it gives /proc/self to root,
hence after the last write there.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LEVEL = "partial"
"""No file system, network or system call rules yet: what `confine` does is less than the level `standard`."""

Verdict = Literal["enforced", "not_enforced", "unknown"]

UNCONFINED = ("fs_read", "fs_write", "net_tcp", "net_udp", "unix", "spawn", "signal", "ptrace", "proc")
"""Acts that nothing refuses at this level."""
PROVEN = ("mem_limit", "descriptors", "environment", "no_core_dump", "no_file_growth", "no_new_privs", "not_dumpable")

_PR_SET_PDEATHSIG, _PR_GET_DUMPABLE, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS = 1, 3, 4, 38, 39
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Policy:
    """What this worker may keep."""

    keep: tuple[int, ...]
    """Descriptors beside 0, 1 and 2."""
    environment: frozenset[str]
    """Names that may stand in the environment."""
    address_space: int
    """RLIMIT_AS in bytes: everything mapped, libraries and the model's file included."""
    data: int
    """RLIMIT_DATA in bytes: private writable memory."""
    descriptors: int = 256
    """RLIMIT_NOFILE: bounds descriptor bombs; libraries need some dozens."""


def confine(policy: Policy) -> dict[str, Verdict]:
    """Give up what the policy doesn't leave, in the only order that works; what was seen to hold, by name.

    Raises OSError when a step fails: the worker must end then.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _close_all_but(policy.keep)
    for name in set(os.environ) - policy.environment:
        del os.environ[name]
    # Nothing is writable later on; libraries that ask for a folder must not go and try some.
    tempfile.tempdir = "/nonexistent"
    os.umask(0o077)
    _offer_to_the_memory_killer()
    _prctl(_PR_SET_DUMPABLE, 0)
    _limit(policy)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    return _report(policy)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def _close_all_but(keep: tuple[int, ...]) -> None:
    start = 3
    for fd in sorted(keep):
        os.closerange(start, fd)
        start = fd + 1
    os.closerange(start, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _offer_to_the_memory_killer() -> None:
    try:
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    except OSError as err:
        # Some containers mount /proc read-only: the memory killer then chooses by size alone.
        if err.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise


def _limit(policy: Policy) -> None:
    for what, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, policy.descriptors),
        (resource.RLIMIT_AS, policy.address_space),
        (resource.RLIMIT_DATA, policy.data),
    ):
        _, hard = resource.getrlimit(what)
        wanted = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (wanted, wanted))


def _report(policy: Policy) -> dict[str, Verdict]:
    proofs = {
        "mem_limit": _memory_is_refused(policy.address_space),
        "descriptors": _descriptors() <= {0, 1, 2, *policy.keep},
        "environment": set(os.environ) <= policy.environment,
        "no_core_dump": resource.getrlimit(resource.RLIMIT_CORE) == (0, 0),
        "no_file_growth": resource.getrlimit(resource.RLIMIT_FSIZE) == (0, 0),
        "no_new_privs": _libc.prctl(_PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1,
        "not_dumpable": _libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) == 0,
    }
    found: dict[str, Verdict] = dict.fromkeys(UNCONFINED, "not_enforced")
    return found | {name: "enforced" if holds else "not_enforced" for name, holds in proofs.items()}


def _memory_is_refused(limit: int) -> bool:
    """Map more than the limit, read-only: such pages count against the limit and against no memory."""
    try:
        mmap.mmap(-1, limit + (1 << 20), flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ).close()
    except OSError as err:
        return err.errno == errno.ENOMEM
    return False


def _descriptors() -> set[int]:
    with os.scandir("/proc/self/fd") as entries:
        found = {int(entry.name) for entry in entries}
    # The listing itself used one that is closed by now.
    return {fd for fd in found if _is_open(fd)}


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
