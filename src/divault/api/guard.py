"""The outermost layer: what is decided about a request before anybody reads it.

A plain ASGI callable, in front of everything else: counts the peer's requests, bounds the body (declared and real) and
the bytes that all requests hold together, and hands the body on whole. Deny by default: a request that breaks a bound
never reaches a route.
"""

from __future__ import annotations

from contextlib import ExitStack

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from divault.api.problems import problem_response
from divault.errors import BadRequest, DivaultError, TooLarge
from divault.limits import PeerLimits
from divault.telemetry import new_request_id


class Guard:
    """Limits in front of `app`: at most `max_body_bytes` per body, and `limits` per peer and in total."""

    def __init__(self, app: ASGIApp, *, limits: PeerLimits, max_body_bytes: int) -> None:
        self._app = app
        self._limits = limits
        self._max = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with ExitStack() as held:
            try:
                self._limits.knock(scope["client"][0] if scope.get("client") else "")
                body = await self._read(scope, receive, held)
            except DivaultError as err:
                await problem_response(err, new_request_id())(scope, receive, send)
                return
            await self._app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive, held: ExitStack) -> bytes:
        headers = Headers(scope=scope)
        if headers.get("content-encoding", "identity") != "identity":
            raise BadRequest("send the body without content-encoding", field="content-encoding")
        declared = headers.get("content-length", "")
        # A chunked body declares no length: it holds the most it could, so that the total stays a bound.
        expected = int(declared) if declared.isdecimal() else self._max if "transfer-encoding" in headers else 0
        if expected > self._max:
            raise self._too_large(expected)
        held.enter_context(self._limits.bytes_in_flight(expected))
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise BadRequest("the request ended before its body did")
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self._max:
                raise self._too_large(size)
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)

    def _too_large(self, size: int) -> TooLarge:
        return TooLarge(f"bodies are at most {self._max} bytes here", limit_bytes=self._max, have_bytes=size)


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
