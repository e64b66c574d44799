"""Whether workers can have users of their own, so that they share nothing by being the same user; and why not.

A node that runs as root may give each worker a user of its own: number 0x70000000 and the worker's process id, in a
range that no distribution and no container tool hands out. Nobody keeps a list: as long as the process lives, its id,
and so its user, is nobody else's on this machine. It needs:

1. root, with the capabilities to change users and to end processes of others;
2. those numbers in the node's user namespace (rootless containers have fewer);
3. Python, its packages and this program open to every user: `~/.pyenv` of root is not.

A worker in namespaces of its own (`strict`) is nobody there, and the node's user outside of them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from divault.workers.libraries import python_paths
from divault.workers.privileges import FIRST_USER

_KILL, _SETGID, _SETUID = 5, 6, 7
_HIGHEST_PID = 1 << 22
_MAPS = ("uid_map", "gid_map")


class Shared(NamedTuple):
    """Why workers have the user of the node."""

    reason: str
    """`not_root`, `no_capability`, `not_mapped`, `python_unreadable`, `namespaces` or `off`: for everybody."""
    words: str
    """For the operator: may name a folder."""


def why_shared() -> Shared | None:
    """None where each worker can have a user of its own."""
    if os.geteuid() != 0:
        return Shared("not_root", "the node does not run as root")
    effective = int(_field("CapEff"), 16)
    if any(not effective >> capability & 1 for capability in (_KILL, _SETGID, _SETUID)):
        return Shared("no_capability", "the node lacks CAP_KILL, CAP_SETGID or CAP_SETUID")
    if not all(_mapped(Path("/proc/self", name).read_text(encoding="ascii")) for name in _MAPS):
        return Shared("not_mapped", f"the node's user namespace has no users from {FIRST_USER} on")
    closed = closed_to_others(python_paths())
    if closed is not None:
        return Shared("python_unreadable", f"Python's files are closed to other users at {closed}")
    return None


def closed_to_others(paths: Iterable[str]) -> Path | None:
    """The first file or folder, of these, what stands right in them, and what they stand in, that others can't read."""
    for path in map(Path, paths):
        on_the_way = {*path.parents, *path.resolve().parents}
        closed = [folder for folder in sorted(on_the_way) if not folder.stat().st_mode & stat.S_IXOTH]
        within = [path, *(path.iterdir() if path.is_dir() else ())]
        closed += [one for one in within if one.exists() and not _readable(one)]
        if closed:
            return closed[0]
    return None


def _readable(path: Path) -> bool:
    wanted = stat.S_IROTH | (stat.S_IXOTH if path.is_dir() else 0)
    return path.stat().st_mode & wanted == wanted


def _mapped(text: str) -> bool:
    """Whether one line of such a map covers all numbers that workers may get."""
    extents = [[int(part) for part in line.split()] for line in text.splitlines()]
    last = FIRST_USER + _HIGHEST_PID
    return any(first <= FIRST_USER and last < first + count for first, _, count in extents)


def _field(name: str) -> str:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:"))
