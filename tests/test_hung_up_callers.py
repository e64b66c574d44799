"""A client that hangs up ends its call and no other: a real HTTP server, real sockets and a real worker process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
import uvicorn
from starlette.responses import Response

from divault.api.envelope import Incoming
from divault.api.hot import HotRoutes
from divault.api.presence import Presence
from divault.errors import Overloaded
from divault.values import OpenedModel
from divault.workers.pool import WorkerPool
from tests.worker_models import call, hold, hostile, opened


@dataclass
class Server:
    port: int
    pool: WorkerPool
    model: OpenedModel
    ended: list[str] = field(default_factory=list)

    async def ask(self, *, leave_after_s: float | None = None) -> tuple[int, object] | None:
        """Status and body, or None where this client hung up."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"POST /run HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
        try:
            async with asyncio.timeout(leave_after_s):
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                return int(head.split()[1]), json.loads(await reader.readexactly(length))
        except TimeoutError:
            return None
        finally:
            writer.close()

    async def run(self, incoming: Incoming) -> Response:
        try:
            output = await self.pool.run(self.model, hold(self.model), call(self.model, incoming.raw))
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        except Overloaded:
            self.ended.append("refused")
            raise
        self.ended.append("answered")
        return Response(output.result)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    pool, model = WorkerPool(predict_timeout_s=10, load_timeout_s=60, tuning=hostile("count")), opened(b"any")
    await pool.load(model)
    made = Server(0, pool, model)

    async def nobody(scope, receive, send) -> None:
        raise AssertionError("another route")

    app = HotRoutes(nobody, {"/run": made.run}.get, Presence())
    config = uvicorn.Config(app, host="127.0.0.1", port=0, lifespan="off", log_level="error")
    http = uvicorn.Server(config)
    serving = asyncio.create_task(http.serve())
    while not http.started:
        await asyncio.sleep(0.01)
    made.port = http.servers[0].sockets[0].getsockname()[1]
    yield made
    http.should_exit = True
    await serving
    await pool.close()


async def test_of_eight_who_hang_up_at_most_one_is_run(server: Server) -> None:
    first = asyncio.create_task(server.ask())  # keeps the model busy for 0.1 s
    await asyncio.sleep(0.02)
    left = await asyncio.gather(*(server.ask(leave_after_s=0.01) for _ in range(8)))
    status, count = await server.ask() or (0, None)

    assert left == [None] * 8
    assert await first == (200, 1)
    assert status == 200
    assert count in (2, 3), "runs that the model saw: the first, the last, and one at most of the eight"
    assert server.ended.count("cancelled") >= 7


async def test_who_stays_is_answered_beside_those_who_leave(server: Server) -> None:
    stay = [asyncio.create_task(server.ask()) for _ in range(3)]
    leave = [asyncio.create_task(server.ask(leave_after_s=0.06)) for _ in range(5)]
    await asyncio.gather(*leave)

    assert min(count for _, count in filter(None, await asyncio.gather(*stay))) == 1
    assert all(found is not None and found[0] == 200 for found in await asyncio.gather(*stay))


async def test_a_client_that_stays_on_the_line_is_not_cancelled(server: Server) -> None:
    """Also beyond the age at which calls are looked at, and on one connection again and again."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    for number in range(1, 4):
        writer.write(b"POST /run HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert await reader.readexactly(1) == str(number).encode()
    writer.close()

    assert server.ended == ["answered"] * 3


async def test_of_400_at_once_all_are_told_something(server: Server) -> None:
    for _ in range(3):
        await server.ask()
    found = [one for one in await asyncio.gather(*(server.ask() for _ in range(400))) if one is not None]

    assert len(found) == 400
    assert {status for status, _ in found} == {200, 503}
    refused = [body for status, body in found if status == 503]
    assert all(body["code"] == "overloaded" and body["retry_after"] >= 1 for body in refused)  # type: ignore[index]
    assert len(found) - len(refused) <= 12, "who is let in waits 0.8 s at most: eight turns of 0.1 s"
