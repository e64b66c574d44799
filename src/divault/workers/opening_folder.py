"""A model that is a folder of sealed files: which names its files have, how large they may be, and their fingerprint.

Rules:

1. Every file is sealed, by the same keys and for the same model; an unsealed one ends the load.
2. A suffix `.age` or `.enc` is dropped; two files may not have one name after that.
3. A folder with one file is that file: usually a tar of the model.
4. The limit of a model's size counts for all its files together.
5. The fingerprint of several files is the sha256 of a text: for each file in the order of names (as UTF-8 bytes) a line
   of its sha256 in hex, its size and its name, each two separated by one space, each line ended by a newline.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from divault.errors import TooLarge, UnsupportedModel
from divault.values import Digest, MemoryFile
from divault.vault.archive import MAX_FILES, MAX_NAME_BYTES
from divault.workers.opening_child import SINGLE_FILE

_SUFFIXES = (".age", ".enc")


@dataclass(frozen=True, slots=True)
class OpenedFile:
    """What came out of one seal: its fingerprint, and its memory files (several where it held a tar)."""

    sha256: str
    files: tuple[MemoryFile, ...]


class Budget:
    """Bytes that the plaintext of one model may have in all; each of its files takes from a share of its own."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._shares: list[int] = []

    def share(self) -> Callable[[int], None]:
        """For one file: call it with the file's plaintext bytes, again where it is opened anew.

        The call raises TooLarge, before anything of the file is decrypted.
        """
        number = len(self._shares)
        self._shares.append(0)

        def take(plain_bytes: int) -> None:
            self._shares[number] = plain_bytes
            total = sum(self._shares)
            if total > self._max_bytes:
                raise TooLarge(
                    f"the model has {total} bytes after opening, this node takes {self._max_bytes}",
                    limit_bytes=self._max_bytes,
                    have_bytes=total,
                    limit="model",
                )

        return take


def model_names(paths: Sequence[str]) -> dict[str, str]:
    """Names inside the model, by the paths of the sealed files. Raises UnsupportedModel."""
    if not paths:
        raise _refused("it is empty")
    if len(paths) > MAX_FILES:
        raise _refused(f"it holds {len(paths)} files, at most {MAX_FILES} make a model")
    names = {path: _without_suffix(path) for path in paths}
    if any(len(name.encode()) > MAX_NAME_BYTES or not name.isprintable() for name in names.values()):
        raise _refused(f"a name is longer than {MAX_NAME_BYTES} bytes or not printable")
    if len(set(names.values())) < len(names):
        raise _refused("two of its files have one name without .age or .enc")
    return names


def merged(names: Sequence[str], opened: Sequence[OpenedFile]) -> tuple[tuple[MemoryFile, ...], Digest]:
    """The files of the model under their names, and its fingerprint. Raises UnsupportedModel for a tar among others."""
    found: dict[str, tuple[str, MemoryFile]] = {}
    for name, each in zip(names, opened, strict=True):
        if len(each.files) != 1 or each.files[0].name != SINGLE_FILE:
            raise _refused(f"{name} is a tar beside other files: put one tar alone, or its files")
        found[name] = (each.sha256, MemoryFile(name, each.files[0].fd, each.files[0].size))
    ordered = sorted(found.items(), key=lambda item: item[0].encode())
    text = "".join(f"{sha256} {file.size} {name}\n" for name, (sha256, file) in ordered)
    return tuple(file for _, (_, file) in ordered), Digest(hashlib.sha256(text.encode()).digest())


def _without_suffix(path: str) -> str:
    return next((path.removesuffix(end) for end in _SUFFIXES if path.endswith(end) and path != end), path)


def _refused(what: str) -> UnsupportedModel:
    return UnsupportedModel(f"the folder can't be used as a model: {what}", seen=f"folder: {what}")
