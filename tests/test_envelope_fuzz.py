"""Whatever arrives as a request, the envelope parser gives a call or a typed error, never a call without a proof."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from divault.api.envelope import MAX_SELF_SIGNED_BYTES, Envelopes, Incoming
from divault.api.problems import STATUS, problem
from divault.auth import Authenticator
from divault.errors import DivaultError
from divault.sessions import Home
from divault.values import Address, BodySignature, HeaderSignature, SignedCall

NODE, VAULT = Address(b"\x01" * 20), Address(b"\x02" * 20)
ENVELOPES = Envelopes(Authenticator(Home(77001, VAULT, NODE, "https://node.example")))
WALLET = "0xb2a1c543abe6c496fe658f34dda1e023885d293e"
GOOD: dict[str, Any] = {
    "model_id": "m1",
    "user_address": WALLET,
    "input_data": {"text": "hi"},
    "user_signature": "0x" + "11" * 65,
    "nonce": "0x" + "22" * 32,
    "issued_at": 1790000000,
    "expires_at": 1790000060,
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from([*GOOD, "max_price", "payment", "parameters", "decryption_key", "cid", "chain_id", "vault"])
HEADERS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "signature-input",
                "signature",
                "content-digest",
                "divault-max-price",
                "divault-payment",
                "host",
                "authorization",
                "x",
            ]
        ),
        st.text(st.characters(max_codepoint=255), max_size=120),
    ),
    max_size=6,
)


def parsed(raw: bytes, headers: list[tuple[str, str]] | None = None, method: str = "POST", query: str = "") -> Any:
    incoming = Incoming(raw, method, "/api/v1/inference", query, headers or [], "127.0.0.1")
    try:
        return ENVELOPES.parse(incoming)
    except DivaultError as err:
        refusal = err
    json.dumps(problem(refusal, "0x00"), allow_nan=False)
    assert 400 <= STATUS[refusal.code] < 500, refusal
    return refusal


def test_a_whole_body_is_a_call() -> None:
    call = parsed(json.dumps(GOOD).encode())

    assert isinstance(call, SignedCall)
    assert isinstance(call.proof, BodySignature)
    assert (call.input_data, call.max_price.atomic) == (b'{"text": "hi"}', 0)


@given(st.dictionaries(NAMES, JSON, max_size=6))
@settings(max_examples=200, deadline=None)
def test_any_member_of_any_type_is_a_call_or_a_typed_error(changes: dict[str, Any]) -> None:
    try:
        raw = json.dumps(GOOD | changes).encode()
    except UnicodeEncodeError:
        return
    found = parsed(raw)

    if isinstance(found, SignedCall):
        assert isinstance(found.proof, BodySignature)
        assert set(GOOD) - {"input_data"} <= set(json.loads(raw))


@given(st.binary(max_size=400), HEADERS, st.sampled_from(["POST", "GET", "DELETE"]), st.text(max_size=5))
@settings(max_examples=200, deadline=None)
def test_any_bytes_and_headers_are_a_call_or_a_typed_error(
    raw: bytes, headers: list[tuple[str, str]], method: str, query: str
) -> None:
    found = parsed(raw, headers, method, query)

    if isinstance(found, SignedCall):
        assert isinstance(found.proof, BodySignature | HeaderSignature)


@given(st.sampled_from(sorted(GOOD)))
@settings(max_examples=20, deadline=None)
def test_no_member_of_the_signature_can_be_left_out(name: str) -> None:
    body = {key: value for key, value in GOOD.items() if key != name}
    found = parsed(json.dumps(body).encode())

    if name == "input_data":  # the model says what it takes
        assert isinstance(found, SignedCall)
    else:
        assert found.code in ("signature_incomplete", "input_invalid", "bad_request")


def test_a_body_that_carries_its_signature_has_a_bound() -> None:
    big = json.dumps(GOOD | {"input_data": {"text": "x" * MAX_SELF_SIGNED_BYTES}}).encode()

    assert parsed(big).code == "sign_headers"


def test_a_covered_header_must_not_come_twice() -> None:
    assert parsed(b"", [("signature-input", "a"), ("signature-input", "b")], "DELETE").code == "bad_request"


SIGNED_HEADERS = [
    (
        "signature-input",
        'eth=("@authority" "@method" "@path" "content-digest");created=1;expires=2;nonce="a";'
        f'keyid="eip155:77001:{WALLET}";tag="erc8128"',
    )
]


def test_members_that_nobody_reads_cost_nothing_before_the_signature_is_checked() -> None:
    """Eight MiB of them, read one by one, held the whole node for seconds."""
    body = b'{"model_id":"m1","input_data":[1],' + b",".join(b'"%x":{"a":[]}' % i for i in range(100_000)) + b"}"
    tracemalloc.start()
    try:
        call = parsed(body, SIGNED_HEADERS)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert isinstance(call, SignedCall)
    assert call.input_data == b"[1]"
    assert peak < len(body) / 10


def test_members_beside_the_input_have_a_bound_in_a_body_whose_headers_are_signed() -> None:
    lists = b"[" + b"[]," * MAX_SELF_SIGNED_BYTES + b"[]]"

    assert isinstance(parsed(b'{"model_id":"m1","input_data":' + lists + b"}", SIGNED_HEADERS), SignedCall)
    assert parsed(b'{"model_id":"m1","payment":' + lists + b"}", SIGNED_HEADERS).code == "too_large"


def test_chain_and_vault_that_a_body_names_count_in_either_envelope() -> None:
    call = parsed(json.dumps({"model_id": "m1", "chain_id": 1, "vault": WALLET}).encode(), SIGNED_HEADERS)

    assert (call.proof.chain_id, call.proof.vault) == (1, Address.parse(WALLET))
