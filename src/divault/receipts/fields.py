"""`InferenceReceipt` as an EIP-712 struct, and how each of its hashes is computed.

The struct has 19 fields, in the domain `DIV Receipt`, version 1, of the chain and the vault. Unknown or not reached is
zero. `receipt_hash` is the EIP-712 digest; it never covers the signature.

>>> str(RECEIPT.type_hash)
'0xb7037dbb797dbc3d3570c1ecc798be806fa93eba4949ca93d4474ef7c5657a55'
>>> str(text_hash("bafybeigdyrzt5sfp7udm7hu76uh7y26nf3efuylqabf3oclgtqy55fbzdi"))
'0x27bdcde325b1f75f418259cc6e8eb0c3a6aab6fb11319979b433d47d0c585752'
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

from divault.messages import Domain, Struct, canonical
from divault.values import Address, Digest, ReceiptStatus

RECEIPT = Struct(
    "InferenceReceipt",
    "address node,address user,bytes32 requestHash,bytes32 modelId,bytes32 cidHash,bytes32 vaultBlock,"
    "bytes32 plaintextHash,bytes32 runtimeHash,bytes32 inputHash,bytes32 outputHash,uint256 price,address token,"
    "address payer,bytes32 paymentRef,uint8 status,uint64 startedAt,uint64 finishedAt,uint64 sequence,"
    "bytes32 prevReceiptHash",
)
FIELDS = tuple(name for name, _ in RECEIPT.fields)
"""The 19 names, in the struct's order."""
CHARGED = (ReceiptStatus.OK, ReceiptStatus.PARTIAL)
"""Outcomes that may carry a price."""
BY_CONTRACT = "contract"
"""`request_signer` of a request that the user's contract accepted, and no key signed (ERC-1271)."""
DOMAIN_NAME, DOMAIN_VERSION = "DIV Receipt", "1"


def receipt_domain(chain_id: int, vault: Address) -> Domain:
    """The domain of receipts for models of `vault`."""
    return Domain(DOMAIN_NAME, DOMAIN_VERSION, chain_id, vault)


@lru_cache(maxsize=1024)  # CIDs, mostly
def text_hash(text: str) -> Digest:
    """keccak256 of the UTF-8 of a CID or payment key, exactly as it is written."""
    return Digest.keccak(text.encode())


def runtime_hash(runtime: dict[str, Any]) -> Digest:
    """sha256 of the RFC 8785 form of the runtime object. Raises BadRequest where it has none."""
    return Digest(hashlib.sha256(canonical(runtime)).digest())


def input_bytes(input_data: bytes, parameters: bytes | None) -> bytes:
    """What `inputHash` covers: the value of `input_data` as its bytes stood in the body, and of `parameters` if any."""
    return input_data if parameters is None else input_data + b"\0" + parameters


def input_hash(salt: bytes, covered: bytes) -> Digest:
    """sha256 of the salted input; `covered` as `input_bytes` gives it."""
    return _salted(b"divault/input/v1\0", salt, covered)


def output_hash(salt: bytes, result: bytes) -> Digest:
    """sha256 of the salted answer; `result` is the JSON value exactly as it stands in the answer's body."""
    return _salted(b"divault/output/v1\0", salt, result)


def _salted(prefix: bytes, salt: bytes, covered: bytes) -> Digest:
    return Digest(hashlib.sha256(prefix + salt + covered).digest())
