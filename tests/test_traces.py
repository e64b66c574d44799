"""Spans of requests and their steps: under the caller's trace, and with nothing of what he sent."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from divault.api.measured import Measured, Routes
from divault.errors import SettingsInvalid
from divault.metrics import Metrics
from divault.traces import Traces, current

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def spans() -> Iterator[tuple[Traces, InMemorySpanExporter]]:
    exporter = InMemorySpanExporter()
    traces = Traces(SimpleSpanProcessor(exporter))
    yield traces, exporter
    traces.close()


class App:
    """Answers after two steps."""

    def __init__(self, status: int = 200) -> None:
        self.metrics = Metrics()
        self.status = status

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        lap = self.metrics.lap()
        lap("gate")
        lap("run")
        headers = [(b"divault-code", b"overloaded")] if self.status >= 400 else []
        await send({"type": "http.response.start", "status": self.status, "headers": headers})


async def ask(app: App, traces: Traces | None, *headers: tuple[bytes, bytes]) -> None:
    async def nothing(*_: Any) -> Any:
        return None

    measured = Measured(app, app.metrics, Routes(["/models/{m}"]), traces=traces)
    scope = {"type": "http", "path": "/models/secret-name", "method": "POST", "headers": list(headers)}
    await measured(scope, nothing, nothing)


async def test_a_request_is_a_span_and_its_steps_are_inside(spans: tuple[Traces, InMemorySpanExporter]) -> None:
    traces, exporter = spans
    await ask(App(), traces, (b"traceparent", f"00-{TRACE}-{SPAN}-01".encode()), (b"authorization", b"secret"))
    *steps, request = exporter.get_finished_spans()

    assert [span.name for span in steps] == ["gate", "run"]
    assert request.name == "/models/{m}"
    assert request.parent is not None
    assert (f"{request.context.trace_id:032x}", f"{request.parent.span_id:016x}") == (TRACE, SPAN)
    for step in steps:
        assert step.parent is not None
        assert step.parent.span_id == request.context.span_id
        assert step.context.trace_id == request.context.trace_id
        assert (step.start_time or 0) <= (step.end_time or 0)
    assert "secret" not in json.dumps([json.loads(span.to_json()) for span in (*steps, request)])
    assert dict(request.attributes or {})["http.response.status_code"] == 200


async def test_a_refusal_has_its_code(spans: tuple[Traces, InMemorySpanExporter]) -> None:
    traces, exporter = spans
    await ask(App(503), traces)
    request = exporter.get_finished_spans()[-1]

    assert request.parent is None
    assert dict(request.attributes or {})["divault.code"] == "overloaded"
    assert not request.status.is_ok


async def test_a_parent_decides_nothing_else(spans: tuple[Traces, InMemorySpanExporter]) -> None:
    traces, exporter = spans
    unsampled = (b"traceparent", f"00-{TRACE}-{SPAN}-00".encode())
    await ask(App(), traces, unsampled, (b"tracestate", b"vendor=secret"))
    request = exporter.get_finished_spans()[-1]

    assert f"{request.context.trace_id:032x}" == TRACE
    assert len(exporter.get_finished_spans()) == 3
    assert "secret" not in request.to_json()


async def test_of_two_parents_none_is_taken(spans: tuple[Traces, InMemorySpanExporter]) -> None:
    traces, exporter = spans
    parent = (b"traceparent", f"00-{TRACE}-{SPAN}-01".encode())
    await ask(App(), traces, parent, parent)

    assert exporter.get_finished_spans()[-1].parent is None


@pytest.mark.parametrize("header", [b"00-zz-00-01", b"", b"x" * 5000])
async def test_a_malformed_parent_is_none(spans: tuple[Traces, InMemorySpanExporter], header: bytes) -> None:
    traces, exporter = spans
    await ask(App(), traces, (b"traceparent", header))

    assert exporter.get_finished_spans()[-1].parent is None


async def test_without_a_collector_there_are_none() -> None:
    app = App()
    await ask(app, None)

    assert current.get() is None
    assert b"divault_step_seconds_count" in app.metrics.text()


async def test_a_silent_collector_does_not_keep_a_node_from_stopping() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        traces = Traces.to(f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces")
        await ask(App(), traces)
        async with asyncio.timeout(8):  # the library gives such a collector ten seconds
            await asyncio.to_thread(traces.close)


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with pytest.raises(SettingsInvalid, match="divault\\[otel\\]"):
        Traces.to("http://127.0.0.1:1/v1/traces")
