"""Rows of features and texts as callers send them, checked to the last number before a model sees them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, repeat
from typing import Any, ClassVar, NoReturn

from divault.errors import InputInvalid
from divault.models.base import Inputs

MAX_ROWS = 65_536
MAX_FEATURES = 32_768
"""Columns of a row; the example that tells of them has to fit into a description."""
MAX_TEXTS = 1024
MAX_TEXT_CHARS = 100_000
EXAMPLE_TEXT = "The film was better than the book."
LARGEST = 3.4e38
"""Largest magnitude of a number: trees and others compute in float32, where more is infinite."""


@dataclass(frozen=True, slots=True)
class TextSpec:
    """A text, or a list of texts."""

    dtype: ClassVar[str] = "float64"
    """Of what a model computes."""

    @property
    def expected(self) -> str:
        """What is taken, for people."""
        return f'{{"text": ...}} with a text of 1 to {MAX_TEXT_CHARS} characters, or a list of 1 to {MAX_TEXTS} of them'

    def example(self) -> dict[str, Any]:
        """An input that is taken."""
        return {"text": EXAMPLE_TEXT}

    def examples(self) -> list[dict[str, Any]]:
        """Inputs that are taken, with other values in each."""
        return [self.example(), {"text": "1"}]

    def schema(self) -> dict[str, Any]:
        """JSON Schema of the input."""
        one = {"type": "string", "minLength": 1, "maxLength": MAX_TEXT_CHARS}
        many = {"type": "array", "items": one, "minItems": 1, "maxItems": MAX_TEXTS}
        return _one_member("text", {"anyOf": [one, many]})

    def parse(self, inputs: Inputs) -> list[str]:
        """The texts. Raises InputInvalid."""
        field, value = _member(self, "text", inputs)
        texts = value if isinstance(value, list) else [value]
        if not 1 <= len(texts) <= MAX_TEXTS:
            _refuse(self, field, f"{len(texts)} texts")
        for place, text in enumerate(texts):
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_TEXT_CHARS:
                where = f"{field}[{place}]" if isinstance(value, list) else field
                _refuse(self, where, f"a text of {len(text)} characters" if isinstance(text, str) else "no text")
        return texts


NUMBER: frozenset[str] = frozenset({"number"})


@dataclass(frozen=True, slots=True)
class Column:
    """What stands at one place of a row."""

    name: str = ""
    kinds: frozenset[str] = NUMBER
    """Of `number`, `string` and `boolean`, as JSON Schema has them."""
    known: Mapping[Any, None] | None = None
    """The only values that are taken; None: all of these kinds."""
    first: Any = None
    """A value for the example; without one any number."""
    null: bool = False
    """null is taken for a missing value."""
    none: bool = False
    """null is None to the model, and otherwise NaN, which this class can't hold: it equals nothing, itself neither."""
    objects: bool = False
    """The model learned this column as Python objects, and compares with those."""

    @property
    def missing(self) -> float | None:
        """What null is to the model."""
        return None if self.none else math.nan

    @property
    def expected(self) -> str:
        """What is taken, for people."""
        kinds = [words for kind, words in _WORDS.items() if kind in self.kinds]
        if self.known is not None:
            some = [ascii(value)[:_TOLD_CHARS] for value in islice(self.known, _TOLD_VALUES)]
            more = ", ..." if len(self.known) > _TOLD_VALUES else ""
            kinds = [f"one of {', '.join(some)}{more}"] if some else []
        return " or ".join([*kinds, *(["null"] if self.null else [])])

    def schema(self, *, bounded: bool) -> dict[str, Any]:
        """JSON Schema of a value, with its bounds or without."""
        kinds = [kind for kind in (*_WORDS, "null") if kind in self.kinds or (kind == "null" and self.null)]
        told: dict[str, Any] = {"title": self.name} if self.name else {}
        told["type"] = kinds if len(kinds) > 1 else kinds[0]
        # 1 is as good as true here, and to JSON Schema another value.
        alike = {"number", "boolean"} <= self.kinds
        if self.known is not None and len(self.known) <= _LISTED_VALUES and not alike:
            told["enum"] = [*self.known, *([None] if self.null else [])]
        elif bounded:
            told |= _bounds(kinds)
        return told

    def wrong(self, value: Any) -> str:
        """What a value is that is not taken here; empty for one that is."""
        kind = type(value)
        if value is None and self.null:
            return ""
        if kind in _NUMBERS and not -LARGEST <= value <= LARGEST:
            return f"a number over {LARGEST:g}"
        if kind is str and "string" in self.kinds and len(value) > MAX_TEXT_CHARS:
            return f"a text of {len(value)} characters"
        if _JSON_KINDS.get(kind) not in self.kinds:
            return f"{_KINDS[kind]} where {self.expected} is expected"
        if self.known is not None and value not in self.known:
            return f"{_KINDS[kind]} unknown to the model where {self.expected} is expected"
        return ""


@dataclass(frozen=True)
class RowSpec:
    """A row of `count` features (None: any number), or a list of rows."""

    count: int | None
    columns: tuple[Column, ...] = ()
    """One for each feature; without any, each is as `each`."""
    each: Column = Column()
    sample: Any = None
    """Features that are known to be taken, for the example."""
    dtype: str = "float64"
    """Of the numbers that a model without texts gets."""

    @property
    def expected(self) -> str:
        """What is taken, for people."""
        return f'{{"features": ...}} with {self._row} for one row, or a list of 1 to {MAX_ROWS} rows'

    @property
    def _row(self) -> str:
        if self._differ and len(self.columns) <= _TOLD_COLUMNS:
            told = (f"{column.name or place}: {column.expected}" for place, column in enumerate(self.columns))
            return f"{self.count} values ({'; '.join(told)})"
        columns = self.columns or (self.each,)
        kinds = "finite numbers" if all(column.kinds == NUMBER for column in columns) else "numbers or texts"
        null = " (null: missing)" if any(column.null for column in columns) else ""
        return f"{self.count or 'n'} {kinds}{null}"

    def example(self) -> dict[str, Any]:
        """An input that is taken."""
        return {"features": self.row() if self.sample is None else self.sample}

    def row(self, number: float = 0.0) -> list[Any]:
        """A row of values that are taken, with this number wherever any number is."""
        if not self.columns:
            return [number] * (self.count or 3)
        return [number if column.first is None and column.known is None else column.first for column in self.columns]

    def examples(self) -> list[dict[str, Any]]:
        """Inputs that are taken, with other values in each."""
        return [{"features": self.row(0.0)}, {"features": self.row(1.0)}]

    def with_null(self, places: Iterable[int]) -> RowSpec:
        """The same with null in these places, too."""
        if not self.columns:
            return replace(self, each=replace(self.each, null=True))
        some = set(places)
        columns = [replace(column, null=column.null or place in some) for place, column in enumerate(self.columns)]
        return replace(self, columns=tuple(columns))

    def schema(self) -> dict[str, Any]:
        """JSON Schema of the input."""
        columns = self.columns or (self.each,)
        kinds = [kind for kind in _WORDS if any(kind in column.kinds for column in columns)]
        kinds += ["null"] if any(column.null for column in columns) else []
        each = {"type": kinds if len(kinds) > 1 else kinds[0], **_bounds(kinds)}
        row: dict[str, Any] = {"type": "array", "items": each, "minItems": 1}
        if self.count is not None:
            row |= {"minItems": self.count, "maxItems": self.count}
        if self._differ:
            # Names go before bounds, which `items` has too.
            ways = ([column.schema(bounded=bounded) for column in self.columns] for bounded in (True, False))
            told = next((way for way in ways if len(json.dumps(way)) <= _TOLD_BYTES), None)
            row |= {} if told is None else {"prefixItems": told}
        rows = {"type": "array", "items": row, "minItems": 1, "maxItems": MAX_ROWS}
        return _one_member("features", {"anyOf": [row, rows]})

    @cached_property
    def _differ(self) -> bool:
        """Whether there is more to say of the columns than how many there are."""
        return any(column.name or column != self.columns[0] or column.known is not None for column in self.columns)

    @cached_property
    def _plain(self) -> bool:
        """Whether a row of numbers needs no look at its columns."""
        return all(column.kinds == NUMBER and column.known is None and not column.objects for column in self.columns)

    @cached_property
    def _objects(self) -> bool:
        return any("string" in column.kinds or column.objects for column in self.columns)

    def parse(self, inputs: Inputs) -> Any:
        """`dtype` [rows, count]; object [rows, count] where texts may be among them. Raises InputInvalid."""
        import numpy as np

        field, value = _member(self, "features", inputs)
        if not isinstance(value, list) or not value:
            _refuse(self, field, "an empty list" if value == [] else "no list")
        alone = not isinstance(value[0], list)
        rows = [value] if alone else value
        if len(rows) > MAX_ROWS:
            _refuse(self, field, f"{len(rows)} rows")
        width = self.count or (len(rows[0]) if isinstance(rows[0], list) else 0)
        if width and self._plain and (array := _numbers(rows, width)) is not None:
            return array.astype(self.dtype, copy=False)
        for place, row in enumerate(rows):
            self._check_row(row, width, field if alone else f"{field}[{place}]")
        if not self._objects:
            return np.array(rows, dtype=self.dtype)
        missing = [column.missing for column in self.columns]
        return np.array(
            [[gap if value is None else value for gap, value in zip(missing, row, strict=True)] for row in rows],
            dtype=object,
        )

    def _check_row(self, row: Any, width: int, where: str) -> None:
        if not isinstance(row, list):
            _refuse(self, where, "no list of values")
        if len(row) != width or not row:
            _refuse(self, where, f"{len(row)} values where {width} are expected" if width else "an empty row")
        for place, (column, value) in enumerate(zip(self.columns or repeat(self.each), row, strict=False)):
            if wrong := column.wrong(value):
                _refuse(self, f"{where}[{place}]", wrong)


def _numbers(rows: list[Any], width: int) -> Any:
    """float64 [rows, width] of rows of numbers in range, which most are; None for whatever has to be looked at."""
    import numpy as np

    if any(type(row) is not list or len(row) != width or not _NUMBERS.issuperset(map(type, row)) for row in rows):
        return None
    try:
        array = np.array(rows, dtype=np.float64)
    except OverflowError:  # a whole number beyond double precision
        return None
    return array if np.abs(array).max(initial=0.0) <= LARGEST else None


_NUMBERS = frozenset({int, float})
_KINDS: dict[type, str] = {
    int: "a number", float: "a number", str: "a text", bool: "true or false", type(None): "null", list: "a list",
    dict: "an object",
}  # fmt: skip
_JSON_KINDS: dict[type, str] = {int: "number", float: "number", str: "string", bool: "boolean"}
_ANSWERED: dict[type, str] = {int: "integer", float: "number", str: "string", bool: "boolean"}
_WORDS = {"number": "a number", "string": "a text", "boolean": "true or false"}
_TOLD_COLUMNS, _TOLD_VALUES, _TOLD_CHARS = 16, 6, 20
"""Most columns, values of each and characters of a value in a message."""
_LISTED_VALUES = 64
"""Most values of a column in a schema."""
_TOLD_BYTES = 64 << 10
"""Most JSON about columns in a schema, which has it twice: a description has room for 256 KiB."""


def _bounds(kinds: Sequence[str]) -> dict[str, Any]:
    """What JSON Schema says beside the kinds of a value."""
    numbers = {"minimum": -LARGEST, "maximum": LARGEST} if "number" in kinds else {}
    return numbers | ({"maxLength": MAX_TEXT_CHARS} if "string" in kinds else {})


def schema_of(value: Any) -> dict[str, Any]:
    """JSON Schema of values like this one: lists of its length, of what the first one in it is if all are."""
    if not isinstance(value, list):
        return {"type": _ANSWERED[type(value)]} if type(value) in _ANSWERED else {}
    told: dict[str, Any] = {"type": "array", "minItems": len(value), "maxItems": len(value)}
    inside = [schema_of(one) for one in value]
    if value and all(one == inside[0] for one in inside):
        told["items"] = inside[0]
    return told


def rows_of(row: Any) -> dict[str, Any]:
    """JSON Schema of a list with a value like this one for each row."""
    return {"type": "array", "items": schema_of(row)}


def _one_member(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {name: schema}, "required": [name]}


def _member(spec: RowSpec | TextSpec, name: str, inputs: Inputs) -> tuple[str, Any]:
    """Name and value of the one member of the input. Raises InputInvalid for any other member or parameter."""
    if inputs.parameters:
        _refuse(spec, "parameters", "this model has no parameters")
    if not isinstance(inputs.data, dict):
        _refuse(spec, "input_data", "no object")
    given = [member for member in (name, "inputs") if member in inputs.data]
    if len(given) != 1:
        _refuse(spec, name, "given twice, as inputs too" if given else "missing")
    unknown = [member for member in inputs.data if member != given[0]]
    if unknown:
        _refuse(spec, str(unknown[0])[:80], "this model has no such input")
    return given[0], inputs.data[given[0]]


def _refuse(spec: RowSpec | TextSpec, field: str, what: str) -> NoReturn:
    raise InputInvalid(
        f"{field}: {what}; this model takes {spec.expected}",
        field=field,
        expected=spec.expected,
        example=spec.example(),
    )
