"""The strict ASCII armor of age (age v1 s5, RFC 7468 in its strict form).

Rules:

1. Whitespace before the BEGIN line and after the END line is skipped, at most 1 KiB each; nothing else may be there.
2. Lines end with LF or CRLF; all have 64 characters but the last, which has 1 to 64 and carries the padding.
3. Base64 must be canonical.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from typing import NoReturn

from divault.errors import SealedFileDamaged
from divault.vault.streams import Reader, fill

BEGIN = b"-----BEGIN AGE ENCRYPTED FILE-----"
END = b"-----END AGE ENCRYPTED FILE-----"
_COLUMNS = 64
_MAX_OUTSIDE = 1024
"""Go's reader allows the same amount."""
_READ = 64 * 1024
_FULL_LINES = re.compile(rb"(?:[A-Za-z0-9+/]{64}\r?\n)+")


class ArmorReader:
    """A source that gives the bytes inside the armor of another source.

    Raises SealedFileDamaged (stage `armor`) from `readinto`, as soon as the armor breaks a rule.
    """

    def __init__(self, source: Reader) -> None:
        self._source = source
        self._text = b""
        self._at = 0
        self._begun = self._ended = self._short = False
        self._decoded = memoryview(b"")

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Bytes put into the buffer, 0 after the END line."""
        if not self._begun:
            self._begin()
        while not self._decoded and not self._ended:
            self._decoded = memoryview(self._full_lines() or self._last_line())
        count = min(len(buffer), len(self._decoded))
        buffer[:count] = self._decoded[:count]
        self._decoded = self._decoded[count:]
        return count

    def _more(self) -> bool:
        block = bytearray(_READ)
        count = fill(self._source, memoryview(block))
        self._text = self._text[self._at :] + bytes(block[:count])
        self._at = 0
        return count > 0

    def _line(self) -> bytes:
        """The next line without its end; what is left when the source has ended."""
        while (end := self._text.find(b"\n", self._at)) < 0 and self._more():
            if len(self._text) > 2 * _READ:
                _refuse("a line is not 64 characters long")
        line = self._text[self._at : end if end >= 0 else None]
        self._at = end + 1 if end >= 0 else len(self._text)
        return line.removesuffix(b"\r")

    def _begin(self) -> None:
        self._more()
        self._at = len(self._text) - len(self._text.lstrip())
        if self._at > _MAX_OUTSIDE:
            _refuse("more than 1 KiB of space stands before it")
        if self._line() != BEGIN:
            _refuse("its first line is not BEGIN AGE ENCRYPTED FILE")
        self._begun = True

    def _full_lines(self) -> bytes:
        """What the full lines at hand hold, many at a time: 64 characters without padding are canonical as they are."""
        run = _FULL_LINES.match(self._text, self._at)
        if self._short or run is None:
            return b""
        self._at = run.end()
        return b64decode(run[0].translate(None, b"\r\n"))

    def _last_line(self) -> bytes:
        """What a line holds that is short, or that waited for the next block; empty at the END line."""
        line = self._line()
        if line == END:
            self._finish()
            return b""
        if self._short or not 0 < len(line) <= _COLUMNS:
            _refuse("a line is not 64 characters long, or the END line is missing")
        self._short = len(line) < _COLUMNS or line.endswith(b"=")
        return _decode(line)

    def _finish(self) -> None:
        self._ended = True
        self._more()
        if len(self._text) > _MAX_OUTSIDE or self._text.strip():
            _refuse("something follows its END line")


def _decode(line: bytes) -> bytes:
    try:
        data = b64decode(line, validate=True)
    except Base64Error:
        _refuse("a line is not base64")
    if b64encode(data) != line:
        _refuse("a line is not canonical base64")
    return data


def _refuse(what: str) -> NoReturn:
    raise SealedFileDamaged(f"the ASCII armor of the sealed file is malformed: {what}", stage="armor")
