"""uvicorn's HTTP protocol, with the head and the body of an answer in one system call instead of two.

A write to a socket costs as much as reading and checking a small request does, and wakes the client each time.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_ENOUGH = 64 * 1024  # bytes, sent without waiting for more


class JoinedTransport:
    """The transport, for one who writes several times in a turn of the loop: sent as one when the turn ends."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
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
        """Send what was written, and close."""
        self.send()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class JoinedProtocol(HttpToolsProtocol):
    """For `uvicorn.Config(http=...)`."""

    transport: JoinedTransport  # type: ignore[assignment]  # it is told nothing of its own

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Part of asyncio.Protocol."""
        super().connection_made(JoinedTransport(transport))  # type: ignore[arg-type]

    def on_response_complete(self) -> None:
        """Part of uvicorn's protocol: the answer is written."""
        self.transport.send()
        super().on_response_complete()
