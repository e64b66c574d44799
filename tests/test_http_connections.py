"""Connections: heads that end soon enough, answers in one write, and everything else as uvicorn alone has it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
import uvloop

import divault.telemetry
from divault.api.connection import MAX_HEAD_BYTES, READER_PATIENCE_S, Connection, JoinedTransport
from divault.api.measured import Measured, Routes
from divault.metrics import Metrics
from divault.telemetry import configure_logs

pytestmark = pytest.mark.usefixtures("logs_as_before")

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


class Impatient(Connection):
    head_patience_s = 0.2


@asynccontextmanager
async def serving(app: Application, http: type[Connection] = Connection, **more: Any) -> AsyncIterator[int]:
    config = uvicorn.Config(app, host="127.0.0.1", port=0, lifespan="off", log_config=None, http=http, **more)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await task


async def reads_all(_: Any, receive: Any, __: Any) -> None:
    """Answers nothing."""
    while (await receive())["type"] != "http.disconnect":
        pass


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
    told: list[bool] = []
    joined = JoinedTransport(wire, lambda: told.append(wire.closing))
    joined.write(b"head")
    joined.write(b"")
    joined.write(b"body")
    assert wire.sent == []
    await asyncio.sleep(0)

    assert wire.sent == [b"headbody"]
    joined.write(b"more")
    joined.send()
    joined.write(b"last")
    assert told == []
    joined.close()
    joined.close()
    assert wire.sent == [b"headbody", b"more", b"last"]
    assert told == [True]


async def test_a_long_answer_does_not_wait_until_it_is_whole() -> None:
    wire = Wire()
    joined = JoinedTransport(wire, wire.close)
    for _ in range(40):
        joined.write(b"x" * 4096)

    assert sum(map(len, wire.sent)) >= 2 * 64 * 1024


async def test_nothing_is_written_to_a_connection_that_is_gone() -> None:
    wire = Wire()
    joined = JoinedTransport(wire, wire.close)
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


# --- readers ----------------------------------------------------------------------------------------------------------


class Hurried(Connection):
    reader_patience_s = 0.05


def noting(http: type[Connection], made: list[Connection]) -> type[Connection]:
    """The protocol, whose connections stand in the list."""

    class Noted(http):  # type: ignore[misc,valid-type]  # a class that is an argument
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            made.append(self)

    return Noted


async def unread(port: int, asked: bytes = ASK) -> socket.socket:
    """A connection that asked, and reads nothing by itself."""
    loop, own = asyncio.get_running_loop(), socket.socket()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    own.setblocking(False)
    await loop.sock_connect(own, ("127.0.0.1", port))
    await loop.sock_sendall(own, asked)
    return own


@pytest.mark.parametrize("more", [(), (b"y" * (1 << 20),) * 4], ids=["whole", "stream"])
@pytest.mark.parametrize("asked", [ASK, ASK.replace(b"host", b"connection: close\r\nhost")], ids=["keep", "close"])
async def test_an_answer_that_nobody_reads_is_not_kept_for_ever(more: tuple[bytes, ...], asked: bytes) -> None:
    made: list[Connection] = []
    app = answering(b"x" * (8 << 20), *more)
    async with serving(app, noting(Hurried, made)) as port, asyncio.timeout(20):
        silent = await unread(port, asked)
        while not made or made[0] in made[0].server_state.connections:
            await asyncio.sleep(0.01)
        silent.close()

    assert made[0].transport.is_closing()
    assert made[0].transport.get_write_buffer_size() == 0


async def test_who_reads_slowly_is_waited_for_and_who_stops_is_not() -> None:
    made: list[Connection] = []
    loop, read = asyncio.get_running_loop(), 0
    async with serving(answering(b"x" * (8 << 20)), noting(Connection, made)) as port, asyncio.timeout(20):
        slow = await unread(port)
        while not made or made[0]._slow is None:
            await asyncio.sleep(0.001)
        for _ in range(3):  # as if the patience had passed each time
            before = made[0]._unread()
            while made[0]._unread() > before - (256 << 10):
                read += len(await loop.sock_recv(slow, 1 << 16))
            made[0]._look(before)
            assert not made[0].transport.is_closing()
        made[0]._look(made[0]._unread())
        assert made[0].transport.is_closing()
        slow.close()

    assert 0 < read < 8 << 20


@pytest.mark.parametrize("reads", [True, False], ids=["reads", "stops"])
async def test_who_reads_8_kb_a_second_after_a_fast_start_is_waited_for(reads: bool) -> None:
    """Time runs 200 times as fast, and socket buffers are as the system has them: they are emptied in leaps."""
    made: list[Connection] = []
    ended: list[bool] = []  # by each look
    loop, own, read = asyncio.get_running_loop(), socket.socket(), 0

    class Faster(noting(Connection, made)):  # type: ignore[misc]
        reader_patience_s = READER_PATIENCE_S / 200

        def _look(self, before: int) -> None:
            super()._look(before)
            ended.append(self._slow is None)

    async with serving(of_any_length, Faster) as port, asyncio.timeout(30):
        own.setblocking(False)
        await loop.sock_connect(own, ("127.0.0.1", port))
        await loop.sock_sendall(own, asking(32 << 20))
        while read < 8 << 20:
            read += len(await loop.sock_recv(own, 1 << 18))
        began, slowly = loop.time(), 0
        while slowly < 3 << 20 and True not in ended:
            await asyncio.sleep(0.01)
            while reads and slowly < 200 * 8000 * (loop.time() - began):
                slowly += len(await loop.sock_recv(own, 8 << 10))
        own.close()

    assert ended[-1] is not reads
    assert len(ended) >= 2


async def test_nobody_looks_after_a_reader_who_has_read_all() -> None:
    made: list[Connection] = []
    async with serving(answering(b"x" * (8 << 20)), noting(Connection, made)) as port, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(ASK)
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(8 << 20)
        assert made[0]._slow is None
        made[0].timeout_keep_alive_handler()
        assert made[0]._unread() == 0
        writer.close()


async def of_any_length(scope: Any, receive: Any, send: Any) -> None:
    """Answers with as many bytes as the path says."""
    await answering(b"x" * int(scope["path"][1:]))(scope, receive, send)


def asking(size: int) -> bytes:
    return b"POST /%d HTTP/1.1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n" % size


async def taken_unread(port: int, made: list[Connection]) -> int:
    """How much of an answer leaves for one who reads nothing."""
    silent = await unread(port, asking(8 << 20))
    while not made or made[0]._slow is None:
        await asyncio.sleep(0.001)
    waits = made.pop().transport.get_write_buffer_size()
    silent.close()
    return (8 << 20) - waits


async def has_ended(connection: Connection) -> None:
    while connection in connection.server_state.connections:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("waits", [1 << 10, 60 << 10, 70 << 10, 300 << 10])
@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_however_little_of_a_last_answer_is_unread_it_is_not_kept_for_ever(loop: Any, waits: int) -> None:
    async def run() -> None:
        made: list[Connection] = []
        async with serving(of_any_length, noting(Hurried, made)) as port, asyncio.timeout(20):
            silent = await unread(port, asking(await taken_unread(port, made) + waits))
            while not made or made[0]._slow is None:
                await asyncio.sleep(0.001)
            assert 0 < made[0].transport.get_write_buffer_size() <= waits
            await has_ended(made[0])
            silent.close()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(run())


async def test_who_reads_all_of_his_last_answer_but_little_is_not_waited_for() -> None:
    made: list[Connection] = []
    loop = asyncio.get_running_loop()

    class Narrow(noting(Hurried, made)):  # type: ignore[misc]  # so that what waits is here, not in the kernel
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    async with serving(of_any_length, Narrow) as port, asyncio.timeout(20):
        silent = await unread(port, asking(200 << 10))
        while not made or made[0]._slow is None:
            await asyncio.sleep(0.001)
        while made[0].flow.write_paused:
            await loop.sock_recv(silent, 1 << 10)
        assert 0 < made[0].transport.get_write_buffer_size() < 64 << 10
        await has_ended(made[0])
        silent.close()


@pytest.mark.parametrize("asked", [ASK, asking(300 << 10)], ids=["keep", "close"])
async def test_nobody_looks_after_an_answer_that_leaves_at_once(asked: bytes) -> None:
    looks: list[int] = []

    class Noted(Connection):
        def _unread(self) -> int:
            looks.append(super()._unread())
            return looks[-1]

    async with serving(answering(b"x" * (300 << 10)), Noted) as port, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(asked)
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(300 << 10)
        writer.close()

    assert looks == []


@pytest.mark.parametrize("resets", [True, False], ids=["reset", "end"])
async def test_who_leaves_an_idle_connection_leaves_nothing_behind(resets: bool) -> None:
    made: list[Connection] = []
    wrong: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: wrong.append(context))
    app = answering(b"yes")
    async with serving(app, noting(Connection, made), timeout_keep_alive=0.1) as port, asyncio.timeout(10):
        idle = await unread(port)
        assert (await loop.sock_recv(idle, 1 << 16)).endswith(b"yes")
        idle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", resets, 0))
        idle.close()
        await asyncio.sleep(0.2)

    assert wrong == []
    assert made[0].timeout_keep_alive_task is None
    assert made[0]._slow is None


# --- heads ------------------------------------------------------------------------------------------------------------


async def ask(port: int, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """Everything that comes on a connection to which these parts are sent, until it ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause_s)
    except ConnectionError:  # it is over already
        pass
    answer = await reader.read()
    writer.close()
    return answer


def with_header(size: int) -> bytes:
    return b"GET / HTTP/1.1\r\nconnection: close\r\nx: " + b"a" * size + b"\r\n\r\n"


@pytest.mark.parametrize(
    "begin",
    [b"GET / HTTP/1.1\r\nx: ", b"GET /", b"GET / HTTP/1.1\r\n", b"\r\n"],
    ids=["value", "path", "fields", "blank"],
)
async def test_a_head_that_never_ends_ends_its_connection(begin: bytes) -> None:
    more = {b"GET / HTTP/1.1\r\n": b"a: b\r\n", b"\r\n": b"\r\n"}.get(begin, b"aaaa")
    sent = [begin, *([more * 2048] * 100)]
    async with serving(answering(b"never")) as port, asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(ConnectionError):
            for part in sent:
                writer.write(part)
                await writer.drain()
        with contextlib.suppress(ConnectionError):  # the answer, unless the rest of the head was in the way
            assert (await reader.read()).startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))
        writer.close()


@pytest.mark.parametrize(("size", "status"), [(MAX_HEAD_BYTES - 100, b"200"), (4 * MAX_HEAD_BYTES, b"431")])
async def test_a_head_has_64_kb(size: int, status: bytes) -> None:
    async with serving(answering(b"yes")) as port, asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(with_header(size))
        assert (await reader.readline()).split()[1] == status
        writer.close()


@pytest.mark.parametrize(
    "trailer", [b"0\r\nx: " + b"a" * 300_000, b"1;" + b"a" * 300_000], ids=["trailer", "extension of a chunk"]
)
async def test_what_frames_a_body_is_bounded_too(trailer: bytes) -> None:
    asked = b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n"
    done = asyncio.Event()

    async def reads_all(_: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        done.set()

    async with serving(reads_all) as port, asyncio.timeout(10):
        with contextlib.suppress(ConnectionError):
            await ask(port, asked, trailer)
        await done.wait()


async def test_a_body_in_chunks_of_one_byte_is_no_head() -> None:
    body = b"1\r\nx\r\n" * 100_000 + b"0\r\n\r\n"

    async def counting(_: Any, receive: Any, send: Any) -> None:
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
        told = b"%d" % size
        length = str(len(told)).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": told})

    async with serving(counting) as port, asyncio.timeout(20):
        asked = b"POST / HTTP/1.1\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
        assert (await ask(port, asked + body)).endswith(b"\r\n\r\n100000")


async def test_a_head_that_does_not_come_is_waited_for_so_long_and_no_longer() -> None:
    async with serving(answering(b"yes"), Impatient) as port, asyncio.timeout(10):
        assert await ask(port) == b""
        assert (await ask(port, b"GET / HTTP/1.1\r\nx: y\r\n")).startswith(b"HTTP/1.1 408")
        for begun in (b"GET /", b"\r\n"):
            first, _, second = (await ask(port, ASK, begun, pause_s=0.1)).partition(b"yes")
            assert first.startswith(b"HTTP/1.1 200")
            assert second.startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("more", [b"GET / HT", b"\x00\r\n\r\n"], ids=["begun", "no HTTP"])
async def test_an_answer_under_way_is_not_cut_by_a_word_about_the_next_request(more: bytes) -> None:
    async def slowly(_: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await asyncio.sleep(0.5)

    async with serving(slowly, Impatient) as port, asyncio.timeout(10):
        answer = await ask(port, ASK, more, pause_s=0.05)
    assert answer.count(b"HTTP/1.1") == 1
    assert b"408" not in answer
    assert b"400" not in answer


async def test_who_asks_in_time_is_not_cut_off_later() -> None:
    async def slowly(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.5)
        await answering(b"late")(scope, receive, send)

    async with serving(slowly, Impatient) as port, asyncio.timeout(10):
        asked = ASK.replace(b"host", b"connection: close\r\nhost")
        assert (await ask(port, asked[:30], asked[30:], pause_s=0.05)).endswith(b"late")


# --- what is counted of it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (b"\x16\x03\x01\x00no HTTP\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n", 400),
        (with_header(4 * MAX_HEAD_BYTES), 431),
        (b"GET / HTTP/1.1\r\nx: y\r\n", 408),
    ],
    ids=["garbage", "chunk", "long", "late"],
)
async def test_what_is_no_request_is_told_counted_and_logged(
    asked: bytes, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logs(None)
    measured = Measured(reads_all, Metrics(), Routes([]))
    async with serving(measured, Impatient.telling(measured.refused)) as port, asyncio.timeout(10):
        with contextlib.suppress(ConnectionError):  # the rest of the head may be in the way of the answer
            assert (await ask(port, asked)).startswith(b"HTTP/1.1 %d " % status)
    told = measured._metrics.text().decode()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    assert f'divault_requests_total{{method="other",route="other",status="{status}"}} 1.0' in told
    assert 'divault_refusals_total{code="bad_request"} 1.0' in told
    assert [(line["event"], line["code"]) for line in lines if line.get("status") == status] == [
        ("request", "bad_request")
    ]
    assert not any("library" in line for line in lines)


async def test_who_asks_well_or_just_leaves_is_no_refusal() -> None:
    refused: list[tuple[int, float]] = []
    protocol = Impatient.telling(lambda status, seconds: refused.append((status, seconds)))
    async with serving(answering(b"yes"), protocol) as port, asyncio.timeout(10):
        assert await ask(port) == b""
        assert b"yes" in await ask(port, ASK.replace(b"host", b"connection: close\r\nhost"))
    assert refused == []


async def test_a_flood_of_no_requests_is_counted_whole_and_fills_no_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure_logs(None)
    monkeypatch.setattr(divault.telemetry, "LINES_PER_SECOND", 3)
    measured = Measured(answering(b"never"), Metrics(), Routes([]))
    async with serving(measured, Connection.telling(measured.refused)) as port, asyncio.timeout(30):
        for _ in range(60):
            await ask(port, b"\x00\r\n\r\n")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    assert 'divault_refusals_total{code="bad_request"} 60.0' in measured._metrics.text().decode()
    assert 3 <= len(lines) < 40
    assert {line["route"] for line in lines} == {"other"}
