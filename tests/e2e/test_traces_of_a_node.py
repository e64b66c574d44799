"""A real node's spans, as a collector gets them by OTLP over HTTP: a tree for each call, with nothing of who called."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from divault.values import Secret
from tests.e2e.conftest import World

pytestmark = pytest.mark.asyncio(loop_scope="session")
STEPS = ["authenticate", "known", "gate", "hold", "open", "run", "charge"]
ATTRIBUTES = {
    "http.request.method", "http.route", "http.response.status_code", "divault.request_id", "divault.code"
}  # fmt: skip


class Collector(ThreadingHTTPServer):
    """Takes what an exporter sends."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Taking)
        self.raw: list[bytes] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1/traces"

    def spans(self) -> list[Span]:
        found = [ExportTraceServiceRequest.FromString(raw) for raw in self.raw]
        return [span for one in found for of in one.resource_spans for in_ in of.scope_spans for span in in_.spans]


class Taking(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Collector)
        self.server.raw.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Be silent."""


@contextmanager
def collecting() -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield collector
        finally:
            collector.shutdown()
            thread.join()


def attributes(span: Span) -> dict[str, object]:
    return {one.key: one.value.string_value or one.value.int_value for one in span.attributes}


async def test_each_call_is_a_tree_and_names_nobody(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("traced")
    with collecting() as collector:
        async with world.other_node(folder, DIVAULT_OTLP_ENDPOINT=collector.url) as node:
            model = (await world.publish("traced", node=node)).text
            key = await world.consumer()
            async with world.client(key, node) as client:
                await client.run(model, {"features": world.trained.rows[0]})
                wallet = bytes.fromhex(str(client.address)[2:])
            await world.request("POST", "/api/v1/inference?zq-query", node, json={"model_id": "zq-model"})
        # The node has stopped, so all of them are here.
        found = collector.spans()

    roots = [span for span in found if not span.parent_span_id]
    ran = next(span for span in roots if span.name == "/api/v1/inference/run")
    assert attributes(ran)["http.response.status_code"] == 200
    inside = [span for span in found if span.parent_span_id == ran.span_id]
    assert [span.name for span in sorted(inside, key=lambda one: one.end_time_unix_nano)] == STEPS
    refused = next(span for span in roots if span.name == "/api/v1/inference")
    assert attributes(refused)["divault.code"] == "bad_request"
    assert {name for span in found for name in attributes(span)} <= ATTRIBUTES
    assert nothing_of(b"zq-query", b"zq-model", model.encode(), wallet, wallet.hex().encode(), raw=collector.raw)
    assert nothing_of(_revealed(key), raw=collector.raw)


def nothing_of(*told: bytes, raw: list[bytes]) -> bool:
    return not any(one in part.lower() for one in told for part in raw)


def _revealed(key: Secret) -> bytes:
    return key.reveal()
