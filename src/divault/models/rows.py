"""Rows of features and texts as callers send them, checked to the last number before a model sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from divault.errors import InputInvalid
from divault.models.base import Inputs

MAX_ROWS = 65_536
MAX_TEXTS = 1024
MAX_TEXT_CHARS = 100_000
LARGEST = 3.4e38
"""Largest magnitude of a number: trees and others compute in float32, where more is infinite."""


@dataclass(frozen=True, slots=True)
class TextSpec:
    """A text, or a list of texts."""

    @property
    def expected(self) -> str:
        """What is taken, for people."""
        return f'{{"text": ...}} with a text of 1 to {MAX_TEXT_CHARS} characters, or a list of 1 to {MAX_TEXTS} of them'

    def example(self) -> dict[str, Any]:
        """An input that is taken."""
        return {"text": "The film was better than the book."}

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


@dataclass(frozen=True, slots=True)
class RowSpec:
    """A row of `count` features (None: any number), or a list of rows."""

    count: int | None
    mixed: bool = False
    """Texts may stand beside numbers: an encoder learned categories that are text."""
    missing: bool = False
    """null is taken for a missing value."""

    @property
    def expected(self) -> str:
        """What is taken, for people."""
        kinds = "numbers or texts" if self.mixed else "finite numbers"
        null = " (null: missing)" if self.missing else ""
        row = f"{self.count or 'n'} {kinds}{null}"
        return f'{{"features": ...}} with {row} for one row, or a list of 1 to {MAX_ROWS} rows'

    def example(self) -> dict[str, Any]:
        """An input that is taken."""
        return {"features": [0.0] * (self.count or 3)}

    def schema(self) -> dict[str, Any]:
        """JSON Schema of the input."""
        kinds = ["number", *(["string"] if self.mixed else []), *(["null"] if self.missing else [])]
        row: dict[str, Any] = {"type": "array", "items": {"type": kinds if len(kinds) > 1 else "number"}, "minItems": 1}
        if self.count is not None:
            row |= {"minItems": self.count, "maxItems": self.count}
        return _one_member("features", {"anyOf": [row, {"type": "array", "items": row, "minItems": 1}]})

    def parse(self, inputs: Inputs) -> Any:
        """float64 [rows, count]; object [rows, count] where texts may be among them. Raises InputInvalid."""
        import numpy as np

        field, value = _member(self, "features", inputs)
        if not isinstance(value, list) or not value:
            _refuse(self, field, "an empty list" if value == [] else "no list")
        alone = not isinstance(value[0], list)
        rows = [value] if alone else value
        if len(rows) > MAX_ROWS:
            _refuse(self, field, f"{len(rows)} rows")
        width = self.count or (len(rows[0]) if isinstance(rows[0], list) else 0)
        if width and not self.mixed and (array := _numbers(rows, width)) is not None:
            return array
        for place, row in enumerate(rows):
            self._check_row(row, width, field if alone else f"{field}[{place}]")
        if self.mixed:
            return np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=object)
        return np.array(rows, dtype=np.float64)

    def _check_row(self, row: Any, width: int, where: str) -> None:
        if not isinstance(row, list):
            _refuse(self, where, "no list of values")
        if len(row) != width or not row:
            _refuse(self, where, f"{len(row)} values where {width} are expected" if width else "an empty row")
        for column, value in enumerate(row):
            if type(value) in (int, float):
                if not -LARGEST <= value <= LARGEST:
                    _refuse(self, f"{where}[{column}]", f"a number over {LARGEST:g}")
            elif not (self.mixed and type(value) is str) and not (self.missing and value is None):
                _refuse(self, f"{where}[{column}]", f"{_KINDS[type(value)]} where a number is expected")


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
_KINDS: dict[type, str] = {str: "a text", bool: "true or false", type(None): "null", list: "a list", dict: "an object"}


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
