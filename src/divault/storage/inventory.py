"""What a cache of ciphertext holds, and whether it still is what its names say. Works beside a running node."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from divault.errors import ContentInvalid
from divault.ipfs.limits import Limits
from divault.storage.cache import CiphertextCache, Content
from divault.storage.folders import read_folder


@dataclass(frozen=True, slots=True)
class Listed:
    """One entry: its kind (`file`, `folder`, `part`), its CID in version 1 (None: inline), bytes, unix time of use."""

    kind: str
    cid: str | None
    bytes: int
    used_at: float
    in_use: bool


def inventory(cache: CiphertextCache) -> list[Listed]:
    """All entries and unfinished parts, the most recently used first. Blocking."""
    found = [
        Listed(_kind(content), None if content.cid is None else content.cid.text, content.size, content.used_at,
               content.in_use)
        for content in cache.contents()
    ]  # fmt: skip
    return sorted(found, key=lambda listed: listed.used_at, reverse=True)


def verify(cache: CiphertextCache) -> Iterator[tuple[Listed, bool]]:
    """Each complete entry, and whether every byte of it is right; a damaged one is removed. Blocking: hashes it all."""
    for content in list(cache.contents()):
        cid = content.cid
        if content.partial or cid is None:
            continue
        listed = Listed(_kind(content), cid.text, content.size, content.used_at, content.in_use)
        if content.folder:
            yield listed, _folder_is_right(cache, content)
            continue
        entry = cache.open(cid, replace(Limits(), max_size_bytes=max(content.size, 1)), touch=False)
        if entry is not None:
            entry.close()
        yield listed, entry is not None


def _folder_is_right(cache: CiphertextCache, content: Content) -> bool:
    cid = content.cid
    kept = None
    with contextlib.suppress(OSError):
        kept = content.path.read_bytes()
    if cid is None or kept is None:
        return False
    with contextlib.suppress(ContentInvalid):
        read_folder(cid, kept, Limits())
        os.utime(content.path, (content.used_at, content.used_at))
        return True
    cache.keep_folder(cid, None)
    return False


def _kind(content: Content) -> str:
    return "part" if content.partial else "folder" if content.folder else "file"
