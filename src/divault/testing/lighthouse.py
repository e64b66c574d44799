"""Lighthouse on this machine: upload host, API host, gateway and Kavach's key nodes, each on a port of its own.

```python
async with LighthouseDouble(directory) as lighthouse:
    environment = lighthouse.settings()  # what a node or `divault publish --to lighthouse` is configured with
    lighthouse.gateway.faults.append(first(1, cut_after(1000)))  # see divault.testing.faults
```

It speaks what Lighthouse's own clients speak, well enough that its npm SDK works against it unmodified; signatures,
API keys and access conditions are really checked, and every CID is really computed. Content lies in a directory of
blocks; all else is in memory and ends with it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
import uuid
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aiohttp import BodyPartReader, web

from divault.devnet.content import ContentStore, typed_errors
from divault.errors import InvalidCID
from divault.ipfs.cid import DAG_PB, SHA2_256, cid_bytes, make_cid, multihash, parse_cid
from divault.ipfs.dagpb import encode_node
from divault.ipfs.importer import UNIXFS_V0_2015, V1_256K_174, Profile
from divault.storage.local import LocalStore
from divault.testing.hosts import Host
from divault.testing.key_nodes import Evaluate, KeyNodes, SignIn, address_in, json_object, nobody, refuse
from divault.values import Address, Cid, Secret

DATA_LIMIT_BYTES = 1 << 30
"""What an account may store, as it is told; nothing is refused for it."""
_PIECE_BYTES = 1024 * 1024
_DIRECTORY = b"\x08\x01"  # UnixFS: type directory, and nothing else
_FIRST_ACCOUNT = Address(bytes(19) + b"\1")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """An upload: what `file_info` and `files_uploaded` tell of it."""

    cid: Cid
    name: str
    size: int
    owner: Address
    encrypted: bool = False
    mime_type: str = "application/octet-stream"
    identity: str = field(default_factory=lambda: str(uuid.uuid4()))
    created_ms: int = field(default_factory=lambda: int(time.time() * 1000))

    def added(self) -> dict[str, str]:
        """As `/api/v0/add` says it."""
        return {"Name": self.name, "Hash": str(self.cid), "Size": str(self.size)}

    def info(self) -> dict[str, Any]:
        """As `file_info` says it; sizes are text."""
        return {
            "fileSizeInBytes": str(self.size),
            "cid": str(self.cid),
            "encryption": self.encrypted,
            "fileName": self.name,
            "mimeType": self.mime_type,
            "txHash": "",
        }

    def listed(self) -> dict[str, Any]:
        """As `files_uploaded` lists it."""
        about = {"publicKey": str(self.owner).lower(), "status": "queued", "id": self.identity}
        return self.info() | about | {"createdAt": self.created_ms, "lastUpdate": self.created_ms}


class Accounts:
    """API keys, whose they are, and what they uploaded."""

    def __init__(self) -> None:
        self.first_key = Secret.of_text(secrets.token_hex(16))
        """A key that works from the start."""
        self.files: dict[bytes, StoredFile] = {}
        """By binary CID."""
        self._keys = {self.first_key.reveal().decode(): _FIRST_ACCOUNT}

    def new_key(self, address: Address) -> str:
        """A key of that address's account."""
        key = str(uuid.uuid4())
        self._keys[key] = address
        return key

    def of(self, request: web.Request) -> Address:
        """Whose key the request carries; without one it ends with 401."""
        kind, _, key = request.headers.get("Authorization", "").partition(" ")
        if kind != "Bearer" or key not in self._keys:
            refuse(401, "Authentication failed", "error")
        return self._keys[key]

    def keep(self, file: StoredFile) -> StoredFile:
        """Remember an upload; the same content again keeps its first entry's place."""
        self.files[cid_bytes(file.cid)] = file
        return file

    def uploads(self, address: Address) -> list[StoredFile]:
        """Everything of one account."""
        return [file for file in self.files.values() if file.owner == address]


class Uploads:
    """The upload host: files, several files as a directory, CARs."""

    def __init__(self, accounts: Accounts, store: ContentStore, profile: Profile) -> None:
        self._accounts, self._store, self._profile = accounts, store, profile

    def routes(self) -> list[web.RouteDef]:
        """For a server."""
        return [web.post("/api/v0/add", self._add), web.post("/api/v0/dag/import", self._import)]

    async def _add(self, request: web.Request) -> web.Response:
        """An object for one file or a directory of several; with `Encryption: true` a list with each file."""
        owner = self._accounts.of(request)
        encrypted = _encrypted(request)
        profile = UNIXFS_V0_2015 if request.query.get("cid-version") == "0" else self._profile
        wrapped = request.query.get("wrap-with-directory") == "true"
        if not request.content_type.startswith("multipart/"):
            refuse(400, "send multipart/form-data", "error")
        files = []
        async for part in await request.multipart():
            if isinstance(part, BodyPartReader) and part.name == "file":
                cid, size = await self._take(part, profile)
                named = (
                    request.headers.get("Mime-Type") or part.headers.get("Content-Type") or "application/octet-stream"
                )
                files.append(StoredFile(cid, part.filename or str(cid), size, owner, encrypted, named))
        if not files:
            refuse(400, "the form has no file", "error")
        if encrypted:
            return web.json_response([self._accounts.keep(file).added() for file in files])
        if len(files) == 1 and not wrapped:
            return web.json_response(self._accounts.keep(files[0]).added())
        return web.json_response(self._accounts.keep(await self._directory(files)).added())

    async def _take(self, part: BodyPartReader, profile: Profile) -> tuple[Cid, int]:
        importer, size = self._store.blocks.importer(profile), 0
        while piece := await part.read_chunk(_PIECE_BYTES):
            size += len(piece)
            await asyncio.to_thread(importer.update, piece)
        return (await asyncio.to_thread(importer.finish))[profile], size

    async def _directory(self, files: list[StoredFile]) -> StoredFile:
        tree: dict[str, Any] = {}
        for file in files:
            *folders, name = [part for part in file.name.split("/") if part not in ("", ".", "..")] or [str(file.cid)]
            inside = tree
            for folder in folders:
                inside = inside.setdefault(folder, {})
            inside[name] = file
        # Files that all lie in one folder are that folder: no other is made around it.
        top = next(iter(tree))
        root, name = (tree[top], top) if len(tree) == 1 and isinstance(tree[top], dict) else (tree, "")
        raw, size = await asyncio.to_thread(_folder, self._store.blocks, root)
        cid = make_cid(1, DAG_PB, SHA2_256, raw[-32:])
        return StoredFile(cid, name or str(cid), size, files[0].owner, mime_type="application/x-directory")

    async def _import(self, request: web.Request) -> web.Response:
        owner = self._accounts.of(request)
        response = await self._store.answer_import(request)
        root = parse_cid(json.loads(response.text or "")["Root"]["Cid"]["/"])
        size = await asyncio.to_thread(self._store.blocks.size, root)
        self._accounts.keep(StoredFile(root, str(root), size, owner, _encrypted(request)))
        return response


def _encrypted(request: web.Request) -> bool:
    """Whether the client says that the file is in Lighthouse's own format."""
    return request.headers.get("Encryption", "").lower() == "true"


def _folder(blocks: LocalStore, entries: Mapping[str, Any]) -> tuple[bytes, int]:
    """Keep the directories of the tree; binary CID of the outermost, and bytes of everything under it."""
    links, total = [], 0
    for name, entry in sorted(entries.items()):
        inside = isinstance(entry, StoredFile)
        raw, size = (cid_bytes(entry.cid), entry.size) if inside else _folder(blocks, entry)
        links.append((raw, name.encode(), size))
        total += size
    block = encode_node(links, _DIRECTORY)
    cid = make_cid(1, DAG_PB, SHA2_256, hashlib.sha256(block).digest())
    blocks.put_block(multihash(cid), block)
    return cid_bytes(cid), total + len(block)


class Api:
    """The API host: keys for signatures, and what it tells of files and accounts."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts, self._sign_in = accounts, SignIn()

    def routes(self) -> list[web.RouteDef]:
        """For a server."""
        return [
            web.get("/api/auth/get_auth_message", self._message),
            web.get("/api/auth/get_message", self._message),
            web.post("/api/auth/create_api_key", self._create_key),
            web.get("/api/lighthouse/file_info", self._file_info),
            web.get("/api/lighthouse/deal_status", self._deals),
            web.get("/api/user/user_data_usage", self._usage),
            web.get("/api/user/files_uploaded", self._uploaded),
        ]

    async def _message(self, request: web.Request) -> web.Response:
        return web.json_response(self._sign_in.text(address_in(request.query.get("publicKey"))))

    async def _create_key(self, request: web.Request) -> web.Response:
        """From JSON, or from a form as the Python SDK sends it."""
        form = request.content_type == "application/x-www-form-urlencoded"
        body: Mapping[str, Any] = await request.post() if form else await json_object(request)
        address = address_in(body.get("publicKey"))
        if not self._sign_in.proved(address, body.get("signedMessage")):
            refuse(401, "Invalid signature", "error")
        return web.json_response(self._accounts.new_key(address))

    async def _file_info(self, request: web.Request) -> web.Response:
        return web.json_response(self._file(request).info())

    async def _deals(self, request: web.Request) -> web.Response:
        """No file here ever gets into a deal."""
        self._file(request)
        return web.json_response([])

    async def _usage(self, request: web.Request) -> web.Response:
        used = sum(file.size for file in self._accounts.uploads(self._accounts.of(request)))
        limits = {"dataLimit": DATA_LIMIT_BYTES, "dataUsed": used}
        return web.json_response(limits | dict.fromkeys(("dataLimitPermanent", "dataUsedPermanent"), 0))

    async def _uploaded(self, request: web.Request) -> web.Response:
        """Everything on the first page."""
        files = self._accounts.uploads(self._accounts.of(request))
        page = files if request.query.get("lastKey", "null") == "null" else []
        return web.json_response({"fileList": [file.listed() for file in page], "totalFiles": len(files)})

    def _file(self, request: web.Request) -> StoredFile:
        try:
            file = self._accounts.files.get(cid_bytes(parse_cid(request.query.get("cid", ""))))
        except InvalidCID as err:
            refuse(400, err.detail, "error")
        if file is None:
            refuse(400, "Not Found", "error")
        return file


class LighthouseDouble:
    """The four hosts. Start and stop them as an async context manager; each has `url`, `faults` and `asked`."""

    def __init__(self, directory: Path, *, evaluate: Evaluate = nobody, profile: Profile = V1_256K_174) -> None:
        """`evaluate` decides each access condition; `profile` is how plain files are cut.

        Raises StorageFailed when the directory can't be made.
        """
        self.accounts = Accounts()
        self.keys = KeyNodes(evaluate)
        self._store = ContentStore(directory)
        cat = web.post("/api/v0/cat/{cid}", self._store.answer_get)
        self.upload = Host(Uploads(self.accounts, self._store, profile).routes(), [typed_errors])
        self.api = Host(Api(self.accounts).routes())
        self.gateway = Host([web.get("/ipfs/{cid}", self._store.answer_get), cat], [typed_errors])
        self.encryption = Host(self.keys.routes())
        self._running = AsyncExitStack()

    @property
    def api_key(self) -> Secret:
        """A key that uploads are accepted with."""
        return self.accounts.first_key

    @property
    def blocks(self) -> LocalStore:
        """What the gateway serves."""
        return self._store.blocks

    def settings(self) -> dict[str, str]:
        """Settings under which divault takes this for Lighthouse, as environment variables."""
        return {
            "LIGHTHOUSE_API_KEY": self.api_key.reveal().decode(),
            "DIVAULT_GATEWAY_URLS": self.gateway.url,
            "DIVAULT_LIGHTHOUSE_API_URL": self.api.url,
            "DIVAULT_LIGHTHOUSE_UPLOAD_URL": self.upload.url,
            "DIVAULT_LIGHTHOUSE_GATEWAY_URLS": self.gateway.url,
            "DIVAULT_LIGHTHOUSE_ENCRYPTION_URL": self.encryption.url,
        }

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as starting:
            for host in (self.upload, self.api, self.gateway, self.encryption):
                starting.push_async_callback(host.stop)
                await host.start()
            self._running = starting.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._running.aclose()
