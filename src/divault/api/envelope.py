"""From raw bytes to a `SignedCall`: parsed strictly, authenticated by nobody yet.

Rules:

1. A request with `Signature-Input` is header-signed (ERC-8128): its raw bytes are what was signed. One whose bearer
   token is a session's comes by that session; any other `Authorization` is for somebody else, and left alone. Otherwise
   the body carries its own signature, is at most 64 KiB (it has to be canonicalised). Only a header signature covers a
   query string: with the others there is none.
2. What is missing or malformed in a body signature is told first, with the typed data to sign, before anything else is
   read strictly: so an old client learns what to do.
3. `input_data` and `parameters` go on as the bytes they came in; the gateway never parses a model's numbers.
4. A header that a signature covers, or that says who calls, must not come twice.
5. Nobody is proved yet, so reading is cheap whatever comes: of a body that isn't signed inside, only the members of
   `_Members` are made into anything, and all but the model's input have 64 KiB together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import msgspec
from msgspec.structs import replace

from divault.api.describing import JSON
from divault.auth import Authenticator
from divault.errors import BadRequest, SignatureIncomplete, SignHeaders, TooLarge
from divault.messages import body_hash, claimed_user, strict_object
from divault.messages.headers import MAX_PRICE, PAYMENT
from divault.sessions import PREFIX, read_token
from divault.values import (
    UINT256_MAX,
    Address,
    BodySignature,
    HeaderSignature,
    ModelId,
    Nonce,
    Secret,
    SessionToken,
    SignedCall,
    TokenParts,
    TransferClaim,
    Usdc,
)

MAX_SELF_SIGNED_BYTES = 64 * 1024
"""Canonicalising costs 1.4 us per float; a larger body signs headers, over its raw bytes."""
_MAX_KEY_TEXT = 4096  # an age identity has 74 characters, a Kavach key 64; the rest is passphrases
TIMEOUT = "divault-timeout"
"""Header with the seconds that a caller waits for a run, its turn included; the node's own limit stays."""
_SECONDS = re.compile(r"[0-9]{1,5}(\.[0-9]{1,3})?", re.ASCII)
_BEARER = re.compile(rf"bearer +({PREFIX}[!-~]+)", re.ASCII | re.IGNORECASE)
_IDEMPOTENCY = "idempotency-key"
_KEY = re.compile(r"[!-~]{1,255}", re.ASCII)
_SINGLE_HEADERS = frozenset(
    {
        "signature",
        "signature-input",
        "content-digest",
        MAX_PRICE,
        PAYMENT,
        "host",
        "authorization",
        "origin",
        _IDEMPOTENCY,
    }
)


class Incoming(msgspec.Struct, frozen=True):
    """One HTTP request, unparsed."""

    raw: bytes
    method: str
    path: str
    query: str
    headers: Sequence[tuple[str, str]]
    """Names in lower case, in order, duplicates kept."""
    peer: str

    def header(self, name: str, default: str = "") -> str:
        """Value of the first header of this name (in lower case)."""
        return next((value for have, value in self.headers if have == name), default)


_ABSENT = msgspec.Raw()


class _Members(msgspec.Struct, frozen=True):
    """The members that a node reads, as their bytes stood in the body, empty where there is none.

    Of several members of one name the last counts; others are stepped over.
    """

    model_id: msgspec.Raw = _ABSENT
    user_address: msgspec.Raw = _ABSENT
    input_data: msgspec.Raw = _ABSENT
    parameters: msgspec.Raw = _ABSENT
    payment: msgspec.Raw = _ABSENT
    decryption_key: msgspec.Raw = _ABSENT
    lighthouse_authorization: msgspec.Raw = _ABSENT
    cid: msgspec.Raw = _ABSENT
    chain_id: msgspec.Raw = _ABSENT
    vault: msgspec.Raw = _ABSENT
    user_signature: msgspec.Raw = _ABSENT
    max_price: msgspec.Raw = _ABSENT


_MEMBERS = msgspec.json.Decoder(_Members)
_INPUT = ("input_data", "parameters")
_SMALL = tuple(name for name in _Members.__struct_fields__ if name not in _INPUT)
_SMALL_OF = attrgetter(*_SMALL)


class Envelopes:
    """Parses requests for one node."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    def parse(self, incoming: Incoming, model: ModelId | None = None, *, session_does: bool = True) -> SignedCall:
        """Parse a call; `model` is the one that the path names, where it names one.

        `session_does`: whether who sent nothing of the kind is told that the token of a session would do.

        Raises BadRequest, SignHeaders, SignatureIncomplete, SignatureInvalid (address), InputInvalid.
        """
        headers = single_headers(incoming)
        proved = self._proof_in(incoming, headers)
        if proved is not None:
            return _beside(incoming, *proved, headers, model)
        if incoming.method != "POST":
            raise self._unproved(incoming, session_does=session_does)
        return self._self_signed(incoming)

    def foreign(self, incoming: Incoming, model: ModelId | None, *, session_does: bool = True) -> SignedCall:
        """Parse a call whose body is not this interface's: signed in headers over its raw bytes, or of a session.

        `session_does` as for `parse`.

        Raises SignatureIncomplete, BadRequest and what header signatures raise.
        """
        headers = single_headers(incoming)
        proved = self._proof_in(incoming, headers)
        if proved is None:
            raise self._unproved(incoming, session_does=session_does)
        user, proof = proved
        return SignedCall(
            user,
            incoming.method,
            incoming.path,
            incoming.raw,
            proof,
            model,
            _most(headers, proof),
            payment=_payment(None, incoming),
            covered=incoming.raw,
            peer=incoming.peer,
            limit_s=_limit(incoming.header(TIMEOUT)),
        )

    def _unproved(self, incoming: Incoming, *, session_does: bool) -> SignatureIncomplete:
        return self._authenticator.headers_missing(
            method=incoming.method, path=incoming.path, session_does=session_does
        )

    def _proof_in(
        self, incoming: Incoming, headers: dict[str, str]
    ) -> tuple[Address, HeaderSignature | SessionToken] | None:
        """Who the headers name, and by what; None where they name nobody (rule 1)."""
        if "signature-input" in headers:
            return claimed_user(headers), HeaderSignature(headers, incoming.query or None)
        if (token := session_token(headers)) is not None:
            return token.user, _session_proof(incoming, headers, token)
        return None

    def _self_signed(self, incoming: Incoming) -> SignedCall:
        if len(incoming.raw) > MAX_SELF_SIGNED_BYTES:
            raise SignHeaders(
                f"a body that carries its own signature is at most {MAX_SELF_SIGNED_BYTES} bytes: sign headers instead",
                limit_bytes=MAX_SELF_SIGNED_BYTES,
                have_bytes=len(incoming.raw),
            )
        if incoming.query:
            raise BadRequest("no signature covers a query string here: leave it out", field="query")
        body = strict_object(incoming.raw)
        self._authenticator.require_complete(body, method=incoming.method, path=incoming.path)
        proof = BodySignature(
            signature=body["user_signature"],
            nonce=Nonce.parse(body["nonce"]),
            issued_at=body["issued_at"],
            expires_at=body["expires_at"],
            body_hash=body_hash(body),
            chain_id=_member(body, "chain_id", int),
            vault=None if "vault" not in body else Address.parse(body["vault"]),
        )
        limit = Usdc.parse_atomic(_member(body, "max_price", str) or "0")
        return _call(incoming, body, _members(incoming.raw), proof, Address.parse(body["user_address"]), limit)


def single_headers(incoming: Incoming) -> dict[str, str]:
    """The headers by their lower-case names. Raises BadRequest for one that must not come twice and does (rule 4)."""
    found: dict[str, str] = {}
    for name, value in incoming.headers:
        if name in found and name in _SINGLE_HEADERS:
            raise BadRequest(f"the header {name} came twice", field=name)
        found[name] = value
    return found


def require_json(incoming: Incoming) -> None:
    """Return only if the body is said to be JSON, or nothing is said of it. Raises BadRequest."""
    if not incoming.header("content-type", JSON).startswith(JSON):
        raise BadRequest(f"send the body as {JSON}", field="content-type")


def unsigned_object(incoming: Incoming, most: int = MAX_SELF_SIGNED_BYTES) -> dict[str, Any]:
    """The members of a body that nobody is known to have sent, none where there is no body.

    Raises TooLarge, BadRequest.
    """
    if len(incoming.raw) > most:
        raise TooLarge(f"this body has at most {most} bytes", limit_bytes=most, have_bytes=len(incoming.raw))
    return strict_object(incoming.raw) if incoming.raw else {}


def session_token(headers: Mapping[str, str]) -> TokenParts | None:
    """The token of a session among the headers (lower-case names), if there is one. Raises SessionInvalid."""
    match = _BEARER.fullmatch(headers.get("authorization", ""))
    return None if match is None else read_token(Secret.of_text(match[1]))


def _session_proof(incoming: Incoming, headers: Mapping[str, str], token: TokenParts) -> SessionToken:
    if incoming.query:
        raise BadRequest("calls of a session have no query string: leave it out", field="query")
    key = headers.get(_IDEMPOTENCY)
    if key is not None and not _KEY.fullmatch(key):
        raise BadRequest("Idempotency-Key is 1 to 255 printable characters without blanks", field=_IDEMPOTENCY)
    return SessionToken(token, headers.get("origin"), key)


def _most(headers: Mapping[str, str], proof: HeaderSignature | SessionToken, told: str | None = None) -> Usdc:
    """What the call may cost: the least of what its header and its body say.

    Where neither says it: nothing; of a session, all that the session may spend.
    """
    said = [Usdc.parse_atomic(text) for text in (headers.get(MAX_PRICE), told) if text is not None]
    return min(said, default=Usdc(UINT256_MAX if isinstance(proof, SessionToken) else 0))


def _beside(
    incoming: Incoming,
    user: Address,
    proof: HeaderSignature | SessionToken,
    headers: Mapping[str, str],
    model: ModelId | None,
) -> SignedCall:
    """A call whose proof stands beside its body."""
    if incoming.method != "POST":
        limit = _most(headers, proof)
        return SignedCall(user, incoming.method, incoming.path, incoming.raw, proof, model, limit, peer=incoming.peer)
    members = _members(incoming.raw)
    small = _small(members)
    if "user_signature" in small and isinstance(proof, SessionToken):
        raise BadRequest("send a session's token, or a body that is signed, not both", field="user_signature")
    proof = replace(
        proof,
        chain_id=_member(small, "chain_id", int),
        vault=None if "vault" not in small else Address.parse(small["vault"]),
    )
    if "user_address" in small and Address.parse(small["user_address"]) != user:
        raise BadRequest("user_address is not the wallet that this request is proved by", field="user_address")
    return _call(incoming, small, members, proof, user, _most(headers, proof, _member(small, "max_price", str)))


def _call(
    incoming: Incoming,
    body: Mapping[str, Any],
    raw: _Members,
    proof: BodySignature | HeaderSignature | SessionToken,
    user: Address,
    limit: Usdc,
) -> SignedCall:
    key = _member(body, "decryption_key", str)
    if key is not None and not 0 < len(key) <= _MAX_KEY_TEXT:
        raise BadRequest(f"decryption_key has 1 to {_MAX_KEY_TEXT} characters", field="decryption_key")
    authorization = _member(body, "lighthouse_authorization", str)
    if authorization is not None and (key is not None or not 0 < len(authorization) <= _MAX_KEY_TEXT):
        raise BadRequest(
            f"lighthouse_authorization has 1 to {_MAX_KEY_TEXT} characters and stands instead of decryption_key",
            field="lighthouse_authorization",
        )
    return SignedCall(
        user=user,
        method=incoming.method,
        path=incoming.path,
        body=incoming.raw,
        proof=proof,
        model=ModelId.parse(body.get("model_id", "")),
        max_price=limit,
        input_data=bytes(raw.input_data) or None,
        parameters=bytes(raw.parameters) or None,
        payment=_payment(body.get("payment"), incoming),
        decryption_key=None if key is None else Secret.of_text(key),
        lighthouse_authorization=None if authorization is None else Secret.of_text(authorization),
        cid=_member(body, "cid", str),
        peer=incoming.peer,
        limit_s=_limit(incoming.header(TIMEOUT)),
    )


def _limit(text: str) -> float | None:
    if not text:
        return None
    if not _SECONDS.fullmatch(text) or not float(text):
        raise BadRequest(f"{TIMEOUT} is a number of seconds above 0, at most 99999, such as 2.5", field=TIMEOUT)
    return float(text)


def _payment(value: Any, incoming: Incoming) -> TransferClaim | None:
    """The transfer that is claimed in the body's member `value`, or in the header of that name."""
    claimed = incoming.header(PAYMENT)
    if claimed and value is not None:
        raise BadRequest(f"claim a transfer in the body or in {PAYMENT}, not in both", field="payment")
    if value is None:
        return TransferClaim(claimed) if claimed else None
    if not isinstance(value, dict) or set(value) != {"tx_hash"} or not isinstance(value["tx_hash"], str):
        raise BadRequest('payment is {"tx_hash": "0x..."}', field="payment")
    return TransferClaim(value["tx_hash"])


def _member(body: Mapping[str, Any], name: str, kind: type[Any]) -> Any:
    value = body.get(name)
    if value is None or type(value) is kind:
        return value
    raise BadRequest(f"{name} is not of the type that it must have", field=name)


def _members(raw: bytes) -> _Members:
    try:
        return _MEMBERS.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise BadRequest("the body is a JSON object") from err


def _small(members: _Members) -> dict[str, Any]:
    """What stands in the body beside the model's input, parsed strictly."""
    found = zip(_SMALL, _SMALL_OF(members), strict=True)
    values = {name: bytes(value) for name, value in found if value is not _ABSENT}
    size = sum(map(len, values.values()))
    if size > MAX_SELF_SIGNED_BYTES:
        raise TooLarge(
            f"the body has {size} bytes beside its input, {MAX_SELF_SIGNED_BYTES} are read",
            limit_bytes=MAX_SELF_SIGNED_BYTES,
            have_bytes=size,
        )
    return {name: strict_object(b'{"v":' + value + b"}")["v"] for name, value in values.items()}
