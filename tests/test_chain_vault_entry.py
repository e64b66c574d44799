"""The vault's entry is the published dynamic tuple in its canonical encoding, and nothing else."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from eth_abi.abi import decode, encode
from eth_abi.exceptions import DecodingError
from hypothesis import given, settings
from hypothesis import strategies as st

from divault.chain.records import Malformed
from divault.chain.vault import parse_model
from divault.values import Address, GateType, ModelId

TUPLE = "(string,address,uint256,address,bool,uint256,uint256,uint256,string[],string,uint256)"
PUBLISHED_FLAT = ["string", "address", "uint256", "address", "bool", "uint256"]
MODEL, USDC = ModelId.parse("m1"), Address(b"\x05" * 20)
ENTRY = ("bafy", b"\x0a" * 20, 20_000, b"\x0b" * 20, True, 3, 100, 200, ["a", "bb" * 20], "1.0", 10**18)
BOUNDED = settings(max_examples=200, deadline=None)

texts = st.text(st.characters(codec="utf-8"), max_size=64)
addresses = st.binary(min_size=20, max_size=20)
uints = st.integers(0, 2**256 - 1)
entries = st.tuples(
    texts, addresses, uints, addresses, st.booleans(), uints, uints, uints, st.lists(texts, max_size=5), texts, uints
)


def encoded(entry: Any) -> bytes:
    return encode([TUPLE], [entry])


@BOUNDED
@given(entries)
def test_every_entry_that_a_vault_can_return_reads_back(entry: Any) -> None:
    info = parse_model(MODEL, encoded(entry), USDC)

    assert (info.cid, info.token.raw, info.price.atomic, info.owner.raw, info.active) == entry[:5]
    assert (info.total_inferences, info.created_at, info.updated_at) == entry[5:8]
    assert (list(info.tags), info.version, info.min_balance) == entry[8:]
    assert (info.model, info.payment_token, info.gate) == (MODEL, USDC, GateType.TOKEN)


def test_the_published_flat_outputs_do_not_decode_what_a_vault_returns() -> None:
    with pytest.raises((DecodingError, OverflowError)):
        decode(PUBLISHED_FLAT, encoded(ENTRY))


@BOUNDED
@given(st.data())
def test_any_damage_is_refused_or_is_another_well_formed_entry(data: st.DataObject) -> None:
    raw = bytearray(encoded(ENTRY))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(Malformed, OverflowError):
        info = parse_model(MODEL, bytes(raw), USDC)
        again = (info.cid, info.token.raw, info.price.atomic, info.owner.raw, info.active, info.total_inferences)
        rest = (info.created_at, info.updated_at, info.tags, info.version, info.min_balance)

        assert encoded((*again, *rest)) == bytes(raw)  # one encoding per entry


@BOUNDED
@given(st.binary(max_size=800))
def test_any_bytes_are_an_entry_or_refused(raw: bytes) -> None:
    for returned in (raw, (32).to_bytes(32, "big") + raw, encoded(ENTRY)[:352] + raw):
        with contextlib.suppress(Malformed, OverflowError):
            parse_model(MODEL, returned, USDC)


@pytest.mark.parametrize("cut", [1, 31, 32, 64, 400])
def test_a_cut_or_longer_entry_is_refused(cut: int) -> None:
    whole = encoded(ENTRY)
    with pytest.raises(Malformed):
        parse_model(MODEL, whole[:-cut], USDC)
    with pytest.raises(Malformed):
        parse_model(MODEL, whole + bytes(cut), USDC)


@pytest.mark.parametrize(
    ("field", "within", "beyond"),
    [
        (0, "c" * 256, "c" * 257),
        (8, ["t"] * 64, ["t"] * 65),
        (8, ["t" * 256], ["t" * 257]),
        (9, "1" * 256, "1" * 257),
        (9, "1", "1" * 70_000),
    ],
)
def test_texts_are_bounded(field: int, within: Any, beyond: Any) -> None:
    def with_field(value: Any) -> bytes:
        return encoded((*ENTRY[:field], value, *ENTRY[field + 1 :]))

    parse_model(MODEL, with_field(within), USDC)
    with pytest.raises(OverflowError):
        parse_model(MODEL, with_field(beyond), USDC)


def test_a_text_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(OverflowError, match="UTF-8"):
        parse_model(MODEL, encoded(ENTRY).replace(b"bafy", b"\xff\xfe\xfd\xfc"), USDC)


def test_an_array_that_points_many_times_at_one_text_is_refused() -> None:
    one = encode(["string[]"], [["x" * 200]])[32:]
    bomb = (64).to_bytes(32, "big") + (64 * 32).to_bytes(32, "big") * 64 + one[64:]
    head = encoded((*ENTRY[:8], [], *ENTRY[9:]))
    with pytest.raises(Malformed):
        parse_model(MODEL, head.replace(bytes(32) + b"\x00" * 31 + b"\x03", bomb, 1) + bomb, USDC)
