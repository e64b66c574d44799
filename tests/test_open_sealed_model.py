"""A verified blob becomes sealed memory files, or a typed error and nothing at all."""

from __future__ import annotations

import asyncio
import base64
import fcntl
import hashlib
import mmap
import os
import signal
import sys
from pathlib import Path

import pytest

from divault.errors import (
    BadRequest,
    DeadlineExceeded,
    ModelFailed,
    Overloaded,
    SealedFileDamaged,
    StorageFailed,
    TooLarge,
    UnsupportedModel,
    WrongKey,
)
from divault.values import Grant, Secret, VerifiedBlob
from divault.vault.age import Identity, Passphrase
from divault.vault.armor import BEGIN, END
from divault.vault.keys import CallerKey, NodeIdentity
from divault.workers.opening import Opener
from tests.sealed_models import (
    ME,
    blob,
    contents,
    grant,
    lighthouse_sealed,
    memory_files_at_hand,
    sealed,
    tar_of,
)

NODE = [NodeIdentity(ME)]


@pytest.fixture
def opener():
    opener = Opener(max_model_bytes=300_000_000, timeout_s=60)
    yield opener
    opener.close()


@pytest.fixture(autouse=True)
def no_memory_file_is_left_behind():
    before = memory_files_at_hand()
    yield
    assert memory_files_at_hand() == before


def caller(text: str) -> list[CallerKey]:
    return [CallerKey(Secret.of_text(text))]


async def test_one_file_opens_with_name_size_and_fingerprint(opener, tmp_path):
    plain = os.urandom(200_000)
    opened = await opener.open(file := blob(tmp_path, sealed(plain)), grant(), NODE)

    assert (grant().model.model, file.cid) == (opened.model, opened.cid)
    assert hashlib.sha256(plain).digest() == opened.plaintext_sha256.raw
    assert (len(plain), ["model"]) == (opened.size, [f.name for f in opened.files])
    assert {"model": plain} == contents(opened)


async def test_tar_opens_as_one_memory_file_per_member(opener, tmp_path):
    files = {"config.json": b"{}", "empty.txt": b"", "deep/er/weights.bin": os.urandom(9_000_001)}
    archive = tar_of(files.items())

    opened = await opener.open(blob(tmp_path, sealed(archive)), grant(), NODE)

    assert hashlib.sha256(archive).digest() == opened.plaintext_sha256.raw
    assert sum(map(len, files.values())) == opened.size
    assert files == contents(opened)


async def test_memory_files_can_never_be_changed(opener, tmp_path):
    opened = await opener.open(blob(tmp_path, sealed(b"x" * 5000)), grant(), NODE)
    (file,) = opened.files

    assert fcntl.fcntl(file.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    with pytest.raises(PermissionError):
        os.pwrite(file.fd, b"y", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(file.fd, 0)
    with pytest.raises(PermissionError):
        mmap.mmap(file.fd, 5000)
    with pytest.raises(PermissionError):
        fcntl.fcntl(file.fd, fcntl.F_ADD_SEALS, 0)
    again = os.open(f"/proc/self/fd/{file.fd}", os.O_RDONLY)
    os.close(again)
    assert contents(opened) == {"model": b"x" * 5000}


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 8 * 65536, 8 * 65536 + 1, 17 * 65536])
async def test_sizes_around_chunk_and_batch_boundaries(opener, tmp_path, size):
    plain = os.urandom(size)

    for data, sources in (
        (sealed(plain), NODE),
        (lighthouse_sealed(plain, b"k"), caller("k")),
    ):
        opened = await opener.open(blob(tmp_path, data), grant(), sources)
        assert hashlib.sha256(plain).digest() == opened.plaintext_sha256.raw
        assert {"model": plain} == contents(opened)


async def test_caller_may_bring_identity_passphrase_or_lighthouse_key(opener, tmp_path):
    mine = Identity.generate()
    by_identity = blob(tmp_path, sealed(b"one", mine.recipient))
    by_passphrase = blob(tmp_path, sealed(b"two", Passphrase(Secret(b"open sesame"), work_factor=10)))
    by_key = blob(tmp_path, lighthouse_sealed(b"three", b"ab" * 32))

    for file, key, plain in (
        (by_identity, mine.reveal_text(), b"one"),
        (by_passphrase, "open sesame", b"two"),
        (by_key, "ab" * 32, b"three"),
    ):
        assert {"model": plain} == contents(await opener.open(file, grant(), [*NODE, *caller(key)]))
        for wrong in ("other words", Identity.generate().reveal_text()):
            with pytest.raises(WrongKey) as caught:
                await opener.open(file, grant(), [*NODE, *caller(wrong)])
            assert {"cid": file.cid.text} == caught.value.data
        with pytest.raises(WrongKey):
            await opener.open(file, grant(), NODE)


async def test_one_of_several_nodes_opens_it(opener, tmp_path):
    others = [Identity.generate().recipient for _ in range(5)]
    file = blob(tmp_path, sealed(b"shared", *others, ME.recipient))

    assert contents(await opener.open(file, grant(), NODE)) == {"model": b"shared"}


async def test_armored_file_opens(opener, tmp_path):
    plain = os.urandom(300_000)
    text = base64.b64encode(sealed(plain))
    lines = b"\n".join(text[i : i + 64] for i in range(0, len(text), 64))

    opened = await opener.open(blob(tmp_path, BEGIN + b"\n" + lines + b"\n" + END + b"\n"), grant(), NODE)

    assert {"model": plain} == contents(opened)
    with pytest.raises(SealedFileDamaged) as caught:
        await opener.open(blob(tmp_path, BEGIN + b"\n" + lines), grant(), NODE)
    assert caught.value.data["stage"] == "armor"


async def test_armored_file_over_the_limit_is_stopped_on_the_way(tmp_path):
    opener = Opener(max_model_bytes=100_000, timeout_s=60)
    text = base64.b64encode(sealed(bytes(150_000)))
    lines = b"\n".join(text[i : i + 64] for i in range(0, len(text), 64))

    with pytest.raises(TooLarge) as caught:
        await opener.open(blob(tmp_path, BEGIN + b"\n" + lines + b"\n" + END), grant(), NODE)

    assert caught.value.data["limit_bytes"] == 100_000


async def test_size_is_refused_before_a_key_is_tried(tmp_path):
    opener = Opener(max_model_bytes=99_999, timeout_s=60)
    file = blob(tmp_path, sealed(bytes(100_000)))

    with pytest.raises(TooLarge) as caught:
        await opener.open(file, grant(), [])
    assert caught.value.data == {"limit_bytes": 99_999, "have_bytes": 100_000, "limit": "model"}
    opened = await Opener(max_model_bytes=100_000, timeout_s=60).open(file, grant(), NODE)
    assert len(contents(opened)["model"]) == 100_000


@pytest.mark.parametrize("data", [b"", b"age", b"x" * 43, b"age-encryption.org/v2\n" + bytes(60)])
async def test_what_is_no_sealed_file_is_damaged_at_the_header(opener, tmp_path, data):
    with pytest.raises(SealedFileDamaged) as caught:
        await opener.open(blob(tmp_path, data), grant(), [*NODE, *caller("k")])

    assert caught.value.data["stage"] == "header"


async def test_unusable_tar_is_named_and_leaves_nothing(opener, tmp_path):
    bad = tar_of([("a", b"1"), ("../b", b"2")])

    with pytest.raises(UnsupportedModel) as caught:
        await opener.open(blob(tmp_path, sealed(bad)), grant(), NODE)
    assert caught.value.data["seen"] == "tar with an unsafe name"


async def test_compressed_tar_is_refused_and_compressed_model_is_not(opener, tmp_path):
    import gzip

    compressed = gzip.compress(tar_of([("a", b"1")]))
    with pytest.raises(UnsupportedModel) as caught:
        await opener.open(blob(tmp_path, sealed(compressed)), grant(), NODE)
    assert caught.value.data["seen"] == "tar.gz"

    model = gzip.compress(b"a pickle, say")
    assert {"model": model} == contents(await opener.open(blob(tmp_path, sealed(model)), grant(), NODE))


async def test_file_that_left_the_cache_is_a_storage_error(opener, tmp_path):
    file = blob(tmp_path, sealed(b"x"))
    file.path.unlink()
    with pytest.raises(StorageFailed):
        await opener.open(file, grant(), NODE)

    file.path.write_bytes(b"another length")
    with pytest.raises(StorageFailed):
        await opener.open(file, grant(), NODE)

    file.path.unlink()
    file.path.symlink_to("/etc/hostname")
    with pytest.raises(StorageFailed):
        await opener.open(file, grant(), NODE)


@pytest.mark.parametrize("text", ["", "x" * 4097])
def test_caller_key_has_bounds(text):
    with pytest.raises(BadRequest):
        CallerKey(Secret.of_text(text))


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def owner_of(pid: int) -> int:
    """Root's for a process that is not dumpable, whoever runs it."""
    return Path(f"/proc/{pid}/maps").stat().st_uid


# --- the process ---------------------------------------------------------------------------------------------------


def children() -> set[int]:
    """Of the main thread, in which the tests' loop runs."""
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


async def the_child(before: set[int]) -> int:
    """The opening process, as soon as it is confined: it takes no order before that."""
    for _ in range(5000):
        for pid in children() - before:
            status = proc(pid, "status")
            if "Seccomp:\t2" in status:
                return pid
        await asyncio.sleep(0.001)
    raise AssertionError("no opening process was seen")


_started: list[tuple[list[str], dict[str, str]]] = []
_watch = {"on": False}


def _hook(event: str, args: tuple) -> None:
    if _watch["on"] and event == "subprocess.Popen":
        _started.append((list(args[1]), dict(args[3])))


sys.addaudithook(_hook)


@pytest.fixture
def starts():
    """Arguments and environment of every process that the test starts, as the interpreter reports them."""
    _started.clear()
    _watch["on"] = True
    yield _started
    _watch["on"] = False


async def test_no_key_in_arguments_or_environment(opener, tmp_path, starts):
    mine = Identity.generate()
    file = blob(tmp_path, sealed(b"x", mine.recipient))
    contents(await opener.open(file, grant(), caller(mine.reveal_text())))

    ((arguments, environment),) = starts
    assert {"PATH", "LANG"} == set(environment)
    told = " ".join(arguments) + " ".join(environment.values())
    assert "AGE-SECRET" not in told.upper()
    assert len(told) < 500
    assert all(part.isdigit() for part in arguments[-2:])


async def test_process_has_given_up_what_it_does_not_need(opener, tmp_path):
    big = blob(tmp_path, sealed(bytes(120_000_000)))
    before = children()
    task = asyncio.create_task(opener.open(big, grant(), NODE))
    pid = await the_child(before)
    os.kill(pid, signal.SIGSTOP)
    limits = {line[:26].strip(): line[26:].split() for line in proc(pid, "limits").splitlines()[1:]}
    status = dict(line.split(":\t", 1) for line in proc(pid, "status").splitlines())
    owner = owner_of(pid)
    session = os.getsid(pid)
    plaintext_seen = memory_files_at_hand()
    os.kill(pid, signal.SIGCONT)
    opened = await task
    contents(opened)

    assert limits["Max core file size"][:2] == ["0", "0"]
    assert int(limits["Max address space"][0]) <= 1 << 30
    assert int(limits["Max open files"][0]) < 200
    assert {status[name].strip() for name in ("CapInh", "CapPrm", "CapEff")} == {"0" * 16}
    assert (status["NoNewPrivs"].strip(), status["Seccomp"].strip()) == ("1", "2")
    assert (owner, session, plaintext_seen) == (0, pid, [])
    assert children() == before


async def test_killed_process_is_a_typed_error_and_leaves_nothing(opener, tmp_path):
    big = blob(tmp_path, sealed(bytes(120_000_000)))
    before, open_before = children(), open_descriptors()
    task = asyncio.create_task(opener.open(big, grant(), NODE))
    os.kill(await the_child(before), signal.SIGKILL)

    with pytest.raises(ModelFailed) as caught:
        await task

    assert caught.value.data["kind"] == "opening"
    assert (children(), open_before) == (before, open_descriptors())


async def test_time_limit_kills_the_process(tmp_path):
    opener = Opener(max_model_bytes=10**9, timeout_s=0.02)
    file = blob(tmp_path, sealed(bytes(20_000_000)))
    before, open_before = children(), open_descriptors()

    with pytest.raises(DeadlineExceeded):
        await opener.open(file, grant(), NODE)

    assert (children(), open_before) == (before, open_descriptors())


async def test_cancelling_kills_the_process(opener, tmp_path):
    file = blob(tmp_path, sealed(bytes(120_000_000)))
    before, open_before = children(), open_descriptors()
    task = asyncio.create_task(opener.open(file, grant(), NODE))
    await the_child(before)
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task

    assert (children(), open_before) == (before, open_descriptors())


async def test_failures_leave_no_descriptor(opener, tmp_path):
    good = sealed(bytes(200_000))
    files = [good[:-1], good + b"x", good[:90_000] + b"\x00\x01" + good[90_002:], lighthouse_sealed(b"x" * 9, b"k")]
    open_before = open_descriptors()

    for data in files:
        with pytest.raises((SealedFileDamaged, WrongKey)):
            await opener.open(blob(tmp_path, data), grant(), [*NODE, *caller("wrong")])
        assert memory_files_at_hand() == []

    assert open_before == open_descriptors()


async def test_many_at_once_open_and_the_loop_stays_responsive(opener, tmp_path):
    blobs = [blob(tmp_path, sealed(bytes([n]) * 3000)) for n in range(8)]
    slow = blob(tmp_path, sealed(b"slow", Passphrase(Secret(b"pw"), work_factor=15)))

    opened = await asyncio.gather(
        opener.open(slow, grant(), caller("pw")), *(opener.open(b, grant(), NODE) for b in blobs)
    )

    assert [b"slow", *(bytes([n]) * 3000 for n in range(8))] == [contents(o)["model"] for o in opened]


class CountingSource:
    """A key source that sees how many derivations run at a time."""

    def __init__(self) -> None:
        self.running = self.most = 0

    def unwrap(self, header: bytes, grant: Grant | None) -> Secret | None:
        self.running += 1
        self.most = max(self.most, self.running)
        os.sched_yield()
        key = CallerKey(Secret(b"k")).unwrap(header, grant)
        self.running -= 1
        return key


async def test_derivations_run_one_at_a_time(opener, tmp_path):
    files: list[VerifiedBlob] = [blob(tmp_path, lighthouse_sealed(bytes([n]), b"k")) for n in range(4)]
    source = CountingSource()

    for opened in await asyncio.gather(*(opener.open(file, grant(), [source]) for file in files)):
        contents(opened)

    assert source.most == 1


def test_error_classes_a_process_may_report_are_few():
    from divault.workers.opening import _EXPECTED

    assert {WrongKey, SealedFileDamaged, UnsupportedModel, TooLarge, Overloaded} == set(_EXPECTED)
