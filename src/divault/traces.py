"""Traces for OpenTelemetry: one span for a request, one for each step of a call. Off unless asked for.

Rules:

1. A span has the route's template, method, status, error code, request id and step: never a path, a body, a wallet, a
   key or a signature.
2. A caller's `traceparent` (W3C Trace Context) becomes the parent of the request's span. It decides nothing else: its
   sampling flag doesn't either, and `tracestate`, which may be any text, goes nowhere.
3. Spans leave in a thread of the library's, in batches; a collector that doesn't answer costs a call nothing, and a
   node that stops at most two seconds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from divault.errors import SettingsInvalid

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

_NAME = "divault"
_PATIENCE_S = 2.0
"""For what is left when a node stops."""


class Trace:
    """The span of one request that is under way."""

    __slots__ = ("_context", "_span", "_tracer")

    def __init__(self, tracer: Any, span: Any, context: Any) -> None:
        self._tracer = tracer
        self._span = span
        self._context = context

    def step(self, name: str, seconds: float) -> None:
        """A step that ended just now."""
        ended = time.time_ns()
        span = self._tracer.start_span(name, context=self._context, start_time=ended - int(seconds * 1e9))
        span.end(ended)

    def end(self, route: str, status: int, code: str | None, request_id: str) -> None:
        """The request was answered."""
        from opentelemetry.trace import StatusCode

        self._span.update_name(route)
        told = {"http.route": route, "http.response.status_code": status, "divault.request_id": request_id}
        self._span.set_attributes(told if code is None else told | {"divault.code": code})
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


current: ContextVar[Trace | None] = ContextVar("divault_trace", default=None)
"""The trace of the request that the running task is about."""


class Traces:
    """Begins traces, and hands them to `processor` when they have ended."""

    def __init__(self, processor: SpanProcessor) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON

        resource = Resource.create({"service.name": _NAME})
        self._provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer(_NAME)

    @classmethod
    def to(cls, endpoint: str) -> Traces:
        """Spans go to the OTLP collector at this URL, by HTTP. Raises SettingsInvalid where the extra is missing."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise SettingsInvalid(
                "DIVAULT_OTLP_ENDPOINT needs the extra otel: pip install 'divault[otel]'",
                setting="DIVAULT_OTLP_ENDPOINT",
            ) from None
        return cls(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))

    def begin(self, method: str, headers: Mapping[str, str]) -> Trace:
        """The span of a request, under the caller's if the headers name one."""
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(dict(headers))
        span = self._tracer.start_span(
            "request", context=parent, kind=SpanKind.SERVER, attributes={"http.request.method": method}
        )
        return Trace(self._tracer, span, set_span_in_context(span))

    def close(self) -> None:
        """Send what is left, as far as the collector takes it within two seconds. Blocking."""
        # The library's own time-out leaves a request that is under way alone; its thread ends with the process.
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(_PATIENCE_S)
