"""Receipts: signed evidence of what a node says happened, made here, checked here, stored by others.

| module | what |
|---|---|
| `fields` | the EIP-712 struct and how each of its hashes is computed |
| `issuing` | `ReceiptDraft` -> `ReceiptIssuer.issue` -> `Receipt` |
| `answers` | the exact bytes of a result in an answer; reading and redacting envelopes |
| `checking` | `check`: named steps, offline; `require_valid` raises the first field that is wrong |
| `keeping` | what a ledger keeps of an envelope, and the envelope again |
| `checksums` | which member was changed, once a hash has shown that one was |

A receipt does not prove that the node computed honestly; it can't be denied later, and it names everything that a
second node needs to run the request again.
"""

from divault.receipts.answers import answer_body, read_receipt, redact, slice_result
from divault.receipts.checking import CheckStep, Outcome, check, require_valid
from divault.receipts.fields import FIELDS, RECEIPT, input_bytes, receipt_domain
from divault.receipts.issuing import ReceiptDraft, ReceiptIssuer, reopen
from divault.receipts.keeping import from_kept, to_keep

__all__ = [
    "FIELDS",
    "RECEIPT",
    "CheckStep",
    "Outcome",
    "ReceiptDraft",
    "ReceiptIssuer",
    "answer_body",
    "check",
    "from_kept",
    "input_bytes",
    "read_receipt",
    "receipt_domain",
    "redact",
    "reopen",
    "require_valid",
    "slice_result",
    "to_keep",
]
