"""A gateway on loopback that answers honestly from a store, until a twist decides otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, urlsplit

from divault.errors import DivaultError
from divault.ipfs.cid import parse_cid
from divault.storage.local import LocalStore
from divault.storage.source import Form


@dataclass(frozen=True, slots=True)
class Ask:
    """A request as it came."""

    path: str
    form: Form
    ranges: tuple[range, ...]
    headers: dict[str, str]


class Line:
    """The connection, and how an answer is written to it."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self.sent = 0

    async def raw(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()
        self.sent += len(data)

    async def head(self, status: str, **headers: object) -> None:
        lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
        await self.raw("\r\n".join([*lines, "Connection: close", "", ""]).encode())

    async def ok(self, body: bytes, status: str = "200 OK", **headers: object) -> None:
        await self.head(status, Content_Length=len(body), **headers)
        await self.raw(body)


Twist = Callable[[Ask, bytes | None, Line], Awaitable[bool | None]]
"""Gets the honest body (None: 404); returns True when it has not answered itself."""


class FaultGateway:
    """Serves while it is open; `asks` and `sent` tell what clients did."""

    def __init__(self, store: LocalStore, twist: Twist | None = None) -> None:
        self.asks: list[Ask] = []
        self.sent = 0
        self._store, self._twist = store, twist
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, family=socket.AF_INET)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        line = Line(writer)
        try:
            await self._answer(_parse(await reader.readuntil(b"\r\n\r\n")), line)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            self.sent += line.sent
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _answer(self, ask: Ask, line: Line) -> None:
        self.asks.append(ask)
        body = self._honest(ask)
        if self._twist is not None and not await self._twist(ask, body, line):
            return
        if body is None:
            await line.ok(b"no such content", "404 Not Found")
        elif ask.form is Form.FILE and ask.ranges:
            first = ask.ranges[0].start
            await line.ok(body, "206 Partial Content", Content_Range=f"bytes {first}-{first + len(body) - 1}/*")
        else:
            await line.ok(body)

    def _honest(self, ask: Ask) -> bytes | None:
        try:
            cid = parse_cid(ask.path.removeprefix("/ipfs/"))
            return b"".join(self._store.pieces(cid, ask.ranges, ask.form))
        except DivaultError:
            return None


def _parse(head: bytes) -> Ask:
    first, *rest = head.decode().split("\r\n")
    url = urlsplit(first.split(" ")[1])
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest if line)}
    query = parse_qs(url.query)
    form = Form(query.get("format", ["file"])[0])
    bounds = query["entity-bytes"][0].split(":") if "entity-bytes" in query else None
    if form is Form.FILE and "range" in headers:
        bounds = headers["range"].removeprefix("bytes=").split("-")
    ranges = () if bounds is None else (range(int(bounds[0]), int(bounds[1]) + 1),)
    return Ask(url.path, form, ranges, headers)
