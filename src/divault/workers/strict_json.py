"""JSON at the door of a model: strict, shallow and finite, both ways.

Rules:

1. In: no NaN or Infinity, no number beyond double precision, no duplicate keys, no broken Unicode, at most 32 levels.
2. Out: exact builtin types, string keys, finite numbers, at most 32 levels and 800,000 values: what shares or refers
   to itself is walked as the tree that it would become.

>>> parse(b'{"features": [1, 2.5]}', "input_data")
{'features': [1, 2.5]}
>>> dump({"predictions": [0]}, 100)
b'{"predictions":[0]}'
"""

from __future__ import annotations

import json
import math
from typing import Any

import orjson

from divault.errors import InputInvalid, ModelFailed

MAX_DEPTH = 32
MAX_VALUES = 800_000
"""Of an answer: 1024 embeddings of 768 numbers, about as many as its bytes allow. Copying them takes 20 to 200 ms."""


def parse(raw: bytes, field: str) -> Any:
    """The JSON value. Raises InputInvalid naming `field`."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as err:
        raise _invalid(field, f"{field} is not JSON: {err.msg}") from None
    # Cheap first: as many brackets as levels are no more than that many levels.
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
        _check_depth(value, MAX_DEPTH, field)
    # Each member has one colon: so many colons as members of the outermost object leave no room for a second key.
    if raw.count(b":") != (len(value) if isinstance(value, dict) else 0):
        _check_keys(raw, field)
    return value


def parse_object(raw: bytes, field: str) -> dict[str, Any]:
    """The JSON object. Raises InputInvalid naming `field`."""
    value = parse(raw, field)
    if not isinstance(value, dict):
        raise _invalid(field, f"{field} is a JSON object")
    return value


def dump(value: Any, max_bytes: int) -> bytes:
    """The value as JSON. Raises ModelFailed for what JSON can't carry, and over `max_bytes`."""
    room = [MAX_VALUES]
    try:
        raw = orjson.dumps(_copied(value, MAX_DEPTH, room))
    except orjson.JSONEncodeError as err:
        raise ModelFailed("the model's answer holds text that is no Unicode", kind="not_json") from err
    if len(raw) > max_bytes:
        raise ModelFailed(f"the answer has {len(raw)} bytes, at most {max_bytes} are sent", kind="answer_too_large")
    return raw


def _check_depth(value: Any, levels: int, field: str) -> None:
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return
    if levels == 0:
        raise _invalid(field, f"{field} has more than {MAX_DEPTH} levels")
    for inner in value:
        if isinstance(inner, list | dict):
            _check_depth(inner, levels - 1, field)


def _check_keys(raw: bytes, field: str) -> None:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise _invalid(field, f"{field} has an object with a key twice")
        return found

    json.loads(raw, object_pairs_hook=unique)


def _copied(value: Any, levels: int, room: list[int]) -> Any:
    """A copy of exact builtin types, so that nothing of the model's own acts later on."""
    room[0] -= 1
    _require_room(room)
    kind = type(value)
    if kind is float:
        if not math.isfinite(value):
            raise ModelFailed(
                "the model's answer has a number that JSON can't carry (NaN or Infinity)", kind="not_finite"
            )
        return value
    if kind in (str, bool, type(None)):
        return value
    if kind is int:
        return _integer(value)
    if levels == 0:
        raise ModelFailed(f"the answer has more than {MAX_DEPTH} levels", kind="answer_too_large")
    if kind in (list, tuple):
        if _is_plain(value):
            room[0] -= len(value)
            _require_room(room)
            return list(value)
        return [_copied(inner, levels - 1, room) for inner in value]
    if kind is dict and all(type(key) is str for key in value):
        return {key: _copied(inner, levels - 1, room) for key, inner in value.items()}
    raise ModelFailed(f"the model's answer holds a {kind.__name__[:80]}, which JSON doesn't have", kind="not_json")


def _is_plain(values: list[Any] | tuple[Any, ...]) -> bool:
    """Whether all are finite floats, or all whole numbers of 64 bits: most of what models give, and told quickly."""
    kinds = set(map(type, values))
    if kinds == {float}:
        return math.isfinite(sum(values))  # one that isn't finite makes the sum not finite; a large sum may be so too
    return kinds == {int} and min(values) >= -(2**63) and max(values) < 2**64


def _require_room(room: list[int]) -> None:
    if room[0] < 0:
        raise ModelFailed(f"the answer has more than {MAX_VALUES} values", kind="answer_too_large")


def _integer(value: int) -> int:
    if not -(2**63) <= value < 2**64:
        raise ModelFailed("the model's answer has an integer of more than 64 bits", kind="not_json")
    return value


def _invalid(field: str, detail: str) -> InputInvalid:
    return InputInvalid(detail, field=field)
