"""Publishing a file under the CID that we computed ourselves: no service gets to say what our content is called.

1. One pass over the file gives the root for every profile that the service may use, the nodes and where each leaf lies.
2. The file goes up as a CAR where the service takes one (`/api/v0/dag/import`), so that it can't cut it differently,
   else as a plain file (`/api/v0/add`).
3. The root that the service answers must be one of ours, by multihash.
4. A sample is fetched back from a gateway: blocks from the root down to a random leaf, or a random piece of the file.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import aiohttp

from divault.errors import BlockTooLarge, HashMismatch, InvalidCID, SettingsInvalid, StorageFailed
from divault.ipfs.car import car_header, car_section
from divault.ipfs.cid import RAW, check_hash, cid_bytes, make_cid, multihash, parse_cid
from divault.ipfs.dagpb import decode_node
from divault.ipfs.importer import UNIXFS_V1_2025, Block, Importer, Profile
from divault.ipfs.limits import Limits
from divault.ipfs.walk import raw_cid, walk
from divault.storage._api import Reply, bearer, failures_of, patiently, read_reply
from divault.storage.arrival import Progress
from divault.storage.gateway import GatewayStorage
from divault.storage.source import Form, Storage, short_answer
from divault.values import Cid, Secret

_PIECE_BYTES = UNIXFS_V1_2025.chunk_bytes
_SAMPLE_BYTES = 64 * 1024
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=300)
"""Seconds; 300 without a byte, because a service may hash a large upload before it answers."""
_NO_CAR = {400, 404, 405, 415, 501}
"""Statuses of a service that takes no CARs."""
_APPEARS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Waits for content that a gateway does not know yet: it takes some seconds from the upload host to there."""
_WORDS = {
    401: "refuses the API key: set the one of your account",
    402: "asks for money: the account's plan is used up",
    403: "refuses the API key: set the one of your account",
    413: "takes no file of this size: the account's limit is lower",
}


@dataclass(frozen=True, slots=True)
class Stored:
    """A file that a service has: its CID, in which way it was cut, its size in bytes."""

    cid: Cid
    profile: str
    size: int


@dataclass(frozen=True, slots=True)
class UploadService:
    """A service that takes files as kubo and Lighthouse do."""

    url: str
    api_key: Secret | None = None
    profiles: Sequence[Profile] = (UNIXFS_V1_2025,)
    """How it may cut a plain file."""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Host and port."""
        return urlsplit(self.url).netloc


async def publish_file(
    path: Path,
    store_url: str,
    *,
    api_key: Secret | None = None,
    progress: Progress | None = None,
    gateway_url: str | None = None,
) -> Cid:
    """The CID under which the file is stored now; part of it was fetched back from `gateway_url` (default: the store).

    Raises as `store_file`.
    """
    service = UploadService(store_url, api_key)
    return (await store_file(path, service, [gateway_url or store_url], progress=progress)).cid


async def store_file(
    path: Path, service: UploadService, gateways: Sequence[str], *, progress: Progress | None = None
) -> Stored:
    """What the service has now; a sample of it came back from the first of the gateways that has it.

    Raises StorageFailed: `file` (unreadable, or changed meanwhile), `cid_mismatch` (the service or a gateway has other
    content under its name), or the reasons of transports and sources; SettingsInvalid (a key that no header carries).
    """
    try:
        file = path.open("rb")
    except OSError as err:
        raise StorageFailed(f"{path.name} can't be read: {err.strerror}", reason="file") from err
    with file:
        prepared = await asyncio.to_thread(_Prepared, file, service.profiles)
        stored = await _Upload(service, prepared, progress or (lambda _done, _total: None)).run()
        await _fetch_back(prepared, stored.cid, gateways)
    return stored


class _Prepared:
    """A file's tree: its roots, its nodes, and where in the file each leaf starts."""

    def __init__(self, file: BinaryIO, profiles: Sequence[Profile]) -> None:
        self._file = file
        self._nodes: dict[bytes, bytes] = {}
        self._leaves: dict[bytes, tuple[int, int]] = {}
        self.size = 0
        importer = Importer(list(dict.fromkeys((UNIXFS_V1_2025, *profiles))), self._keep)
        file.seek(0)
        while piece := file.read(_PIECE_BYTES):
            importer.update(piece)
        self.roots = importer.finish()
        self.root = self.roots[UNIXFS_V1_2025]

    def stored_as(self, answered: Cid) -> Stored | None:
        """The file under the CID that a service answered; None when it is no name of this file."""
        for profile, root in self.roots.items():
            if multihash(root) == multihash(answered) and root.codec == answered.codec:
                return Stored(root, profile.name, self.size)
        return None

    def get(self, key: bytes) -> bytes:
        """A block by multihash; leaves are read again from the file."""
        if key in self._nodes:
            return self._nodes[key]
        return self.read(*self._leaves[key])

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the file."""
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

    def _keep(self, block: Block) -> None:
        if block.profile is not UNIXFS_V1_2025:
            return
        key = block.cid[-34:]
        if block.cid[1] == RAW:
            self._leaves.setdefault(key, (self.size, len(block.data)))
            self.size += len(block.data)
        else:
            self._nodes[key] = bytes(block.data)


class _Upload:
    """One file on its way to one service."""

    def __init__(self, service: UploadService, prepared: _Prepared, progress: Progress) -> None:
        self._service, self._prepared, self._progress = service, prepared, progress
        if urlsplit(service.url).scheme not in ("http", "https") or not service.name:
            raise SettingsInvalid(
                "a store is written like https://upload.example", setting="DIVAULT_LIGHTHOUSE_UPLOAD_URL"
            )
        self._url = service.url.rstrip("/")
        self._headers = dict(service.headers)
        if service.api_key is not None:
            self._headers["Authorization"] = bearer(service.api_key, "LIGHTHOUSE_API_KEY")

    async def run(self) -> Stored:
        """The file as the service has it. Raises StorageFailed."""
        try:
            reply = await self._post("/api/v0/dag/import", self._prepared.car, f"{self._prepared.root}.car")
            if reply.status in _NO_CAR:
                route = "/api/v0/add?wrap-with-directory=false&cid-version=1"
                reply = await self._post(route, self._prepared.content, str(self._prepared.root))
            return self._checked(reply)
        except StorageFailed as err:
            raise type(err)(
                f"{self._prepared.root} to {err.detail}", **{"cid": str(self._prepared.root), **err.data}
            ) from err

    def _checked(self, reply: Reply) -> Stored:
        if reply.status != 200:
            if reply.status in _NO_CAR:
                raise reply.failed(f"takes neither CARs nor files (HTTP {reply.status})", reason="unsupported")
            detail = _WORDS.get(reply.status) or f"answered HTTP {reply.status}: {reply.words()}"
            raise reply.failed(detail)
        answered = root_of(reply)
        stored = self._prepared.stored_as(answered)
        if stored is None:
            raise reply.failed(
                f"stored the file as {answered}, which is no name of it; nothing is published", reason="cid_mismatch"
            )
        return stored

    async def _post(self, route: str, body: Callable[[], Iterator[bytes]], filename: str) -> Reply:
        async def once() -> Reply:
            with aiohttp.MultipartWriter("form-data") as form:
                pieces = _sent(body(), self._prepared.size, self._progress)
                part = form.append(pieces, {"Content-Type": "application/octet-stream"})
                part.set_content_disposition("form-data", name="file", filename=filename)
                async with (
                    failures_of(self._service.name),
                    aiohttp.ClientSession(timeout=_TIMEOUT, headers=self._headers) as session,
                    session.post(self._url + route, data=form, allow_redirects=False) as response,
                ):
                    return await read_reply(self._service.name, response)

        return await patiently(once)


async def _sent(pieces: Iterator[bytes], total: int, progress: Progress) -> AsyncIterator[bytes]:
    done = 0
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece
        done = min(total, done + len(piece))
        progress(done, total)


def root_of(reply: Reply) -> Cid:
    """The root in a service's answer: an object, a list of them, or a line for each, where the root comes last.

    Raises StorageFailed: `not_json`, `cid_mismatch` (it names no CID).
    """
    named = [name for value in _values(reply) for name in _names(value)]
    try:
        return parse_cid(named[-1])
    except (IndexError, InvalidCID) as err:
        raise reply.failed("names no CID in its answer; nothing is published", reason="cid_mismatch") from err


def _values(reply: Reply) -> list[Any]:
    """The JSON values in an answer; lines that are none may stand before them."""
    try:
        return [json.loads(reply.text)]
    except (ValueError, RecursionError):
        found = []
    for line in reply.text.splitlines():
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return found or [reply.json()]


def _names(value: Any) -> Iterator[str]:
    """`Hash` as `add` answers, `Root.Cid./` as `dag/import` does."""
    if isinstance(value, list):
        for item in value:
            if isinstance(item, dict):
                yield from _names(item)
        return
    if not isinstance(value, dict):
        return
    name = value.get("Hash")
    for step in ("Root", "Cid", "/") if name is None else ():
        value = value.get(step) if isinstance(value, dict) else None
        name = value
    if isinstance(name, str):
        yield name


async def _fetch_back(prepared: _Prepared, cid: Cid, gateways: Sequence[str]) -> None:
    """Return when a gateway gave a sample that is ours. Raises StorageFailed for the last one that did not."""
    failed: StorageFailed | None = None
    for wait in (*_APPEARS_S, None):
        for url in gateways:
            gateway = GatewayStorage(url)
            try:
                await _sample(gateway, prepared, cid)
            except StorageFailed as err:
                failed = err
                if isinstance(err, HashMismatch):
                    raise
            else:
                return
            finally:
                gateway.close()
        if wait is None or (failed is not None and failed.data.get("reason") not in ("not_found", "http_504", "busy")):
            break
        await asyncio.sleep(wait)
    raise failed or StorageFailed(f"no gateway is set to fetch {cid} back from", cid=str(cid), reason="no_source")


async def _sample(gateway: Storage, prepared: _Prepared, cid: Cid) -> None:
    try:
        await _sample_blocks(gateway, cid)
    except (HashMismatch, BlockTooLarge) as err:
        await _sample_file(gateway, prepared, cid, err)  # it may ignore `format` and send the plain file
    except StorageFailed as err:
        if err.data.get("reason") != "unsupported":
            raise
        await _sample_file(gateway, prepared, cid, err)


async def _sample_blocks(gateway: Storage, cid: Cid) -> None:
    """From the root, whose hash we computed, down to a leaf that nobody can foresee: each block names the next."""
    while True:
        block = await short_answer(gateway, cid, Form.BLOCK, Limits().max_block_bytes)
        check_hash(multihash(cid), block)
        links = () if cid.codec == RAW else decode_node(block).links
        if not links:
            return
        child = secrets.choice(links).cid
        cid = make_cid(1, child.codec, child.hash_code, child.digest)


async def _sample_file(gateway: Storage, prepared: _Prepared, cid: Cid, before: StorageFailed) -> None:
    """A random piece of the plain file, compared with ours."""
    start = secrets.randbelow(max(1, prepared.size - _SAMPLE_BYTES))
    wanted = range(start, min(prepared.size, start + _SAMPLE_BYTES))
    if not wanted:
        raise before
    try:
        came = await _bytes_of(gateway, cid, wanted, (wanted,))
    except StorageFailed as err:
        if err.data.get("reason") != "unranged":
            raise
        came = await _bytes_of(gateway, cid, wanted, ())
    if came != await asyncio.to_thread(prepared.read, wanted.start, len(wanted)):
        raise HashMismatch(
            f"{gateway.name} has other bytes under {cid}; nothing is published", cid=str(cid), gateway=gateway.name
        )


async def _bytes_of(gateway: Storage, cid: Cid, wanted: range, ranges: tuple[range, ...]) -> bytes:
    """The wanted bytes out of an answer that is the range or, without ranges, the file from its start."""
    came, at = bytearray(), wanted.start if ranges else 0
    async with aclosing(gateway.read(cid, ranges, Form.FILE)) as pieces:
        async for piece in pieces:
            came += piece[max(0, wanted.start - at) : max(0, wanted.stop - at)]
            at += len(piece)
            if at >= wanted.stop:
                break
    return bytes(came)
