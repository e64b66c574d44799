"""Strict signature checks, everything included, in CPU time; beside what eth-account takes for the same signature."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from eth_account import Account
from eth_account.messages import encode_defunct, encode_typed_data

from divault.auth import Authenticator
from divault.messages import (
    HeaderParameters,
    HeaderPolicy,
    HttpMessage,
    InferenceRequest,
    RequestContext,
    address_of,
    body_hash,
    parse_key,
    personal_digest,
    request_domain,
    require_signer,
    sign_headers,
    signature_text,
    strict_object,
    verify_headers,
)
from divault.receipts import ReceiptDraft, ReceiptIssuer, check, require_valid
from divault.sessions import Home
from divault.values import (
    Address,
    BodySignature,
    Digest,
    ModelId,
    Nonce,
    Principal,
    PrincipalKind,
    ReceiptStatus,
    SignedCall,
    Usdc,
)

_NOW, _CHAIN, _AUTHORITY, _PATH = 1_790_000_000, 31337, "node.example.org", "/api/v1/inference"
_KEY = parse_key("0x" + "4c" * 32)
_USER, _NODE, _VAULT = address_of(_KEY), Address(b"\x0d" * 20), Address(b"\x0e" * 20)
_BODY = b'{"model_id":"m1","user_address":"%b","input_data":{"text":"hi"}}' % str(_USER).encode()
_DOMAIN = request_domain(_CHAIN, _VAULT)
_REQUEST = InferenceRequest(
    _USER,
    _NODE,
    ModelId.parse("m1").key,
    "POST",
    _PATH,
    body_hash(strict_object(_BODY)),
    Usdc(5),
    Nonce(b"\x07" * 32),
    _NOW - 10,
    _NOW + 60,
)
_SIGNATURE = signature_text(_KEY, _REQUEST.digest(_DOMAIN))
# Recovery alone costs 45 us; what strictness adds should stay below twice that, and the body's JSON below that again.
_TARGETS = {"EIP-191": 90, "ERC-8128": 95, "EIP-712": 150}


def _cpu_us(work: Callable[[], Any], rounds: int) -> float:
    """Median over seven batches of the CPU time of one call, in microseconds."""
    batches = []
    for _ in range(7):
        start = time.process_time()
        for _ in range(rounds):
            work()
        batches.append((time.process_time() - start) / rounds * 1e6)
    return median(batches)


def _typed() -> None:
    """Body to verdict: strict JSON, canonical hash, struct, window, recovery, comparison."""
    hashed = body_hash(strict_object(_BODY))
    _REQUEST.check(RequestContext(_NODE, "POST", _PATH, hashed, _NOW, _REQUEST.model))
    require_signer(_REQUEST.digest(_DOMAIN), _SIGNATURE, _USER)


def _typed_by_eth_account() -> Callable[[], Any]:
    typed_data = _REQUEST.typed_data(_DOMAIN)
    numbers = {name: int(typed_data["message"][name]) for name in ("maxPrice", "issuedAt", "expiresAt")}
    full = typed_data | {"message": typed_data["message"] | numbers}
    return lambda: Account.recover_message(encode_typed_data(full_message=full), signature=_SIGNATURE)


def _headers() -> Callable[[], Any]:
    message = HttpMessage("POST", _AUTHORITY, _PATH, None, {}, _BODY)
    added = sign_headers(_KEY, message, HeaderParameters(_CHAIN, _NOW, _NOW + 60, "n" * 22))
    signed, policy = message.with_headers(added), HeaderPolicy(_CHAIN, _AUTHORITY, _NOW)
    return lambda: verify_headers(signed, policy)


def _principal() -> Callable[[], Any]:
    proof = BodySignature(_SIGNATURE, _REQUEST.nonce, _NOW - 10, _NOW + 60, _REQUEST.body_hash)
    call = SignedCall(_USER, "POST", _PATH, _BODY, proof, ModelId.parse("m1"), Usdc(5))
    node = Authenticator(Home(_CHAIN, _VAULT, _NODE, f"https://{_AUTHORITY}"), clock=lambda: _NOW)
    loop = asyncio.new_event_loop()
    return lambda: loop.run_until_complete(node.authenticate(call))


def _receipts() -> tuple[Callable[[], Any], Callable[[], Any]]:
    principal = Principal(_USER, PrincipalKind.BODY, _REQUEST.digest(_DOMAIN), _REQUEST.nonce, _NOW + 60, _NOW, Usdc(5))
    draft = ReceiptDraft(principal, ModelId.parse("m1"), ReceiptStatus.REFUSED, _NOW, input_data=b"{}", code="x")
    issuer = ReceiptIssuer(_KEY, _CHAIN, _VAULT)
    envelope = issuer.issue(draft, 0, Digest.ZERO).envelope
    return lambda: issuer.issue(draft, 0, Digest.ZERO), lambda: require_valid(check(envelope))


def _row(name: str, own: float, theirs: float | None, target: float | None) -> dict[str, Any]:
    return {
        "name": name,
        "figure": round(own, 1),
        "unit": "us CPU",
        "yardstick": "none" if theirs is None else f"eth-account: {theirs:.0f} us",
        "ratio": None if theirs is None else round(own / theirs, 3),
        "target": "none" if target is None else f"at most {target:.0f} us",
        "holds": None if target is None else own <= target,
    }


def run() -> list[dict[str, Any]]:
    """Microseconds of CPU per check."""
    text = "hello"
    personal = signature_text(_KEY, personal_digest(text))
    own_personal = _cpu_us(lambda: require_signer(personal_digest(text), personal, _USER), 500)
    their_personal = _cpu_us(lambda: Account.recover_message(encode_defunct(text=text), signature=personal), 200)
    own_typed, their_typed = _cpu_us(_typed, 300), _cpu_us(_typed_by_eth_account(), 100)
    own_headers = _cpu_us(_headers(), 300)
    issue, verify = _receipts()
    return [
        _row("signature, EIP-191", own_personal, their_personal, _TARGETS["EIP-191"]),
        _row("signature, EIP-712 request with its body", own_typed, their_typed, _TARGETS["EIP-712"]),
        _row("signature, ERC-8128 headers", own_headers, their_personal, _TARGETS["ERC-8128"]),
        _row("authenticate a parsed body call", _cpu_us(_principal(), 200), None, None),
        _row("receipt, issue", _cpu_us(issue, 200), None, None),
        _row("receipt, check offline", _cpu_us(verify, 200), None, None),
    ]
