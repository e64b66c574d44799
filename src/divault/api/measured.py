"""The layer around everything: counts and times each request, writes a line about it, and lets a flood wait.

A line has the request's id, its route's template, status, code, milliseconds and the bytes of the answer's body: never
its path, query, body, signature or who sent it. Successes are lines at the level DEBUG, refusals at INFO (fifty a
second; all are counted), faults of the node at ERROR. A fault that reaches this layer ends here: it is logged without
its words (`telemetry`), which the server outside would print.

Who asks too often hears so after a while, when his request holds nothing any more: otherwise the next one would take
the time of those who wait for an answer.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Iterable
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from divault.api.problems import failure_response
from divault.errors import BadRequest, DivaultError
from divault.metrics import Metrics
from divault.telemetry import Lines, log, new_request_id
from divault.traces import Traces, current

CODE_HEADER = b"divault-code"
"""Header of every error answer: its code, for programs that don't read the body."""
STREAM_CODE = "divault.code"
"""Member of the ASGI scope: the code of an error that was told within an answer that had begun."""
TOO_OFTEN_S = 0.1
"""Until a 429 is sent: who heeds no `Retry-After` gets ten of them a second on a connection, not a thousand."""
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
        """`verbose`: lines about successes too, and about all refusals."""
        self._app = app
        self._traces = traces
        self._verbose = verbose
        self._metrics = metrics
        self._routes = routes
        self._lines = Lines()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen = _Seen(send)
        method = scope["method"] if scope["method"] in _METHODS else "other"
        trace = None
        if self._traces is not None:
            trace = self._traces.begin(method, _parent(scope))
            current.set(trace)
        began = time.perf_counter()
        try:
            await self._app(scope, receive, seen)
        except Exception as err:  # noqa: BLE001 - a fault of ours, which nobody outside may tell with its words
            await _end(err, seen, scope, receive)
        finally:
            seen.code = seen.code or scope.get(STREAM_CODE)
            route = self._routes.template(scope["path"])
            self._tell(route, method, seen, time.perf_counter() - began)
            if trace is not None:
                trace.end(route, seen.status, seen.code, seen.id)
        if seen.kept is not None:
            await asyncio.sleep(TOO_OFTEN_S)
            for message in seen.kept:
                await send(message)

    def refused(self, status: int, seconds: float) -> None:
        """Count what the server in front refused before it was a request, and write its line."""
        self._tell("other", "other", _Facts(status, BadRequest.code, new_request_id()), seconds)

    def _tell(self, route: str, method: str, seen: _Facts, seconds: float) -> None:
        self._metrics.request(route, method, seen.status, seconds, seen.code)
        good = seen.status < 400 and seen.code is None
        if good and not self._verbose:  # making a line that nobody reads costs more than the rest
            return
        if not good and seen.status != 500 and not self._verbose and not self._lines.one_more():
            return
        told = _log.debug if good else _log.info if seen.status != 500 else _log.error
        told(
            "request",
            request_id=seen.id,
            route=route,
            method=method,
            status=seen.status,
            code=seen.code,
            milliseconds=round(seconds * 1e3, 3),
            bytes=seen.bytes,
            **self._lines.unlogged(),
        )


async def _end(error: Exception, seen: _Seen, scope: Scope, receive: Receive) -> None:
    """Answer with the fault, if nothing was answered yet. An answer that has begun is left unfinished.

    The framework answers with a fault and then raises it again; that one was logged already.
    """
    if not seen.id:
        await failure_response(error, scope["path"])(scope, receive, seen)
    elif seen.code != DivaultError.code:
        _log.error("the answer broke off", request_id=seen.id, exc_info=error)
        seen.code = DivaultError.code


def _parent(scope: Scope) -> dict[str, str]:
    """The header that says which trace a request belongs to; `tracestate` is any text, and stays here."""
    found = [value for name, value in scope["headers"] if name == b"traceparent"]
    return {"traceparent": found[0].decode("latin-1")} if len(found) == 1 else {}


class _Facts:
    """What is told of an answer."""

    __slots__ = ("bytes", "code", "id", "status")

    def __init__(self, status: int, code: str | None, request_id: str) -> None:
        self.status = status
        self.code = code
        self.id = request_id
        self.bytes = 0


class _Seen(_Facts):
    """Passes an answer on, and remembers what it is. Status 499: the client left before there was one."""

    __slots__ = ("_send", "kept")

    def __init__(self, send: Send) -> None:
        super().__init__(499, None, "")
        self._send = send
        self.kept: list[Message] | None = None
        """All of an answer that is not passed on yet."""

    def __call__(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            for name, value in message["headers"]:
                if name == _ID_HEADER:
                    self.id = value.decode("latin-1")
                elif name == CODE_HEADER:
                    self.code = value.decode("latin-1")
            if not self.id:
                self.id = new_request_id()
                message["headers"] = [*message["headers"], (_ID_HEADER, self.id.encode())]
        else:
            self.bytes += len(message.get("body", b""))
        return self._send(message) if self.status != HTTPStatus.TOO_MANY_REQUESTS else self._keep(message)

    async def _keep(self, message: Message) -> None:
        self.kept = [*(self.kept or ()), message]
