"""CRC-32 sums that say *which* member of an envelope was changed, once something else has shown that one was.

A hash over 19 fields can't tell which of them is wrong, so the envelope carries one sum per member. Sums prove nothing,
and nothing is believed because a sum fits: whether a receipt holds is decided by its hash, its signature and the hashes
of what is disclosed. Sums of private members go when those go, since a sum of a guessable value gives it away.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any
from zlib import crc32

from divault.errors import BadRequest
from divault.messages import canonical

PRIVATE = ("request", "request_signature", "input_salt", "output_salt")
"""The members that only the user who signed gets; the unsalted hash of the body in `request` would undo the salts."""
_NOTHING = f"{crc32(b'null'):08x}"
_GROUPS = ("domain", "receipt", "request")
_SINGLE = (
    "receipt_hash",
    "signature",
    "cid",
    "vault_block_number",
    "runtime",
    "payment_key",
    "request_signature",
    "input_salt",
    "output_salt",
    "code",
    "log",
    "attestation",
)


def checksums(envelope: Mapping[str, Any]) -> dict[str, str]:
    """One sum per member: 8 hex digits by name, the struct's fields by their bare names. Raises BadRequest."""
    sums = {}
    for name, value in _leaves(envelope):
        sums[name] = f"{crc32(value.encode()):08x}" if type(value) is str and value.isascii() else _sum(value)
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
    for group in _GROUPS:
        members = envelope.get(group)
        prefix = "" if group == "receipt" else f"{group}."
        if isinstance(members, dict):
            for name, value in members.items():
                yield prefix + name, value
    for name in _SINGLE:
        yield name, envelope.get(name)


def _sum(value: Any) -> str:
    if value is None:
        return _NOTHING
    try:
        raw = value.encode() if isinstance(value, str) else canonical(value)
    except UnicodeEncodeError as err:
        raise BadRequest("a member is not valid Unicode") from err
    return f"{crc32(raw):08x}"
