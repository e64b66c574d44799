"""A local content store: an IPFS gateway and an upload service in one small server, for the demo and for tests.

```python
async with ContentStore(directory) as store:
    print(store.url)  # a gateway: GET {url}/ipfs/<cid>; an upload service: POST {url}/api/v0/add
```

It answers like a trustless gateway (`format=raw`, `format=car` with `dag-scope` and `entity-bytes`), serves plain files
with Range, and takes files (`/api/v0/add`, answering as Lighthouse does) and CARs (`/api/v0/dag/import`, as kubo does).
It listens on 127.0.0.1 alone, on a port that the system chooses.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from aiohttp import BodyPartReader, web
from aiohttp.typedefs import Handler

from divault.errors import ContentInvalid, InvalidCID, MissingBlock, StorageFailed
from divault.ipfs.cid import parse_cid
from divault.ipfs.importer import UNIXFS_V0_2015, UNIXFS_V1_2025
from divault.storage.local import CarImport, LocalStore
from divault.storage.source import Form
from divault.values import Cid, Secret

_CHUNK_BYTES = 1024 * 1024
_CAR_TYPE = "application/vnd.ipld.car; version=1; order=dfs; dups=y"
_ENTITY_BYTES = re.compile(r"(-?[0-9]{1,18}):(-?[0-9]{1,18}|\*)", re.ASCII)
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.ASCII)


class ContentStore:
    """The server over a directory of blocks. Start and stop it as an async context manager."""

    def __init__(self, directory: Path, *, api_key: Secret | None = None) -> None:
        """With `api_key` uploads need it as a bearer token. Raises StorageFailed when the directory can't be made."""
        self.blocks = LocalStore(directory)
        self._api_key = api_key
        self._runner: web.AppRunner | None = None
        self.url = ""
        """`http://127.0.0.1:PORT` while it runs."""

    async def __aenter__(self) -> Self:
        app = web.Application(middlewares=[typed_errors])
        app.router.add_get("/ipfs/{cid}", self.answer_get)  # HEAD too
        app.router.add_post("/api/v0/add", self._add)
        app.router.add_post("/api/v0/dag/import", self.answer_import)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner, self.url = None, ""

    async def answer_get(self, request: web.Request) -> web.StreamResponse:
        """The handler of `/ipfs/{cid}`, for servers that have it among others, behind `typed_errors`."""
        cid = parse_cid(request.match_info["cid"])
        form = _form(request)
        if form is Form.BLOCK:
            return await self._send(request, cid, (), form, _headers("application/vnd.ipld.raw", cid, "raw"))
        size = await asyncio.to_thread(self._size, cid)
        if form is Form.CAR:
            headers = _headers(_CAR_TYPE, cid, "car") | {"X-Content-Type-Options": "nosniff"}
            scope = request.query.get("dag-scope", "all")
            ranges = (range(0),) if scope == "block" else _entity_bytes(request, size)
            return await self._send(request, cid, ranges, form, headers)
        if size is None:
            raise web.HTTPNotImplemented(text="directories are served as CAR only\n")
        return await self._file(request, cid, size)

    async def _file(self, request: web.Request, cid: Cid, size: int) -> web.StreamResponse:
        headers = _headers("application/octet-stream", cid, "file") | {"Accept-Ranges": "bytes"}
        wanted = _range(request.headers.get("Range", ""), size)
        if wanted is None:
            return await self._send(request, cid, (), Form.FILE, headers | {"Content-Length": str(size)})
        if not wanted:
            raise web.HTTPRequestRangeNotSatisfiable(headers={"Content-Range": f"bytes */{size}"})
        headers |= {
            "Content-Range": f"bytes {wanted.start}-{wanted.stop - 1}/{size}",
            "Content-Length": str(len(wanted)),
        }
        return await self._send(request, cid, (wanted,), Form.FILE, headers, status=206)

    async def _send(
        self,
        request: web.Request,
        cid: Cid,
        ranges: tuple[range, ...],
        form: Form,
        headers: dict[str, str],
        *,
        status: int = 200,
    ) -> web.StreamResponse:
        """The first piece is read before the head goes out, so that what is missing is a 404."""
        async with aclosing(self.blocks.read(cid, ranges, form)) as pieces:
            first = await anext(pieces, b"")
            response = web.StreamResponse(status=status, headers=headers)
            await response.prepare(request)
            if request.method != "HEAD":
                await _pour(response, first, pieces)
        return response

    def _size(self, cid: Cid) -> int | None:
        """None for a directory."""
        try:
            return self.blocks.size(cid)
        except MissingBlock:
            raise
        except ContentInvalid:
            return None

    async def _add(self, request: web.Request) -> web.Response:
        self._check_key(request)
        part = await _file_part(request)
        profile = UNIXFS_V0_2015 if request.query.get("cid-version") == "0" else UNIXFS_V1_2025
        importer, size = self.blocks.importer(profile), 0
        while chunk := await part.read_chunk(_CHUNK_BYTES):
            size += len(chunk)
            await asyncio.to_thread(importer.update, chunk)
        root = (await asyncio.to_thread(importer.finish))[profile]
        return web.json_response({"Name": part.filename or str(root), "Hash": str(root), "Size": str(size)})

    async def answer_import(self, request: web.Request) -> web.Response:
        """The handler of `/api/v0/dag/import`, likewise."""
        self._check_key(request)
        incoming = CarImport(self.blocks)
        async for chunk in _car_body(request):
            await asyncio.to_thread(incoming.update, chunk)
        root = await asyncio.to_thread(incoming.finish)
        told = {"Root": {"Cid": {"/": str(root)}, "PinErrorMsg": ""}}
        return web.Response(text=json.dumps(told) + "\n", content_type="application/json")

    def _check_key(self, request: web.Request) -> None:
        if self._api_key is None:
            return
        have = request.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(have, b"Bearer " + self._api_key.reveal()):
            raise web.HTTPUnauthorized(text="uploads need the API key as a bearer token\n")


@contextmanager
def content_store(directory: Path, *, api_key: Secret | None = None) -> Iterator[ContentStore]:
    """A running store in a thread of its own, for programs without an event loop."""
    store, loop = ContentStore(directory, api_key=api_key), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="content-store", daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(store.__aenter__(), loop).result()
        yield store
    finally:
        asyncio.run_coroutine_threadsafe(store.__aexit__(None, None, None), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


@web.middleware
async def typed_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Middleware: what the store raises becomes a status and a line of text."""
    try:
        return await handler(request)
    except InvalidCID as err:
        return web.Response(status=400, text=f"{err.detail}\n")
    except StorageFailed as err:
        status = {"not_found": 404, "MissingBlock": 404, "disk": 507}.get(str(err.data.get("reason")), 400)
        return web.Response(status=status, text=f"{err.detail}\n")


async def _pour(response: web.StreamResponse, first: bytes, pieces: AsyncGenerator[bytes, None]) -> None:
    """The rest can only break off when a block is missing; the client sees that the body is cut."""
    await response.write(first)
    try:
        async for piece in pieces:
            await response.write(piece)
    except StorageFailed as err:
        raise ConnectionResetError(err.detail) from err
    await response.write_eof()


async def _file_part(request: web.Request) -> BodyPartReader:
    if not request.content_type.startswith("multipart/"):
        raise web.HTTPBadRequest(text="send multipart/form-data with one file\n")
    part = await (await request.multipart()).next()
    if not isinstance(part, BodyPartReader):
        raise web.HTTPBadRequest(text="the form has no file\n")
    return part


async def _car_body(request: web.Request) -> AsyncIterator[bytes]:
    """A CAR as the body itself, or as the file of a form, as kubo takes it."""
    if request.content_type.startswith("multipart/"):
        part = await _file_part(request)
        while chunk := await part.read_chunk(_CHUNK_BYTES):
            yield chunk
    else:
        async for chunk in request.content.iter_chunked(_CHUNK_BYTES):
            yield chunk


def _form(request: web.Request) -> Form:
    """What is asked for; `format` wins over Accept (IPIP-0523)."""
    asked = request.query.get("format")
    if asked is None:
        accept = request.headers.get("Accept", "")
        asked = "raw" if "vnd.ipld.raw" in accept else "car" if "vnd.ipld.car" in accept else "file"
    if asked not in ("raw", "car", "file"):
        raise web.HTTPBadRequest(text="format is raw or car\n")
    return Form(asked)


def _headers(content_type: str, cid: Cid, suffix: str) -> dict[str, str]:
    kept = "public, max-age=29030400, immutable"
    return {"Content-Type": content_type, "Etag": f'"{cid}.{suffix}"', "Cache-Control": kept, "X-Ipfs-Roots": str(cid)}


def _entity_bytes(request: web.Request, size: int | None) -> tuple[range, ...]:
    """`from:to`, inclusive, `*` for the end, negative from the end; outside the file only the root block is sent."""
    asked = request.query.get("entity-bytes")
    if asked is None or size is None:
        return ()
    match = _ENTITY_BYTES.fullmatch(asked)
    if match is None:
        raise web.HTTPBadRequest(text="entity-bytes is from:to\n")
    first = int(match[1]) + (size if match[1].startswith("-") else 0)
    last = size - 1 if match[2] == "*" else int(match[2]) + (size if match[2].startswith("-") else 0)
    return (range(max(0, first), min(size, last + 1)),)


def _range(header: str, size: int) -> range | None:
    """One range of a file; None where there is none or one that we may ignore; empty where it lies outside."""
    match = _RANGE.fullmatch(header)
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":
        return range(max(0, size - int(match[2])), size)
    return range(int(match[1]), min(size, int(match[2]) + 1) if match[2] else size)
