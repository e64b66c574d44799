"""What the node must never forget, in one SQLite file: nonces, credit, charges, receipts, answers.

Rules:

1. One process owns the file (a lock beside it says so), and in it one thread writes. The file is readable by its owner
   only.
2. WAL with `synchronous=FULL`: a write is on disk before anybody learns its result. Writes that arrive while the disk
   is busy share the next commit, each in a savepoint of its own, so that one that fails takes no other with it.
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
import fcntl
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from divault.errors import DivaultError, NotReady, SettingsInvalid

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]

APPLICATION_ID = 0x44495641  # "DIVA" in the file's header: tells our file from any other SQLite database
_BATCH = 256  # writes per commit; signing 256 receipts takes about 30 ms, the longest anybody waits for the others
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
)
"""One step per schema version, oldest first; released steps never change."""


@dataclass(slots=True)
class _Job(Generic[T]):
    work: Work[T]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[T]
    result: T | None = None
    error: BaseException | None = None

    def settle(self) -> None:
        if self.future.done():  # the caller was cancelled meanwhile; what was written stays written
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)  # type: ignore[arg-type]  # a job without an error has its result


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
    """The open ledger file. Every method is safe to call from many tasks at once."""

    def __init__(self, path: Path) -> None:
        """Open or create the file. Raises SettingsInvalid: in use, newer, foreign, damaged or out of reach."""
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _Lock(path.with_name(path.name + ".lock"))
        except OSError as err:
            raise _out_of_reach(path, err.strerror or type(err).__name__) from err
        with ExitStack() as undo:
            undo.callback(self._lock.release)
            self._writer = _open(path)
            undo.callback(self._writer.close)
            self._reader = _connect(path, query_only=True)
            undo.pop_all()
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._closed = False
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="divault-state-read")
        self._writing = threading.Thread(target=self._write_all, name="divault-state-write", daemon=True)
        self._writing.start()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def write(self, work: Work[T]) -> T:
        """The result of `work`, once what it wrote is on disk.

        Work runs in the writer thread, alone, in the order of the calls. What it raises reaches the caller and undoes
        what it wrote, nothing else. It must be short and leave the transaction alone. Cancelling the caller doesn't
        stop it. Raises NotReady when the file can't be written or is closed.
        """
        if self._closed:
            raise NotReady("the ledger is closed", retry_after=_RETRY_S)
        loop = asyncio.get_running_loop()
        job: _Job[T] = _Job(work, loop, loop.create_future())
        self._jobs.put(job)
        return await job.future

    async def read(self, work: Work[T]) -> T:
        """The result of `work` on one consistent, committed view. Raises NotReady."""
        if self._closed:
            raise NotReady("the ledger is closed", retry_after=_RETRY_S)
        result: T = await asyncio.get_running_loop().run_in_executor(self._reading, self._read, work)
        return result

    async def close(self) -> None:
        """Finish what was handed in, then close the file and let another process have it."""
        if self._closed:
            return
        self._closed = True
        self._jobs.put(None)
        await asyncio.to_thread(self._writing.join)
        await asyncio.to_thread(self._reading.shutdown)
        self._reader.close()
        self._writer.close()
        self._lock.release()

    def _read(self, work: Work[T]) -> T:
        try:
            self._reader.execute("BEGIN")
            try:
                result = work(self._reader)
            finally:
                self._reader.execute("ROLLBACK")
        except sqlite3.Error as err:
            raise _unusable(err) from err
        return result

    def _write_all(self) -> None:
        job = self._jobs.get()
        while job is not None:
            batch = [job]
            # This thread is the only one that takes, so a queue that isn't empty can't make it wait.
            while len(batch) < _BATCH and not self._jobs.empty() and (job := self._jobs.get()) is not None:
                batch.append(job)
            self._commit(batch)
            _settle(batch)
            job = self._jobs.get() if job is not None else None

    def _commit(self, batch: Sequence[_Job[Any]]) -> None:
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            for job in batch:
                self._run(job)
            self._writer.execute("COMMIT")
        except sqlite3.Error as err:  # a full disk, a failing one: none of these writes happened
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            for job in batch:
                job.error = _unusable(err)

    def _run(self, job: _Job[Any]) -> None:
        with _Savepoint(self._writer) as point:
            job.result = job.work(self._writer)
        if point.error is not None:
            job.error = _unusable(point.error) if isinstance(point.error, sqlite3.Error) else point.error


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


def _settle(batch: Sequence[_Job[Any]]) -> None:
    loops: dict[asyncio.AbstractEventLoop, list[_Job[Any]]] = {}
    for job in batch:
        loops.setdefault(job.loop, []).append(job)
    for loop, jobs in loops.items():
        try:
            loop.call_soon_threadsafe(_settle_here, jobs)
        except RuntimeError:  # the loop ended, and with it everybody who waited
            continue


def _settle_here(jobs: Sequence[_Job[Any]]) -> None:
    for job in jobs:
        job.settle()


def _connect(path: Path, *, query_only: bool = False) -> sqlite3.Connection:
    """A connection in autocommit mode, so that BEGIN and COMMIT are ours."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=_RETRY_S)
    db.execute(f"PRAGMA query_only = {int(query_only)}")
    return db


def _open(path: Path) -> sqlite3.Connection:
    try:
        _prepare(path)
        db = _connect(path)
    except OSError as err:
        raise _out_of_reach(path, err.strerror or type(err).__name__) from err
    except sqlite3.Error as err:
        raise _out_of_reach(path, str(err)) from err
    try:
        _begin(db, path)
    except sqlite3.DatabaseError as err:
        db.close()
        raise _damaged(path, str(err)) from err
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
    if _pragma(db, "journal_mode = WAL") != "wal":
        raise _out_of_reach(path, "this file system can't keep a write-ahead log")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = ON")
    for number, step in enumerate(_MIGRATIONS[version:], version + 1):
        stamp = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {number}"
        db.executescript(f"BEGIN IMMEDIATE; {step}; {stamp}; COMMIT;")


def _pragma(db: sqlite3.Connection, name: str) -> Any:
    return db.execute(f"PRAGMA {name}").fetchone()[0]


def _unusable(err: sqlite3.Error) -> NotReady:
    error = NotReady("the ledger can't be used now; the operator's log says why", retry_after=_RETRY_S)
    error.__cause__ = err
    return error


def _damaged(path: Path, why: str) -> SettingsInvalid:
    return SettingsInvalid(
        f"the ledger {path} is damaged or not ours ({why}); nothing was changed: restore a backup, or name another "
        "state directory",
        setting=_SETTING,
    )


def _out_of_reach(path: Path, why: str) -> SettingsInvalid:
    return SettingsInvalid(f"the ledger {path} can't be used: {why}", setting=_SETTING)
