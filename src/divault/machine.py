"""What this process may use of its machine: cores and memory, by the machine and by its control groups.

A container is often given CPU time and memory instead of a machine: it sees all cores, is stopped for the rest of a
period when its threads have used the quota up, and is killed when it takes more memory than its share. Read as
cgroups(7) and the kernel's cgroup-v2.rst, cgroup-v1/memory.rst and sched-bwc.rst say, in both versions, and in each
group that the process's own one lies in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/")


def cores(root: Path = _ROOT) -> int:
    """Whole cores, at least 1. `root` is where /proc and /sys lie."""
    quotas = [quota for folder in _groups("cpu", root) if (quota := _quota(folder)) is not None]
    return max(1, int(min([len(os.sched_getaffinity(0)), *quotas])))


def memory_bytes(root: Path = _ROOT) -> int:
    """Bytes of memory. `root` is where /proc and /sys lie."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    names = ("memory.max", "memory.limit_in_bytes")
    told = [_text(folder / name).strip() for folder in _groups("memory", root) for name in names]
    return min([whole, *(int(text) for text in told if text.isdecimal())])


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the process's groups that may bound what this controller counts, each with all that it lies in."""
    mounted = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").split("\n"):
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if not colon or (controllers and controller not in controllers.split(",")):
            continue
        # Those of version 1 are mounted by the names of several, in any order, with a link for each.
        for base in {mounted / controllers, mounted / controller if controllers else mounted}:
            # A container has its own group mounted there, whatever its path is outside.
            inside = PurePosixPath(path.lstrip("/"))
            yield from (base / part for part in (inside, *inside.parents))


def _quota(folder: Path) -> float | None:
    """Cores that the group's threads may use on average, or None where it bounds them by nothing."""
    quota, _, period = _text(folder / "cpu.max").strip().partition(" ")
    if not quota:
        quota, period = (_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    bounded = quota.isdecimal() and period.isdecimal() and int(period) > 0  # "max", and -1, are no bound
    return int(quota) / int(period) if bounded else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except (OSError, ValueError):  # no such group or kind of groups, or not to be read: nothing is known to bound us
        return ""
