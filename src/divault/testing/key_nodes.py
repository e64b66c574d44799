"""Kavach's five key nodes as a double: what they keep, and to whom they give it.

Rules:

1. Each node knows only what it was told itself: what reached three of five is not known to the other two.
2. Who asks signs the text that his address fetched last (EIP-191), or has a `jwt:` token for such a signature.
3. Whoever saves a file's shard first owns the file at that node; only the owner shares, revokes, sets conditions and
   passes the file on.
4. A shard is given to the owner, to whom it was shared with, to delegates of the owner who name him, and to whoever
   meets the file's conditions, each of which the injected `Evaluate` decides. Nobody else, and by default no condition
   is ever met.

Statuses are guesses where clients do not reveal them: 406 for a signature, 403 for a refusal.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from aiohttp import web

from divault import messages
from divault.errors import BadRequest, InvalidCID, SignatureInvalid
from divault.ipfs.cid import cid_bytes, parse_cid
from divault.values import Address, Cid
from divault.vault.conditions import AccessConditions
from divault.vault.kavach import NODES, KeyShard

Evaluate = Callable[[Mapping[str, Any], Address], Awaitable[bool]]
"""Whether an address meets one condition of a file, e.g. by asking a chain for a balance."""
Body = Mapping[str, Any]
SUCCESS = {"message": "success"}
_REFUSALS = {
    400: web.HTTPBadRequest,
    401: web.HTTPUnauthorized,
    403: web.HTTPForbidden,
    404: web.HTTPNotFound,
    406: web.HTTPNotAcceptable,
}


async def nobody(_condition: Mapping[str, Any], _address: Address) -> bool:
    """Nobody meets any condition."""
    return False


@dataclass(slots=True)
class Kept:
    """What one node keeps of one file."""

    owner: Address
    shard: KeyShard
    shared: set[Address] = field(default_factory=set)
    conditions: AccessConditions | None = None


@dataclass(slots=True)
class Node:
    """What one node knows."""

    files: dict[bytes, Kept] = field(default_factory=dict)
    delegates: dict[Address, set[Address]] = field(default_factory=dict)


class SignIn:
    """Texts to sign, one for each address, and tokens for their signatures."""

    def __init__(self) -> None:
        self._texts: dict[Address, str] = {}
        self._tokens: dict[str, Address] = {}

    def text(self, address: Address) -> str:
        """A fresh text; signatures over the last one are worthless from now on."""
        account = "Please sign this message to prove you are owner of this account"
        self._texts[address] = f"{account}: {secrets.token_hex(16)}"
        return self._texts[address]

    def proved(self, address: Address, token: object) -> bool:
        """Whether the signature or token is that address's."""
        if not isinstance(token, str) or address not in self._texts:
            return False
        if token.startswith("jwt:"):
            return self._tokens.get(token) == address
        try:
            return messages.recover(messages.personal_digest(self._texts[address]), token) == address
        except SignatureInvalid:
            return False

    def tokens(self, address: Address) -> dict[str, str]:
        """A token, and one to renew it."""
        token, refresh = f"jwt:{secrets.token_hex(24)}", f"r:{secrets.token_hex(24)}"
        self._tokens |= {token: address, refresh: address}
        return {"token": token, "refreshToken": refresh}

    def renewed_for(self, address: Address, refresh: object) -> bool:
        """Whether the refresh token is that address's; it works once."""
        if not isinstance(refresh, str) or not refresh.startswith("r:") or self._tokens.get(refresh) != address:
            return False
        del self._tokens[refresh]
        return True


class KeyNodes:
    """The five nodes behind one host, as its routes."""

    def __init__(self, evaluate: Evaluate = nobody) -> None:
        self.nodes = tuple(Node() for _ in range(NODES))
        self.sign_in = SignIn()
        self._evaluate = evaluate

    def routes(self) -> list[web.RouteDef]:
        """For a server that has them among others."""
        acts = {
            ("POST", "setSharedKey"): self._save,
            ("PUT", "setSharedKey"): self._share,
            ("DELETE", "setSharedKey"): self._revoke,
            ("POST", "retrieveSharedKey"): self._retrieve,
            ("POST", "fileAccessConditions"): self._save_under_conditions,
            ("PUT", "fileAccessConditions"): self._set_conditions,
            ("POST", "transferOwnership"): self._transfer,
            ("POST", "setAllFilesAccess"): self._delegate,
        }
        return [
            web.get("/api/message/{address}", self._message),
            web.post("/api/message/get-jwt", self._jwt),
            web.put("/api/message/get-jwt", self._renew),
            web.get("/api/fileAccessConditions/get/{cid}", self._told),
            *(web.route(how, f"/api/{name}/{{node:[1-5]}}", self._acting(act)) for (how, name), act in acts.items()),
        ]

    def shard(self, number: int, cid: Cid) -> KeyShard:
        """What node 1 to 5 keeps of a file. Raises KeyError."""
        return self.nodes[number - 1].files[cid_bytes(cid)].shard

    # --- who asks --------------------------------------------------------------------------------------------------

    async def _message(self, request: web.Request) -> web.Response:
        return web.json_response([{"message": self.sign_in.text(address_in(request.match_info["address"]))}])

    async def _jwt(self, request: web.Request) -> web.Response:
        body = await json_object(request)
        address = address_in(body.get("address"))
        if not self.sign_in.proved(address, body.get("signature")):
            return web.json_response({"error": "Invalid address or signature"}, status=400)
        return web.json_response(self.sign_in.tokens(address))

    async def _renew(self, request: web.Request) -> web.Response:
        body = await json_object(request)
        address = address_in(body.get("address"))
        if not self.sign_in.renewed_for(address, body.get("refreshToken")):
            return web.json_response({"error": "Invalid refresh token"}, status=400)
        return web.json_response(self.sign_in.tokens(address))

    def _acting(
        self, act: Callable[[Node, Address, Body], Awaitable[dict[str, Any]]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """A handler for what one node does for somebody who proved who he is."""

        async def handler(request: web.Request) -> web.StreamResponse:
            body = await json_object(request)
            who = address_in(body.get("address"))
            if not self.sign_in.proved(who, request.headers.get("Authorization", "").removeprefix("Bearer ")):
                refuse(406, "Invalid Signature")
            try:
                return web.json_response(await act(self.nodes[int(request.match_info["node"]) - 1], who, body))
            except (BadRequest, InvalidCID) as err:
                refuse(400, err.detail)

        return handler

    # --- what an owner does ----------------------------------------------------------------------------------------

    async def _save(self, node: Node, who: Address, body: Body) -> dict[str, Any]:
        kept = Kept(who, KeyShard.parse(body.get("payload")), _addresses(body.get("sharedTo", [])))
        before = node.files.get(_key(body))
        if before is not None and before.owner != who:
            refuse(403, "Access Denied")
        node.files[_key(body)] = kept
        return SUCCESS

    async def _share(self, node: Node, who: Address, body: Body) -> dict[str, Any]:
        _owned(node, who, body).shared |= _addresses(body.get("shareTo"))
        return SUCCESS

    async def _revoke(self, node: Node, who: Address, body: Body) -> dict[str, Any]:
        _owned(node, who, body).shared -= _addresses(body.get("revokeTo"))
        return SUCCESS

    async def _save_under_conditions(self, node: Node, who: Address, body: Body) -> dict[str, Any]:
        conditions = _conditions(body)
        await self._save(node, who, body)
        node.files[_key(body)].conditions = conditions
        return SUCCESS

    async def _set_conditions(self, node: Node, who: Address, body: Body) -> dict[str, Any]:
        kept = _owned(node, who, body)
        kept.conditions = _conditions(body)
        return SUCCESS

    async def _transfer(self, node: Node, who: Address, body: Body) -> dict[str, Any]:
        kept = _owned(node, who, body)
        kept.owner = address_in(body.get("newOwner"))
        if body.get("resetSharedTo", True) is not False:
            kept.shared.clear()
        return SUCCESS

    async def _delegate(self, node: Node, who: Address, body: Body) -> dict[str, Any]:
        node.delegates.setdefault(who, set()).update(_addresses(body.get("allFilesAccess")))
        return SUCCESS

    # --- who gets what ---------------------------------------------------------------------------------------------

    async def _retrieve(self, node: Node, who: Address, body: Body) -> dict[str, Any]:
        kept = node.files.get(_key(body))
        if kept is None:
            refuse(404, "null")
        if not await self._may_have(node, kept, who, body):
            refuse(403, {"message": {"message": "Access Denied"}})
        return {"payload": {"key": kept.shard.key, "index": kept.shard.index}}

    async def _may_have(self, node: Node, kept: Kept, who: Address, body: Body) -> bool:
        if who == kept.owner or who in kept.shared:
            return True
        named = body.get("ownerAddress")
        if named is not None and address_in(named) == kept.owner and who in node.delegates.get(kept.owner, ()):
            return True
        if kept.conditions is None:
            return False
        asked = (self._evaluate(condition, who) for condition in kept.conditions.conditions)
        return kept.conditions.met(await asyncio.gather(*asked))

    async def _told(self, request: web.Request) -> web.Response:
        """What anybody may know, as the first node knows it."""
        try:
            cid = parse_cid(request.match_info["cid"])
        except InvalidCID as err:
            refuse(400, err.detail)
        kept = self.nodes[0].files.get(cid_bytes(cid))
        conditions = None if kept is None else kept.conditions
        of = {} if conditions is None else {conditions.chain_type: list(conditions.conditions)}
        return web.json_response(
            {
                "aggregator": None if conditions is None else conditions.aggregator,
                "conditions": of.get("EVM", []),
                "conditionsSolana": of.get("SOLANA", []),
                "conditionsCoreum": of.get("COREUM", []),
                "sharedTo": [] if kept is None else sorted(str(address) for address in kept.shared),
                "owner": None if kept is None else str(kept.owner),
                "cid": str(cid),
            }
        )


def refuse(status: int, message: Any, member: str = "message") -> NoReturn:
    """End the request with this status and a JSON object that says why."""
    raise _REFUSALS[status](text=json.dumps({member: message}), content_type="application/json")


async def json_object(request: web.Request) -> dict[str, Any]:
    """The body; whatever is no JSON object ends the request with 400."""
    try:
        body = json.loads(await request.read())
    except ValueError:
        body = None
    if not isinstance(body, dict):
        refuse(400, "the body is a JSON object")
    return body


def address_in(value: object) -> Address:
    """An address in any case of its letters; whatever is none ends the request with 400."""
    try:
        return Address.parse(value.lower() if isinstance(value, str) else "")
    except SignatureInvalid:
        refuse(400, "Invalid address")


def _addresses(values: object) -> set[Address]:
    if not isinstance(values, list):
        raise BadRequest("addresses come as a list")
    return {address_in(value) for value in values}


def _key(body: Body) -> bytes:
    return cid_bytes(parse_cid(str(body.get("cid"))))


def _owned(node: Node, who: Address, body: Body) -> Kept:
    kept = node.files.get(_key(body))
    if kept is None or kept.owner != who:
        refuse(403, "Access Denied")
    return kept


def _conditions(body: Body) -> AccessConditions:
    return AccessConditions.parse({name: value for name, value in body.items() if name != "payload"})
