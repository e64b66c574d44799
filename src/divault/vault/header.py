"""The header of an age file, read and written exactly as age v1 s3 says.

Rules:

1. LF only; the first line is `age-encryption.org/v1`; at least one stanza; then `--- ` and the MAC.
2. A stanza is `-> ` and one or more arguments of printable ASCII without spaces, then its body in unpadded canonical
   base64: lines of 64 characters and a last one that is shorter and may be empty.
3. Stanza types this program knows are held to their shape here, before any key is tried; unknown ones are skipped.
4. A header of more than 64 KiB is refused: that is over 600 recipients, and it is read before anybody proved anything.

>>> header = parse_header(encode_header((Stanza("grease", (), b""),), lambda covered: bytes(32)))
>>> header.stanzas[0].kind, len(header.mac)
('grease', 32)
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from divault.errors import SealedFileDamaged

VERSION_LINE = b"age-encryption.org/v1\n"
MAX_HEADER_BYTES = 64 * 1024
FILE_KEY_BYTES = 16
WRAPPED_KEY_BYTES = 32
MAX_WORK_FACTOR = 20
"""scrypt needs 2^factor KiB and as much time: 20 is 1 GiB and a few seconds. `age` writes 18, rage and pyrage
whatever takes a second (18 to 20 on machines of today); more lets a file exhaust the node that tries it."""

_ARGUMENT = re.compile(r"[!-~]+", re.ASCII)
_FACTOR = re.compile(r"[1-9][0-9]?", re.ASCII)
_BODY_COLUMNS = 64


@dataclass(frozen=True, slots=True)
class Stanza:
    """One way to the file key: its type, further arguments and body."""

    kind: str
    args: tuple[str, ...]
    body: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """A header that parsed. `covered` are the bytes under the MAC, `size` counts all of its bytes."""

    stanzas: tuple[Stanza, ...]
    covered: bytes
    mac: bytes
    size: int


def parse_header(data: bytes) -> Header:
    """The header at the start of `data`. Raises SealedFileDamaged (stage `header`)."""
    lines = _Lines(data)
    if lines.take() + b"\n" != VERSION_LINE:
        _refuse("its version line is not age-encryption.org/v1")
    stanzas: list[Stanza] = []
    while not (line := lines.take()).startswith(b"---"):
        stanzas.append(_stanza(line, lines))
    if not stanzas:
        _refuse("it has no recipient stanza")
    _check_known(stanzas)
    covered = data[: lines.position - len(line) - 1 + 3]
    return Header(tuple(stanzas), covered, _mac(line), lines.position)


def encode_header(stanzas: Sequence[Stanza], mac: Callable[[bytes], bytes]) -> bytes:
    """The bytes of a header; `mac` gets the bytes it has to cover and gives 32."""
    return _with_mac(VERSION_LINE + b"".join(map(_encode_stanza, stanzas)) + b"---", mac)


def extend_header(header: Header, stanzas: Sequence[Stanza], mac: Callable[[bytes], bytes]) -> bytes:
    """A header with further stanzas behind its own, which stay byte for byte; `mac` as in `encode_header`."""
    covered = header.covered[:-3] + b"".join(map(_encode_stanza, stanzas)) + b"---"
    return _with_mac(covered, mac)


def encode_base64(data: bytes) -> bytes:
    """Standard alphabet, no padding."""
    return b64encode(data).rstrip(b"=")


def decode_base64(text: bytes) -> bytes:
    """The inverse, for canonical text only. Raises SealedFileDamaged (stage `header`)."""
    try:
        data = b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except Base64Error:
        _refuse("a base64 text in it is malformed")
    if encode_base64(data) != text:
        _refuse("a base64 text in it is not canonical")
    return data


class _Lines:
    """Lines of a header in turn, without their LF."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def take(self) -> bytes:
        """The next one. Raises SealedFileDamaged when none ends within the limit."""
        end = self._data.find(b"\n", self.position, MAX_HEADER_BYTES)
        if end < 0:
            _refuse(f"it does not end within {min(len(self._data), MAX_HEADER_BYTES)} bytes")
        line = self._data[self.position : end]
        self.position = end + 1
        return line


def _stanza(line: bytes, lines: _Lines) -> Stanza:
    words = line.decode("latin-1").split(" ")
    if words[0] != "->" or len(words) < 2 or not all(map(_ARGUMENT.fullmatch, words)):
        _refuse("a stanza must start with '-> ' and arguments of printable ASCII")
    body = bytearray()
    while True:
        text = lines.take()
        if len(text) > _BODY_COLUMNS:
            _refuse("a line of a stanza's body is over 64 characters")
        body += decode_base64(text)
        if len(text) < _BODY_COLUMNS:
            return Stanza(words[1], tuple(words[2:]), bytes(body))


def _mac(line: bytes) -> bytes:
    mac = decode_base64(line[4:])
    if line[:4] != b"--- " or len(mac) != 32:
        _refuse("its MAC line is malformed")
    return mac


def _check_known(stanzas: Sequence[Stanza]) -> None:
    for stanza in stanzas:
        if stanza.kind in ("X25519", "scrypt") and len(stanza.body) != WRAPPED_KEY_BYTES:
            _refuse("a wrapped file key is not 32 bytes long")
        if stanza.kind == "X25519":
            _check_argument(stanza, 1, 32)
        if stanza.kind == "scrypt":
            _check_argument(stanza, 2, 16)
            _check_factor(stanza.args[1])
            if len(stanzas) > 1:
                _refuse("a passphrase stanza must stand alone")


def _check_argument(stanza: Stanza, count: int, size: int) -> None:
    if len(stanza.args) != count or len(decode_base64(stanza.args[0].encode())) != size:
        _refuse(f"the arguments of a {stanza.kind} stanza are malformed")


def _check_factor(text: str) -> None:
    if not _FACTOR.fullmatch(text):
        _refuse("its scrypt work factor is malformed or far too large")
    if int(text) > MAX_WORK_FACTOR:
        _refuse(f"its scrypt work factor is {text}, and this program stops at {MAX_WORK_FACTOR} (1 GiB of memory)")


def _with_mac(covered: bytes, mac: Callable[[bytes], bytes]) -> bytes:
    return covered + b" " + encode_base64(mac(covered)) + b"\n"


def _encode_stanza(stanza: Stanza) -> bytes:
    first = " ".join(("->", stanza.kind, *stanza.args)).encode() + b"\n"
    return first + b"".join(line + b"\n" for line in _columns(encode_base64(stanza.body)))


def _columns(text: bytes) -> Iterator[bytes]:
    """Lines of 64 and a shorter last one, which is empty when the text fills its lines."""
    for start in range(0, len(text) + 1, _BODY_COLUMNS):
        yield text[start : start + _BODY_COLUMNS]


def _refuse(what: str) -> NoReturn:
    raise SealedFileDamaged(f"the header of the sealed file is malformed: {what}", stage="header")
