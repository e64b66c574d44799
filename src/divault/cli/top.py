"""`divault top`: a node's figures, live in a terminal. It reads `/metrics` and nothing else.

Rates and times are those since the look before; where nothing happened since then, times are since the node's start.

A screen has room for so much: what tells of the whole node stands first, then as many models as there are rows left,
the busiest; columns that have no room are left out, the least telling first. Piped, everything is there.
"""

from __future__ import annotations

import contextlib
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from divault.errors import NotReady
from divault.metrics import STEPS

app = typer.Typer()
_TIMEOUT_S = 5.0
_STARTED = "divault_process_start_time_seconds"
_ENDLESS = 10_000  # columns, where no screen has an end
_GAP = 2  # columns between two columns of a table
_NAME = 20  # columns of a model's name that stay, before anything else is left out for them


@dataclass(frozen=True, slots=True)
class Reading:
    """The samples of one look at a node: values by name and labels."""

    at: float
    samples: Mapping[tuple[str, tuple[tuple[str, str], ...]], float]

    def value(self, name: str, **labels: str) -> float:
        """The sum of all samples of this name that have these labels."""
        return sum(value for (have, tags), value in self.samples.items() if have == name and labels.items() <= {*tags})

    def labels(self, name: str, label: str) -> list[str]:
        """The values that a label has, sorted."""
        found = {dict(tags).get(label, "") for (have, tags) in self.samples if have == name}
        return sorted(found - {""})

    def since(self, before: Reading) -> Reading:
        """What was counted after an earlier look; all of it, where the node was started anew meanwhile."""
        if self.value(_STARTED) != before.value(_STARTED):
            return self
        then = {key: value for key, value in before.samples.items() if _counted(key[0])}
        return Reading(self.at, {key: max(0.0, value - then.get(key, 0.0)) for key, value in self.samples.items()})

    def quantile(self, name: str, share: float, **labels: str) -> float | None:
        """An upper bound for so large a share of a histogram's values; None without any."""
        bounds: dict[float, float] = {}
        for (have, tags), value in self.samples.items():
            told = dict(tags)
            if have == f"{name}_bucket" and labels.items() <= {*tags}:
                bounds[float(told["le"])] = bounds.get(float(told["le"]), 0.0) + value
        total = max(bounds.values(), default=0.0)
        return next((bound for bound in sorted(bounds) if bounds[bound] >= share * total), None) if total else None


@app.command()
def top(
    url: Annotated[str, typer.Argument(help="URL of the node")] = "http://127.0.0.1:8000",
    *,
    once: Annotated[bool, typer.Option("--once", help="print once and end")] = False,
    interval: Annotated[float, typer.Option("--interval", min=0.2, help="seconds between looks")] = 2.0,
) -> None:
    """Show what a node does: its models, queues, steps and refusals. Ends with Ctrl-C.

    Example: divault top http://127.0.0.1:8000
    """
    screen = Console(highlight=False, markup=False, emoji=False)
    if not screen.is_terminal:
        screen.width = _ENDLESS
    if once:
        screen.print(shown(read(url), None, screen.width))
        return
    with contextlib.suppress(KeyboardInterrupt), Live(console=screen, auto_refresh=False) as live:
        _follow(live, url, interval)


def _follow(live: Live, url: str, interval: float) -> None:
    """Look again and again, also while the node is away."""
    before: Reading | None = None
    while True:
        try:
            now = read(url)
        except NotReady as err:
            live.update(_fitting(live.console, before, None, err.detail), refresh=True)
        else:
            live.update(_fitting(live.console, now, before), refresh=True)
            before = now
        time.sleep(interval)


def read(url: str) -> Reading:
    """Look at a node. Raises NotReady where its figures can't be read."""
    where = url.rstrip("/") + "/metrics"
    try:
        with urllib.request.urlopen(where, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - the URL is the operator's
            text = answer.read().decode()
        families = list(text_string_to_metric_families(text))
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as err:
        raise NotReady(
            f"no figures at {where} ({err}): is it a node, and does its DIVAULT_METRICS let you read them?"
        ) from None
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): float(sample.value)
        for family in families
        for sample in family.samples
    }
    return Reading(time.monotonic(), samples)


def shown(now: Reading, before: Reading | None, width: int, rows: int | None = None) -> Group:
    """The tables, at most so wide, and so high if there is a bound; rates are since the look before, or none."""
    head, steps = _head(now, before), _steps(now, before, width)
    refusals, models = _refusals(now, before), _models(now, before)
    if rows is not None:
        left = rows - _lines(Group(head, Text(), steps, Text(), Text()), width) - 2  # two headings
        refusals = refusals.most(max(2, left // 3))
        models = models.most(max(2, left - len(refusals.rows)))
    return Group(head, Text(), steps, Text(), refusals.table(width), Text(), models.table(width))


def _fitting(screen: Console, now: Reading | None, before: Reading | None, error: str = "") -> Group:
    """What there is to see on this screen, whatever its size is now; the error first."""
    told = [Text(error, style="bold")] if error else []
    if now is None:
        return Group(*told)
    rows = screen.height - sum(_lines(part, screen.width) for part in told) if screen.is_terminal else None
    return Group(*told, shown(now, before, screen.width, rows))


def _lines(part: Group | Text, width: int) -> int:
    screen = Console(width=width, emoji=False)
    return len(screen.render_lines(part, pad=False))


@dataclass(frozen=True, slots=True)
class _Rows:
    """A table's texts, before it is known how much room they have."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    spare: tuple[str, ...] = ()
    """Columns that may be left out, in that order."""
    busy: Callable[[tuple[str, ...]], Any] = lambda row: row
    """What sorts the most telling rows first."""

    def most(self, count: int) -> _Rows:
        """At most so many rows: all of them as they are, or the most telling ones and how many more there are."""
        if len(self.rows) <= count:
            return self
        kept = sorted(self.rows, key=self.busy)[: count - 1]
        more = (f"+{len(self.rows) - len(kept)} more", *("" for _ in self.columns[1:]))
        return replace(self, rows=[*kept, more])

    def table(self, width: int) -> Table:
        """As wide as the texts are; names that are longer than that leaves are cut."""
        needs = {name: max(len(name), *(len(row[at]) for row in self.rows), 0) for at, name in enumerate(self.columns)}
        needs[self.columns[0]] = min(needs[self.columns[0]], _NAME)
        for spare in self.spare:
            if sum(needs.values()) + _GAP * (len(needs) - 1) > width:
                del needs[spare]
        others = sum(need + _GAP for name, need in needs.items() if name != self.columns[0])
        table = Table(box=None, pad_edge=False)
        table.add_column(self.columns[0], no_wrap=True, max_width=max(1, width - others))
        for name in list(needs)[1:]:
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*(Text(row[self.columns.index(name)]) for name in needs))
        return table


def _head(now: Reading, before: Reading | None) -> Text:
    rate = _rate(now, before, "divault_requests_total")
    parts = [
        f"requests {now.value('divault_requests_total'):.0f}" + (f" ({rate:.1f}/s)" if rate is not None else ""),
        f"answers {now.value('divault_receipts_total', status='ok'):.0f}",
        f"block {now.value('divault_chain_head_block'):.0f}, {now.value('divault_chain_head_age_seconds'):.0f} s old",
        f"cache {now.value('divault_cache_bytes') / 1e6:.1f} MB in {now.value('divault_cache_entries'):.0f}",
        f"reserved {now.value('divault_runs_reserved'):.0f}",
        f"gateway {now.value('divault_process_resident_memory_bytes') / 1e6:.0f} MB",
    ]
    return Text("  |  ".join(parts))


def _models(now: Reading, before: Reading | None) -> _Rows:
    rows = []
    for model in now.labels("divault_model_up", "model"):
        passes = now.value("divault_model_pass_callers_count", model=model)
        callers = now.value("divault_model_pass_callers_sum", model=model)
        rate = _rate(now, before, "divault_model_pass_callers_sum", model=model)
        rows.append(
            (
                model,
                "ready" if now.value("divault_model_up", model=model) else "down",
                f"{now.value('divault_model_waiting', model=model):.0f}",
                f"{now.value('divault_model_oldest_seconds', model=model):.2f}",
                f"{callers / passes:.1f}" if passes else "",
                _per_second(rate),
                f"{now.value('divault_model_restarts_total', model=model):.0f}",
                f"{now.value('divault_model_memory_bytes', model=model) / 1e6:.0f}",
            )
        )
    return _Rows(
        ("model", "state", "waiting", "oldest s", "callers/pass", "calls/s", "restarts", "MB"),
        rows,
        spare=("callers/pass", "MB", "restarts", "oldest s", "calls/s"),
        busy=lambda row: (row[1] == "ready", -float(row[2]), -float(row[5] or 0), row[0]),
    )


def _steps(now: Reading, before: Reading | None, width: int) -> Table:
    lately = now if before is None else now.since(before)
    rows = []
    for step in STEPS:
        count = now.value("divault_step_seconds_count", step=step)
        if count:
            of = lately if lately.value("divault_step_seconds_count", step=step) else now
            told = (of.quantile("divault_step_seconds", share, step=step) for share in (0.5, 0.99))
            rate = _rate(now, before, "divault_step_seconds_count", step=step)
            rows.append((step, f"{count:.0f}", _per_second(rate), *(_milliseconds(bound) for bound in told)))
    return _Rows(("step", "count", "/s", "half within", "99 % within"), rows, spare=("/s", "count")).table(width)


def _refusals(now: Reading, before: Reading | None) -> _Rows:
    rows = []
    for code in now.labels("divault_refusals_total", "code"):
        count = now.value("divault_refusals_total", code=code)
        if count:
            rows.append((code, f"{count:.0f}", _per_second(_rate(now, before, "divault_refusals_total", code=code))))
    return _Rows(("refused", "count", "/s"), rows, busy=lambda row: (-float(row[2] or 0), -float(row[1]), row[0]))


def _counted(name: str) -> bool:
    """Whether it only grows."""
    return name.startswith("divault_") and name.endswith(("_total", "_count", "_sum", "_bucket"))


def _rate(now: Reading, before: Reading | None, name: str, **labels: str) -> float | None:
    if before is None or now.at <= before.at:
        return None
    return max(0.0, now.value(name, **labels) - before.value(name, **labels)) / (now.at - before.at)


def _per_second(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.1f}"


def _milliseconds(bound: float | None) -> str:
    return "" if bound is None else f"{bound * 1e3:g} ms" if bound != float("inf") else "longer"
