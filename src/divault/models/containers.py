"""What a file of weights is, by its bytes: looked into before any library of models sees it.

Rules:

1. A zip's directory is read, nothing of it is unpacked; entries that could grow while unpacking are refused.
2. Formats that carry code have a name here, so that they are refused by name: TorchScript, torch.export archives,
   pickled modules, files of `torch.save` from before its zip format.
"""

from __future__ import annotations

import lzma
import pickletools
import zipfile
import zlib
from enum import StrEnum

from divault.errors import SealedFileDamaged, UnsupportedModel
from divault.models.files import path_of, read_at
from divault.values import MemoryFile

MAX_HEADER_BYTES = 16 << 20
"""JSON header of a safetensors file; 100,000 tensors need about 10 MiB."""
MAX_ENTRIES = 100_000
"""Entries of a zip: one for each tensor."""
_UNREADABLE = (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, zlib.error, lzma.LZMAError)
_PICKLE_START = 4096  # bytes in which the first class of a pickle is named
_NO_OBJECT = frozenset({"collections", "torch._utils", "torch._tensor", "torch.storage"})
"""Where dictionaries and tensors come from."""
_LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa850192e")
"""LONG1 of 0x1950a86a20f9469cfc6c and STOP: the first pickle of every file that torch wrote before 1.6."""


class Container(StrEnum):
    """What a file of weights is; the value says it in words."""

    SAFETENSORS = "safetensors"
    TORCH_ZIP = "a torch.save file"
    TORCH_MODULE = "a pickled torch.nn.Module (torch.save), which carries code"
    TORCH_SCRIPT = "TorchScript (torch.jit.save), which carries code"
    TORCH_EXPORT = "a torch.export archive (.pt2), which carries code"
    TORCH_LEGACY = "a torch.save file of the old format, from before PyTorch 1.6"
    OTHER = "no known file of weights"


def container_of(file: MemoryFile) -> Container:
    """The kind of one file. Never raises for any content."""
    start = read_at(file, 0, 32)
    if start.startswith(b"PK\x03\x04"):
        return _zip_kind(file)
    if start[2:].startswith(_LEGACY_MAGIC) and start[:1] == b"\x80":
        return Container.TORCH_LEGACY
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and 2 <= length <= file.size - 8:
        return Container.SAFETENSORS
    return Container.OTHER


def _zip_kind(file: MemoryFile) -> Container:
    try:
        with zipfile.ZipFile(path_of(file)) as archive:
            names = {name.partition("/")[2] or name: name for name in archive.namelist()}
            start = _start_of(archive, names.get("data.pkl"))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError):
        return Container.OTHER
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        return Container.TORCH_SCRIPT
    if "archive_format" in names or any(name.startswith("models/") for name in names):
        return Container.TORCH_EXPORT
    if "data.pkl" not in names:
        return Container.OTHER
    return Container.TORCH_MODULE if _begins_with_an_object(start) else Container.TORCH_ZIP


def _start_of(archive: zipfile.ZipFile, name: str | None) -> bytes:
    """The first bytes of an entry, none where it can't be read: whoever loads it says what is wrong."""
    try:
        with archive.open(name or "") as entry:
            return entry.read(_PICKLE_START)
    except (*_UNREADABLE, KeyError, RuntimeError):
        return b""


def _begins_with_an_object(start: bytes) -> bool:
    """Whether a pickle is, before anything else, an object of a class: not of names with tensors, nor a tensor.

    Its opcodes are read and not run.
    """
    texts: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(start):
            if opcode.name == "GLOBAL":
                return str(argument).split(" ")[0] not in _NO_OBJECT
            if opcode.name == "STACK_GLOBAL":
                return len(texts) == 2 and texts[0] not in _NO_OBJECT
            if opcode.name in ("SHORT_BINUNICODE", "BINUNICODE"):
                texts.append(str(argument))
            elif opcode.name not in ("PROTO", "FRAME", "MEMOIZE", "BINPUT"):
                return False
    except ValueError:  # cut off, or no pickle
        return False
    return False


def check_torch_zip(file: MemoryFile) -> None:
    """Raises SealedFileDamaged where unpacking could take more memory than the file, or two entries share a name."""
    try:
        with zipfile.ZipFile(path_of(file)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as err:
        raise SealedFileDamaged(f"the torch.save file is broken: {err}", stage="payload") from None
    if len(entries) > MAX_ENTRIES or len({entry.filename for entry in entries}) != len(entries):
        raise SealedFileDamaged("the torch.save file lists too many entries, or one twice", stage="payload")
    # torch.save stores its entries; a compressed one could be a thousand times as large as its bytes.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UnsupportedModel(
            "the torch.save file has compressed entries; save it again with torch.save",
            seen="a compressed torch.save file",
            supported="torch.save(model.state_dict()), safetensors",
        )
    if sum(entry.file_size for entry in entries) > file.size:
        raise SealedFileDamaged("entries of the torch.save file overlap", stage="payload")


def check_safetensors(file: MemoryFile) -> None:
    """Raises SealedFileDamaged for a header over the cap, which the library would parse whole."""
    length = int.from_bytes(read_at(file, 0, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise SealedFileDamaged(f"the safetensors header has {length} bytes, over {MAX_HEADER_BYTES}", stage="payload")
