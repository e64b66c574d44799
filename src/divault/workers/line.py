"""The gateway's end of one worker's socket, under the rules of `wire`."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

from divault.errors import ModelFailed
from divault.workers.wire import HEAD, MAX_ANSWER_BYTES, Reply, Request, broken, decode_reply, encode


class Line(asyncio.Protocol):
    """The gateway's end of one worker's socket. `on_loss` is called once, when nothing can come any more."""

    def __init__(self, on_loss: Callable[[], None], max_answer_bytes: int = MAX_ANSWER_BYTES) -> None:
        self._on_loss = on_loss
        self._max = max_answer_bytes
        self._buffer = bytearray()
        self._waiting: asyncio.Future[bytes] | None = None
        self._transport: asyncio.Transport | None = None
        self._end: ModelFailed | None = None

    @property
    def lost(self) -> bool:
        """True when the worker is gone or broke a rule."""
        return self._end is not None

    async def ask(self, request: Request) -> Reply:
        """Send the request and give its answer, whenever that comes: the deadline is the caller's.

        Raises ModelFailed, kind `protocol` or `crashed`. After that, and after a cancelled call, the line is of no use.
        """
        if self._end is not None or self._transport is None:
            raise self._end or broken("it is not connected")
        if self._waiting is not None:
            raise RuntimeError("one request at a time")
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(encode(request))
        try:
            reply = decode_reply(await self._waiting)
        finally:
            self._waiting = None
        if not secrets.compare_digest(reply.id, request.id):
            raise broken("its answer belongs to no question")
        return reply

    def close(self) -> None:
        """Hang up at once."""
        self._finish(ModelFailed("the worker of the model was stopped", kind="crashed"))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio.Protocol."""
        if isinstance(transport, asyncio.Transport):
            self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Part of asyncio.Protocol."""
        if self._end is None:
            self._take(data)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the signature is asyncio's
        """Part of asyncio.Protocol."""
        where = "in the middle of an answer" if self._buffer else "without an answer"
        self._finish(ModelFailed(f"the worker of the model ended {where}", kind="crashed"))

    def _finish(self, end: ModelFailed) -> None:
        if self._end is not None:
            return
        self._end = end
        self._buffer = bytearray()
        if self._transport is not None:
            self._transport.abort()
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(end)
        self._on_loss()

    def _take(self, data: bytes) -> None:
        if self._waiting is None or self._waiting.done():
            self._finish(broken("it spoke unasked"))
            return
        self._buffer += data
        if len(self._buffer) < HEAD:
            return
        length = int.from_bytes(self._buffer[:HEAD], "big")
        have = len(self._buffer) - HEAD
        if length > self._max:
            self._finish(broken(f"its answer has {length} bytes, {self._max} are allowed"))
        elif have > length:
            self._finish(broken("it sent more than one answer"))
        elif have == length:
            body = bytes(memoryview(self._buffer)[HEAD:])
            self._buffer = bytearray()
            self._waiting.set_result(body)
