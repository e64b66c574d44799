"""Answers on a socket: head and body in one write, and everything else as uvicorn alone has it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from divault.api.joined import JoinedProtocol, JoinedTransport

Application = Callable[[Any, Any, Any], Awaitable[None]]
ASK = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nhi"


class Wire(asyncio.Transport):
    """Notes what is written, as it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []
        self.closing = False

    def writelines(self, parts: Any) -> None:
        self.sent.append(b"".join(parts))

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True


@asynccontextmanager
async def serving(app: Application) -> AsyncIterator[int]:
    config = uvicorn.Config(app, host="127.0.0.1", port=0, lifespan="off", log_level="error", http=JoinedProtocol)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await task


def answering(body: bytes, *more: bytes) -> Application:
    async def app(_: Any, receive: Any, send: Any) -> None:
        await receive()
        parts = [body, *more]
        length = str(sum(map(len, parts))).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        for number, part in enumerate(parts, 1):
            await send({"type": "http.response.body", "body": part, "more_body": number < len(parts)})

    return app


async def test_what_is_written_in_one_turn_leaves_in_one_piece() -> None:
    wire = Wire()
    joined = JoinedTransport(wire)
    joined.write(b"head")
    joined.write(b"")
    joined.write(b"body")
    assert wire.sent == []
    await asyncio.sleep(0)

    assert wire.sent == [b"headbody"]
    joined.write(b"more")
    joined.send()
    joined.write(b"last")
    joined.close()
    assert wire.sent == [b"headbody", b"more", b"last"]
    assert wire.closing


async def test_a_long_answer_does_not_wait_until_it_is_whole() -> None:
    wire = Wire()
    joined = JoinedTransport(wire)
    for _ in range(40):
        joined.write(b"x" * 4096)

    assert sum(map(len, wire.sent)) >= 2 * 64 * 1024


async def test_nothing_is_written_to_a_connection_that_is_gone() -> None:
    wire = Wire()
    joined = JoinedTransport(wire)
    joined.write(b"late")
    wire.closing = True
    await asyncio.sleep(0)

    assert wire.sent == []


@pytest.mark.parametrize("parts", [(b"",), (b"short",), (b"one", b"two"), (b"x" * 300_000, b"y")])
async def test_answers_come_whole_one_after_the_other_on_one_connection(parts: tuple[bytes, ...]) -> None:
    async with serving(answering(*parts)) as port, asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(ASK + ASK)  # the second before the first is answered
        for _ in range(2):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK")
            assert await reader.readexactly(sum(map(len, parts))) == b"".join(parts)
        writer.write(ASK.replace(b"host", b"connection: close\r\nhost"))
        assert (await reader.read()).endswith(b"".join(parts))
        writer.close()


async def test_what_is_no_http_is_told_so_and_the_connection_ends() -> None:
    async with serving(answering(b"never")) as port, asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"nonsense\r\n\r\n")
        answer = await reader.read()
        writer.close()

    assert answer.startswith(b"HTTP/1.1 400")


async def test_pieces_of_a_stream_come_as_they_are_made() -> None:
    go = asyncio.Event()

    async def app(_: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await go.wait()
        await send({"type": "http.response.body", "body": b"second"})

    async with serving(app) as port, asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(ASK)
        assert await reader.readuntil(b"first")
        go.set()
        assert await reader.readuntil(b"second")
        writer.close()
