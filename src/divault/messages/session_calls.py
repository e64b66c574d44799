"""What a session's text says beyond EIP-4361, and what stands in a receipt for a call that a session made.

The text names among its resources `urn:div:node:<address>` and `urn:div:vault:<address>`, in EIP-55, and for each token
that the session may spend `urn:div:spend:<token>:<atomic units>`.

A receipt of such a call holds no signature over the call, only one over that text. The call's digest takes the place
of a signed request's: keccak256 of the RFC 8785 form of `body_hash`, `login`, `method`, `path` and `request_id`.
`body_hash` is keccak256 of the body's bytes, `login` the EIP-191 digest of the text that the wallet signed,
`request_id` the caller's `Idempotency-Key`, or a random one.

>>> call = SessionCall(Digest.keccak(b"{}"), Digest.ZERO, "POST", "/v1/embeddings", "a-1")
>>> SessionCall.parse(call.members()) == call
True
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from divault.errors import BadRequest, SignatureInvalid
from divault.messages.bodies import canonical
from divault.messages.reasons import refusal
from divault.values import Address, Digest, Usdc

LONGEST_S = 86_400
"""Seconds after which every session is over."""
LONGEST_BY_CONTRACT_S = 300
"""Seconds after which a contract wallet's session is over: no event tells that its owners changed."""
OURS = "urn:div:"
"""How every resource begins that says something to a node."""
_SPEND = re.compile(r"urn:div:spend:(0x[0-9a-fA-F]{40}):([0-9]{1,78})", re.ASCII)
MAX_TEXT = 4096
"""Characters of a path or id in a receipt: far above what a node takes."""


def bound_to(node: Address, vault: Address) -> tuple[str, str]:
    """The resources by which a text is for this node and this vault."""
    return f"{OURS}node:{node}", f"{OURS}vault:{vault}"


def resources_of(node: Address, vault: Address, allowances: Mapping[Address, Usdc]) -> tuple[str, ...]:
    """All resources of a text for this node and vault, by which its session may spend so much of each token."""
    return (*bound_to(node, vault), *(f"{OURS}spend:{token}:{most.atomic}" for token, most in allowances.items()))


def statement(allowances: Mapping[Address, Usdc]) -> str:
    """The sentence for people in a text that allows this."""
    said = "Use the models of this node in my name"
    sums = " and ".join(f"{most} of the token {token}" for token, most in allowances.items())
    return f"{said}, and spend at most {sums}." if sums else f"{said}, without spending anything."


def allowances_of(resources: Iterable[str]) -> dict[Address, Usdc]:
    """What resources allow a session to spend, by token. Raises SignatureInvalid: malformed, or a token twice."""
    found: dict[Address, Usdc] = {}
    for resource in resources:
        if not resource.startswith(f"{OURS}spend:"):
            continue
        match = _SPEND.fullmatch(resource)
        try:
            token, most = Address.parse(match[1] if match else ""), Usdc.parse_atomic(match[2] if match else "")
        except (SignatureInvalid, BadRequest):
            raise refusal("bad_message", f"a sum to spend is {OURS}spend:<token>:<atomic units>") from None
        if token in found:
            raise refusal("bad_message", "the text allows a token twice")
        found[token] = most
    return found


@dataclass(frozen=True, slots=True)
class SessionCall:
    """One call of a session."""

    body_hash: Digest
    login: Digest
    method: str
    path: str
    request_id: str

    @classmethod
    def parse(cls, members: Any) -> Self:
        """From `members`; others beside them are left alone. Raises BadRequest that names the member."""
        if not isinstance(members, dict):
            raise BadRequest("a session's call is a JSON object", field="request")
        texts = {name: members.get(name) for name in ("method", "path", "request_id")}
        for name, text in texts.items():
            if not isinstance(text, str) or len(text) > MAX_TEXT:
                raise BadRequest(f"{name} is text", field=name)
        return cls(_digest(members, "body_hash"), _digest(members, "login"), **texts)  # type: ignore[arg-type]

    def members(self) -> dict[str, str]:
        """What the digest covers."""
        return {
            "body_hash": str(self.body_hash),
            "login": str(self.login),
            "method": self.method,
            "path": self.path,
            "request_id": self.request_id,
        }

    @property
    def digest(self) -> Digest:
        """The request's id. Raises BadRequest for text that has no UTF-8."""
        return Digest.keccak(canonical(self.members()))


def _digest(members: dict[str, Any], name: str) -> Digest:
    try:
        return Digest.parse(members.get(name, ""))
    except BadRequest as err:
        raise BadRequest(err.detail, field=name) from err
