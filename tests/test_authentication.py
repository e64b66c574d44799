"""From a signed call to a principal, and what everybody else is told."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from eth_account import Account
from eth_account.messages import encode_typed_data
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from divault.auth import Authenticator
from divault.errors import (
    BadRequest,
    DivaultError,
    InputInvalid,
    SignatureExpired,
    SignatureIncomplete,
    SignatureInvalid,
    WrongChain,
)
from divault.messages import (
    HeaderParameters,
    HttpMessage,
    InferenceRequest,
    address_of,
    body_hash,
    nonce_of,
    parse_key,
    request_domain,
    sign_headers,
    signature_text,
    strict_object,
)
from divault.sessions import Home
from divault.values import (
    Address,
    BodySignature,
    HeaderSignature,
    ModelId,
    Nonce,
    Principal,
    PrincipalKind,
    SignedCall,
    Usdc,
)

NOW = 1_790_000_000
CHAIN = 31337
KEY = parse_key("0x" + "4c" * 32)
USER = address_of(KEY)
NODE, VAULT = Address(b"\x0d" * 20), Address(b"\x0e" * 20)
PATH = "/api/v1/inference"
AUTHORITY = "node.example.org"
BODY = b'{"model_id":"m1","user_address":"%b","input_data":{"text":"hi"}}' % str(USER).encode()


def node(longest_s: int = 60, **other: Any) -> Authenticator:
    """The node that the calls here are signed for, or one that differs in one thing."""
    home: dict[str, Any] = {"chain_id": CHAIN, "vault": VAULT, "node": NODE, "url": f"https://{AUTHORITY}"}
    return Authenticator(Home(**home | other), clock=lambda: float(NOW), max_header_ttl_s=longest_s)


def request(body: bytes = BODY, **changed: Any) -> InferenceRequest:
    made = InferenceRequest(
        user=USER,
        node=NODE,
        model=ModelId.parse("m1").key,
        method="POST",
        path=PATH,
        body_hash=body_hash(strict_object(body)),
        max_price=Usdc(5),
        nonce=Nonce(b"\x07" * 32),
        issued_at=NOW - 10,
        expires_at=NOW + 60,
    )
    return replace(made, **changed)


def call(signed: InferenceRequest | None = None, body: bytes = BODY) -> SignedCall:
    """The body call of a client that signed `signed` and sent `body`."""
    signed = signed or request()
    proof = BodySignature(
        signature=signature_text(KEY, signed.digest(request_domain(CHAIN, VAULT))),
        nonce=signed.nonce,
        issued_at=signed.issued_at,
        expires_at=signed.expires_at,
        body_hash=body_hash(strict_object(body)),
    )
    return SignedCall(
        user=USER,
        method="POST",
        path=PATH,
        body=body,
        proof=proof,
        model=ModelId.parse("m1"),
        max_price=signed.max_price,
        input_data=b'{"text":"hi"}',
    )


def header_call(method: str = "DELETE", path: str = "/api/v1/models/m1", body: bytes = b"") -> SignedCall:
    """A call signed in its headers."""
    parameters = HeaderParameters(CHAIN, NOW - 1, NOW + 59, "any text", Usdc(7))
    headers = sign_headers(KEY, HttpMessage(method, AUTHORITY, path, None, {}, body), parameters)
    proof = HeaderSignature({**headers, "host": "whatever"}, None)
    return SignedCall(USER, method, path, body, proof, ModelId.parse("m1"), Usdc(999))


async def refusal(authenticator: Authenticator, refused: SignedCall) -> tuple[type[DivaultError], str]:
    with pytest.raises(DivaultError) as caught:
        await authenticator.authenticate(refused)
    return type(caught.value), caught.value.data["reason"]


async def test_a_body_may_say_less_than_its_header_and_never_more() -> None:
    for said, counts in ((5, 5), (7, 7), (999, 7)):
        principal = await node().authenticate(replace(header_call(), max_price=Usdc(said)))
        assert principal.max_price == Usdc(counts)


async def test_signed_body_proves_its_wallet() -> None:
    principal = await node().authenticate(call())

    assert principal == Principal(
        user=USER,
        kind=PrincipalKind.BODY,
        request=request().digest(request_domain(CHAIN, VAULT)),
        nonce=Nonce(b"\x07" * 32),
        expires_at=NOW + 60,
        received_at=NOW,
        max_price=Usdc(5),
        typed_message=request().message(),
        signature=call().proof.signature,
    )


async def test_same_request_to_another_node_proves_nothing() -> None:
    assert await refusal(node(node=VAULT), call()) == (SignatureInvalid, "signer_mismatch")


async def test_same_request_on_another_chain_or_vault_proves_nothing() -> None:
    assert await refusal(node(chain_id=1), call()) == (SignatureInvalid, "signer_mismatch")
    assert await refusal(node(vault=NODE), call()) == (SignatureInvalid, "signer_mismatch")


async def test_request_that_names_another_chain_or_vault_is_told_so() -> None:
    good = call()
    assert isinstance(good.proof, BodySignature)

    other_chain = replace(good, proof=replace(good.proof, chain_id=1))
    other_vault = replace(good, proof=replace(good.proof, vault=NODE))
    own = replace(good, proof=replace(good.proof, chain_id=CHAIN, vault=VAULT))
    assert await refusal(node(), other_chain) == (WrongChain, "wrong_chain")
    assert await refusal(node(), other_vault) == (WrongChain, "wrong_domain")
    assert (await node().authenticate(own)).user == USER


async def test_signed_headers_over_a_body_that_names_another_chain_or_vault_are_told_so() -> None:
    good = header_call()
    assert isinstance(good.proof, HeaderSignature)

    other_vault = replace(good, proof=replace(good.proof, vault=NODE))
    own = replace(good, proof=replace(good.proof, chain_id=CHAIN, vault=VAULT))
    assert await refusal(node(), other_vault) == (WrongChain, "wrong_domain")
    assert (await node().authenticate(own)).user == USER


async def test_one_byte_of_input_changed_proves_nothing() -> None:
    changed = BODY.replace(b'"hi"', b'"ho"')

    assert await refusal(node(), call(request(), changed)) == (SignatureInvalid, "signer_mismatch")


async def test_white_space_and_order_of_members_do_not_matter() -> None:
    members = json.loads(BODY)
    reordered = json.dumps(dict(reversed(members.items())), indent=1).encode()

    assert (await node().authenticate(call(request(), reordered))).user == USER


@pytest.mark.parametrize(
    "changed",
    [
        {"path": "/api/v1/inference/run"},
        {"method": "DELETE"},
        {"model": ModelId.parse("m2")},
        {"max_price": Usdc(6)},
        {"user": NODE},
    ],
)
async def test_call_that_differs_from_what_was_signed_proves_nothing(changed: dict[str, Any]) -> None:
    assert await refusal(node(), replace(call(), **changed)) == (SignatureInvalid, "signer_mismatch")


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ({"issued_at": NOW - 60, "expires_at": NOW}, (SignatureExpired, "expired")),
        ({"issued_at": NOW + 6, "expires_at": NOW + 60}, (SignatureExpired, "issued_in_future")),
        ({"issued_at": NOW, "expires_at": NOW + 301}, (SignatureInvalid, "ttl_too_long")),
        ({"issued_at": NOW + 3, "expires_at": NOW + 2}, (SignatureInvalid, "bad_window")),
        ({"issued_at": -(2**70), "expires_at": 2**70}, (SignatureInvalid, "ttl_too_long")),
    ],
)
async def test_call_outside_its_window_is_refused(window: dict[str, int], expected: Any) -> None:
    good = call()
    assert isinstance(good.proof, BodySignature)

    assert await refusal(node(), replace(good, proof=replace(good.proof, **window))) == expected


@pytest.mark.parametrize(
    "window", [{"issued_at": NOW + 5}, {"expires_at": NOW + 1}, {"issued_at": NOW, "expires_at": NOW + 300}]
)
async def test_call_at_the_edge_of_its_window_is_accepted(window: dict[str, int]) -> None:
    assert (await node().authenticate(call(request(**window)))).user == USER


async def test_signed_body_without_a_model_is_refused() -> None:
    with pytest.raises(BadRequest):
        await node().authenticate(replace(call(), model=None))


async def test_signed_headers_prove_their_wallet_whatever_the_host_header_says() -> None:
    principal = await node().authenticate(header_call())

    assert (principal.user, principal.kind) == (USER, PrincipalKind.HEADERS)
    assert (nonce_of("any text"), NOW + 59) == (principal.nonce, principal.expires_at)
    assert principal.max_price == Usdc(7)  # what was signed, not what the call was parsed to


async def test_signed_headers_to_another_node_or_chain_prove_nothing() -> None:
    assert await refusal(node(url="https://other.example.org"), header_call()) == (SignatureInvalid, "signer_mismatch")
    assert await refusal(node(chain_id=1), header_call()) == (WrongChain, "wrong_chain")


async def test_signed_headers_with_another_body_path_or_user_prove_nothing() -> None:
    good = header_call("POST", PATH, BODY)

    assert (await node().authenticate(good)).user == USER
    changed = replace(good, body=BODY.replace(b"hi", b"ho"))
    assert await refusal(node(), changed) == (SignatureInvalid, "digest_mismatch")
    assert await refusal(node(), replace(good, path="/x")) == (SignatureInvalid, "signer_mismatch")
    assert await refusal(node(), replace(good, user=NODE)) == (SignatureInvalid, "signer_mismatch")


async def test_header_window_is_bounded_by_the_node() -> None:
    assert await refusal(node(longest_s=30), header_call()) == (SignatureInvalid, "ttl_too_long")
    with pytest.raises(ValueError, match="window"):
        await node(longest_s=301).authenticate(header_call())


# --- what is missing ----------------------------------------------------------------------------------------------

PUBLISHED = {  # as the published example is written: wrong checksum, placeholder signature, no nonce
    "model_id": "m1",
    "user_address": "0x742D35cc6634c0532925A3b844bC9E7595F0BEb1",
    "input_data": {"text": "hi"},
    "user_signature": "0x...",
}
COMPLETE: dict[str, Any] = json.loads(BODY) | {
    "user_signature": "0x" + "11" * 65,
    "nonce": "0x" + "22" * 32,
    "issued_at": NOW,
    "expires_at": NOW + 60,
    "max_price": "5",
}


def incomplete(members: dict[str, Any], **options: Any) -> SignatureIncomplete:
    with pytest.raises(SignatureIncomplete) as caught:
        node().require_complete(members, method="POST", path=PATH, **options)
    return caught.value


def test_published_example_is_told_what_is_missing_and_what_is_malformed() -> None:
    error = incomplete(PUBLISHED)

    assert error.data["missing"] == ["nonce", "issued_at", "expires_at"]
    assert error.data["malformed"] == ["user_address", "user_signature"]
    assert str(Address.parse(PUBLISHED["user_address"].lower())) == error.data["send"]["user_address"]


async def test_client_that_signs_what_it_was_told_and_sends_what_it_was_told_gets_in() -> None:
    """The whole way of an old client: told, signed by another implementation, sent again."""
    members: dict[str, Any] = {"model_id": "m1", "user_address": str(USER).upper().replace("X", "x")}
    error = incomplete(members | {"user_address": str(USER)[:-1] + str(USER)[-1].swapcase()}, price=Usdc(9))
    typed_data, send = error.data["typed_data"], error.data["send"]
    numbers = {name: int(typed_data["message"][name]) for name in ("maxPrice", "issuedAt", "expiresAt")}
    signable = encode_typed_data(full_message=typed_data | {"message": typed_data["message"] | numbers})
    send["user_signature"] = "0x" + Account.sign_message(signable, KEY.reveal()).signature.hex().removeprefix("0x")

    body = members | {"user_address": str(USER)} | send
    node().require_complete(body, method="POST", path=PATH)
    proof = BodySignature(
        signature=body["user_signature"],
        nonce=Nonce.parse(body["nonce"]),
        issued_at=body["issued_at"],
        expires_at=body["expires_at"],
        body_hash=body_hash(body),
    )
    limit = Usdc.parse_atomic(body["max_price"])
    principal = await node().authenticate(SignedCall(USER, "POST", PATH, b"", proof, ModelId.parse("m1"), limit))

    assert (principal.user, principal.max_price) == (USER, Usdc(9))


def test_complete_body_passes() -> None:
    node().require_complete(COMPLETE, method="POST", path=PATH)
    node().require_complete({k: v for k, v in COMPLETE.items() if k != "max_price"}, method="POST", path=PATH)


@pytest.mark.parametrize("name", ["user_signature", "nonce", "issued_at", "expires_at"])
def test_each_missing_member_is_named(name: str) -> None:
    error = incomplete({k: v for k, v in COMPLETE.items() if k != name})

    assert (error.data["missing"], error.data["malformed"]) == ([name], [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("user_signature", None),
        ("user_signature", 5),
        ("nonce", "0x22"),
        ("nonce", "0x" + "AA" * 32),
        ("nonce", 7),
        ("issued_at", "1790000000"),
        ("issued_at", 1.5),
        ("issued_at", True),
        ("expires_at", -1),
        ("expires_at", None),
        ("max_price", 5),
        ("max_price", "0.02"),
        ("max_price", "-1"),
    ],
)
def test_each_malformed_member_is_named(name: str, value: Any) -> None:
    error = incomplete(COMPLETE | {name: value})

    assert (error.data["missing"], error.data["malformed"]) == ([], [name])


@pytest.mark.parametrize(
    ("name", "value"), [("user_signature", "0xzz"), ("user_signature", ""), ("user_address", PUBLISHED["user_address"])]
)
def test_what_is_wrong_by_itself_is_left_to_the_strict_check(name: str, value: str) -> None:
    """With everything else in place its exact reason says more than the whole typed data."""
    node().require_complete(COMPLETE | {name: value}, method="POST", path=PATH)


@pytest.mark.parametrize("address", [None, 5, "", "0x12", "0x" + "g" * 40, "0X" + "1" * 40])
def test_body_without_an_address_to_make_out_is_no_valid_input(address: Any) -> None:
    with pytest.raises(InputInvalid):
        node().require_complete(COMPLETE | {"user_address": address}, method="POST", path=PATH)


def test_suggested_nonces_are_fresh() -> None:
    assert incomplete(PUBLISHED).data["send"]["nonce"] != incomplete(PUBLISHED).data["send"]["nonce"]


def test_signed_maximum_is_what_the_caller_said_before_what_the_model_costs() -> None:
    assert incomplete(PUBLISHED).data["send"]["max_price"] == "0"
    assert incomplete(PUBLISHED, price=Usdc(9)).data["send"]["max_price"] == "9"
    assert incomplete(PUBLISHED | {"max_price": "3"}, price=Usdc(9)).data["send"]["max_price"] == "3"


def test_route_without_a_body_is_told_to_sign_headers() -> None:
    error = node().headers_missing(method="DELETE", path="/api/v1/cache", session_does=False)
    other = node().headers_missing(method="GET", path="/api/v1/results/0x12", session_does=True)

    assert error.data["missing"] == other.data["missing"] == ["signature-input", "signature"]
    assert AUTHORITY in error.detail
    assert ["token of a session" in one.detail for one in (error, other)] == [False, True]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=10),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(members=st.dictionaries(st.sampled_from([*COMPLETE, "other"]), JSON, max_size=4))
def test_any_members_are_judged_without_a_crash(members: dict[str, Any]) -> None:
    for body in (members, COMPLETE | members):
        with suppress(DivaultError):
            node().require_complete(body, method="POST", path=PATH)
