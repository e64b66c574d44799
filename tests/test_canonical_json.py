"""The quick way to a canonical form gives what RFC 8785 says, or leaves the value to the slow one."""

from __future__ import annotations

import math

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from divault.errors import BadRequest
from divault.messages import canonical

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
