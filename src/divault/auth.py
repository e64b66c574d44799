"""From a signed call to a `Principal`: who asks, proved for this node, this call and this moment.

Rules:

1. The node fills in its own chain, vault, address, method and path; so a request that was signed for another node or
   path recovers somebody else and is `signer_mismatch`. Nothing is believed because the caller says it.
2. Body signatures cover the canonical body, header signatures the raw bytes; both have a window and a nonce.
   A session's token covers nothing of the call: it says who calls, through a channel that has to keep it secret. Its
   calls count once by their `Idempotency-Key`, which is one wallet's for all its sessions.
3. A nonce is not remembered here: (user, nonce) is a row of the ledger, written in the transaction that reserves a run
   or issues a receipt. `Principal` carries what that row needs.
4. Missing and malformed fields are answered first, with the exact typed data to sign, so that a client written without
   them learns what to do.
5. Whose signatures count is said by `Signers`: keys, and contract wallets where the node asks the chain about them.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from divault.errors import BadRequest, InputInvalid, SessionInvalid, SignatureIncomplete, SignatureInvalid
from divault.messages import (
    MAX_TTL_S,
    HeaderPolicy,
    HttpMessage,
    InferenceRequest,
    RequestContext,
    SessionCall,
    authority_of,
    body_hash,
    read_headers,
    refusal,
    request_domain,
)
from divault.messages.headers import DEFAULT_TTL_S
from divault.messages.session_calls import LONGEST_S
from divault.messages.signatures import KeysOnly, Signers, signature_bytes
from divault.sessions import Home, Sessions
from divault.values import (
    Address,
    BodySignature,
    Digest,
    HeaderSignature,
    ModelId,
    Nonce,
    Principal,
    PrincipalKind,
    SessionToken,
    SignedCall,
    Usdc,
)

_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}", re.ASCII)
_IDEMPOTENCY = b"divault/idempotency/v1\0"
_KEYS = KeysOnly()
_LATEST = 2**53 - 1  # largest integer that every JSON reader keeps


class Authenticator:
    """Proves callers to one node. Holds no state but its own identity; safe to share."""

    def __init__(
        self,
        home: Home,
        sessions: Sessions | None = None,
        *,
        signers: Signers = _KEYS,
        clock: Callable[[], float] = time.time,
        max_header_ttl_s: int = DEFAULT_TTL_S,
    ) -> None:
        """`home`: what callers sign for. Without `sessions` no token counts. `clock` gives unix seconds."""
        self._domain = request_domain(home.chain_id, home.vault)
        self._node = home.node
        self._authority = authority_of(home.url)
        self._sessions = sessions
        self._signers = signers
        self._clock = clock
        self._max_header_ttl_s = max_header_ttl_s

    async def authenticate(self, call: SignedCall) -> Principal:
        """The proof that `call.user` signed exactly this call, now valid, or that it came by an open session of his.

        Raises SignatureInvalid, SignatureExpired, WrongChain and SessionInvalid, each with the reason; what `Signers`
        raise.
        """
        now = int(self._clock())
        match call.proof:
            case BodySignature() as proof:
                return await self._by_body(call, proof, now)
            case HeaderSignature() as proof:
                return await self._by_headers(call, proof, now)
            case SessionToken() as proof:
                return await self._by_session(call, proof, now)

    def require_complete(
        self, members: Mapping[str, Any], *, method: str, path: str, price: Usdc | None = None
    ) -> None:
        """Return only if a body has all fields of a signature, well-formed enough to be checked.

        Reads nothing else strictly. `price` is what the call would cost, where that is known: the maximum to suggest.
        Raises SignatureIncomplete with the typed data to sign and the members to send; InputInvalid when no address can
        be made out; BadRequest for a `model_id` that is none.
        """
        text = members.get("user_address")
        if not isinstance(text, str) or not _ADDRESS.fullmatch(text):
            raise InputInvalid("user_address is your wallet: 0x and 40 hex digits", field="user_address")
        missing = [name for name in _SHAPES if name not in members and name not in _OPTIONAL]
        # a well-typed signature or address that is wrong by itself gets its exact reason later
        wrong = [name for name in _JUDGED_NOW if name in members and not _SHAPES[name](members[name])]
        if missing or wrong or not isinstance(members["user_signature"], str):
            malformed = [name for name, fits in _SHAPES.items() if name in members and not fits(members[name])]
            request = self._suggest(members, method=method, path=path, price=price)
            raise _incomplete(request, request.typed_data(self._domain), missing, malformed)

    def headers_missing(self, *, method: str, path: str, session_does: bool) -> SignatureIncomplete:
        """The error for a call that has to be signed in headers, or come by a session if one does, and is neither."""
        return SignatureIncomplete(
            f"sign {method} {path} in the headers Signature-Input and Signature (ERC-8128), for {self._authority} "
            f"on chain {self._domain.chain_id}"
            + (", or send the token of a session (POST /api/v1/auth/login)" if session_does else ""),
            missing=["signature-input", "signature"],
            malformed=[],
        )

    async def _by_body(self, call: SignedCall, proof: BodySignature, now: int) -> Principal:
        self._require_own_chain(proof)
        if call.model is None:
            raise BadRequest("a signed body names a model", field="model_id")
        request = InferenceRequest(
            user=call.user,
            node=self._node,
            model=call.model.key,
            method=call.method,
            path=call.path,
            body_hash=proof.body_hash,
            max_price=call.max_price,
            nonce=proof.nonce,
            issued_at=proof.issued_at,
            expires_at=proof.expires_at,
        )
        request.check(RequestContext(self._node, call.method, call.path, proof.body_hash, now))
        digest = request.digest(self._domain)
        by_contract = await self._signers.require(digest, proof.signature, call.user, call.peer)
        return Principal(
            user=call.user,
            kind=PrincipalKind.BODY,
            request=digest,
            nonce=proof.nonce,
            expires_at=proof.expires_at,
            received_at=now,
            max_price=call.max_price,
            typed_message=request.message(),
            signature=proof.signature,
            by_contract=by_contract,
        )

    async def _by_headers(self, call: SignedCall, proof: HeaderSignature, now: int) -> Principal:
        self._require_own_chain(proof)
        message = HttpMessage(call.method, self._authority, call.path, proof.query, proof.headers, call.body)
        policy = HeaderPolicy(self._domain.chain_id, self._authority, now, self._max_header_ttl_s)
        signed = read_headers(message, policy)
        if signed.user != call.user:
            raise refusal("signer_mismatch", "the headers are signed by another wallet than the call names")
        by_contract = await self._signers.require(signed.digest, signed.signature, signed.user, call.peer)
        return Principal(
            user=signed.user,
            kind=PrincipalKind.HEADERS,
            request=signed.digest,
            nonce=signed.nonce,
            expires_at=signed.expires,
            received_at=now,
            max_price=min(signed.max_price, call.max_price),  # the body is signed too, and may say less
            signature=signed.signature,
            by_contract=by_contract,
        )

    async def _by_session(self, call: SignedCall, proof: SessionToken, now: int) -> Principal:
        self._require_own_chain(proof)
        if self._sessions is None:
            raise SessionInvalid("this node opens no sessions: sign the request", reason="bad_token")
        session = await self._sessions.of(proof.token, proof.origin)
        key = proof.idempotency_key
        # no key has a blank in it: nobody can send an id of ours again
        name = key or f"no key, {secrets.token_hex(16)}"
        made = SessionCall(Digest.keccak(call.body), session.login, call.method, call.path, name)
        return Principal(
            user=session.user,
            kind=PrincipalKind.SESSION,
            request=made.digest,
            nonce=Nonce(Digest.keccak(_IDEMPOTENCY + made.request_id.encode()).raw),
            # Remembered for a day, whatever session it comes by then.
            expires_at=now + LONGEST_S if key else now,
            received_at=now,
            max_price=call.max_price,
            typed_message={**made.members(), "message": session.message},
            signature=session.signature,
            login=session.login,
            by_contract=session.by_contract,
            repeatable=key is not None,
        )

    def _require_own_chain(self, proof: BodySignature | HeaderSignature | SessionToken) -> None:
        need = {"chain_id": self._domain.chain_id, "vault": str(self._domain.contract)}
        if proof.chain_id not in (None, self._domain.chain_id):
            raise refusal("wrong_chain", f"this node serves chain {self._domain.chain_id}", **need)
        if proof.vault not in (None, self._domain.contract):
            raise refusal("wrong_domain", f"this node serves the vault {self._domain.contract}", **need)

    def _suggest(self, members: Mapping[str, Any], *, method: str, path: str, price: Usdc | None) -> InferenceRequest:
        """A fresh request over the body, with its address in an accepted spelling."""
        text = members["user_address"]
        user = Address(bytes.fromhex(text[2:]))
        spelled = dict(members) if _is_address(text) else {**members, "user_address": str(user)}
        now = int(self._clock())
        return InferenceRequest(
            user=user,
            node=self._node,
            model=ModelId.parse(members.get("model_id", "")).key,
            method=method,
            path=path,
            body_hash=body_hash(spelled),
            max_price=_limit(members, price),
            nonce=Nonce(secrets.token_bytes(32)),
            issued_at=now,
            expires_at=now + MAX_TTL_S,
        )


def _incomplete(
    request: InferenceRequest, typed_data: dict[str, Any], missing: list[str], malformed: list[str]
) -> SignatureIncomplete:
    send: dict[str, Any] = {
        "user_signature": "the signature of typed_data, 0x and 130 hex digits, or what a contract wallet gives",
        "nonce": str(request.nonce),
        "issued_at": request.issued_at,
        "expires_at": request.expires_at,
        "max_price": str(request.max_price.atomic),
    }
    if "user_address" in malformed:
        send["user_address"] = str(request.user)
    named = [f"{', '.join(names)} {what}" for names, what in ((missing, "missing"), (malformed, "malformed")) if names]
    return SignatureIncomplete(
        f"{'; '.join(named)}: sign typed_data with your wallet (eth_signTypedData_v4) and send the body again with the "
        "members in send",
        missing=missing,
        malformed=malformed,
        typed_data=typed_data,
        send=send,
    )


def _is_address(value: Any) -> bool:
    try:
        Address.parse(value)
    except SignatureInvalid:
        return False
    return True


def _is_signature(value: Any) -> bool:
    try:
        return bool(signature_bytes(value))  # a contract wallet's may have any length
    except SignatureInvalid:
        return False


def _is_nonce(value: Any) -> bool:
    try:
        Nonce.parse(value)
    except BadRequest:
        return False
    return True


def _is_time(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LATEST


def _is_amount(value: Any) -> bool:
    try:
        Usdc.parse_atomic(value)
    except BadRequest:
        return False
    return True


def _limit(members: Mapping[str, Any], price: Usdc | None) -> Usdc:
    if _is_amount(members.get("max_price")):
        return Usdc.parse_atomic(members["max_price"])
    return price or Usdc(0)


_SHAPES: dict[str, Callable[[Any], bool]] = {
    "user_address": _is_address,
    "user_signature": _is_signature,
    "nonce": _is_nonce,
    "issued_at": _is_time,
    "expires_at": _is_time,
    "max_price": _is_amount,
}
"""What a body signature consists of, and what each part has to look like."""
_OPTIONAL = frozenset({"max_price"})
_JUDGED_NOW = ("nonce", "issued_at", "expires_at", "max_price")
