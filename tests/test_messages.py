"""What wallets and nodes sign: eth-account as oracle, negative twins, and parsers that meet anything."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from eth_account import Account
from eth_account.messages import encode_defunct, encode_typed_data
from hypothesis import given, settings
from hypothesis import strategies as st

from divault.errors import (
    BadRequest,
    DivaultError,
    NonceUsed,
    PriceChanged,
    SignatureExpired,
    SignatureInvalid,
    WrongChain,
    WrongNode,
)
from divault.messages import (
    Domain,
    HeaderParameters,
    HeaderPolicy,
    HttpMessage,
    InferenceRequest,
    NodeDescriptor,
    SignInMessage,
    address_of,
    authority_of,
    body_hash,
    claimed_user,
    nonce_of,
    parse_key,
    personal_digest,
    raw_members,
    recover,
    request_domain,
    sign_digest,
    sign_headers,
    signature_text,
    strict_json,
    strict_object,
    unwrap,
    verify_headers,
)
from divault.messages.bodies import MAX_DEPTH
from divault.messages.nodes import DESCRIPTOR
from divault.messages.reasons import CLASSES, refusal
from divault.messages.requests import REQUEST
from divault.receipts.fields import RECEIPT
from divault.values import Address, Digest, Nonce, Secret, Usdc

KEY = parse_key("0x" + "4c" * 32)
USER = address_of(KEY)
VAULT = Address(b"\x11" * 20)
DOMAIN = request_domain(31337, VAULT)
UINT64, UINT256 = 2**64 - 1, 2**256 - 1
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141

addresses = st.binary(min_size=20, max_size=20).map(Address)
digests = st.binary(min_size=32, max_size=32).map(Digest)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
keys = st.integers(1, ORDER - 1).map(lambda n: Secret(n.to_bytes(32, "big")))
requests = st.builds(
    InferenceRequest,
    user=addresses,
    node=addresses,
    model=digests,
    method=texts,
    path=texts,
    body_hash=digests,
    max_price=st.integers(0, UINT256).map(Usdc),
    nonce=digests.map(lambda d: Nonce(d.raw)),
    issued_at=st.integers(0, UINT64),
    expires_at=st.integers(0, UINT64),
)
bounded = settings(max_examples=100, deadline=None)


def refused(work: Callable[[], object], data: str = "reason") -> str | None:
    """Why it was refused with a typed error; None if it was not."""
    try:
        work()
    except DivaultError as err:
        return str(err.data[data])
    return None


def with_numbers(typed_data: dict[str, Any]) -> dict[str, Any]:
    """The same typed data with numbers as numbers, as eth-account wants them."""
    kinds = {field["name"]: field["type"] for field in typed_data["types"][typed_data["primaryType"]]}
    message = {k: int(v) if kinds[k].startswith("uint") else v for k, v in typed_data["message"].items()}
    return typed_data | {"message": message}


# --- an independent implementation agrees -------------------------------------------------------------------------


@bounded
@given(request=requests, key=keys, chain_id=st.integers(0, UINT256), vault=addresses)
def test_typed_digest_and_signature_are_those_of_eth_account(
    request: InferenceRequest, key: Secret, chain_id: int, vault: Address
) -> None:
    domain = request_domain(chain_id, vault)
    signable = encode_typed_data(full_message=with_numbers(request.typed_data(domain)))
    signed = Account.sign_message(signable, key.reveal())

    assert signed.message_hash == request.digest(domain).raw
    assert signed.signature == sign_digest(key, request.digest(domain))


@bounded
@given(text=texts, key=keys)
def test_personal_digest_and_signature_are_those_of_eth_account(text: str, key: Secret) -> None:
    signed = Account.sign_message(encode_defunct(text=text), key.reveal())

    assert signed.message_hash == personal_digest(text).raw
    assert signed.signature == sign_digest(key, personal_digest(text))
    assert str(address_of(key)) == Account.from_key(key.reveal()).address


@pytest.mark.parametrize("struct", [REQUEST, DESCRIPTOR, RECEIPT], ids=lambda s: s.name)
def test_every_struct_is_hashed_as_eth_account_does(struct: Any) -> None:
    samples = {"address": Address(b"\x22" * 20), "bytes32": Digest(b"\x33" * 32), "string": "é", "uint8": 255}
    values = {name: samples.get(kind, UINT64) for name, kind in struct.fields}
    domain = Domain("Name", "1", 1, VAULT)
    signable = encode_typed_data(full_message=with_numbers(struct.typed_data(domain, values)))

    assert signable.body == struct.hash(values)
    assert signable.header == domain.separator.raw


@bounded
@given(request=requests)
def test_typed_message_is_read_back_as_it_was_written(request: InferenceRequest) -> None:
    assert request == InferenceRequest.parse(json.loads(json.dumps(request.message())))


@bounded
@given(key=keys, digest=digests)
def test_own_signature_recovers_in_all_four_accepted_spellings(key: Secret, digest: Digest) -> None:
    raw = sign_digest(key, digest)
    parity = raw[64] - 27
    compact = (int.from_bytes(raw[32:64], "big") | parity << 255).to_bytes(32, "big")
    spellings = [raw, raw[:64] + bytes([parity]), raw[:32] + compact]

    assert {address_of(key)} == {recover(digest, "0x" + spelling.hex()) for spelling in spellings}
    assert address_of(key) == recover(digest, raw.hex().upper())


@bounded
@given(digest=digests, raw=st.binary(max_size=70) | st.binary(min_size=64, max_size=65))
def test_any_bytes_recover_somebody_or_are_refused_with_a_reason(digest: Digest, raw: bytes) -> None:
    assert refused(lambda: recover(digest, "0x" + raw.hex())) in (None, *CLASSES)


@bounded
@given(text=st.text(max_size=140))
def test_any_text_is_a_signature_or_bad_hex(text: str) -> None:
    assert refused(lambda: recover(Digest.ZERO, text)) in CLASSES


@pytest.mark.parametrize("digits", ["", "4c" * 31, "4c" * 33, "00" * 32, "ff" * 32, "g" * 64, f"{ORDER:x}"])
@pytest.mark.parametrize("prefix", ["0x", "0X", ""])
def test_key_of_another_form_is_refused_without_being_repeated(prefix: str, digits: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_key(prefix + digits)

    assert len(digits) < 8 or digits[:8] not in caught.value.detail


def test_key_without_prefix_is_refused() -> None:
    with pytest.raises(BadRequest):
        parse_key("4c" * 32)


@pytest.mark.parametrize(
    ("reason", "cls"),
    [
        ("expired", SignatureExpired),
        ("issued_in_future", SignatureExpired),
        ("not_yet_valid", SignatureExpired),
        ("node_mismatch", WrongNode),
        ("wrong_chain", WrongChain),
        ("wrong_domain", WrongChain),
        ("replay", NonceUsed),
        ("price_above_max", PriceChanged),
        ("high_s", SignatureInvalid),
    ],
)
def test_reason_has_its_class(reason: str, cls: type[DivaultError]) -> None:
    error = refusal(reason, "")

    assert type(error) is cls
    assert error.data["reason"] == reason


# --- typed data ---------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)


@bounded
@given(name=st.sampled_from([name for name, _ in REQUEST.fields]), value=JSON)
def test_any_value_in_a_typed_message_is_read_or_named(name: str, value: Any) -> None:
    message = sample().message() | {name: value}
    assert refused(lambda: InferenceRequest.parse(message), "field") in (None, name)


@bounded
@given(value=JSON)
def test_any_json_is_no_domain_and_no_message(value: Any) -> None:
    for parse in (Domain.parse, InferenceRequest.parse):
        with pytest.raises(BadRequest):
            parse(value)
    with pytest.raises(BadRequest):
        NodeDescriptor.verify(value, now=0)


def test_number_that_its_type_cannot_hold_is_refused() -> None:
    message = sample().message()

    for name, value in (("issuedAt", str(2**64)), ("maxPrice", str(2**256)), ("maxPrice", "01"), ("maxPrice", "-1")):
        with pytest.raises(BadRequest):
            InferenceRequest.parse(message | {name: value})


def sample() -> InferenceRequest:
    return InferenceRequest(
        user=USER,
        node=Address(b"\x01" * 20),
        model=Digest(b"\x02" * 32),
        method="POST",
        path="/api/v1/inference",
        body_hash=Digest(b"\x03" * 32),
        max_price=Usdc(10),
        nonce=Nonce(b"\x04" * 32),
        issued_at=1000,
        expires_at=1300,
    )


# --- bodies -------------------------------------------------------------------------------------------------------

JSON_LIKE = st.text('[]{}",:\\u0a1', max_size=40)
BAD_BODIES = {
    "empty": b"",
    "not json": b"{",
    "two values": b"{} {}",
    "utf-16": '{"a":1}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "broken utf-8": b'{"a":"\xff"}',
    "duplicate key": b'{"a":1,"a":1}',
    "duplicate key by escape": b'{"a":1,"\\u0061":2}',
    "duplicate key inside": b'{"a":[{"b":1,"b":2}]}',
    "NaN": b'{"a":NaN}',
    "Infinity": b'{"a":-Infinity}',
    "overflow to infinity": b'{"a":1e400}',
    "integer beyond 2^53": b'{"a":9007199254740992}',
    "integer below -2^53": b'{"a":-9007199254740992}',
    "integer of 5000 digits": b'{"a":' + b"9" * 5000 + b"}",
    "lone high surrogate": b'{"a":"\\ud800"}',
    "lone low surrogate in a key": b'{"\\uDfff":1}',
    "control character": b'{"a":"\x00"}',
    "comment": b"{}//",
    "trailing comma": b'{"a":1,}',
}


@pytest.mark.parametrize("raw", BAD_BODIES.values(), ids=BAD_BODIES)
def test_body_that_two_readers_could_read_differently_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        strict_json(raw)


def test_nearest_good_bodies_are_read() -> None:
    assert strict_json(b' {"a":9007199254740991,"b":-9007199254740991,"c":1e308}\n') == {
        "a": 2**53 - 1,
        "b": -(2**53 - 1),
        "c": 1e308,
    }
    assert strict_json(b'{"a":"\\ud83d\\ude00"}') == {"a": "\U0001f600"}


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'])
def test_depth_is_bounded_and_never_a_recursion_error(opening: bytes) -> None:
    closing = {b"[": b"]", b'{"a":': b"}", b'[{"a":': b"}]"}[opening]
    levels = MAX_DEPTH // (len(closing))
    deepest = opening * levels + b"1" + closing * levels

    strict_json(deepest)
    for raw in (b"[" + deepest + b"]", opening * 500_000):
        with pytest.raises(BadRequest):
            strict_json(raw)


def test_brackets_inside_strings_are_no_depth() -> None:
    text = "[" * 1000 + '"{'

    assert [text, []] == strict_json(json.dumps([text, []]).encode())


def test_string_that_never_ends_costs_no_more_than_its_length() -> None:
    """Each of its 400,000 quotes would otherwise be tried as the start of a string, to the end."""
    with pytest.raises(BadRequest):
        strict_json(b"[" * 65 + b'"' + b'\\"' * 400_000)


def test_hash_leaves_out_the_five_and_nothing_else() -> None:
    body = strict_object(b'{"model_id":"m1","input_data":{"text":"hi"}}')
    signed = {"user_signature": "0x", "nonce": "n", "issued_at": 1, "expires_at": 2, "max_price": "3"}

    assert str(body_hash(body | signed)) == "0x585568c2596b124fa0a803bb31261aa1c459e2fda8c1871e098111fb6383d942"
    for name in ("user_address", "payment", "parameters", "decryption_key", "anything"):
        assert body_hash(body) != body_hash(body | {name: "x"})


@bounded
@given(raw=st.binary(max_size=60) | JSON.map(json.dumps).map(str.encode) | JSON_LIKE.map(str.encode))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    try:
        value = strict_json(raw)
    except BadRequest:
        return
    assert json.loads(raw) == value
    if isinstance(value, dict):
        body_hash(value)


@bounded
@given(raw=st.binary(max_size=60) | st.text('{}[]":, a1', max_size=40).map(str.encode))
def test_any_bytes_are_split_or_refused(raw: bytes) -> None:
    try:
        members = raw_members(raw)
    except BadRequest:
        return
    assert all(value in raw for value in members.values())


def test_member_keeps_the_bytes_it_came_in() -> None:
    body = b'{ "input_data" : { "x" :  [1.50, 1e2] } , "parameters":{"seed":1}}'

    assert raw_members(body) == {"input_data": b'{ "x" :  [1.50, 1e2] }', "parameters": b'{"seed":1}'}


# --- header signatures --------------------------------------------------------------------------------------------

MESSAGE = HttpMessage("POST", "node.example.org", "/api/v1/inference", None, {}, b'{"model_id":"m1"}')
POLICY = HeaderPolicy(31337, "node.example.org", now=1010)
PARAMETERS = HeaderParameters(chain_id=31337, created=1000, expires=1060, nonce="bm9uY2U", max_price=Usdc(500))


def signed(message: HttpMessage = MESSAGE, parameters: HeaderParameters = PARAMETERS) -> HttpMessage:
    return message.with_headers(sign_headers(KEY, message, parameters))


def reason(message: HttpMessage, policy: HeaderPolicy = POLICY) -> str | None:
    return refused(lambda: verify_headers(message, policy))


def test_signed_headers_prove_wallet_price_and_nonce() -> None:
    proof = verify_headers(signed(), POLICY)

    assert (USER, Usdc(500), nonce_of("bm9uY2U"), 1060) == (proof.user, proof.max_price, proof.nonce, proof.expires)
    assert USER == recover(proof.digest, proof.signature) == claimed_user(signed().headers)


@pytest.mark.parametrize(("cut", "expected"), [(64, None), (63, "bad_length"), (0, "bad_length")])
def test_a_header_signature_may_be_compact_and_no_shorter(cut: int, expected: str | None) -> None:
    message = signed()
    raw = base64.b64decode(message.headers["signature"].removeprefix("eth=:").removesuffix(":"))
    compact = raw[:32] + bytes([raw[32] | (raw[64] - 27) << 7]) + raw[33:64]
    text = base64.b64encode(compact[:cut]).decode()

    assert reason(message.with_headers({"signature": f"eth=:{text}:"})) == expected


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"method": "PUT"}, "signer_mismatch"),
        ({"path": "/api/v1/inference/run"}, "signer_mismatch"),
        ({"query": "x=1"}, "class_bound"),
        ({"body": b'{"model_id":"m2"}'}, "digest_mismatch"),
        ({"body": b""}, "digest_mismatch"),
        ({"authority": "other.example.org"}, "signer_mismatch"),
    ],
)
def test_signed_headers_do_not_prove_another_request(changed: dict[str, Any], expected: str) -> None:
    assert reason(signed()) is None
    assert expected == reason(replace(signed(), **changed))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (replace(POLICY, chain_id=1), "wrong_chain"),
        (replace(POLICY, authority="other.example.org"), "signer_mismatch"),
        (replace(POLICY, now=1060), "expired"),
        (replace(POLICY, now=994), "not_yet_valid"),
        (replace(POLICY, max_ttl_s=59), "ttl_too_long"),
    ],
)
def test_signed_headers_do_not_count_elsewhere_or_at_another_time(policy: HeaderPolicy, expected: str) -> None:
    assert expected == reason(signed(), policy)


def test_window_is_half_open_and_skew_excuses_only_the_start() -> None:
    assert reason(signed(), replace(POLICY, now=1059)) is None
    assert reason(signed(), replace(POLICY, now=995)) is None


def test_price_counts_only_when_it_is_signed() -> None:
    unpriced = signed(parameters=replace(PARAMETERS, max_price=None))
    raised = signed().with_headers({"divault-max-price": "5000"})

    assert verify_headers(unpriced, POLICY).max_price == Usdc(0)
    assert reason(unpriced.with_headers({"divault-max-price": "5000"})) == "class_bound"
    assert reason(raised) == "signer_mismatch"


def test_a_transfer_is_claimed_only_when_it_is_signed() -> None:
    claim = {"divault-payment": "0x" + "7c" * 32}
    paying = signed(parameters=replace(PARAMETERS, payment=claim["divault-payment"]))

    assert paying.headers["divault-payment"] == claim["divault-payment"]
    assert reason(paying) is None
    assert reason(paying.with_headers({"divault-payment": "0x" + "7d" * 32})) == "signer_mismatch"
    assert reason(signed().with_headers(claim)) == "class_bound"


def test_malformed_signed_price_is_a_bad_request() -> None:
    message = HttpMessage("GET", "node.example.org", "/", None, {"divault-max-price": "1.5"})
    components = ("@authority", "@method", "@path", "divault-max-price")

    with pytest.raises(BadRequest):
        verify_headers(by_hand(message, components, keyid(), 'nonce="n"'), POLICY)


def keyid(form: str = "erc8128", chain: int = 31337, address: str | None = None) -> str:
    return f'keyid="{form}:{chain}:{address or str(USER).lower()}"'


def by_hand(message: HttpMessage, components: tuple[str, ...], *parameters: str) -> HttpMessage:
    """Signed without the signer under test: text of the base, then eth-account."""
    listed = " ".join(f'"{name}"' for name in components)
    params = f"({listed});created=1000;expires=1060" + "".join(f";{p}" for p in parameters)
    values = {"@authority": message.authority, "@method": message.method, "@path": message.path, **message.headers}
    base = "".join(f'"{name}": {values[name]}\n' for name in components) + f'"@signature-params": {params}'
    raw = base64.b64encode(Account.sign_message(encode_defunct(text=base), KEY.reveal()).signature).decode()
    return message.with_headers({"signature-input": f"s={params}", "signature": f"s=:{raw}:"})


GET = HttpMessage("GET", "node.example.org", "/api/v1/results/1")
LINE = ("@authority", "@method", "@path")


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (('nonce="n"', keyid()), None),
        (('nonce="n"', keyid(), 'tag="erc8128"'), None),
        (('nonce="n"', keyid("eip155"), 'tag="erc8128"'), None),
        ((keyid(), 'nonce="n"'), None),
        (('nonce="n"', keyid("eip155")), "bad_message"),
        (('nonce="n"', keyid("eip155"), 'tag="other"'), "bad_message"),
        (('nonce="n"', keyid("eip155", address=str(USER)), 'tag="erc8128"'), "bad_address"),
        (('nonce="n"', keyid("eip155", chain=1), 'tag="erc8128"'), "wrong_chain"),
        (('nonce="n"', keyid("eip155", address="0x" + "22" * 20), 'tag="erc8128"'), "signer_mismatch"),
        (('nonce="n"', keyid("solana")), "bad_message"),
        (('nonce="n"',), "missing_headers"),
        ((keyid(),), "replayable_not_allowed"),
        (('nonce=""', keyid()), "bad_message"),
        (('nonce="n"', 'nonce="m"', keyid()), "bad_message"),
        (('nonce="n"', keyid(), 'alg="none"'), "bad_message"),
        (('nonce="n"', keyid(address="0x" + "00" * 20)), "bad_address"),
        (("nonce=1", keyid()), "bad_message"),
    ],
)
def test_parameters_of_a_header_signature(parameters: tuple[str, ...], expected: str | None) -> None:
    assert expected == reason(by_hand(GET, LINE, *parameters))


@pytest.mark.parametrize(
    ("components", "expected"),
    [
        (LINE, None),
        (("@path", "@authority", "@method"), None),
        (("@authority", "@method"), "class_bound"),
        (("@method", "@path"), "class_bound"),
        ((*LINE, "x-trace"), None),
        ((*LINE, "@path"), "bad_message"),
    ],
)
def test_components_of_a_header_signature(components: tuple[str, ...], expected: str | None) -> None:
    message = GET.with_headers({"x-trace": "1"})

    assert expected == reason(by_hand(message, components, 'nonce="n"', keyid()))


def test_covered_header_that_is_changed_or_gone_is_refused() -> None:
    message = by_hand(GET.with_headers({"x-trace": "1"}), (*LINE, "x-trace"), 'nonce="n"', keyid())

    assert reason(message.with_headers({"x-trace": "2"})) == "signer_mismatch"
    assert reason(message.with_headers({"x-trace": ""})) == "missing_headers"


HEADER_TEXT = st.text(max_size=60) | st.text('eth=("@path" );:created1"nonce,keyid', max_size=80)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(["signature", "signature-input", "content-digest", "divault-max-price"]),
    text=HEADER_TEXT,
    at=st.integers(0, 400),
    whole=st.booleans(),
)
def test_any_header_text_is_refused_with_a_typed_error(name: str, text: str, at: int, whole: bool) -> None:
    good = signed()
    value = text if whole else good.headers[name][:at] + text + good.headers[name][at:]
    if value == good.headers[name]:
        return
    with pytest.raises(DivaultError):
        verify_headers(good.with_headers({name: value}), POLICY)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://Node.Example.org/x", "node.example.org"),
        ("https://node.example.org:443", "node.example.org"),
        ("http://127.0.0.1:8000", "127.0.0.1:8000"),
        ("http://[::1]:80/", "[::1]"),
    ],
)
def test_authority_of_a_url(url: str, expected: str) -> None:
    assert expected == authority_of(url)


@pytest.mark.parametrize(
    "url", ["", "node.example.org", "ftp://x", "http://", "http://u:p@x", "http://x:99999", "http://["]
)
def test_url_without_an_authority_is_refused(url: str) -> None:
    with pytest.raises(BadRequest):
        authority_of(url)


# --- nodes, wrappers, sign-in -------------------------------------------------------------------------------------

NODE = NodeDescriptor(USER, "age1example", "https://node.example.org", 31337, VAULT, 1000)


def test_descriptor_is_read_back_as_its_node_signed_it() -> None:
    assert NodeDescriptor.verify(json.loads(json.dumps(NODE.sign(KEY))), now=1000) == NODE


@pytest.mark.parametrize("name", [name for name, _ in DESCRIPTOR.fields])
def test_descriptor_with_one_member_changed_is_refused(name: str) -> None:
    served = NODE.sign(KEY)
    other = {"node": str(VAULT), "vault": str(USER), "chainId": "1", "notBefore": "999"}
    served["descriptor"][name] = other.get(name, "https://evil.example")

    with pytest.raises((SignatureInvalid, WrongChain)):
        NodeDescriptor.verify(served, now=1000)


def test_descriptor_counts_only_from_its_start() -> None:
    with pytest.raises(SignatureExpired):
        NodeDescriptor.verify(NODE.sign(KEY), now=994)


def test_descriptor_signature_is_no_request_signature() -> None:
    """The domains differ, so one can't be passed off as the other."""
    assert NODE.domain.separator != DOMAIN.separator


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=300), magic=st.booleans())
def test_any_bytes_are_a_wrapper_or_refused(raw: bytes, magic: bool) -> None:
    assert refused(lambda: unwrap(raw + bytes.fromhex("6492" * 16) * magic)) in (None, "bad_wrapper")


@bounded
@given(text=st.text(max_size=200))
def test_any_text_is_no_sign_in_message(text: str) -> None:
    with pytest.raises(SignatureInvalid):
        SignInMessage.parse(text)


def test_signature_text_is_what_wallets_send() -> None:
    assert len(signature_text(KEY, Digest.ZERO)) == 132
