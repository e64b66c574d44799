"""Sealing a file or folder on disk, and what names its plaintext.

A folder counts as one tar with plain, sorted names and no owner, time or mode in it, so that its sha256 says what it
holds and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from divault.errors import BadRequest, StorageFailed
from divault.publishing.records import sync_folder
from divault.values import Digest, ModelId
from divault.vault import stream
from divault.vault.age import Passphrase, Recipient
from divault.vault.sealed import seal_stream
from divault.vault.streams import Reader, Writer, write_all

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Sealed:
    """A sealed file: its size in bytes, its sha256, and that of the plaintext in it."""

    size: int
    sha256: Digest
    source_sha256: Digest


def seal_path(
    path: Path, sealed: Path, recipients: Sequence[Recipient | Passphrase], model: ModelId | None = None
) -> int:
    """Seal a file, or a folder as one tar, into a new file; gives its size in bytes. Raises BadRequest.

    Nodes open it for `model` alone, where that is given.
    """
    with _plaintext(path) as source, sealed.open("xb") as sink:
        seal_stream(source, sink, recipients, model)
    return sealed.stat().st_size


def seal_durably(path: Path, sealed: Path, recipients: Sequence[Recipient], model: ModelId) -> Sealed:
    """Seal into the file `sealed`, which is there only when it is complete and on disk. Raises BadRequest."""
    with durable_file(sealed) as sink, _plaintext(path) as plaintext:
        source = _HashedSource(plaintext)
        seal_stream(source, sink, recipients, model)
    return Sealed(sink.size, Digest(sink.sha256.digest()), Digest(source.sha256.digest()))


@contextmanager
def durable_file(sealed: Path) -> Iterator[HashedSink]:
    """A sink for the file `sealed`, which is there only when the context ended well: complete, on disk, mode 0600.

    Raises StorageFailed (`file`).
    """
    draft = sealed.with_suffix(".part")
    try:
        draft.unlink(missing_ok=True)
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            yield HashedSink(file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(sealed)
        sync_folder(sealed.parent)
    except OSError as err:
        raise StorageFailed(f"sealing into {sealed} failed: {err.strerror or err}", reason="file") from err
    finally:
        draft.unlink(missing_ok=True)


def is_complete(sealed: Path, size: int, sha256: Digest) -> bool:
    """True when the file is there and is, byte for byte, the one that was sealed."""
    try:
        with sealed.open("rb") as file:
            return os.fstat(file.fileno()).st_size == size and measure(sealed)[0] == sha256
    except OSError:
        return False


def measure(path: Path) -> tuple[Digest, int]:
    """The sha256 and the size in bytes of a file, or of the tar that a folder becomes. Raises BadRequest."""
    sink = HashedSink()
    _copy(path, sink)
    return Digest(sink.sha256.digest()), sink.size


def copy_plaintext(path: Path, target: Writer, digest: Hash) -> None:
    """Write the file, or the folder's tar, and take its sha256 on the way. Raises BadRequest."""
    _copy(path, HashedSink(target, digest))


def sealed_size(plain_bytes: int, recipients: Sequence[Recipient], model: ModelId) -> int:
    """Bytes of a seal of so many bytes. Raises BadRequest for no recipient."""
    empty = io.BytesIO()
    seal_stream(io.BytesIO(), empty, recipients, model)
    return len(empty.getvalue()) - stream.sealed_size(0) + stream.sealed_size(plain_bytes)


def pack_folder(folder: Path, sink: BinaryIO) -> None:
    """Write the folder's files as a tar. Raises BadRequest for links and special files, and for an empty folder."""
    names = sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    if not names:
        raise BadRequest(f"{folder} is empty", field="path")
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in names:
            if path.is_symlink() or not path.is_file():
                raise BadRequest(f"{path} is a link or a special file; a model folder holds files only", field="path")
            entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
            with _opened(path) as file:
                entry.size = os.fstat(file.fileno()).st_size
                try:
                    tar.addfile(entry, file)
                except (
                    OSError,
                    ValueError,
                    UnicodeError,
                ) as err:  # it shrank meanwhile; its name is too long or no text
                    raise BadRequest(f"{path} can't be packed: {err}", field="path") from err


@contextmanager
def _plaintext(path: Path) -> Iterator[io.BufferedReader | io.BufferedRandom]:
    """The file, or the folder's tar in an unnamed file of this machine, which ends with the context."""
    if path.is_dir():
        with tempfile.TemporaryFile() as packed:
            pack_folder(path, packed)
            packed.seek(0)
            yield packed
    elif path.is_file():
        with _opened(path) as file:
            yield file
    else:
        raise BadRequest(f"{path} is neither a file nor a folder", field="path")


def _opened(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except OSError as err:
        raise BadRequest(f"{path} can't be read: {err.strerror}", field="path") from err


class _HashedSource:
    """A reader that takes the sha256 of what it gave."""

    def __init__(self, file: Reader) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def readinto(self, buffer: memoryview, /) -> int | None:
        """As the file's."""
        count = self._file.readinto(buffer)
        self.sha256.update(buffer[:count])
        return count


class HashedSink:
    """A writer that takes the sha256 of what it got, and passes it on to the file, if there is one."""

    def __init__(self, file: Writer | None = None, sha256: Hash | None = None) -> None:
        self._file = file
        self.size = 0
        self.sha256 = sha256 or hashlib.sha256()

    def write(self, data: memoryview | bytes, /) -> int:
        """All of it; the number of bytes."""
        view = memoryview(data)
        if self._file is not None:
            write_all(self._file, view)
        self.sha256.update(view)
        self.size += len(view)
        return len(view)

    def tell(self) -> int:
        """Where `tarfile` stands."""
        return self.size


def _copy(path: Path, sink: HashedSink) -> None:
    if path.is_dir():
        pack_folder(path, cast("BinaryIO", sink))
        return
    with _plaintext(path) as file:
        while piece := file.read(_PIECE_BYTES):
            sink.write(piece)
