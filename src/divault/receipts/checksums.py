"""CRC-32 sums that say *which* member of an envelope was changed, once something else has shown that one was.

A hash over 19 fields can't tell which of them is wrong, so the envelope carries one sum per member. Sums prove nothing,
and nothing is believed because a sum fits: whether a receipt holds is decided by its hash, its signature and the hashes
of what is disclosed. Sums of private members go when those go, since a sum of a guessable value gives it away.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from types import MappingProxyType
from typing import Any
from zlib import crc32

from divault.errors import BadRequest
from divault.messages import canonical

PRIVATE = ("request", "request_signature", "input_salt", "output_salt")
"""The members that only the user who signed gets; the unsalted hash of the body in `request` would undo the salts."""
_SAFE = 2**53
_NOTHING = crc32(b"null").to_bytes(4, "big").hex()
_GROUPS = (("domain", "domain."), ("receipt", ""), ("request", "request."))
"""Members with members of their own, and what stands before their names."""
_UNKNOWN: Mapping[str, str] = MappingProxyType({})
_SINGLE = (
    "receipt_hash",
    "signature",
    "cid",
    "vault_block_number",
    "runtime",
    "payment_key",
    "request_signature",
    "request_signer",
    "input_salt",
    "output_salt",
    "code",
    "log",
    "attestation",
)


def sum_of(raw: bytes) -> str:
    """The sum of a member's bytes: text as UTF-8, all else in its RFC 8785 form."""
    return crc32(raw).to_bytes(4, "big").hex()


def checksums(envelope: Mapping[str, Any], known: Mapping[str, str] = _UNKNOWN) -> dict[str, str]:
    """One sum per member: 8 hex digits by name, the struct's fields by their bare names. Raises BadRequest.

    `known`: sums of members beside the struct that are there already.
    """
    sums: dict[str, str] = {}
    for group, prefix in _GROUPS:
        members = envelope.get(group)
        if isinstance(members, dict):
            for name, value in members.items():
                # the same as `_sum` does, which costs half as much again to call
                quick = type(value) is str and value.isascii()
                sums[prefix + name] = crc32(value.encode()).to_bytes(4, "big").hex() if quick else _sum(value)
    for name in _SINGLE:
        sums[name] = known[name] if name in known else _sum(envelope.get(name))
    return sums


def checksums_without(members: Container[str], sums: Mapping[str, str]) -> dict[str, str]:
    """The sums but for those of these members."""
    return {name: value for name, value in sums.items() if str(name).split(".")[0] not in members}


def mismatches(envelope: Mapping[str, Any]) -> Iterator[str]:
    """Names of members that do not fit their sums, in the envelope's order; none when it carries no sums."""
    sums = envelope.get("checksums") or {}
    for name, value in _leaves(envelope):
        try:
            if name in sums and sums[name] != _sum(value):
                yield name
        except BadRequest:  # a value without canonical form was never issued
            yield name


def _leaves(envelope: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for group, prefix in _GROUPS:
        members = envelope.get(group)
        if isinstance(members, dict):
            for name, value in members.items():
                yield prefix + name, value
    for name in _SINGLE:
        yield name, envelope.get(name)


def _sum(value: Any) -> str:
    if value is None:
        return _NOTHING
    if type(value) is int and abs(value) < _SAFE:
        return sum_of(b"%d" % value)
    try:
        return sum_of(value.encode() if isinstance(value, str) else canonical(value))
    except UnicodeEncodeError as err:
        raise BadRequest("a member is not valid Unicode") from err
