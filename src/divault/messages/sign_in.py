"""EIP-4361, Sign-In with Ethereum: the text that a person signs once for a session.

Strict: one anchored expression, ASCII, LF, the order of the standard, nothing before or after, `Version: 1`, the
address in EIP-55 [`bad_message`]. Then, in this order, domain with port and scheme, origin of the URI, chain, nonce,
times, wallet and signature.

>>> from divault.values import Address
>>> text = compose(
...     Address.parse("0x" + "11" * 20), SignInContext("app.example", "https://app.example", 1, "abcdefgh", 0)
... )
>>> SignInMessage.parse(text).uri
'https://app.example/'
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self
from urllib.parse import urlsplit

from divault.errors import SignatureInvalid
from divault.messages.personal import personal_digest
from divault.messages.reasons import refusal
from divault.messages.windows import CLOCK_SKEW_S
from divault.values import Address, Digest

MAX_AGE_S = 3600
"""Oldest message, in seconds since it was issued, that still opens a session, whatever its expiry says."""
_MAX_LENGTH = 4096  # a message with a page of resources has 1500 characters

_TIME = r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?(?:Z|[+-][0-9]{2}:[0-9]{2})"
_URI = r"[A-Za-z][A-Za-z0-9+.-]*:[!-~]+"
_MESSAGE = re.compile(
    r"(?:(?P<scheme>[a-z][a-z0-9+.-]*)://)?(?P<domain>(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?)"
    r" wants you to sign in with your Ethereum account:\n"
    r"(?P<address>0x[0-9a-fA-F]{40})\n\n"
    r"(?:(?P<statement>[A-Za-z0-9:/?#\[\]@!$&'()*+,;=._~ -]+)\n)?\n"
    rf"URI: (?P<uri>{_URI})\n"
    r"Version: 1\n"
    r"Chain ID: (?P<chain_id>0|[1-9][0-9]{0,77})\n"
    r"Nonce: (?P<nonce>[A-Za-z0-9]{8,128})\n"
    rf"Issued At: (?P<issued_at>{_TIME})"
    rf"(?:\nExpiration Time: (?P<expires_at>{_TIME}))?"
    rf"(?:\nNot Before: (?P<not_before>{_TIME}))?"
    r"(?:\nRequest ID: (?P<request_id>[!-~]*))?"
    rf"(?:\nResources:(?P<resources>(?:\n- {_URI})*))?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class SignInContext:
    """What the node that asked for the message knows: its domain with port, its origin and chain, the nonce it gave."""

    domain: str
    origin: str
    chain_id: int
    nonce: str
    now: int
    max_age_s: int = MAX_AGE_S


@dataclass(frozen=True, slots=True)
class SignInMessage:
    """The parsed text; times in unix seconds."""

    text: str
    scheme: str | None
    domain: str
    address: Address
    uri: str
    chain_id: int
    nonce: str
    issued_at: float
    expires_at: float | None
    not_before: float | None
    resources: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """From exactly the text that was signed. Raises SignatureInvalid, reason `bad_message`."""
        match = _MESSAGE.fullmatch(text) if len(text) <= _MAX_LENGTH else None
        if match is None:
            raise refusal("bad_message", "this is not the exact text of an EIP-4361 message")
        expires_at, not_before = match["expires_at"], match["not_before"]
        return cls(
            text=text,
            scheme=match["scheme"],
            domain=match["domain"],
            address=_checksummed(match["address"]),
            uri=match["uri"],
            chain_id=int(match["chain_id"]),
            nonce=match["nonce"],
            issued_at=_seconds(match["issued_at"]),
            expires_at=None if expires_at is None else _seconds(expires_at),
            not_before=None if not_before is None else _seconds(not_before),
            resources=tuple(line.removeprefix("- ") for line in (match["resources"] or "").splitlines() if line),
        )

    @property
    def digest(self) -> Digest:
        """The EIP-191 digest: what the wallet signed, and the login's id."""
        return personal_digest(self.text)

    def check(self, context: SignInContext) -> None:
        """Return only if the message was asked for by this node, now; raises what stands for the reason."""
        scheme = urlsplit(context.origin).scheme
        if self.domain != context.domain or self.scheme not in (None, scheme):
            raise refusal("wrong_domain", f"the message signs in to another domain than {context.domain}")
        if _origin(self.uri) != context.origin:
            raise refusal("wrong_uri", f"the URI of the message is not of {context.origin}")
        if self.chain_id != context.chain_id:
            raise refusal("wrong_chain", f"this node serves chain {context.chain_id}", chain_id=context.chain_id)
        if self.nonce != context.nonce:
            raise refusal("wrong_nonce", "the nonce is not the one that was given out: ask for a new one")
        self._check_times(context.now, context.max_age_s)

    def _check_times(self, now: int, max_age_s: int) -> None:
        if self.issued_at > now + CLOCK_SKEW_S:
            raise refusal("issued_in_future", "the message is issued in the future: check your clock", now=now)
        if self.expires_at is not None and now >= self.expires_at:
            raise refusal("expired", "the message has expired: sign in again", now=now)
        if self.not_before is not None and now < self.not_before:
            raise refusal("not_yet_valid", "the message counts only later", now=now)
        if now - self.issued_at > max_age_s:
            raise refusal("too_old", f"the message is older than {max_age_s} s: sign in again", now=now)


def compose(
    user: Address, context: SignInContext, *, statement: str = "", resources: Sequence[str] = (), expires_at: int = 0
) -> str:
    """The text for `user` to sign, which `SignInContext.now` dates; `expires_at` 0: it names no expiry."""
    lines = [
        f"{context.domain} wants you to sign in with your Ethereum account:",
        str(user),
        "",
        *([statement] if statement else []),
        "",
        f"URI: {context.origin}/",
        "Version: 1",
        f"Chain ID: {context.chain_id}",
        f"Nonce: {context.nonce}",
        f"Issued At: {time_text(context.now)}",
        *([f"Expiration Time: {time_text(expires_at)}"] if expires_at else []),
        *(["Resources:", *(f"- {resource}" for resource in resources)] if resources else []),
    ]
    return "\n".join(lines)


def _checksummed(text: str) -> Address:
    try:
        address = Address.parse(text)
    except SignatureInvalid as err:
        raise refusal("bad_message", "the address in the message is not in EIP-55 spelling") from err
    if str(address) != text:
        raise refusal("bad_message", "the address in the message is not in EIP-55 spelling")
    return address


def _seconds(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError) as err:
        raise refusal("bad_message", "a time in the message does not exist") from err


def time_text(seconds: int) -> str:
    """Unix seconds as the text has them (RFC 3339, UTC)."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _origin(uri: str) -> str:
    try:
        parts = urlsplit(uri)
    except ValueError:
        return ""
    return f"{parts.scheme}://{parts.netloc}"
