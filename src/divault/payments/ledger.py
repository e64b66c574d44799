"""Each request runs at most once, each price is drawn at most once, each outcome is on disk before it is told.

Rules:

1. A nonce is used up exactly when a run is reserved or a receipt is issued, in that transaction (table: `stages`). A
   free run is reserved in memory, where its copies are refused, and its nonce is on disk with its outcome: a node that
   dies in between has told nobody anything, so the same request may come again. A nonce that nobody can send again is
   written nowhere.
2. `outcome` stands around everything that follows authentication. Whatever is raised inside, the reservation ends
   there: with an error that earns a receipt, release and receipt are one transaction and the receipt is the error's
   `evidence`; with any other end, the credit comes back and nothing is charged.
3. `charge` is one transaction: the price, the request's stage, the receipt's number and signature, the kept answer.
   Receipts are signed inside it, in the order of their numbers: the chain has neither gap nor fork.
4. A reservation stands while its presentation is under way in this process, however long that takes: what a call waits
   for and does has deadlines of its own, several of them (`service`, `workers.worker`). Its lease counts only where
   nobody could end it: the process died, or the disk failed. A run whose reservation is gone is not charged and not
   answered.

```python
async with ledger.outcome(principal, call):
    grant = await gates.check(principal, model)
    async with payments.hold(grant, call) as hold:
        output = await workers.run(opened, hold, call)
        return await ledger.charge(hold, call, output)
```
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from itertools import count
from typing import Any, Protocol

import orjson
from msgspec import Struct

from divault.errors import (
    ContentInvalid,
    DeadlineExceeded,
    DivaultError,
    ModelFailed,
    NonceUsed,
    NotReady,
    RequestRunning,
    ResultUnknown,
    StorageFailed,
    from_code,
)
from divault.payments import books
from divault.payments.books import Account, Incoming, Reservation, Row
from divault.payments.stages import Stage
from divault.receipts import ReceiptDraft, ReceiptIssuer, answer_body
from divault.state import Rows, State
from divault.values import (
    Address,
    Answer,
    Digest,
    Grant,
    Hold,
    ModelId,
    Output,
    Principal,
    Receipt,
    ReceiptStatus,
    SignedCall,
    Usdc,
)

Wording = Callable[[str, bytes, dict[str, Any]], bytes]
"""The body of an answer from model id, result and receipt; the result stands in it byte for byte."""
_RETRY_S = 1
_PURGE_EVERY_S = 60
_MOST_RUNTIMES = 256  # hashes remembered; more than that many models are not loaded at once
_FOREVER = 2**62


class Budget(Protocol):
    """How many refusals are signed; `divault.limits.RefusalBudget` is one."""

    def spend(self, peer: str) -> None:
        """Count one. Raises RateLimited when there is none left."""


class _Trail(Struct):
    """How far one presentation of a request got. `attempt` tells it from other presentations of the same bytes."""

    principal: Principal
    call: SignedCall
    attempt: bytes
    grant: Grant | None = None
    hold: Hold | None = None
    payment_key: str | None = None
    reserving: bool = False
    """It has asked for a reservation, and nothing has ended it yet."""
    plaintext: Digest | None = None
    runtime: dict[str, Any] | None = None


_NonceKey = tuple[bytes, bytes]


class _FreeRun(Struct, frozen=True):
    principal: Principal
    attempt: bytes
    lease_until: int


class Standing(Struct, frozen=True):
    """What a payment method has to know before it reserves."""

    credit: int
    """What the account can still reserve, atomic units."""
    allowance: int | None
    """What the call's session may still spend, atomic units; None for a call that is no session's."""
    spent: dict[int, Digest]
    """Logs of the claimed transaction that were credited, by whose request."""


class Ledger:
    """The node's books, over one `State`. Safe for concurrent use within one event loop."""

    def __init__(
        self,
        state: State,
        issuer: ReceiptIssuer,
        *,
        clock: Callable[[], float] = time.time,
        lease_s: int = 180,
        keep_results_s: int = 86_400,
        on_receipt: Callable[[Receipt], None] | None = None,
    ) -> None:
        """`lease_s`: how long a reservation stays that nobody ended. `keep_results_s`: how long a paid answer stays.

        `on_receipt` gets each new receipt, once, when it is on disk; not those of kept answers.
        """
        self._state = state
        self._issuer = issuer
        self._clock = clock
        self._lease_s = lease_s
        self._keep_results_s = keep_results_s
        self._on_receipt = on_receipt or (lambda _: None)
        self._log = f"{issuer.domain.chain_id}:{issuer.domain.contract}:{issuer.node}".lower()
        self._process, self._attempts = os.urandom(8), count()
        """Together: what tells a presentation from all others, of earlier processes too."""
        self._trails: dict[int, _Trail] = {}
        self._living: set[bytes] = set()
        """The attempts of these: their leases don't run out."""
        self._free: dict[_NonceKey, _FreeRun] = {}
        """Free runs under way, the oldest first."""
        self._last: tuple[int, int, int, Digest] | None = None
        """As of so many undone writes: the log's number, and the newest receipt's number and hash."""
        self._kept_runtimes: set[str] = set()
        """Hashes of runtime objects that are kept, as of as many undone writes as `_last`."""
        self._seen: tuple[Principal, int, Row | None] | None = None
        """Whose row was looked up last, after how many writes."""
        self._tidied_at, self._purge_at = 0, self._now() + _PURGE_EVERY_S

    @property
    def chain_id(self) -> int:
        """The chain of the accounts and receipts."""
        return self._issuer.domain.chain_id

    @property
    def node(self) -> Address:
        """Who signs the receipts."""
        return self._issuer.node

    @property
    def pending(self) -> int:
        """How many runs are reserved now and have not ended yet. For any thread."""
        return sum(trail.reserving for trail in list(self._trails.values()))

    async def recover(self) -> int:
        """Release what an earlier process had reserved when it died; gives the number. Call it once, at the start.

        One process owns the state, so nobody else's run can be among them. Without this call the leases do the same.
        """
        return await self._state.write(lambda db: books.release_lapsed(db, _FOREVER))

    # --- before and beside a run ------------------------------------------------------------------------------------

    async def answered(self, principal: Principal) -> Answer | None:
        """The kept answer of a priced request that ran before; None when this one may run.

        `Answer.receipt` is None: the receipt stands in the body, which is the same byte for byte. Raises NonceUsed,
        RequestRunning, or the error that the request ended with, with its receipt.
        """
        now = self._now()
        self._require_not_running_free(principal, None)
        if self._may_run(self._row(principal), principal, now):
            return None
        kept = await self._state.read(lambda db: books.outcome_of(db, principal.request, principal.user, now))
        if kept is None:
            raise _nonce_used()
        return _restored(*kept)

    async def consume(self, principal: Principal) -> None:
        """Use up the nonce of a call that has no receipt (load, unload, results). Raises NonceUsed."""
        now = self._now()
        await self._tidy(now)

        def work(db: sqlite3.Connection) -> None:
            self._require_not_running_free(principal, None)
            if books.find(db, principal) is not None:
                raise _nonce_used()
            books.finish(db, principal, None, Stage.CONSUMED)

        await self._state.write(work)

    async def result(self, request: Digest, user: Address) -> Answer:
        """The kept answer of a priced request, for the wallet that signed it.

        Raises ResultUnknown (with the receipt as evidence, if there is one and only the answer is not kept), or the
        error that the request ended with.
        """
        now = self._now()

        def look(db: Rows) -> tuple[tuple[str | None, bytes] | None, dict[str, Any] | None]:
            return books.outcome_of(db, request, user, now), books.receipt_of(db, request, user)

        kept, envelope = await self._state.read(look)
        if kept is not None:
            return _restored(*kept)
        if envelope is None:
            raise ResultUnknown("this node keeps no result of that request for this wallet")
        without = ResultUnknown(_why_not_kept(envelope["receipt"]))
        without.evidence = envelope
        raise without

    async def successes(self, model: ModelId | None = None) -> int:
        """Number of receipts with status 1: of one model, or of all."""
        return await self._state.scan(lambda db: books.count_successes(db, self._log, model))

    async def pulse(self) -> None:
        """Do nothing but a durable write, to prove that one works. Raises NotReady."""
        now = self._now()
        await self._state.write(lambda db: books.beat(db, now))

    async def credit(self, account: Account) -> Usdc:
        """What the account can still spend."""
        now = self._now()
        return Usdc(max(await self._state.read(lambda db: books.spendable(db, account, now, self._living)), 0))

    # --- the run ----------------------------------------------------------------------------------------------------

    def outcome(
        self, principal: Principal, call: SignedCall, budget: Budget | None = None
    ) -> AbstractAsyncContextManager[None]:
        """A context that brings whatever happens inside to an end that is on disk (rule 2).

        Raises what was raised inside, with `evidence` where there is a receipt; RateLimited instead of a refusal when
        `budget` is spent; NonceUsed or RequestRunning instead when another copy of the request was faster.
        """
        attempt = self._process + next(self._attempts).to_bytes(8, "big")
        return _Outcome(self, _Trail(principal, call, attempt), budget)

    def begin(self, trail: _Trail) -> None:
        """Part of `outcome`: a presentation of a request is under way."""
        if id(trail.principal) in self._trails:
            raise RuntimeError("each presentation of a request is authenticated by itself: one Principal, one outcome")
        self._trails[id(trail.principal)] = trail
        self._living.add(trail.attempt)

    async def end(self, trail: _Trail, error: BaseException | None, budget: Budget | None) -> None:
        """Part of `outcome`: it has ended."""
        try:
            if isinstance(error, DivaultError):
                await self._end(trail, error, budget)
        finally:  # also after a cancellation, or a fault of ours
            del self._trails[id(trail.principal)]
            self._living.discard(trail.attempt)
            if trail.reserving:
                await self._release(trail, turned_away=False)

    async def standing(self, grant: Grant, account: Account, tx: Digest | None, payment_key: str | None) -> Standing:
        """Credit of the account, what a session may still spend, logs spent of the transaction.

        It remembers what was presented as payment.
        """
        self._trail(grant).payment_key = payment_key
        now = self._now()
        await self._tidy(now)  # what a session may spend is what no lapsed run holds any more

        def look(db: Rows) -> Standing:
            spent = books.spent_logs(db, self.chain_id, tx) if tx is not None else {}
            login = grant.principal.login
            allowance = None if login is None else books.allowance(db, login, account.token)
            return Standing(books.spendable(db, account, now, self._living), allowance, spent)

        return await self._state.read(look)

    async def reserve(
        self, grant: Grant, price: Usdc, account: Account | None = None, incoming: Incoming | None = None
    ) -> Hold:
        """Reserve the one run of this request, and its price: credits `incoming` in the same transaction.

        Raises NonceUsed, RequestRunning; inside `payments` also AlreadySpent, CreditTooLow and AllowanceTooLow.
        """
        trail, principal, now = self._trail(grant), grant.principal, self._now()
        wanted = Reservation(trail.attempt, now + self._lease_s, price, account)
        await self._tidy(now)
        if account is None and self._reserve_free(trail, wanted, now):
            trail.hold = Hold(grant, price, Address.ZERO, None, wanted.lease_until)
            return trail.hold

        def work(db: sqlite3.Connection) -> str | None:
            self._require_not_running_free(principal, trail)
            row = books.find(db, principal)
            if not self._may_run(row, principal, now):
                raise _just_ended()
            if account is not None and incoming is not None:
                books.credit_incoming(db, account, principal.request, incoming, now)
            return books.reserve(db, principal, row, wanted)

        trail.reserving = True
        key = await self._state.write(work)
        payer = account.payer if account is not None else Address.ZERO
        trail.hold = Hold(grant, price, payer, key, wanted.lease_until)
        return trail.hold

    def _reserve_free(self, trail: _Trail, wanted: Reservation, now: int) -> bool:
        """Reserve a free run in memory; False where the nonce has a row already. Raises NonceUsed."""
        principal = trail.principal
        self._require_not_running_free(principal, trail)
        row = self._row(principal)
        if not self._may_run(row, principal, now):
            raise _just_ended()
        if row is not None:
            return False
        self._free[_nonce_key(principal)] = _FreeRun(principal, trail.attempt, wanted.lease_until)
        trail.reserving = True
        return True

    def _row(self, principal: Principal) -> Row | None:
        """The row of the principal's nonce. Looked up once while nobody else's call comes between."""
        if not principal.repeatable:  # has none: no need to ask
            return None
        seen = self._seen
        if seen is None or seen[0] is not principal or seen[1] != self._state.writes:
            row = self._state.look(lambda db: books.find(db, principal))
            self._seen = seen = principal, self._state.writes, row
        return seen[2]

    def opened(self, hold: Hold, plaintext: Digest, runtime: Mapping[str, Any]) -> None:
        """Note what the run stands on (sha256 of the opened model, runtime object), for the receipt of a failed run."""
        trail = self._trail(hold.grant)
        trail.plaintext, trail.runtime = plaintext, dict(runtime)

    async def charge(self, hold: Hold, call: SignedCall, output: Output, wording: Wording = answer_body) -> Answer:
        """The answer, with everything that it implies on disk (rule 3); `wording` makes its body.

        Raises DeadlineExceeded when the reservation is gone (rule 4), NotReady when the ledger can't be written.
        """
        trail, grant, now = self._trail(hold.grant), hold.grant, self._now()
        principal = grant.principal
        draft = _success(call, hold, output, now)
        await self._tidy(now)

        def work(db: sqlite3.Connection) -> Answer:
            row = None if self._holds(None, trail) else books.find(db, principal)
            if not self._holds(row, trail):
                raise DeadlineExceeded("the run outlasted its reservation; nothing was charged", limit_s=self._lease_s)
            receipt = self._made(db, draft)
            body = wording(grant.model.model.text, output.result, receipt.envelope)
            self._append(db, receipt, trail)
            if row is not None:
                books.draw(db, principal, row, grant.model.model.key, receipt.hash, now)
            books.finish(db, principal, row, Stage.DONE)
            self._free.pop(_nonce_key(principal), None)
            if row is not None and row.priced:
                books.keep_outcome(db, principal, body, code=None, expires_at=now + self._keep_results_s)
            return Answer(body, receipt)

        # Of a free run nothing can fail once its rows are begun, in a log that is there: words are made before.
        guarded = hold.payment_key is not None or not self._knows_the_log
        answer = await self._state.write(work, self._told, guarded=guarded)
        trail.reserving = False
        return answer

    async def refuse(
        self,
        principal: Principal,
        call: SignedCall,
        error: DivaultError,
        *,
        grant: Grant | None = None,
        hold: Hold | None = None,
    ) -> Receipt | None:
        """End the request with a receipt of what went wrong, and give back what it had reserved, in one transaction.

        None when this error earns no receipt. Raises NonceUsed or RequestRunning when a copy was faster, NotReady.
        """
        trail = self._trails.get(id(principal)) or _Trail(principal, call, b"")
        trail.grant, trail.hold = grant or trail.grant, hold or trail.hold
        return await self._fail(trail, error) if error.receipt else None

    # --- inside -----------------------------------------------------------------------------------------------------

    async def _end(self, trail: _Trail, err: DivaultError, budget: Budget | None) -> None:
        try:
            if err.receipt and budget is not None and status_of(err) is ReceiptStatus.REFUSED:
                budget.spend(trail.call.peer)
            if err.receipt:
                err.evidence = (await self._fail(trail, err)).envelope
        except DivaultError as instead:
            raise instead from err
        finally:
            if trail.reserving:
                await self._release(trail, turned_away=True)

    async def _fail(self, trail: _Trail, err: DivaultError) -> Receipt:
        now, principal = self._now(), trail.principal
        draft = _failure(trail, err, now)
        await self._tidy(now)

        def work(db: sqlite3.Connection) -> Receipt:
            row = books.find(db, principal)
            self._require_not_running_free(principal, trail)
            held = self._holds(row, trail)
            if not held and not self._may_run(row, principal, now):
                raise _just_ended()
            receipt = self._made(db, draft)
            self._append(db, receipt, trail)
            self._free.pop(_nonce_key(principal), None)
            priced = trail.grant is not None and trail.grant.model.price.atomic > 0
            books.finish(db, principal, row, Stage.FAILED, priced=priced)
            if priced:
                body = orjson.dumps([err.detail, err.data, receipt.envelope], default=str)
                books.keep_outcome(db, principal, body, code=err.code, expires_at=now + self._keep_results_s)
            return receipt

        receipt = await self._state.write(work, self._on_receipt)
        trail.reserving = False
        return receipt

    async def _release(self, trail: _Trail, *, turned_away: bool) -> None:
        """Give back what this presentation reserved, if it did; another presentation's reservation stays.

        Writes happen in the order of the calls, so this one finds the reservation even of a caller that was cancelled
        while it waited for it.
        """
        trail.reserving = False
        free = _FreeRun(trail.principal, trail.attempt, lease_until=0)
        if turned_away and self._take(free):
            return
        taken: list[_FreeRun] = []

        def work(db: sqlite3.Connection) -> None:
            row = books.find(db, trail.principal)
            if not self._holds(row, trail):
                return
            if row is None:
                self._take(free)
                taken.append(free)
                books.finish(db, trail.principal, None, Stage.CONSUMED)
                return
            given_up = Stage.UNSEEN if turned_away else Stage.CONSUMED
            books.finish(db, trail.principal, row, Stage.RELEASED if row.priced else given_up)

        try:
            await self._state.write(work)
        except NotReady:  # the ledger can't be written: the lease will run out by itself, or has
            self._put_back(taken)

    @property
    def _knows_the_log(self) -> bool:
        """Whether the log is there, and what its last receipt is."""
        return self._last is not None and self._last[0] == self._state.undone

    def _made(self, db: sqlite3.Connection, draft: ReceiptDraft) -> Receipt:
        """The next receipt of the log, which `_append` keeps."""
        if self._last is None or not self._knows_the_log:
            number = books.log_of(db, self._log)
            self._last = (self._state.undone, number, *books.last_receipt(db, number))
            self._kept_runtimes.clear()
        _, _, sequence, previous = self._last
        return self._issuer.issue(draft, sequence + 1, previous)

    def _append(self, db: sqlite3.Connection, receipt: Receipt, trail: _Trail) -> None:
        """Keep the receipt that was made last."""
        if self._last is None or self._last[2] + 1 != receipt.sequence:
            raise RuntimeError("receipts are kept in the order in which they are made")
        undone, number, _, previous = self._last
        runtime, hashed = receipt.envelope["runtime"], receipt.envelope["receipt"]["runtimeHash"]
        if runtime is not None and hashed not in self._kept_runtimes:
            if len(self._kept_runtimes) >= _MOST_RUNTIMES:
                self._kept_runtimes.clear()
            books.keep_runtime(db, Digest.parse(hashed), runtime)
            self._kept_runtimes.add(hashed)
        books.append_receipt(db, number, receipt, previous, trail.principal, trail.call.model)
        self._last = (undone, number, receipt.sequence, receipt.hash)

    def _told(self, answer: Answer) -> None:
        if answer.receipt is not None:
            self._on_receipt(answer.receipt)

    def _holds(self, row: Row | None, trail: _Trail) -> bool:
        """Whether this presentation has the reservation: on disk, or of a free run in memory."""
        if row is not None:
            return row.stage is Stage.RESERVED and row.attempt == trail.attempt
        running = self._free.get(_nonce_key(trail.principal))
        return running is not None and running.attempt == trail.attempt

    def _require_not_running_free(self, principal: Principal, trail: _Trail | None) -> None:
        """Return only if no other copy of a free request is running. Raises NonceUsed."""
        running = self._free.get(_nonce_key(principal))
        if running is not None and (trail is None or running.attempt != trail.attempt):
            raise _nonce_used()

    def _may_run(self, row: Row | None, principal: Principal, now: int) -> bool:
        """True: it may run; False: it is priced and its outcome is kept. Raises NonceUsed, RequestRunning."""
        if row is None:
            return True
        if row.digest != principal.request or not row.priced:
            raise _nonce_used()
        if row.stage is Stage.RESERVED and (row.lease_until >= now or row.attempt in self._living):
            raise RequestRunning("this request is running: ask again with the same bytes", retry_after=_RETRY_S)
        return row.stage in (Stage.RELEASED, Stage.RESERVED)

    async def _tidy(self, now: int) -> None:
        """End what has lapsed, once a second (leases and windows are whole seconds), in a transaction of its own."""
        if now == self._tidied_at:
            return
        self._tidied_at = now
        living = self._living
        free = [run for run in self._free.values() if run.lease_until < now and run.attempt not in living]
        if not free and now < self._purge_at and not self._state.look(lambda db: books.any_lapsed(db, now, living)):
            return

        def work(db: sqlite3.Connection) -> None:
            books.release_lapsed(db, now, living)
            for run in free:
                if self._take(run):
                    taken.append(run)
                    books.finish(db, run.principal, None, Stage.CONSUMED)
            if now >= self._purge_at:
                books.purge(db, now)

        taken: list[_FreeRun] = []
        try:
            await self._state.write(work)
        except BaseException:
            self._put_back(taken)
            raise
        if now >= self._purge_at:
            self._purge_at = now + _PURGE_EVERY_S

    def _take(self, run: _FreeRun) -> bool:
        """Take the run out of those under way; False where it has ended, or its place is another presentation's."""
        key = _nonce_key(run.principal)
        found = self._free.get(key)
        if found is None or found.attempt != run.attempt:
            return False
        del self._free[key]
        return True

    def _put_back(self, runs: Iterable[_FreeRun]) -> None:
        """What was written of these may be undone: they hold their nonces as before, and are ended another time."""
        for run in runs:
            self._free.setdefault(_nonce_key(run.principal), run)
        self._tidied_at = 0

    def _trail(self, grant: Grant) -> _Trail:
        try:
            trail = self._trails[id(grant.principal)]
        except KeyError:
            raise RuntimeError("reserve and charge inside `async with ledger.outcome(principal, call)`") from None
        trail.grant = grant
        return trail

    def _now(self) -> int:
        return int(self._clock())


class _Outcome:
    """The context of `Ledger.outcome`."""

    __slots__ = ("_budget", "_ledger", "_trail")

    def __init__(self, ledger: Ledger, trail: _Trail, budget: Budget | None) -> None:
        self._ledger = ledger
        self._trail = trail
        self._budget = budget

    async def __aenter__(self) -> None:
        self._ledger.begin(self._trail)

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        await self._ledger.end(self._trail, error, self._budget)


def status_of(error: DivaultError) -> ReceiptStatus:
    """The status of the receipt that this error earns."""
    if isinstance(error, DeadlineExceeded):
        return ReceiptStatus.TIMED_OUT
    failed = isinstance(error, ModelFailed) or (
        isinstance(error, StorageFailed) and not isinstance(error, ContentInvalid)
    )
    return ReceiptStatus.FAILED if failed else ReceiptStatus.REFUSED


def _why_not_kept(receipt: Mapping[str, Any]) -> str:
    """Why there is a receipt, of these fields, and no answer."""
    if receipt["price"] != "0":
        return "the answer is not kept any more; its receipt is"
    if receipt["status"] == str(int(ReceiptStatus.OK)):
        return "answers of free calls are not kept; the receipt is"
    return "that run ended without an answer; its receipt is kept"


def _success(call: SignedCall, hold: Hold, output: Output, now: int) -> ReceiptDraft:
    model = hold.grant.model
    return ReceiptDraft(
        hold.grant.principal,
        model.model,
        ReceiptStatus.OK,
        now,
        hold.grant,
        output,
        input_data=call.input_data if call.covered is None else call.covered,
        parameters=call.parameters if call.covered is None else None,
        price=hold.price,
        token=model.payment_token if hold.payment_key is not None else Address.ZERO,
        payer=hold.payer,
        payment_key=hold.payment_key,
    )


def _failure(trail: _Trail, err: DivaultError, now: int) -> ReceiptDraft:
    grant, call = trail.grant, trail.call
    if call.model is None:
        raise TypeError("receipts are for calls that name a model")
    key = trail.hold.payment_key if trail.hold is not None else trail.payment_key
    paying = grant is not None and key is not None
    return ReceiptDraft(
        trail.principal,
        call.model,
        status_of(err),
        now,
        grant,
        plaintext=trail.plaintext,
        runtime=trail.runtime,
        input_data=call.input_data if call.covered is None else call.covered,
        parameters=call.parameters if call.covered is None else None,
        token=grant.model.payment_token if grant is not None and paying else Address.ZERO,
        payer=trail.principal.user if paying else Address.ZERO,
        payment_key=key,
        code=err.code,
    )


def _nonce_key(principal: Principal) -> _NonceKey:
    return principal.user.raw, principal.nonce.raw


def _restored(code: str | None, body: bytes) -> Answer:
    """The kept answer; a kept error is raised."""
    if code is None:
        return Answer(body, None)
    detail, data, envelope = orjson.loads(body)
    error = from_code(code, detail, data)
    error.evidence = envelope
    raise error


def _just_ended() -> RequestRunning:
    return RequestRunning("another copy of this request has ended: send the same bytes for its answer", retry_after=1)


def _nonce_used() -> NonceUsed:
    return NonceUsed("this nonce or Idempotency-Key was used before: send a fresh one", reason="replay")
