"""Frames between gateway and worker: any bytes are one well-formed answer to the question, or a typed error."""

from __future__ import annotations

import asyncio
import resource
import socket
import struct
from collections.abc import AsyncIterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from divault.errors import DivaultError, ModelFailed
from divault.workers import strict_json, wire
from divault.workers.line import Line

ID = bytes(range(16))
REPLIES: list[wire.Reply] = [
    wire.Pong(id=ID),
    wire.Answers(id=ID, items=[wire.Success(b"[1]", 1), wire.Problem("model_failed", "x", b'{"kind":"raised"}')]),
    wire.Confined(id=ID, checks={"mem_limit": "enforced"}),
    wire.Ready(id=ID, description=b"{}"),
    wire.Failed(id=ID, problem=wire.Problem("unsupported_model", "x")),
]
REQUESTS: list[wire.Request] = [
    wire.Ping(id=ID),
    wire.Confine(id=ID, keep=[4], memory_bytes=1),
    wire.Load(id=ID, files=[wire.File("model", 4, 10)], device="cpu", dtype="float32"),
    wire.Run(id=ID, items=[wire.Item(b"{}", None), wire.Item(b"{}", b"{}")]),
]


def body_of(frame: wire.Request | wire.Reply) -> bytes:
    return wire.encode(frame)[wire.HEAD :]


@pytest.mark.parametrize("reply", REPLIES, ids=lambda reply: type(reply).__name__)
def test_a_reply_arrives_as_it_was_sent(reply: wire.Reply) -> None:
    assert wire.decode_reply(body_of(reply)) == reply


@pytest.mark.parametrize("request_frame", REQUESTS, ids=lambda frame: type(frame).__name__)
def test_a_request_arrives_as_it_was_sent(request_frame: wire.Request) -> None:
    near, far = socket.socketpair()
    with near, far:
        near.sendall(wire.encode(request_frame))
        near.shutdown(socket.SHUT_WR)

        assert wire.receive(far) == request_frame
        assert wire.receive(far) is None


def test_a_request_over_the_limit_is_not_allocated() -> None:
    near, far = socket.socketpair()
    with near, far:
        near.sendall(struct.pack(">I", 2**32 - 1))
        with pytest.raises(ValueError, match="limit"):
            wire.receive(far)


def decoded(body: bytes) -> None:
    """Anything but a reply or ModelFailed of the kind `protocol` fails the test."""
    found: wire.Reply | ModelFailed
    try:
        found = wire.decode_reply(body)
    except ModelFailed as err:
        found = err
    if isinstance(found, ModelFailed):
        assert found.data["kind"] == "protocol"
    else:
        assert len(found.id) == 16


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_reply_or_a_broken_rule(body: bytes) -> None:
    decoded(body)


@given(st.sampled_from(REPLIES), st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3)), max_size=4), st.data())
@settings(max_examples=200, deadline=None)
def test_a_changed_reply_is_a_reply_or_a_broken_rule(
    reply: wire.Reply, changes: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    body = bytearray(body_of(reply))
    for place, new in changes:
        body[place % len(body) : place % len(body) + len(new)] = new
    decoded(bytes(body[: data.draw(st.integers(0, len(body)))]))


@pytest.mark.parametrize(
    "body",
    [
        b"\xc1", b"\xc7\x01\x01\x00", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
        b"\x91" * 1_000_000, msgspec.msgpack.encode([1]),
        msgspec.msgpack.encode({"kind": "pong", "id": ID, "v": 2}),
        msgspec.msgpack.encode({"kind": "pong", "id": ID + b"x", "v": 1}),
        msgspec.msgpack.encode({"kind": "pong", "id": ID, "v": 1, "more": 1}),
        msgspec.msgpack.encode({"kind": "run", "id": ID, "v": 1, "items": []}),
        msgspec.msgpack.encode({"kind": "confined", "id": ID, "v": 1, "checks": {"a": "perhaps"}}),
        msgspec.msgpack.encode({"kind": "ready", "id": ID, "v": 1, "description": b"", "checks": {}}),
        msgspec.msgpack.encode({"kind": "answers", "id": ID, "items": [{"kind": "success", "result": "x", "rows": 1}]}),
        body_of(REPLIES[0]) + b"\0", body_of(REPLIES[0])[:-1],
    ],
)  # fmt: skip
def test_what_is_no_reply_is_refused(body: bytes) -> None:
    with pytest.raises(ModelFailed):
        wire.decode_reply(body)


@given(st.text(max_size=64), st.text(max_size=100), st.binary(max_size=50) | st.just(b"{}"))
@settings(max_examples=150, deadline=None)
def test_a_reported_problem_is_an_allowed_error_with_printable_text(code: str, detail: str, data: bytes) -> None:
    for allowed in (wire.RUN_ERRORS, wire.LOAD_ERRORS):
        for word in (code, "model_failed", "access_denied"):
            try:
                error = wire.reported(wire.Problem(word, detail, data), allowed)
            except ModelFailed as broken:
                error = broken
            assert isinstance(error, allowed)
            assert error.detail.isascii()
            assert error.detail.isprintable()


@given(st.text(max_size=300), st.integers(1, 200))
@settings(max_examples=150, deadline=None)
def test_escaped_text_is_short_printable_ascii(text: str, limit: int) -> None:
    shown = wire.escaped(text, limit)

    assert len(shown) <= limit
    assert shown.isascii()
    assert shown.isprintable()


# --- JSON -----------------------------------------------------------------------------------------------------------

TEXTS = st.text(st.sampled_from('[]{},"\\\\\\x1f:1é') | st.characters(exclude_categories=("Cs",)), max_size=12)
NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(TEXTS, inner, max_size=9),
    max_leaves=30,
)


def nested(levels: int, pair: str = "[]", within: str = "") -> bytes:
    before, after = ('{"a":', "}") if pair == "{}" else pair
    return (before * levels + (within or "1") + after * levels).encode()


@given(st.lists(VALUES, max_size=12))
@settings(max_examples=150, deadline=None)
def test_whatever_a_worker_may_send_is_taken(value: object) -> None:
    wire.check_json(strict_json.dump(value, wire.MAX_RESULT_BYTES))


@pytest.mark.parametrize("within", ["1", '"]]]"', '"\\\\\\"[{"', '"\\\\\\\\"', "[]", '{"[":"]"}'])
@pytest.mark.parametrize("pair", ["[]", "{}"])
def test_as_many_levels_are_taken_as_may_be_sent(pair: str, within: str) -> None:
    inside = within[0] in "[{"
    wire.check_json(nested(strict_json.MAX_DEPTH - inside, pair, within))
    wire.check_json(b'["' + b"[" * 10_000 + b'"]')

    for levels in (1, 2, 300, 5000):
        with pytest.raises(ModelFailed, match="32 levels"):
            wire.check_json(nested(strict_json.MAX_DEPTH - inside + levels, pair, within))


def test_as_many_values_are_taken_as_may_be_sent() -> None:
    most = strict_json.MAX_VALUES
    wire.check_json(strict_json.dump([0.5] * (most - 1), wire.MAX_RESULT_BYTES))
    wire.check_json(strict_json.dump({"text": ',"' * 4_000_000}, wire.MAX_RESULT_BYTES))
    wire.check_json(strict_json.dump([",[" * 20_000, *[[]] * 40], wire.MAX_RESULT_BYTES))


@pytest.mark.parametrize("value", [b"1", b"[]", b"{}", b'","', b'"\\\\"', b'{"a":[[]]}', b'"' + b"," * 6 + b'"'])
def test_more_values_are_refused_and_never_made(value: bytes) -> None:
    raw = b"[" + (value + b",") * (strict_json.MAX_VALUES + 1) + b"1]"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelFailed, match="800000 values"):
        wire.check_json(raw)

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


# --- the gateway's end of a real socket -----------------------------------------------------------------------------


@pytest.fixture
async def line() -> AsyncIterator[tuple[Line, socket.socket, list[int]]]:
    """A line, the far end of its socket, and a list that grows when the line is lost."""
    near, far = socket.socketpair()
    losses: list[int] = []
    found = Line(lambda: losses.append(1), max_answer_bytes=1000)
    near.setblocking(False)
    await asyncio.get_running_loop().create_unix_connection(lambda: found, sock=near)
    yield found, far, losses
    found.close()
    far.close()
    await asyncio.sleep(0)


async def test_an_answer_in_pieces_is_one_answer(line: tuple[Line, socket.socket, list[int]]) -> None:
    near, far, losses = line
    asking = asyncio.create_task(near.ask(wire.Ping(id=ID)))
    for byte in wire.encode(wire.Pong(id=ID)):
        await asyncio.sleep(0)
        far.sendall(bytes([byte]))

    assert await asking == wire.Pong(id=ID)
    assert (near.lost, losses) == (False, [])


@pytest.mark.parametrize(
    ("sent", "how"),
    [
        (wire.encode(wire.Pong(id=bytes(16))), "no question"),
        (wire.encode(wire.Pong(id=ID)) * 2, "more than one"),
        (wire.encode(wire.Pong(id=ID)) + b"\0", "more than one"),
        (struct.pack(">I", 1001), "1001 bytes"),
        (struct.pack(">I", 2**32 - 1), "are allowed"),
        (struct.pack(">I", 0), "malformed"),
    ],
)
async def test_whatever_else_breaks_the_rules(
    line: tuple[Line, socket.socket, list[int]], sent: bytes, how: str
) -> None:
    near, far, _ = line
    asking = asyncio.create_task(near.ask(wire.Ping(id=ID)))
    await asyncio.sleep(0)
    far.sendall(sent)

    with pytest.raises(ModelFailed, match=how) as caught:
        await asking
    assert caught.value.data["kind"] == "protocol"


async def test_speaking_unasked_ends_the_line(line: tuple[Line, socket.socket, list[int]]) -> None:
    near, far, losses = line
    far.sendall(b"\0")
    while not losses:
        await asyncio.sleep(0.001)

    with pytest.raises(ModelFailed, match="unasked"):
        await near.ask(wire.Ping(id=ID))
    assert losses == [1]


@pytest.mark.parametrize("sent", [b"", b"\0\0", wire.encode(wire.Pong(id=ID))[:-1]])
async def test_the_end_of_the_stream_is_a_crash(line: tuple[Line, socket.socket, list[int]], sent: bytes) -> None:
    near, far, losses = line
    asking = asyncio.create_task(near.ask(wire.Ping(id=ID)))
    await asyncio.sleep(0)
    far.sendall(sent)
    far.close()

    with pytest.raises(DivaultError) as caught:
        await asking
    assert caught.value.data["kind"] == "crashed"
    assert losses == [1]
