"""Publishing a file under the CID that we computed ourselves: no service gets to say what our content is called.

1. One pass over the file gives the root (profile unixfs-v1-2025), the nodes and where each leaf lies.
2. The file goes up as a CAR where the service takes one (`/api/v0/dag/import`), so that it can't cut it differently,
   else as a plain file (`/api/v0/add`).
3. The root that the service answers must be ours, by multihash.
4. The root block and one leaf are fetched back and hashed.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import aiohttp

from divault.errors import InvalidCID, SettingsInvalid, StorageFailed
from divault.ipfs.car import car_header, car_section
from divault.ipfs.cid import RAW, check_hash, cid_bytes, make_cid, multihash, parse_cid, split_cid
from divault.ipfs.importer import UNIXFS_V1_2025, Block, Importer
from divault.ipfs.limits import Limits
from divault.ipfs.walk import raw_cid, walk
from divault.storage.gateway import GatewayStorage
from divault.storage.source import Form, short_answer
from divault.storage.transfer import Progress
from divault.values import Cid, Secret

_PIECE_BYTES = UNIXFS_V1_2025.chunk_bytes
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=300)
"""Seconds; 300 without a byte, because a service may hash a large upload before it answers."""
_NOT_HERE = {404, 405, 415, 501}
"""Statuses of a service that takes no CARs."""


class _Prepared:
    """A file's tree: its root, its nodes, and where in the file each leaf starts."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._nodes: dict[bytes, bytes] = {}
        self._leaves: dict[bytes, tuple[int, int]] = {}
        self.size = 0
        importer = Importer([UNIXFS_V1_2025], self._keep)
        while piece := file.read(_PIECE_BYTES):
            importer.update(piece)
        self.root = importer.finish()[UNIXFS_V1_2025]

    def get(self, key: bytes) -> bytes:
        """A block by multihash; leaves are read again from the file."""
        if key in self._nodes:
            return self._nodes[key]
        offset, size = self._leaves[key]
        self._file.seek(offset)
        return self._file.read(size)

    def car(self) -> Iterator[bytes]:
        """The whole tree in depth-first order, each block once."""
        yield car_header([cid_bytes(self.root)])
        sent: set[bytes] = set()
        for piece in walk(self.root, self.get):
            if piece.cid.multihash not in sent:
                sent.add(piece.cid.multihash)
                yield car_section(raw_cid(piece.cid), piece.block)

    def content(self) -> Iterator[bytes]:
        """The plain file."""
        self._file.seek(0)
        while piece := self._file.read(_PIECE_BYTES):
            yield piece

    def sample(self) -> Cid:
        """A leaf that nobody can foresee."""
        parts, _ = split_cid(bytes((1, RAW)) + secrets.choice(list(self._leaves)))
        return make_cid(1, RAW, parts.hash_code, parts.digest)

    def _keep(self, block: Block) -> None:
        key = block.cid[-34:]
        if block.cid[1] == RAW:
            self._leaves.setdefault(key, (self.size, len(block.data)))
            self.size += len(block.data)
        else:
            self._nodes[key] = bytes(block.data)


async def publish_file(
    path: Path,
    store_url: str,
    *,
    api_key: Secret | None = None,
    progress: Progress | None = None,
    gateway_url: str | None = None,
) -> Cid:
    """The CID under which the file is stored now; part of it was fetched back from `gateway_url` (default: the store).

    Raises StorageFailed: `file` (unreadable), `cid_mismatch` (the service names other content), or as sources do.
    """
    try:
        file = path.open("rb")
    except OSError as err:
        raise StorageFailed(f"{path.name} can't be read: {err.strerror}", reason="file") from err
    with file:
        prepared = await asyncio.to_thread(_Prepared, file)
        service = _Service(store_url, api_key)
        answered = await service.upload(prepared, progress or (lambda _done, _total: None))
        if multihash(answered) != multihash(prepared.root):
            raise StorageFailed(
                f"{service.name} stored the file as {answered}, but it is {prepared.root}; nothing is published",
                cid=str(prepared.root),
                gateway=service.name,
                reason="cid_mismatch",
            )
        await _fetch_back(prepared, gateway_url or store_url)
    return prepared.root


class _Service:
    """An upload service that speaks as kubo and Lighthouse do."""

    def __init__(self, url: str, api_key: Secret | None) -> None:
        self._url = url.rstrip("/")
        self._headers = {} if api_key is None else {"Authorization": "Bearer " + _header_text(api_key)}
        self.name = url.partition("://")[2].partition("/")[0]

    async def upload(self, prepared: _Prepared, progress: Progress) -> Cid:
        """The root that the service names. Raises StorageFailed."""
        try:
            async with aiohttp.ClientSession(timeout=_TIMEOUT, headers=self._headers) as session:
                answer = await self._post(session, "/api/v0/dag/import", prepared.car, prepared, progress)
                if answer is not None:
                    return _root_of(answer, lambda told: told["Root"]["Cid"]["/"])
                answer = await self._post(
                    session, "/api/v0/add?cid-version=1&wrap-with-directory=false", prepared.content, prepared, progress
                )
        except (aiohttp.ClientError, TimeoutError) as err:
            raise self._failed(prepared, "unreachable", f"the upload broke off ({type(err).__name__})") from err
        if answer is None:
            raise self._failed(prepared, "unsupported", "takes neither CARs nor files")
        return _root_of(answer, lambda told: told["Hash"])

    async def _post(
        self,
        session: aiohttp.ClientSession,
        route: str,
        body: Callable[[], Iterator[bytes]],
        prepared: _Prepared,
        progress: Progress,
    ) -> str | None:
        """The text of the answer; None when there is no such route."""
        with aiohttp.MultipartWriter("form-data") as form:
            part = form.append(_sent(body(), prepared.size, progress), {"Content-Type": "application/octet-stream"})
            part.set_content_disposition("form-data", name="file", filename=str(prepared.root))
            async with session.post(self._url + route, data=form, allow_redirects=False) as response:
                if response.status in _NOT_HERE:
                    return None
                if response.status != 200:
                    raise self._failed(prepared, f"http_{response.status}", f"answered HTTP {response.status}")
                return await response.text()

    def _failed(self, prepared: _Prepared, reason: str, detail: str) -> StorageFailed:
        return StorageFailed(
            f"{prepared.root} to {self.name}: {detail}", cid=str(prepared.root), gateway=self.name, reason=reason
        )


def _header_text(api_key: Secret) -> str:
    key = api_key.reveal()
    if not key.isascii() or not key.decode("ascii").isprintable():
        raise SettingsInvalid("the API key has characters that no header can carry", setting="LIGHTHOUSE_API_KEY")
    return key.decode("ascii")


async def _sent(pieces: Iterator[bytes], total: int, progress: Progress) -> AsyncIterator[bytes]:
    done = 0
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece
        done = min(total, done + len(piece))
        progress(done, total)


def _root_of(answer: str, pick: Callable[[Any], Any]) -> Cid:
    """The CID in the first line of a JSON answer."""
    try:
        return parse_cid(pick(json.loads(answer.partition("\n")[0])))
    except (ValueError, KeyError, TypeError, InvalidCID) as err:
        raise StorageFailed("the service's answer names no CID; nothing is published", reason="cid_mismatch") from err


async def _fetch_back(prepared: _Prepared, gateway_url: str) -> None:
    gateway = GatewayStorage(gateway_url)
    try:
        for cid in (prepared.root, prepared.sample()):
            check_hash(multihash(cid), await short_answer(gateway, cid, Form.BLOCK, Limits().max_block_bytes))
    finally:
        gateway.close()
