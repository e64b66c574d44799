"""The short-lived process that opens one sealed file into sealed memory files, and ends.

It is started clean by `divault.workers.opening`, gives up what it doesn't need before a key reaches it, and knows
nothing but the payload key of this one file. Steps:

1. give up everything but the descriptors it has: no core dump, not dumpable, no capability, no new privileges, limits;
   no path can be read or written (Landlock), and no call made but those for memory, threads, the descriptors at hand
   and memory files (seccomp). What is forbidden is tried; where something succeeds, no key is read;
2. receive one message: 32 bytes of payload key, then the order as JSON;
3. open the payload into a memory file, as far as the sealed file is verified: messages of 8 bytes say how far that is;
   a second thread takes the sha256 of what was written meanwhile;
4. only then look at the plaintext: a tar is split into one memory file per member, and its pages are given back on
   the way, so that memory stays at one copy and 4 MiB;
5. seal every memory file (no write, grow, shrink or further seal) and send the descriptors with one JSON answer.

6. but not before the parent said that the whole sealed file is verified.

Whatever fails is answered as an error of `divault.errors`; a failed open leaves nothing, since memory files end with
the process. Imports are few on purpose: they are part of every cold load (see `bench/bench_open.py`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import resource
import socket
import sys
import threading
import zlib
from queue import SimpleQueue
from typing import Any

from divault.errors import DivaultError, Overloaded, TooLarge, UnsupportedModel
from divault.vault import archive, lighthouse, stream
from divault.vault.armor import ArmorReader
from divault.vault.streams import Reader, fill
from divault.workers import landlock, privileges, seccomp
from divault.workers.selfcheck import FORBIDDEN, OF_PATHS, attempt_all

KEY_BYTES = 32
VERIFIED = b"verified"
"""The message after which an answer may be sent."""
PLACE_BYTES = 8
"""A message that says up to where the sealed file is verified: big-endian."""
SINGLE_FILE = "model"
"""Name of the memory file when the seal holds one file and no tar."""
MAX_MESSAGE_BYTES = 128 * 1024
"""128 names of 200 bytes, each byte at most 3 characters of JSON, and what stands around them."""

_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_HASH_BLOCK = 1 << 18
_COPY_BLOCK = 1 << 20
_PUNCH_STEP = 4 << 20
_ADDRESS_SPACE = 1 << 30
"""Libraries and thread arenas take 0.3 GiB; buffers a few MiB; memory files are not mapped and don't count."""
_DESCRIPTORS = archive.MAX_FILES + 32

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Entry of the process: descriptors of channel and file come as arguments."""
    channel, sealed = (int(text) for text in sys.argv[-2:])
    with socket.socket(fileno=channel) as connection:
        passed = confine()
        if passed:
            socket.send_fds(connection, [json.dumps({"type": "unconfined", "passed": passed}).encode()], [])
            os._exit(1)
        message = connection.recv(MAX_MESSAGE_BYTES)
        if len(message) <= KEY_BYTES:
            return  # the parent went away before it sent an order
        order = json.loads(message[KEY_BYTES:])
        arriving = Arriving(sealed, connection, order["size"])
        answer, files = _answer(message[:KEY_BYTES], order, arriving)
        if files:
            arriving.finish()
        socket.send_fds(connection, [json.dumps(answer).encode()], files)
    # Teardown of the interpreter is time that the caller would wait for; the kernel frees everything.
    os._exit(0)


def confine() -> list[str]:
    """Keep what this process was given, and give up the rest; names of forbidden acts that were not refused.

    Where the kernel has no Landlock or no filter of system calls, it is confined by what there is.
    """
    privileges.end_with(os.getppid())
    privileges.hide()
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_AS: _ADDRESS_SPACE, resource.RLIMIT_NOFILE: _DESCRIPTORS}
    privileges.limit(limits)
    privileges.gain_nothing()
    privileges.drop_capabilities()
    refused: tuple[str, ...] = ()
    if landlock.abi() >= landlock.MIN_ABI:
        landlock.restrict(())
        refused = OF_PATHS
    if seccomp.supported():
        seccomp.install(seccomp.OPENER)
        refused = FORBIDDEN
    found = attempt_all("", {}) if refused else {}
    return [name for name in refused if found[name] != "enforced"]


class Arriving:
    """The sealed file as a reader that waits for what is not verified yet, and never reads beyond."""

    def __init__(self, fd: int, connection: socket.socket, size: int) -> None:
        self._fd, self._connection, self._size = fd, connection, size
        self._at = self._verified = 0

    def skip(self, count: int) -> None:
        """Go on behind so many bytes."""
        self._at += count

    def readinto(self, buffer: memoryview, /) -> int:
        """Bytes put into the buffer, 0 at the end of the file."""
        while self._at >= self._verified and self._at < self._size:
            self._verified = int.from_bytes(self._told(), "big")
        room = buffer[: max(0, min(self._verified, self._size) - self._at)]
        count = os.preadv(self._fd, [room], self._at) if room else 0
        self._at += count
        return count

    def finish(self) -> None:
        """Wait until all of the file is verified."""
        while self._told() != VERIFIED:
            pass

    def _told(self) -> bytes:
        message = self._connection.recv(PLACE_BYTES)
        if len(message) != PLACE_BYTES:
            os._exit(1)  # the parent went away
        return message


class MemoryFile:
    """An anonymous file in memory that grows as it is written; `seal` makes it immutable for ever."""

    def __init__(self) -> None:
        self.fd = os.memfd_create(SINGLE_FILE, os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        self.size = 0

    def write(self, data: memoryview, /) -> int:
        """Append; the number of bytes taken."""
        taken = os.write(self.fd, data)
        self.size += taken
        return taken

    def read_at(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes from `offset`."""
        return os.pread(self.fd, count, offset)

    def seal(self) -> None:
        """No write, growth, shrinking or other seal from now on, through any descriptor; the offset is back at 0."""
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        os.lseek(self.fd, 0, os.SEEK_SET)


class Fingerprint:
    """Sink in front of a memory file: a second thread takes the sha256 of what was written, one step behind."""

    def __init__(self, file: MemoryFile) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._hashed = 0
        self._ends: SimpleQueue[int | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def write(self, data: memoryview, /) -> int:
        """Append to the file; the number of bytes taken."""
        taken = self._file.write(data)
        self._ends.put(self._file.size)
        return taken

    def finish(self) -> str:
        """Hex sha256 of the whole file. Raises RuntimeError when the thread died on the way."""
        self._ends.put(None)
        self._thread.join()
        if self._hashed != self._file.size:
            raise RuntimeError("the fingerprint does not cover the file")
        return self._digest.hexdigest()

    def _follow(self) -> None:
        block = memoryview(bytearray(_HASH_BLOCK))
        while (end := self._ends.get()) is not None:
            while self._hashed < end:
                count = os.preadv(self._file.fd, [block[: end - self._hashed]], self._hashed)
                self._digest.update(block[:count])
                self._hashed += count


def open_payload(order: dict[str, Any], key: bytes, sealed: Arriving, sink: Any) -> int:
    """Decrypt the sealed file as the order says; the number of plaintext bytes.

    Raises WrongKey, SealedFileDamaged.
    """
    source: Reader = sealed
    if order["armored"]:
        source = ArmorReader(sealed)
        fill(source, memoryview(bytearray(order["offset"])))
    else:
        sealed.skip(order["offset"])
    if order["format"] == "lighthouse":
        return lighthouse.open_payload(key, bytes.fromhex(order["iv"]), source, sink)
    return stream.open_payload(key, source, sink)


def split(whole: MemoryFile) -> list[tuple[str, MemoryFile]]:
    """The file itself, or the members of the tar that it is. Raises UnsupportedModel."""
    first = whole.read_at(0, archive.BLOCK)
    if archive.is_tar(first):
        members = archive.list_members(whole.read_at, whole.size)
        return [(member.name, _take_out(whole, member)) for member in members]
    if first.startswith(b"\x1f\x8b") and _holds_a_tar(whole):
        raise UnsupportedModel(
            "the seal holds a compressed tar: pack it without compression, sealed files don't shrink and this one could"
            " unfold to any size",
            seen="tar.gz",
        )
    return [(SINGLE_FILE, whole)]


def _answer(key: bytes, order: dict[str, Any], sealed: Arriving) -> tuple[dict[str, Any], list[int]]:
    """What to send back: names, sizes and the fingerprint beside the descriptors, or the error in words."""
    limit = order["max_bytes"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        return _open(key, order, sealed)
    except DivaultError as err:
        failure = err
    except MemoryError:
        failure = _no_memory()
    except OSError as err:
        if err.errno == errno.EFBIG:
            failure = TooLarge(f"the opened model is over {limit} bytes", limit_bytes=limit, limit="model")
        elif err.errno in (errno.ENOMEM, errno.ENOSPC):
            failure = _no_memory()
        else:
            raise
    return {"type": "refused", "code": failure.code, "detail": failure.detail, "data": failure.data}, []


def _no_memory() -> Overloaded:
    return Overloaded("this node has not enough memory left to open the model", retry_after=60)


def _open(key: bytes, order: dict[str, Any], sealed: Arriving) -> tuple[dict[str, Any], list[int]]:
    whole = MemoryFile()
    sink = Fingerprint(whole)
    open_payload(order, key, sealed, sink)
    digest = sink.finish()
    files = split(whole)
    for _, file in files:
        file.seal()
    told = [{"name": name, "size": file.size} for name, file in files]
    return {"type": "opened", "sha256": digest, "files": told}, [file.fd for _, file in files]


def _take_out(whole: MemoryFile, member: archive.Member) -> MemoryFile:
    """A copy of the member; what lies before it, and its own pages, are given back to the system step by step."""
    file = MemoryFile()
    buffer = memoryview(bytearray(_COPY_BLOCK))
    end = member.offset + member.size
    for position in range(member.offset, end, _COPY_BLOCK):
        piece = buffer[: min(_COPY_BLOCK, end - position)]
        os.preadv(whole.fd, [piece], position)
        while piece:
            piece = piece[file.write(piece) :]
        if position % _PUNCH_STEP < _COPY_BLOCK:
            _free(whole, position)
    return file


def _free(whole: MemoryFile, until: int) -> None:
    length = until // _PUNCH_STEP * _PUNCH_STEP
    if length:
        _libc.fallocate(whole.fd, _PUNCH_HOLE_KEEP_SIZE, ctypes.c_longlong(0), ctypes.c_longlong(length))


def _holds_a_tar(whole: MemoryFile) -> bool:
    """True when the first 512 bytes under the gzip are a tar header; at most 64 KiB are read and 512 bytes unfolded."""
    try:
        first = zlib.decompressobj(wbits=31).decompress(whole.read_at(0, 1 << 16), archive.BLOCK)
    except zlib.error:
        return False
    return archive.is_tar(first)
