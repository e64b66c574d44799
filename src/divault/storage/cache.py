"""Ciphertext on the disk: bounded, private, and verified again whenever it is read.

An entry is two files: the content, and beside it the dag-pb nodes of its DAG (`.nodes`), so that every leaf can be
hashed again without asking anybody. Both are written under `.part` names and renamed when the DAG is complete, nodes
first: a file under its final name is complete.

Rules:

1. Key: codec and multihash. The two spellings of a CID share an entry; the same block read as raw or dag-pb does not.
2. Directory 0700, files 0600.
3. Content, nodes and unfinished parts together stay under `max_bytes`: the least recently used go first.
4. Nothing in use goes: readers and writers hold a lock (flock) on the content file, also across processes.
5. A part that a dead process left is taken over: what is verified in it need not be fetched again.
6. Plaintext never comes here.

A directory has an entry of its own (`.folder`): its dag-pb blocks as a CAR. The files in it are entries like any other.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import struct
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from divault.errors import ContentInvalid, HashMismatch, InvalidCID, SettingsInvalid, StorageFailed
from divault.ipfs.cid import RAW, make_cid, multihash, split_cid
from divault.ipfs.limits import Limits
from divault.ipfs.verifier import Shell, Verifier, Wanted, check_block
from divault.machine import cores
from divault.storage.threads import background_pool
from divault.values import Cid

Bytes = bytes | bytearray | memoryview
_NODES = ".nodes"
_PART = ".part"
_FOLDER = ".folder"
HASHERS = min(4, cores())
"""Threads that verify one cached file: sha256 releases the interpreter, so each core adds its 1.7 GiB/s."""
_TELL_BYTES = 4 << 20
"""So much more verified is worth waking whoever waits for it; the end is told in any case."""
_NODES_SHARE = 2048
"""Room for nodes: they take a twenty-thousandth of a file in the default profile, and ten times that in the oldest."""
_RECORD = struct.Struct(">BIII")
"""Of a node: lengths of multihash, head and tail, and how many bytes of the file stand between the two."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What the cache holds: bytes (nodes and parts included), complete entries, and the bound."""

    bytes: int
    entries: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Freed:
    """What a removal did: entries and bytes that went (unfinished parts count as bytes), and how many are in use."""

    entries: int
    bytes: int
    in_use: int


@dataclass(frozen=True, slots=True)
class Content:
    """A file of the cache with its nodes: bytes, and when it was used last (unix seconds)."""

    path: Path
    size: int
    used_at: float

    @property
    def partial(self) -> bool:
        """It is not complete, and may be gone on with."""
        return self.path.name.endswith(_PART)

    @property
    def folder(self) -> bool:
        """It is a directory's list of files."""
        return self.path.name.endswith(_FOLDER)

    @property
    def in_use(self) -> bool:
        """Somebody reads or writes it now."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    @property
    def cid(self) -> Cid | None:
        """What it holds, in version 1; None for the name of an inline content."""
        codec, _, spelled = self.path.name.partition(".")[0].partition("-")
        try:
            parts, _ = split_cid(bytes([1, int(codec, 16)]) + bytes.fromhex(spelled))
        except (ValueError, InvalidCID):
            return None
        return make_cid(1, parts.codec, parts.hash_code, parts.digest)


class CiphertextCache:
    """A directory of verified files. Several processes may share it."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        """Makes the directory where it does not exist. Raises SettingsInvalid."""
        self._directory, self.max_bytes = directory, max_bytes
        self._lock = threading.Lock()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)
        except OSError as err:
            raise SettingsInvalid(
                f"the model cache can't be used: {err.strerror}; name a directory of this user",
                setting="MODEL_CACHE_DIR",
            ) from err

    def open(
        self, cid: Cid, limits: Limits, moved: Callable[[OnDisk], object] | None = None, *, touch: bool = True
    ) -> Entry | None:
        """The entry, locked and every byte verified just now; None when there is none.

        A damaged one is removed, so None too. Blocking: hashes at about 1.5 GiB/s and core. `moved` is told, from the
        threads that hash, whenever more of the file is verified. `touch`: it counts as used.
        """
        path = self._path(cid)
        fd = _lock_shared(path)
        if fd is None:
            return None
        checked = _Checked(fd, os.fstat(fd).st_size)
        # Who was told of it may copy its descriptor at any moment: that of a damaged file is closed when nobody has it.
        unlock = weakref.finalize(checked, os.close, fd)
        try:
            verifier = Verifier(cid, checked, limits)
            restore(verifier, checked, _read_nodes(path)[0], moved)
        except (ContentInvalid, OSError):
            verifier = None
        if verifier is None or not verifier.complete or verifier.size != checked.size:
            self._discard(path)
            return None
        if touch:
            os.utime(fd)
        unlock.detach()
        return Entry(path, checked.size, fd)

    def begin(self, cid: Cid) -> Part:
        """A place for the content to be written to, perhaps with some of it from an earlier try.

        Raises StorageFailed (`disk`).
        """
        path = self._path(cid)
        with _disk_errors():
            fd = _lock_exclusive(path.with_name(path.name + _PART))
            if fd is not None:
                return Part(self, path, path.with_name(path.name + _PART), fd)
            alone = path.with_name(f"{path.name}.{secrets.token_hex(4)}{_PART}")  # another process is at the usual one
            fd = _lock_exclusive(alone)
            if fd is None:
                raise StorageFailed("the cache can't lock its files", reason="disk")
            return Part(self, path, alone, fd)

    def folder(self, cid: Cid) -> bytes | None:
        """The CAR of a directory's blocks that was kept, unverified; None when there is none. Blocking."""
        path = self._path(cid).with_suffix(_FOLDER)
        try:
            with path.open("rb") as file:
                os.utime(file.fileno())
                return file.read()
        except OSError:
            return None

    def keep_folder(self, cid: Cid, car: bytes | None) -> None:
        """Keep the verified blocks of a directory, or drop what is kept (None). Raises StorageFailed. Blocking."""
        path = self._path(cid).with_suffix(_FOLDER)
        if car is None:
            self._discard(path)
            return
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}{_PART}")
        with _disk_errors(), self._changing():
            self._make_room(len(car), part)
            try:
                with os.fdopen(_append(part), "wb") as file:
                    file.write(car)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)

    def take_room(self, part: Part, size: int) -> None:
        """Evict until the part has room for `size` bytes, and take it. Raises StorageFailed (`cache_full`, `disk`)."""
        with _disk_errors(), self._changing():
            self._make_room(size + size // _NODES_SHARE, part.path)
            os.ftruncate(part.fd, size)
            if size:
                _allocate(part.fd, size)

    def _make_room(self, size: int, but: Path) -> None:
        files = sorted(self.contents(but), key=lambda file: file.used_at)
        total = sum(file.size for file in files)
        for file in files:
            if total + size <= self.max_bytes:
                return
            if _remove_unused(file.path):
                total -= file.size
        if total + size > self.max_bytes:
            raise StorageFailed(
                f"{size} bytes don't fit into the cache of {self.max_bytes}, of which {total} are in use; raise its"
                " bound or unload models",
                reason="cache_full",
            )

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """One thread of one process at a time decides what goes and what comes, so that the bound holds for all."""
        with self._lock:
            fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                yield
            finally:
                os.close(fd)

    def clear(self) -> Freed:
        """Remove everything that is not in use, and say what went. Blocking. Raises StorageFailed (`disk`)."""
        with _disk_errors(), self._changing():
            return self.remove(list(self.contents()))

    def remove(self, files: Sequence[Content]) -> Freed:
        """Remove these as far as nobody uses them."""
        gone = [file for file in files if _remove_unused(file.path)]
        entries = sum(not file.partial for file in gone)
        return Freed(entries, sum(file.size for file in gone), len(files) - len(gone))

    def usage(self) -> Usage:
        """What is there now."""
        files = list(self.contents())
        return Usage(sum(file.size for file in files), sum(not file.partial for file in files), self.max_bytes)

    def _path(self, cid: Cid) -> Path:
        key = multihash(cid)
        spelled = key.hex() if len(key) <= 72 else "long-" + hashlib.sha256(key).hexdigest()
        return self._directory / f"{cid.codec:x}-{spelled}"

    def contents(self, but: Path | None = None) -> Iterator[Content]:
        """Entries and parts, each with its nodes."""
        for path in self._directory.iterdir():
            if path.name.endswith(_NODES) or path == but:
                continue
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                yield Content(path, stat.st_size + _size(_nodes_of(path)), stat.st_mtime)

    def _discard(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            _nodes_of(path).unlink(missing_ok=True)


class Entry:
    """A verified file and its descriptor, whose lock keeps it from eviction until `close`."""

    def __init__(self, path: Path, size: int, fd: int) -> None:
        self.path, self.size, self.fd = path, size, fd
        self._unlock = weakref.finalize(self, os.close, fd)

    def close(self) -> None:
        """Give up this hold; copies of the descriptor (`os.dup`) keep theirs."""
        self._unlock()


class OnDisk:
    """A content file that is being verified or written."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd, self.size = fd, size
        self.expected: int | None = None
        """Bytes of the content, once its root block is verified."""
        self.prefix = 0
        """So many bytes from the start are verified and in the file."""
        self.source = -1
        """Place of the block that is being verified again where it stands: its bytes need no comparison."""
        self.told = 0
        """The prefix when somebody was told of it last."""
        self._ahead: dict[int, int] = {}

    def read(self, path: str, offset: int, size: int) -> bytes:  # noqa: ARG002  # one file: no path needed
        """Bytes at the offset; fewer where the file ends."""
        return os.pread(self.fd, size, offset)

    def advance(self, offset: int, size: int) -> None:
        """These bytes are verified, too."""
        if offset > self.prefix:
            self._ahead[offset] = max(size, self._ahead.get(offset, 0))
            return
        self.prefix = max(self.prefix, offset + size)
        while (more := self._ahead.pop(self.prefix, 0)) > 0:
            self.prefix += more


class _Checked(OnDisk):
    """A complete entry under verification: nothing is written, everything is compared."""

    def begin(self, path: str, size: int) -> None:  # noqa: ARG002  # one file: no path needed
        """Nothing to prepare."""
        self.expected = size

    def node(self, multihash: bytes, shell: Shell) -> None:
        """Nothing to keep."""

    def write(self, path: str, offset: int, data: Bytes) -> None:
        """Raises HashMismatch when the file has other bytes here."""
        if offset != self.source and self.read(path, offset, len(data)) != data:
            raise HashMismatch("the cached file does not have the bytes that its DAG says")
        self.advance(offset, len(data))


class Part(OnDisk):
    """An output for the verifier, in the cache's directory. `commit` makes it an entry; `close` leaves it for later."""

    def __init__(self, cache: CiphertextCache, final: Path, path: Path, fd: int) -> None:
        super().__init__(fd, os.fstat(fd).st_size)
        self._cache, self._final, self.path = cache, final, path
        self._unlock = weakref.finalize(self, os.close, fd)
        self._restoring = False
        self._nodes: BinaryIO = os.fdopen(_append(_nodes_of(path)), "ab")

    def restore(self, verifier: Verifier, moved: Callable[[OnDisk], object] | None = None) -> None:
        """Give the verifier what an earlier try left here and still hashes right. Blocking; `moved` as in `open`."""
        nodes, whole = _read_nodes(self.path)
        self._restoring = True
        with _disk_errors():
            os.ftruncate(self._nodes.fileno(), whole)
            restore(verifier, self, nodes, moved)
        self._restoring, self.source = False, -1

    def begin(self, path: str, size: int) -> None:
        """Make room in the cache and on the disk, before the content comes. Raises StorageFailed."""
        del path
        self._cache.take_room(self, size)
        self.size = self.expected = size

    def write(self, path: str, offset: int, data: Bytes) -> None:
        """Write at the offset. Raises StorageFailed (`disk`)."""
        with _disk_errors():
            kept = self._restoring and (offset == self.source or self.read(path, offset, len(data)) == data)
            view, at = memoryview(b"" if kept else data), offset
            while view:
                written = os.pwrite(self.fd, view, at)
                view, at = view[written:], at + written
        self.advance(offset, len(data))

    def node(self, multihash: bytes, shell: Shell) -> None:
        """Append the node to its file. Raises StorageFailed (`disk`)."""
        if self._restoring:
            return
        record = _RECORD.pack(len(multihash), len(shell.head), len(shell.tail), shell.size)
        with _disk_errors():
            self._nodes.write(record + multihash + shell.head + shell.tail)

    def flush(self) -> None:
        """Hand buffered nodes to the system, so that a killed process loses none."""
        with _disk_errors():
            self._nodes.flush()

    def commit(self, verifier: Verifier) -> Entry:
        """Rename; the entry, still locked. Raises MissingBlock when the DAG is not complete, StorageFailed."""
        verifier.finish()
        with _disk_errors():
            self._nodes.flush()
            self._nodes.close()
            # No sync: every read verifies again, so what a crash of the machine leaves under the final name is whole or
            # fetched anew, and a sync would cost seconds per GiB before a model can be used.
            _nodes_of(self.path).replace(_nodes_of(self._final))
            self.path.replace(self._final)
            fcntl.flock(self.fd, fcntl.LOCK_SH)
        self._unlock.detach()
        return Entry(self._final, self.size, self.fd)

    def close(self, *, remove: bool) -> None:
        """Give up: `remove` the files, or leave what is verified for another try. Does nothing after `commit`."""
        if not self._unlock.alive:
            return
        with contextlib.suppress(OSError):
            self._nodes.close()
        if remove:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
                _nodes_of(self.path).unlink(missing_ok=True)
        self._unlock()


def restore(
    verifier: Verifier, stored: OnDisk, nodes: dict[bytes, Shell], moved: Callable[[OnDisk], object] | None = None
) -> None:
    """Feed the verifier from the disk whatever it wants and the disk has, each block hashed like any other.

    Leaves are hashed by `HASHERS` threads, in the order of the file.
    """
    tried: set[tuple[bytes, int]] = set()
    lock = threading.Lock()
    with background_pool(HASHERS, "rehash") as threads:
        while fresh := [w for w in verifier.missing() if (w.multihash, w.offset) not in tried]:
            tried |= {(wanted.multihash, wanted.offset) for wanted in fresh}
            work = iter(sorted(fresh, key=lambda wanted: wanted.offset))
            step = partial(_restore_some, verifier, stored, nodes, work, (lock, moved))
            for running in [threads.submit(step) for _ in range(min(HASHERS, len(fresh)))]:
                running.result()


def _restore_some(
    verifier: Verifier,
    stored: OnDisk,
    nodes: dict[bytes, Shell],
    work: Iterator[Wanted],
    shared: tuple[threading.Lock, Callable[[OnDisk], object] | None],
) -> None:
    """One thread's share: hashing outside the lock, everything else within."""
    lock, moved = shared
    buffer = memoryview(bytearray(Limits().max_block_bytes))
    while True:
        with lock:
            wanted = next(work, None)
        if wanted is None:
            return
        block = _stored_block(wanted, stored, nodes, buffer)
        with contextlib.suppress(HashMismatch):
            checked = None if block is None else check_block(wanted.multihash, block, verifier.limits)
            if checked is not None:
                with lock:
                    stored.source = wanted.offset
                    verifier.use(checked)
                if moved is not None and stored.prefix >= stored.told + _TELL_BYTES:
                    stored.told = stored.prefix
                    moved(stored)


def _stored_block(
    wanted: Wanted, stored: OnDisk, nodes: dict[bytes, Shell], buffer: memoryview
) -> bytes | memoryview | None:
    if wanted.codec == RAW:
        size = stored.size if wanted.size is None else wanted.size
        return buffer[: os.preadv(stored.fd, [buffer[:size]], wanted.offset)] if size <= len(buffer) else None
    shell = nodes.get(wanted.multihash)
    return None if shell is None else shell.head + stored.read("", wanted.offset, shell.size) + shell.tail


def _read_nodes(path: Path) -> tuple[dict[bytes, Shell], int]:
    """All whole records and their length; a torn one at the end is what a killed process leaves."""
    try:
        data = _nodes_of(path).read_bytes()
    except OSError:
        return {}, 0
    nodes, at, whole = {}, 0, 0
    while at + _RECORD.size <= len(data):
        key_size, head_size, tail_size, size = _RECORD.unpack_from(data, at)
        key_at = at + _RECORD.size
        head_at = key_at + key_size
        tail_at = head_at + head_size
        at = tail_at + tail_size
        if at > len(data) or size > Limits().max_block_bytes:
            break
        nodes[data[key_at:head_at]] = Shell(data[head_at:tail_at], data[tail_at:at], size)
        whole = at
    return nodes, whole


def _nodes_of(path: Path) -> Path:
    return path.with_name(path.name + _NODES)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _append(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _lock_shared(path: Path) -> int | None:
    """An open, locked descriptor of a file that is still in the directory; None when there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    fcntl.flock(fd, fcntl.LOCK_SH)
    if os.fstat(fd).st_nlink:
        return fd
    os.close(fd)
    return None


def _lock_exclusive(path: Path) -> int | None:
    """The part's descriptor, made if needed; None when somebody else has it locked."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    if os.fstat(fd).st_nlink:
        return fd
    os.close(fd)  # removed between opening and locking: make it anew
    return _lock_exclusive(path)


def _remove_unused(path: Path) -> bool:
    """True when nobody had the file locked and it is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        _nodes_of(path).unlink(missing_ok=True)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _allocate(fd: int, size: int) -> None:
    """A full disk shows now, not after an hour; file systems that can't reserve are left alone."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as err:
        if err.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise StorageFailed(f"the cache can't be written: {err.strerror}", reason="disk") from err
