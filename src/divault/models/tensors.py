"""Callers' tensors: JSON into a checked numpy array, and numbers back into JSON. No torch here.

Written as nested lists, or `{"dtype", "shape", "data"}` with little-endian bytes in base64.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from divault.errors import InputInvalid

MAX_ELEMENTS = 1 << 24
"""Numbers of one call: 64 MiB as float32, more than a request body carries as JSON."""
MAX_RANK = 8
_DTYPES = {"float32": "<f4", "float64": "<f8", "int64": "<i8", "int32": "<i4"}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a model takes: items of one shape, alone or as a batch."""

    item_shape: tuple[int | None, ...]
    """Sizes of one item, None for any."""
    below: int | None
    """Whole numbers from 0 below this, as int64; None: float32."""
    example: Mapping[str, Any]

    @property
    def expected(self) -> str:
        """In words."""
        shape = ", ".join("any" if size is None else str(size) for size in self.item_shape)
        kind = f"whole numbers from 0 to {self.below - 1}" if self.below else "finite numbers (float32)"
        return f"one item of shape [{shape}] or a list of them, {kind}"

    def parse(self, value: Any, field: str) -> NDArray[Any]:
        """The batch as float32 or int64 [n, *item_shape], n >= 1. Raises InputInvalid."""
        array = self._decoded(value, field) if isinstance(value, dict) else self._listed(value, field)
        array = self._typed(array, field)
        if array.ndim == len(self.item_shape):
            array = array[np.newaxis]
        if array.ndim != len(self.item_shape) + 1 or not self._fits(array.shape[1:]):
            self.refuse(field, f"the shape is {list(array.shape)}")
        if array.size == 0:
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
        if not shape or not {type(item) for item in level} <= {int, float}:
            self.refuse(field, "it is not made of numbers only")
        return self._numbers(level, field).reshape(shape)

    def _numbers(self, leaves: list[Any], field: str) -> NDArray[Any]:
        try:
            if self.below is not None and all(type(item) is int for item in leaves):
                return np.array(leaves, dtype=np.int64)
            return np.array(leaves, dtype=np.float64)
        except OverflowError:
            self.refuse(field, "a number is too large")

    def _decoded(self, value: dict[str, Any], field: str) -> NDArray[Any]:
        """From {"dtype", "shape", "data"}; sizes are compared before anything is made of them."""
        dtype, shape, data = value.get("dtype"), value.get("shape"), value.get("data")
        if value.keys() != {"dtype", "shape", "data"} or not isinstance(data, str) or dtype not in _DTYPES:
            self.refuse(field, f'an object needs "dtype" ({", ".join(_DTYPES)}), "shape" and "data" in base64')
        if not isinstance(shape, list) or not 1 <= len(shape) <= MAX_RANK:
            self.refuse(field, f"shape is a list of 1 to {MAX_RANK} sizes")
        if any(type(size) is not int or not 0 <= size <= MAX_ELEMENTS for size in shape):
            self.refuse(field, f"a size in shape is not 0 to {MAX_ELEMENTS}")
        try:
            raw = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            self.refuse(field, "data is not base64")
        kind = np.dtype(_DTYPES[dtype])
        if math.prod(shape) > MAX_ELEMENTS or math.prod(shape) * kind.itemsize != len(raw):
            self.refuse(field, f"data has {len(raw)} bytes, shape and dtype need {math.prod(shape) * kind.itemsize}")
        return np.frombuffer(raw, dtype=kind).reshape(shape)

    def _typed(self, array: NDArray[Any], field: str) -> NDArray[Any]:
        if self.below is not None:
            if array.dtype.kind != "i" or (array.size and not 0 <= array.min() <= array.max() < self.below):
                self.refuse(field, "a number is not a whole one in range")
            return array.astype(np.int64)
        with np.errstate(over="ignore"):
            typed = array.astype(np.float32)
        if not np.isfinite(typed).all():
            self.refuse(field, "a number is not finite as float32")
        return typed
