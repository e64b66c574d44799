"""The system calls that a process may make, as a seccomp filter: an allow-list, everything else fails with EPERM.

| rules | for |
|---|---|
| `WORKER` | a process that holds a model: computes, reads libraries, answers on the socket that it inherited |
| `OPENER` | the process that opens a sealed file: reads and writes descriptors, makes memory files, opens no path |

No library is needed: the filter is a few hundred instructions of classic BPF, made here. Where there is no table for
the machine, `supported` is False and the level is never claimed. See docs/explanation/sandbox.md for the reason behind
each group.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from divault.workers.syscalls import Table, table_here

_X32_BIT = 0x40000000
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LD_W_ABS, _JEQ, _JGE, _JGT, _JSET, _RET = 0x20, 0x15, 0x35, 0x25, 0x45, 0x06
_NR, _ARCH, _ARG = 0, 4, 16
"""Offsets in `struct seccomp_data`; arguments have 8 bytes, of which the lower 4 come first."""
_SET_MODE_FILTER, _TSYNC, _GET_ACTION_AVAIL = 1, 1, 2

_FILES = (
    "read write open close stat fstat lstat lseek pread64 pwrite64 readv writev preadv pwritev access faccessat"
    " faccessat2 fsync fdatasync truncate ftruncate fallocate getdents getdents64 getcwd chdir fchdir rename"
    " renameat renameat2 mkdir mkdirat rmdir creat link linkat unlink unlinkat symlink symlinkat readlink readlinkat"
    " umask statfs fstatfs fadvise64 openat newfstatat statx copy_file_range close_range dup dup2 dup3"
    " pipe pipe2 eventfd2"
)
"""Landlock decides on paths; there is none that a worker may write."""
_SOCKET = "shutdown getsockname getpeername"
"""For the one inherited socket: there is no call that makes another, and none that gives it a program (setsockopt)."""
_WAITING = "poll ppoll select pselect6 epoll_create1 epoll_ctl epoll_wait epoll_pwait"
_MEMORY = "mmap mprotect munmap brk mremap msync mincore madvise mlock munlock get_mempolicy membarrier"
_THREADS = (
    "futex set_robust_list set_tid_address rseq arch_prctl gettid sched_yield sched_getparam sched_getscheduler"
    " sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr getcpu rt_sigaction rt_sigprocmask"
    " rt_sigreturn sigaltstack restart_syscall pause exit exit_group wait4 waitid"
)
_TIME = "nanosleep clock_nanosleep getitimer setitimer alarm gettimeofday times clock_gettime clock_getres getrandom"
_QUESTIONS = (
    "getpid getppid getpgrp getpgid getsid getuid getgid geteuid getegid getgroups getresuid getresgid getrlimit"
    " getrusage sysinfo uname"
)
_OPENING = (
    "read write close fstat lseek pread64 preadv preadv2 fallocate memfd_create sendmsg mmap mprotect munmap brk mremap"
    " madvise futex set_robust_list set_tid_address rseq gettid getpid sched_yield sched_getaffinity rt_sigaction"
    " rt_sigprocmask rt_sigreturn sigaltstack restart_syscall exit exit_group clock_gettime clock_nanosleep getrandom"
    " getppid"
)
"""No call that takes a path: what is read and written was open before, or is a memory file."""

_CLONE_THREAD = 0x00010000
_CLONE_NEW = 0x7E020080
"""Any flag that makes a namespace."""
_PRCTL = (15, 16, 3, 23, 0x53564D41)
"""PR_SET_NAME, PR_GET_NAME, PR_GET_DUMPABLE, PR_CAPBSET_READ, PR_SET_VMA."""
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5451, 0x5450)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIOCLEX, FIONCLEX."""
_FCNTL_OF_OPENING = (1, 2, 3, 1033, 1034)
"""F_GETFD, F_SETFD, F_GETFL, F_ADD_SEALS, F_GET_SEALS."""
_SOL_SOCKET, _SOCKET_FACTS = 1, (3, 4, 38, 39)
"""SO_TYPE, SO_ERROR, SO_PROTOCOL, SO_DOMAIN: not SO_PEERPIDFD, which makes a descriptor of the gateway's process."""
_MSG_OOB = 1
"""Out-of-band data: nobody sends any, and the code for it was a way into the kernel (CVE-2025-38236)."""
_FCNTL = (0, 1, 2, 3, 4, 1030, 1032, 1034)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ, F_GET_SEALS: no owner for signals, no
lease, no lock."""
_Instruction = tuple[int, int, int, int]
_EPERM, _ENOSYS = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS
_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def supported() -> bool:
    """Whether there is a table for this machine, and a kernel that knows such filters."""
    table = table_here()
    if table is None:
        return False
    action = ctypes.c_uint32(_ERRNO)
    return bool(_libc.syscall(table.numbers["seccomp"], _GET_ACTION_AVAIL, 0, ctypes.byref(action)) == 0)


def install(rules: Rules) -> None:
    """Bind this process, all its threads and whatever they become; needs no_new_privs. Raises OSError."""
    table = table_here()
    if table is None:
        raise OSError(errno.ENOSYS, "seccomp")
    code = program(os.getpid(), rules, table)
    packed = b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
    buffer = ctypes.create_string_buffer(packed, len(packed))
    filled = _Program(len(code), ctypes.cast(buffer, ctypes.c_void_p))
    result = _libc.syscall(table.numbers["seccomp"], _SET_MODE_FILTER, _TSYNC, ctypes.byref(filled))
    if result != 0:  # a positive one is the id of a thread that could not follow
        raise OSError(ctypes.get_errno() or errno.EPERM, "seccomp")


def allowed_here(rules: Rules) -> int:
    """How many calls of this machine's table are allowed as they are; 0 where there is none."""
    table = table_here()
    return sum(name in table.numbers for name in rules.allowed) if table is not None else 0


def program(pid: int, rules: Rules, table: Table) -> list[_Instruction]:
    """The instructions of the filter for the process of this id: (code, jump if true, jump if false, constant)."""
    code: list[_Instruction] = [
        (_LD_W_ABS, 0, 0, _ARCH),
        (_JEQ, 1, 0, table.arch),
        (_RET, 0, 0, _KILL_PROCESS),
        (_LD_W_ABS, 0, 0, _NR),
        # Also x86-64's second set of numbers (x32), which would pass a list of the first.
        (_JGE, 0, 1, _X32_BIT),
        (_RET, 0, 0, _KILL_PROCESS),
    ]
    for name, body in rules.filtered.items():
        instructions = body(pid)
        # For this call alone: the body ends with an answer in any case.
        code += [(_JEQ, 0, len(instructions), table.numbers[name]), *instructions]
    for first, last in _ranges(table.numbers[name] for name in rules.allowed if name in table.numbers):
        code += [(_JGE, 0, 2, first), (_JGT, 1, 0, last), _ret(_ALLOW)]
    return [*code, _ret(_EPERM)]


def _ret(value: int) -> _Instruction:
    return (_RET, 0, 0, value)


def _load(argument: int) -> _Instruction:
    """The lower half: the kernel takes these arguments as 32 bits."""
    return (_LD_W_ABS, 0, 0, _ARG + 8 * argument)


def _one_of(argument: int, values: Sequence[int]) -> list[_Instruction]:
    tests = [(_JEQ, len(values) - place, 0, value) for place, value in enumerate(values)]
    return [_load(argument), *tests, _ret(_EPERM), _ret(_ALLOW)]


def _threads(_pid: int) -> list[_Instruction]:
    """clone: threads of this process, never another process or a namespace."""
    return [_load(0), (_JSET, 2, 0, _CLONE_NEW), (_JSET, 0, 1, _CLONE_THREAD), _ret(_ALLOW), _ret(_EPERM)]


def _nothing_there(_pid: int) -> list[_Instruction]:
    """clone3: glibc falls back to clone, whose flags can be seen here; this one keeps them in memory."""
    return [_ret(_ENOSYS)]


def _itself(pid: int, *, zero: bool) -> list[_Instruction]:
    """A first argument that is this process, or 0 where that means the same."""
    return _one_of(0, (0, pid) if zero else (pid,))


def _in_band(_pid: int) -> list[_Instruction]:
    return [_load(3), (_JSET, 0, 1, _MSG_OOB), _ret(_EPERM), _ret(_ALLOW)]


def _facts_of_a_socket(_pid: int) -> list[_Instruction]:
    return [_load(1), (_JEQ, 1, 0, _SOL_SOCKET), _ret(_EPERM), *_one_of(2, _SOCKET_FACTS)]


def _only(argument: int, values: Sequence[int], _pid: int) -> list[_Instruction]:
    return _one_of(argument, values)


def _ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


_Body = Callable[[int], list[_Instruction]]
"""What decides about one call, given the id of the process."""


class Rules(NamedTuple):
    """Calls that may be made, and those that may be made in part."""

    allowed: tuple[str, ...]
    filtered: Mapping[str, _Body]


_IN_EITHER: dict[str, _Body] = {
    "clone": _threads,
    "clone3": _nothing_there,
    "prlimit64": partial(_itself, zero=True),
    "recvfrom": _in_band,
}
WORKER = Rules(
    tuple(" ".join((_FILES, _SOCKET, _WAITING, _MEMORY, _THREADS, _TIME, _QUESTIONS)).split()),
    {
        **_IN_EITHER,
        "sendto": _in_band,
        "getsockopt": _facts_of_a_socket,
        "tgkill": partial(_itself, zero=False),
        "sched_setaffinity": partial(_itself, zero=True),
        "prctl": partial(_only, 0, _PRCTL),
        "ioctl": partial(_only, 1, _IOCTL),
        "fcntl": partial(_only, 1, _FCNTL),
    },
)
OPENER = Rules(tuple(_OPENING.split()), {**_IN_EITHER, "fcntl": partial(_only, 1, _FCNTL_OF_OPENING)})
