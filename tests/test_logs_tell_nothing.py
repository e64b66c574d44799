"""Logs name what went wrong and where, and repeat nothing that a caller sent, whoever logs it and however it fails."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import divault.api.measured
from divault.api.measured import Measured, Routes
from divault.errors import BadRequest, ModelFailed
from divault.metrics import Metrics
from divault.telemetry import LINES_PER_SECOND, configure_logs, log, new_request_id
from divault.traces import Traces
from divault.workers.pool import WorkerPool
from tests.worker_models import answer, hostile, opened

pytestmark = pytest.mark.usefixtures("logs_as_before")
SECRETS = st.text("abcdefghijklmnopqrstuvwxyzABCDEF0123456789+/=", min_size=12, max_size=40).map("zq".__add__)
MASKED = st.sampled_from(["decryption_key", "user_signature", "input_data", "Authorization", "X-Payment", "passphrase"])


def begin() -> None:
    """Within the test, since that is when `capsys` has its stream."""
    configure_logs(None, debug=True)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    told = capsys.readouterr()
    assert told.err == ""
    return [json.loads(line) for line in told.out.splitlines()]


def fails(secret: str) -> None:
    try:
        {}[secret]
    except KeyError as err:
        raise ValueError(f"invalid: {secret}") from err


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(secret=SECRETS)
def test_an_exception_is_its_type_and_its_place(capsys: pytest.CaptureFixture[str], secret: str) -> None:
    begin()
    try:
        fails(secret)
    except ValueError as err:
        log("test").error("failed", exc_info=err)
        log("test").exception("failed")
    found = lines(capsys)

    assert secret not in json.dumps(found)
    for line in found:
        outer, cause = line["exception"]
        assert re.fullmatch(r"builtins\.ValueError > .*test_logs_tell_nothing\.py:\d+ fails", outer)
        assert cause.startswith("builtins.KeyError > ")


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=MASKED, secret=SECRETS)
def test_a_member_of_such_a_name_is_masked_at_any_depth(
    capsys: pytest.CaptureFixture[str], name: str, secret: str
) -> None:
    begin()
    log("test").info("told", **{name: secret}, headers={"x": {name: [secret]}, "status": 200})
    (line,) = lines(capsys)

    assert secret not in json.dumps(line)
    assert line["headers"] == {"x": {name: "***"}, "status": 200}


async def test_what_a_library_logs_is_one_line_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    begin()

    async def lost() -> None:
        raise ValueError("zq-secret")

    logging.getLogger("opentelemetry.x").warning("Invalid HTTP request received.\nzq-secret")
    logging.getLogger("opentelemetry.x").info("Shutting down")
    task = asyncio.create_task(lost())
    await asyncio.sleep(0)
    del task  # nobody asks for its end: the loop says so
    found = lines(capsys)

    assert "zq-secret" not in json.dumps(found)
    assert [(line["library"], line["event"]) for line in found] == [
        ("opentelemetry.x", "Invalid HTTP request received."), ("asyncio", "Task exception was never retrieved")
    ]  # fmt: skip
    assert found[1]["exception"][0].startswith("builtins.ValueError > ")


async def test_a_collector_that_is_away_makes_no_line_with_its_credentials(
    capsys: pytest.CaptureFixture[str], unused_tcp_port: int
) -> None:
    begin()
    traces = Traces.to(f"http://zq-user:zq-pass@127.0.0.1:{unused_tcp_port}/v1/zq-path?api-key=zq-key")
    traces.begin("POST", {}).end("/x", 200, None, "0xaa")
    await asyncio.to_thread(traces.close)
    found = lines(capsys)

    assert found, "it says that it could not send"
    assert "zq-" not in json.dumps(found)
    assert any("Transient error (ConnectionError) encountered" in line["event"] for line in found)


@pytest.mark.parametrize(
    ("words", "args", "told"),
    [
        ("%d of %s lost in %.2f s", (3, "zq-secret", 0.5), "3 of (str) lost in 0.50 s"),
        ("it said %r", (ValueError("zq-secret"),), "it said '(ValueError)'"),
        ("it said %(what)s", ({"what": "zq-secret"},), "it said %(what)s"),
        ("%d of them", ("zq-secret",), "%d of them"),
        ("100 % of them", (), "100 % of them"),
        ("one\n%s", ("zq-secret",), "one"),
    ],
)
def test_what_a_library_names_is_told_as_numbers_and_types(
    words: str, args: tuple[Any, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    begin()
    logging.getLogger("opentelemetry.x").warning(words, *args)
    (line,) = lines(capsys)

    assert (line["event"], line["library"]) == (told, "opentelemetry.x")


def test_of_a_library_that_warns_without_end_few_lines_are_written_and_of_its_errors_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    begin()
    for _ in range(3 * LINES_PER_SECOND):
        logging.getLogger("asyncio").warning("socket.send() raised exception.")
        logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    warned = lines(capsys)
    for _ in range(LINES_PER_SECOND + 1):
        logging.getLogger("asyncio").error("Exception in callback")
    errors = lines(capsys)

    assert LINES_PER_SECOND <= len(warned) <= 2 * LINES_PER_SECOND, "a second may have ended meanwhile"
    assert {line["library"] for line in warned} == {"asyncio"}, "uvicorn's are told as refusals"
    assert len(errors) == LINES_PER_SECOND + 1
    assert errors[0]["unlogged"] == 3 * LINES_PER_SECOND - len(warned) - sum(x.get("unlogged", 0) for x in warned)


class Faulty:
    """Fails before its answer, or in the middle of it."""

    def __init__(self, *, begun: bool) -> None:
        self.begun = begun

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError(f"zq-secret {scope['path']}")


async def ask(app: Any, metrics: Metrics) -> list[Any]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": "http", "path": "/x/zq-secret", "method": "POST", "headers": []}
    await Measured(app, metrics, Routes(["/x/{name}"]))(scope, receive, send)
    return sent


async def test_a_fault_before_the_answer_is_told_with_its_id_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    begin()
    metrics = Metrics()
    start, body = await ask(Faulty(begun=False), metrics)
    fault, request = lines(capsys)

    assert start["status"] == 500
    assert json.loads(body["body"])["request_id"] == fault["request_id"] == request["request_id"]
    assert dict(start["headers"])[b"x-request-id"].decode() == fault["request_id"]
    assert (request["route"], request["level"], request["bytes"]) == ("/x/{name}", "error", len(body["body"]))
    assert fault["exception"][0].startswith("builtins.RuntimeError > ")
    assert "zq-secret" not in json.dumps([fault, request, body["body"].decode()])
    assert b'divault_requests_total{method="POST",route="/x/{name}",status="500"} 1.0' in metrics.text()


async def test_a_flood_of_refusals_fills_no_log_and_every_one_is_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin()
    metrics, now, status = Metrics(), 100.0, 403

    async def app(_: Any, __: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": [(b"divault-code", b"access_denied")]})
        await send({"type": "http.response.body", "body": b""})

    monkeypatch.setattr(divault.api.measured.time, "monotonic", lambda: now)
    measured = Measured(app, metrics, Routes(["/x"]))

    async def request(count: int) -> list[dict[str, Any]]:
        for _ in range(count):
            await measured({"type": "http", "path": "/x", "method": "POST", "headers": []}, nothing, nothing)
        return lines(capsys)

    assert len(await request(LINES_PER_SECOND + 30)) == LINES_PER_SECOND
    status = 500
    (fault,) = await request(1)
    assert (fault["status"], fault["unlogged"]) == (500, 30), "faults are always told"
    status, now = 403, 101.0
    first, second = await request(2)

    assert "unlogged" not in first | second
    count = LINES_PER_SECOND + 32
    assert f'divault_requests_total{{method="POST",route="/x",status="403"}} {count}.0'.encode() in metrics.text()


async def nothing(*_: Any) -> None:
    """Neither receives nor sends."""


async def test_a_fault_amid_the_answer_leaves_it_unfinished(capsys: pytest.CaptureFixture[str]) -> None:
    begin()
    metrics = Metrics()
    sent = await ask(Faulty(begun=True), metrics)
    fault, request = lines(capsys)

    assert len(sent) == 1
    assert fault["event"] == "the answer broke off"
    assert (request["status"], request["code"]) == (200, "internal")
    assert b'divault_refusals_total{code="internal"} 1.0' in metrics.text()
    assert fault["request_id"] == dict(sent[0]["headers"])[b"x-request-id"].decode()
    assert "zq-secret" not in json.dumps(fault)


async def test_a_typed_error_that_nobody_answered_is_no_exception_to_that(capsys: pytest.CaptureFixture[str]) -> None:
    begin()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise BadRequest("zq-secret")

    start, _ = await ask(app, Metrics())

    assert start["status"] == 500
    assert "zq-secret" not in json.dumps(lines(capsys))


def test_ids_are_never_the_same() -> None:
    found = [new_request_id() for _ in range(2000)]

    assert len(set(found)) == 2000
    assert all(re.fullmatch("0x[0-9a-f]{32}", one) for one in found)


def test_a_log_that_cannot_be_written_repeats_nothing_either(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin()
    full = logging.getLogger("divault").handlers[0]
    monkeypatch.setattr(full, "flush", lambda: fails("zq-disk"))
    try:
        fails("zq-secret")
    except ValueError:
        log("test").exception("failed", about="zq-told")
    told = capsys.readouterr().err

    assert told == "a line of the log could not be written: ValueError\n"


@pytest.mark.parametrize("behaviour", ["blab", "die_idle"])
async def test_of_a_worker_only_what_it_wrote_before_its_first_run(
    behaviour: str, capsys: pytest.CaptureFixture[str]
) -> None:
    begin()
    pool, model = WorkerPool(predict_timeout_s=5, load_timeout_s=10, tuning=hostile(behaviour)), opened(b"any")
    await pool.load(model)
    if behaviour == "blab":
        with pytest.raises(ModelFailed):
            await answer(pool, model, {"text": "zq-nobody-else-may-see-this"})
    told = ""
    async with asyncio.timeout(10):
        while "worker died" not in told:
            await asyncio.sleep(0.02)
            told += capsys.readouterr().out
    await pool.close()

    assert "before any run" in told
    assert "zq-nobody" not in told
