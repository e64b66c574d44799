"""The files of an opened model: sealed memory files, read in bounded pieces and by name, never unpacked to disk.

>>> Folder([]).names
()
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from divault.errors import SealedFileDamaged, UnsupportedModel
from divault.values import MemoryFile

HEAD_BYTES = 4096
"""How much of a file recognition looks at: every magic number, and the start of a zip's first entry."""
MAX_JSON_BYTES = 16 << 20
"""Configurations have kilobytes; a label list of a large classifier has less than one MiB."""
_FOR_PEOPLE = ("README", "LICENSE", "DIVAULT.JSON")


class Folder:
    """Files by name. A tar of one directory counts as that directory: its name is dropped."""

    def __init__(self, files: Sequence[MemoryFile]) -> None:
        self._files = {file.name: file for file in files}
        tops = {name.partition("/")[0] for name in self._files}
        if len(tops) == 1 and all("/" in name for name in self._files):
            self._files = {name.partition("/")[2]: file for name, file in self._files.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all files, in the archive's order."""
        return tuple(self._files)

    @property
    def files(self) -> tuple[MemoryFile, ...]:
        """All files, in the archive's order."""
        return tuple(self._files.values())

    def find(self, name: str) -> MemoryFile | None:
        """The file of that name, if there is one."""
        return self._files.get(name)

    def text(self, name: str, max_bytes: int = MAX_JSON_BYTES) -> bytes | None:
        """Content of a small file; None where it is missing. Raises SealedFileDamaged over `max_bytes`."""
        file = self._files.get(name)
        return None if file is None else read_whole(file, max_bytes)

    def json(self, name: str) -> Any:
        """A JSON file's value; None where it is missing. Raises SealedFileDamaged for anything else than JSON."""
        data = self.text(name)
        if data is None:
            return None
        try:
            return msgspec.json.decode(data)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as err:
            raise SealedFileDamaged(f"{name} is not JSON: {str(err)[:100]}", stage="payload") from None

    def json_object(self, name: str) -> dict[str, Any]:
        """A JSON object; empty where the file is missing. Raises SealedFileDamaged."""
        value = self.json(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise SealedFileDamaged(f"{name} holds no JSON object", stage="payload")
        return value


def only_file(files: Sequence[MemoryFile]) -> MemoryFile | None:
    """The one file that isn't for people or for this node (`README`, `LICENSE`, `divault.json`); None for several."""
    rest = [file for file in files if not base_name(file).upper().startswith(_FOR_PEOPLE)]
    return rest[0] if len(rest) == 1 else None


def the_file(files: Sequence[MemoryFile], what: str) -> MemoryFile:
    """The same for a format that was recognised by it. Raises UnsupportedModel for several."""
    file = only_file(files)
    if file is None:
        raise UnsupportedModel(f"{what} is one file", seen="several files")
    return file


def base_name(file: MemoryFile) -> str:
    """The last part of the file's name."""
    return file.name.rpartition("/")[2]


def head(file: MemoryFile, count: int = HEAD_BYTES) -> bytes:
    """The first bytes, without moving the descriptor's position."""
    return read_at(file, 0, count)


def read_at(file: MemoryFile, offset: int, count: int) -> bytes:
    """Up to `count` bytes from `offset`, without moving the descriptor's position."""
    pieces = []
    while count > 0 and (piece := os.pread(file.fd, count, offset)):
        pieces.append(piece)
        offset += len(piece)
        count -= len(piece)
    return b"".join(pieces)


def read_whole(file: MemoryFile, max_bytes: int) -> bytes:
    """All bytes. Raises SealedFileDamaged over `max_bytes`."""
    if file.size > max_bytes:
        raise SealedFileDamaged(f"{file.name} has {file.size} bytes, at most {max_bytes} are read", stage="payload")
    return read_at(file, 0, file.size)


def path_of(file: MemoryFile) -> str:
    """A path that libraries can open and map; it is the memory file, nothing lies on disk."""
    return f"/proc/self/fd/{file.fd}"


def opened(file: MemoryFile) -> BinaryIO:
    """A buffered reader from the start, with an offset of its own."""
    return Path(path_of(file)).open("rb")
