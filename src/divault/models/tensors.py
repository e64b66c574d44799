"""Callers' tensors: JSON into a checked numpy array, and arrays back into JSON. No torch here.

Written as nested lists, or `{"dtype", "shape", "data"}` with little-endian bytes in base64.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from divault.errors import InputInvalid, ModelFailed

MAX_ELEMENTS = 1 << 24
"""Numbers of one call: 64 MiB as float32, more than a request body carries as JSON."""
MAX_ANSWER_NUMBERS = 1 << 22
"""Numbers of one answer; as JSON they take up to 80 MiB, over any answer limit of a node."""
MAX_RANK = 8
_WIDTHS = {"float": ("16", "32", "64"), "int": ("8", "16", "32", "64"), "uint": ("8", "16", "32", "64")}
DTYPES = (*(f"{kind}{width}" for kind, widths in _WIDTHS.items() for width in widths), "bool")
"""Names of numpy that callers may send bytes of; models may take text (`str`) as well, in lists."""
_LEAVES: dict[str, set[type]] = {kind: {int, float} for kind in "fiu"} | {"b": {bool}, "U": {str}}
_MAX_TEXT = 100_000
_MOST_EXACT = 1 << 53
"""Up to here a float64 tells whole numbers apart."""
SIZES = (8, 32, 64, 224, 4, 1)
"""Where any size may be, a model is tried with these in turn while it is loaded, until it runs: few words or pixels, as
many as networks for images need, and less."""
MOST_TRIED = 1 << 20
"""Numbers of an item that a model is tried with; an image of 224 pixels each way has 150,528."""
_LONGEST_LISTED_EXAMPLE = 256
_LONGEST_EXAMPLE_BYTES = 64 << 10
"""Longer ones stand in the description without their bytes, which all are zero."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a model takes: items of one shape, alone or as a batch."""

    item_shape: tuple[int | None, ...]
    """Sizes of one item, None for any; of the whole tensor without `batched`."""
    below: int | None
    """Whole numbers from 0 below this, as int64; None: any of the dtype."""
    example: Mapping[str, Any]
    """A whole `input_data`."""
    dtype: str = "float32"
    """numpy's name, or `str`."""
    batched: bool = True
    empty: bool = False
    """Whether axes of any size, but for the batch, may have no members."""

    @property
    def expected(self) -> str:
        """In words."""
        shape = ", ".join("any" if size is None else str(size) for size in self.item_shape)
        what = f"one item of shape [{shape}] or a list of them" if self.batched else f"a tensor of shape [{shape}]"
        return f"{what}, {self._numbers_in_words()}"

    def _numbers_in_words(self) -> str:
        if self.below is not None:
            return f"whole numbers from 0 to {self.below - 1}"
        words = {"f": "finite numbers", "i": "whole numbers", "u": "whole numbers", "b": "true or false", "U": "texts"}
        return f"{words[self.kind]} ({self.dtype})"

    @property
    def kind(self) -> str:
        """Numpy's letter: f, i, u, b or U."""
        return _kind(self.dtype)

    def schema(self) -> dict[str, Any]:
        """JSON Schema of the tensor."""
        item = nested_schema(leaf_schema(self.dtype) | self._limits(), self.item_shape, least=0 if self.empty else 1)
        ways = [item]
        if self.batched:
            ways.append({"type": "array", "items": item, "minItems": 1})
        if self.kind != "U":
            ways.append(_ENCODED)
        return {"anyOf": ways}

    def _limits(self) -> dict[str, Any]:
        """What stands in the schema; limits of 64 bits are beyond what readers of JSON hold exactly."""
        if self.below is not None:
            return {"minimum": 0, "maximum": self.below - 1}
        if self.kind not in "iu":
            return {}
        limits = np.iinfo(self.dtype)
        if limits.bits < 64:
            return {"minimum": int(limits.min), "maximum": int(limits.max)}
        return {"minimum": 0} if self.kind == "u" else {}

    def parse(self, value: Any, field: str) -> NDArray[Any]:
        """The batch in its dtype [n, *item_shape], n >= 1; texts as objects. Raises InputInvalid."""
        array = self._decoded(value, field) if isinstance(value, dict) else self._listed(value, field)
        array = self._typed(array, field)
        if self.batched and array.ndim == len(self.item_shape):
            array = array[np.newaxis]
        if array.ndim != len(self.item_shape) + self.batched or not self._fits(array.shape[self.batched :]):
            self.refuse(field, f"the shape is {list(array.shape)}")
        if array.size == 0 and not (self.empty and all(array.shape[: self.batched])):
            self.refuse(field, "it is empty")
        return array

    def refuse(self, field: str, problem: str) -> NoReturn:
        """Raises InputInvalid with what this model takes."""
        raise InputInvalid(
            f"{field}: {problem}; this model takes {self.expected}",
            field=field,
            expected=self.expected,
            example=dict(self.example),
        ) from None

    def _fits(self, shape: tuple[int, ...]) -> bool:
        return all(want in {None, have} for want, have in zip(self.item_shape, shape, strict=True))

    def _listed(self, value: Any, field: str) -> NDArray[Any]:
        """From nested lists; level by level, so that depth costs no stack."""
        shape: list[int] = []
        level = [value]
        while level and type(level[0]) is list:
            length = len(level[0])
            if len(shape) == MAX_RANK or len(level) * length > MAX_ELEMENTS:
                self.refuse(field, f"over {MAX_RANK} levels or {MAX_ELEMENTS} numbers")
            if any(type(item) is not list or len(item) != length for item in level):
                self.refuse(field, "its rows differ in length")
            shape.append(length)
            level = list(chain.from_iterable(level))
        kinds = {type(item) for item in level}
        if (not shape and self.item_shape) or not kinds <= _LEAVES[self.kind]:
            self.refuse(field, f"it is not made of {self._numbers_in_words()} only")
        return self._numbers(level, field).reshape(shape if level else self._completed(shape))

    def _completed(self, shape: list[int]) -> list[int]:
        """With the axes that lists without members don't show: as the model has them, 0 where any size may be."""
        for batch in range(1 + self.batched):
            rest = [size or 0 for size in self.item_shape[len(shape) - batch :]]
            item = (*shape[batch:], *rest)
            if self.empty and len(item) == len(self.item_shape) and self._fits(item):
                return [*shape, *rest]
        return shape

    def _numbers(self, leaves: list[Any], field: str) -> NDArray[Any]:
        if self.kind == "U":
            if any(len(text) > _MAX_TEXT for text in leaves):
                self.refuse(field, f"a text of over {_MAX_TEXT} characters")
            return np.array(leaves, dtype=object)
        if self.kind in "iu":
            leaves = [int(item) if type(item) is float and _is_whole(item) else item for item in leaves]
        try:
            if self.kind in "iu" and all(type(item) is int for item in leaves):
                return np.array(leaves, dtype=np.uint64 if self.dtype == "uint64" else np.int64)
            return np.array(leaves, dtype=np.bool_ if self.kind == "b" else np.float64)
        except OverflowError:
            self.refuse(field, "a number is too large")

    def _decoded(self, value: dict[str, Any], field: str) -> NDArray[Any]:
        """From {"dtype", "shape", "data"}; sizes are compared before anything is made of them."""
        dtype, shape, data = value.get("dtype"), value.get("shape"), value.get("data")
        if value.keys() != {"dtype", "shape", "data"} or not isinstance(data, str) or dtype not in DTYPES:
            self.refuse(field, f'an object needs "dtype" ({", ".join(DTYPES)}), "shape" and "data" in base64')
        if not isinstance(shape, list) or len(shape) > MAX_RANK:
            self.refuse(field, f"shape is a list of up to {MAX_RANK} sizes")
        if any(type(size) is not int or not 0 <= size <= MAX_ELEMENTS for size in shape):
            self.refuse(field, f"a size in shape is not 0 to {MAX_ELEMENTS}")
        try:
            raw = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            self.refuse(field, "data is not base64")
        kind = np.dtype(dtype).newbyteorder("<")
        if math.prod(shape) > MAX_ELEMENTS or math.prod(shape) * kind.itemsize != len(raw):
            self.refuse(field, f"data has {len(raw)} bytes, shape and dtype need {math.prod(shape) * kind.itemsize}")
        return np.frombuffer(raw, dtype=kind).reshape(shape)

    def _typed(self, array: NDArray[Any], field: str) -> NDArray[Any]:
        if self.kind in "iu":
            return self._whole(array, field)
        if self.kind in "bU":
            if array.dtype.kind not in {"b": "b", "U": "O"}[self.kind]:
                self.refuse(field, f"it is not made of {self._numbers_in_words()}")
            return array
        if array.dtype.kind not in "fiu":
            self.refuse(field, f"it is not made of {self._numbers_in_words()}")
        with np.errstate(over="ignore"):
            typed = array.astype(self.dtype)
        if not np.isfinite(typed).all():
            self.refuse(field, f"a number is not finite as {self.dtype}")
        return typed

    def _whole(self, array: NDArray[Any], field: str) -> NDArray[Any]:
        limits = np.iinfo(self.dtype)
        least, most = (0, self.below - 1) if self.below is not None else (int(limits.min), int(limits.max))
        whole = array.dtype.kind in "iu" or (
            array.dtype.kind == "f" and bool(np.all((np.abs(array) <= _MOST_EXACT) & (np.trunc(array) == array)))
        )
        if not whole or (array.size and not least <= int(array.min()) <= int(array.max()) <= most):
            self.refuse(field, "a number is not a whole one in range")
        return array.astype(self.dtype)


def _is_whole(number: float) -> bool:
    """3.0 is a whole number, as in JSON Schema; one of 2**60 may be what was left of another."""
    return number.is_integer() and abs(number) <= _MOST_EXACT


def zeros(shape: Sequence[int], dtype: str) -> NDArray[Any]:
    """A tensor to try a model with; texts are `a`."""
    return np.full(shape, "a", dtype=object) if dtype == "str" else np.zeros(shape, dtype=dtype)


def shapes(
    shape: Sequence[int | None], sizes: Sequence[int] = SIZES, bounds: Sequence[tuple[int, int]] = ()
) -> Iterator[tuple[int, ...]]:
    """What stands for the shape where any size may be: one of `sizes` after the other, within the bounds of its axis.

    No shape twice, and after the first none of very many numbers.

    >>> list(shapes((3, None), sizes=(8, 32, 4), bounds=((1, 9), (1, 9))))
    [(3, 8), (3, 9), (3, 4)]
    """
    seen: set[tuple[int, ...]] = set()
    limits = [*bounds, *[(1, MOST_TRIED)] * (len(shape) - len(bounds))]
    for size in sizes:
        found = tuple(
            min(max(size, least), most) if known is None else known
            for known, (least, most) in zip(shape, limits, strict=True)
        )
        if found not in seen and (not seen or math.prod(found) <= MOST_TRIED):
            seen.add(found)
            yield found


_ENCODED: dict[str, Any] = {
    "type": "object",
    "required": ["dtype", "shape", "data"],
    "properties": {
        "dtype": {"enum": list(DTYPES)},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "data": {"type": "string", "contentEncoding": "base64"},
    },
}


def _kind(dtype: str) -> str:
    return "U" if dtype == "str" else np.dtype(dtype).kind


def leaf_schema(dtype: str) -> dict[str, Any]:
    """JSON Schema of one value of this dtype, of numpy's names or `str`."""
    kinds = {"f": "number", "i": "integer", "u": "integer", "b": "boolean", "U": "string"}
    return {"type": kinds[_kind(dtype)]}


def nested_schema(leaf: dict[str, Any], shape: Sequence[int | None], least: int = 0) -> dict[str, Any]:
    """JSON Schema of arrays of this shape; axes of any size have `least` members."""
    schema = leaf
    for size in reversed(shape):
        fixed = {"minItems": size, "maxItems": size} if size is not None else {"minItems": least} if least else {}
        schema = {"type": "array", "items": schema, **fixed}
    return schema


def written(array: NDArray[Any]) -> Any:
    """As lists while they are short, else as bytes."""
    if array.size <= _LONGEST_LISTED_EXAMPLE or array.dtype.kind == "O":
        return array.tolist()
    data = f"<{array.nbytes} bytes in base64>"
    if array.nbytes <= _LONGEST_EXAMPLE_BYTES:
        data = base64.b64encode(array.tobytes()).decode()
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": data}


def answered(array: NDArray[Any]) -> Any:
    """A model's output as JSON values. Raises ModelFailed for one that is too long or not finite."""
    if array.size > MAX_ANSWER_NUMBERS:
        raise ModelFailed(f"the answer has {array.size} numbers: send fewer items", kind="output_size")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ModelFailed("the model gave a number that is not finite", kind="not_finite")
    return array.tolist()
