"""What a process gives up by plain calls, before the kernel's rules take the rest.

Imports are few on purpose: they are part of every cold load.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from collections.abc import Mapping

_PR_SET_PDEATHSIG, _PR_GET_DUMPABLE, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 3, 4, 38
_CAPABILITY_VERSION_3 = 0x20080522
_SIGKILL = 9
FIRST_USER = 0x7000_0000
"""Above what systemd and container tools hand out, and below 2**31, where some file systems end: see `users`."""
_libc = ctypes.CDLL(None, use_errno=True)


def end_with(parent: int) -> None:
    """Have this process killed when its parent, of this id, ends. Raises OSError when that has happened already."""
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != parent:
        raise OSError(errno.ESRCH, "the parent ended")


def hide() -> None:
    """Nobody but root reads this process' memory or traces it, and no dump of it is written."""
    _prctl(_PR_SET_DUMPABLE, 0)


def hidden() -> bool:
    """Whether that holds."""
    return bool(_libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) == 0)


def gain_nothing() -> None:
    """No program that is run from here on has more rights than this process (no_new_privs)."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities() -> None:
    """All of them, of a process of root too: it keeps reading what root owns, and is nobody's superuser."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    if _libc.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def own_user() -> int:
    """The number of the user that is this process' own."""
    return FIRST_USER + os.getpid()


def become_own_user() -> None:
    """Leave the node's user and all groups, for good. Ends `hide` and `end_with`. Raises OSError."""
    user = own_user()
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def is_own_user() -> bool:
    """Whether that happened."""
    user = own_user()
    return os.getresuid() == os.getresgid() == (user, user, user) and not os.getgroups()


def limit(values: Mapping[int, int]) -> None:
    """Set these rlimits, or lower ones where lower ones are set; nothing raises them again."""
    for what, value in values.items():
        _, hard = resource.getrlimit(what)
        wanted = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (wanted, wanted))


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")
