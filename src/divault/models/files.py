"""The files of an opened model as a format sees them: sealed memory files behind descriptors of this process."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from divault.errors import UnsupportedModel

HEAD_BYTES = 4096
"""How much of a file recognition looks at: every magic number, and the start of a zip's first entry."""
MAX_TEXT_BYTES = 64 << 20
"""Largest JSON file of a model; tokenizers of large vocabularies have 30 MB."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file: its name inside the model, its descriptor here, its size in bytes. It never changes."""

    name: str
    fd: int
    size: int

    @property
    def path(self) -> str:
        """A path that opens the same bytes anew, with an offset of its own."""
        return f"/proc/self/fd/{self.fd}"

    def head(self, count: int = HEAD_BYTES) -> bytes:
        """The first bytes, without moving anybody's offset."""
        return os.pread(self.fd, count, 0)

    def open(self) -> BinaryIO:
        """A buffered reader from the start."""
        return Path(self.path).open("rb")

    def map(self) -> mmap.mmap:
        """The whole file as read-only memory. Raises UnsupportedModel for an empty one."""
        if not self.size:
            raise UnsupportedModel(f"the file {self.name} of the model is empty", seen="an empty file")
        with self.open() as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, limit: int = MAX_TEXT_BYTES) -> bytes:
        """All bytes. Raises UnsupportedModel over the limit."""
        if self.size > limit:
            raise UnsupportedModel(f"{self.name} has {self.size} bytes, at most {limit} are read", seen="a large file")
        return os.pread(self.fd, self.size, 0) if self.size < 1 << 30 else self.open().read()


def base_name(file: ModelFile) -> str:
    """The last part of the file's name."""
    return file.name.rpartition("/")[2]


def top_folder(files: Sequence[ModelFile]) -> dict[str, ModelFile]:
    """Files by name, without the one folder that all of them lie in, if there is one."""
    names = [file.name for file in files]
    first = names[0].partition("/")[0] + "/"
    if all(name.startswith(first) for name in names):
        return {file.name.removeprefix(first): file for file in files}
    return {file.name: file for file in files}


def json_object(file: ModelFile) -> dict[str, object]:
    """The JSON object in a file. Raises UnsupportedModel when it is none."""
    try:
        return msgspec.json.decode(file.read(), type=dict[str, object])
    except (msgspec.MsgspecError, RecursionError) as err:
        raise UnsupportedModel(
            f"{file.name} is not a JSON object: {err}", seen=f"a damaged {base_name(file)}"
        ) from None
