"""Opening a verified file: from ciphertext on disk to sealed memory files, in a process of its own.

The file may still be on its way: what of it is verified is opened meanwhile. Rules:

1. The gateway reads the header alone. Key sources are asked here, in a thread; a process of its own gets the payload
   key of this one file over an inherited socket, never by argument or environment, and the ciphertext's descriptor.
2. A key that comes from elsewhere is searched for when none at hand opens the file, and tried like any other: while
   its tag does not hold, the search is asked for the next one.
3. Derivations (scrypt, PBKDF2) run one at a time: one may take 1 GiB and seconds. A wrong key costs about 0.1 s of
   CPU or more, so callers are authenticated and rate-limited before they come here.
4. Sizes are compared with the limit before anything is decrypted.
5. Descriptors come back only when the last chunk or the tag held, and the last block was verified. A failed, cut or
   timed out open leaves nothing. The time limit counts from when the file is there.
6. What the process sends is checked like any foreign input: typed frame, counts, sizes, seals.

This module alone makes `OpenedModel`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import os
import socket
from array import array
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Protocol, TypeVar, runtime_checkable

import msgspec

from divault.errors import (
    DeadlineExceeded,
    DivaultError,
    ModelFailed,
    Overloaded,
    SealedFileDamaged,
    SealError,
    StorageFailed,
    TooLarge,
    UnsupportedModel,
    WrongKey,
    from_code,
)
from divault.storage.arrival import FileReplaced
from divault.values import Cid, Digest, Grant, MemoryFile, OpenedModel, Secret, VerifiedBlob
from divault.vault.archive import MAX_FILES, MAX_NAME_BYTES
from divault.vault.keys import KeySearch, KeySource, SealFormat, costs_a_derivation
from divault.vault.sealed import Preamble, Spelling, payload_key, plain_size, read_preamble
from divault.workers import wire
from divault.workers.opening_child import MAX_MESSAGE_BYTES, PLACE_BYTES, VERIFIED
from divault.workers.opening_folder import Budget, OpenedFile, merged, model_names
from divault.workers.process import command_of, no_room_is_not_ready

T = TypeVar("T")

_DESCRIPTOR = array("i")
FILES_AT_ONCE = 3
"""Of a folder: a process for each, and enough to hide their start."""
PREAMBLE_BYTES = 256 * 1024
"""Header and what stands before the payload lie within: 64 KiB of header, a third more in armor, and some space."""

_COMMAND = command_of("opening_child")
_ENVIRONMENT = {"PATH": os.defpath, "LANG": "C.UTF-8"}
_SEALED = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_EXPECTED = (WrongKey, SealedFileDamaged, UnsupportedModel, TooLarge, Overloaded)
"""What an opening process may report; anything else counts as its crash."""


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_BYTES)]
    size: Annotated[int, msgspec.Meta(ge=0)]


class _Opened(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="opened"):
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
    files: Annotated[list[_File], msgspec.Meta(min_length=1, max_length=MAX_FILES)]


class _Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="refused"):
    code: str
    detail: Annotated[str, msgspec.Meta(max_length=500)]
    data: dict[str, str | int]


class _Unconfined(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="unconfined"):
    passed: list[Annotated[str, msgspec.Meta(max_length=40)]]


@dataclass(frozen=True, slots=True)
class _Keys:
    """What may open the files of one call."""

    grant: Grant
    sources: Sequence[KeySource]
    search: KeySearch | None


@dataclass(frozen=True, slots=True)
class _Order:
    """What the process is told, without the key."""

    format: str
    armored: bool
    offset: int
    iv: str
    max_bytes: int
    size: int


class Opener:
    """Opens verified blobs. One object per node; safe for concurrent use in one event loop."""

    def __init__(self, *, max_model_bytes: int, timeout_s: float) -> None:
        """`max_model_bytes` bounds the plaintext, `timeout_s` a whole open with its derivation."""
        self._max_bytes = max_model_bytes
        self._timeout_s = timeout_s
        self._derivations = ThreadPoolExecutor(1, thread_name_prefix="derivation")

    async def open(
        self,
        source: Arriving | ArrivingFolder | VerifiedBlob,
        grant: Grant,
        sources: Sequence[KeySource],
        search: KeySearch | None = None,
    ) -> OpenedModel:
        """The plaintext of a file, or of every file of a folder, as sealed memory files; the caller closes them.

        All of it is authenticated to its end. `search` is asked when no source has a key. Raises what it raises and
        what the arrival raises, and WrongKey, SealedFileDamaged, UnsupportedModel (the tar or the folder breaks a
        rule), TooLarge, StorageFailed (the cached file is gone), Overloaded (no memory), DeadlineExceeded, ModelFailed
        (the process died).
        """
        keys = _Keys(grant, sources, search)
        if isinstance(source, VerifiedBlob):
            source = Arrived(source)
        try:
            if isinstance(source, Arriving):
                opened = await self._open_file(source, keys, Budget(self._max_bytes).share())
                return _model(source.cid, grant, opened.files, Digest(bytes.fromhex(opened.sha256)))
            files, digest = await self._open_folder(source, keys)
            return _model(source.cid, grant, files, digest)
        except SealError as err:
            err.data.setdefault("cid", source.cid.text)
            raise
        finally:
            if isinstance(source, Arrived):
                source.restart()

    async def _open_folder(self, folder: ArrivingFolder, keys: _Keys) -> tuple[tuple[MemoryFile, ...], Digest]:
        """Each file of the folder, or the tar that is its only one."""
        names = model_names(folder.names)
        budget, turns = Budget(self._max_bytes), asyncio.Semaphore(FILES_AT_ONCE)

        async def one(path: str) -> OpenedFile:
            async with turns, folder.file(path) as arriving:
                try:
                    return await self._open_file(arriving, keys, budget.share())
                except SealError as err:
                    raise type(err)(f"{path} of the folder: {err.detail}", **err.data, file=path) from err

        opened = await _all_or_none([one(path) for path in names])
        if len(opened) == 1:
            return opened[0].files, Digest(bytes.fromhex(opened[0].sha256))
        with _closed_on_failure([file.fd for each in opened for file in each.files]):
            return merged(list(names.values()), opened)

    async def _open_file(self, arriving: Arriving, keys: _Keys, take: Callable[[int], None]) -> OpenedFile:
        try:
            async with asyncio.timeout(None) as limit, _clock(arriving, limit, self._timeout_s):
                while True:
                    try:
                        return await self._open(arriving, keys, take)
                    except FileReplaced:
                        arriving.restart()
        except TimeoutError:
            told = f"{self._timeout_s:g}"
            raise DeadlineExceeded(f"opening the model took longer than {told} s", limit_s=told) from None

    def close(self) -> None:
        """Let the derivation thread end; a running derivation is waited for."""
        self._derivations.shutdown()

    async def _open(self, arriving: Arriving, keys: _Keys, take: Callable[[int], None]) -> OpenedFile:
        size = await arriving.size()
        await arriving.upto(PREAMBLE_BYTES)
        # In the page cache since it was verified: reading it costs no more than a change of threads.
        preamble, _ = read_preamble(io.BytesIO(os.pread(arriving.fd, PREAMBLE_BYTES, 0)))
        take(_plain_size(preamble, size))
        attempt = partial(self._attempt, preamble, self._order(preamble, size), arriving, keys.grant)
        try:
            answer, descriptors = await attempt(keys.sources)
        except WrongKey:
            if keys.search is None:
                raise
            answer, descriptors = await _first_opened(keys.search.candidates(preamble.header, keys.grant), attempt)
        with _closed_on_failure(descriptors):
            await arriving.blob()
            return OpenedFile(answer.sha256, _checked_files(answer, descriptors, self._max_bytes))

    def _order(self, preamble: Preamble, size: int) -> _Order:
        iv = preamble.salt.hex() if preamble.format is SealFormat.LIGHTHOUSE else ""
        armored = preamble.spelling is Spelling.ARMORED
        return _Order(preamble.format.value, armored, preamble.size, iv, self._max_bytes, size)

    async def _attempt(
        self, preamble: Preamble, order: _Order, arriving: Arriving, grant: Grant, sources: Sequence[KeySource]
    ) -> tuple[_Opened, list[int]]:
        """What the process answers when it is given the key that these sources have. Raises WrongKey."""
        threads = self._derivations if costs_a_derivation(preamble.header) else None
        key = await _in_thread(threads, lambda: payload_key(preamble, sources, grant))
        try:
            return await _run_process(order, key, arriving)
        finally:
            key.wipe()


async def _first_opened(
    candidates: AsyncGenerator[KeySource, None],
    attempt: Callable[[Sequence[KeySource]], Awaitable[tuple[_Opened, list[int]]]],
) -> tuple[_Opened, list[int]]:
    """The answer for the first candidate that opens the file. Raises what the search raises, else the last WrongKey."""
    failed = WrongKey("the file is sealed to other keys than those that this node was given or may ask for")
    async with contextlib.aclosing(candidates):
        async for source in candidates:
            try:
                return await attempt([source])
            except WrongKey as err:
                failed = err
    raise failed


async def _in_thread(threads: ThreadPoolExecutor | None, work: Callable[[], T]) -> T:
    with no_room_is_not_ready():
        done = asyncio.get_running_loop().run_in_executor(threads, work)
    return await done


def _plain_size(preamble: Preamble, size: int) -> int:
    """An armored file tells its size only roughly: 0, and the process may write no more than the limit in any case."""
    return plain_size(preamble, size) if preamble.spelling is Spelling.BINARY else 0


def _model(cid: Cid, grant: Grant, files: tuple[MemoryFile, ...], digest: Digest) -> OpenedModel:
    size = sum(file.size for file in files)
    return OpenedModel(model=grant.model.model, cid=cid, plaintext_sha256=digest, size=size, files=files)


async def _all_or_none(works: Sequence[Coroutine[Any, Any, OpenedFile]]) -> list[OpenedFile]:
    """What all of them give; when one fails, the others end and what they opened is closed."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            for file in ended.files if isinstance(ended, OpenedFile) else ():
                os.close(file.fd)
        raise


@runtime_checkable
class Arriving(Protocol):
    """A file that is verified from its start on, perhaps still on its way; `divault.storage.arrival` is one."""

    @property
    def cid(self) -> Cid:
        """Of the file."""

    @property
    def fd(self) -> int:
        """Its descriptor, after `upto` returned."""

    async def size(self) -> int:
        """Bytes of the whole file."""

    async def upto(self, count: int) -> int:
        """How many bytes from the start are verified, once they are `count` or all. May raise FileReplaced."""

    async def blob(self) -> VerifiedBlob:
        """The proof, when all of it is verified."""

    def restart(self) -> None:
        """Let go of the file; `upto` gives it anew."""


class ArrivingFolder(Protocol):
    """A folder whose list is verified, and whose files come when they are asked for."""

    @property
    def cid(self) -> Cid:
        """Of the folder."""

    @property
    def names(self) -> tuple[str, ...]:
        """Paths of its files."""

    def file(self, name: str) -> contextlib.AbstractAsyncContextManager[Arriving]:
        """One of them."""


class Arrived:
    """A file that is there already, as one that arrives."""

    def __init__(self, blob: VerifiedBlob) -> None:
        self.cid = blob.cid
        self.fd = -1
        self._blob = blob

    async def size(self) -> int:
        """As it was verified."""
        return self._blob.size

    async def upto(self, count: int) -> int:
        """All of it. Raises StorageFailed when it is not there any more or has another size."""
        del count
        if self.fd < 0:
            try:
                self.fd = os.open(self._blob.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError:
                raise _gone(self._blob) from None
            if os.fstat(self.fd).st_size != self._blob.size:
                raise _gone(self._blob)
        return self._blob.size

    async def blob(self) -> VerifiedBlob:
        """The one it was made of."""
        return self._blob

    def restart(self) -> None:
        """Close the file."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _gone(blob: VerifiedBlob) -> StorageFailed:
    return StorageFailed(
        "the verified file left the cache before it was opened: ask again, it is fetched anew",
        cid=blob.cid.text,
        reason="cache_file_gone",
    )


@contextlib.asynccontextmanager
async def _clock(arriving: Arriving, limit: asyncio.Timeout, seconds: float) -> AsyncGenerator[None, None]:
    """The limit begins when the file is there: until then the fetch has its own."""

    async def start() -> None:
        with contextlib.suppress(DivaultError):  # whoever opens the file hears of it
            await arriving.blob()
            limit.reschedule(asyncio.get_running_loop().time() + seconds)

    starting = asyncio.create_task(start())
    try:
        yield
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)


async def _run_process(order: _Order, key: Secret, arriving: Arriving) -> tuple[_Opened, list[int]]:
    """Start the process, send key and order, and wait for its one answer; it is gone when this returns or raises.

    Raises NotReady where there is no room for a process, what the arrival raises, and what the process reports.
    """
    with no_room_is_not_ready():
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        near.setblocking(False)  # noqa: FBT003  # the standard library's signature
        with no_room_is_not_ready():
            process = await asyncio.create_subprocess_exec(
                *(*_COMMAND, str(far.fileno()), str(arriving.fd)),
                pass_fds=(far.fileno(), arriving.fd),
                env=_ENVIRONMENT,
                cwd="/",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
        far.close()
        try:
            near.send(key.reveal() + msgspec.json.encode(order))
            await _answered(near, arriving, order.size)
            await process.wait()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        # Last, with nothing awaited after it: descriptors waiting in the socket end with it, received ones would leak.
        return _received(near)


async def _answered(connection: socket.socket, arriving: Arriving, size: int) -> None:
    """Tell the process how far the file is verified, until it answers. Raises what the arrival raises."""
    telling = asyncio.create_task(_tell(connection, arriving, size))
    answering = asyncio.create_task(_readable(connection))
    try:
        await asyncio.wait({telling, answering}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            telling.result()
            await answering
    finally:
        for task in (telling, answering):
            task.cancel()
        await asyncio.gather(telling, answering, return_exceptions=True)


async def _tell(connection: socket.socket, arriving: Arriving, size: int) -> None:
    loop = asyncio.get_running_loop()
    told = 0
    with contextlib.suppress(ConnectionError):  # it died, or knows enough: its answer, or its end, says which
        while told < size:
            told = await arriving.upto(told + 1)
            await loop.sock_sendall(connection, told.to_bytes(PLACE_BYTES, "big"))
        await arriving.blob()
        await loop.sock_sendall(connection, VERIFIED)


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(connection, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(connection)


def _received(connection: socket.socket) -> tuple[_Opened, list[int]]:
    """The answer with its descriptors. Raises what the process reported, or ModelFailed for anything malformed."""
    # Not socket.recv_fds: it drops its flags, and descriptors without CLOEXEC would reach every process started here.
    room = socket.CMSG_SPACE(MAX_FILES * _DESCRIPTOR.itemsize)
    try:
        data, ancillary, flags, _ = connection.recvmsg(MAX_MESSAGE_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        # It ended with messages unread, which the kernel tells once, before the answer that waits behind it.
        data, ancillary, flags, _ = connection.recvmsg(MAX_MESSAGE_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    descriptors = _descriptors(ancillary)
    with _closed_on_failure(descriptors):
        if not data:
            raise _crashed("it ended without an answer")
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise _crashed("its answer is over the limit")
        try:
            answer = msgspec.json.decode(data, type=_Opened | _Refused | _Unconfined)
        except msgspec.MsgspecError:
            raise _crashed("its answer is malformed") from None
        if isinstance(answer, _Refused):
            raise _refusal(answer)
        if isinstance(answer, _Unconfined):
            raise _crashed(f"it is not confined on this machine ({', '.join(answer.passed)}), and took no key")
        return answer, descriptors


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) // _DESCRIPTOR.itemsize * _DESCRIPTOR.itemsize])
    return list(found)


def _refusal(answer: _Refused) -> DivaultError:
    """The error that it may report; it read a stranger's file, so its texts are made printable."""
    error = from_code(answer.code, wire.printable(answer.detail), wire.printable(answer.data))
    return error if isinstance(error, _EXPECTED) else _crashed("it reported an error that it can't have")


def _checked_files(answer: _Opened, descriptors: list[int], max_bytes: int) -> tuple[MemoryFile, ...]:
    if len(descriptors) != len(answer.files):
        raise _crashed("it sent another number of files than it named")
    for told, descriptor in zip(answer.files, descriptors, strict=True):
        if os.fstat(descriptor).st_size != told.size or fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALED != _SEALED:
            raise _crashed("a file it sent is not what it named, or is not sealed")
    if sum(told.size for told in answer.files) > max_bytes:
        raise _crashed("it sent more than it may")
    return tuple(MemoryFile(t.name, d, t.size) for t, d in zip(answer.files, descriptors, strict=True))


def _crashed(how: str) -> ModelFailed:
    return ModelFailed(f"the process that opens the model failed: {how}", kind="opening")


@contextlib.contextmanager
def _closed_on_failure(descriptors: Sequence[int]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
