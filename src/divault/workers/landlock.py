"""What of the file system a process sees, by Landlock: it may read what it is granted, and write nowhere.

Every right that the kernel knows is handled, so whatever is not granted here is refused: also executing, creating,
renaming, truncating, TCP, abstract sockets and signals, as far as the kernel's version (ABI) has them. Rights bind the
calling thread and what it starts, so this is called while there is one. Names, sizes and times of files stay visible.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""How many file rights each ABI has."""
_NET_RIGHTS, _SCOPES = 0b11, 0b11
MIN_ABI = 3
"""The first that controls truncation (Linux 6.2)."""
MACHINE = (
    "/proc/self/fd", "/proc/self/maps", "/proc/self/stat", "/proc/self/statm", "/proc/self/status", "/proc/cpuinfo",
    "/proc/meminfo", "/sys/devices/system/cpu", "/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us",
    "/sys/fs/cgroup/cpu/cpu.cfs_period_us", "/dev/null", "/dev/urandom",
)  # fmt: skip
"""What numerical libraries ask about the machine and their own process; all of /proc/self would show the host's
sockets, mounts and environment."""
_libc = ctypes.CDLL(None, use_errno=True)


def abi() -> int:
    """The kernel's version of Landlock; 0 where there is none."""
    version: int = _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION_FLAG)
    return max(0, version)


def restrict(paths: Iterable[str]) -> None:
    """Leave this thread nothing but reading at and below these paths. Raises OSError."""
    version = abi()
    if not version:
        raise OSError(errno.ENOSYS, "landlock")
    ruleset = _ruleset(version)
    try:
        for path in paths:
            _allow_reading(ruleset, path)
        if _libc.syscall(_RESTRICT_SELF, ruleset, 0) != 0:
            raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    finally:
        os.close(ruleset)


def _ruleset(version: int) -> int:
    files = (1 << _FILE_RIGHTS.get(version, 16)) - 1
    attributes = struct.pack("=QQQ", files, _NET_RIGHTS, _SCOPES)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    ruleset: int = _libc.syscall(_CREATE_RULESET, buffer, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    return ruleset


def _allow_reading(ruleset: int, path: str) -> None:
    """What is not there needs no rule."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        rights = _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0)  # noqa: PTH112  # the plain call: no more imports
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, fd), 12)
        if _libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0) != 0:
            raise OSError(ctypes.get_errno(), f"landlock_add_rule {path}")
    finally:
        os.close(fd)
