"""How much memory a process and its children take, as the kernel counts it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")


def memory_of(pid: int, but: Collection[int] = ()) -> int:
    """Bytes: each page shared with others counted in parts (PSS), or resident pages where that may not be read.

    A worker in namespaces of its own is the child of what made them, so children count too, without those that are
    in `but`. 0 for one that is gone.
    """
    return sum(_own(one) for one in _tree(pid) if one not in but)


def _own(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    return 0


def _tree(pid: int) -> list[int]:
    found = [pid]
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text(encoding="ascii").split():
                found += _tree(int(child))
    return found
