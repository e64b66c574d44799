"""The quick way to a canonical form gives what RFC 8785 says, or leaves the value to the slow one."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from divault.errors import BadRequest
from divault.messages import bodies, canonical, strict_json
from divault.receipts.fields import runtime_hash

numbers = st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(texts, inner, max_size=6),
    max_leaves=20,
)


@given(values)
@settings(max_examples=200, deadline=None)
def test_any_value(value) -> None:
    assert canonical(value) == rfc8785.dumps(value)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=8))
@settings(max_examples=200, deadline=None)
def test_any_row_of_numbers(row) -> None:
    assert canonical({"features": row}) == rfc8785.dumps({"features": row})


@pytest.mark.parametrize("power", range(-30, 30))
def test_numbers_around_the_powers_of_ten(power: int) -> None:
    for base in (1.0, 1.5, 9.999999999999999, 3.0000000000000004):
        for value in (base * 10.0**power, -base * 10.0**power, math.nextafter(10.0**power, 0)):
            assert canonical([value]) == rfc8785.dumps([value])


def test_the_form_of_what_people_send() -> None:
    row = [17.99, 10.38, 122.8, 1001.0, 0.1184, 0.006399, -0.0, 1e21, 1e-7, 5e-324]
    told = canonical({"b": row, "a": "\u20ac\n", "\u00e9": 1, "": None})

    assert (
        told
        == (
            '{"":null,"a":"\u20ac\\n","b":[17.99,10.38,122.8,1001,0.1184,0.006399,0,1e+21,1e-7,5e-324],"\u00e9":1}'
        ).encode()
    )


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 2**53, "\ud800", {1: 2}, {"\ud800": 1}, {"k": ["\udfff"]}])
def test_what_has_no_canonical_form_is_refused(odd) -> None:
    with pytest.raises(BadRequest):
        canonical({"value": odd})


def nested(levels: int, innermost=0):
    value = innermost
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("odd", [nested(100_000), nested(100_000, 5e-324), {"k": nested(100_000)}])
def test_what_nests_too_deep_is_refused_and_not_a_fault(odd) -> None:
    with pytest.raises(BadRequest):
        canonical(odd)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_no_number_among_numbers_has_no_canonical_form(odd: float, place: int) -> None:
    values = [0.5, 1.5]
    values.insert(place, odd)
    with pytest.raises(BadRequest):
        canonical({"features": values})


@pytest.mark.parametrize("odd", [float("nan"), datetime(2026, 1, 1, tzinfo=UTC), {1, 2}, 2**60])
def test_a_runtime_that_is_no_json_has_no_hash(odd) -> None:
    """A writer that is kinder than the standard would hash something else than a reader finds."""
    assert runtime_hash({"threads": 1}) == runtime_hash({"threads": 1.0})
    with pytest.raises(BadRequest):
        runtime_hash({"threads": odd})


def slowly(raw: bytes):
    """What the exact reader alone makes of the bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bodies, "_quick", lambda _: bodies._ODD)
        try:
            return strict_json(raw)
        except BadRequest as err:
            return err.detail


def quickly(raw: bytes):
    try:
        return strict_json(raw)
    except BadRequest as err:
        return err.detail


@given(values)
@settings(max_examples=200, deadline=None)
def test_the_quick_reader_reads_what_the_exact_one_reads(value) -> None:
    raw = json.dumps(value).encode()
    assert repr(quickly(raw)) == repr(slowly(raw))


@given(st.binary(max_size=40) | st.text('{}[]":,0123456789.eE+-\\u d8\n "abtrufalsen', max_size=30).map(str.encode))
@settings(max_examples=200, deadline=None)
def test_the_quick_reader_takes_nothing_that_the_exact_one_refuses(raw: bytes) -> None:
    assert repr(quickly(raw)) == repr(slowly(raw))


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":1,"a" :2}', b'{"a":{"b":1,"b":2}}', b'{"a":"x:y","a":1}', b'[9007199254740992]', b'[9007199254740991]',
        b'[-9007199254740993]', b'[12345678901234567890123]', b'[0.12345678901234567]', b'[1234567890123456.5]',
        b'[1e999]', b'[-0]', b'[-0.0]', b'[1E5]', b'"\\ud800"', b'"\\ud83d\\ude00"', b'[NaN]', b'\xef\xbb\xbf{}', b'',
        b'[1e16]', b'[10000000000000000.0]', b'{"\\u0061":1,"a":2}', b'[00]', b'[.5]', b'["\x01"]', b'[1,]',
    ],
)  # fmt: skip
def test_both_readers_agree_at_the_edges(raw: bytes) -> None:
    assert repr(quickly(raw)) == repr(slowly(raw))
