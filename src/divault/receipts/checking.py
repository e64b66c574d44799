"""Checking a receipt offline: named steps, each passed, failed or not checked; a missing input is never a pass.

1. `envelope`: type, version and members are those of version 1, and every value parses.
2. `domain`: `DIV Receipt`, version 1, and the chain and vault that the checker expects.
3. `receipt_hash`: recomputed from domain and struct. `signature`: by the strict rules, of `node`.
4. `rules`: what holds between the fields (status, price, times, place in the chain).
5. `cid`, `runtime`, `payment_key`, `request`, `request_signature`: what is disclosed matches its hash. The request is
   an `InferenceRequest`, or a call of a session: then the signature is over the text that opened the session, and no
   signature of the user covers the single call. The step that passed says so.
   Whether a contract wallet accepts a signature only the chain can say: where `request_signer` claims that, the step
   is not checked, and never passed.
6. `input`, `output`: the bytes at hand match, with their salts.
7. `checksums`: nothing else was changed by accident (see that module: sums locate, they prove nothing).
8. `log` and `chain`: need more than this file, so they are never checked here.

The first step that failed names the field that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from divault.errors import BadRequest, DivaultError, ReceiptInvalid, SignatureInvalid
from divault.messages import (
    CLOCK_SKEW_S,
    InferenceRequest,
    SessionCall,
    SignInMessage,
    allowances_of,
    bound_to,
    recover,
    request_domain,
    require_signer,
    signature_bytes,
)
from divault.messages.session_calls import LONGEST_BY_CONTRACT_S, LONGEST_S
from divault.messages.sign_in import MAX_AGE_S
from divault.messages.typed import Domain
from divault.receipts.checksums import mismatches
from divault.receipts.fields import (
    BY_CONTRACT,
    CHARGED,
    DOMAIN_NAME,
    DOMAIN_VERSION,
    FIELDS,
    RECEIPT,
    input_hash,
    output_hash,
    runtime_hash,
    text_hash,
)
from divault.values import Address, Digest, ReceiptStatus, Usdc

T = TypeVar("T")
_REQUIRED = ("type", "version", "domain", "receipt", "receipt_hash", "signature")
_OPTIONAL: dict[str, type] = {
    "cid": str,
    "vault_block_number": int,
    "runtime": dict,
    "payment_key": str,
    "request": dict,
    "request_signature": str,
    "request_signer": str,
    "input_salt": str,
    "output_salt": str,
    "code": str,
    "log": dict,
    "attestation": dict,
    "checksums": dict,
}
_STATUSES = frozenset(int(status) for status in ReceiptStatus)


class Outcome(StrEnum):
    """How a step ended."""

    PASSED = "pass"
    FAILED = "fail"
    NOT_CHECKED = "not checked"


@dataclass(frozen=True, slots=True)
class CheckStep:
    """One step: its name, how it ended, the field that is wrong if it failed, and a sentence."""

    name: str
    outcome: Outcome
    field: str | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class _Expected:
    """What the checker knows beside the envelope; None: he doesn't."""

    chain_id: int | None
    vault: Address | None
    node: Address | None
    input_data: bytes | None
    result: bytes | None


@dataclass(frozen=True, slots=True)
class _Case:
    """An envelope whose values parsed."""

    envelope: dict[str, Any]
    domain: Domain
    values: dict[str, Any]
    stated: Digest
    """`receipt_hash` as the envelope says it."""
    expected: _Expected


@dataclass(frozen=True, slots=True)
class _Holds:
    """A step that holds, and what should be known beside that."""

    but: str


Step = Callable[[_Case], "str | _Holds | None"]
"""Returns why it could not be checked, or None when it holds; raises ReceiptInvalid that names the field."""


def check(
    envelope: Any,
    *,
    chain_id: int | None = None,
    vault: Address | None = None,
    node: Address | None = None,
    input_data: bytes | None = None,
    result: bytes | None = None,
) -> list[CheckStep]:
    """All steps of checking an envelope, in order, for the chain, vault, node and bytes that the checker knows.

    `input_data` as `input_bytes` gives it, `result` as `slice_result`. Raises nothing; see `require_valid`.
    """
    try:
        case = _parse(envelope, _Expected(chain_id, vault, node, input_data, result))
    except ReceiptInvalid as err:
        failed = CheckStep("envelope", Outcome.FAILED, err.data["field"], err.detail)
        return [failed, *(CheckStep(name, Outcome.NOT_CHECKED, detail="the envelope is malformed") for name in _STEPS)]
    return [CheckStep("envelope", Outcome.PASSED), *(_run(name, step, case) for name, step in _STEPS.items())]


def require_valid(steps: list[CheckStep]) -> None:
    """Return only if no step failed. Raises ReceiptInvalid whose `field` is the first one that is wrong."""
    for step in steps:
        if step.outcome is Outcome.FAILED:
            raise ReceiptInvalid(f"{step.field} is wrong: {step.detail}", field=step.field)


def _run(name: str, step: Step, case: _Case) -> CheckStep:
    try:
        why_not = step(case)
    except ReceiptInvalid as err:
        return CheckStep(name, Outcome.FAILED, err.data["field"], err.detail)
    if isinstance(why_not, str):
        return CheckStep(name, Outcome.NOT_CHECKED, detail=why_not)
    return CheckStep(name, Outcome.PASSED, detail="" if why_not is None else why_not.but)


def _require(holds: bool, field: str, detail: str) -> None:  # noqa: FBT001  # the fact itself, not an option
    if not holds:
        raise ReceiptInvalid(detail, field=field)


# --- 1: the envelope ----------------------------------------------------------------------------------------------


def _parse(envelope: Any, expected: _Expected) -> _Case:
    if not isinstance(envelope, dict):
        raise ReceiptInvalid("a receipt is a JSON object", field="type")
    for name in _REQUIRED:
        _require(name in envelope, name, "this member is missing")
    signer = envelope.get("request_signer")
    _require(signer in (None, BY_CONTRACT), "request_signer", f"the only one that is named is {BY_CONTRACT}")
    for name, value in envelope.items():
        _require(name in _REQUIRED or name in _OPTIONAL, str(name)[:64], "version 1 has no such member")
        typed = name not in _OPTIONAL or value is None or type(value) is _OPTIONAL[name]
        _require(typed, name, "this member has another type")
    _require(envelope["type"] == RECEIPT.name, "type", f"the type is {RECEIPT.name}")
    _require(type(envelope["version"]) is int and envelope["version"] == 1, "version", "the version is 1")
    domain = _member("domain", lambda: Domain.parse(envelope["domain"]), "domain.")
    values = _member("receipt", lambda: RECEIPT.parse(envelope["receipt"]))
    stated = _member("receipt_hash", lambda: Digest.parse(envelope["receipt_hash"]))
    return _Case(envelope, domain, values, stated, expected)


def _member(name: str, parse: Callable[[], T], prefix: str = "") -> T:
    """The parsed member; what BadRequest names inside it is named with the prefix."""
    try:
        return parse()
    except BadRequest as err:
        inner = str(err.data.get("field") or name)
        field = inner if inner == name or inner.startswith(prefix) else prefix + inner
        raise ReceiptInvalid(err.detail, field=field) from err


# --- 2 and 3: whose word it is ------------------------------------------------------------------------------------


def _domain(case: _Case) -> None:
    have, expected = case.domain, case.expected
    _require(have.name == DOMAIN_NAME, "domain.name", f"the domain is {DOMAIN_NAME}")
    _require(have.version == DOMAIN_VERSION, "domain.version", f"the domain's version is {DOMAIN_VERSION}")
    _require(expected.chain_id in (None, have.chain_id), "domain.chainId", f"it is for chain {have.chain_id}")
    _require(expected.vault in (None, have.contract), "domain.verifyingContract", f"it is for vault {have.contract}")


def _receipt_hash(case: _Case) -> None:
    if case.domain.digest(RECEIPT.hash(case.values)) != case.stated:
        field = _changed(case) or "receipt_hash"
        raise ReceiptInvalid("domain and struct do not have the hash that was signed", field=field)


def _signature(case: _Case) -> None:
    signer = _signer(case)
    if signer != case.values["node"]:
        raise ReceiptInvalid("it is not signed by the node that it names", field=_changed(case) or "signature")
    _require(case.expected.node in (None, signer), "node", f"it is by {signer}, not by the node that was expected")


def _signer(case: _Case) -> Address | None:
    try:
        return recover(case.stated, case.envelope["signature"])
    except DivaultError:
        return None


def _changed(case: _Case) -> str | None:
    """The field that was most likely changed: the first that misses its sum, else the first that others contradict."""
    located = next(mismatches(case.envelope), None)
    return located or next((name for name, agrees in _contradictions(case) if not agrees), None)


def _contradictions(case: _Case) -> Iterator[tuple[str, bool]]:
    """Where sums say nothing: each field beside the disclosed value that says the same."""
    values, request = case.values, _request_or_none(case.envelope)
    if request is not None:
        yield "node", values["node"] == request.node
        yield "user", values["user"] == request.user
        yield "modelId", values["modelId"] == request.model
        yield "requestHash", values["requestHash"] == _request_digest(case, request)
    for field, member, hashed in _BOUND:
        if case.envelope.get(member) is not None:
            yield field, values[field] == _hash_or_none(hashed, case.envelope[member])
    try:
        _rules(case)
    except ReceiptInvalid as err:
        yield err.data["field"], False


# --- 4: what holds between the fields -----------------------------------------------------------------------------


def _rules(case: _Case) -> None:
    values = case.values
    _require(values["status"] in _STATUSES, "status", "the status is none of 1 to 5")
    charged = values["status"] in CHARGED
    _require(charged or values["price"] == 0, "price", "an outcome without an answer costs nothing")
    _require(values["finishedAt"] >= values["startedAt"], "finishedAt", "it ended before it began")
    first = values["sequence"] == 0
    linked = (values["prevReceiptHash"] == Digest.ZERO) == first
    _require(linked, "prevReceiptHash", "the first receipt, and only it, has no predecessor")


# --- 5: what is disclosed -----------------------------------------------------------------------------------------

_BOUND: tuple[tuple[str, str, Callable[[Any], Digest]], ...] = (
    ("cidHash", "cid", text_hash),
    ("runtimeHash", "runtime", runtime_hash),
    ("paymentRef", "payment_key", text_hash),
)
"""Field of the struct, member beside it, and how the one comes from the other."""


def _hash_or_none(hashed: Callable[[Any], Digest], value: Any) -> Digest | None:
    try:
        return hashed(value)
    except (BadRequest, UnicodeEncodeError):  # no such value was ever hashed
        return None


def _disclosed(field: str, member: str, hashed: Callable[[Any], Digest]) -> Step:
    def step(case: _Case) -> str | None:
        value, need = case.envelope.get(member), case.values[field]
        if value is None:
            return f"{field} is zero: not reached" if need == Digest.ZERO else f"{member} is not disclosed"
        _require(_hash_or_none(hashed, value) == need, member, f"it does not have the hash in {field}")
        return None

    return step


def _request_or_none(envelope: dict[str, Any]) -> InferenceRequest | None:
    try:
        return InferenceRequest.parse(envelope.get("request"))
    except BadRequest:
        return None


def _request_digest(case: _Case, request: InferenceRequest) -> Digest:
    return request.digest(request_domain(case.domain.chain_id, case.domain.contract))


def _request(case: _Case) -> str | _Holds | None:
    message, values = case.envelope.get("request"), case.values
    if message is None:
        return "the request is not disclosed, or was signed in headers"
    if _by_session(message):
        return _session_request(case, message)
    request = _member("request", lambda: InferenceRequest.parse(message), "request.")
    _require(request.user == values["user"], "request.user", "the receipt names another user")
    _require(request.node == values["node"], "request.node", "the receipt names another node")
    _require(request.model == values["modelId"], "request.modelId", "the receipt names another model")
    if _request_digest(case, request) != values["requestHash"]:
        field = next((name for name in mismatches(case.envelope) if name.startswith("request.")), "request")
        raise ReceiptInvalid("the request does not have the hash in requestHash", field=field)
    _require(request.max_price.atomic >= values["price"], "price", "more was charged than the request allows")
    in_time = request.issued_at - CLOCK_SKEW_S <= values["startedAt"] < request.expires_at
    _require(in_time, "startedAt", "the call began outside the time that the request is for")
    return None


def _by_session(message: dict[str, Any]) -> bool:
    return "login" in message


def _session_request(case: _Case, members: dict[str, Any]) -> str | _Holds:
    """The call has the hash that was signed, and the text of its session is the user's, for this node, at that time."""
    values = case.values
    _require(members.keys() <= _SESSION_MEMBERS, "request", "a session's call has other members")
    call = _member("request", lambda: SessionCall.parse(members), "request.")
    digest = _member("request", lambda: call.digest)
    if digest != values["requestHash"]:
        field = next((name for name in mismatches(case.envelope) if name.startswith("request.")), "request")
        raise ReceiptInvalid("the call does not have the hash in requestHash", field=field)
    text = members.get("message")
    try:
        login = SignInMessage.parse(text if isinstance(text, str) else "")
    except DivaultError as err:
        raise ReceiptInvalid("it is no text that opens a session (EIP-4361)", field="request.message") from err
    _require(login.digest == call.login, "request.message", "it does not have the digest in request.login")
    _require(login.address == values["user"], "request.message", "another wallet than the user signed in by it")
    _require(login.chain_id == case.domain.chain_id, "request.message", "it is for another chain")
    bound = bound_to(values["node"], case.domain.contract)
    _require(all(name in login.resources for name in bound), "request.message", "it is for another node or vault")
    allowed = _member("request", lambda: _allowed(login, values["token"]))
    _require(values["price"] <= allowed, "price", "more was charged than the session may spend")
    longest = LONGEST_BY_CONTRACT_S if case.envelope.get("request_signer") == BY_CONTRACT else LONGEST_S
    in_time = _was_open(login, values["startedAt"], longest)
    _require(in_time, "request.message", "its session was not open when the call began")
    if case.envelope.get("request_signature") is None:
        return "by a session, whose text is not shown to be signed"
    if case.envelope.get("request_signer") == BY_CONTRACT:
        return "by a session, whose text is signed by no key: that needs the chain"
    return _Holds("by a session: the user signed in, and signed no single call")


_SESSION_MEMBERS = frozenset({"body_hash", "login", "method", "path", "request_id", "message"})


def _was_open(login: SignInMessage, moment: int, longest_s: int) -> bool:
    """Whether a session by this text can have been open: all that a text says of it, and how long one lasts at most."""
    latest = login.issued_at + MAX_AGE_S + longest_s
    ends = latest if login.expires_at is None else min(latest, login.expires_at)
    begins = max(login.issued_at - CLOCK_SKEW_S, login.not_before or 0)
    return int(begins) <= moment < ends


def _allowed(login: SignInMessage, token: Address) -> int:
    try:
        return allowances_of(login.resources).get(token, Usdc(0)).atomic
    except SignatureInvalid as err:
        raise BadRequest(err.detail, field="message") from err


def _request_signature(case: _Case) -> str | _Holds | None:
    signature, request = case.envelope.get("request_signature"), case.envelope.get("request")
    if signature is None:
        return "the signature of the request is not disclosed"
    signed = case.values["requestHash"]
    by_session = request is not None and _by_session(request)
    if by_session:
        signed = _member("request", lambda: SessionCall.parse(request), "request.").login
    try:
        if case.envelope.get("request_signer") == BY_CONTRACT:
            signature_bytes(signature)
            return "by no key: whether the user is a contract wallet that accepts it needs the chain"
        require_signer(signed, signature, case.values["user"])
    except DivaultError as err:
        raise ReceiptInvalid("it is not by the user over this request", field="request_signature") from err
    return _Holds("over the text that opened the session") if by_session else None


# --- 6: input and output ------------------------------------------------------------------------------------------


def _input(case: _Case) -> str | None:
    return _salted(case, "input", case.expected.input_data, input_hash)


def _output(case: _Case) -> str | None:
    return _salted(case, "output", case.expected.result, output_hash)


def _salted(case: _Case, what: str, covered: bytes | None, hashed: Callable[[bytes, bytes], Digest]) -> str | None:
    text, need = case.envelope.get(f"{what}_salt"), case.values[f"{what}Hash"]
    if need == Digest.ZERO:
        return f"{what}Hash is zero: not reached"
    if text is None:
        return f"{what}_salt is not disclosed"
    salt = _member(f"{what}_salt", lambda: Digest.parse(text))
    if covered is None:
        return f"the {what} is not at hand"
    if hashed(salt.raw, covered) != need:
        field = f"{what}_salt" if f"{what}_salt" in set(mismatches(case.envelope)) else what
        raise ReceiptInvalid(f"it does not have the hash in {what}Hash", field=field)
    return None


# --- 7 and 8 ------------------------------------------------------------------------------------------------------


_VOUCHED = ("receipt_hash", "signature", *(member for _, member, _ in _BOUND))
"""Members that an earlier step proved, if they are there."""


def _checksums(case: _Case) -> str | None:
    if not case.envelope.get("checksums"):
        return "the envelope carries no checksums"
    located = next(mismatches(case.envelope), None)
    if located is not None:
        # What a hash already vouches for is right, so its sum is what was changed.
        by_key = located == "request_signature" and case.envelope.get("request_signer") is None
        disclosed = (by_key or located in _VOUCHED) and case.envelope[located] is not None
        vouched = disclosed or located in FIELDS or located.startswith(("domain.", "request."))
        field = f"checksums.{located}" if vouched else located
        raise ReceiptInvalid("it was changed after the receipt was issued", field=field)
    return None


def _never(why: str) -> Step:
    return lambda _: why


_STEPS: dict[str, Step] = {
    "domain": _domain,
    "receipt_hash": _receipt_hash,
    "signature": _signature,
    "rules": _rules,
    **{member: _disclosed(field, member, hashed) for field, member, hashed in _BOUND},
    "request": _request,
    "request_signature": _request_signature,
    "input": _input,
    "output": _output,
    "checksums": _checksums,
    "log": _never("needs the node's log"),
    "chain": _never(
        "needs the chain: is vaultBlock canonical, do price, owner and gate agree, was the payment settled"
    ),
}
"""Every step after the first, in order."""
