"""Tensors of the Open Inference Protocol, version 2, to JSON values and back.

Numbers come as JSON (nested or flat) or as the protocol's binary extension: little-endian bytes behind the JSON, in the
order of the inputs. Texts are BYTES tensors. What goes out is JSON too, or such bytes where they are asked for.

>>> read_tensor({"name": "x", "datatype": "INT64", "shape": [2, 2], "data": [1, 2, 3, 4]}, None)
[[1, 2], [3, 4]]
>>> written_tensor("y", [[0.5, 1.5]])
{'name': 'y', 'datatype': 'FP64', 'shape': [1, 2], 'data': [0.5, 1.5]}
"""

from __future__ import annotations

import array
import struct
import sys
from collections.abc import Iterable, Iterator
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
_NUMBERS: dict[str, tuple[type, ...]] = {
    name: (int, float) if name.startswith("FP") else (int,) for name in (*_CODES, "FP16")
}
_KINDS: dict[str, tuple[type, ...]] = _NUMBERS | {"BOOL": (bool, int), "BYTES": (str,)}
MAX_ELEMENTS = 4_000_000
"""Of one tensor: more than a body can hold as numbers."""
_MAX_AXES = 16


def read_tensor(told: dict[str, Any], raw: bytes | None) -> Any:
    """The tensor's values nested by its shape; `raw` are its bytes where the body has them. Raises InputInvalid."""
    name = str(told.get("name"))[:80]
    shape: Any = told.get("shape")
    datatype: Any = told.get("datatype")
    if not _is_shape(shape):
        raise _invalid(name, "shape is a list of up to 16 whole numbers, none below 0")
    if datatype not in DATATYPES:
        raise _invalid(name, f"datatype is one of {', '.join(DATATYPES)}")
    count = prod(shape)
    if count > MAX_ELEMENTS:
        raise _invalid(name, f"the shape has {count} elements, {MAX_ELEMENTS} are read")
    values = _from_json(name, datatype, told.get("data")) if raw is None else _from_bytes(name, datatype, raw)
    if len(values) != count:
        raise _invalid(name, f"{len(values)} values came where the shape {shape} has {count}")
    return _nested(values, shape)


def written_tensor(name: str, value: Any) -> dict[str, Any]:
    """The tensor of a JSON value: numbers, truth values and texts as they are, anything else as texts of JSON."""
    shape = _shape_of(value)
    flat = list(_flat(value, len(shape)))
    datatype = _datatype_of(flat)
    if datatype is None:
        value = value if isinstance(value, list) else [value]
        return {
            "name": name,
            "datatype": "BYTES",
            "shape": [len(value)],
            "data": [one if isinstance(one, str) else orjson.dumps(one).decode() for one in value],
        }
    return {"name": name, "datatype": datatype, "shape": shape or [1], "data": flat}


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


def _from_json(name: str, datatype: str, data: Any) -> list[Any]:
    if not isinstance(data, list):
        raise _invalid(name, "data is a list, or binary_data_size says how many bytes behind the JSON are its")
    flat: list[Any] = data
    for _ in range(_MAX_AXES):
        if not any(type(one) is list for one in flat):
            break
        flat = list(chain.from_iterable(one if type(one) is list else [one] for one in flat))
        if len(flat) > MAX_ELEMENTS:
            break
    kinds = _KINDS[datatype]
    if not all(type(one) in kinds for one in flat):
        raise _invalid(name, f"data holds something that {datatype} does not have")
    return [bool(one) for one in flat] if datatype == "BOOL" else flat


def _from_bytes(name: str, datatype: str, raw: bytes) -> list[Any]:
    if datatype == "BYTES":
        return list(_texts(name, raw))
    if datatype == "FP16":
        if len(raw) % 2:
            raise _invalid(name, "its bytes are no whole number of values")
        return list(chain.from_iterable(struct.iter_unpack("<e", raw)))
    values = array.array(_CODES[datatype])
    if len(raw) % values.itemsize:
        raise _invalid(name, "its bytes are no whole number of values")
    values.frombytes(raw)
    if sys.byteorder == "big":
        values.byteswap()
    return [bool(one) for one in values] if datatype == "BOOL" else values.tolist()


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


def _nested(values: list[Any], shape: list[int]) -> Any:
    for axis in reversed(shape[1:]):
        if axis == 0:
            return [[]] * shape[0]
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
    if not kinds or (kinds <= {float, int} and float in kinds):
        return "FP64"
    if kinds == {int}:
        if max(flat) < 2**63:
            return "INT64"
        return "UINT64" if min(flat) >= 0 else None
    return {frozenset({bool}): "BOOL", frozenset({str}): "BYTES"}.get(frozenset(kinds))


def _invalid(name: str, what: str) -> InputInvalid:
    return InputInvalid(f"the input {name}: {what}", field=name)
