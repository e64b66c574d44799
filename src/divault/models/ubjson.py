"""UBJSON as XGBoost writes it: read from strangers' bytes within bounds, and written.

Rules:

1. Lengths are 64-bit, lists say their count, arrays of one type are read as arrays. Nothing else is taken.
2. What a length claims must be there; values that become objects of Python are counted against the size of the file.

Source: https://ubjson.org, draft 12.

>>> read(write({"a": [1, "b"], "c": np.array([0.5], dtype=np.float32)}))
{'a': [1, 'b'], 'c': array([0.5], dtype='>f4')}
"""

from __future__ import annotations

import mmap
import struct
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from divault.errors import SealedFileDamaged

MAX_DEPTH = 16
"""Containers inside containers; a model has seven."""
FREE_VALUES = 100_000
BYTES_PER_VALUE = 16
"""Objects of Python that a file may become: this many, or one for so many of its bytes."""
_NUMBERS = {b"i": ">i1", b"U": ">u1", b"I": ">i2", b"l": ">i4", b"L": ">i8", b"d": ">f4", b"D": ">f8"}
_DTYPES = {mark: np.dtype(code) for mark, code in _NUMBERS.items()}
_MARKS = {dtype.newbyteorder("=").name: mark for mark, dtype in _DTYPES.items()}
_CONSTANTS = {b"Z": None, b"T": True, b"F": False}
_LENGTH = struct.Struct(">q")


def read(data: bytes | bytearray | mmap.mmap) -> Any:
    """The one value in `data`: arrays of one type as numpy arrays that lie in it. Raises SealedFileDamaged."""
    reader = _Reader(data)
    value = reader.value(reader.take(1), MAX_DEPTH)
    if reader.place != len(data):
        damaged("bytes after its end")
    return value


def damaged(what: str) -> NoReturn:
    """Raises SealedFileDamaged."""
    raise SealedFileDamaged(f"the UBJSON file is broken: {what}", stage="payload")


class _Reader:
    def __init__(self, data: bytes | bytearray | mmap.mmap) -> None:
        self._data = data
        self._left = max(FREE_VALUES, len(data) // BYTES_PER_VALUE)
        self.place = 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        self._check(count)
        self.place += count
        return bytes(self._data[self.place - count : self.place])

    def _check(self, count: int) -> None:
        if not 0 <= count <= len(self._data) - self.place:
            damaged("it ends too early")

    def value(self, mark: bytes, depth: int) -> Any:
        """The value whose type was just read."""
        self._left -= 1
        if self._left < 0 or depth == 0:
            damaged("too many values" if depth else "too deep")
        if mark in _DTYPES:
            return np.frombuffer(self.take(_DTYPES[mark].itemsize), _DTYPES[mark])[0].item()
        if mark in _CONSTANTS:
            return _CONSTANTS[mark]
        if mark == b"S":
            return self._text()
        if mark == b"{":
            return self._object(depth - 1)
        if mark == b"[":
            return self._array(depth - 1)
        damaged("a type that XGBoost does not write")

    def _length(self) -> int:
        return int(_LENGTH.unpack(self.take(8))[0])

    def _text(self) -> str:
        if self.take(1) != b"L":
            damaged("a text without a length")
        try:
            return self.take(self._length()).decode()
        except UnicodeDecodeError:
            damaged("a text that is not UTF-8")

    def _object(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while self._data[self.place : self.place + 1] != b"}":
            name = self._text()
            if name in found:
                damaged("a name that stands twice")
            found[name] = self.value(self.take(1), depth)
        self.take(1)
        return found

    def _array(self, depth: int) -> list[Any] | NDArray[Any]:
        mark = self.take(1)
        dtype = None
        if mark == b"$":
            dtype = _DTYPES.get(self.take(1))
            mark = self.take(1) if dtype else b""
        if mark != b"#" or self.take(1) != b"L":
            damaged("an array without a count, or of another type than numbers")
        count = self._length()
        if dtype is None:
            self._check(count)
            return [self.value(self.take(1), depth) for _ in range(count)]
        self._check(count * dtype.itemsize)
        self.place += count * dtype.itemsize
        return np.frombuffer(self._data, dtype, count, self.place - count * dtype.itemsize)


def write(value: Any) -> bytearray:
    """The bytes of a value made of dictionaries, lists, texts, numbers and arrays of them; a float in 32 bits."""
    out = bytearray()
    _write(value, out)
    return out


def _write(value: Any, out: bytearray) -> None:
    if isinstance(value, dict):
        out += b"{"
        for name, member in value.items():
            out += _counted(name)
            _write(member, out)
        out += b"}"
        return
    if isinstance(value, list):
        out += b"[#L" + _LENGTH.pack(len(value))
        for member in value:
            _write(member, out)
        return
    out += _array(value) if isinstance(value, np.ndarray) else _plain(value)


def _array(values: NDArray[Any]) -> bytes:
    mark = _MARKS[values.dtype.name]
    return b"[$" + mark + b"#L" + _LENGTH.pack(len(values)) + values.astype(_DTYPES[mark], copy=False).tobytes()


def _plain(value: str | float) -> bytes:
    if isinstance(value, str):
        return b"S" + _counted(value)
    return b"d" + struct.pack(">f", value) if isinstance(value, float) else b"L" + _LENGTH.pack(value)


def _counted(text: str) -> bytes:
    data = text.encode()
    return b"L" + _LENGTH.pack(len(data)) + data
