"""Receipts: the known answer, every field changed in turn, redaction, and what must never be issued."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from divault.errors import BadRequest, ReceiptInvalid
from divault.messages import (
    InferenceRequest,
    SessionCall,
    SignInContext,
    address_of,
    compose,
    parse_key,
    personal_digest,
    request_domain,
    signature_text,
)
from divault.messages.session_calls import resources_of
from divault.receipts import (
    FIELDS,
    CheckStep,
    Outcome,
    ReceiptDraft,
    ReceiptIssuer,
    answer_body,
    check,
    from_kept,
    input_bytes,
    read_receipt,
    redact,
    reopen,
    require_valid,
    slice_result,
    to_keep,
)
from divault.receipts.checksums import checksums
from divault.values import (
    Address,
    BlockRef,
    Digest,
    GateType,
    Grant,
    ModelId,
    ModelInfo,
    Nonce,
    Output,
    Principal,
    PrincipalKind,
    ReceiptStatus,
    Secret,
    Usdc,
)

CHAIN = 31337
VAULT = Address.parse("0x0aA7a61e1df6DF72766a156A6eeF331dB8586B53")
NODE_KEY = parse_key("0xccb49e9ab00b3a4d8b8e67c833ab2c0c6ffbcb55715dc8748556dc9c84c36042")
USER_KEY = parse_key("0xb37ae3d10003c3b7b4c0429b0b8212ec7d4a1decf107426349228d7fa575567d")
NODE, USER = address_of(NODE_KEY), address_of(USER_KEY)
TOKEN = Address.parse("0x9fE46736679d2D9a65F0992F2272dE9f3c7fa6e0")
RUNTIME = {
    "adapter": "sklearn",
    "arch": "x86_64",
    "determinism": {"seeded": True},
    "device": "cpu",
    "dtype": "float64",
    "libraries": {"divault": "1.0.0", "numpy": "2.4.6", "python": "3.11.7", "scikit-learn": "1.9.1"},
    "threads": 1,
}
INPUT, RESULT = b'{"text":"hi"}', b'{"label":"positive","score":0.9375}'
PAYMENT = f"eip3009:{CHAIN}:{str(TOKEN).lower()}:{str(USER).lower()}:0x{'11' * 32}"
SALTS = (
    bytes.fromhex("53ffc1d4423daa1b69a7e99d659f70119055ac8320dc0afcd40b0c36cf624d9c"),
    bytes.fromhex("3f19a3d5192630ca076b7debe616ef8d54390f89a885223f2e15025011be696e"),
)
REQUEST = InferenceRequest(  # vector auth-111 with this node in it
    user=USER,
    node=NODE,
    model=ModelId.parse("m1").key,
    method="POST",
    path="/api/v1/inference",
    body_hash=Digest.parse("0x585568c2596b124fa0a803bb31261aa1c459e2fda8c1871e098111fb6383d942"),
    max_price=Usdc(10_000),
    nonce=Nonce.parse("0x525c33201686ce4c69b1f9e17e2f738ce7a3f6f7c569ed84a40d3ca32084ea3d"),
    issued_at=1789999995,
    expires_at=1790000055,
)
REQUEST_DIGEST = REQUEST.digest(request_domain(CHAIN, VAULT))
PRINCIPAL = Principal(
    user=USER,
    kind=PrincipalKind.BODY,
    request=REQUEST_DIGEST,
    nonce=REQUEST.nonce,
    expires_at=REQUEST.expires_at,
    received_at=1790000000,
    max_price=REQUEST.max_price,
    typed_message=REQUEST.message(),
    signature=signature_text(USER_KEY, REQUEST_DIGEST),
)
MODEL = ModelInfo(
    model=ModelId.parse("m1"),
    cid="bafybeigdyrzt5sfp7udm7hu76uh7y26nf3efuylqabf3oclgtqy55fbzdi",
    token=TOKEN,
    price=Usdc(10_000),
    owner=Address(b"\x07" * 20),
    active=True,
    total_inferences=0,
    created_at=1,
    updated_at=1,
    tags=(),
    version="1",
    min_balance=1,
    payment_token=TOKEN,
    gate=GateType.TOKEN,
)
GRANT = Grant(PRINCIPAL, MODEL, BlockRef(123, Digest(b"\x22" * 32), 1790000000), have=1)
PLAINTEXT = Digest.parse("0x3c3a8342bb87d94c55dccece4ec2bb3bd004c63179d3a5103525a5a5bc9958ef")
OUTPUT = Output(result=RESULT, runtime=RUNTIME, plaintext_sha256=PLAINTEXT, rows=1)
DRAFT = ReceiptDraft(
    principal=PRINCIPAL,
    model=MODEL.model,
    status=ReceiptStatus.OK,
    finished_at=1790000001,
    grant=GRANT,
    output=OUTPUT,
    input_data=INPUT,
    price=Usdc(10_000),
    token=TOKEN,
    payer=USER,
    payment_key=PAYMENT,
)
REFUSAL = ReceiptDraft(
    principal=PRINCIPAL, model=MODEL.model, status=ReceiptStatus.REFUSED, finished_at=1790000001, code="access_denied"
)


def issuer() -> ReceiptIssuer:
    salts = iter(SALTS)
    return ReceiptIssuer(NODE_KEY, CHAIN, VAULT, entropy=lambda _: next(salts) + next(salts))


def envelope() -> dict[str, Any]:
    return copy.deepcopy(issuer().issue(DRAFT, 0, Digest.ZERO).envelope)


def checked(changed: Any) -> list[CheckStep]:
    return check(changed, chain_id=CHAIN, vault=VAULT, node=NODE, input_data=INPUT, result=RESULT)


def first_wrong(changed: Any) -> str | None:
    failed = [step.field for step in check(changed) if step.outcome is Outcome.FAILED]
    return failed[0] if failed else None


def outcomes(steps: list[CheckStep]) -> dict[str, Outcome]:
    return {step.name: step.outcome for step in steps}


def test_known_answer() -> None:
    """Every hash, the digest and the signature of the documented example."""
    receipt = issuer().issue(DRAFT, 0, Digest.ZERO)

    assert str(receipt.hash) == "0xf24dfd01de81c8d299f63806505d9b6b0a0fe63e102f8641ab0ad47f2eb01764"
    assert receipt.envelope["signature"] == (
        "0x96ed1e019e694baf7a61e41667c7145964e100d9706a104b56f6b2b05474a9c919019bd92014bec491e74b5112d6ae9ffeacf83949ab"
        "79b0e7b3f2853a3746d21b"
    )
    assert receipt.envelope["receipt"] == {
        "node": "0x05b7cc97C107184f736Dc0f04E6231593c821384",
        "user": "0xB2A1c543Abe6C496Fe658f34dda1e023885D293E",
        "requestHash": "0x5122c46ca94c49d032e796a1185165ecbcd95f622059122a56ccc9e9f7328361",
        "modelId": "0x83267a439473d40c510063b30f7c06d1e3bf496ea5e34c5e3290dfc7dc527ce1",
        "cidHash": "0x27bdcde325b1f75f418259cc6e8eb0c3a6aab6fb11319979b433d47d0c585752",
        "vaultBlock": "0x" + "22" * 32,
        "plaintextHash": "0x3c3a8342bb87d94c55dccece4ec2bb3bd004c63179d3a5103525a5a5bc9958ef",
        "runtimeHash": "0xda49337df4994e6ea30aa85e2a34d793bc18843d9d8e39057ce9894e6c80e998",
        "inputHash": "0x81b43dbb47a0f8a482d0c234edae0d9d45b626b380a6a1ae684d7b3b5d70c375",
        "outputHash": "0x5005f19304da15288316bd34d56190c06665e080fcae380172a284146995eb08",
        "price": "10000",
        "token": "0x9fE46736679d2D9a65F0992F2272dE9f3c7fa6e0",
        "payer": "0xB2A1c543Abe6C496Fe658f34dda1e023885D293E",
        "paymentRef": "0x7273faa11fd692b3ca236b0dfb0d5166ff0eb0ef11f45907e087a25f486be4fe",
        "status": "1",
        "startedAt": "1790000000",
        "finishedAt": "1790000001",
        "sequence": "0",
        "prevReceiptHash": "0x" + "00" * 32,
    }


def test_untouched_receipt_passes_every_step_that_its_file_allows() -> None:
    found = outcomes(checked(envelope()))

    assert {"log", "chain"} == {name for name, outcome in found.items() if outcome is Outcome.NOT_CHECKED}
    assert Outcome.FAILED not in found.values()


def other(value: Any) -> Any:
    """The nearest value of the same type that is another one."""
    if value is None or isinstance(value, dict):
        return {"other": 1}
    if isinstance(value, int):
        return value + 1
    if value.isdecimal():
        return str(int(value) + 1)
    if value.startswith("0x") and len(value) == 42:
        return str(Address(bytes([value.startswith("0x0"), *bytes.fromhex(value[2:])[1:]])))
    last = "0" if value[-1] != "0" else "1"
    return value[:-1] + last


@pytest.mark.parametrize("name", FIELDS)
def test_each_changed_field_is_named(name: str) -> None:
    changed = envelope()
    changed["receipt"][name] = other(changed["receipt"][name])

    assert name == first_wrong(changed)
    with pytest.raises(ReceiptInvalid) as caught:
        require_valid(check(changed))
    assert name == caught.value.data["field"]


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("junk", ["", "0x", None, 1, -1, [], {}, "x" * 1000, "0x" + "g" * 64, "\ud800", 1.5])
def test_each_field_of_another_shape_is_named(name: str, junk: Any) -> None:
    changed = envelope()
    changed["receipt"][name] = junk

    assert name == first_wrong(changed)


def members(value: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Every member of an envelope that is not a field of the struct."""
    for name, inner in value.items():
        if name in ("domain", "request"):
            yield from ((name, member) for member in inner)
        elif name not in ("receipt", "checksums"):
            yield (name,)


@pytest.mark.parametrize("path", [".".join(path) for path in members(envelope())])
def test_each_changed_member_beside_the_struct_is_named(path: str) -> None:
    changed = envelope()
    *outer, name = path.split(".")
    holder = changed[outer[0]] if outer else changed
    holder[name] = "0x" + "3" * 64 if name == "code" else other(holder[name])

    assert path == first_wrong(changed)


@pytest.mark.parametrize("name", ["node", "cid", "domain.chainId", "request.nonce"])
def test_changed_checksum_is_not_taken_for_a_changed_field(name: str) -> None:
    changed = envelope()
    changed["checksums"][name] = "00000000"

    assert f"checksums.{name}" == first_wrong(changed)


def test_checksums_that_fit_do_not_make_a_forgery_valid() -> None:
    """Sums are recomputed by the forger; hash and signature still refuse."""
    forged = issuer().issue(replace(DRAFT, price=Usdc(1)), 0, Digest.ZERO).envelope
    forged["receipt_hash"] = envelope()["receipt_hash"]

    assert first_wrong(forged) == "receipt_hash"


def test_receipt_of_another_key_that_names_this_node_is_refused() -> None:
    other_issuer = ReceiptIssuer(USER_KEY, CHAIN, VAULT)
    other_issuer.node = NODE

    assert first_wrong(other_issuer.issue(DRAFT, 0, Digest.ZERO).envelope) == "signature"


def test_valid_receipt_of_another_node_chain_or_vault_is_refused_by_who_expects_this_one() -> None:
    good = envelope()

    assert failed_field(check(good, node=USER)) == "node"
    assert failed_field(check(good, chain_id=1)) == "domain.chainId"
    assert failed_field(check(good, vault=USER)) == "domain.verifyingContract"


def failed_field(steps: list[CheckStep]) -> str | None:
    return next((step.field for step in steps if step.outcome is Outcome.FAILED), None)


@pytest.mark.parametrize(("name", "expected"), [("input_data", "input"), ("result", "output")])
def test_other_bytes_than_those_that_ran_are_named(name: str, expected: str) -> None:
    at_hand: dict[str, Any] = {"input_data": INPUT, "result": RESULT}
    at_hand[name] = at_hand[name].replace(b":", b": ")

    assert expected == failed_field(check(envelope(), **at_hand))


@pytest.mark.parametrize("name", ["cidHash", "runtimeHash", "paymentRef", "requestHash", "user", "node", "modelId"])
def test_field_is_named_without_checksums_where_something_else_says_it(name: str) -> None:
    changed = envelope()
    del changed["checksums"]
    changed["receipt"][name] = other(changed["receipt"][name])

    assert name == first_wrong(changed)


def test_field_is_named_when_its_checksum_was_changed_with_it() -> None:
    changed = envelope()
    changed["receipt"]["cidHash"] = "0x" + "33" * 32
    changed["checksums"] = checksums(changed)

    assert first_wrong(changed) == "cidHash"


def test_field_that_nothing_else_says_is_reported_as_the_hash_without_checksums() -> None:
    changed = envelope()
    del changed["checksums"]
    changed["receipt"]["plaintextHash"] = "0x" + "33" * 32

    assert first_wrong(changed) == "receipt_hash"


def test_redacted_receipt_is_not_checked_where_it_was_redacted_and_valid_elsewhere() -> None:
    public = redact(envelope())
    found = outcomes(checked(public))

    private = {"request", "request_signature", "input", "output"}
    assert private | {"log", "chain"} == {name for name, outcome in found.items() if outcome is Outcome.NOT_CHECKED}
    assert Outcome.FAILED not in found.values()


BY_CONTRACT = replace(DRAFT, principal=replace(PRINCIPAL, signature="0x1234", by_contract=True))


@pytest.mark.parametrize("draft", [DRAFT, REFUSAL, BY_CONTRACT])
def test_what_a_ledger_keeps_gives_the_redacted_receipt_back(draft: ReceiptDraft) -> None:
    whole = copy.deepcopy(issuer().issue(draft, 0, Digest.ZERO).envelope)
    kept, runtimes = to_keep(whole), {whole["receipt"]["runtimeHash"]: whole["runtime"]}

    assert len(kept) < len(json.dumps(redact(whole))) / 3
    assert json.dumps(from_kept(kept, lambda hashed: runtimes[str(hashed)])) == json.dumps(redact(whole))
    older = json.dumps(redact(whole)).encode()
    assert json.dumps(from_kept(older, lambda _: {})) == json.dumps(redact(whole)), "as older ones lie"


@pytest.mark.parametrize("member", ["log", "attestation"])
def test_a_ledger_keeps_every_member_of_an_envelope(member: str) -> None:
    whole = copy.deepcopy(issuer().issue(REFUSAL, 0, Digest.ZERO).envelope) | {member: {"a": [1, None, "\xe4"]}}
    whole["checksums"] = checksums(whole)

    assert json.dumps(from_kept(to_keep(whole), lambda _: {})) == json.dumps(redact(whole))


def test_runtime_that_is_equal_but_not_the_same_is_disclosed_as_it_was_hashed() -> None:
    again = issuer()
    for threads in (1, True):
        output = replace(OUTPUT, runtime={**OUTPUT.runtime, "threads": threads})
        envelope = again.issue(replace(DRAFT, output=output), 0, Digest.ZERO).envelope
        assert Outcome.FAILED not in outcomes(check(envelope)).values()
        again._entropy = lambda _: bytes(64)


def test_redacted_receipt_holds_nothing_private() -> None:
    whole = envelope()
    text = json.dumps(redact(whole))

    assert whole["request"]["bodyHash"] not in text
    assert whole["request_signature"] not in text
    assert not any(salt.hex() in text for salt in SALTS)
    private = ("request.", "request_signature", "input_", "output_")
    assert not [name for name in redact(whole)["checksums"] if name.startswith(private)]


def test_answer_can_be_disclosed_without_the_question() -> None:
    public = redact(envelope(), keep=("output_salt",))
    found = outcomes(checked(public))

    assert (found["output"], found["input"]) == (Outcome.PASSED, Outcome.NOT_CHECKED)


def test_redacted_receipt_still_names_a_changed_field() -> None:
    changed = redact(envelope())
    changed["receipt"]["outputHash"] = "0x" + "44" * 32

    assert first_wrong(changed) == "outputHash"


def test_refusal_has_zeros_for_what_was_not_reached() -> None:
    receipt = issuer().issue(REFUSAL, 0, Digest.ZERO)
    zero = {name for name, value in receipt.envelope["receipt"].items() if value in (str(Digest.ZERO), "0")}

    assert receipt.envelope["code"] == "access_denied"
    assert set(FIELDS[4:10]) | {"price", "paymentRef", "sequence", "prevReceiptHash"} == zero
    assert Outcome.FAILED not in outcomes(check(receipt.envelope)).values()


def test_failure_keeps_runtime_and_input_but_no_output() -> None:
    failed = replace(
        DRAFT, status=ReceiptStatus.FAILED, output=None, runtime=RUNTIME, plaintext=PLAINTEXT, price=Usdc(0)
    )
    receipt = issuer().issue(failed, 0, Digest.ZERO).envelope

    assert envelope()["receipt"]["runtimeHash"] == receipt["receipt"]["runtimeHash"]
    assert envelope()["receipt"]["inputHash"] == receipt["receipt"]["inputHash"]
    assert (str(Digest.ZERO), None) == (receipt["receipt"]["outputHash"], receipt["output_salt"])


def test_parameters_are_part_of_the_input() -> None:
    receipt = issuer().issue(replace(DRAFT, parameters=b'{"seed":1}'), 0, Digest.ZERO).envelope

    assert Outcome.PASSED is outcomes(check(receipt, input_data=input_bytes(INPUT, b'{"seed":1}')))["input"]
    assert failed_field(check(receipt, input_data=INPUT)) == "input"


def test_request_signed_in_headers_is_checked_by_its_signature_alone() -> None:
    digest = Digest.keccak(b"what was signed")
    principal = replace(PRINCIPAL, request=digest, typed_message=None, signature=signature_text(USER_KEY, digest))
    found = outcomes(check(issuer().issue(replace(DRAFT, principal=principal), 0, Digest.ZERO).envelope))

    assert (found["request"], found["request_signature"]) == (Outcome.NOT_CHECKED, Outcome.PASSED)


def test_charging_more_than_was_signed_is_found() -> None:
    receipt = issuer().issue(replace(DRAFT, price=Usdc(10_001)), 0, Digest.ZERO).envelope

    assert first_wrong(receipt) == "price"


def test_chain_links_receipts_and_refuses_a_gap() -> None:
    first = issuer().issue(DRAFT, 0, Digest.ZERO)
    second = issuer().issue(DRAFT, 1, first.hash)

    assert str(first.hash) == second.envelope["receipt"]["prevReceiptHash"]
    with pytest.raises(ValueError, match="predecessor"):
        issuer().issue(DRAFT, 1, Digest.ZERO)
    with pytest.raises(ValueError, match="predecessor"):
        issuer().issue(DRAFT, 0, first.hash)


def test_two_receipts_of_one_answer_have_salts_of_their_own() -> None:
    live = ReceiptIssuer(NODE_KEY, CHAIN, VAULT)
    salts = [live.issue(DRAFT, 0, Digest.ZERO).envelope[name] for name in ("input_salt", "output_salt") for _ in "ab"]

    assert len(set(salts)) == 4


def test_nothing_is_charged_without_an_answer() -> None:
    with pytest.raises(ValueError, match="charged"):
        replace(REFUSAL, price=Usdc(1))
    with pytest.raises(ValueError, match="needs the answer"):
        replace(REFUSAL, status=ReceiptStatus.OK)


def test_clock_that_was_set_back_makes_no_invalid_receipt() -> None:
    receipt = issuer().issue(replace(DRAFT, finished_at=1), 0, Digest.ZERO).envelope

    assert receipt["receipt"]["startedAt"] == receipt["receipt"]["finishedAt"]


def test_stored_receipt_is_the_same_when_it_is_read_again() -> None:
    receipt = issuer().issue(DRAFT, 0, Digest.ZERO)

    assert receipt == reopen(json.loads(json.dumps(receipt.envelope)))


def test_answer_carries_the_exact_bytes_of_the_result() -> None:
    result = b'{"score": 1.0,  "big": 123456789012345678901234567890}'
    body = answer_body("m1", result, envelope(), "done")

    assert result == slice_result(body)
    assert (envelope(), result) == read_receipt(body)
    assert (envelope(), None) == read_receipt(json.dumps(envelope()).encode())


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{}", b'{"receipt":1}', b'{"receipt":[]}', b"{" * 10_000, b"\xff", b"null"]
)
def test_file_without_a_receipt_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        read_receipt(raw)


def test_key_never_shows() -> None:
    assert NODE_KEY.reveal().hex() not in repr(issuer().__dict__)
    assert isinstance(NODE_KEY, Secret)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=20), inner, max_size=3)
    ),
    max_leaves=8,
)
PATHS = [("receipt", name) for name in FIELDS] + [*members(envelope()), ("receipt",), ("domain",), ("checksums",)]


@settings(max_examples=200, deadline=None)
@given(path=st.sampled_from(PATHS), value=JSON)
def test_any_value_anywhere_is_checked_without_a_crash(path: tuple[str, ...], value: Any) -> None:
    changed = envelope()
    holder = changed if len(path) == 1 else changed[path[0]]
    same = json.dumps(holder[path[-1]]) == json.dumps(value)
    holder[path[-1]] = value

    if value is not None:  # what is left out is not disclosed, which is not wrong
        assert same == (first_wrong(changed) is None) or path == ("checksums",)
    redact(changed)


@settings(max_examples=100, deadline=None)
@given(value=JSON)
def test_any_json_is_no_receipt(value: Any) -> None:
    assert first_wrong(value) is not None


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    try:
        read_receipt(raw)
        slice_result(raw)
    except BadRequest:
        pass


@pytest.mark.parametrize(("began", "wrong"), [(-5, None), (-6, "startedAt"), (59, None), (60, "startedAt")])
def test_a_call_begins_within_the_time_that_its_request_is_for(began: int, wrong: str | None) -> None:
    principal = replace(PRINCIPAL, received_at=REQUEST.issued_at + began)
    draft = replace(DRAFT, principal=principal, grant=replace(GRANT, principal=principal), finished_at=1790000100)

    assert first_wrong(issuer().issue(draft, 0, Digest.ZERO).envelope) == wrong


# --- of a session's call ----------------------------------------------------------------------------------------------


BEGAN = PRINCIPAL.received_at


def of_session(
    *,
    spend: int = 10_000,
    node: Address = NODE,
    chain: int = CHAIN,
    signer: Secret = USER_KEY,
    user: Address = USER,
    issued_at: int = BEGAN - 1000,
    expires_at: int = 0,
) -> dict[str, Any]:
    """A receipt of a call by a session whose text says this, whatever it says."""
    allowed = {TOKEN: Usdc(spend)} if spend else {}
    context = SignInContext("node.example", "https://node.example", chain, "abcdefgh", issued_at)
    text = compose(user, context, resources=resources_of(node, VAULT, allowed), expires_at=expires_at)
    call = SessionCall(Digest.keccak(b"{}"), personal_digest(text), "POST", "/v1/embeddings", "key-1")
    principal = replace(
        PRINCIPAL,
        kind=PrincipalKind.SESSION,
        request=call.digest,
        typed_message={**call.members(), "message": text},
        signature=signature_text(signer, personal_digest(text)),
        login=call.login,
    )
    draft = replace(DRAFT, principal=principal, grant=replace(GRANT, principal=principal))
    return copy.deepcopy(issuer().issue(draft, 0, Digest.ZERO).envelope)


def test_a_receipt_of_a_session_holds_and_says_that_no_single_call_was_signed() -> None:
    steps = {step.name: step for step in checked(of_session())}

    assert {step.outcome for name, step in steps.items() if name not in ("log", "chain")} == {Outcome.PASSED}
    assert steps["request"].detail == "by a session: the user signed in, and signed no single call"
    assert steps["request_signature"].detail == "over the text that opened the session"
    assert {step.outcome for step in check(redact(of_session()))} == {Outcome.PASSED, Outcome.NOT_CHECKED}


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"spend": 9_999}, "price"),
        ({"spend": 0}, "price"),
        ({"node": Address(b"\x66" * 20)}, "request.message"),
        ({"chain": 1}, "request.message"),
        ({"user": Address(b"\x66" * 20)}, "request.message"),
        ({"signer": Secret(b"\x66" * 32)}, "request_signature"),
        ({"issued_at": BEGAN + 6}, "request.message"),
        ({"issued_at": BEGAN - 3600 - 86_400}, "request.message"),
        ({"expires_at": BEGAN}, "request.message"),
    ],
)
def test_a_session_s_text_that_does_not_allow_the_call_is_a_node_s_lie(changed: dict[str, Any], field: str) -> None:
    assert first_wrong(of_session(**changed)) == field


@pytest.mark.parametrize("told", [{"issued_at": BEGAN + 5}, {"expires_at": BEGAN + 1}, {"issued_at": BEGAN - 89_999}])
def test_a_session_that_can_have_been_open_then_is_believed(told: dict[str, int]) -> None:
    assert first_wrong(of_session(**told)) is None  # type: ignore[arg-type]


def test_a_text_that_is_not_shown_to_be_signed_proves_no_session() -> None:
    unsigned = of_session()
    unsigned["request_signature"] = None
    unsigned.pop("checksums")

    assert outcomes(check(unsigned))["request"] is Outcome.NOT_CHECKED


# --- contract wallets -------------------------------------------------------------------------------------------------


def by_contract(signature: str = "0x1234", **changed: Any) -> dict[str, Any]:
    """The envelope of a request that a contract accepted, and no key signed; then with these members instead."""
    principal = replace(PRINCIPAL, signature=signature, by_contract=True)
    draft = replace(DRAFT, principal=principal, grant=replace(GRANT, principal=principal))
    return copy.deepcopy(issuer().issue(draft, 0, Digest.ZERO).envelope) | changed


@pytest.mark.parametrize("signature", ["0x", "0x1234", "0x" + "ab" * 8192])
def test_whether_a_contract_wallet_signed_is_never_passed_without_the_chain(signature: str) -> None:
    found = outcomes(check(by_contract(signature)))

    assert found.pop("request_signature") is Outcome.NOT_CHECKED
    assert Outcome.FAILED not in found.values()


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"request_signer": None}, "request_signature"),
        ({"request_signer": "key"}, "request_signer"),
        ({"request_signer": ["contract"]}, "request_signer"),
        ({"request_signature": "no hex"}, "request_signature"),
        ({"request_signature": "0x12345"}, "request_signature"),
        ({"request_signature": "0x9999"}, "request_signature"),  # by its sum
    ],
)
def test_what_is_said_of_a_contract_wallet_can_not_be_changed(changed: dict[str, Any], field: str) -> None:
    assert first_wrong(by_contract(**changed)) == field


def test_a_session_by_a_text_that_no_key_signed_is_not_passed() -> None:
    """Who could claim a contract for any user, would have receipts of sessions that nobody opened."""
    forged = of_session() | {"request_signature": "0x00", "request_signer": "contract"}
    forged.pop("checksums")
    found = outcomes(check(forged))

    assert (found["request"], found["request_signature"]) == (Outcome.NOT_CHECKED, Outcome.NOT_CHECKED)
    forged["request_signature"] = "not hex at all"
    assert first_wrong(forged) == "request_signature"
    late = of_session(issued_at=BEGAN - 3600 - 300) | {"request_signer": "contract"}
    late.pop("checksums")
    assert first_wrong(late) == "request.message", "and it lasts five minutes"


def test_nothing_rides_along_in_a_session_s_call() -> None:
    more = of_session()
    more["request"]["input_data"] = {"text": "never sent"}

    assert first_wrong(more) == "request"


@pytest.mark.parametrize("member", ["body_hash", "login", "method", "path", "request_id", "message"])
@pytest.mark.parametrize("value", ["", "0x" + "00" * 32, None, 7, "\ud800"])
def test_no_member_of_a_session_s_call_can_be_changed(member: str, value: Any) -> None:
    changed = of_session()
    changed["request"][member] = value

    assert (first_wrong(changed) or "").startswith("request")
    changed.pop("checksums")
    assert (first_wrong(changed) or "").startswith("request")
    del changed["request"][member]
    assert first_wrong(changed) is not None
