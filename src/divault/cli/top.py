"""`divault top`: a node's figures, live in a terminal. It reads `/metrics` and nothing else.

Rates and times are those since the look before; where nothing happened since then, times are since the node's start.
"""

from __future__ import annotations

import contextlib
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from divault.cli.console import out
from divault.errors import NotReady

app = typer.Typer()
_TIMEOUT_S = 5.0
_STARTED = "divault_process_start_time_seconds"
_STEPS = ("authenticate", "known", "gate", "hold", "open", "run", "charge")


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
    first = read(url)
    if once:
        out.print(shown(first, None))
        return
    with contextlib.suppress(KeyboardInterrupt), Live(shown(first, None), console=out, auto_refresh=False) as live:
        live.refresh()
        _follow(live, url, first, interval)


def _follow(live: Live, url: str, before: Reading, interval: float) -> None:
    """Look again and again, also when the node is away for a while."""
    while True:
        time.sleep(interval)
        try:
            now = read(url)
        except NotReady as err:
            live.update(Group(shown(before, None), Text(), Text(err.detail, style="bold")), refresh=True)
            continue
        live.update(shown(now, before), refresh=True)
        before = now


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


def shown(now: Reading, before: Reading | None) -> Group:
    """The tables; rates are since the look before, or none."""
    head, *tables = (part(now, before) for part in (_head, _models, _steps, _refusals))
    return Group(head, *(part for table in tables for part in (Text(), table)))


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


def _models(now: Reading, before: Reading | None) -> Table:
    table = _table("model", "state", "waiting", "oldest s", "callers/pass", "calls/s", "restarts", "MB")
    for model in now.labels("divault_model_up", "model"):
        passes = now.value("divault_model_pass_callers_count", model=model)
        callers = now.value("divault_model_pass_callers_sum", model=model)
        rate = _rate(now, before, "divault_model_pass_callers_sum", model=model)
        table.add_row(
            model,
            "ready" if now.value("divault_model_up", model=model) else "down",
            f"{now.value('divault_model_waiting', model=model):.0f}",
            f"{now.value('divault_model_oldest_seconds', model=model):.2f}",
            f"{callers / passes:.1f}" if passes else "",
            _per_second(rate),
            f"{now.value('divault_model_restarts_total', model=model):.0f}",
            f"{now.value('divault_model_memory_bytes', model=model) / 1e6:.0f}",
        )
    return table


def _steps(now: Reading, before: Reading | None) -> Table:
    table = _table("step", "count", "/s", "half within", "99 % within")
    lately = now if before is None else now.since(before)
    for step in _STEPS:
        count = now.value("divault_step_seconds_count", step=step)
        if count:
            of = lately if lately.value("divault_step_seconds_count", step=step) else now
            told = (of.quantile("divault_step_seconds", share, step=step) for share in (0.5, 0.99))
            rate = _rate(now, before, "divault_step_seconds_count", step=step)
            table.add_row(step, f"{count:.0f}", _per_second(rate), *(_milliseconds(bound) for bound in told))
    return table


def _refusals(now: Reading, before: Reading | None) -> Table:
    table = _table("refused", "count", "/s")
    for code in now.labels("divault_refusals_total", "code"):
        count = now.value("divault_refusals_total", code=code)
        if count:
            table.add_row(code, f"{count:.0f}", _per_second(_rate(now, before, "divault_refusals_total", code=code)))
    return table


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


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right")
    return table
