"""The outermost layer: what is decided about a request before anybody reads it.

A plain ASGI callable, in front of everything else: counts the peer's requests, bounds the body (declared and real) and
the bytes that all requests hold together, and hands the body on whole. Deny by default: a request that breaks a bound
never reaches a route. Bytes count from when they are here, and who stops sending them is dropped: otherwise a few
silent connections that promise large bodies would keep everybody else out. They count until the run that needs them has
ended, and not until its answer is read: a few who don't read would do the same.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Any, Self

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from divault.api.problems import problem_response
from divault.errors import BadRequest, DivaultError, TooLarge
from divault.limits import BytesInFlight, PeerLimits
from divault.telemetry import new_request_id

PATIENCE_S = 10.0
"""Longest silence within a body, and what it may take beside its bytes at the least rate."""
BODY_DONE = "divault.body_done"
"""Member of the ASGI scope: to be called when nobody needs the request's body any more, whose bytes are free then."""
_LEAST_RATE = 32 * 1024  # bytes per second; a telephone's worst uplink has twice as many
_LOOKS = 20  # at silent bodies, within the longest silence
_STEP = 64 * 1024  # bytes counted at once; what a server reads from a socket
_READ_ON_S, _READ_ON_BYTES = 5.0, 64 << 20
"""Of a body that is too large: who sends all of it before he reads would otherwise see a broken connection only."""


class Guard:
    """Limits in front of `app`: at most `max_body_bytes` per body, and `limits` per peer and in total."""

    def __init__(
        self, app: ASGIApp, *, limits: PeerLimits, max_body_bytes: int, patience_s: float = PATIENCE_S
    ) -> None:
        self._app = app
        self._limits = limits
        self._max = max_body_bytes
        self._patience = Patience(patience_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with self._limits.bytes_in_flight() as held:
            try:
                self._limits.knock(scope["client"][0] if scope.get("client") else "")
                self._check_head(scope["headers"])
                replay = _replay(await self._read(receive, held), receive)
            except ClientDisconnect:
                return  # there is nobody to tell
            except TooLarge as err:
                await self._refuse_early(problem_response(err, new_request_id(), scope["path"]), scope, receive, send)
                return
            except DivaultError as err:
                await problem_response(err, new_request_id(), scope["path"])(scope, receive, send)
                return
            except TimeoutError:
                late = BadRequest("the body came too slowly, or not at all: send the request again")
                response = problem_response(late, new_request_id(), scope["path"])
                response.headers["connection"] = "close"  # what may still come is no next request
                await response(scope, receive, send)
                return
            scope[BODY_DONE] = held.give_back
            await self._app(scope, replay, send)

    async def _refuse_early(self, response: Response, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer at once, and end the answer when the body has ended too, or is given up."""

        async def send_open(message: Message) -> None:
            """Send, and leave the answer open."""
            if message["type"] == "http.response.body":
                message["more_body"] = True
            await send(message)

        await response(scope, receive, send_open)
        if not any(name == b"expect" for name, _ in scope["headers"]):  # such a client waits to be asked for its body
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_READ_ON_S):
                    await _read_on(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _check_head(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        for name, value in headers:
            if name == b"content-encoding" and value.lower() != b"identity":
                raise BadRequest("send the body without content-encoding", field="content-encoding")
            if name == b"transfer-encoding" and value.lower() != b"chunked":
                raise BadRequest("the only transfer-encoding that is read is chunked", field="transfer-encoding")
            if name == b"content-length" and value.isdigit() and int(value) > self._max:
                raise self._too_large(int(value))

    async def _read(self, receive: Receive, held: BytesInFlight) -> bytes:
        """The whole body. Raises TimeoutError, ClientDisconnect, TooLarge, Overloaded."""
        body: bytes | bytearray = b""
        counted, more = 0, True
        with self._patience.of_reader() as reader:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                part = message.get("body", b"")
                body = _joined(body, part) if body else part
                if len(body) > self._max:
                    raise self._too_large(len(body))
                while counted < len(body):
                    held.take(_STEP)
                    counted += _STEP
                more = message.get("more_body", False)
                reader.goes_on(len(body))
        return bytes(body)

    def _too_large(self, size: int) -> TooLarge:
        return TooLarge(f"bodies are at most {self._max} bytes here", limit_bytes=self._max, have_bytes=size)


def _joined(body: bytes | bytearray, part: bytes) -> bytearray:
    if isinstance(body, bytes):
        body = bytearray(body)
    body += part
    return body


class Patience:
    """How long bodies are waited for: one timer for all of them, which most are not there long enough to meet."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._readers: dict[int, Reader] = {}
        self._next: asyncio.TimerHandle | None = None

    def of_reader(self) -> Reader:
        """A context that raises TimeoutError when its body does not go on."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("bodies are read in tasks")
        return Reader(self, task, asyncio.get_running_loop().time())

    def enter(self, reader: Reader) -> None:
        """Somebody waits for a body."""
        self._readers[id(reader)] = reader
        if self._next is None:
            self._look_again()

    def leave(self, reader: Reader) -> None:
        """He does not any more."""
        del self._readers[id(reader)]

    def _look_again(self) -> None:
        self._next = asyncio.get_running_loop().call_later(self.seconds / _LOOKS, self._look)

    def _look(self) -> None:
        self._next = None
        now = asyncio.get_running_loop().time()
        for reader in self._readers.values():
            if reader.latest < now and not reader.late:
                reader.late = True
                reader.task.cancel()
        if self._readers:
            self._look_again()


class Reader:
    """One body that is waited for."""

    __slots__ = ("_began", "_cancelled", "_patience", "late", "latest", "task")

    def __init__(self, patience: Patience, task: asyncio.Task[Any], now: float) -> None:
        self._patience = patience
        self._began = now
        self.task = task
        self.latest = now + patience.seconds
        self.late = False
        self._cancelled = task.cancelling()

    def goes_on(self, size: int) -> None:
        """So many bytes are here now."""
        whole = self._began + self._patience.seconds + size / _LEAST_RATE
        self.latest = min(asyncio.get_running_loop().time() + self._patience.seconds, whole)

    def __enter__(self) -> Self:
        self._patience.enter(self)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._patience.leave(self)
        if self.late and isinstance(error, asyncio.CancelledError) and self.task.uncancel() <= self._cancelled:
            raise TimeoutError from error


async def _read_on(receive: Receive) -> None:
    read = 0
    while read < _READ_ON_BYTES:
        message = await receive()
        read += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return


def _replay(body: bytes | None, receive: Receive) -> Receive:
    async def again() -> Message:
        """Give the body once, keeping nothing of it, and then what the server says."""
        nonlocal body
        if body is None:
            return await receive()
        given, body = body, None
        return {"type": "http.request", "body": given, "more_body": False}

    return again
