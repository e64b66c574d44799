"""The system calls that a worker may make, as a seccomp filter: an allow-list, everything else fails with EPERM.

No library is needed: the filter is a few hundred instructions of classic BPF, made here. It holds on x86-64; elsewhere
`supported` is False and the level is never claimed. See docs/explanation/sandbox.md for the reason behind each group.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable, Sequence

_AUDIT_ARCH_X86_64 = 0xC000003E
_X32_BIT = 0x40000000
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LD_W_ABS, _JEQ, _JGE, _JGT, _JSET, _RET = 0x20, 0x15, 0x35, 0x25, 0x45, 0x06
_NR, _ARCH, _ARG = 0, 4, 16
"""Offsets in `struct seccomp_data`; arguments have 8 bytes, of which the lower 4 come first."""
_SECCOMP, _SET_MODE_FILTER, _TSYNC = 317, 1, 1

_FILES = (
    "read write open close stat fstat lstat lseek pread64 pwrite64 readv writev preadv pwritev access faccessat"
    " faccessat2 fsync fdatasync truncate ftruncate fallocate getdents getdents64 getcwd chdir fchdir rename"
    " renameat renameat2 mkdir mkdirat rmdir creat link linkat unlink unlinkat symlink symlinkat readlink readlinkat"
    " umask statfs fstatfs fadvise64 openat newfstatat statx copy_file_range close_range dup dup2 dup3"
    " pipe pipe2 eventfd2"
)
"""Landlock decides on paths; there is none that a worker may write."""
_SOCKET = "sendto recvfrom shutdown getsockname getpeername setsockopt getsockopt"
"""For the one inherited socket: there is no call that makes another."""
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
ALLOWED = " ".join((_FILES, _SOCKET, _WAITING, _MEMORY, _THREADS, _TIME, _QUESTIONS)).split()

_FIRST = (
    "read write open close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask"
    " rt_sigreturn ioctl pread64 pwrite64 readv writev access pipe select sched_yield mremap msync mincore madvise"
)
"""The first calls of the kernel's table, numbered from 0."""
_NUMBERS = {name: number for number, name in enumerate(_FIRST.split())} | {
    "dup": 32, "dup2": 33, "pause": 34, "nanosleep": 35, "getitimer": 36, "alarm": 37, "setitimer": 38, "getpid": 39,
    "sendto": 44, "recvfrom": 45, "shutdown": 48, "getsockname": 51, "getpeername": 52, "setsockopt": 54,
    "getsockopt": 55, "clone": 56, "exit": 60, "wait4": 61, "uname": 63, "fcntl": 72, "fsync": 74, "fdatasync": 75,
    "truncate": 76, "ftruncate": 77, "getdents": 78, "getcwd": 79, "chdir": 80, "fchdir": 81, "rename": 82, "mkdir": 83,
    "rmdir": 84, "creat": 85, "link": 86, "unlink": 87, "symlink": 88, "readlink": 89, "umask": 95, "gettimeofday": 96,
    "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107,
    "getegid": 108, "getppid": 110, "getpgrp": 111, "getgroups": 115, "getresuid": 118, "getresgid": 120,
    "getpgid": 121, "getsid": 124, "sigaltstack": 131, "statfs": 137, "fstatfs": 138, "sched_getparam": 143,
    "sched_getscheduler": 145,
    "sched_get_priority_max": 146, "sched_get_priority_min": 147, "mlock": 149, "munlock": 150, "prctl": 157,
    "arch_prctl": 158, "gettid": 186, "futex": 202, "sched_setaffinity": 203, "sched_getaffinity": 204,
    "getdents64": 217, "set_tid_address": 218, "restart_syscall": 219, "fadvise64": 221, "clock_gettime": 228,
    "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233, "tgkill": 234,
    "get_mempolicy": 239, "waitid": 247, "openat": 257, "mkdirat": 258, "newfstatat": 262, "unlinkat": 263,
    "renameat": 264, "linkat": 265, "symlinkat": 266, "readlinkat": 267, "faccessat": 269, "pselect6": 270,
    "ppoll": 271, "set_robust_list": 273, "epoll_pwait": 281, "fallocate": 285, "eventfd2": 290, "epoll_create1": 291,
    "dup3": 292,
    "pipe2": 293, "preadv": 295, "pwritev": 296, "prlimit64": 302, "getcpu": 309, "sched_getattr": 315,
    "renameat2": 316, "getrandom": 318, "membarrier": 324, "copy_file_range": 326, "statx": 332, "rseq": 334,
    "clone3": 435, "close_range": 436, "faccessat2": 439,
}  # fmt: skip
"""Numbers of the calls named above, in the kernel's table for x86-64."""

_CLONE_THREAD = 0x00010000
_CLONE_NEW = 0x7E020080
"""Any flag that makes a namespace."""
_PRCTL = (15, 16, 3, 23, 0x53564D41)
"""PR_SET_NAME, PR_GET_NAME, PR_GET_DUMPABLE, PR_CAPBSET_READ, PR_SET_VMA."""
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5451, 0x5450)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIOCLEX, FIONCLEX."""
_FCNTL = (0, 1, 2, 3, 4, 1030, 1032, 1034)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ, F_GET_SEALS: no owner for signals, no
lease, no lock."""
FILTERED = ("clone", "clone3", "tgkill", "prlimit64", "sched_setaffinity", "prctl", "ioctl", "fcntl")

_Instruction = tuple[int, int, int, int]
_EPERM, _ENOSYS = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS
_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def supported() -> bool:
    """Whether there is a table for this machine."""
    return platform.system() == "Linux" and platform.machine() == "x86_64" and struct.calcsize("P") == 8


def install() -> None:
    """Bind this process, all its threads and whatever they become; needs no_new_privs. Raises OSError."""
    code = program(os.getpid())
    packed = b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
    buffer = ctypes.create_string_buffer(packed, len(packed))
    filled = _Program(len(code), ctypes.cast(buffer, ctypes.c_void_p))
    result = _libc.syscall(_SECCOMP, _SET_MODE_FILTER, _TSYNC, ctypes.byref(filled))
    if result != 0:  # a positive one is the id of a thread that could not follow
        raise OSError(ctypes.get_errno() or errno.EPERM, "seccomp")


def program(pid: int) -> list[_Instruction]:
    """The instructions of the filter for the process of this id: (code, jump if true, jump if false, constant)."""
    code: list[_Instruction] = [
        (_LD_W_ABS, 0, 0, _ARCH),
        (_JEQ, 1, 0, _AUDIT_ARCH_X86_64),
        (_RET, 0, 0, _KILL_PROCESS),
        (_LD_W_ABS, 0, 0, _NR),
        (_JGE, 0, 1, _X32_BIT),
        (_RET, 0, 0, _KILL_PROCESS),
    ]
    code += _call(
        "clone", [_load(0), (_JSET, 2, 0, _CLONE_NEW), (_JSET, 0, 1, _CLONE_THREAD), _ret(_ALLOW), _ret(_EPERM)]
    )
    # glibc falls back to clone, whose flags can be seen here; clone3 keeps them in memory.
    code += _call("clone3", [_ret(_ENOSYS)])
    code += _call("tgkill", _one_of(0, (pid,)))
    code += _call("prlimit64", _one_of(0, (0, pid)))
    code += _call("sched_setaffinity", _one_of(0, (0, pid)))
    code += _call("prctl", _one_of(0, _PRCTL))
    code += _call("ioctl", _one_of(1, _IOCTL))
    code += _call("fcntl", _one_of(1, _FCNTL))
    for first, last in _ranges(_NUMBERS[name] for name in ALLOWED):
        code += [(_JGE, 0, 2, first), (_JGT, 1, 0, last), _ret(_ALLOW)]
    return [*code, _ret(_EPERM)]


def _ret(value: int) -> _Instruction:
    return (_RET, 0, 0, value)


def _load(argument: int) -> _Instruction:
    """The lower half: the kernel takes these arguments as 32 bits."""
    return (_LD_W_ABS, 0, 0, _ARG + 8 * argument)


def _call(name: str, body: Sequence[_Instruction]) -> list[_Instruction]:
    """For this call alone: the body ends with an answer in any case."""
    return [(_JEQ, 0, len(body), _NUMBERS[name]), *body]


def _one_of(argument: int, values: Sequence[int]) -> list[_Instruction]:
    tests = [(_JEQ, len(values) - place, 0, value) for place, value in enumerate(values)]
    return [_load(argument), *tests, _ret(_EPERM), _ret(_ALLOW)]


def _ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs
