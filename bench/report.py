"""Rows of figures: what a benchmark returns, what is written to disk and how it is shown.

A row has `name`, `figure`, `unit`, `yardstick` (what it is measured against, in words), `ratio` (figure to yardstick,
or null), `target` (in words), `holds` (is the target met; null where there is none) and, once collected, `machine`.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

FIELDS = ("name", "figure", "unit", "yardstick", "ratio", "target", "holds", "machine")
_PAGE = """\
# Benchmarks

<!-- Written by `python -m bench --write-docs`. -->

`make bench` runs them all, `make bench ONLY="word ..."` those whose names contain one of the words; the rows land in
`bench/results/latest.json`. Each benchmark runs in a process of its own. Ratios are taken within one run; CPU time is
the figure to trust, wall time depends on what else the machine does.

Measured on: {cpu}, {cores} cores, {memory_gib} GiB, Linux {kernel}, Python {python}.

| benchmark | figure | against | ratio | target | met |
|---|---|---|---|---|---|"""
_TEXT = ("name", "unit", "yardstick", "target")


def machine() -> dict[str, Any]:
    """What the figures depend on: processor model, cores this process may use, memory, kernel, Python."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "arch": platform.machine(),
    }


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def check_row(row: Row) -> Row:
    """The row itself, when it has every field with its type. Raises ValueError naming what is wrong."""
    missing = [name for name in FIELDS if name != "machine" and name not in row]
    unknown = sorted(set(row) - set(FIELDS))
    if missing or unknown:
        raise ValueError(f"row {row.get('name')!r}: missing {missing}, unknown {unknown}")
    for name in _TEXT:
        if not isinstance(row[name], str) and not (row[name] is None and name in ("yardstick", "target")):
            raise ValueError(f"row {row['name']!r}: {name} is text")
    for name in ("figure", "ratio"):
        value = row[name]
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number and not (value is None and name == "ratio"):
            raise ValueError(f"row {row['name']!r}: {name} is a finite number")
    if row["holds"] not in (True, False, None):
        raise ValueError(f"row {row['name']!r}: holds is true, false or null")
    return row


def save(rows: list[Row], path: Path) -> None:
    """Write the rows as a JSON list, by rename, so that a reader sees the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def table(rows: Iterable[Row]) -> str:
    """The rows in columns for a terminal, missed targets marked."""
    cells = [_cells(row) for row in rows]
    head = ("benchmark", "figure", "", "against", "ratio", "target", "")
    widths = [max(len(line[i]) for line in (head, *cells)) for i in range(len(head))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in (head, *cells)]
    return "\n".join(line.rstrip() for line in lines)


def markdown(rows: list[Row]) -> str:
    """Text of docs/reference/benchmarks.md."""
    box = rows[0]["machine"] if rows else machine()
    lines = [_PAGE.format(**box)]
    for row in rows:
        name, figure, unit, yardstick, ratio, target, _ = (cell.replace("|", "\\|") for cell in _cells(row))
        met = {True: "yes", False: "**no**", None: ""}[row["holds"]]
        lines.append(f"| {name} | {figure} {unit} | {yardstick} | {ratio} | {target} | {met} |")
    return "\n".join(lines) + "\n"


def verdict(rows: Iterable[Row]) -> str:
    """One line that says how many targets hold, and names those that don't."""
    judged = [row for row in rows if row["holds"] is not None]
    missed = [row["name"] for row in judged if not row["holds"]]
    return f"{len(judged) - len(missed)} of {len(judged)} targets met" + (
        f"; missed: {', '.join(missed)}" if missed else ""
    )


def _cells(row: Row) -> tuple[str, ...]:
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    mark = {True: "ok", False: "MISSED", None: ""}[row["holds"]]
    return row["name"], number(row["figure"]), row["unit"], row["yardstick"] or "", ratio, row["target"] or "", mark


def number(value: float) -> str:
    """Three significant digits, thousands grouped."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def warn(text: str) -> None:
    """A line on standard error, where a table on standard output stays clean."""
    print(text, file=sys.stderr, flush=True)
