"""What a ledger keeps of a receipt: 0.7 kB of what is 2.2 kB as JSON, and the same envelope again when it is read.

Neither the private part nor sums, which can be made again; nor the runtime object, which thousands of receipts have in
common: it is kept once, by its hash.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import orjson

from divault.receipts.checksums import PRIVATE, checksums, checksums_without
from divault.receipts.fields import DOMAIN_NAME, DOMAIN_VERSION, FIELDS, RECEIPT
from divault.values import Address, Digest

_SIZES = {"address": 20, "bytes32": 32}
_FIXED = [(name, _SIZES[kind]) for name, kind in RECEIPT.fields if kind in _SIZES]
_NUMBERS = [name for name, kind in RECEIPT.fields if kind not in _SIZES]
_JSON = b"{"
"""How receipts of earlier versions begin: whole envelopes."""


class _Kept(msgspec.Struct, array_like=True, frozen=True):
    fixed: bytes
    """Addresses and hashes in the struct's order, then the vault, the receipt's hash and its signature."""
    numbers: list[str]
    chain_id: int
    cid: str | None
    vault_block_number: int | None
    runtime: bool
    payment_key: str | None
    request_signer: str | None
    code: str | None
    log: dict[str, Any] | None
    attestation: dict[str, Any] | None


_read = msgspec.msgpack.Decoder(_Kept)
_write = msgspec.msgpack.Encoder()


def to_keep(envelope: dict[str, Any]) -> bytes:
    """What is kept of an envelope, beside its runtime object."""
    receipt, domain = envelope["receipt"], envelope["domain"]
    texts = [receipt[name] for name, _ in _FIXED]
    texts += (domain["verifyingContract"], envelope["receipt_hash"], envelope["signature"])
    kept = _Kept(
        bytes.fromhex("".join([text[2:] for text in texts])),
        [receipt[name] for name in _NUMBERS],
        domain["chainId"],
        envelope["cid"],
        envelope["vault_block_number"],
        envelope["runtime"] is not None,
        envelope["payment_key"],
        envelope["request_signer"],
        envelope["code"],
        envelope["log"],
        envelope["attestation"],
    )
    return _write.encode(kept)


def from_kept(raw: bytes, runtime_of: Callable[[Digest], dict[str, Any]]) -> dict[str, Any]:
    """The same as `redact` gives, from what was kept; `runtime_of` knows runtime objects by their hash."""
    if raw.startswith(_JSON):
        public: dict[str, Any] = orjson.loads(raw)
    else:
        public = _envelope(_read.decode(raw), runtime_of)
    public["checksums"] = checksums_without(PRIVATE, checksums(public))
    return public


def _envelope(kept: _Kept, runtime_of: Callable[[Digest], dict[str, Any]]) -> dict[str, Any]:
    place, fields = 0, dict(zip(_NUMBERS, kept.numbers, strict=True))
    for name, size in _FIXED:
        fields[name] = _text(kept.fixed[place : place + size])
        place += size
    vault, hashed, signature = (
        kept.fixed[place : place + 20],
        kept.fixed[place + 20 : place + 52],
        kept.fixed[place + 52 :],
    )
    return {
        "type": RECEIPT.name,
        "version": 1,
        "domain": {
            "name": DOMAIN_NAME,
            "version": DOMAIN_VERSION,
            "chainId": kept.chain_id,
            "verifyingContract": _text(vault),
        },
        "receipt": {name: fields[name] for name in FIELDS},
        "receipt_hash": _text(hashed),
        "signature": "0x" + signature.hex(),
        "cid": kept.cid,
        "vault_block_number": kept.vault_block_number,
        "runtime": runtime_of(Digest.parse(fields["runtimeHash"])) if kept.runtime else None,
        "payment_key": kept.payment_key,
        "request": None,
        "request_signature": None,
        "request_signer": kept.request_signer,
        "input_salt": None,
        "output_salt": None,
        "code": kept.code,
        "log": kept.log,
        "attestation": kept.attestation,
    }


def _text(raw: bytes) -> str:
    return str(Address(raw)) if len(raw) == 20 else str(Digest(raw))
