"""How a run is paid for: `FreeRun` for models without a price, `TransferCredit` for the others, `Payments` chooses.

Rules:

1. A `Hold` is given only after its reservation is on disk; `Ledger.outcome` around it ends what nobody charged.
2. No payment and not enough credit: the offer (402), whatever `max_price` says; nothing is used up. With a payment or
   credit to draw from, a price above the signed maximum is PriceChanged. A price above what is left of the sum that its
   wallet allowed a session is AllowanceExceeded before anything is offered: money sent for it could not be spent. That
   uses nothing up either: another call of the session may hold the rest for a moment only. Of a session's paid calls
   only those run that can be told from their copies.
3. A claimed transfer is judged by `transfer`; accepted, its whole sum becomes credit of (payer, owner, token) in the
   transaction that reserves the price. Together with credit that is there, it has to cover the price.
4. The same signed bytes may come again after a crash: the transfer that they claimed is credited already, so they run
   on that credit. Other bytes with the same transfer are `already_spent`: a claim must not draw a second price unseen.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

from divault.errors import (
    AllowanceExceeded,
    BadRequest,
    NotReady,
    PaymentError,
    PaymentPending,
    PaymentRejected,
    PaymentRequired,
    PriceChanged,
)
from divault.payments.books import Account, AllowanceTooLow, AlreadySpent, CreditTooLow, Incoming
from divault.payments.ledger import Ledger, Standing
from divault.payments.transfer import (
    Claim,
    Judgement,
    Terms,
    TransferSource,
    Verdict,
    binding_of,
    gather_evidence,
    judge,
    parse_hash,
    precheck,
)
from divault.values import Address, Digest, Grant, Hold, SignedCall, Usdc

_FREE = Usdc(0)
_PENDING_RETRY_S = 2  # a block time of the chains that USDC calls home
_ADVICE = {
    "already_spent": "this transfer is credited already: send the request without `payment`, or ask for its result",
    "not_bound_to_node": "append `binding` (32 bytes) to the transfer's calldata: then it counts at this node alone",
    "payment_too_old": "this transfer is too old to be claimed",
    "amount_too_low": "this transfer and the credit at hand don't cover the price",
}


class PaymentMethod(Protocol):
    """One way to pay. An implementation reserves through the `Ledger`, which keeps every amount and every promise."""

    def hold(self, grant: Grant, call: SignedCall) -> AbstractAsyncContextManager[Hold]:
        """A context in which the run is reserved and paid for, inside `Ledger.outcome`.

        Raises NonceUsed, RequestRunning and what the method says.
        """


class FreeRun:
    """Models without a price: the nonce is reserved, and that is all."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def hold(self, grant: Grant, call: SignedCall) -> AbstractAsyncContextManager[Hold]:  # noqa: ARG002 - the seam's
        """A context in which the run is reserved. It raises NonceUsed."""
        if grant.model.price.atomic:
            raise ValueError("a model with a price is not free")
        return _Reserved(self._ledger, grant)


class _Reserved:
    """A free run; what it reserved ends with `Ledger.outcome`."""

    __slots__ = ("_grant", "_ledger")

    def __init__(self, ledger: Ledger, grant: Grant) -> None:
        self._ledger = ledger
        self._grant = grant

    async def __aenter__(self) -> Hold:
        return await self._ledger.reserve(self._grant, _FREE)

    async def __aexit__(self, *_: object) -> None:
        pass


class TransferCredit:
    """Prepaid credit, filled by plain token transfers that are claimed by their hash."""

    def __init__(
        self,
        ledger: Ledger,
        source: TransferSource,
        terms: Terms,
        *,
        sole_node_for: Collection[Address] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`sole_node_for`: owners whose transfers need not name this node, since no other node serves them."""
        self._ledger = ledger
        self._source = source
        self._terms = terms
        self._sole_node_for = frozenset(sole_node_for)
        self._clock = clock

    @asynccontextmanager
    async def hold(self, grant: Grant, call: SignedCall) -> AsyncIterator[Hold]:
        """The run and its price, reserved.

        Raises PaymentRequired, PaymentRejected, PaymentPending, PriceChanged, AllowanceExceeded, NonceUsed,
        RequestRunning, BadRequest and ChainUnavailable.
        """
        account = Account(self._ledger.chain_id, grant.model.payment_token, grant.principal.user, grant.model.owner)
        tx = parse_hash(call.payment.tx_hash) if call.payment is not None else None
        key = f"transfer:{account.chain_id}:{tx}" if tx is not None else None
        standing = await self._ledger.standing(grant, account, tx, key)
        self._check_means(grant, call, standing)
        incoming = await self._incoming(grant, call, standing)
        try:
            held = await self._ledger.reserve(grant, grant.model.price, account, incoming)
        except AlreadySpent:  # by a call that overtook this one
            raise self._rejected(grant, call, "already_spent") from None
        except CreditTooLow as err:
            raise self._too_low(grant, call, held=err.held) from None
        except AllowanceTooLow as err:  # another call of the session was faster
            raise _above_allowance(grant, err.left) from None
        yield held

    def offer(self, grant: Grant, call: SignedCall) -> dict[str, Any]:
        """How this call can be paid for: the data of a 402."""
        model = grant.model
        served = model.payment_token in self._terms.tokens
        return {
            "price": str(model.price.atomic),
            "price_usdc": str(model.price),
            "token": str(model.payment_token),
            "owner": str(model.owner),
            "rails": ["transfer"] if served else [],
            "accepts": [self._requirement(grant, call)] if served else [],
            "x402Version": 2,
            "resource": {"url": call.path, "description": f"one run of {model.model}", "mimeType": "application/json"},
        }

    def _requirement(self, grant: Grant, call: SignedCall) -> dict[str, Any]:
        model = grant.model
        extra: dict[str, Any] = {
            "claim": _claim(call),
            "confirmations": self._terms.confirmations,
            "binding": str(binding_of(self._ledger.node, grant.principal.user)),
            "bindingRequired": model.owner not in self._sole_node_for,
        }
        return {
            "scheme": "transfer",
            "network": f"eip155:{self._ledger.chain_id}",
            "amount": str(model.price.atomic),
            "asset": str(model.payment_token),
            "payTo": str(model.owner),
            "maxTimeoutSeconds": self._terms.max_age_s,
            "extra": extra,
        }

    def _check_means(self, grant: Grant, call: SignedCall, standing: Standing) -> None:
        """Rule 2."""
        price = grant.model.price
        if standing.allowance is not None and price.atomic > standing.allowance:
            raise _above_allowance(grant, standing.allowance)
        if call.payment is None and standing.credit < price.atomic:
            raise self._required(grant, call)
        if not grant.principal.repeatable:
            raise BadRequest(
                "a paid call of a session carries an Idempotency-Key, so that a copy of it is not paid for again",
                field="idempotency-key",
            )
        if price > grant.principal.max_price:
            raise _above_limit(grant)

    async def _incoming(self, grant: Grant, call: SignedCall, standing: Standing) -> Incoming | None:
        """What the claimed transfer brings; None without a claim, or when this very request had it credited before."""
        if call.payment is None:
            return None
        tx = parse_hash(call.payment.tx_hash)
        if tx is not None and grant.principal.request in standing.spent.values():
            return None
        judgement = await self._judge(grant, call.payment.tx_hash, standing)
        if judgement.verdict is Verdict.PENDING:
            raise PaymentPending(
                "the transfer is not final yet: send the same bytes again, and don't pay again",
                reason=judgement.reason,
                retry_after=_PENDING_RETRY_S,
            )
        if judgement.verdict is Verdict.REJECT or tx is None:
            raise self._rejected(grant, call, judgement.reason or "bad_tx_hash")
        return Incoming(tx, tuple((log.index, int.from_bytes(log.data, "big")) for log in judgement.logs))

    async def _judge(self, grant: Grant, text: str, standing: Standing) -> Judgement:
        model, payer = grant.model, grant.principal.user
        missing = max(model.price.atomic - standing.credit, 1)
        binding = None if model.owner in self._sole_node_for else binding_of(self._ledger.node, payer)
        claim = Claim(text, self._ledger.chain_id, model.payment_token, payer, model.owner, Usdc(missing), binding)
        if (early := precheck(claim, self._terms)) is not None:
            return early
        evidence = await gather_evidence(self._source, Digest.parse(text))
        return judge(claim, self._terms, evidence, spent=standing.spent, now=int(self._clock()))

    def _too_low(self, grant: Grant, call: SignedCall, *, held: bool) -> PaymentError:
        """The credit shrank since it was looked at, or a request that is run again has got dearer."""
        if call.payment is None:
            return self._required(grant, call)
        if not held:
            return self._rejected(grant, call, "amount_too_low")
        return PaymentPending(
            "your credit is held by another run: send the same bytes again",
            reason="credit_held",
            retry_after=_PENDING_RETRY_S,
        )

    def _required(self, grant: Grant, call: SignedCall) -> PaymentRequired:
        offer = self.offer(grant, call)
        if not offer["rails"]:
            return PaymentRequired("this node takes no payments in the model's token", **offer)
        return PaymentRequired(
            f"one run costs {grant.model.price} USDC: send it to the owner, then call again with the hash of that "
            f"transaction as {_claim(call)}",
            **offer,
        )

    def _rejected(self, grant: Grant, call: SignedCall, reason: str) -> PaymentRejected:
        detail = _ADVICE.get(reason, f"this transfer does not pay for the call: {reason}")
        return PaymentRejected(detail, reason=reason, **self.offer(grant, call))


def _claim(call: SignedCall) -> str:
    """Where a call of this interface names the transfer that pays for it."""
    return "payment.tx_hash" if call.covered is None else "header divault-payment"


def _above_limit(grant: Grant) -> PriceChanged:
    advice = "the price is above the signed max_price: sign again with the new one, or don't"
    if grant.principal.login is not None:
        advice = "the price is above this call's max_price: name a larger one, under a fresh Idempotency-Key, or don't"
    return PriceChanged(advice, **_compared(grant, grant.principal.max_price.atomic))


def _above_allowance(grant: Grant, left: int) -> AllowanceExceeded:
    advice = "the price is above what this session may still spend: sign in again with a larger sum, or don't"
    return AllowanceExceeded(advice, **_compared(grant, left))


def _compared(grant: Grant, have: int) -> dict[str, str | int]:
    model = grant.model
    return {
        "have": str(have),
        "need": str(model.price.atomic),
        "token": str(model.payment_token),
        "block": grant.block.number,
    }


class Payments:
    """Chooses the method by the model's price."""

    def __init__(self, ledger: Ledger, priced: PaymentMethod | None = None) -> None:
        """`priced` None: this node serves free models only."""
        self._free = FreeRun(ledger)
        self._priced = priced

    def hold(self, grant: Grant, call: SignedCall) -> AbstractAsyncContextManager[Hold]:
        """The context of the method that fits. Raises NotReady when there is none."""
        if not grant.model.price.atomic:
            return self._free.hold(grant, call)
        if self._priced is None:
            raise NotReady("this node has no payment rail configured and serves free models only")
        return self._priced.hold(grant, call)
