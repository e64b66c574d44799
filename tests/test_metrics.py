"""What is counted, how it is read, and that nothing of a caller is in it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request

from divault.api import ApiLimits, create_api
from divault.api.measured import Measured, Routes
from divault.api.metrics_route import _is_local
from divault.api.openai import Asked
from divault.api.openai_routes import _Stream
from divault.api.problems import STATUS
from divault.app import _usage_of, receipts_into
from divault.errors import DivaultError, ModelFailed, NotReady, Overloaded, error_classes
from divault.limits import PeerLimits
from divault.metrics import SECONDS, STEPS, Histogram, Metrics, ModelFigures, Sources
from divault.models.base import Piece
from divault.settings import Settings
from divault.storage.cache import CiphertextCache
from divault.telemetry import configure_logs
from divault.values import Hold, Usdc
from tests.counter import PRICE, TOKEN, Counter, answer_yes, signed

pytestmark = pytest.mark.usefixtures("logs_as_before")
ROOT = Path(__file__).parent.parent
MODEL = ModelFigures("m1", 3, 0.25, True, 2, (1, 2, 4), (5, 1, 0, 2), 40, 1.5, 12_000_000)


def full() -> Metrics:
    metrics = Metrics(Sources(lambda: [MODEL], lambda: (1000, 2), lambda: (77, 1.0), lambda: 4))
    metrics.request("/api/v1/inference", "POST", 200, 0.003)
    metrics.request("/api/v1/inference", "POST", 503, 0.001, "overloaded")
    lap = metrics.lap()
    lap("authenticate")
    lap("gate")
    metrics.receipt("ok", 20_000, "0x00")
    metrics.receipt("refused")
    with metrics.load():
        pass
    return metrics


def read(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }


def labelled(metrics: Metrics, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    """Those that were counted."""
    return {tags: value for (found, tags), value in read(metrics).items() if found == name and value}


def test_what_was_counted_is_read() -> None:
    found = read(full())

    request = (("method", "POST"), ("route", "/api/v1/inference"))
    assert found["divault_requests_total", (*request, ("status", "200"))] == 1
    assert found["divault_refusals_total", (("code", "overloaded"),)] == 1
    assert found["divault_charged_atomic_total", (("token", "0x00"),)] == 20_000
    assert found["divault_receipts_total", (("status", "refused"),)] == 1
    assert found["divault_step_seconds_count", (("step", "gate"),)] == 1
    assert found["divault_request_seconds_bucket", (("le", "0.0025"), request[1])] == 1
    assert found["divault_model_waiting", (("model", "m1"),)] == 3
    assert found["divault_model_pass_callers_bucket", (("le", "2"), ("model", "m1"))] == 6
    assert found["divault_model_pass_callers_bucket", (("le", "+Inf"), ("model", "m1"))] == 8
    assert found["divault_model_pass_callers_sum", (("model", "m1"),)] == 40
    assert (found["divault_cache_bytes", ()], found["divault_chain_head_block", ()]) == (1000, 77)
    assert found["divault_runs_reserved", ()] == 4
    assert found["divault_process_resident_memory_bytes", ()] > 0


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "ok"),
        (NotReady("no"), "not_ready"),
        (RuntimeError("a fault"), "internal"),
        (asyncio.CancelledError(), "abandoned"),
    ],
)
def test_a_load_is_counted_by_how_it_ends(error: BaseException | None, outcome: str) -> None:
    metrics = Metrics()
    with contextlib.suppress(NotReady, RuntimeError, asyncio.CancelledError), metrics.load():
        if error is not None:
            raise error

    assert labelled(metrics, "divault_load_seconds_count") == {(("outcome", outcome),): 1}


def test_before_anything_happened_nothing_is_invented() -> None:
    found = read(Metrics())

    assert {value for (name, _), value in found.items() if not name.startswith("divault_process")} == {0}


def of_a_node() -> Metrics:
    """The figures of a node that nobody has asked anything."""
    limits = ApiLimits(PeerLimits(100, 1 << 20), 1 << 20)
    create_api(cast("Any", SimpleNamespace(version="1")), limits)
    return limits.metrics


def fails(metrics: Metrics, outcome: str) -> None:
    with contextlib.suppress(DivaultError), metrics.load():
        raise next(cls for cls in error_classes() if cls.code == outcome)("it failed")


def alerts() -> dict[str, str]:
    """From the page: the labels that each counter of an alert is asked for, by its name."""
    page = (ROOT / "docs/how-to/watch-a-node.md").read_text()
    found = re.findall(r"^\| `(?:rate|increase)\((divault_\w+)\{(\w+)=~?\"([^\"]+)\"", page, re.MULTILINE)
    return {f"{name} {label}": values.replace("\\", "") for name, label, values in found}


def test_the_first_failure_is_growth_for_every_alert_of_the_page() -> None:
    metrics = of_a_node()
    before = read(metrics)
    for outcome in alerts()["divault_load_seconds_count outcome"].split("|"):
        fails(metrics, outcome)
    for code in ("overloaded", "internal"):
        metrics.request("/api/v1/inference", "POST", 500, 0.1, code)
    after = read(metrics)

    asked = [(name.split(), value) for name, values in alerts().items() for value in values.split("|")]
    assert len(asked) >= 6
    for (name, label), value in asked:
        series = [key for key in after if key[0] == name and (label, value) in key[1] and after[key]]
        assert series, (name, value)
        assert {before[key] for key in series} == {0}, (name, value)


def test_the_alert_for_an_old_head_asks_for_calls_since_nothing_else_reads_it() -> None:
    page = (ROOT / "docs/how-to/watch-a-node.md").read_text()
    (told,) = re.findall(r"^\| `(divault_chain_head_age_seconds[^`]*)`", page, re.MULTILINE)
    older, calls = told.split(" and on (instance) ")
    (step,) = re.findall(r'increase\(divault_step_seconds_count\{step="(\w+)"\}\[2m\]\)\) > 0$', calls)

    assert int(older.split(" > ")[1]) > 120 + 12, "two minutes without a call, and a block's time"
    assert read(of_a_node())["divault_step_seconds_count", (("step", step),)] == 0


def test_a_load_for_want_of_memory_or_a_device_wakes_somebody_and_one_that_was_left_does_not() -> None:
    told = alerts()["divault_load_seconds_count outcome"].split("|")

    assert {"not_ready", "overloaded", "storage_failed", "model_failed", "deadline_exceeded"} == {*told}
    assert not {"ok", "abandoned", "wrong_key"} & {*told}


def test_a_node_begins_at_0_with_each_code_and_fault() -> None:
    found = read(of_a_node())

    codes = {dict(tags)["code"] for name, tags in found if name == "divault_refusals_total"}
    assert codes == {*STATUS}
    faults = [dict(tags) for name, tags in found if name == "divault_requests_total"]
    assert {fault["status"] for fault in faults} == {"500"}
    assert {"/api/v1/inference", "/api/v1/models/{model_id}"} < {fault["route"] for fault in faults}
    statuses = {dict(tags)["status"] for name, tags in found if name == "divault_receipts_total"}
    assert statuses == {"ok", "partial", "refused", "failed", "timed_out"}
    assert len(found) < 800, "no series for what is not worth one"


def test_zeros_take_nothing_back() -> None:
    metrics = full()
    before = {key: value for key, value in read(metrics).items() if not key[0].startswith("divault_process")}
    metrics.expect(codes=["overloaded"], faults=[("/api/v1/inference", "POST")], tokens=["0x00"])
    after = read(metrics)

    assert {key: after[key] for key in before if key[0] != "divault_chain_head_age_seconds"} == {
        key: value for key, value in before.items() if key[0] != "divault_chain_head_age_seconds"
    }


@pytest.mark.parametrize(("steps", "failed"), [(1, "known"), (5, "run"), (6, "charge"), (7, None)])
@pytest.mark.parametrize("error", [ModelFailed("it failed"), TimeoutError(), asyncio.CancelledError()])
def test_the_step_in_which_a_call_fails_counts(steps: int, failed: str | None, error: BaseException) -> None:
    metrics = Metrics()
    lap = metrics.lap()
    lap("authenticate")
    with contextlib.suppress(type(error)), lap:
        for step in STEPS[1:steps]:
            lap(step)
        raise error
    counted = {*STEPS[:steps]} | ({failed} if failed else set())

    assert labelled(metrics, "divault_step_seconds_count") == {(("step", step),): 1 for step in counted}


def test_a_call_that_ends_well_before_its_last_step_counts_no_more() -> None:
    metrics = Metrics()
    lap = metrics.lap()
    lap("authenticate")
    with lap:
        """A kept answer is given again."""

    assert labelled(metrics, "divault_step_seconds_count") == {(("step", "authenticate"),): 1}


def test_no_time_that_the_node_allows_by_default_is_beyond_the_bounds() -> None:
    waited = Settings.model_fields["divault_load_timeout_seconds"].default

    assert max(SECONDS) > 2 * waited, "opened, and loaded by a worker"
    assert any(Settings.model_fields["inference_timeout_seconds"].default < bound for bound in SECONDS)


def test_a_value_on_a_bound_belongs_to_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)

    assert histogram.buckets() == [("1", 2.0), ("2", 4.0), ("+Inf", 5.0)]
    assert histogram.total == 14.0


def base(name: str) -> str:
    return re.sub(r"_(bucket|count|sum)$", "", name)


def test_the_page_names_exactly_what_there_is() -> None:
    page = (ROOT / "docs/reference/metrics.md").read_text()
    told = set(re.findall(r"^\| `(divault_\w+)`", page, re.MULTILINE)) - {"divault_process_"}
    there = {base(name) for name, _ in read(full()) if not name.startswith("divault_process_")}

    assert told == there
    assert page.split("| name |")[1].split("\n\n")[0] in f"{__import__('divault.metrics').metrics.__doc__}"


@pytest.mark.parametrize(
    "path", ["deploy/grafana/divault.json", "docs/how-to/watch-a-node.md", "src/divault/cli/top.py"]
)
def test_what_reads_them_asks_for_nothing_else(path: str) -> None:
    there = {name for name, _ in read(full())} | {base(name) for name, _ in read(full())}
    asked = set(re.findall(r"\bdivault_[a-z_]+", (ROOT / path).read_text()))

    assert asked
    assert asked <= there


def test_the_dashboard_is_whole() -> None:
    board = json.loads((ROOT / "deploy/grafana/divault.json").read_text())

    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"]) >= 12
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places)


def test_every_query_of_the_dashboard_asks_for_labels_that_there_are() -> None:
    board = json.loads((ROOT / "deploy/grafana/divault.json").read_text())
    labels: dict[str, set[str]] = {}
    for name, tags in read(full()):
        labels.setdefault(name, {"instance"}).update(dict(tags))
    queries = [(target["expr"], target["legendFormat"]) for panel in board["panels"] for target in panel["targets"]]

    for query, legend in queries:
        names = re.findall(r"\bdivault_[a-z_]+", query)
        kept = re.findall(r"by \(([^)]*)\)", query)
        known = set.intersection(*(labels[name] for name in names))
        asked = {label.strip() for one in kept for label in one.split(",")}
        asked |= set(re.findall(r"(\w+)=~?\"", query))
        told = set(re.findall(r"\{\{(\w+)\}\}", legend))
        assert asked | told <= known, query
        assert told <= (asked if kept else known), query
        assert query.count("(") == query.count(")"), query
        assert query.count('instance=~"$instance"') == len(names), query


# --- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "template"),
    [
        ("/api/v1/node", "/api/v1/node"), ("/api/v1/models/m1", "/api/v1/models/{model_id}"),
        ("/api/v1/models/m1/x", "other"), ("/v2/models/m/versions/1/infer", "/v2/models/{m}/versions/{v}/infer"),
        ("/.env", "other"), ("/api/v1/models/", "other"),
    ],
)  # fmt: skip
def test_paths_become_templates(path: str, template: str) -> None:
    routes = Routes(["/api/v1/node", "/api/v1/models/{model_id}", "/v2/models/{m}/versions/{v}/infer", ""])

    assert routes.template(path) == template


async def ask(app: Any, path: str = "/x", method: str = "POST") -> list[Any]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    await Measured(app, app.metrics, Routes(["/x"]))(
        {"type": "http", "path": path, "method": method, "headers": []}, receive, send
    )
    return sent


class Answers:
    def __init__(self, status: int | None, *headers: tuple[bytes, bytes]) -> None:
        self.metrics = Metrics()
        self.status = status
        self.headers = headers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.status is None:
            return
        await send({"type": "http.response.start", "status": self.status, "headers": list(self.headers)})
        await send({"type": "http.response.body", "body": b"secret"})


async def test_an_answer_without_an_id_gets_one() -> None:
    sent = await ask(Answers(200))
    own = await ask(Answers(200, (b"x-request-id", b"0xaa")))

    assert re.fullmatch(rb"0x[0-9a-f]{32}", dict(sent[0]["headers"])[b"x-request-id"])
    assert own[0]["headers"] == [(b"x-request-id", b"0xaa")]


class Breaks:
    """A stream of OpenAI's interface that fails after its first piece."""

    def __init__(self) -> None:
        self.metrics = Metrics()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def run() -> Any:
            raise ModelFailed("it raised")

        pieces: asyncio.Queue[Any] = asyncio.Queue()
        for piece in (Piece("so"), None):
            pieces.put_nowait(piece)
        asked = Asked("completions", b'{"model":"m","prompt":"x","stream":true}')
        stream = await _Stream(asked, "name", 1, asyncio.create_task(run()), pieces).begun()
        await stream(scope, receive, send)


async def test_an_error_within_a_stream_is_counted_and_logged(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(None, debug=False)
    app = Breaks()
    sent = await ask(app)
    found = read(app.metrics)
    (line,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    assert b'"model_failed"' in b"".join(message.get("body", b"") for message in sent)
    assert found["divault_refusals_total", (("code", "model_failed"),)] == 1
    assert found["divault_requests_total", (("method", "POST"), ("route", "/x"), ("status", "200"))] == 1
    assert (line["status"], line["code"], line["level"]) == (200, "model_failed", "info")


async def test_who_left_is_counted_as_such() -> None:
    app = Answers(None)
    await ask(app)

    assert read(app.metrics)["divault_requests_total", (("method", "POST"), ("route", "/x"), ("status", "499"))] == 1


async def test_a_strange_method_or_path_makes_no_label() -> None:
    app = Answers(405)
    await ask(app, "/secret/path", "BREW")

    labels = [tags for name, tags in read(app.metrics) if name == "divault_requests_total"]
    assert labels == [(("method", "other"), ("route", "other"), ("status", "405"))]


async def test_a_line_has_the_template_and_nothing_that_was_sent(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(None)
    await ask(Answers(403, (b"x-request-id", b"0xbb"), (b"divault-code", b"access_denied")), "/x")
    await ask(Answers(404, (b"divault-code", b"route_unknown")), "/users/alice@example.org")
    await ask(Answers(200))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    assert [(line["route"], line["status"], line["code"]) for line in lines] == [
        ("/x", 403, "access_denied"), ("other", 404, "route_unknown")
    ]  # fmt: skip
    assert lines[0]["request_id"] == "0xbb"
    assert "alice" not in json.dumps(lines)
    assert "secret" not in json.dumps(lines)


@pytest.mark.parametrize(
    ("host", "headers", "local"),
    [
        ("127.0.0.1", [], True), ("::1", [], True), ("10.0.0.1", [], False), ("testclient", [], False),
        ("127.0.0.1", [(b"x-forwarded-for", b"127.0.0.1")], False), ("127.0.0.1", [(b"forwarded", b"for=x")], False),
        ("127.0.0.1", [(b"via", b"1.1 proxy")], False), ("127.0.0.1", [(b"x-forwarded-host", b"n")], False),
        ("127.0.0.1", [(b"x-real-ip", b"::1")], False),
        ("127.0.0.1", [(b"x-request-id", b"1")], True),
    ],
)  # fmt: skip
def test_local_is_this_machine_without_a_proxy(host: str, headers: list[tuple[bytes, bytes]], local: bool) -> None:
    assert _is_local(Request({"type": "http", "client": (host, 1), "headers": headers})) is local


# --- what is asked of others ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("price", "paid"), [(Usdc(0), False), (PRICE, True)])
@pytest.mark.parametrize("error", [None, ModelFailed("it failed"), Overloaded("come back"), asyncio.CancelledError()])
async def test_a_run_is_reserved_until_it_ends_however_it_does(
    tmp_path: Path, price: Usdc, paid: bool, error: BaseException | None
) -> None:
    async with Counter(tmp_path) as counter:
        seen: list[int] = []

        async def work(_: Hold) -> bytes:
            seen.append(counter.ledger.pending)
            if error is not None:
                raise error
            return b'"yes"'

        _, call = signed(tx=counter.chain.pay(price.atomic) if paid else None)
        await asyncio.gather(counter.infer(call, work, price=price), return_exceptions=True)

        assert seen == [1]
        assert counter.ledger.pending == 0


@pytest.mark.parametrize(("price", "paid"), [(Usdc(0), False), (PRICE, True)])
@pytest.mark.parametrize(("error", "status"), [(None, "ok"), (ModelFailed("it failed"), "failed")])
async def test_a_receipt_counts_when_it_is_issued_and_not_when_its_answer_is_given_again(
    tmp_path: Path, price: Usdc, paid: bool, error: Exception | None, status: str
) -> None:
    metrics = Metrics()

    async def work(hold: Hold) -> bytes:
        if error is not None:
            raise error
        return await answer_yes(hold)

    async with Counter(tmp_path, on_receipt=receipts_into(metrics)) as counter:
        _, call = signed(tx=counter.chain.pay(price.atomic) if paid else None)
        for _ in range(3):
            await asyncio.gather(counter.infer(call, work, price=price), return_exceptions=True)
    charged = {(("token", str(TOKEN)),): PRICE.atomic} if paid and error is None else {}

    assert labelled(metrics, "divault_receipts_total") == {(("status", status),): 1}
    assert labelled(metrics, "divault_charged_atomic_total") == charged


async def test_a_receipt_whose_caller_left_while_it_was_written_counts(tmp_path: Path) -> None:
    metrics = Metrics()
    async with Counter(tmp_path, on_receipt=receipts_into(metrics)) as counter:
        _, call = signed(tx=counter.chain.pay(PRICE.atomic))
        asked = asyncio.create_task(counter.infer(call))
        while not counter.ledger._last:  # it is signed, and on its way to the disk
            await asyncio.sleep(0)
        counted = labelled(metrics, "divault_receipts_total")
        asked.cancel()
        await asyncio.wait([asked])
        written = await counter.chain_is_whole()

    assert asked.cancelled()
    assert counted == {}
    assert written == 1
    assert labelled(metrics, "divault_receipts_total") == {(("status", "ok"),): 1}


async def test_a_receipt_that_could_not_be_written_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics()
    async with Counter(tmp_path, on_receipt=receipts_into(metrics)) as counter:

        async def work(hold: Hold) -> bytes:
            monkeypatch.setattr(os, "fdatasync", fails)
            return await answer_yes(hold)

        def fails(_: int) -> None:
            raise OSError(5, "Input/output error")

        _, call = signed(tx=counter.chain.pay(PRICE.atomic))
        with pytest.raises(NotReady):
            await counter.infer(call, work)

    assert labelled(metrics, "divault_receipts_total") == {}


def test_a_cache_that_cannot_be_read_leaves_the_other_figures(tmp_path: Path) -> None:
    cache = CiphertextCache(tmp_path / "cache", 1000)
    (tmp_path / "cache").rmdir()
    metrics = full()
    metrics.sources.cache = _usage_of(cache)
    found = read(metrics)

    assert ("divault_cache_bytes", ()) not in found
    assert found["divault_chain_head_block", ()] == 77
    (tmp_path / "cache").mkdir()
    assert read(metrics)["divault_cache_bytes", ()] == 0
