"""The strict reader of a tar with a model's folder: where each regular file lies, or a refusal.

Rules:

1. ustar, pax and GNU headers with a valid checksum; data inside the archive; at the end two zero blocks and only zeros.
2. Regular files and directories, nothing else: no link, device, sparse or contiguous file, no continuation.
3. A name is UTF-8 of 1 to 200 bytes in parts joined by `/`; no absolute name, no empty part, `.` or `..`, no backslash,
   no control character; one leading `./` is dropped. No two names are equal after NFC and case folding, and none
   lies under another file.
4. At most 128 files and 1024 entries. Every file becomes a descriptor in the node and the worker, whose limit is 256.

Why not `tarfile`: it stops silently at a damaged header in mid-archive, and merges headers in ways that others do not.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn

from divault.errors import UnsupportedModel

BLOCK = 512
MAX_FILES = 128
MAX_ENTRIES = 1024
MAX_NAME_BYTES = 200

_MAX_EXTENSION = 1 << 20
"""Bytes of one pax or long-name header: macOS puts extended attributes there."""
_MAX_TAIL = 1 << 20
"""Archivers fill their last record, of 10 KiB by default, with zeros."""
_OCTAL = re.compile(rb" *([0-7]+)[ \0]*", re.ASCII)
_PAX_RECORD = re.compile(rb"([1-9][0-9]{0,6}) ([^=\n]+)=", re.ASCII)
_REGULAR, _DIRECTORY, _PAX, _PAX_GLOBAL, _GNU_NAME = b"0\0", b"5", b"x", b"g", b"L"
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}

ReadAt = Callable[[int, int], bytes]


class Member(NamedTuple):
    """A regular file inside the archive: its name, where its bytes start, and how many there are."""

    name: str
    offset: int
    size: int


class _Entry(NamedTuple):
    kind: bytes
    name: bytes
    offset: int
    size: int


def is_tar(first_bytes: bytes) -> bool:
    """True when the first 512 bytes are a tar header with its magic and checksum."""
    block = first_bytes[:BLOCK]
    told = _OCTAL.fullmatch(block[148:156])
    return (
        len(block) == BLOCK and block[257:262] == b"ustar" and told is not None and int(told[1], 8) == _checksum(block)
    )


def list_members(read_at: ReadAt, size: int) -> list[Member]:
    """All files of the archive of `size` bytes, in order. Raises UnsupportedModel, with `seen` in words.

    `read_at(offset, count)` gives bytes of the archive; at most 1 MiB is asked for at a time.
    """
    members: list[Member] = []
    folded: set[str] = set()
    for entry in _entries(read_at, size):
        name = _safe_name(entry.name, directory=entry.kind == _DIRECTORY)
        if entry.kind == _DIRECTORY:
            continue
        key = unicodedata.normalize("NFC", name).casefold()
        if key in folded:
            _refuse("two files of one name")
        folded.add(key)
        members.append(Member(name, entry.offset, entry.size))
        if len(members) > MAX_FILES:
            _refuse(f"more than {MAX_FILES} files")
    if any(parent in folded for key in folded for parent in _parents(key)):
        _refuse("a file that is also a folder")
    if not members:
        _refuse("no file at all")
    return members


def _entries(read_at: ReadAt, size: int) -> Iterator[_Entry]:
    """Files and directories, with the headers that extend them already applied."""
    position, count = 0, 0
    override: dict[str, bytes] = {}
    while True:
        block = read_at(position, BLOCK)
        if block == bytes(BLOCK):
            break
        count += 1
        if count > MAX_ENTRIES:
            _refuse(f"more than {MAX_ENTRIES} entries")
        if not is_tar(block):
            _refuse("a damaged header, or no end")
        entry = _entry(block, position + BLOCK, override)
        position = entry.offset + -(-entry.size // BLOCK) * BLOCK
        if position > size:
            _refuse("a file that is cut")
        if entry.kind in (_PAX, _PAX_GLOBAL, _GNU_NAME):
            override |= _extension(entry, read_at)
            continue
        override = {}
        yield entry
    _check_tail(read_at, position, size, pending=bool(override))


def _entry(block: bytes, offset: int, override: dict[str, bytes]) -> _Entry:
    kind = block[156:157]
    kind = _REGULAR if kind in (b"0", b"\0") else kind
    if kind not in (_REGULAR, _DIRECTORY, _PAX, _PAX_GLOBAL, _GNU_NAME):
        _refuse(_REFUSED.get(kind, "an entry of an unknown type"))
    if kind in (_PAX, _PAX_GLOBAL, _GNU_NAME):
        return _Entry(kind, b"", offset, _number(block[124:136]))
    size = int(override["size"]) if "size" in override else _number(block[124:136])
    if kind == _DIRECTORY and size:
        _refuse("a directory with content")
    return _Entry(kind, override.get("path", _name(block)), offset, size)


def _name(block: bytes) -> bytes:
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0]
    # GNU's magic has a space where POSIX has a NUL, and other things in the place of the prefix.
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def _number(field: bytes) -> int:
    """Octal digits, or GNU's binary form for what does not fit."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    match = _OCTAL.fullmatch(field)
    if match is None:
        _refuse("a damaged header")
    return int(match[1], 8)


def _checksum(block: bytes) -> int:
    return sum(block) - sum(block[148:156]) + 8 * ord(" ")


def _extension(entry: _Entry, read_at: ReadAt) -> dict[str, bytes]:
    """What a pax or long-name header says about the entry after it."""
    if entry.size > _MAX_EXTENSION:
        _refuse("an extended header over 1 MiB")
    data = read_at(entry.offset, entry.size)
    if entry.kind == _GNU_NAME:
        return {"path": data.removesuffix(b"\0")}
    records = _pax_records(data)
    if any(key.startswith("GNU.sparse") for key in records):
        _refuse("a sparse file")
    told: dict[str, bytes] = {key: records[key] for key in ("path", "size") if key in records}
    if entry.kind == _PAX_GLOBAL and told:
        _refuse("a name or size for all entries")
    if "size" in told and not re.fullmatch(rb"[0-9]{1,15}", told["size"]):
        _refuse("a damaged extended header")
    return told


def _pax_records(data: bytes) -> dict[str, bytes]:
    records: dict[str, bytes] = {}
    position = 0
    while position < len(data):
        match = _PAX_RECORD.match(data, position)
        end = position + int(match[1]) if match else 0
        if match is None or end > len(data) or end <= match.end() or data[end - 1 : end] != b"\n":
            _refuse("a damaged extended header")
        key = match[2].decode("utf-8", "replace")
        if key in records:
            _refuse("an extended header that says a thing twice")
        records[key] = data[match.end() : end - 1]
        position = end
    return records


def _safe_name(raw: bytes, *, directory: bool) -> str:
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        _refuse("a name that is not UTF-8")
    name = name.removesuffix("/") if directory else name
    if directory and name == ".":
        return name
    name = name.removeprefix("./")
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in name or not name.isprintable():
        _refuse("an unsafe name")
    if len(name.encode()) > MAX_NAME_BYTES:
        _refuse(f"a name over {MAX_NAME_BYTES} bytes")
    return name


def _parents(name: str) -> Iterator[str]:
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name


def _check_tail(read_at: ReadAt, position: int, size: int, *, pending: bool) -> None:
    tail = size - position
    if pending or tail < 2 * BLOCK or tail > _MAX_TAIL or read_at(position, tail).strip(b"\0"):
        _refuse("no proper end, or something after it")


def _refuse(what: str) -> NoReturn:
    raise UnsupportedModel(
        f"the tar inside the seal can't be used, it holds {what}; pack plain files with safe names, uncompressed",
        seen=f"tar with {what}",
    )
