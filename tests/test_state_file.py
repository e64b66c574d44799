# ruff: noqa: ASYNC221 - these tests have their loop to themselves
"""The ledger file: durable, exclusive, versioned, and never begun anew by itself."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import divault.state
from divault.errors import InputInvalid, NotReady, SettingsInvalid
from divault.state import Rows, State


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.sqlite3"


@pytest.fixture
async def state(path: Path) -> AsyncIterator[State]:
    async with State(path) as opened:
        yield opened


def insert(key: str):
    return lambda db: db.execute("INSERT INTO spent VALUES (1, 'transfer', ?, x'00', '5', 0)", (key,)).rowcount


def keys(db: sqlite3.Connection) -> list[str]:
    return [row[0] for row in db.execute("SELECT key FROM spent ORDER BY key")]


async def test_a_write_is_there_after_reopening(path: Path) -> None:
    async with State(path) as state:
        await state.write(insert("a"))
    async with State(path) as state:
        assert await state.read(keys) == ["a"]


async def test_a_work_that_raises_undoes_itself_and_nothing_else(state: State) -> None:
    def bad(db: sqlite3.Connection) -> None:
        insert("half")(db)
        raise InputInvalid("no")

    done = await asyncio.gather(
        state.write(insert("a")), state.write(bad), state.write(insert("b")), return_exceptions=True
    )

    assert [done[0], done[2]] == [1, 1]
    assert isinstance(done[1], InputInvalid)
    assert await state.read(keys) == ["a", "b"]


async def test_a_sql_error_of_a_work_is_typed(state: State) -> None:
    await state.write(insert("a"))
    with pytest.raises(NotReady):
        await state.write(insert("a"))
    with pytest.raises(NotReady):
        await state.read(lambda db: db.execute("INSERT INTO spent VALUES (1, 'x', 'y', x'00', '5', 0)"))

    assert await state.read(keys) == ["a"]


@pytest.mark.parametrize("what", ["the disk fails", "no memory"])
async def test_a_look_that_ends_the_transaction_takes_no_write_for_done(path: Path, what: str) -> None:
    """SQLite undoes the open transaction by itself when a read fails: who waits hears so, and nothing is stuck."""

    def look(_: Rows) -> None:
        state._writer.execute("ROLLBACK")
        raise MemoryError if what == "no memory" else sqlite3.OperationalError("disk I/O error")

    async with State(path) as state:
        told: list[int] = []
        waiting = asyncio.create_task(state.write(insert("lost"), told.append))
        await asyncio.sleep(0)
        with pytest.raises((NotReady, MemoryError)):
            state.look(look)
        other = asyncio.create_task(state.write(insert("kept")))
        with pytest.raises(NotReady):
            await waiting
        assert await other == 1
        assert await state.read(keys) == ["kept"]
        assert told == []


@pytest.mark.parametrize("how", ["INSERT INTO spent VALUES (1, 'x', 'y', x'00', '5', 0)", "ROLLBACK", "select 1"])
async def test_a_look_that_may_write_is_refused_and_disturbs_nobody(state: State, how: str) -> None:
    with pytest.raises(NotReady):
        state.look(lambda db: db.execute(how))
    assert await state.read(keys) == []
    waiting = asyncio.create_task(state.write(insert("a")))
    await asyncio.sleep(0)
    with pytest.raises(NotReady):
        state.look(lambda db: db.execute(how))
    assert await waiting == 1
    assert await state.read(keys) == ["a"]


async def test_a_write_without_a_savepoint_is_one_of_its_commit(state: State) -> None:
    await asyncio.gather(*(state.write(insert(str(n)), guarded=n % 2 == 0) for n in range(20)))
    assert len(await state.read(keys)) == 20


async def test_it_may_fail_alone_before_it_writes(state: State) -> None:
    def refuse(db: sqlite3.Connection) -> None:
        raise InputInvalid("no")

    await state.write(insert("taken"))
    done = await asyncio.gather(
        *(state.write(work, guarded=False) for work in (insert("a"), refuse, insert("b"), insert("taken"))),
        return_exceptions=True,
    )

    assert [type(one) for one in done] == [int, InputInvalid, int, NotReady]
    assert await state.read(keys) == ["a", "b", "taken"]


async def test_one_that_fails_half_done_takes_its_commit_along(state: State) -> None:
    def half(db: sqlite3.Connection) -> None:
        insert("half")(db)
        raise InputInvalid("no")

    undone = state.undone
    done = await asyncio.gather(
        state.write(insert("a")), state.write(half, guarded=False), state.write(insert("b")), return_exceptions=True
    )

    assert [type(one) for one in done] == [NotReady, NotReady, int]
    assert await state.read(keys) == ["b"]
    assert state.undone > undone


async def test_a_transaction_that_ended_by_itself_is_no_commit(path: Path) -> None:
    state = State(path)
    waiting = asyncio.create_task(state.write(insert("lost")))
    await asyncio.sleep(0)
    state._writer.execute("ROLLBACK")
    with pytest.raises(NotReady):
        await waiting
    assert await state.write(insert("kept")) == 1
    await asyncio.wait_for(state.close(), 5)


async def test_writes_that_wait_together_share_a_commit(state: State) -> None:
    commits: list[str] = []
    state._writer.set_trace_callback(lambda sql: commits.append(sql) if sql == "COMMIT" else None)
    await asyncio.gather(*(state.write(insert(str(n))) for n in range(200)))

    assert len(await state.read(keys)) == 200
    assert len(commits) <= 20


async def test_works_run_in_the_order_of_the_calls(state: State) -> None:
    seen: list[int] = []
    await asyncio.gather(*(state.write(lambda _, n=n: seen.append(n)) for n in range(300)))

    assert list(range(300)) == seen


async def test_a_cancelled_caller_does_not_stop_the_write(state: State) -> None:
    task = asyncio.create_task(state.write(insert("a")))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await state.write(lambda _: None)

    assert await state.read(keys) == ["a"]


async def test_nothing_goes_in_after_close(path: Path) -> None:
    state = State(path)
    last = asyncio.create_task(state.write(insert("last")))
    await asyncio.sleep(0)
    await state.close()
    await state.close()

    assert await last == 1
    with pytest.raises(NotReady):
        await state.write(insert("b"))
    with pytest.raises(NotReady):
        await state.read(keys)


async def test_a_failed_commit_fails_every_write_in_it(state: State) -> None:
    await state.write(insert("a"))
    state._writer.execute("PRAGMA max_page_count = 1")  # a full disk: SQLite itself rolls the transaction back
    big = "x" * 2_000_000
    done = await asyncio.gather(*(state.write(insert(key)) for key in ("b", big)), return_exceptions=True)
    state._writer.execute("PRAGMA max_page_count = 1000000")

    assert all(isinstance(one, NotReady) for one in done)
    assert await state.read(keys) == ["a"]
    assert await state.write(insert("b")) == 1


async def test_the_file_and_its_log_are_for_the_owner_alone(state: State, path: Path) -> None:
    await state.write(insert("a"))

    assert {0o600} == {stat.S_IMODE(f.stat().st_mode) for f in path.parent.iterdir()}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


async def test_the_file_is_configured(state: State) -> None:
    def pragmas(db: sqlite3.Connection) -> tuple[str, int, int]:
        return tuple(db.execute(f"PRAGMA {n}").fetchone()[0] for n in ("journal_mode", "synchronous", "foreign_keys"))

    assert await state.write(pragmas) == ("wal", 1, 1)


class SlowDisk:
    """In place of `os.fdatasync`: waits until it is let go, and may fail."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go, self.fails = threading.Event(), threading.Event(), False
        self.log = path.with_name(path.name + "-wal")
        self.synced_bytes: list[int] = []
        self._real = os.fdatasync
        monkeypatch.setattr(divault.state.os, "fdatasync", self)

    def __call__(self, fd: int) -> None:
        assert Path(f"/proc/self/fd/{fd}").resolve() == self.log.resolve()
        self.begun.set()
        assert self.go.wait(10)
        if self.fails:
            raise OSError(errno.EIO, "Input/output error")
        self._real(fd)
        self.synced_bytes.append(self.log.stat().st_size)


@pytest.fixture
def disk(state: State, path: Path, monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    return SlowDisk(path, monkeypatch)


async def begun(disk: SlowDisk) -> None:
    while not disk.begun.is_set():
        await asyncio.sleep(0.001)


async def test_nobody_learns_of_a_write_before_its_log_is_synced(state: State, disk: SlowDisk) -> None:
    writing = asyncio.create_task(state.write(insert("a")))
    await begun(disk)
    reading = asyncio.create_task(state.read(keys))
    await asyncio.sleep(0.02)
    assert not writing.done()
    assert not reading.done()
    assert state.look(keys) == ["a"]
    written = disk.log.stat().st_size
    disk.go.set()

    assert await writing == 1
    assert await reading == ["a"]
    assert disk.synced_bytes[0] == written > 0


async def test_writes_during_a_sync_are_synced_by_the_next_one(state: State, disk: SlowDisk) -> None:
    first = asyncio.create_task(state.write(insert("a")))
    await begun(disk)
    more = [asyncio.create_task(state.write(insert(str(n)))) for n in range(50)]
    await asyncio.sleep(0)
    disk.go.set()
    await asyncio.gather(first, *more)

    assert len(disk.synced_bytes) == 2


async def test_after_a_failed_sync_nothing_is_believed_until_the_next_start(
    state: State, disk: SlowDisk, path: Path
) -> None:
    disk.fails = True
    first = asyncio.create_task(state.write(insert("a")))
    await begun(disk)
    second = asyncio.create_task(state.write(insert("b")))
    third = asyncio.create_task(state.read(keys))
    await asyncio.sleep(0)
    disk.go.set()
    ends = await asyncio.gather(first, second, third, return_exceptions=True)
    disk.fails = False

    assert all(isinstance(end, NotReady) for end in ends), ends
    for attempt in (state.write(insert("c")), state.read(keys)):
        with pytest.raises(NotReady, match="started again"):
            await attempt
    await state.close()
    async with State(path) as again:
        assert await again.write(insert("c")) == 1
        assert "b" not in await again.read(keys)


class TimedDisk:
    """In place of `os.fdatasync`: takes no time or a long one, fails if told so, and notes which thread waited."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slow = self.fails = False
        self.on_loop: list[bool] = []
        monkeypatch.setattr(divault.state.os, "fdatasync", self)
        monkeypatch.setattr(divault.state, "_QUICK_S", 0.1)

    def __call__(self, fd: int) -> None:
        self.on_loop.append(threading.current_thread() is threading.main_thread())
        if self.slow:
            time.sleep(0.2)
        if self.fails:
            raise OSError(errno.EIO, "Input/output error")


async def test_readers_who_wait_for_a_sync_that_fails_have_an_error_each(state: State, disk: SlowDisk) -> None:
    disk.fails = True
    writing = asyncio.create_task(state.write(insert("a")))
    await begun(disk)
    reading = [asyncio.create_task(state.read(keys)) for _ in range(3)]
    await asyncio.sleep(0)
    disk.go.set()
    ends = await asyncio.gather(writing, *reading, return_exceptions=True)
    disk.fails = False

    assert all(isinstance(end, NotReady) for end in ends), ends
    assert len(set(map(id, ends))) == 4, "each collects the receipt of its own caller"


async def test_a_single_write_is_synced_at_once_as_long_as_the_disk_is_quick(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = TimedDisk(monkeypatch)
    for number, disk.slow in enumerate((False, False, True, False, False)):
        assert await state.write(insert(str(number))) == 1
    assert disk.on_loop == [False, True, True, False, True], "by how long the one before took"
    await asyncio.gather(*(state.write(insert(f"many {number}")) for number in range(5)))
    assert disk.on_loop[5:] == [False], "for several the loop goes on meanwhile"
    for number in range(2):
        assert await state.write(insert(f"after {number}")) == 1
    assert disk.on_loop[6:] == [False, True], "and for the next one: more may follow"


async def test_a_sync_that_fails_at_once_ends_the_ledger_like_any(
    state: State, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = TimedDisk(monkeypatch)
    assert await state.write(insert("a")) == 1
    disk.fails = True
    with pytest.raises(NotReady):
        await state.write(insert("b"))
    disk.fails = False
    assert disk.on_loop == [False, True]
    for attempt in (state.write(insert("c")), state.read(keys)):
        with pytest.raises(NotReady, match="started again"):
            await attempt
    await state.close()
    async with State(path) as again:
        assert "a" in await again.read(keys)


async def test_a_long_log_is_folded_back_and_nothing_is_lost_or_reordered(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divault.state, "_LONG_LOG", 64 << 10)
    seen: list[int] = []
    longest = 0

    async def one(state: State, number: int) -> None:
        nonlocal longest
        await state.write(lambda db: (seen.append(number), insert(f"{number:0500d}")(db)))
        longest = max(longest, path.with_name(path.name + "-wal").stat().st_size)

    async with State(path) as state:
        for start in range(0, 2000, 50):
            await asyncio.gather(*(one(state, number) for number in range(start, start + 50)))
        assert seen == list(range(2000))
        assert len(await state.scan(keys)) == 2000
    assert longest < 1 << 20


async def test_a_log_that_a_long_scan_made_long_is_given_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divault.state, "_LONG_LOG", 128 << 10)
    monkeypatch.setattr(divault.state, "_FOLD_PAUSE_S", 0.05)
    log, reading, go = path.with_name(path.name + "-wal"), threading.Event(), threading.Event()

    def scan(db: sqlite3.Connection) -> int:
        seen = len(keys(db))
        reading.set()
        go.wait(10)
        return seen

    async with State(path) as state:
        await state.write(insert("first"))
        scanning = asyncio.create_task(state.scan(scan))
        await asyncio.to_thread(reading.wait, 10)
        for number in range(600):
            await state.write(insert(f"{number:0500d}"))
        assert log.stat().st_size > 512 << 10
        go.set()
        assert await scanning == 1
        async with asyncio.timeout(10):
            while log.stat().st_size > 256 << 10:
                await state.write(insert(f"{log.stat().st_mtime_ns}"))
        assert "first" in await state.read(keys)


async def test_a_second_user_of_the_file_is_refused(state: State, path: Path) -> None:
    with pytest.raises(SettingsInvalid, match="another divault process uses this state directory"):
        State(path)
    code = f"import pathlib, divault.state; divault.state.State(pathlib.Path({str(path)!r}))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert child.returncode
    assert "SettingsInvalid: another divault process" in child.stderr
    assert await state.write(insert("still works")) == 1


async def test_the_lock_goes_with_the_process(path: Path) -> None:
    code = f"import os, pathlib, divault.state; divault.state.State(pathlib.Path({str(path)!r})); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9

    async with State(path) as state:
        assert await state.read(keys) == []


async def test_a_newer_schema_is_refused_and_left_alone(path: Path) -> None:
    await State(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    before = path.read_bytes()
    with pytest.raises(SettingsInvalid, match="newer divault"):
        State(path)

    assert before == path.read_bytes()


async def test_an_older_schema_moves_forward_with_its_rows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with State(path) as state:
        await state.write(insert("old"))
    steps = (*divault.state._MIGRATIONS, "ALTER TABLE spent ADD COLUMN note TEXT DEFAULT 'added'")
    monkeypatch.setattr(divault.state, "_MIGRATIONS", steps)
    async with State(path) as state:
        assert await state.read(lambda db: db.execute("SELECT key, note FROM spent").fetchall()) == [("old", "added")]


async def test_receipts_and_charges_of_schema_2_are_the_same_in_the_next(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = divault.state._MIGRATIONS
    monkeypatch.setattr(divault.state, "_MIGRATIONS", steps[:2])
    row = "SELECT sequence, hash, previous, request, user, model, status, envelope FROM receipt ORDER BY hash"
    async with State(path) as state:

        def rows(db: sqlite3.Connection) -> None:
            db.execute("INSERT INTO credit VALUES (1, 1, x'', x'', x'', '0', '0', 0)")
            for number in range(60):
                names = (f"log {number % 2}", number // 2, bytes([number]), b"p", bytes([number, 1]), b"u", b"m", b"{}")
                db.execute("INSERT INTO receipt VALUES (?, ?, ?, ?, ?, ?, ?, 1, ?)", names)
                db.execute(
                    "INSERT INTO charge VALUES (?, ?, 1, x'', '1', ?, 0)", (str(number), bytes([number]), names[2])
                )

        await state.write(rows)
        before = await state.read(lambda db: db.execute(row).fetchall())
    monkeypatch.setattr(divault.state, "_MIGRATIONS", steps)
    async with State(path) as state:
        assert await state.read(lambda db: db.execute(row).fetchall()) == before
        charged = await state.read(lambda db: db.execute("SELECT count(*) FROM charge JOIN receipt ON receipt = hash"))
        logs = await state.read(
            lambda db: db.execute(
                "SELECT name, count(*), max(sequence) FROM receipt JOIN log ON log.id = log GROUP BY name"
            ).fetchall()
        )
        assert charged.fetchone() == (60,)
        assert logs == [("log 0", 30, 29), ("log 1", 30, 29)]
        with pytest.raises(NotReady):
            await state.write(lambda db: db.execute("DELETE FROM receipt"))


async def test_a_migration_that_fails_leaves_the_old_schema(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with State(path) as state:
        await state.write(insert("old"))
    steps = divault.state._MIGRATIONS
    monkeypatch.setattr(divault.state, "_MIGRATIONS", (*steps, "CREATE TABLE extra(x); CREATE TABLE spent(x)"))
    with pytest.raises(SettingsInvalid):
        State(path)
    monkeypatch.setattr(divault.state, "_MIGRATIONS", steps)
    async with State(path) as state:
        assert await state.read(keys) == ["old"]


@pytest.mark.parametrize("damage", ["not a database" * 300, "", "pages"])
async def test_a_damaged_file_is_refused_and_left_alone(path: Path, damage: str) -> None:
    async with State(path) as state:
        await asyncio.gather(*(state.write(insert(f"{n:0200d}")) for n in range(400)))
    content = bytearray(path.read_bytes())
    if damage == "":
        path.with_name(path.name + "-wal").write_bytes(b"frames")
        path.unlink()
    elif damage == "pages":
        content[4096:] = b"\xa5" * (len(content) - 4096)
        path.write_bytes(content)
    else:
        path.write_bytes(damage.encode())
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(SettingsInvalid, match="nothing was changed"):
        State(path)

    assert before == (path.read_bytes() if path.exists() else None)


async def test_a_database_of_another_program_is_refused(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE photos(x)")
    db.close()
    with pytest.raises(SettingsInvalid, match="another program"):
        State(path)


async def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsInvalid, match="can't be used"):
        State(tmp_path / "file" / "ledger.sqlite3")
    (tmp_path / "ledger.sqlite3").mkdir()
    with pytest.raises(SettingsInvalid, match="can't be used"):
        State(tmp_path / "ledger.sqlite3")


@pytest.mark.parametrize("code", ["SQLITE_FULL", "SQLITE_IOERR_SHMSIZE"])
async def test_a_full_disk_is_not_taken_for_a_damaged_ledger(
    code: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is what a full disk is called where the index of the log is made."""
    with monkeypatch.context() as patched:
        patched.setattr(divault.state, "_begin", failing(code))
        with pytest.raises(SettingsInvalid, match=r"there is no room, free some or set DIVAULT_STATE_DIR") as caught:
            State(path)

    assert "damaged" not in caught.value.detail
    await State(path).close()


async def test_a_new_file_that_finds_no_room_is_told_as_that(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = divault.state._connect

    def full(path: Path, *, query_only: bool = False) -> sqlite3.Connection:
        db = connect(path, query_only=query_only)
        db.execute("PRAGMA max_page_count = 1")
        return db

    with monkeypatch.context() as patched:
        patched.setattr(divault.state, "_connect", full)
        with pytest.raises(SettingsInvalid, match="there is no room"):
            State(path)

    await State(path).close()


@pytest.mark.parametrize(
    ("code", "words"), [("SQLITE_IOERR_READ", "can't be used"), ("SQLITE_CORRUPT", "nothing was changed")]
)
def test_a_disk_that_fails_is_told_from_a_file_that_is_damaged(
    code: str, words: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divault.state, "_begin", failing(code))
    with pytest.raises(SettingsInvalid, match=words) as caught:
        State(path)

    assert "no room" not in caught.value.detail


async def test_a_disk_that_takes_no_sync_keeps_the_ledger_closed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(divault.state.os, "fsync", full)
        with pytest.raises(SettingsInvalid, match="there is no room"):
            State(path)

    await State(path).close()


def failing(code: str):
    """In place of what opens the file's content."""

    def fail(*_: object) -> None:
        error = sqlite3.DatabaseError if code == "SQLITE_CORRUPT" else sqlite3.OperationalError
        err = error("as SQLite says it")
        err.sqlite_errorcode = getattr(sqlite3, code)
        raise err

    return fail


@pytest.mark.parametrize("table", ["receipt", "charge", "spent"])
@pytest.mark.parametrize("change", ["DELETE FROM {}", "UPDATE {} SET request = x'00'"])
async def test_money_and_receipts_are_append_only(state: State, table: str, change: str) -> None:
    def rows(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO credit VALUES (1, 1, x'', x'', x'', '0', '0', 0)")
        db.execute("INSERT INTO receipt VALUES ('log', 0, x'01', x'', x'', x'', x'', 1, x'')")
        db.execute("INSERT INTO charge VALUES ('key', x'', 1, x'', '1', x'01', 0)")
        insert("a")(db)

    await state.write(rows)
    with pytest.raises(NotReady) as caught:
        await state.write(lambda db: db.execute(change.format(table)))

    assert "append-only" in str(caught.value.__cause__)
