"""What a worker gives up before it touches a byte of a model, and the proof of each part.

| level | what holds |
|---|---|
| `strict` | all of `standard` inside namespaces of its own (bubblewrap): no other process, network or file is there |
| `standard` | no new privileges, limits, Landlock (reads libraries, writes nowhere), seccomp (an allow-list of calls) |
| `partial` | what is left where a check of `standard` was not seen to hold; can't be asked for |
| `off` | a process of its own, deadlines and typed frames; nothing is confined |

`confine(policy)` is called once, in the worker, while it has one thread. A step that fails ends the worker. Then every
forbidden act is *tried*: a check is `enforced` only when the kernel refused the act, never because it failed otherwise.
The level of a worker is the highest whose every check is enforced; nobody claims more.

Descriptors bypass every later rule, so they are closed first; the death signal and the group make sure that nothing
outlives the node, and the kernel forgets the signal when the user changes, so it is asked for again; dumpable 0 keeps
siblings of one user from reading this memory, and it gives /proc/self to root, hence after the last write there.
"""

from __future__ import annotations

import _thread
import errno
import mmap
import os
import resource
import signal
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from divault.workers import landlock, privileges, seccomp
from divault.workers.libraries import library_paths
from divault.workers.selfcheck import FORBIDDEN, SEPARATE, Verdict, attempt_all

Level = Literal["strict", "standard", "off"]
"""What may be asked for."""
LEVELS = ("off", "partial", "standard", "strict")
"""From the weakest."""
OWN = ("descriptors", "environment", "no_core_dump", "no_file_growth", "no_new_privs", "not_dumpable", "no_capability")
"""What a worker sees of itself, beside what it was refused."""
STANDARD = (*FORBIDDEN, "mem_limit", *OWN)
"""Checks of the level `standard`."""
CHECKS = (*STANDARD, *SEPARATE, "proc_limit", "own_user")
"""All that is told. No level needs a user of its own: who does not run as root can't give one."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What this worker may keep."""

    level: Level
    keep: tuple[int, ...]
    """Descriptors beside 0, 1 and 2."""
    environment: frozenset[str]
    """Names that may stand in the environment."""
    address_space: int
    """RLIMIT_AS in bytes: everything mapped, libraries and the model's file included."""
    data: int
    """RLIMIT_DATA in bytes: private writable memory."""
    canary: str = ""
    """A file that the node made and everybody may read: a worker that can has no Landlock."""
    namespaces: Mapping[str, str] = field(default_factory=dict)
    """The node's own, as `/proc/self/ns` names them: a worker in others has its own."""
    descriptors: int = 256
    """RLIMIT_NOFILE: bounds descriptor bombs; libraries need some dozens."""
    processes: int = 64
    """RLIMIT_NPROC at `strict` and for a user of its own: threads count."""
    own_user: bool = False
    """Leave the node's user for one of its own; `users` says where that can be."""
    leave_out: frozenset[str] = frozenset()
    """Mechanisms that tests leave out, to see that the report tells: `landlock`, `seccomp`, `limits`."""


def confine(policy: Policy) -> dict[str, Verdict]:
    """Give up what the policy doesn't leave, in the only order that works; what was seen to hold, by name.

    Raises OSError when a step fails: the worker must end then.
    """
    parent = os.getppid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    privileges.end_with(parent)
    _close_all_but(policy.keep)
    for name in set(os.environ) - policy.environment:
        del os.environ[name]
    # Nothing is writable later on; libraries that ask for a folder must not go and try some.
    tempfile.tempdir = "/nonexistent"
    os.umask(0o077)
    if policy.level != "off":
        _give_up(policy, parent)
    return _report(policy)


def level_of(checks: Mapping[str, str], asked: Level) -> str:
    """The highest level whose every check was seen to hold, and no more than was asked for."""
    if asked == "off":
        return "off"
    if missing_for("standard", checks):
        return "partial"
    return "strict" if asked == "strict" and not missing_for("strict", checks) else "standard"


def missing_for(level: str, checks: Mapping[str, str]) -> list[str]:
    """Names of the checks that keep this level from being reached."""
    return [name for name in needed_for(level) if checks.get(name) != "enforced"]


def needed_for(level: str) -> tuple[str, ...]:
    """Names of the checks that make this level.

    The kernel holds root to no limit on threads, and a worker of a node of root is root outside of its namespaces.
    """
    if level == "strict":
        return (*STANDARD, *SEPARATE, *(("proc_limit",) if os.geteuid() != 0 else ()))
    return STANDARD if level == "standard" else ()


def _give_up(policy: Policy, parent: int) -> None:
    _offer_to_the_memory_killer()
    if policy.own_user:
        privileges.become_own_user()
        privileges.end_with(parent)
    privileges.hide()
    if "limits" not in policy.leave_out:
        privileges.limit(_limits(policy))
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208  # names alone
    if threads != 1:
        raise OSError(errno.EBUSY, f"{threads} threads: rules would bind one of them")
    privileges.gain_nothing()
    privileges.drop_capabilities()
    if landlock.abi() >= landlock.MIN_ABI and "landlock" not in policy.leave_out:
        landlock.restrict((*library_paths(), *landlock.MACHINE))
    if seccomp.supported() and "seccomp" not in policy.leave_out:
        seccomp.install(seccomp.WORKER)


def _close_all_but(keep: tuple[int, ...]) -> None:
    start = 3
    for fd in sorted(keep):
        os.closerange(start, fd)
        start = fd + 1
    os.closerange(start, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _offer_to_the_memory_killer() -> None:
    try:
        Path("/proc/self/oom_score_adj").write_bytes(b"1000")
    except OSError as err:
        # Some containers mount /proc read-only: the memory killer then chooses by size alone.
        if err.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise


def _limits(policy: Policy) -> dict[int, int]:
    found = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: policy.descriptors,
        resource.RLIMIT_AS: policy.address_space,
        resource.RLIMIT_DATA: policy.data,
    }
    return found | ({resource.RLIMIT_NPROC: policy.processes} if _counted_alone(policy) else {})


def _counted_alone(policy: Policy) -> bool:
    """Whether processes of this worker's user are its own: threads of others would count otherwise."""
    return policy.level == "strict" or policy.own_user


def _report(policy: Policy) -> dict[str, Verdict]:
    if policy.level == "off":
        return dict.fromkeys(CHECKS, "not_enforced")
    found: dict[str, Verdict] = {}
    own = {
        "mem_limit": _memory_is_refused(policy.address_space),
        "descriptors": _descriptors() <= {0, 1, 2, *policy.keep},
        "environment": set(os.environ) <= policy.environment,
        "no_core_dump": resource.getrlimit(resource.RLIMIT_CORE) == (0, 0),
        "no_file_growth": resource.getrlimit(resource.RLIMIT_FSIZE) == (0, 0),
        "no_new_privs": _field("NoNewPrivs") == "1",
        "not_dumpable": privileges.hidden(),
        "no_capability": int(_field("CapEff"), 16) == int(_field("CapPrm"), 16) == 0,
        "own_user": policy.own_user and privileges.is_own_user(),
        "proc_limit": _counted_alone(policy) and _thread_is_refused(),
    }
    for name, holds in own.items():
        found[name] = "enforced" if holds else "not_enforced"
    return found | attempt_all(policy.canary, policy.namespaces)


def _field(name: str) -> str:
    """Of this process' status; the calls that ask the same are not among those allowed."""
    for line in Path("/proc/self/status").read_bytes().splitlines():
        key, _, value = line.partition(b":")
        if key == name.encode():
            return value.strip().decode()
    return "-1"


def _memory_is_refused(limit: int) -> bool:
    """Map more than the limit, read-only: such pages count against the limit and against no memory."""
    try:
        mmap.mmap(-1, limit + (1 << 20), flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ).close()
    except OSError as err:
        return err.errno == errno.ENOMEM
    return False


def _thread_is_refused() -> bool:
    """Start a thread where it is one too many, and one where it is not: other reasons than the limit prove nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, hard))
    refused = not _thread_starts()
    resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
    return refused and _thread_starts()


def _thread_starts() -> bool:
    try:
        _thread.start_new_thread(int, ())
    except RuntimeError:
        return False
    return True


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
