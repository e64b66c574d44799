"""What commands print: results on stdout, everything about the work on stderr; progress only on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from divault.errors import DivaultError

out = Console(soft_wrap=True, highlight=False, emoji=False)  # the name `wine:100:q4` has no picture in it
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)

Advance = Callable[[int, int | None], None]
"""Tells how far the work is: bytes done, and bytes in all once known."""


@contextmanager
def progress(title: str) -> Iterator[Advance]:
    """Show bytes, rate and time left on a terminal while the context lasts; nothing when piped."""
    if not err.is_terminal:
        yield _silent
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bars:
        task = bars.add_task(title, total=None)

        def advance(done: int, total: int | None) -> None:
            bars.update(task, completed=done, total=total)

        yield advance


def _silent(done: int, total: int | None) -> None:
    """Say nothing."""


def say(text: str) -> None:
    """Print a line for people (stderr), so that stdout stays the result alone."""
    err.print(text)


def show(value: Any) -> None:
    """Print a result (stdout): text as it is, anything else as JSON."""
    print(value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False))


def fail(error: DivaultError) -> None:
    """Print a typed error: what went wrong, its code, and the data that says what is needed."""
    print(f"error: {error.detail}", file=sys.stderr)
    documents = ("typed_data", "send", "accepts", "resource")  # for programs, and pages long
    facts = {k: v for k, v in error.data.items() if v is not None and k not in documents}
    rest = " ".join(f"{name}={value}" for name, value in facts.items())
    print(f"  code: {error.code}" + (f"  {rest}" if rest else ""), file=sys.stderr)
    for note in getattr(error, "__notes__", []):
        print(f"  {note}", file=sys.stderr)
