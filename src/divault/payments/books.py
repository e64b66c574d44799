"""The ledger's rows. Every function works on the connection it is given; those that write, in the writer's transaction.

Rules:

1. `0 <= reserved` and, on every reservation, `reserved + price <= balance`; what a request reserved is given back
   exactly once, by the move that takes it out of `reserved`.
2. A transfer log is inserted into `spent` in the transaction that credits it; its primary key makes a second credit
   impossible. Charges are keyed by payment key and by request, with the same effect.
3. A payment key belongs to one request for good: it is numbered when the request first reserves, and kept when the same
   request reserves again after a release.
4. What the runs of a session reserved or drew in a token never exceeds what its wallet allowed when it signed in. An
   allowance is taken with the reservation, and comes back with a reservation that nothing was drawn from.
5. A request that nobody can send again (`Principal.repeatable`) has no row, and so can reserve nothing here.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Container, Sequence
from typing import Any

import orjson
from msgspec import Struct

from divault.errors import SessionInvalid
from divault.payments.stages import Stage, check_move
from divault.receipts import from_kept, to_keep
from divault.state import Rows
from divault.values import Address, Digest, ModelId, Principal, Receipt, Usdc

TRANSFER = "transfer"
"""Kind of a spent key: `<transaction hash>:<log index>`."""
_CLOCK_MARGIN_S = 300  # nonces outlive their signatures by this much, should the clock be set back


class Account(Struct, frozen=True):
    """Whose prepaid credit, with which owner, in which token."""

    chain_id: int
    token: Address
    payer: Address
    owner: Address


class Credit(Struct, frozen=True):
    """An account's balance in atomic units, and how much of it running requests hold."""

    id: int
    balance: int
    reserved: int

    @property
    def available(self) -> int:
        """What a new request can reserve."""
        return self.balance - self.reserved


class Row(Struct, frozen=True):
    """What the ledger knows of one (user, nonce)."""

    digest: Digest
    stage: Stage
    priced: bool
    attempt: bytes | None
    lease_until: int
    price: int
    account: int | None
    payment_key: str | None
    login: bytes | None = None


class Reservation(Struct, frozen=True):
    """What a request reserves: `account` is None for a free run, whose price is 0."""

    attempt: bytes
    lease_until: int
    price: Usdc
    account: Account | None


class Incoming(Struct, frozen=True):
    """A transfer to credit: its transaction, and (log index, atomic units) of each."""

    tx: Digest
    logs: tuple[tuple[int, int], ...]


class AlreadySpent(Exception):
    """A log of the transfer was credited before. Stays inside `divault.payments`."""


class CreditTooLow(Exception):
    """The account can't cover the price now; `held`: it could, if no other run held part of it. Stays inside."""

    def __init__(self, *, held: bool) -> None:
        super().__init__()
        self.held = held


class AllowanceTooLow(Exception):
    """The session may not spend the price; `left`, in atomic units, is what it still may. Stays inside."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left


# --- requests -----------------------------------------------------------------------------------------------------


def find(db: Rows, principal: Principal) -> Row | None:
    """The row of the principal's nonce."""
    if not principal.repeatable:
        return None
    found = db.execute(
        "SELECT digest, stage, priced, attempt, lease_until, price, account, payment_key, login FROM request"
        " WHERE user = ? AND nonce = ?",
        (principal.user.raw, principal.nonce.raw),
    ).fetchone()
    if found is None:
        return None
    digest, stage, priced, attempt, lease_until, price, account, key, login = found
    return Row(Digest(digest), Stage(stage), bool(priced), attempt, lease_until or 0, int(price), account, key, login)


def reserve(db: sqlite3.Connection, principal: Principal, row: Row | None, wanted: Reservation) -> str | None:
    """Reserve the run, and its price on the account; gives the payment key, None for a free run.

    Raises CreditTooLow, AllowanceTooLow; SessionInvalid where the session was ended meanwhile.
    """
    check_move(row.stage if row is not None else Stage.UNSEEN, Stage.RESERVED)
    account = key = None
    if wanted.account is not None:
        credit = credit_of(db, wanted.account)
        if credit is None or credit.available < wanted.price.atomic:
            raise CreditTooLow(held=credit is not None and credit.balance >= wanted.price.atomic)
        if principal.login is not None:
            _take_allowance(db, principal.login.raw, wanted.account.token.raw, wanted.price.atomic)
        account = credit.id
        kept = row is not None and row.account == credit.id
        key = row.payment_key if row is not None and kept else _next_key(db, wanted.account, credit)
        _set_reserved(db, credit.id, credit.reserved + wanted.price.atomic)
    _put(db, principal, Stage.RESERVED, priced=wanted.account is not None)
    db.execute(
        "UPDATE request SET attempt = ?, lease_until = ?, price = ?, account = ?, payment_key = ?"
        " WHERE user = ? AND nonce = ?",
        (wanted.attempt, wanted.lease_until, str(wanted.price.atomic), account, key, *_key(principal)),
    )
    return key


def finish(
    db: sqlite3.Connection, principal: Principal, row: Row | None, stage: Stage, *, priced: bool = False
) -> None:
    """Move the request to a stage after its run, giving back what it had reserved (a charge is drawn separately)."""
    check_move(row.stage if row is not None else Stage.UNSEEN, stage)
    if row is not None and row.stage is Stage.RESERVED and row.account is not None:
        credit = _credit_by_id(db, row.account)
        _set_reserved(db, credit.id, credit.reserved - row.price)
        if stage is not Stage.DONE:
            _give_allowance_back(db, row.login, row.account, row.price)
    if stage is Stage.UNSEEN:
        db.execute("DELETE FROM request WHERE user = ? AND nonce = ?", _key(principal))
        return
    _put(db, principal, stage, priced=row.priced if row is not None else priced)


def any_lapsed(db: Rows, now: int, living: Container[bytes]) -> bool:
    """Whether a lease of a row ended before `now`, of an attempt that is not `living`."""
    query = "SELECT attempt FROM request WHERE stage = 'reserved' AND lease_until < ?"
    return any(attempt not in living for (attempt,) in db.execute(query, (now,)))


def release_lapsed(db: sqlite3.Connection, now: int, living: Container[bytes] = ()) -> int:
    """Give back what runs reserved whose lease ended before `now`, unless they are `living`; gives their number."""
    rows = db.execute(
        "SELECT attempt, user, nonce, price, account, login FROM request WHERE stage = 'reserved' AND lease_until < ?",
        (now,),
    ).fetchall()
    lapsed = [row for attempt, *row in rows if attempt not in living]
    for user, nonce, price, account, login in lapsed:
        after = Stage.CONSUMED if account is None else Stage.RELEASED
        check_move(Stage.RESERVED, after)
        if account is not None:
            credit = _credit_by_id(db, account)
            _set_reserved(db, account, credit.reserved - int(price))
            _give_allowance_back(db, login, account, int(price))
        db.execute("UPDATE request SET stage = ? WHERE user = ? AND nonce = ?", (after, user, nonce))
    return len(lapsed)


def purge(db: sqlite3.Connection, now: int) -> None:
    """Forget nonces whose signatures are long out of date, and answers past their time; receipts and charges stay."""
    db.execute("DELETE FROM request WHERE keep_until < ? AND stage != 'reserved'", (now,))
    db.execute("DELETE FROM outcome WHERE expires_at < ?", (now,))


def _put(db: sqlite3.Connection, principal: Principal, stage: Stage, *, priced: bool) -> None:
    if not principal.repeatable:
        if stage is Stage.RESERVED:
            raise ValueError("what has no row can hold no reservation")
        return
    db.execute(
        "INSERT INTO request(user, nonce, digest, stage, priced, keep_until, login) VALUES (?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT(user, nonce) DO UPDATE SET stage = excluded.stage, priced = excluded.priced",
        (
            *_key(principal),
            principal.request.raw,
            stage,
            priced,
            principal.expires_at + _CLOCK_MARGIN_S,
            principal.login.raw if principal.login is not None else None,
        ),
    )


def _key(principal: Principal) -> tuple[bytes, bytes]:
    return principal.user.raw, principal.nonce.raw


# --- money --------------------------------------------------------------------------------------------------------


def credit_of(db: Rows, account: Account) -> Credit | None:
    """What the account holds; None if nothing was ever credited to it."""
    found = db.execute(
        "SELECT id, balance, reserved FROM credit WHERE chain = ? AND token = ? AND payer = ? AND owner = ?",
        _columns(account),
    ).fetchone()
    return None if found is None else Credit(found[0], int(found[1]), int(found[2]))


def spendable(db: Rows, account: Account, now: int, living: Container[bytes]) -> int:
    """What a new request could reserve: also what others than the `living` hold beyond their lease. May be negative."""
    credit = credit_of(db, account)
    if credit is None:
        return 0
    lapsed = db.execute(
        "SELECT attempt, price FROM request WHERE stage = 'reserved' AND lease_until < ? AND account = ?",
        (now, credit.id),
    )
    return credit.available + sum(int(price) for attempt, price in lapsed if attempt not in living)


def credit_incoming(db: sqlite3.Connection, account: Account, request: Digest, transfer: Incoming, now: int) -> None:
    """Spend the logs and credit their sum. Raises AlreadySpent, and then nothing of it may stay."""
    for index, amount in transfer.logs:
        try:
            db.execute(
                "INSERT INTO spent VALUES (?, ?, ?, ?, ?, ?)",
                (account.chain_id, TRANSFER, f"{transfer.tx}:{index}", request.raw, str(amount), now),
            )
        except sqlite3.IntegrityError:
            raise AlreadySpent from None
    db.execute(
        "INSERT INTO credit(chain, token, payer, owner, balance, reserved, next_charge)"
        " VALUES (?, ?, ?, ?, '0', '0', 1) ON CONFLICT DO NOTHING",
        _columns(account),
    )
    credit = credit_of(db, account)
    if credit is not None:
        total = credit.balance + sum(amount for _, amount in transfer.logs)
        db.execute("UPDATE credit SET balance = ? WHERE id = ?", (str(total), credit.id))


def spent_logs(db: Rows, chain_id: int, tx: Digest) -> dict[int, Digest]:
    """Log indexes of the transaction that were credited, with the request that claimed each."""
    rows = db.execute(
        "SELECT key, request FROM spent WHERE chain = ? AND kind = ? AND key >= ? AND key < ?",
        (chain_id, TRANSFER, f"{tx}:", f"{tx};"),  # ";" follows ":" in ASCII: every key of this transaction
    )
    return {int(key.rpartition(":")[2]): Digest(request) for key, request in rows}


def draw(db: sqlite3.Connection, principal: Principal, row: Row, model: Digest, receipt: Digest, now: int) -> None:
    """Take the price of a reserved run from its account and record the charge; `finish` gives back the reservation."""
    if row.account is None or row.payment_key is None:
        return
    credit = _credit_by_id(db, row.account)
    db.execute("UPDATE credit SET balance = ? WHERE id = ?", (str(credit.balance - row.price), credit.id))
    db.execute(
        "INSERT INTO charge(payment_key, request, account, model, price, receipt, at) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (row.payment_key, principal.request.raw, credit.id, model.raw, str(row.price), receipt.raw, now),
    )


def allowance(db: Rows, login: Digest, token: Address) -> int:
    """What the session may still spend of the token, atomic units; 0 where its wallet allowed none."""
    most, used = _allowed_and_used(db, login.raw, token.raw)
    return most - used


def _allowed_and_used(db: Rows, login: bytes, token: bytes) -> tuple[int, int]:
    found = db.execute("SELECT most, used FROM allowance WHERE login = ? AND token = ?", (login, token)).fetchone()
    return (int(found[0]), int(found[1])) if found is not None else (0, 0)


def _take_allowance(db: sqlite3.Connection, login: bytes, token: bytes, price: int) -> None:
    if db.execute("SELECT 1 FROM login WHERE digest = ? AND ended = 1", (login,)).fetchone() is not None:
        raise SessionInvalid("this session was ended while its call was under way", reason="signed_out")
    most, used = _allowed_and_used(db, login, token)
    if used + price > most:
        raise AllowanceTooLow(most - used)
    _set_used(db, login, token, used + price)


def _give_allowance_back(db: sqlite3.Connection, login: bytes | None, account: int, price: int) -> None:
    if login is None:
        return
    (token,) = db.execute("SELECT token FROM credit WHERE id = ?", (account,)).fetchone()
    found = db.execute("SELECT used FROM allowance WHERE login = ? AND token = ?", (login, token)).fetchone()
    if found is not None:  # else the session is long over and forgotten
        _set_used(db, login, token, int(found[0]) - price)


def _set_used(db: sqlite3.Connection, login: bytes, token: bytes, used: int) -> None:
    if used < 0:
        raise ValueError("more of an allowance was given back than taken")
    db.execute("UPDATE allowance SET used = ? WHERE login = ? AND token = ?", (str(used), login, token))


def _credit_by_id(db: sqlite3.Connection, number: int) -> Credit:
    found = db.execute("SELECT id, balance, reserved FROM credit WHERE id = ?", (number,)).fetchone()
    return Credit(found[0], int(found[1]), int(found[2]))


def _set_reserved(db: sqlite3.Connection, number: int, reserved: int) -> None:
    if reserved < 0:
        raise ValueError("more was given back than reserved")
    db.execute("UPDATE credit SET reserved = ? WHERE id = ?", (str(reserved), number))


def _next_key(db: sqlite3.Connection, account: Account, credit: Credit) -> str:
    number = db.execute("SELECT next_charge FROM credit WHERE id = ?", (credit.id,)).fetchone()[0]
    db.execute("UPDATE credit SET next_charge = ? WHERE id = ?", (number + 1, credit.id))
    names = (account.token, account.payer, account.owner)
    return f"credit:{account.chain_id}:{':'.join('0x' + name.raw.hex() for name in names)}:{number}"


def _columns(account: Account) -> Sequence[int | bytes]:
    return account.chain_id, account.token.raw, account.payer.raw, account.owner.raw


# --- receipts and outcomes ------------------------------------------------------------------------------------------


def log_of(db: sqlite3.Connection, name: str) -> int:
    """Number of the log of this name, which begins with this if there is none."""
    db.execute("INSERT INTO log(name) VALUES (?) ON CONFLICT DO NOTHING", (name,))
    return int(db.execute("SELECT id FROM log WHERE name = ?", (name,)).fetchone()[0])


def last_receipt(db: sqlite3.Connection, log: int) -> tuple[int, Digest]:
    """Sequence number and hash that the next receipt of the log follows: (-1, zero) for the first."""
    found = db.execute("SELECT sequence, hash FROM receipt WHERE log = ? ORDER BY sequence DESC LIMIT 1", (log,))
    row = found.fetchone()
    return (-1, Digest.ZERO) if row is None else (row[0], Digest(row[1]))


def keep_outcome(
    db: sqlite3.Connection, principal: Principal, body: bytes, *, code: str | None, expires_at: int
) -> None:
    """Keep an answer (`code` None), or an error as JSON, for the user who signed the request."""
    db.execute(
        "INSERT INTO outcome(request, user, code, body, expires_at) VALUES (?, ?, ?, ?, ?)",
        (principal.request.raw, principal.user.raw, code, body, expires_at),
    )


def outcome_of(db: Rows, request: Digest, user: Address, now: int) -> tuple[str | None, bytes] | None:
    """The kept (code, body) of a request, None if there is none for this user."""
    found: tuple[str | None, bytes] | None = db.execute(
        "SELECT code, body FROM outcome WHERE request = ? AND user = ? AND expires_at >= ?",
        (request.raw, user.raw, now),
    ).fetchone()
    return found


def receipt_of(db: Rows, request: Digest, user: Address) -> dict[str, Any] | None:
    """The redacted envelope of the request's receipt, None if there is none for this user."""
    found = db.execute(
        "SELECT envelope FROM receipt WHERE request = ? AND user = ?", (request.raw, user.raw)
    ).fetchone()
    return None if found is None else from_kept(found[0], lambda hashed: _runtime_of(db, hashed))


def _runtime_of(db: Rows, hashed: Digest) -> dict[str, Any]:
    (raw,) = db.execute("SELECT object FROM runtime WHERE hash = ?", (hashed.raw,)).fetchone()
    found: dict[str, Any] = orjson.loads(raw)
    return found


def keep_runtime(db: sqlite3.Connection, hashed: Digest, runtime: dict[str, Any]) -> None:
    """Keep what receipts with this `runtimeHash` say of the runtime; does nothing where it is kept already."""
    db.execute(
        "INSERT INTO runtime(hash, object) VALUES (?, ?) ON CONFLICT DO NOTHING", (hashed.raw, orjson.dumps(runtime))
    )


def append_receipt(
    db: sqlite3.Connection, log: int, receipt: Receipt, previous: Digest, principal: Principal, model: ModelId | None
) -> None:
    """Append to the log, without the private part of the envelope, and its runtime object (`keep_runtime`)."""
    key = model.key if model is not None else Digest.ZERO
    db.execute(
        "INSERT INTO receipt(log, sequence, hash, previous, request, user, model, status, envelope)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            log,
            receipt.sequence,
            receipt.hash.raw,
            previous.raw,
            principal.request.raw,
            principal.user.raw,
            key.raw,
            receipt.status,
            to_keep(receipt.envelope),
        ),
    )


def count_successes(db: sqlite3.Connection, log: str, model: ModelId | None) -> int:
    """Receipts of status 1 in the log: of one model, or of all."""
    query = "SELECT count(*) FROM receipt WHERE log = (SELECT id FROM log WHERE name = ?) AND status = 1"
    if model is None:
        return int(db.execute(query, (log,)).fetchone()[0])
    return int(db.execute(query + " AND model = ?", (log, model.key.raw)).fetchone()[0])


def beat(db: sqlite3.Connection, now: int) -> None:
    """Write one row over: what a health probe can do that touches the disk and changes nothing."""
    db.execute("INSERT INTO pulse VALUES (1, ?) ON CONFLICT(id) DO UPDATE SET at = excluded.at", (now,))
