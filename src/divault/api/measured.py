"""The layer around everything: counts and times each request, and writes a line about it.

A line has the request's id, its route's template, status, code and milliseconds: never its path, query, body, signature
or who sent it. Successes are lines at the level DEBUG, refusals at INFO, faults of the node at ERROR.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from divault.metrics import Metrics
from divault.telemetry import log, new_request_id
from divault.traces import Traces, current

CODE_HEADER = b"divault-code"
"""Header of every error answer: its code, for programs that don't read the body."""
_ID_HEADER = b"x-request-id"
_METHODS = frozenset({"GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS"})
_log = log("api")


class Routes:
    """Templates of paths, so that counters have as many labels as there are routes."""

    def __init__(self, templates: Iterable[str]) -> None:
        self._plain: set[str] = set()
        self._patterns: list[tuple[re.Pattern[str], str]] = []
        for template in dict.fromkeys(templates):
            if "{" in template:
                self._patterns.append((re.compile(re.sub(r"\{\w+\}", "[^/]+", template)), template))
            else:
                self._plain.add(template)

    def template(self, path: str) -> str:
        """The template of the path; `other` for none."""
        if path in self._plain:
            return path
        return next((name for pattern, name in self._patterns if pattern.fullmatch(path)), "other")


class Measured:
    """Counts what `app` answers."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, routes: Routes, *, traces: Traces | None = None, verbose: bool = False
    ) -> None:
        """`verbose`: lines about successes too."""
        self._app = app
        self._traces = traces
        self._verbose = verbose
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen = _Seen(send)
        method = scope["method"] if scope["method"] in _METHODS else "other"
        trace = None if self._traces is None else self._traces.begin(method, _parent(scope))
        current.set(trace)
        began = time.perf_counter()
        try:
            await self._app(scope, receive, seen)
        finally:
            self._tell(scope, method, seen, time.perf_counter() - began)
            if trace is not None:
                trace.end(self._routes.template(scope["path"]), seen.status, seen.code, seen.id)

    def _tell(self, scope: Scope, method: str, seen: _Seen, seconds: float) -> None:
        route = self._routes.template(scope["path"])
        self._metrics.request(route, method, seen.status, seconds, seen.code)
        if seen.status < 400 and not self._verbose:  # making a line that nobody reads costs more than the rest
            return
        told = _log.debug if seen.status < 400 else _log.info if seen.status != 500 else _log.error
        told(
            "request",
            request_id=seen.id,
            route=route,
            method=method,
            status=seen.status,
            code=seen.code,
            milliseconds=round(seconds * 1e3, 3),
        )


def _parent(scope: Scope) -> dict[str, str]:
    """The headers that say which trace a request belongs to."""
    return {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in scope["headers"]
        if name in (b"traceparent", b"tracestate")
    }


class _Seen:
    """Passes an answer on, and remembers what it is. Status 499: the client left before there was one."""

    __slots__ = ("_send", "code", "id", "status")

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 499
        self.code: str | None = None
        self.id = ""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            for name, value in message["headers"]:
                if name == _ID_HEADER:
                    self.id = value.decode("latin-1")
                elif name == CODE_HEADER:
                    self.code = value.decode("latin-1")
            if not self.id:
                self.id = new_request_id()
                message = {**message, "headers": [*message["headers"], (_ID_HEADER, self.id.encode())]}
        await self._send(message)
