"""Frames between the gateway and a worker: typed, bounded, never pickle.

A frame is a u32 big-endian length and that many bytes of MessagePack: one of the structs below, by its `kind`.

1. The length is checked before anything is allocated.
2. Every frame carries 16 random bytes chosen by the gateway; an answer carries those of its question.
3. One question is under way at a time. A worker that speaks unasked, of something else, too much, in a shape that is
   none of these, or ends within a frame breaks the protocol and is killed.
4. Text and JSON inside an answer are a stranger's: bounded here, decoded into plain types, escaped where shown.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

import msgspec

from divault.models.descriptions import Description

VERSION = 1
HEADER = struct.Struct(">I")
ID_BYTES = 16
CONTROL_BYTES = 256 * 1024
"""Largest answer to anything but a run: a description with its schemas and example."""
SMALL_BYTES = 64 * 1024
MAX_DEPTH = 32
MAX_LEAVES = 2_000_000
"""Values in one answer; 16 MiB of numbers have fewer."""

Id = Annotated[bytes, msgspec.Meta(min_length=ID_BYTES, max_length=ID_BYTES)]
Word = Annotated[str, msgspec.Meta(max_length=100)]
Line = Annotated[str, msgspec.Meta(max_length=500)]


class ProtocolError(Exception):
    """The other side broke a rule of the wire; nothing it says counts any more."""


class _Frame(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    v: Annotated[int, msgspec.Meta(ge=VERSION, le=VERSION)]
    id: Id


class FileNote(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the model, in the order of the descriptors."""

    name: str
    size: int


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a worker gives up before it reads a byte of the model."""

    address_space: int
    """Bytes of RLIMIT_AS and RLIMIT_DATA."""
    open_files: int = 256


# --- questions ----------------------------------------------------------------------------------------------------


class Start(_Frame, frozen=True, tag="start"):
    """Confine yourself."""

    policy: Policy


class Load(_Frame, frozen=True, tag="load"):
    """Load the model in the descriptors from 4 on."""

    files: list[FileNote]
    threads: int


class Run(_Frame, frozen=True, tag="run"):
    """Predict; both are JSON values."""

    input: bytes
    parameters: bytes | None
    most: int
    """Largest answer in bytes."""


class Ping(_Frame, frozen=True, tag="ping"):
    """Answer that you live."""


# --- answers ------------------------------------------------------------------------------------------------------


class Ready(_Frame, frozen=True, tag="ready"):
    """Confined; what was tried and refused by the kernel, check by check."""

    level: Word
    checks: dict[Word, Word]


class Loaded(_Frame, frozen=True, tag="loaded"):
    """The model is in memory; `description` is the JSON of a `Description`."""

    description: bytes


class Result(_Frame, frozen=True, tag="result"):
    """The JSON of the answer, and the number of rows it answers."""

    result: bytes
    rows: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class Refused(_Frame, frozen=True, tag="refused"):
    """The input or the model is not acceptable; `data` is the JSON of the error's fields."""

    code: Word
    detail: Annotated[str, msgspec.Meta(max_length=2000)]
    data: bytes


class Failed(_Frame, frozen=True, tag="failed"):
    """The model raised: the type's name, and its text, escaped and cut."""

    type: Word
    text: Line


class Pong(_Frame, frozen=True, tag="pong"):
    """Alive."""


Question = Start | Load | Run | Ping
Reply = Ready | Loaded | Result | Refused | Failed | Pong
T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_questions = msgspec.msgpack.Decoder(Question)
_replies = msgspec.msgpack.Decoder(Reply)


def new_id() -> bytes:
    """16 bytes that nobody can guess."""
    return secrets.token_bytes(ID_BYTES)


def pack(frame: Question | Reply) -> bytes:
    """The frame with its length."""
    body = _encoder.encode(frame)
    return HEADER.pack(len(body)) + body


def read_question(body: bytes) -> Question:
    """A question of the gateway. Raises ProtocolError."""
    return _decoded(_questions, body)


def read_reply(body: bytes, expected: bytes) -> Reply:
    """An answer of a worker to the question with the id `expected`. Raises ProtocolError."""
    reply: Reply = _decoded(_replies, body)
    if reply.id != expected:
        raise ProtocolError("an answer to something that was not asked")
    return reply


def _decoded(decoder: msgspec.msgpack.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError) as err:
        raise ProtocolError(f"a frame of a wrong shape ({type(err).__name__})") from err


class Assembler:
    """Puts the pieces of a stream together into frames of at most `limit` bytes, which may change between frames."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The frames that are complete now. Raises ProtocolError for a length over the limit, before it is stored."""
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer)
            if length > self.limit:
                raise ProtocolError(f"a frame of {length} bytes, at most {self.limit} are taken")
            end = HEADER.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[HEADER.size : end])
            del self._buffer[:end]
            yield body

    @property
    def inside(self) -> bool:
        """True when the stream stands within a frame."""
        return bool(self._buffer)


def read_description(raw: bytes) -> Description:
    """The description in a `Loaded`. Raises ProtocolError."""
    found = _json(raw, Description)
    for part in (found.input_schema, found.output_schema, found.example):
        check_depth(part)
    return found


def check_result(raw: bytes) -> None:
    """Return if the bytes are one JSON value of finite numbers, no deeper than 32. Raises ProtocolError."""
    check_depth(_json(raw, Any))


def read_fields(raw: bytes) -> dict[str, Any]:
    """The error's fields in a `Refused`. Raises ProtocolError."""
    found: dict[str, Any] = _json(raw, dict[str, Any])
    check_depth(found)
    return found


def _json(raw: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as err:
        raise ProtocolError(f"JSON that is none ({type(err).__name__})") from err


def check_depth(value: Any) -> None:
    """Return if no container lies deeper than 32 and there are at most 2,000,000 values. Raises ProtocolError."""
    level = [value]
    leaves = 0
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for part in level:
            if type(part) is list:
                inner += part
            elif type(part) is dict:
                inner += part.values()
        leaves += len(inner)
        if not inner:
            return
        if leaves > MAX_LEAVES:
            raise ProtocolError(f"an answer of over {MAX_LEAVES} values")
        level = inner
    raise ProtocolError(f"an answer nested over {MAX_DEPTH} deep")
