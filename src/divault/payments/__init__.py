"""The ledger, and the ways to pay: straight from consumer to owner, never through the node.

| module | what |
|---|---|
| `stages` | the life of a signed request as one table |
| `books` | the ledger's rows |
| `ledger` | `Ledger`: nonces, reservations, charges, receipts, kept answers |
| `transfer` | whether a plain token transfer pays for a call; pure |
| `methods` | `PaymentMethod`, `FreeRun`, `TransferCredit`, and `Payments` that chooses |
"""

from divault.payments.books import Account
from divault.payments.ledger import Ledger, Wording
from divault.payments.methods import FreeRun, PaymentMethod, Payments, TransferCredit
from divault.payments.transfer import Terms, TransferSource, binding_of

__all__ = [
    "Account",
    "FreeRun",
    "Ledger",
    "PaymentMethod",
    "Payments",
    "Terms",
    "TransferCredit",
    "TransferSource",
    "Wording",
    "binding_of",
]
