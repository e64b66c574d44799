"""uvicorn's HTTP protocol, with four changes.

1. What is no body is bounded: the head of a request, what frames the chunks of its body, and what follows them. uvicorn
   collects it without end, at a cost that grows with its square, and before anybody is counted. And a head has to be
   there in time.
2. The head and the body of an answer leave in one system call instead of two: a write to a socket costs as much as
   reading and checking a small request does, and wakes the client each time.
3. What it refuses before anybody else sees it is told to whoever counts refusals.
4. Who doesn't read his answer is not waited for without end: what he was sent would stay in memory as long as he likes,
   16 MB and more of it, whether the connection is to be closed or not.
"""

from __future__ import annotations

import asyncio
import fcntl
import sys
import termios
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
"""Of a request's head; some more where it comes at once. Signed headers with their token take 2 to 6 kB."""
HEAD_PATIENCE_S = 10.0
"""Until a head has come, from the first byte of a connection, or of a further request on it."""
READER_PATIENCE_S = 180.0
"""How long an answer waits for a reader who takes next to nothing of it.

He seems to take nothing between two leaps: a machine whose receive buffer was full takes more when a good part of it is
free again: on Linux 80 to 127 KiB of the buffer it begins with, up to 640 KiB of one that a fast start made grow. One
such leap has to fit in: who reads 4 kB/s is not cut off, and 1 kB/s is enough where the buffer did not grow.
"""
_LEAST_READ = 8 * 1024  # bytes in that time: less than such a leap, and enough for 16 MB to end some day
_FRAMING = 8  # bytes around each byte of a body, at most: one in a chunk of its own takes six
_ENOUGH = 64 * 1024  # bytes, sent without waiting for more


class JoinedTransport:
    """The transport, for one who writes several times in a turn of the loop: sent as one when the turn ends."""

    def __init__(self, transport: asyncio.Transport, closed: Callable[[], None]) -> None:
        self._transport = transport
        self._closed = closed
        self._parts: list[bytes] = []
        self._size = 0

    def write(self, data: bytes) -> None:
        """Send the data, at the latest when this turn of the loop ends."""
        if not data:
            return
        if not self._parts:
            asyncio.get_running_loop().call_soon(self.send)
        self._parts.append(data)
        self._size += len(data)
        if self._size > _ENOUGH:  # so that the transport says when its reader is slow
            self.send()

    def send(self) -> None:
        """Send what was written, now."""
        parts, self._parts, self._size = self._parts, [], 0
        if parts and not self._transport.is_closing():
            self._transport.writelines(parts)

    def close(self) -> None:
        """Send what was written, and close when all of it has left; `closed` is called now."""
        if self._transport.is_closing():
            return
        self.send()
        self._transport.close()
        self._closed()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Connection(HttpToolsProtocol):
    """For `uvicorn.Config(http=...)`."""

    transport: JoinedTransport  # type: ignore[assignment]  # it is told nothing of its own
    head_patience_s = HEAD_PATIENCE_S
    _left = MAX_HEAD_BYTES
    """How many bytes may come that are no body."""
    _in_body = False
    """A head is here, and all of its request is not."""
    _late: asyncio.TimerHandle | None = None
    """Ends the connection, while a head is waited for."""
    reader_patience_s = READER_PATIENCE_S
    _slow: asyncio.TimerHandle | None = None
    """Looks whether the reader goes on, while an answer waits for him."""

    @classmethod
    def telling(cls, refused: Callable[[int, float], None]) -> type[Connection]:
        """The protocol that calls this with the status of each refusal, and how many seconds it was waited for."""
        return type(cls.__name__, (cls,), {"_refused": staticmethod(refused)})

    @staticmethod
    def _refused(status: int, seconds: float) -> None:
        """Nobody counts."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Part of asyncio.Protocol."""
        super().connection_made(JoinedTransport(transport, self._watch))  # type: ignore[arg-type]
        self._late = self.loop.call_later(self.head_patience_s, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """Part of asyncio.Protocol."""
        self._unset_keepalive_if_required()  # uvicorn leaves it running where the client reset the connection
        self._wait_no_more()
        self._watch_no_more()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Part of asyncio.Protocol: more waits to be read than should."""
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        """Part of asyncio.Protocol: he has read on."""
        if not self.transport.is_closing():  # where it is, the rest has to leave, too, and nobody else looks after it
            self._watch_no_more()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Part of asyncio.Protocol."""
        for at in range(0, len(data), MAX_HEAD_BYTES):
            if self.transport.is_closing():
                return
            part = data[at : at + MAX_HEAD_BYTES]
            self._left -= len(part)
            super().data_received(part)
            if self._left < 0:
                self._refuse(
                    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                    f"the head of a request has at most {MAX_HEAD_BYTES} bytes here",
                )
                return
        if self._in_body or self._left == MAX_HEAD_BYTES:
            self._wait_no_more()
        elif self._late is None:
            self._late = self.loop.call_later(self.head_patience_s, self._give_up)

    def send_400_response(self, msg: str) -> None:
        """Part of uvicorn's protocol: what came is no HTTP."""
        self._refuse(HTTPStatus.BAD_REQUEST, msg)

    def on_headers_complete(self) -> None:
        """Part of uvicorn's protocol: a head is here."""
        self._in_body = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Part of uvicorn's protocol: some of a body has come."""
        self._left = min(MAX_HEAD_BYTES, self._left + len(body) * (1 + _FRAMING))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Part of uvicorn's protocol: all of a request has come."""
        self._left, self._in_body = MAX_HEAD_BYTES, False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Part of uvicorn's protocol: the answer is written."""
        self.transport.send()
        super().on_response_complete()

    def _watch(self) -> None:
        """Look after the reader, if something waits for him."""
        if self._slow is None and self.transport.get_write_buffer_size():
            self._slow = self.loop.call_later(self.reader_patience_s, self._look, self._unread())

    def _watch_no_more(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None

    def _look(self, before: int) -> None:
        """End the connection if its reader has taken too little since so much was unread."""
        self._slow = None
        if not self.transport.get_write_buffer_size():
            return
        if before - self._unread() < _LEAST_READ:
            self.transport.abort()
        else:
            self._watch()

    def _unread(self) -> int:
        """Bytes that the client's machine has not taken yet: here, and in the kernel, which takes them in leaps."""
        here = int(self.transport.get_write_buffer_size())
        if not here:  # nobody waits, and the socket may be closed
            return 0
        queued = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return here + int.from_bytes(queued, sys.byteorder)

    def _wait_no_more(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._late = None
        if self._left == MAX_HEAD_BYTES:  # nothing was asked
            self.transport.close()
        else:
            waited = self.head_patience_s
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"the head of a request is waited for {waited:g} s", waited)

    def _refuse(self, status: HTTPStatus, why: str, waited_s: float = 0.0) -> None:
        """Say so, and end the connection."""
        if self.transport.is_closing():
            return
        if self._owes_another_answer():
            self.transport.close()
            return
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}",
            "content-type: text/plain; charset=utf-8",
            f"content-length: {len(why)}",
            "connection: close",
        )
        self.transport.write(("\r\n".join(head) + "\r\n\r\n" + why).encode())
        self.transport.close()
        self._refused(status.value, waited_s)

    def _owes_another_answer(self) -> bool:
        """Whether a word now would stand within an answer, or for that to an earlier request."""
        cycle = self.cycle
        return cycle is not None and not cycle.response_complete and (cycle.response_started or not cycle.more_body)
