"""What an endpoint sends is parsed strictly: a value of this project or `Malformed`, whatever the bytes."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from divault.chain import records
from divault.chain.answers import Refused, Request, Reverted, parse_answers
from divault.chain.multicall import parse_aggregate
from divault.chain.records import Malformed
from divault.values import Address, BlockRef, Digest

HASH, OTHER, WHO = "0x" + "aa" * 32, "0x" + "bb" * 32, "0x" + "01" * 20
BLOCK = {"number": "0x2", "hash": HASH, "timestamp": "0x65"}
LOG = {
    "address": WHO,
    "topics": [HASH],
    "data": "0x",
    "blockNumber": "0x2",
    "blockHash": HASH,
    "transactionHash": OTHER,
    "logIndex": "0x0",
    "removed": False,
}
RECEIPT = {
    "transactionHash": OTHER,
    "status": "0x1",
    "blockNumber": "0x2",
    "blockHash": HASH,
    "from": WHO,
    "to": None,
    "contractAddress": WHO,
    "gasUsed": "0x5208",
    "logs": [LOG],
}
TRANSACTION = {
    "hash": HASH,
    "from": WHO,
    "to": WHO,
    "nonce": "0x0",
    "value": "0x0",
    "input": "0x00ff",
    "blockNumber": None,
    "blockHash": None,
}
RECORDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "block": (records.block, BLOCK),
    "log": (records.log, LOG),
    "receipt": (records.receipt, RECEIPT),
    "transaction": (records.transaction, TRANSACTION),
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from([HASH, WHO, "0x", "0x0", "0x1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*RECEIPT, *LOG]), inner, max_size=6),
    max_leaves=12,
)
BOUNDED = settings(max_examples=200, deadline=None)


def test_well_formed_records_parse() -> None:
    block = records.block(BLOCK)
    receipt = records.receipt(RECEIPT)
    transaction = records.transaction(TRANSACTION)

    assert block == BlockRef(2, Digest(b"\xaa" * 32), 0x65)
    assert (receipt.succeeded, receipt.to, receipt.contract) == (True, None, Address(b"\x01" * 20))
    assert receipt.logs[0].topics == (Digest(b"\xaa" * 32),)
    assert (transaction.data, transaction.block_hash, transaction.chain_id) == (b"\x00\xff", None, None)


@pytest.mark.parametrize("kind", RECORDS)
def test_a_record_with_a_field_missing_or_of_another_shape_is_malformed(kind: str) -> None:
    parse, good = RECORDS[kind]
    may_be_null = {"to", "contractAddress", "blockNumber", "blockHash"} if kind in ("receipt", "transaction") else set()
    for name in good.keys() - {"removed"}:
        for bad in (7, "0xZZ", "0x012", [], {}, True, *([None] if name not in may_be_null else [])):
            if (name, bad) in (("topics", []), ("logs", [])):
                continue
            with pytest.raises(Malformed):
                parse({**good, name: bad})
        if name not in may_be_null:
            with pytest.raises(Malformed):
                parse({key: value for key, value in good.items() if key != name})


@pytest.mark.parametrize(
    "change",
    [
        {"transactionHash": HASH},
        {"blockHash": OTHER},
        {"blockNumber": "0x3"},
        {"removed": True},
        {"topics": [HASH] * 5},
    ],
)
def test_a_log_that_does_not_belong_to_its_receipt_is_malformed(change: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        records.receipt({**RECEIPT, "logs": [LOG, {**LOG, **change}]})


@pytest.mark.parametrize("text", ["0x", "0x00", "1", "0X1", "0x1 ", "-0x1", "0x" + "f" * 65, "\u0660x1", None, 1])
def test_a_quantity_has_one_spelling(text: Any) -> None:
    with pytest.raises(Malformed):
        records.quantity(text)


def test_a_quantity_may_have_256_bits() -> None:
    assert records.quantity("0x" + "f" * 64) == 2**256 - 1
    assert records.quantity("0x0") == 0


def test_a_pending_block_is_no_block() -> None:
    with pytest.raises(Malformed):
        records.block({**BLOCK, "hash": None})


@BOUNDED
@given(JSON)
def test_any_json_is_a_record_or_malformed(value: Any) -> None:
    for parse, _ in RECORDS.values():
        with contextlib.suppress(Malformed):
            parse(value)


@BOUNDED
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()), st.integers(1, 3))
def test_any_body_is_answers_or_malformed(body: bytes, count: int) -> None:
    with pytest.raises(Malformed):
        parse_answers(body, [Request("eth_blockNumber", (), records.quantity)] * count, first_id=10)


ENVELOPE = st.fixed_dictionaries(
    {},
    optional={
        "jsonrpc": st.sampled_from(["2.0", "1.0", 2.0]),
        "id": st.sampled_from([1, 1.0, True, "1", None, 2]),
        "result": st.sampled_from(["0x1", "0x01", None, 1]),
        "error": JSON | st.fixed_dictionaries({"code": st.integers(-5, 5), "message": st.text(max_size=20)}),
    },
)


@BOUNDED
@given(ENVELOPE)
def test_any_envelope_is_a_value_an_error_or_malformed(envelope: dict[str, Any]) -> None:
    try:
        (answer,) = parse_answers(json.dumps(envelope).encode(), [Request("m", (), records.quantity)], first_id=1)
    except Malformed:
        return
    assert envelope["jsonrpc"] == "2.0"
    assert type(envelope["id"]) is int
    assert isinstance(answer, Reverted | Refused) or (answer == 1 and "error" not in envelope)


@BOUNDED
@given(st.binary(max_size=320))
def test_any_revert_data_gives_a_printable_reason(data: bytes) -> None:
    for prefix in (b"", bytes.fromhex("08c379a0"), bytes.fromhex("4e487b71")):
        reason = Reverted(prefix + data, "words of the node").reason

        assert reason.isprintable()
        assert len(reason) <= 200


@BOUNDED
@given(st.binary(max_size=400))
def test_any_aggregate_result_is_outcomes_or_malformed(returned: bytes) -> None:
    try:
        outcomes = parse_aggregate(returned, 1)
    except Malformed:
        return
    assert len(outcomes) == 1
