"""JSON at the door of a model: what goes in and what may come out."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from divault.errors import InputInvalid, ModelFailed
from divault.models.base import Answer
from divault.workers import child, strict_json

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


def test_an_answer_of_many_items_that_is_too_large_is_the_callers_to_mend() -> None:
    row = [0.5] * 1000
    assert child._success(Answer([row] * 700, 700)).rows == 700
    with pytest.raises(InputInvalid, match="fewer than 900 items"):
        child._success(Answer([row] * 900, 900))
    with pytest.raises(ModelFailed):
        child._success(Answer([row] * 900, 1))


@given(values)
@settings(max_examples=150, deadline=None)
def test_a_json_value_is_read_as_it_is_and_written_as_it_is(value: Any) -> None:
    assert strict_json.parse(json.dumps(value, ensure_ascii=False).encode(), "input_data") == value
    assert json.loads(strict_json.dump(value, 1 << 20)) == value


@given(st.binary(max_size=60) | st.text('[]{}:,"\\0.1eEaNnfItu ', max_size=60).map(str.encode))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_value_or_input_invalid(raw: bytes) -> None:
    try:
        value = strict_json.parse(raw, "input_data")
    except InputInvalid:
        return
    assert json.loads(raw) == value


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"NaN", b'{"a": Infinity}', b"[1e999]", b"[-1e999]", b'{"a": 1, "a": 1}', b'{"a": {"b": 1, "b": 2}}',
        b'{"a": ":", "a": 1}', b'[{"b": 1, "\\u0062": 2}]', b'"\\ud800"', b"\xff", b"\xef\xbb\xbf{}",
        b"{} {}", b"{'a': 1}",
        b"[" * 33 + b"]" * 33, b"[" * 100_000, b'{"a":' * 33 + b"1" + b"}" * 33,
    ],
)  # fmt: skip
def test_what_is_no_strict_json_is_refused(raw: bytes) -> None:
    with pytest.raises(InputInvalid):
        strict_json.parse(raw, "input_data")


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a": ":", "b": 1}', b'{"a:a": {"a": 1}}', b"[" * 32 + b"]" * 32, b'[{"a": 1}, {"a": 1}]',
        b"[" + b"[1]," * 99 + b"[1]]",
    ],
)  # fmt: skip
def test_the_nearest_that_is_strict_json_is_taken(raw: bytes) -> None:
    assert strict_json.parse(raw, "input_data") == json.loads(raw)


def test_parameters_are_an_object() -> None:
    assert strict_json.parse_object(b'{"top": 1}', "parameters") == {"top": 1}
    with pytest.raises(InputInvalid):
        strict_json.parse_object(b"[1]", "parameters")


def itself() -> Any:
    found: list[Any] = []
    found.append(found)
    return found


def laughs() -> Any:
    found: list[Any] = ["ha"]
    for _ in range(25):
        found = [found, found, found]
    return found


class Text(str):
    """Looks like a text and could act like anything."""

    __slots__ = ()


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (float("nan"), "not_finite"), ([1.0, float("inf")], "not_finite"), ({1: 2}, "not_json"),
        ({Text("a"): 1}, "not_json"), (Text("a"), "not_json"), (b"a", "not_json"), ({1, 2}, "not_json"),
        (2**64, "not_json"), (np.float64(1), "not_json"), ([1, 2**64], "not_json"), ([-(2**63) - 1], "not_json"),
        ([float("inf"), float("-inf")], "not_finite"), ([1.0, np.float64(2)], "not_json"),
        (itself(), "answer_too_large"), (laughs(), "answer_too_large"), ([0] * 200_001, "answer_too_large"),
        ("x" * 2000, "answer_too_large"),
    ],
    ids=[
        "nan", "infinity", "key", "subclassed-key", "subclass", "bytes", "set", "integer", "numpy", "integers",
        "negative", "infinities", "numpys", "itself", "laughs",
        "many", "long",
    ],
)  # fmt: skip
def test_what_json_can_not_carry_is_no_answer(value: Any, kind: str) -> None:
    with pytest.raises(ModelFailed) as caught:
        strict_json.dump(value, 1000)

    assert caught.value.data["kind"] == kind


def test_a_lone_surrogate_is_no_answer() -> None:
    with pytest.raises(ModelFailed) as caught:
        strict_json.dump(["\ud800"], 1000)

    assert caught.value.data["kind"] == "not_json"


def test_the_nearest_that_json_can_carry_is_an_answer() -> None:
    assert strict_json.dump({"a": (1, 2.5, None, True, "x", 2**64 - 1)}, 1000) == (
        b'{"a":[1,2.5,null,true,"x",18446744073709551615]}'
    )


def test_large_numbers_whose_sum_is_too_large_are_an_answer() -> None:
    assert strict_json.dump([1.7e308, 1.7e308], 100) == b"[1.7e+308,1.7e+308]"
    assert strict_json.dump([2**64 - 1, -(2**63)], 100) == b"[18446744073709551615,-9223372036854775808]"


def test_what_is_sent_is_a_copy() -> None:
    numbers = [1.0, 2.0]

    assert strict_json._copied(numbers, 2, [10]) is not numbers
