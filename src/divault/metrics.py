"""What a node counts, and how it is read: Prometheus text from a registry of its own.

Rules:

1. Labels come from fixed lists (routes, steps, codes, statuses) or are model ids that are loaded: never a wallet, an
   address, a key or anything that a caller writes.
2. Counting costs a call a few microseconds (`bench/bench_metrics.py`): plain integers here, made into Prometheus' form
   when somebody reads.
3. What others know (queues, the cache, the chain's head) is asked of them when somebody reads.
4. What can be known in advance begins at 0: a series that appears with its first event hides that event from `rate`.

| name | type | labels | |
|---|---|---|---|
| `divault_requests_total` | counter | `route`, `method`, `status` | HTTP requests answered |
| `divault_request_seconds` | histogram | `route` | from the first byte of a request to the last of its answer |
| `divault_refusals_total` | counter | `code` | errors told to callers, by their code |
| `divault_step_seconds` | histogram | `step` | steps of a call: authenticate, known, gate, hold, open, run, charge |
| `divault_load_seconds` | histogram | `outcome` | loads, fetch to worker: `ok`, an error's code, or `abandoned` |
| `divault_receipts_total` | counter | `status` | receipts issued: ok, partial, refused, failed, timed_out |
| `divault_charged_atomic_total` | counter | `token` | atomic units of the token that calls were charged |
| `divault_runs_reserved` | gauge | | runs reserved in the ledger that have not ended yet |
| `divault_model_waiting` | gauge | `model` | requests in the queue |
| `divault_model_oldest_seconds` | gauge | `model` | how long the one who waits longest has waited |
| `divault_model_up` | gauge | `model` | 1 while the worker is ready |
| `divault_model_restarts_total` | counter | `model` | times that the worker had to be started anew |
| `divault_model_pass_callers` | histogram | `model` | callers that shared a pass |
| `divault_model_busy_seconds_total` | counter | `model` | time spent in passes |
| `divault_model_memory_bytes` | gauge | `model` | the worker's share of memory (PSS, else resident size) |
| `divault_cache_bytes` | gauge | | ciphertext on disk |
| `divault_cache_entries` | gauge | | files and folders in the cache |
| `divault_chain_head_block` | gauge | | number of the newest block that was seen |
| `divault_chain_head_age_seconds` | gauge | | time since that block's own time (grows while nobody asks) |
| `divault_process_...` | | | CPU, memory and files of the node's own process |
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import accumulate
from time import perf_counter
from typing import Self, TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from divault.errors import DivaultError
from divault.traces import current
from divault.values import ReceiptStatus

SECONDS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
    120.0, 300.0,
)  # fmt: skip
"""Upper bounds of times: from a signature check to a load, which may take 120 s to open and as many to start."""
STEPS = ("authenticate", "known", "gate", "hold", "open", "run", "charge")
"""Of a call, in their order."""
_LOAD_ENDS = (
    "ok", "abandoned", "internal", "deadline_exceeded", "model_failed", "not_ready", "overloaded",
    "sealed_file_damaged", "storage_failed", "too_large", "unsupported_model", "wrong_key",
)  # fmt: skip
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MAX_LABEL = 128
_Key = TypeVar("_Key")


class Histogram:
    """Counts of values by upper bound."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def add(self, other: Histogram) -> None:
        """Count all values of another one with the same bounds."""
        self.counts = [one + more for one, more in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    def buckets(self) -> list[tuple[str, float]]:
        """As Prometheus has them: how many values are at most so large."""
        names = [*(f"{bound:g}" for bound in self._bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(self.counts)), strict=True))


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """What the workers know of one loaded model now."""

    model: str
    waiting: int
    oldest_s: float
    ready: bool
    restarts: int
    bounds: tuple[int, ...]
    """Upper bounds of the sizes of passes."""
    passes: tuple[int, ...]
    """How many passes had so many callers; one more than bounds."""
    callers: int
    busy_s: float
    memory_bytes: int


@dataclass(slots=True)
class Sources:
    """What is asked when somebody reads; each is cheap, and blocks for no network."""

    models: Callable[[], Iterable[ModelFigures]] = tuple
    cache: Callable[[], tuple[int, int] | None] = lambda: None
    """Bytes and entries."""
    head: Callable[[], tuple[int, float] | None] = lambda: None
    """Number and unix time of the newest block that was seen."""
    pending: Callable[[], int | None] = lambda: None
    """Runs that are reserved in the ledger now."""


class Lap:
    """Times the steps of one call: `lap("gate")` counts the time since the lap before.

    As a context, entered after the first step, it also counts the step in which a call fails: the slowest of all are
    those that a deadline ended.
    """

    __slots__ = ("_done", "_steps", "_then", "_trace")

    def __init__(self, steps: defaultdict[str, Histogram]) -> None:
        self._steps = steps
        self._trace = current.get()
        self._done = STEPS[0]
        self._then = perf_counter()

    def __call__(self, step: str) -> None:
        """Count the step that ends now."""
        now = perf_counter()
        found, seconds = self._steps[step], now - self._then
        found.counts[bisect_left(SECONDS, seconds)] += 1  # as `observe` does, which costs as much again to call
        found.total += seconds
        if self._trace is not None:
            self._trace.step(step, seconds)
        self._then = now
        self._done = step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: object) -> None:
        if kind is not None and self._done != STEPS[-1]:
            self(STEPS[STEPS.index(self._done) + 1])


def _histogram_each() -> defaultdict[_Key, Histogram]:
    return defaultdict(Histogram)


@dataclass(slots=True, eq=False)
class Metrics(Collector):
    """The figures of one node. For one event loop; reading is for any thread."""

    sources: Sources = field(default_factory=Sources)
    _requests: defaultdict[tuple[str, str, int], Histogram] = field(default_factory=_histogram_each)
    _refusals: Counter[str] = field(default_factory=Counter)
    _steps: defaultdict[str, Histogram] = field(default_factory=_histogram_each)
    _loads: defaultdict[str, Histogram] = field(default_factory=_histogram_each)
    _receipts: Counter[str] = field(default_factory=Counter)
    _charged: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        """Rule 4, for what every node has."""
        for step in STEPS:
            self._steps[step] = Histogram()
        for outcome in _LOAD_ENDS:
            self._loads[outcome] = Histogram()
        for status in ReceiptStatus:
            self._receipts[status.name.lower()] = 0

    def expect(
        self, *, codes: Iterable[str] = (), faults: Iterable[tuple[str, str]] = (), tokens: Iterable[str] = ()
    ) -> None:
        """Begin at 0 (rule 4): refusals by code, faults (status 500) by route and method, what calls pay by token."""
        for found, labels in ((self._refusals, codes), (self._charged, tokens)):
            found.update(dict.fromkeys(labels, 0))
        for route, method in faults:
            self._requests.setdefault((route, method, HTTPStatus.INTERNAL_SERVER_ERROR.value), Histogram())

    def lap(self) -> Lap:
        """A clock for the steps of a call that begins now."""
        return Lap(self._steps)

    def request(self, route: str, method: str, status: int, seconds: float, code: str | None = None) -> None:
        """Count an answered request; `code` where it was an error."""
        found = self._requests[route, method, status]
        found.counts[bisect_left(SECONDS, seconds)] += 1
        found.total += seconds
        if code is not None:
            self._refusals[code] += 1

    @contextmanager
    def load(self) -> Iterator[None]:
        """Count the load that happens inside, by how it ends. Who leaves it is counted as `abandoned`."""
        began, outcome = perf_counter(), "abandoned"
        try:
            yield
            outcome = "ok"
        except Exception as err:
            outcome = err.code if isinstance(err, DivaultError) else DivaultError.code
            raise
        finally:
            self._loads[outcome].observe(perf_counter() - began)

    def receipt(self, status: str, charged: int = 0, token: str = "") -> None:
        """Count a receipt, and what it charged in atomic units."""
        self._receipts[status] += 1
        if charged:
            self._charged[token] += charged

    def text(self) -> bytes:
        """Everything in Prometheus' text form."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        ProcessCollector(namespace="divault", registry=registry)
        return generate_latest(registry)

    def collect(self) -> Iterable[Metric]:
        """Part of prometheus_client's Collector."""
        yield from self._of_calls()
        yield from _of_models(list(self.sources.models()))
        yield from self._of_places()

    def _of_calls(self) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "divault_requests", "HTTP requests answered", labels=("route", "method", "status")
        )
        by_route: defaultdict[str, Histogram] = _histogram_each()
        for (route, method, status), found in list(self._requests.items()):
            count = sum(found.counts)
            requests.add_metric((route, method, str(status)), count)
            if count:  # times of routes that nobody asked would be most of the page
                by_route[route].add(found)
        yield requests
        yield _histograms("divault_request_seconds", "Seconds of a request", "route", by_route)
        yield _counters("divault_refusals", "Errors told to callers", "code", self._refusals)
        yield _histograms("divault_step_seconds", "Seconds of a step of a call", "step", self._steps)
        yield _histograms("divault_load_seconds", "Seconds of a load", "outcome", self._loads)
        yield _counters("divault_receipts", "Receipts issued", "status", self._receipts)
        yield _counters("divault_charged_atomic", "Atomic units charged", "token", self._charged)

    def _of_places(self) -> Iterable[Metric]:
        cache, head, pending = self.sources.cache(), self.sources.head(), self.sources.pending()
        if pending is not None:
            yield GaugeMetricFamily("divault_runs_reserved", "Runs reserved in the ledger", value=pending)
        if cache is not None:
            yield GaugeMetricFamily("divault_cache_bytes", "Ciphertext on disk", value=cache[0])
            yield GaugeMetricFamily("divault_cache_entries", "Files and folders in the cache", value=cache[1])
        if head is not None:
            yield GaugeMetricFamily("divault_chain_head_block", "Newest block seen", value=head[0])
            age = max(0.0, time.time() - head[1])
            yield GaugeMetricFamily("divault_chain_head_age_seconds", "Time since that block's own", value=age)


def _counters(name: str, about: str, label: str, found: Counter[str]) -> Metric:
    family = CounterMetricFamily(name, about, labels=(label,))
    for value, count in list(found.items()):
        family.add_metric((value[:_MAX_LABEL],), count)
    return family


def _histograms(name: str, about: str, label: str, found: dict[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(name, about, labels=(label,))
    for value, histogram in list(found.items()):
        family.add_metric((value[:_MAX_LABEL],), histogram.buckets(), histogram.total)
    return family


def _of_models(models: Sequence[ModelFigures]) -> Iterable[Metric]:
    gauges: tuple[tuple[str, str, Callable[[ModelFigures], float]], ...] = (
        ("divault_model_waiting", "Requests in the queue", lambda one: one.waiting),
        ("divault_model_oldest_seconds", "Wait of the one who waits longest", lambda one: one.oldest_s),
        ("divault_model_up", "Whether the worker is ready", lambda one: float(one.ready)),
        ("divault_model_memory_bytes", "The worker's share of memory", lambda one: one.memory_bytes),
    )
    for name, about, value in gauges:
        gauge = GaugeMetricFamily(name, about, labels=("model",))
        for one in models:
            gauge.add_metric((one.model,), value(one))
        yield gauge
    restarts = CounterMetricFamily("divault_model_restarts", "Starts anew", labels=("model",))
    busy = CounterMetricFamily("divault_model_busy_seconds", "Time spent in passes", labels=("model",))
    passes = HistogramMetricFamily("divault_model_pass_callers", "Callers that shared a pass", labels=("model",))
    for one in models:
        restarts.add_metric((one.model,), one.restarts)
        busy.add_metric((one.model,), one.busy_s)
        names = [*map(str, one.bounds), "+Inf"]
        buckets = list(zip(names, map(float, accumulate(one.passes)), strict=True))
        passes.add_metric((one.model,), buckets, one.callers)
    yield from (restarts, busy, passes)
