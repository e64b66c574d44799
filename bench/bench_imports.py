"""What it costs to start: importing the package, the client and the node, against an empty interpreter."""

from __future__ import annotations

import resource
import subprocess
import sys
from statistics import median
from typing import Any

_ROUNDS = 7
_TARGETS_MS = {"divault": 150.0, "divault.client": 400.0, "divault.app": None}


def _cpu_ms(code: str) -> float:
    """Median CPU time of an interpreter that runs the code, in ms."""
    taken = []
    for _ in range(_ROUNDS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return median(taken) * 1000


def run() -> list[dict[str, Any]]:
    """Rows of CPU time per import, the empty interpreter's own subtracted."""
    empty = _cpu_ms("pass")
    rows = []
    for module, target in _TARGETS_MS.items():
        figure = _cpu_ms(f"import {module}") - empty
        rows.append(
            {
                "name": f"import {module}",
                "figure": round(figure, 1),
                "unit": "ms of CPU",
                "yardstick": f"an empty interpreter, {empty:.0f} ms",
                "ratio": round(figure / empty, 2),
                "target": f"<= {target:g} ms" if target else "",
                "holds": figure <= target if target else None,
            }
        )
    return rows
