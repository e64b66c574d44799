"""Tensors of the Open Inference Protocol, version 2, to JSON values and back.

Numbers come as JSON (flat, or nested as the shape says) or as the protocol's binary extension: little-endian bytes
behind the JSON, in the order of the inputs. Texts are BYTES tensors. What goes out is JSON too, or such bytes where
they are asked for.

A number that isn't finite has no JSON. A NaN is passed on as null, which is how models are told of a missing value; an
infinity is refused.

>>> read_tensor({"name": "x", "datatype": "INT64", "shape": [2, 2], "data": [1, 2, 3, 4]}, None)
b'[[1,2],[3,4]]'
>>> written_tensor("y", [[0.5, 1.5]])
{'name': 'y', 'datatype': 'FP64', 'shape': [1, 2], 'data': [0.5, 1.5]}
"""

from __future__ import annotations

import array
import math
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from math import prod
from typing import Any

import orjson

from divault.errors import InputInvalid

_CODES = {
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "FP32": "f",
    "FP64": "d",
    "BOOL": "B",
}
DATATYPES = (*_CODES, "FP16", "BYTES")
"""All that are read."""
_KINDS: dict[str, tuple[type, ...]] = {
    name: (int, float) if name.startswith("FP") else (int,) for name in (*_CODES, "FP16")
} | {"BOOL": (bool, int), "BYTES": (str,)}
_LARGEST = {"FP16": 65504.0, "FP32": (2 - 2**-23) * 2.0**127, "FP64": sys.float_info.max}
MAX_ELEMENTS = 4_000_000
"""Of one tensor: more than a body can hold as numbers."""
_MAX_AXES = 16
_PORTION = 16_384  # elements made at once: some milliseconds, in which no other thread can run
_Read = Callable[[int, int], list[Any]]
"""The elements of a tensor from here to there."""


def read_tensor(told: dict[str, Any], raw: bytes | None) -> bytes:
    """The JSON of the tensor's values, nested by its shape; `raw` are its bytes where the body has them.

    Raises InputInvalid, also for a shape with an axis of no elements behind the first one.
    """
    name = str(told.get("name"))[:80]
    shape: Any = told.get("shape")
    datatype: Any = told.get("datatype")
    if not _is_shape(shape):
        raise _invalid(name, "shape is a list of up to 16 whole numbers, none below 0")
    if datatype not in DATATYPES:
        raise _invalid(name, f"datatype is one of {', '.join(DATATYPES)}")
    if 0 in shape[1:]:
        raise _invalid(name, f"the shape {shape} has rows without elements")
    count = prod(shape)
    if count > MAX_ELEMENTS:
        raise _invalid(name, f"the shape has {count} elements, {MAX_ELEMENTS} are read")
    if raw is None:
        have, read = _of_json(name, datatype, told.get("data"), shape)
    elif told.get("data") is not None:
        raise _invalid(name, "send data, or bytes behind the JSON, not both")
    else:
        have, read = _of_bytes(name, datatype, raw)
    if have != count:
        raise _invalid(name, f"{have} values came where the shape {shape} has {count}")
    return _json(read, 0, shape)


def written_tensor(name: str, value: Any, datatype: str = "FP64") -> dict[str, Any]:
    """The tensor of a JSON value: numbers, truth values and texts as they are, anything else as texts of JSON.

    `datatype`: of a value without elements, which doesn't show one.
    """
    shape = _shape_of(value)
    flat = list(_flat(value, len(shape)))
    found = _datatype_of(flat) if flat else datatype
    return {"name": name, "datatype": found, "shape": shape or [1], "data": flat} if found else texts_of(name, value)


def texts_of(name: str, value: Any) -> dict[str, Any]:
    """The tensor of a list of whatever JSON has, or of a single value: a text of JSON for each."""
    value = value if isinstance(value, list) else [value]
    return {
        "name": name,
        "datatype": "BYTES",
        "shape": [len(value)],
        "data": [one if isinstance(one, str) else orjson.dumps(one).decode() for one in value],
    }


def bytes_of(tensor: dict[str, Any]) -> bytes:
    """The data of a written tensor as the protocol's bytes; in the tensor their number takes its place."""
    data, datatype = tensor.pop("data"), tensor["datatype"]
    if datatype == "BYTES":
        texts = [text.encode() for text in data]
        raw = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
    else:
        values = array.array(_CODES[datatype], data)
        if sys.byteorder == "big":
            values.byteswap()
        raw = values.tobytes()
    tensor["parameters"] = {"binary_data_size": len(raw)}
    return raw


def _is_shape(shape: Any) -> bool:
    return (
        isinstance(shape, list)
        and 0 < len(shape) <= _MAX_AXES
        and all(type(axis) is int and 0 <= axis < 2**31 for axis in shape)
    )


def _of_json(name: str, datatype: str, data: Any, shape: list[int]) -> tuple[int, _Read]:
    """How many elements there are, and how to read them. Raises InputInvalid for one that its datatype doesn't have."""
    if not isinstance(data, list):
        raise _invalid(name, "data is a list, or binary_data_size says how many bytes behind the JSON are its")
    flat: list[Any] = _flattened(name, data, shape) if any(type(one) is list for one in data) else data
    if not set(map(type, flat)) <= set(_KINDS[datatype]) or not _has_range(datatype, flat):
        raise _invalid(name, f"data holds something that {datatype} does not have")
    if datatype == "BOOL":
        flat = list(map(bool, flat))
    return len(flat), lambda begin, end: flat[begin:end]


def _flattened(name: str, data: list[Any], shape: list[int]) -> list[Any]:
    """The elements of nested lists. Raises InputInvalid where they are nested in another way than the shape says."""
    level: list[Any] = [data]
    for axis in shape:
        if not all(type(one) is list and len(one) == axis for one in level):
            raise _invalid(name, f"data is flat, or nested as the shape {shape} says")
        level = list(chain.from_iterable(level))
    return level


def _has_range(datatype: str, values: list[Any]) -> bool:
    """Whether a tensor of this type can hold these numbers."""
    if datatype == "BYTES" or not values:
        return True
    if datatype in _LARGEST:
        least, most = -_LARGEST[datatype], _LARGEST[datatype]
    elif datatype == "BOOL":
        least, most = 0, 1
    else:
        bits = 8 * array.array(_CODES[datatype]).itemsize
        least = 0 if datatype.startswith("U") else -(1 << bits - 1)
        most = least + (1 << bits) - 1
    return bool(least <= min(values) and max(values) <= most)


def _of_bytes(name: str, datatype: str, raw: bytes) -> tuple[int, _Read]:
    """How many elements there are, and how to read them, which raises InputInvalid for an infinity."""
    if datatype == "BYTES":
        texts = list(_texts(name, raw))
        return len(texts), lambda begin, end: texts[begin:end]
    size = 2 if datatype == "FP16" else array.array(_CODES[datatype]).itemsize
    if len(raw) % size:
        raise _invalid(name, "its bytes are no whole number of values")

    def read(begin: int, end: int) -> list[Any]:
        part = raw[begin * size : end * size]
        if datatype == "BOOL":
            return list(map(bool, part))
        values = list(struct.unpack(f"<{end - begin}e", part)) if datatype == "FP16" else _unpacked(datatype, part)
        if datatype in _LARGEST and any(map(math.isinf, values)):
            raise _invalid(name, "holds an infinity; send NaN for a missing value")
        return values

    return len(raw) // size, read


def _unpacked(datatype: str, raw: bytes) -> list[Any]:
    values = array.array(_CODES[datatype])
    values.frombytes(raw)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()


def _texts(name: str, raw: bytes) -> Iterator[str]:
    at = 0
    while at < len(raw):
        size = int.from_bytes(raw[at : at + 4], "little")
        text = raw[at + 4 : at + 4 + size]
        if len(raw) < at + 4 or len(text) != size:
            raise _invalid(name, "its texts are 4 bytes of length each, and so many bytes")
        try:
            yield text.decode()
        except UnicodeDecodeError:
            raise _invalid(name, "a text is not UTF-8") from None
        at += 4 + size


def _json(read: _Read, begin: int, shape: list[int]) -> bytes:
    """The JSON of the elements from `begin` on, nested by the shape, made in portions."""
    row = prod(shape[1:])
    if len(shape) > 1 and row > _PORTION:
        return b"[%b]" % b",".join(_json(read, begin + at * row, shape[1:]) for at in range(shape[0]))
    rows = max(1, _PORTION // row)
    parts = []
    for at in range(0, shape[0], rows):
        few = [min(rows, shape[0] - at), *shape[1:]]
        first = begin + at * row
        parts.append(orjson.dumps(_nested(read(first, first + prod(few)), few))[1:-1])
    return b"[%b]" % b",".join(parts)


def _nested(values: list[Any], shape: list[int]) -> list[Any]:
    for axis in reversed(shape[1:]):
        values = [values[at : at + axis] for at in range(0, len(values), axis)]
    return values


def _shape_of(value: Any) -> list[int]:
    """The shape of nested lists as far as it is regular."""
    shape: list[int] = []
    level = [value]
    while level and all(type(one) is list for one in level) and len({len(one) for one in level}) == 1:
        shape.append(len(level[0]))
        level = [inner for one in level for inner in one]
    return shape


def _flat(value: Any, axes: int) -> Iterable[Any]:
    level = [value]
    for _ in range(axes):
        level = list(chain.from_iterable(level))
    return level


def _datatype_of(flat: list[Any]) -> str | None:
    kinds = {type(one) for one in flat}
    if kinds <= {float, int} and float in kinds:
        return "FP64"
    if kinds == {int}:
        if max(flat) < 2**63:
            return "INT64"
        return "UINT64" if min(flat) >= 0 else None
    return {frozenset({bool}): "BOOL", frozenset({str}): "BYTES"}.get(frozenset(kinds))


def _invalid(name: str, what: str) -> InputInvalid:
    return InputInvalid(f"the input {name}: {what}", field=name)
