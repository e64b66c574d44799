"""Frames between the gateway and a worker: a length, then a typed MessagePack struct. Never pickle.

Rules:

1. A frame is 4 bytes of big-endian length and that many bytes of MessagePack. The length is compared with the limit
   before anything is allocated for it.
2. Every request carries 16 random bytes; the answer must carry the same.
3. One request at a time; whatever a worker sends unasked breaks the rules. Only a run that asks for pieces is answered
   by any number of them before its answer, and only such a run can be told to stop.
4. A worker says how it is confined in a frame of its own, before it is told to load: what comes later may be forged.
5. The gateway takes every byte of a worker as hostile: typed decode, bounded texts, JSON checked again.
6. Who breaks a rule is killed with its process group, by the gateway; the callers get `ModelFailed`.
"""

from __future__ import annotations

import secrets
import select
import socket
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import orjson

from divault.errors import (
    DivaultError,
    InputInvalid,
    ModelFailed,
    SealedFileDamaged,
    SettingsInvalid,
    UnsupportedModel,
    from_code,
)
from divault.workers.strict_json import MAX_DEPTH, MAX_VALUES

HEAD = 4
MAX_ANSWER_BYTES = 16 << 20
MAX_RESULT_BYTES = MAX_ANSWER_BYTES - (64 << 10)
"""Of one caller: leaves room for what stands around it in the frame."""
MAX_REQUEST_BYTES = 64 << 20
"""What a worker takes."""
MAX_ITEM_BYTES = MAX_REQUEST_BYTES - (64 << 10)
"""Of one caller, input and parameters: leaves room for what stands around them in the frame."""
MAX_DESCRIPTION_BYTES = 256 << 10
MAX_TOGETHER = 1024
"""Callers of one pass."""
MAX_TEXT = 1000
MAX_PIECE = 1 << 16
"""Characters of a piece of an answer."""

_ONE_KIND, _NO_SHAPE = bytes.maketrans(b"{}", b"[]"), bytes(set(range(256)) - set(b'[]{},"'))
_PIECE_BYTES = 1 << 16

Id = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]


class Frame(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """What every frame carries."""

    id: Id
    v: Literal[1] = 1


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A memory file that the worker inherited."""

    name: str
    fd: int
    size: int


class Confine(Frame, frozen=True, tag="confine"):
    """Give up all that a worker doesn't need, before you are told of a model. Answered by Confined."""

    keep: list[int]
    """Descriptors of the files that you inherited."""
    memory_bytes: int
    """How much memory the worker may map beyond what an idle one needs."""
    level: Literal["strict", "standard", "off"] = "standard"
    """How far to confine yourself."""
    canary: str = ""
    """A file that everybody may read, to try whether you can."""
    namespaces: dict[str, str] = {}
    """Of the node, to compare yours with."""
    own_user: bool = False
    """Leave the node's user for one of your own."""


class Load(Frame, frozen=True, tag="load"):
    """Load the model of these files. Answered by Ready or Failed."""

    files: list[File]
    device: str
    dtype: str
    threads: int = 1
    """Of its numerical libraries."""
    allow_code: bool = False
    """Formats that carry code may run."""
    recognise: bool = False
    """Load nothing: say which template loads these files. Answered by Known or Failed."""


class Item(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One caller's JSON values, as their bytes stood in the request."""

    data: bytes
    parameters: bytes | None = None

    @property
    def size(self) -> int:
        """Bytes of both."""
        return len(self.data) + len(self.parameters or b"")


class Run(Frame, frozen=True, tag="run"):
    """Answer these callers. Answered by Answers, as many as there are items."""

    items: list[Item]
    pieces: bool = False
    """Send the one caller's answer in pieces first."""


class Stop(Frame, frozen=True, tag="stop"):
    """Nobody wants the rest of the run of this id: answer with what there is."""


class Ping(Frame, frozen=True, tag="ping"):
    """Say that you are there. Answered by Pong."""


class Problem(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="problem"):
    """An error of `divault.errors` by its code; `data` is a JSON object."""

    code: Annotated[str, msgspec.Meta(max_length=64)]
    detail: Text
    data: Annotated[bytes, msgspec.Meta(max_length=MAX_DESCRIPTION_BYTES)] = b"{}"


class Success(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="success"):
    """One caller's answer: a JSON value, and how many rows it covers."""

    result: bytes
    rows: Annotated[int, msgspec.Meta(ge=0, le=2**31)]


class Confined(Frame, frozen=True, tag="confined"):
    """The worker is confined, and has not read a byte of a model."""

    checks: Annotated[
        dict[Annotated[str, msgspec.Meta(max_length=40)], Literal["enforced", "not_enforced", "unknown"]],
        msgspec.Meta(max_length=100),
    ]
    """What its confinement holds, by name."""


class Ready(Frame, frozen=True, tag="ready"):
    """The model is loaded."""

    description: Annotated[bytes, msgspec.Meta(max_length=MAX_DESCRIPTION_BYTES)]
    """`models.base.Description` as JSON."""


class Known(Frame, frozen=True, tag="known"):
    """The format of these files is known."""

    template: Annotated[str, msgspec.Meta(max_length=40)]
    """As `models.base.ModelFormat.template`."""


class Failed(Frame, frozen=True, tag="failed"):
    """The model could not be loaded."""

    problem: Problem


class Answers(Frame, frozen=True, tag="answers"):
    """What came out, in the order of the items."""

    items: Annotated[list[Success | Problem], msgspec.Meta(max_length=MAX_TOGETHER)]


class Part(Frame, frozen=True, tag="part"):
    """A piece of the answer that is being made."""

    text: Annotated[str, msgspec.Meta(max_length=MAX_PIECE)]
    index: Annotated[int, msgspec.Meta(ge=0, le=MAX_PIECE)] = 0


class Pong(Frame, frozen=True, tag="pong"):
    """Here."""


Request = Confine | Load | Run | Stop | Ping
Reply = Confined | Ready | Known | Failed | Answers | Part | Pong
R = TypeVar("R", Confined, Ready, Known, Failed, Answers, Pong)

_requests = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)

LOAD_ERRORS: tuple[type[DivaultError], ...] = (UnsupportedModel, SealedFileDamaged, ModelFailed, SettingsInvalid)
RUN_ERRORS: tuple[type[DivaultError], ...] = (InputInvalid, ModelFailed)


def new_id() -> bytes:
    """16 bytes that nobody can guess."""
    return secrets.token_bytes(16)


def encode(frame: Request | Reply) -> bytes:
    """The frame with its length in front."""
    body = msgspec.msgpack.encode(frame)
    return len(body).to_bytes(HEAD, "big") + body


def escaped(text: str, limit: int) -> str:
    """At most `limit` printable ASCII characters of the text, everything else escaped; for text that a model made."""
    plain = text[:limit].encode("ascii", "backslashreplace").decode()
    shown = "".join(c if " " <= c <= "~" else f"\\x{ord(c):02x}" for c in plain)
    return shown[:limit]


def broken(how: str) -> ModelFailed:
    """The error for a worker that breaks a rule of this module."""
    return ModelFailed(f"the worker of the model broke the rules of its line: {how}", kind="protocol")


def decode_reply(body: bytes) -> Reply:
    """Raises ModelFailed for anything but exactly one well-formed reply."""
    try:
        return _replies.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        raise broken("its answer is malformed") from None


def expect(reply: Reply, kind: type[R]) -> R:
    """The reply, if it is of the kind that answers the question. Raises ModelFailed."""
    if not isinstance(reply, kind):
        raise broken("its answer is of another kind than the question")
    return reply


def reported(problem: Problem, allowed: tuple[type[DivaultError], ...]) -> DivaultError:
    """The error that a worker reported, if it may report it; its texts are made printable. Raises ModelFailed."""
    error = from_code(problem.code, escaped(problem.detail, MAX_TEXT), _facts(problem.data))
    if type(error) not in allowed:
        raise broken("it reported an error that it can't have")
    return error


def _facts(raw: bytes) -> dict[str, Any]:
    """The data of an error: texts, and an example of what a model takes. Raises ModelFailed."""
    check_json(raw)
    data = orjson.loads(raw)
    if not isinstance(data, dict):
        raise broken("the data of an error is no object")
    found: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, str):
            found[name] = escaped(value, MAX_TEXT)
        elif name == "example" and isinstance(value, dict):
            found[name] = printable(value)
        else:
            raise broken("the data of an error is no text")
    return found


def printable(value: Any) -> Any:
    """The same value with all that is not printable in its texts escaped; letters of any language stay."""
    if isinstance(value, str):
        return value if value.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in value)
    if isinstance(value, list):
        return [printable(inner) for inner in value]
    if isinstance(value, dict):
        return {printable(key): printable(inner) for key, inner in value.items()}
    return value


def check_json(raw: bytes) -> None:
    """Return only if the bytes are one JSON value with finite numbers, within the bounds of `strict_json`.

    Raises ModelFailed.
    """
    # Cheap first: as many brackets as levels are no more than that many levels, and each value but the first of its
    # list or object has a comma. What a worker sends is parsed only when both are known to be within bounds.
    levels = raw.count(b"[") + raw.count(b"{")
    if levels > MAX_DEPTH or raw.count(b",") > MAX_VALUES:
        _check_shape(raw)
    try:
        orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise broken("its answer is not JSON") from None


def _check_shape(raw: bytes) -> None:
    """The same bounds for what stands outside of texts. Raises ModelFailed.

    Bytes alone are counted and replaced: objects of all that a hostile worker sends would take a second and a gigabyte.
    """
    if b"\\" in raw:
        raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")  # now each quotation mark begins or ends a text
    shape = b"".join(_outside_texts(raw))
    if max(shape.count(b","), shape.count(b"[")) > MAX_VALUES:
        raise broken(f"its answer has more than {MAX_VALUES} values")
    shape = shape.translate(None, b",")
    for _ in range(MAX_DEPTH):
        shape = shape.replace(b"[]", b"")  # the innermost level
        if not shape:
            return
    raise broken(f"its answer has more than {MAX_DEPTH} levels, or no end")


def _outside_texts(raw: bytes) -> Iterator[bytes]:
    """Commas and brackets, all of one kind, outside of texts; in pieces, so that little memory is taken at once."""
    inside = False
    for start in range(0, len(raw), _PIECE_BYTES):
        parts = raw[start : start + _PIECE_BYTES].translate(_ONE_KIND, _NO_SHAPE).split(b'"')
        yield b"".join(parts[inside::2])
        inside ^= len(parts) % 2 == 0


def send(connection: socket.socket, reply: Reply) -> None:
    """Send one reply whole, from the worker's end."""
    connection.sendall(encode(reply))


def stop_comes(connection: socket.socket) -> bool:
    """Whether the gateway has told the run under way to stop, or hung up; reads that order. At the worker's end."""
    if not select.select([connection], [], [], 0)[0]:
        return False
    return not isinstance(receive(connection), Run | Confine | Load | Ping)


def receive(connection: socket.socket) -> Request | None:
    """The next request at the worker's end; None when the gateway is gone. Raises ValueError for a malformed one."""
    head = _exactly(connection, HEAD)
    if head is None:
        return None
    length = int.from_bytes(head, "big")
    if length > MAX_REQUEST_BYTES:
        raise ValueError("a request over the limit")
    body = _exactly(connection, length)
    return None if body is None else _requests.decode(body)


def _exactly(connection: socket.socket, count: int) -> bytearray | None:
    buffer = bytearray(count)
    view = memoryview(buffer)
    while view:
        got = connection.recv_into(view)
        if not got:
            return None
        view = view[got:]
    return buffer
