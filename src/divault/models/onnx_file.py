"""What an ONNX file holds, read from its bytes before any library parses it: whether it is one, and what it points to.

Rules:

1. The wire format (protobuf) is walked, not built: memory does not depend on what the file claims.
2. A tensor whose data lie elsewhere is refused: its location could name another file, a descriptor or an address.

Field numbers: onnx.proto3 of ONNX (IR version 3 to 13).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

from divault.errors import SealedFileDamaged, UnsupportedModel
from divault.models.files import opened
from divault.values import MemoryFile

_GRAPH, _OPSETS = 7, 8
_TOP = frozenset({1, 2, 3, 4, 5, 6, _GRAPH, _OPSETS, 14, 20, 25, 26})
_INPUT, _OUTPUT = 11, 12  # of a graph: name (1) and _TYPE, in which _TENSOR, in which _SHAPE
_TYPE, _TENSOR, _SHAPE = 2, 1, 2
_MESSAGE = 2
_INSIDE: dict[str, dict[int, str]] = {
    "model": {_GRAPH: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
"""Which fields of a message hold messages that lead to tensors."""
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_OPERATOR = 4  # of a node
_MAX_DEPTH = 64
"""Subgraphs inside subgraphs; real ones have a handful."""


def is_onnx(file: MemoryFile) -> bool:
    """Whether the whole file is one ONNX model by its outermost fields. Never raises."""
    if file.size < 8:
        return False
    with opened(file) as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data:
        seen: set[int] = set()
        try:
            for number, _, _, _ in _fields(data, 0, len(data)):
                if number not in _TOP:
                    return False
                seen.add(number)
        except SealedFileDamaged:
            return False
        return {1, _GRAPH, _OPSETS} <= seen


def check(file: MemoryFile) -> None:
    """Raises UnsupportedModel where a tensor's data are not inside the file; SealedFileDamaged for broken content."""
    with opened(file) as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for kind, number, begin, _ in _inside(data):
            if kind == "tensor" and _points_elsewhere(number, data, begin):
                raise _external()


def operators(file: MemoryFile) -> frozenset[str]:
    """Names of the operators that any of its graphs has. Raises SealedFileDamaged."""
    with opened(file) as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return frozenset(
            data[begin:end].decode("utf-8", "replace")
            for kind, number, begin, end in _inside(data)
            if (kind, number) == ("node", _OPERATOR)
        )


def _inside(data: mmap.mmap) -> Iterator[tuple[str, int, int, int]]:
    """(kind of message, number, first byte, end) of each field that leads to tensors, and of what stands beside it."""
    todo = [("model", 0, len(data), 0)]
    while todo:
        kind, start, end, depth = todo.pop()
        if depth > _MAX_DEPTH:
            raise _damaged("its graphs are nested too deep")
        for number, wire, begin, stop in _fields(data, start, end):
            yield kind, number, begin, stop
            inner = _INSIDE[kind].get(number)
            if inner is not None and wire != _MESSAGE:
                raise _damaged("a message is no message")
            if inner is not None:
                todo.append((inner, begin, stop, depth + 1))


def shapeless(file: MemoryFile) -> frozenset[str]:
    """Names of the model's inputs and outputs whose number of axes it does not say; onnxruntime calls those scalars.

    Raises SealedFileDamaged.
    """
    names: set[str] = set()
    with opened(file) as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for graph in _messages(data, (0, len(data)), _GRAPH):
            for port in (*_messages(data, graph, _INPUT), *_messages(data, graph, _OUTPUT)):
                tensors = [one for kind in _messages(data, port, _TYPE) for one in _messages(data, kind, _TENSOR)]
                shapes = [shape for tensor in tensors for shape in _messages(data, tensor, _SHAPE)]
                if tensors and not shapes:
                    names.update(data[begin:end].decode("utf-8", "replace") for begin, end in _messages(data, port, 1))
    return frozenset(names)


def _messages(data: mmap.mmap, within: tuple[int, int], field: int) -> list[tuple[int, int]]:
    """Where the values of the field with this number lie. Raises SealedFileDamaged."""
    return [(begin, end) for number, wire, begin, end in _fields(data, *within) if (number, wire) == (field, _MESSAGE)]


def _points_elsewhere(number: int, data: mmap.mmap, begin: int) -> bool:
    return number == _EXTERNAL_DATA or (number == _DATA_LOCATION and data[begin] != 0)


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, wire type, first byte, end) of each field. Raises SealedFileDamaged."""
    place = start
    while place < end:
        tag, place = _varint(data, place, end)
        if tag >= 1 << 32:  # protobuf would read its lower half as another field
            raise _damaged("a field has no such number")
        number, wire = tag >> 3, tag & 7
        begin = place
        if wire == 0:
            _, place = _varint(data, place, end)
        elif wire == _MESSAGE:
            length, begin = _varint(data, place, end)
            place = begin + length
        elif wire in {1, 5}:
            place += 8 if wire == 1 else 4
        else:
            raise _damaged("a field of an unknown kind")
        if number == 0 or place > end:
            raise _damaged("a field goes over its end")
        yield number, wire, begin, place


def _varint(data: mmap.mmap, place: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= end:
            break
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise _damaged("a number does not end")


def _damaged(what: str) -> SealedFileDamaged:
    return SealedFileDamaged(f"the ONNX file is broken: {what}", stage="payload")


def _external() -> UnsupportedModel:
    return UnsupportedModel(
        "the ONNX model keeps tensors in other files; save it with all of its data inside:"
        " onnx.save(onnx.load(path), path, save_as_external_data=False)",
        seen="an ONNX model with external data",
        supported="ONNX with its data inside the file",
    )
