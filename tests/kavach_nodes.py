"""Five key nodes on loopback that answer as Kavach's clients expect, until a fault decides otherwise."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from divault.errors import SignatureInvalid
from divault.messages import personal_digest, recover

Fault = Callable[[Mapping[str, Any]], Awaitable[web.Response | None]]
"""What a node answers instead; gets the request's body. None: the honest answer."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it came."""

    method: str
    path: str
    authorization: str | None
    body: Any = None


@dataclass(slots=True)
class FileEntry:
    """What the nodes know of a file."""

    owner: str
    shards: dict[int, Any] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)
    conditions: dict[str, Any] = field(default_factory=dict)


class KavachNodes:
    """Serves while it is open. `faults` is by node number; `asked` is every request in order of arrival."""

    def __init__(self) -> None:
        self.faults: dict[int, Fault] = {}
        self.asked: list[Asked] = []
        self.files: dict[str, FileEntry] = {}
        self.delegates: dict[str, set[str]] = {}
        self.url = ""
        self._messages: dict[str, str] = {}
        self._tokens: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get("/api/message/{address}", self._message)
        app.router.add_route("*", "/api/message/get-jwt", self._jwt)
        app.router.add_get("/api/fileAccessConditions/get/{cid}", self._told)
        app.router.add_route("*", "/api/{route}/{node:[1-5]}", self._node)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = "http://{}:{}".format(*self._runner.addresses[0][:2])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    async def _message(self, request: web.Request) -> web.Response:
        self._note(request)
        address = request.match_info["address"].lower()
        self._messages[address] = f"Sign to prove that you own this account: {secrets.token_hex(16)}"
        return web.json_response([{"message": self._messages[address]}])

    async def _jwt(self, request: web.Request) -> web.Response:
        body = await request.json()
        self._note(request, body)
        address = body["address"].lower()
        known = body.get("refreshToken") in self._tokens or self._signed(address, body.get("signature", ""))
        if not known:
            return web.json_response({"error": "Invalid address or signature"}, status=400)
        token, refresh = f"jwt:{secrets.token_hex(8)}", f"r:{secrets.token_hex(8)}"
        self._tokens |= {token: address, refresh: address}
        return web.json_response({"token": token, "refreshToken": refresh})

    async def _told(self, request: web.Request) -> web.Response:
        self._note(request)
        entry = self.files.get(request.match_info["cid"])
        owner = None if entry is None else entry.owner
        shared = [] if entry is None else sorted(entry.shared)
        return web.json_response({"aggregator": None, "conditions": [], "sharedTo": shared, "owner": owner})

    async def _node(self, request: web.Request) -> web.Response:
        body, number = await request.json(), int(request.match_info["node"])
        self._note(request, body)
        fault = self.faults.get(number)
        answer = await fault(body) if fault is not None else None
        return answer or self._honest(request, number, body)

    def _honest(self, request: web.Request, number: int, body: dict[str, Any]) -> web.Response:
        route, address = request.match_info["route"], body["address"].lower()
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self._tokens.get(token) != address and not self._signed(address, token):
            return web.json_response({"message": "Invalid Signature"}, status=406)
        if route == "setAllFilesAccess":
            self.delegates.setdefault(address, set()).update(a.lower() for a in body["allFilesAccess"])
        elif route == "retrieveSharedKey":
            return self._retrieve(number, address, body)
        elif "payload" in body:
            entry = self.files.setdefault(body["cid"], FileEntry(address))
            entry.shards[number] = body["payload"]
            entry.shared.update(a.lower() for a in body.get("sharedTo", ()))
            entry.conditions = body
        else:
            return self._changed(route, address, body)
        return web.json_response({"message": "success"})

    def _changed(self, route: str, address: str, body: dict[str, Any]) -> web.Response:
        entry = self.files.get(body["cid"])
        if entry is None or entry.owner != address:
            return web.json_response({"message": "Access Denied"}, status=403)
        entry.shared.update(a.lower() for a in body.get("shareTo", ()))
        entry.shared.difference_update(a.lower() for a in body.get("revokeTo", ()))
        if "conditions" in body:
            entry.conditions = body
        return web.json_response({"message": "success"})

    def _retrieve(self, number: int, address: str, body: dict[str, Any]) -> web.Response:
        entry = self.files.get(body["cid"])
        if entry is None or number not in entry.shards:
            return web.json_response({"message": "null"}, status=404)
        delegated = (
            address in self.delegates.get(entry.owner, ()) and body.get("ownerAddress", "").lower() == entry.owner
        )
        if address != entry.owner and address not in entry.shared and not delegated:
            return web.json_response({"message": {"message": {"message": "Access Denied"}}}, status=403)
        return web.json_response({"payload": entry.shards[number]})

    def _signed(self, address: str, signature: str) -> bool:
        try:
            return str(recover(personal_digest(self._messages.get(address, "")), signature)).lower() == address
        except SignatureInvalid:
            return False

    def _note(self, request: web.Request, body: Any = None) -> None:
        self.asked.append(Asked(request.method, request.path_qs, request.headers.get("Authorization"), body))


def answering(value: Any, status: int = 200) -> Fault:
    """A node that says this to everybody."""

    async def fault(body: Mapping[str, Any]) -> web.Response:
        return web.json_response(value, status=status)

    return fault


def saying(text: str, status: int = 200, **headers: str) -> Fault:
    """A node that answers this text."""

    async def fault(body: Mapping[str, Any]) -> web.Response:
        return web.Response(text=text, status=status, content_type="text/html", headers=headers)

    return fault


async def silent(body: Mapping[str, Any]) -> None:
    """A node that takes the request and says nothing for longer than any test lasts."""
    await asyncio.sleep(600)


async def dead(body: Mapping[str, Any]) -> web.Response:
    """A node that drops the connection."""
    raise ConnectionResetError
