"""Conditions and aggregators: what divault sends, and that nothing malformed gets past or raises anything untyped."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from divault.errors import BadRequest
from divault.storage._api import Reply
from divault.storage.kavach import _good, _require_success
from divault.values import Address
from divault.vault.conditions import (
    CHAINS,
    MAX_CONDITIONS,
    AccessConditions,
    check_schema,
    gate_conditions,
    parse_aggregator,
)
from divault.vault.kavach import FIELD_ORDER, KeyShard, generate, likely_keys, recover_key, split_key
from tests.vectors_root import vectors_root

CASES = json.loads((vectors_root() / "lighthouse/access_conditions.json").read_text())
VALID = [case["body"] for case in CASES if case["kavach_0_2_1"] == "valid"]
TOKEN = Address(b"\x11" * 20)


def test_gate_of_a_model_is_one_condition_in_raw_units():
    gate = gate_conditions(TOKEN, 2**200, 8453)
    body = {"address": str(TOKEN), "cid": "bafk", "conditions": list(gate.conditions), "aggregator": gate.aggregator}

    assert AccessConditions.parse(body) == gate
    (condition,) = gate.conditions
    assert condition["returnValueTest"] == {"comparator": ">=", "value": str(2**200)}
    assert (condition["chain"], condition["method"], condition["parameters"]) == ("Base", "balanceOf", [":userAddress"])


@pytest.mark.parametrize(("minimum", "chain_id"), [(0, 8453), (-1, 8453), (1, 11155111), (1, 31337), (1, 42161)])
def test_gate_that_kavach_can_not_check_is_refused(minimum, chain_id):
    with pytest.raises(BadRequest):
        gate_conditions(TOKEN, minimum, chain_id)


def test_every_chain_of_the_table_can_be_written():
    for chain_id in CHAINS:
        gate_conditions(TOKEN, 1, chain_id)


@pytest.mark.parametrize(
    ("text", "ids", "expression"),
    [
        ("[1]", "1", ("id", "1")),
        ("([1])", "1", ("id", "1")),
        ("[1] and [2]", "12", ("and", ("id", "1"), ("id", "2"))),
        ("[1] AND [2] or [3]", "123", ("or", ("and", ("id", "1"), ("id", "2")), ("id", "3"))),
        ("[1] and ([2] or [3])", "123", ("and", ("id", "1"), ("or", ("id", "2"), ("id", "3")))),
        ("!([1] and [2])", "12", ("not", ("and", ("id", "1"), ("id", "2")))),
        ("![1] or !![2]", "12", ("or", ("not", ("id", "1")), ("not", ("not", ("id", "2"))))),
        (" ( [ 1 ]and[2] ) ", "12", ("and", ("id", "1"), ("id", "2"))),
        ("[1] or [2] or [1]", "12", ("or", ("id", "1"), ("id", "2"), ("id", "1"))),
    ],
)
def test_aggregator_is_an_expression(text, ids, expression):
    assert parse_aggregator(text, list(ids)) == expression


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "1 and 2", "[1] and", "and [1]", "[1] and and [2]", "[1] [2]", "([1] and [2]", "[1] and [2])", "()",
        "[1] and ()", "!", "[1] ! [2]", "[1] nand [2]", "[1] and [2] xor", "[1] and [3]", "[1]", "[2]", "[] and [2]",
        "[1] and [-2]", "[1] && [2]", "[1]\x00and [2]", "[1] andor [2]", "[\u0661] and [2]",
        "(" * 60 + "[1] and [2]" + ")" * 60, "!" * 10_000 + "[1] and [2]",
        "[1] and [2]" + " and [2]" * 5000,
    ],
)  # fmt: skip
def test_what_is_no_expression_of_these_conditions_is_refused(text):
    with pytest.raises(BadRequest) as caught:
        parse_aggregator(text, ["1", "2"])

    assert caught.value.data["field"] == "aggregator"


def evaluate(expression: tuple, truth: dict[str, bool]) -> bool:
    kind, *rest = expression
    if kind == "id":
        return truth[rest[0]]
    values = [evaluate(part, truth) for part in rest]
    return not values[0] if kind == "not" else all(values) if kind == "and" else any(values)


PYTHON = st.recursive(
    st.sampled_from(["[1]", "[2]", "[3]"]),
    lambda inner: (
        st.tuples(inner, st.sampled_from([" and ", " or "]), inner).map(lambda t: f"({t[0]}{t[1]}{t[2]})")
        | inner.map(lambda text: f"!{text}")
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(PYTHON, st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_expressions_mean_what_they_say(text, values):
    whole = f"{text} or ([1] and [2] and [3])"
    truth = dict(zip("123", values, strict=True))
    words = whole.replace("!", " not ")
    for name, value in truth.items():
        words = words.replace(f"[{name}]", str(value))

    assert evaluate(parse_aggregator(whole, list("123")), truth) == eval(words)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="[]()! 12andorANDOR\t", max_size=40))
def test_any_text_is_an_expression_or_a_typed_error(text):
    try:
        parse_aggregator(text, ["1", "2"])
    except BadRequest as err:
        assert len(err.detail) < 300  # noqa: PT017  # either outcome is fine


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    found = [path] if path else []
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            found += places(value[key], (*path, key))
    return found


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(VALID), st.randoms(use_true_random=False), JSON)
def test_any_value_at_any_place_is_taken_or_a_typed_error(body, random, value):
    body = copy.deepcopy(body)
    path = random.choice(places(body))
    target = body
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value

    for check in (check_schema, AccessConditions.parse):
        try:
            check(body)
        except BadRequest as err:
            assert err.data["field"] is not None  # noqa: PT017  # either outcome is fine


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_any_body_is_a_typed_error(body):
    with pytest.raises(BadRequest):
        check_schema(body)


def test_more_conditions_than_anybody_needs_are_refused():
    body = copy.deepcopy(VALID[0])
    body["conditions"] = [body["conditions"][0] | {"id": n} for n in range(1, MAX_CONDITIONS + 2)]
    body["aggregator"] = " and ".join(f"[{n}]" for n in range(1, MAX_CONDITIONS + 2))

    with pytest.raises(BadRequest, match="at most"):
        check_schema(body)


# --- shards and replies -------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, FIELD_ORDER - 1), st.integers(1, 6), st.integers(0, 3), st.randoms(use_true_random=False))
def test_enough_shards_make_the_key_and_fewer_another(master, needed, spare, random):
    from divault.values import Secret

    key = f"{master:064x}"
    shards = list(split_key(Secret.of_text(key), needed, needed + spare))
    random.shuffle(shards)

    assert recover_key(shards[:needed]) == key
    assert recover_key(shards) == key
    if needed > 1:
        assert recover_key(shards[: needed - 1]) != key


@pytest.mark.parametrize(("threshold", "count"), [(0, 5), (6, 5), (3, 256), (-1, 1)])
def test_numbers_that_make_no_set_are_refused(threshold, count):
    with pytest.raises(BadRequest):
        generate(threshold, count)


def test_key_and_indices_are_fresh_each_time_and_fill_the_field():
    keys, sets = zip(*(generate() for _ in range(20)), strict=True)
    indices = {int(shard.index, 16) for shards in sets for shard in shards}

    assert len({key.reveal() for key in keys}) == 20
    assert len(indices) == 100
    assert max(indices).bit_length() == 255
    assert max(indices) < FIELD_ORDER


def test_likely_keys_of_two_shards_or_none_are_none():
    assert list(likely_keys(generate()[1][:2])) == []
    assert list(likely_keys([])) == []
    with pytest.raises(BadRequest):
        list(likely_keys([KeyShard("x", "y")] * 3))


REPLIES = JSON.map(json.dumps) | st.text(max_size=60)


@settings(max_examples=200, deadline=None)
@given(REPLIES, st.sampled_from([200, 201, 204, 400, 401, 403, 404, 406, 418, 500, 502]))
def test_any_reply_of_a_key_node_is_a_value_or_a_typed_error(text, status):
    from divault.errors import AccessDenied, StorageFailed

    for read in (_good, _require_success):
        try:
            read(Reply("host", status, text))
        except (AccessDenied, StorageFailed) as err:
            assert "host" in err.detail  # noqa: PT017  # either outcome is fine
