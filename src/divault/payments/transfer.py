"""Whether a plain token transfer, claimed by its hash, pays for a call: the judgement, and the reads it stands on.

Rules, in this order; the first one that fails names the reason:

1. the hash is `0x` and 64 lower-case hex digits, else reject `bad_tx_hash`;
2. the token is one that this node serves: `unsupported_token`;
3. our endpoint has a receipt, else pending `tx_not_found`;
4. the transaction is of our chain: `wrong_chain`;
5. the receipt's block is the one at that height now: `not_canonical`;
6. it succeeded: `tx_failed`;
7. any log is a Transfer: `no_transfer`;
8. one of those is by the token, with three topics and 32 bytes: `wrong_token`;
9. one goes to the owner: `recipient_mismatch`;
10. one comes from the payer who signed the request: `payer_mismatch` (who sent the transaction doesn't matter);
11. one was not credited before: `already_spent`;
12. what is left adds up to the price: `amount_too_low`;
13. the block is young enough: `payment_too_old`;
14. it has its confirmations, else pending `not_enough_confirmations`;
15. the calldata ends with keccak256(node || payer): `not_bound_to_node`. A transfer names no node, so without this one
    transaction could be claimed at several. It isn't asked for where the owner is served by this node alone.

An accepted claim is worth the whole sum of the logs that rule 11 left; each of them is spent with it, for ever.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from divault.chain.records import Log, Transaction, TransactionReceipt
from divault.values import UINT256_MAX, Address, BlockRef, Digest, Usdc

_HASH = re.compile(r"0x[0-9a-f]{64}", re.ASCII)
TRANSFER_TOPIC = Digest(bytes.fromhex("ddf252ad1be2c89b69c2b068fc378daa952ba7f163c4a11628f55a4df523b3ef"))
"""keccak256 of `Transfer(address,address,uint256)`."""

_MAY_CHANGE = frozenset({"tx_not_found", "not_enough_confirmations"})


class Verdict(StrEnum):
    """What becomes of a claim. PENDING may become either of the others."""

    ACCEPT = "accept"
    REJECT = "reject"
    PENDING = "pending"


@dataclass(frozen=True, slots=True)
class Terms:
    """What the operator asks of every claimed transfer."""

    tokens: frozenset[Address]
    """Payment tokens that this node serves."""
    confirmations: int = 1
    """Blocks on the transfer, its own included."""
    max_age_s: int = 86_400


@dataclass(frozen=True, slots=True)
class Claim:
    """A transfer that `payer` says he made to `owner`."""

    tx_hash: str
    chain_id: int
    token: Address
    payer: Address
    owner: Address
    price: Usdc
    """The least that it has to bring."""
    binding: Digest | None = None
    """What the calldata must end with; None: any."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What our own endpoint says; nothing in it comes from the caller."""

    transaction: Transaction | None
    receipt: TransactionReceipt | None
    block: BlockRef | None
    """The canonical block at the receipt's height, now."""
    head: int
    """Number of the newest block."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on a claim. `logs` are those that it spends, `credit` their sum; both empty unless accepted."""

    verdict: Verdict
    reason: str | None = None
    logs: tuple[Log, ...] = ()

    @property
    def credit(self) -> Usdc:
        """The whole sum of the logs."""
        return Usdc(_sum(self.logs))


class TransferSource(Protocol):
    """The reads that judging needs; `divault.chain.Chain` has them."""

    async def transaction(self, tx: Digest) -> Transaction | None:
        """The transaction, None if unknown."""

    async def receipt(self, tx: Digest) -> TransactionReceipt | None:
        """Its receipt, None while not mined."""

    async def block_by_number(self, which: int) -> BlockRef | None:
        """The canonical block at this height."""

    async def head(self) -> BlockRef:
        """The newest block."""


def binding_of(node: Address, payer: Address) -> Digest:
    """The 32 bytes that a transfer's calldata ends with, so that it counts at this node alone."""
    return Digest.keccak(node.raw + payer.raw)


def parse_hash(text: str) -> Digest | None:
    """The transaction hash by rule 1, None for any other text."""
    return Digest(bytes.fromhex(text[2:])) if _HASH.fullmatch(text) else None


def precheck(claim: Claim, terms: Terms) -> Judgement | None:
    """Rules 1 and 2, which need no chain; None when they hold."""
    if parse_hash(claim.tx_hash) is None:
        return _judgement("bad_tx_hash")
    return None if claim.token in terms.tokens else _judgement("unsupported_token")


def judge(claim: Claim, terms: Terms, evidence: Evidence, *, spent: Collection[int], now: int) -> Judgement:
    """All rules in their order. `spent`: indexes of this transaction's logs that were credited before; pure."""
    if (early := precheck(claim, terms)) is not None:
        return early
    receipt, block = evidence.receipt, evidence.block
    if evidence.transaction is None or receipt is None:
        return _judgement("tx_not_found")
    # None: signed before EIP-155; the receipt of our own chain proves that it happened here.
    if evidence.transaction.chain_id not in (None, claim.chain_id):
        return _judgement("wrong_chain")
    if block is None or block.hash != receipt.block_hash:
        return _judgement("not_canonical")
    if not receipt.succeeded:
        return _judgement("tx_failed")
    logs, reason = _matching(claim, receipt.logs, spent)
    return _judgement(
        reason or _age(terms, block, evidence.head, now) or _binding(claim, evidence.transaction.data), logs
    )


def _matching(claim: Claim, logs: tuple[Log, ...], spent: Collection[int]) -> tuple[tuple[Log, ...], str | None]:
    """Rules 7 to 12: the logs that count, and the reason why they don't pay."""
    sieves: tuple[tuple[str, Callable[[Log], bool]], ...] = (
        ("no_transfer", lambda log: log.topics[:1] == (TRANSFER_TOPIC,)),
        ("wrong_token", lambda log: log.address == claim.token and len(log.topics) == 3 and len(log.data) == 32),
        ("recipient_mismatch", lambda log: log.topics[2].raw == _as_topic(claim.owner)),
        ("payer_mismatch", lambda log: log.topics[1].raw == _as_topic(claim.payer)),
        ("already_spent", lambda log: log.index not in spent),
    )
    for reason, passes in sieves:
        logs = tuple(log for log in logs if passes(log))
        if not logs:
            return (), reason
    total = _sum(logs)
    if total > UINT256_MAX:  # no honest token moves more than it can count
        return (), "wrong_token"
    return (logs, None) if total >= claim.price.atomic else ((), "amount_too_low")


def _age(terms: Terms, block: BlockRef, head: int, now: int) -> str | None:
    """Rules 13 and 14."""
    if now - block.timestamp > terms.max_age_s:
        return "payment_too_old"
    return None if head - block.number + 1 >= terms.confirmations else "not_enough_confirmations"


def _binding(claim: Claim, calldata: bytes) -> str | None:
    """Rule 15."""
    bound = claim.binding is None or calldata.endswith(claim.binding.raw)
    return None if bound else "not_bound_to_node"


async def gather_evidence(source: TransferSource, tx: Digest) -> Evidence:
    """Ask the endpoint. Raises ChainUnavailable, ChainStale."""
    transaction, receipt = await asyncio.gather(source.transaction(tx), source.receipt(tx))
    if receipt is None:
        return Evidence(transaction, None, None, 0)
    block = await source.block_by_number(receipt.block_number)
    head = await source.head()
    # A head that was read a moment before the block is behind it: the block itself proves that the chain got there.
    return Evidence(transaction, receipt, block, max(head.number, block.number if block is not None else 0))


def _judgement(reason: str | None, logs: tuple[Log, ...] = ()) -> Judgement:
    if reason is None:
        return Judgement(Verdict.ACCEPT, None, logs)
    return Judgement(Verdict.PENDING if reason in _MAY_CHANGE else Verdict.REJECT, reason)


def _as_topic(address: Address) -> bytes:
    return bytes(12) + address.raw


def _sum(logs: Collection[Log]) -> int:
    return sum(int.from_bytes(log.data, "big") for log in logs)
