"""The gateway's end of one worker's socket, under the rules of `wire`."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import cast

from divault.errors import ModelFailed
from divault.workers.wire import HEAD, MAX_ANSWER_BYTES, Part, Reply, Request, Stop, broken, decode_reply, encode


class Line(asyncio.Protocol):
    """The gateway's end of one worker's socket. `on_loss` is called once, when nothing can come any more."""

    def __init__(self, on_loss: Callable[[], None], max_answer_bytes: int = MAX_ANSWER_BYTES) -> None:
        self._on_loss = on_loss
        self._max = max_answer_bytes
        self._buffer = bytearray()
        self._question: bytes | None = None
        """Id of the request that is under way."""
        self._answered: Callable[[Reply | ModelFailed], None] | None = None
        self._on_part: Callable[[Part], None] | None = None
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
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

        def answered(reply: Reply | ModelFailed) -> None:
            if answer.done():
                return
            if isinstance(reply, ModelFailed):
                answer.set_exception(reply)
            else:
                answer.set_result(reply)

        self.post(request, answered)
        return await answer

    def post(
        self,
        request: Request,
        answered: Callable[[Reply | ModelFailed], None],
        on_part: Callable[[Part], None] | None = None,
    ) -> None:
        """Send the request; `answered` is called once, with its answer or why there is none.

        `on_part` gets the pieces before it; without one a piece breaks the rules. Raises ModelFailed when the line is
        of no use.
        """
        if self._end is not None or self._transport is None:
            raise self._end or broken("it is not connected")
        if self._answered is not None:
            raise RuntimeError("one request at a time")
        self._question, self._answered, self._on_part = request.id, answered, on_part
        self._transport.write(encode(request))

    def stop(self) -> None:
        """Ask for the end of the run that is under way; its answer comes all the same."""
        if self._transport is not None and self._question is not None and self._end is None:
            self._transport.write(encode(Stop(id=self._question)))

    def close(self) -> None:
        """Hang up at once."""
        self._finish(ModelFailed("the worker of the model was stopped", kind="crashed"))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio.Protocol."""
        self._transport = cast("asyncio.Transport", transport)  # of any event loop

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
        answered, self._answered, self._on_part = self._answered, None, None
        if answered is not None:
            answered(end)
        self._on_loss()

    def _take(self, data: bytes) -> None:
        if self._answered is None:
            self._finish(broken("it spoke unasked"))
            return
        self._buffer += data
        while self._end is None and len(self._buffer) >= HEAD:
            length = int.from_bytes(self._buffer[:HEAD], "big")
            if length > self._max:
                self._finish(broken(f"its answer has {length} bytes, {self._max} are allowed"))
            if len(self._buffer) < HEAD + length:
                return
            if self._answered is None:
                self._finish(broken("it sent more than one answer"))
                return
            body = bytes(memoryview(self._buffer)[HEAD : HEAD + length])
            del self._buffer[: HEAD + length]
            self._read(body)

    def _read(self, body: bytes) -> None:
        try:
            reply = decode_reply(body)
            if self._question is None or not secrets.compare_digest(reply.id, self._question):
                raise broken("its answer belongs to no question")
            if isinstance(reply, Part) and self._on_part is None:
                raise broken("it sent a piece of an answer that was asked for whole")
        except ModelFailed as err:
            self._finish(err)
            return
        if isinstance(reply, Part):
            if self._on_part is not None:
                self._on_part(reply)
            return
        if self._buffer:
            self._finish(broken("it sent more than one answer"))
            return
        answered, self._answered, self._on_part, self._question = self._answered, None, None, None
        if answered is not None:
            answered(reply)
