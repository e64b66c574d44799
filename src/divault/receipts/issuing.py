"""Making receipts: the only module that constructs `values.Receipt`.

Pure but for the salts, which come from the system's CSPRNG. Sequence numbers, the chain of hashes and durability are
the ledger's; a receipt whose transaction failed is never sent.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from msgspec import Struct

from divault.messages import Domain, SigningKey, address_of, canonical
from divault.messages.typed import Value
from divault.receipts.checksums import checksums, sum_of
from divault.receipts.fields import (
    BY_CONTRACT,
    CHARGED,
    RECEIPT,
    input_bytes,
    input_hash,
    output_hash,
    receipt_domain,
    runtime_hash,
    text_hash,
)
from divault.values import Address, Digest, Grant, ModelId, Output, Principal, Receipt, ReceiptStatus, Secret, Usdc

_NOTHING = Usdc(0)
_MOST_RUNTIMES = 256  # remembered; more than that many models are not loaded at once


class ReceiptDraft(Struct, frozen=True):
    """What is known of an outcome; leave out what was not reached."""

    principal: Principal
    model: ModelId
    status: ReceiptStatus
    finished_at: int
    """Unix seconds; `startedAt` is the principal's `received_at`."""
    grant: Grant | None = None
    """Gives the CID and the block."""
    output: Output | None = None
    """Gives plaintext hash, runtime and result."""
    plaintext: Digest | None = None
    """sha256 of the opened model, where there is no output."""
    runtime: dict[str, Any] | None = None
    """The runtime object, where there is no output."""
    input_data: bytes | None = None
    parameters: bytes | None = None
    price: Usdc = _NOTHING
    """What was charged; 0 unless the status is ok or partial."""
    token: Address = Address.ZERO
    payer: Address = Address.ZERO
    payment_key: str | None = None
    code: str | None = None
    """The error's code, for refusals and failures."""

    def __post_init__(self) -> None:
        if self.price.atomic and self.status not in CHARGED:
            raise ValueError("only answers that were delivered are charged")
        if self.status in CHARGED and self.output is None:
            raise ValueError("a receipt for an answer needs the answer")


class _Runtime(Struct, frozen=True):
    """A runtime object, and what a receipt says of it."""

    members: dict[str, Any]
    hash: Digest
    checksum: str


class _Salts(Struct, frozen=True):
    input: bytes | None
    output: bytes | None


class ReceiptIssuer:
    """One node's hand: signs receipts for one vault on one chain. Safe to call from any one thread at a time."""

    def __init__(
        self,
        key: Secret,
        chain_id: int,
        vault: Address,
        *,
        entropy: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        """`entropy(n)` gives n random bytes; anything but the CSPRNG is for known answers in tests."""
        self.node = address_of(key)
        self.domain: Domain = receipt_domain(chain_id, vault)
        self._signer = SigningKey(key)
        self._entropy = entropy
        self._runtimes: dict[Digest, _Runtime] = {}
        """What the receipts of a model say again and again, by the hash of its plaintext."""

    def issue(self, draft: ReceiptDraft, sequence: int, previous: Digest) -> Receipt:
        """The signed receipt with this place in the chain: `previous` is the hash of sequence - 1, zero for 0.

        Raises ValueError where the two contradict each other, BadRequest for a runtime object without canonical form.
        """
        if (previous == Digest.ZERO) != (sequence == 0):
            raise ValueError("the first receipt, and only it, has no predecessor")
        random = self._entropy(64)
        salts = _Salts(
            None if draft.input_data is None else random[:32],
            None if draft.output is None else random[32:],
        )
        runtime = self._runtime(draft)
        values = self._values(draft, salts, runtime) | {"sequence": sequence, "prevReceiptHash": previous}
        digest = self.domain.digest(RECEIPT.hash(values))
        envelope = {
            "type": RECEIPT.name,
            "version": 1,
            "domain": self.domain.to_json(),
            "receipt": RECEIPT.to_json(values),
            "receipt_hash": str(digest),
            "signature": self._signer.text(digest),
            **_disclosed(draft, salts, runtime),
        }
        envelope["checksums"] = checksums(envelope, {} if runtime is None else {"runtime": runtime.checksum})
        return Receipt(envelope, digest, sequence, draft.status)

    def _values(self, draft: ReceiptDraft, salts: _Salts, runtime: _Runtime | None) -> dict[str, Value]:
        principal, grant = draft.principal, draft.grant
        plaintext = _plaintext(draft)
        return {
            "node": self.node,
            "user": principal.user,
            "requestHash": principal.request,
            "modelId": draft.model.key,
            "cidHash": text_hash(grant.model.cid) if grant else Digest.ZERO,
            "vaultBlock": grant.block.hash if grant else Digest.ZERO,
            "plaintextHash": plaintext or Digest.ZERO,
            "runtimeHash": runtime.hash if runtime is not None else Digest.ZERO,
            "inputHash": _input_hash(draft, salts),
            "outputHash": output_hash(salts.output, draft.output.result)
            if draft.output and salts.output
            else Digest.ZERO,
            "price": draft.price.atomic,
            "token": draft.token,
            "payer": draft.payer,
            "paymentRef": text_hash(draft.payment_key) if draft.payment_key is not None else Digest.ZERO,
            "status": int(draft.status),
            "startedAt": principal.received_at,
            # a clock that was set back meanwhile must not make an invalid receipt
            "finishedAt": max(draft.finished_at, principal.received_at),
        }

    def _runtime(self, draft: ReceiptDraft) -> _Runtime | None:
        members, plaintext = _runtime(draft), _plaintext(draft) or Digest.ZERO
        if members is None:
            return None
        found = self._runtimes.get(plaintext)
        if found is None or found.members != members:
            found = _Runtime(deepcopy(members), runtime_hash(members), sum_of(canonical(members)))
            if len(self._runtimes) >= _MOST_RUNTIMES:
                self._runtimes.clear()
            self._runtimes[plaintext] = found
        return found


def reopen(envelope: dict[str, Any]) -> Receipt:
    """A receipt that this node issued and stored, out of its envelope. Nothing is checked: that is `check`'s."""
    receipt = envelope["receipt"]
    hashed = Digest.parse(envelope["receipt_hash"])
    return Receipt(envelope, hashed, int(receipt["sequence"]), ReceiptStatus(int(receipt["status"])))


def _runtime(draft: ReceiptDraft) -> dict[str, Any] | None:
    return draft.output.runtime if draft.output else draft.runtime


def _plaintext(draft: ReceiptDraft) -> Digest | None:
    return draft.output.plaintext_sha256 if draft.output else draft.plaintext


def _input_hash(draft: ReceiptDraft, salts: _Salts) -> Digest:
    if draft.input_data is None or salts.input is None:
        return Digest.ZERO
    return input_hash(salts.input, input_bytes(draft.input_data, draft.parameters))


def _disclosed(draft: ReceiptDraft, salts: _Salts, runtime: _Runtime | None) -> dict[str, Any]:
    """What lies beside the struct: values that its hashes name, and hints."""
    grant, principal = draft.grant, draft.principal
    return {
        "cid": grant.model.cid if grant else None,
        "vault_block_number": grant.block.number if grant else None,
        "runtime": None if runtime is None else runtime.members,  # what was hashed, to the last type
        "payment_key": draft.payment_key,
        "request": principal.typed_message,
        "request_signature": principal.signature,
        "request_signer": BY_CONTRACT if principal.by_contract else None,
        "input_salt": "0x" + salts.input.hex() if salts.input else None,
        "output_salt": "0x" + salts.output.hex() if salts.output else None,
        "code": draft.code,
        "log": None,
        "attestation": None,
    }
