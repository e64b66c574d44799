"""What the node must never forget, in one SQLite file: nonces, sessions, credit, charges, receipts, answers.

Rules:

1. One process owns the file (a lock beside it says so), and in it one event loop. The file is readable by its owner
   only.
2. A write is on disk before anybody learns its result: the write-ahead log is synced after each commit. Writes that
   arrive while the disk is busy share the next commit, each in a savepoint of its own, or done with all that may fail
   when it first writes, so that one that fails takes no other with it. After a sync that failed nothing is believed any
   more until the node starts again.
3. The schema has a version and only moves forward, each step in one transaction. A newer file, a foreign file and a
   damaged file are refused as they are: nothing is repaired, emptied or begun anew.
4. Amounts are decimal text, because SQLite's integers end at 2^63; only the one writer computes with them.

>>> import asyncio, pathlib, tempfile
>>> async def example(folder: str) -> int:
...     async with State(pathlib.Path(folder, "ledger.sqlite3")) as state:
...         await state.write(lambda db: db.execute("INSERT INTO spent VALUES (1, 'transfer', '0x0:0', 'x', '5', 0)"))
...         return await state.read(lambda db: db.execute("SELECT count(*) FROM spent").fetchone()[0])
>>> with tempfile.TemporaryDirectory() as folder:
...     asyncio.run(example(folder))
1
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import math
import os
import queue
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from divault.errors import DivaultError, NotReady, SettingsInvalid

T = TypeVar("T")


class Rows(Protocol):
    """What rows are read from: the ledger, or a look at it that can't write."""

    def execute(self, sql: str, parameters: Sequence[Any] = (), /) -> sqlite3.Cursor:
        """Run one statement."""


Work = Callable[[sqlite3.Connection], T]
Look = Callable[[Rows], T]

APPLICATION_ID = 0x44495641  # "DIVA" in the file's header: tells our file from any other SQLite database
_FOLD_PATIENCE_MS = 50  # for a long scan; the log is folded back another time then
_QUICK_S = 0.0005  # a sync on the loop, which holds up all others; a thread that is woken for it takes 0.1 ms more
_FOLD_PAUSE_S = 1.0
_PAGE = 2048  # bytes: most of what a call changes is a few bytes each in pages of their own
_FRAME_HEAD, _FRAMES_AT = 24, 16  # of the log, and where its index says how many it has (sqlite.org/walformat.html)
_LONG_LOG = 16 << 20  # bytes; folding so many back takes about 50 ms, during which writes wait
_TURNS = 8  # of the loop, that a commit waits for at most, while every one brings more writes
_SETTING = "DIVAULT_STATE_DIR"
_RETRY_S = 5

_MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE request(
        user BLOB NOT NULL, nonce BLOB NOT NULL, digest BLOB NOT NULL, stage TEXT NOT NULL, priced INTEGER NOT NULL,
        attempt BLOB, lease_until INTEGER, keep_until INTEGER NOT NULL, price TEXT NOT NULL DEFAULT '0',
        account INTEGER REFERENCES credit(id), payment_key TEXT,
        PRIMARY KEY(user, nonce)) WITHOUT ROWID;
    CREATE INDEX request_lease ON request(lease_until) WHERE stage = 'reserved';
    CREATE INDEX request_keep ON request(keep_until);
    CREATE TABLE credit(
        id INTEGER PRIMARY KEY, chain INTEGER NOT NULL, token BLOB NOT NULL, payer BLOB NOT NULL, owner BLOB NOT NULL,
        balance TEXT NOT NULL, reserved TEXT NOT NULL, next_charge INTEGER NOT NULL,
        UNIQUE(chain, token, payer, owner));
    CREATE TABLE spent(
        chain INTEGER NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL, request BLOB NOT NULL, amount TEXT NOT NULL,
        at INTEGER NOT NULL, PRIMARY KEY(chain, kind, key)) WITHOUT ROWID;
    CREATE TABLE receipt(
        log TEXT NOT NULL, sequence INTEGER NOT NULL, hash BLOB NOT NULL UNIQUE, previous BLOB NOT NULL,
        request BLOB NOT NULL, user BLOB NOT NULL, model BLOB NOT NULL, status INTEGER NOT NULL, envelope BLOB NOT NULL,
        PRIMARY KEY(log, sequence)) WITHOUT ROWID;
    CREATE INDEX receipt_request ON receipt(request);
    CREATE INDEX receipt_success ON receipt(log, model) WHERE status = 1;
    CREATE TABLE charge(
        payment_key TEXT PRIMARY KEY, request BLOB NOT NULL UNIQUE, account INTEGER NOT NULL REFERENCES credit(id),
        model BLOB NOT NULL, price TEXT NOT NULL, receipt BLOB NOT NULL REFERENCES receipt(hash), at INTEGER NOT NULL
        ) WITHOUT ROWID;
    CREATE TABLE outcome(
        request BLOB NOT NULL, user BLOB NOT NULL, code TEXT, body BLOB NOT NULL, expires_at INTEGER NOT NULL,
        PRIMARY KEY(request, user));
    CREATE INDEX outcome_expiry ON outcome(expires_at);
    CREATE TABLE pulse(id INTEGER PRIMARY KEY CHECK (id = 1), at INTEGER NOT NULL);
    CREATE TRIGGER receipt_is_final BEFORE UPDATE ON receipt BEGIN SELECT RAISE(ABORT, 'append-only'); END;
    CREATE TRIGGER receipt_stays BEFORE DELETE ON receipt BEGIN SELECT RAISE(ABORT, 'append-only'); END;
    CREATE TRIGGER charge_is_final BEFORE UPDATE ON charge BEGIN SELECT RAISE(ABORT, 'append-only'); END;
    CREATE TRIGGER charge_stays BEFORE DELETE ON charge BEGIN SELECT RAISE(ABORT, 'append-only'); END;
    CREATE TRIGGER spent_is_final BEFORE UPDATE ON spent BEGIN SELECT RAISE(ABORT, 'append-only'); END;
    CREATE TRIGGER spent_stays BEFORE DELETE ON spent BEGIN SELECT RAISE(ABORT, 'append-only'); END;
    """,
    """
    CREATE TABLE login(
        digest BLOB PRIMARY KEY, nonce TEXT NOT NULL UNIQUE, user BLOB NOT NULL, origin TEXT NOT NULL,
        message TEXT NOT NULL, signature TEXT NOT NULL, expires_at INTEGER NOT NULL, seen_at INTEGER NOT NULL,
        ended INTEGER NOT NULL DEFAULT 0, keep_until INTEGER NOT NULL) WITHOUT ROWID;
    CREATE INDEX login_user ON login(user);
    CREATE INDEX login_keep ON login(keep_until);
    CREATE TABLE allowance(
        login BLOB NOT NULL, token BLOB NOT NULL, most TEXT NOT NULL, used TEXT NOT NULL DEFAULT '0',
        PRIMARY KEY(login, token)) WITHOUT ROWID;
    ALTER TABLE request ADD COLUMN login BLOB;
    """,
    # Receipts in the order in which they come, with one index whose keys are random: each of those costs a call a page.
    """
    CREATE TABLE log(id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
    INSERT INTO log(name) SELECT DISTINCT log FROM receipt;
    CREATE TABLE receipt_of_3(
        log INTEGER NOT NULL, sequence INTEGER NOT NULL, hash BLOB NOT NULL, previous BLOB NOT NULL,
        request BLOB NOT NULL, user BLOB NOT NULL, model BLOB NOT NULL, status INTEGER NOT NULL, envelope BLOB NOT NULL,
        UNIQUE(log, sequence));
    INSERT INTO receipt_of_3 SELECT log.id, sequence, hash, previous, request, user, model, status, envelope
        FROM receipt JOIN log ON log.name = receipt.log ORDER BY receipt.log, sequence;
    CREATE TABLE charge_of_3(
        payment_key TEXT PRIMARY KEY, request BLOB NOT NULL UNIQUE, account INTEGER NOT NULL REFERENCES credit(id),
        model BLOB NOT NULL, price TEXT NOT NULL, receipt BLOB NOT NULL, at INTEGER NOT NULL) WITHOUT ROWID;
    INSERT INTO charge_of_3 SELECT payment_key, request, account, model, price, receipt, at FROM charge;
    DROP TABLE charge;
    DROP TABLE receipt;
    ALTER TABLE receipt_of_3 RENAME TO receipt;
    ALTER TABLE charge_of_3 RENAME TO charge;
    CREATE INDEX receipt_request ON receipt(request);
    CREATE INDEX receipt_success ON receipt(log, model) WHERE status = 1;
    CREATE TRIGGER receipt_is_final BEFORE UPDATE ON receipt BEGIN SELECT RAISE(ABORT, 'append-only'); END;
    CREATE TRIGGER receipt_stays BEFORE DELETE ON receipt BEGIN SELECT RAISE(ABORT, 'append-only'); END;
    CREATE TRIGGER charge_is_final BEFORE UPDATE ON charge BEGIN SELECT RAISE(ABORT, 'append-only'); END;
    CREATE TRIGGER charge_stays BEFORE DELETE ON charge BEGIN SELECT RAISE(ABORT, 'append-only'); END;
    """,
    # What thousands of receipts say alike, once.
    """
    CREATE TABLE runtime(hash BLOB PRIMARY KEY, object BLOB NOT NULL) WITHOUT ROWID;
    CREATE TRIGGER runtime_is_final BEFORE UPDATE ON runtime BEGIN SELECT RAISE(ABORT, 'append-only'); END;
    CREATE TRIGGER runtime_stays BEFORE DELETE ON runtime BEGIN SELECT RAISE(ABORT, 'append-only'); END;
    """,
)
"""One step per schema version, oldest first; released steps never change."""


_Waiting = tuple[asyncio.Future[None], Callable[[], None] | None]
"""Done when a write is on disk; and what is to be called then, whether or not anybody waits any more."""


@dataclass(slots=True)
class _Held:
    """A write that came while the log was being folded back: run when that is done."""

    work: Work[Any]
    then: Callable[[Any], None] | None
    guarded: bool
    done: asyncio.Future[tuple[Any, asyncio.Future[None]]]


@dataclass(slots=True)
class _Lock:
    """An exclusive lock on a file beside the ledger, held as long as the process lives."""

    path: Path
    _fd: int = field(init=False)

    def __post_init__(self) -> None:
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise SettingsInvalid(
                f"another divault process uses this state directory ({self.path.parent}); stop it or name another",
                setting=_SETTING,
            ) from None

    def release(self) -> None:
        os.close(self._fd)


class State:
    """The open ledger file. Every method is for the one event loop that uses it; many tasks at once are welcome.

    Statements run on the loop's own thread: they touch memory and the page cache, some microseconds each, and no other
    thread has to be waited for in between. What takes long, bringing them to the disk, runs in a thread of its own,
    but for a single write to a disk that is quick.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file. Raises SettingsInvalid: in use, newer, foreign, damaged or out of reach."""
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _Lock(path.with_name(path.name + ".lock"))
        except OSError as err:
            raise _out_of_reach(path, err) from err
        with ExitStack() as undo:
            undo.callback(self._lock.release)
            self._writer = _open(path)
            undo.callback(self._writer.close)
            try:
                self._disk = _Disk(path)
            except (OSError, sqlite3.Error) as err:
                raise _out_of_reach(path, err) from err
            undo.pop_all()
        self._looked_at = _LookedAt(self._writer)
        self._open: list[_Waiting] = []
        """Who waits for the open transaction."""
        self._alone = True
        """Whether the last commit had a single write."""
        self._syncing: asyncio.Future[None] | None = None
        """Done when what was committed last is on disk; None when nothing is under way."""
        self._held: list[_Held] = []
        self.writes = 0
        """Grows with everything that is written or undone: what was looked at before is unchanged while it stands."""
        self.undone = 0
        """Grows when something that was written is undone: what a caller remembers of the rows may be wrong then."""
        self._folding = False
        self._closed = False
        self._broken = False
        self._scanning = ThreadPoolExecutor(1, thread_name_prefix="divault-state-scan")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def write(self, work: Work[T], then: Callable[[T], None] | None = None, *, guarded: bool = True) -> T:
        """The result of `work`, once what it wrote is on disk.

        Work runs at once, alone, in the order of the calls. What it raises reaches the caller and undoes what it wrote,
        nothing else. It must be short and leave the transaction alone. Cancelling the caller doesn't stop it: `then`
        gets the result once it is on disk, whether or not the caller still waits. Raises NotReady when the file can't
        be written or is closed.

        `guarded`: in a savepoint, which costs as much as a write. Only work that the disk alone can stop after its
        first write may do without: if anything else stops it, all writes of its commit are undone.
        """
        self._require_usable()
        if self._folding:
            held = _Held(work, then, guarded, asyncio.get_running_loop().create_future())
            self._held.append(held)
            answer: T
            answer, written = await held.done
        else:
            answer, written = self._run(work, then, guarded=guarded)
        await written
        return answer

    def look(self, work: Look[T]) -> T:
        """The result of `work` on one consistent view, at once. Raises NotReady, also for work that doesn't only read.

        What it sees may not be on disk yet, nor committed: a refusal may rest on it, an answer may not (`read`). For a
        few rows.
        """
        self._require_usable()
        # Nobody but this thread writes, so the view can't change under it. And this connection has the pages.
        db = self._writer
        alone = not db.in_transaction
        try:
            return work(self._looked_at)
        except sqlite3.Error as err:
            raise _unusable(err) from err
        finally:
            if not alone and not db.in_transaction:  # SQLite ends it by itself when a read finds no memory
                self._undo(sqlite3.OperationalError("a look ended the transaction"))

    async def read(self, work: Look[T]) -> T:
        """The result of `work` on one consistent view, all of which is on disk. Raises NotReady. For a few rows."""
        result = self.look(work)
        if self._open:
            seen = asyncio.get_running_loop().create_future()
            self._open.append((seen, None))
            await seen
        elif self._syncing is not None:
            await _outcome(self._syncing)
        return result

    async def scan(self, work: Work[T]) -> T:
        """The same of what is committed, in a thread with a connection of its own: for what may walk a whole table."""
        self._require_usable()
        return await asyncio.get_running_loop().run_in_executor(self._scanning, self._disk.scan, work)

    async def close(self) -> None:
        """Finish what was handed in, then close the file and let another process have it."""
        if self._closed:
            return
        while self._syncing is not None or self._open or self._held:
            self._flush()
            if self._syncing is not None:
                await asyncio.wait([self._syncing])
            await asyncio.sleep(0)
        self._closed = True
        await asyncio.to_thread(self._scanning.shutdown)
        await asyncio.to_thread(self._disk.close)
        self._writer.close()
        self._disk.forget()
        self._lock.release()

    def _require_usable(self) -> None:
        if self._closed:
            raise NotReady("the ledger is closed", retry_after=_RETRY_S)
        if self._broken:
            raise NotReady("the ledger's disk failed: the node has to be started again", retry_after=_RETRY_S)

    def _run(self, work: Work[T], then: Callable[[T], None] | None, *, guarded: bool) -> tuple[T, asyncio.Future[None]]:
        """The result of the work, and what tells when it is on disk. Raises what the work raised."""
        self.writes += 1
        try:
            if not self._writer.in_transaction:
                self._writer.execute("BEGIN IMMEDIATE")
            with _Savepoint(self._writer) if guarded else _Unguarded(self._writer) as point:
                result = work(self._writer)
        except sqlite3.Error as err:  # a full disk, a failing one: none of the writes in this transaction happened
            self._undo(err)
            raise _unusable(err) from err
        if point.error is not None:
            self.undone += 1
            self._soon()
            raise _unusable(point.error) if isinstance(point.error, sqlite3.Error) else point.error
        self._soon()
        written = asyncio.get_running_loop().create_future()
        self._open.append((written, None if then is None else partial(then, result)))
        return result, written

    def _soon(self) -> None:
        """Commit after what else runs now, so that it shares the commit."""
        if not self._open and self._syncing is None:
            asyncio.get_running_loop().call_soon(self._gather, 1, _TURNS)

    def _gather(self, had: int, turns: int) -> None:
        """Commit, unless writes still come in with every turn of the loop."""
        if turns and len(self._open) > had:
            asyncio.get_running_loop().call_soon(self._gather, len(self._open), turns - 1)
        else:
            self._flush()

    def _flush(self) -> None:
        """Commit, and bring it to the disk; while that is under way the next transaction fills."""
        if self._syncing is not None:
            return
        if not self._writer.in_transaction:
            if self._open:  # nothing ends it but this: never tell anybody that it is on disk
                self._undo(sqlite3.OperationalError("the transaction ended by itself"))
            return
        if not self._open:  # whatever was tried in it was undone
            self._writer.execute("ROLLBACK")
            return
        try:
            self._writer.execute("COMMIT")
        except sqlite3.Error as err:
            self._undo(err)
            return
        self._folding = self._disk.log_is_long()
        loop, waiting = asyncio.get_running_loop(), self._open
        self._open, alone = [], self._alone
        self._alone = len(waiting) == 1
        # One among many callers is no single one: while a thread syncs his write, theirs gather behind it.
        if alone and self._alone and not self._folding and self._disk.is_quick:
            self._synced(waiting, self._disk.sync_here())
            return
        self._syncing = loop.create_future()
        self._disk.sync(loop, lambda err: self._synced(waiting, err), fold=self._folding)

    def _undo(self, err: sqlite3.Error | OSError) -> None:
        if self._writer.in_transaction:
            self._writer.execute("ROLLBACK")
        self.writes += 1
        self.undone += 1
        failed, self._open = self._open, []
        for waiting, _ in failed:
            _fail(waiting, _unusable(err))

    def _synced(self, waiting: list[_Waiting], err: OSError | None) -> None:
        done, self._syncing = self._syncing, None
        self._folding = False
        loop = asyncio.get_running_loop()
        for one, then in (*waiting, *([(done, None)] if done is not None else [])):
            if err is not None:
                _fail(one, _unusable(err))
                continue
            if then is not None:
                loop.call_soon(then)
            if not one.done():  # else the caller was cancelled meanwhile; what was written stays written
                one.set_result(None)
        if err is not None:
            # What a disk that failed has kept of it nobody knows, and asking again would not tell.
            self._broken = True
            self._undo(err)
        held, self._held = self._held, []
        for turn in held:
            self._run_held(turn)
        self._gather(1, _TURNS)

    def _run_held(self, turn: _Held) -> None:
        try:
            self._require_usable()
            found = self._run(turn.work, turn.then, guarded=turn.guarded)
        except Exception as err:  # noqa: BLE001 - whatever the work raises is its caller's
            if not turn.done.done():
                turn.done.set_exception(err)
        else:
            if not turn.done.done():
                turn.done.set_result(found)


class _Disk:
    """The thread that brings what was committed to the disk, and the connections that are not the loop's."""

    def __init__(self, path: Path) -> None:
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._scanner = _connect(path, query_only=True)
        self._folder = _connect(path)
        self._folder.execute(f"PRAGMA busy_timeout = {_FOLD_PATIENCE_MS}")
        self._not_before = 0.0
        self._last_s = math.inf
        """How long the last sync took."""
        self._frame = int(_pragma(self._folder, "page_size")) + _FRAME_HEAD
        # Kept open until all connections are closed: to close it takes the locks on the file along that they hold.
        self._index = os.open(path.with_name(path.name + "-shm"), os.O_RDONLY | os.O_CLOEXEC)
        self._fd = os.open(path.with_name(path.name + "-wal"), os.O_RDONLY | os.O_CLOEXEC)
        os.fsync(self._fd)  # what the migrations wrote
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        os.fsync(folder)  # the names of both files
        os.close(folder)
        self._thread = threading.Thread(target=self._work, name="divault-state-sync", daemon=True)
        self._thread.start()

    def log_is_long(self) -> bool:
        """Whether the log should be folded back into the main file."""
        frames = int.from_bytes(os.pread(self._index, 4, _FRAMES_AT), sys.byteorder)
        return frames * self._frame > _LONG_LOG and time.monotonic() >= self._not_before

    @property
    def is_quick(self) -> bool:
        """Whether to wait for the disk takes no longer than to have a thread wait for it, by the last time."""
        return self._last_s < _QUICK_S

    def sync_here(self) -> OSError | None:
        """Bring everything written to the log so far to the disk; gives why it failed, if it did."""
        began = time.monotonic()
        try:
            os.fdatasync(self._fd)
        except OSError as err:
            return err
        self._last_s = time.monotonic() - began
        return None

    def sync(
        self, loop: asyncio.AbstractEventLoop, done: Callable[[OSError | None], None], *, fold: bool = False
    ) -> None:
        """Call `done` on the loop when everything written to the log so far is on disk; folds it back after that."""

        def work() -> None:
            failure = self.sync_here()
            if fold and failure is None:
                self._fold()
            with contextlib.suppress(RuntimeError):  # the loop ended, and with it everybody who waited
                loop.call_soon_threadsafe(done, failure)

        self._orders.put(work)

    def scan(self, work: Work[T]) -> T:
        """The result of the work. Raises NotReady."""
        try:
            self._scanner.execute("BEGIN")
            try:
                return work(self._scanner)
            finally:
                self._scanner.execute("ROLLBACK")
        except sqlite3.Error as err:
            raise _unusable(err) from err

    def close(self) -> None:
        """Finish what was ordered."""
        self._orders.put(None)
        self._thread.join()
        self._scanner.close()
        self._folder.close()
        os.close(self._fd)

    def forget(self) -> None:
        """Let go of what has to outlast all connections."""
        os.close(self._index)

    def _work(self) -> None:
        while (order := self._orders.get()) is not None:
            order()

    def _fold(self) -> None:
        """Copy the log into the main file, both synced by SQLite; nobody writes meanwhile, so the log begins anew.

        Its file keeps its length: to write over what is there costs half of what it costs to make a file longer.
        """
        with contextlib.suppress(sqlite3.Error):  # a full disk: the log grows, and it is tried again
            busy, _, _ = self._folder.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
            if busy:  # a long scan, which every try would wait for
                self._not_before = time.monotonic() + _FOLD_PAUSE_S


class _LookedAt:
    """The connection, for statements that only read."""

    __slots__ = ("_execute",)

    def __init__(self, db: sqlite3.Connection) -> None:
        self._execute = db.execute

    def execute(self, sql: str, parameters: Sequence[Any] = (), /) -> sqlite3.Cursor:
        """Run one statement. Raises sqlite3.OperationalError for one that may write."""
        if not sql.startswith("SELECT "):
            raise sqlite3.OperationalError("a look that may write")
        return self._execute(sql, parameters)


class _Unguarded:
    """One write without a savepoint. What it raises before it changed anything is kept as `error`."""

    __slots__ = ("_changes", "_db", "error")

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._changes = db.total_changes
        self.error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> bool:
        if error is not None and (self._db.total_changes != self._changes or not self._db.in_transaction):
            raise sqlite3.OperationalError("a write was left half done") from error
        self.error = error
        return True


class _Savepoint:
    """One write among those of a commit. What it raises is kept as `error`, and undone."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.error: BaseException | None = None

    def __enter__(self) -> Self:
        self._db.execute("SAVEPOINT job")
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> bool:
        if error is not None and not self._db.in_transaction:  # SQLite undid everything: a full disk, a failing one
            raise sqlite3.OperationalError("the transaction was rolled back") from error
        if error is not None:
            self._db.execute("ROLLBACK TO job")
        self._db.execute("RELEASE job")
        self.error = error
        return True


async def _outcome(future: asyncio.Future[None]) -> None:
    """Wait for a future that others wait for too. Raises what it was given, each caller an error of his own."""
    await asyncio.wait([future])
    try:
        future.result()
    except DivaultError as err:
        raise err.copy() from err


def _fail(future: asyncio.Future[None], error: DivaultError) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # nobody may be waiting for it


def _connect(path: Path, *, query_only: bool = False) -> sqlite3.Connection:
    """A connection in autocommit mode, so that BEGIN and COMMIT are ours."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=_RETRY_S)
    db.execute(f"PRAGMA query_only = {int(query_only)}")
    return db


def _open(path: Path) -> sqlite3.Connection:
    try:
        _prepare(path)
        db = _connect(path)
    except (OSError, sqlite3.Error) as err:
        raise _out_of_reach(path, err) from err
    try:
        _begin(db, path)
    except sqlite3.DatabaseError as err:
        db.close()
        raise (_out_of_reach(path, err) if _is_of_the_disk(err) else _damaged(path, str(err))) from err
    except DivaultError:
        db.close()
        raise
    return db


def _prepare(path: Path) -> None:
    """Create the file with the right mode, or tighten it. SQLite gives its `-wal` and `-shm` files the same mode."""
    wal = path.with_name(path.name + "-wal")
    if wal.exists() and wal.stat().st_size and not (path.exists() and path.stat().st_size):
        raise _damaged(path, "its main file is gone, its write-ahead log is still there")
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    path.chmod(0o600)


def _begin(db: sqlite3.Connection, path: Path) -> None:
    version = int(_pragma(db, "user_version"))
    tables = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    if tables and int(_pragma(db, "application_id")) != APPLICATION_ID:
        raise _damaged(path, "it is a database of another program")
    if version > len(_MIGRATIONS):
        raise SettingsInvalid(
            f"{path} was written by a newer divault (schema {version}, this one knows {len(_MIGRATIONS)}): "
            "install that version",
            setting=_SETTING,
        )
    if (found := _pragma(db, "quick_check")) != "ok":
        raise _damaged(path, str(found))
    db.execute(f"PRAGMA page_size = {_PAGE}")  # of a new file; one that has pages keeps their size
    if _pragma(db, "journal_mode = WAL") != "wal":
        raise SettingsInvalid(
            f"the ledger {path} can't be used: this file system can't keep a write-ahead log; set {_SETTING} to a "
            "folder on a local disk",
            setting=_SETTING,
        )
    # The log is synced by `_Disk` before anybody learns of a write; a checkpoint syncs both files by itself.
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute("PRAGMA wal_autocheckpoint = 0")
    db.execute(f"PRAGMA journal_size_limit = {2 * _LONG_LOG}")  # what a long scan made of it is given back
    db.execute("PRAGMA foreign_keys = ON")
    for number, step in enumerate(_MIGRATIONS[version:], version + 1):
        stamp = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {number}"
        db.executescript(f"BEGIN IMMEDIATE; {step}; {stamp}; COMMIT;")
    _make_log(db)


def _make_log(db: sqlite3.Connection) -> None:
    """Write one page, so that the write-ahead log is there; it keeps its place as long as a connection lives."""
    version = int(_pragma(db, "user_version"))
    db.executescript(f"BEGIN IMMEDIATE; PRAGMA user_version = {version}; COMMIT;")


def _pragma(db: sqlite3.Connection, name: str) -> Any:
    return db.execute(f"PRAGMA {name}").fetchone()[0]


def _unusable(err: sqlite3.Error | OSError) -> NotReady:
    error = NotReady("the ledger can't be used now; the operator's log says why", retry_after=_RETRY_S)
    error.__cause__ = err
    return error


def _damaged(path: Path, why: str) -> SettingsInvalid:
    return SettingsInvalid(
        f"the ledger {path} is damaged or not ours ({why}); nothing was changed: restore a backup, or name another "
        "state directory",
        setting=_SETTING,
    )


def _is_of_the_disk(err: sqlite3.Error) -> bool:
    """Whether it tells of the disk or its rights, and nothing of what the file holds."""
    codes = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
    return _code(err) & 0xFF in codes  # the rest of an extended code says where


def _code(err: sqlite3.Error) -> int:
    return getattr(err, "sqlite_errorcode", 0)  # what Python itself refuses has none


def _out_of_reach(path: Path, err: OSError | sqlite3.Error) -> SettingsInvalid:
    if isinstance(err, OSError):
        full, why = err.errno in (errno.ENOSPC, errno.EDQUOT), err.strerror or type(err).__name__
    else:  # the second is how a full disk shows where the log's index is made
        full, why = _code(err) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE), str(err)
    fix = "there is no room, free some" if full else f"{why}; make it writable"
    return SettingsInvalid(
        f"the ledger {path} can't be used: {fix} or set {_SETTING} to another folder", setting=_SETTING
    )
