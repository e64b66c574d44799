"""Kavach's five key nodes: shards of the keys of Lighthouse-sealed files, kept, shared, revoked and fetched.

Rules:

1. All nodes are asked at once; what needs all of them says which one failed, and may be repeated as it is.
2. A key is tried when three shards are here. If it does not open the file, the other nodes' answers are waited for, and
   the sets that outvote a wrong shard are tried first (`vault.kavach.likely_keys`).
3. Who asks proves himself by a signature over the nodes' message (EIP-191) or by a `jwt:` token. The nodes hold one
   message per address: whoever fetches the next one makes the signatures over the last one worthless.
4. A node's own delegation opens a file only for the model of the wallet that owns the file at Kavach: otherwise anybody
   could register somebody else's file under a gate of his own.
5. Five nodes of one team on one host: this is custody and availability, not decentralisation.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from divault import messages
from divault.errors import AccessDenied, BadRequest, StorageFailed, WrongKey
from divault.ipfs.cid import parse_cid
from divault.limits import WrongKeys
from divault.storage._api import ApiHost, Reply, bearer
from divault.values import Address, Cid, Grant, Secret
from divault.vault.conditions import AccessConditions
from divault.vault.kavach import NODES, THRESHOLD, KeyShard, likely_keys, recover_key
from divault.vault.keys import CallerKey, KeySource, SealFormat, recognise

SETTING = "DIVAULT_LIGHTHOUSE_ENCRYPTION_URL"
NODE_TIMEOUT_S = 10.0
"""Seconds for one exchange with one node; the others do not wait for it."""
_MAX_MESSAGE = 2048  # characters of the text to sign
_MAX_TOKEN = 4096
_DENIED = (401, 403, 406)


@dataclass(frozen=True, slots=True)
class Authorisation:
    """Who asks, and the signature or `jwt:` token that proves it to the nodes."""

    address: Address
    token: Secret

    @classmethod
    def parse(cls, address: Address, token: Secret) -> Authorisation:
        """From what a caller passed on: 0x and 130 hex digits, or `jwt:` and a token. Raises BadRequest."""
        text = token.reveal().decode("utf-8", "replace")
        plain = text.isascii() and text.isprintable() and " " not in text and len(text) <= _MAX_TOKEN
        if not plain or not (text.startswith("jwt:") or (text.startswith("0x") and len(text) == 132)):
            raise BadRequest(
                "a Lighthouse authorisation is a signature of Kavach's message (0x and 130 hex) or a jwt: token",
                field="lighthouse_authorization",
            )
        return cls(address, token)


@dataclass(frozen=True, slots=True)
class Tokens:
    """What `get-jwt` gives: a token for some time, and one to renew it."""

    token: Secret
    refresh: Secret


class Kavach:
    """The five nodes behind one base URL. Use it from one event loop; close it."""

    def __init__(self, url: str, *, timeout_s: float = NODE_TIMEOUT_S) -> None:
        """Raises SettingsInvalid."""
        self._host = ApiHost(url, SETTING, timeout_s=timeout_s)
        self._signing: dict[Address, asyncio.Lock] = {}

    @property
    def name(self) -> str:
        """Host and port."""
        return self._host.name

    async def close(self) -> None:
        """Close all connections."""
        await self._host.close()

    # --- who asks --------------------------------------------------------------------------------------------------

    async def auth_message(self, address: Address) -> str:
        """The text that the address has to sign now. Raises StorageFailed."""
        reply = await self._host.ask("GET", f"/api/message/{address}", headers={"Authorization": ""})
        told = _good(reply)
        if isinstance(told, list) and told:
            told = told[0]
        message = told.get("message") if isinstance(told, dict) else None
        if not isinstance(message, str) or not 0 < len(message) <= _MAX_MESSAGE:
            raise reply.failed("gave no message to sign", reason="malformed")
        return message

    async def probe(self) -> str:
        """Words about the host, when it gives messages to sign (to no wallet in particular). Raises StorageFailed."""
        await self.auth_message(Address(secrets.token_bytes(20)))
        return f"{self.name} gives messages to sign"

    async def authorise(self, key: Secret) -> Authorisation:
        """The proof of a wallet whose signing key is here. Ends earlier ones of this address (rule 3)."""
        address = messages.address_of(key)
        digest = messages.personal_digest(await self.auth_message(address))
        return Authorisation(address, Secret.of_text(messages.signature_text(key, digest)))

    @asynccontextmanager
    async def as_wallet(self, key: Secret) -> AsyncIterator[Authorisation]:
        """`authorise` for the context, during which no other context of this address starts."""
        async with self._signing.setdefault(messages.address_of(key), asyncio.Lock()):
            yield await self.authorise(key)

    async def get_jwt(self, who: Authorisation) -> Tokens:
        """Tokens for a signature. Raises AccessDenied, StorageFailed."""
        signature = who.token.reveal().decode("ascii", "replace")
        body = {"address": str(who.address), "signature": signature, "chain": "ALL"}
        return self._tokens(await self._host.ask("POST", "/api/message/get-jwt", body))

    async def refresh_jwt(self, address: Address, refresh: Secret) -> Tokens:
        """New tokens for a refresh token. Raises AccessDenied, StorageFailed."""
        body = {"address": str(address), "refreshToken": refresh.reveal().decode("ascii", "replace")}
        return self._tokens(await self._host.ask("PUT", "/api/message/get-jwt", body))

    # --- what an owner does ----------------------------------------------------------------------------------------

    async def save(
        self, who: Authorisation, cid: Cid, shards: Sequence[KeyShard], share_with: Sequence[Address] = ()
    ) -> None:
        """Leave one shard at each node. Whoever saves first owns the file there. Raises StorageFailed, AccessDenied."""
        if len(shards) != NODES:
            raise BadRequest(f"each of the {NODES} nodes keeps one shard")
        shared = {"sharedTo": [str(address) for address in share_with]} if share_with else {}
        bodies = [_about(who, cid, payload=_payload(shard), **shared) for shard in shards]
        await self._all("POST", "setSharedKey", who, bodies)

    async def share(self, who: Authorisation, cid: Cid, addresses: Sequence[Address]) -> None:
        """Let others fetch the key of this file. Raises StorageFailed, AccessDenied."""
        body = _about(who, cid, shareTo=[str(address) for address in addresses])
        await self._all("PUT", "setSharedKey", who, [body] * NODES)

    async def revoke(self, who: Authorisation, cid: Cid, addresses: Sequence[Address]) -> None:
        """Let them no longer fetch it; whoever fetched it has it. Raises StorageFailed, AccessDenied."""
        body = _about(who, cid, revokeTo=[str(address) for address in addresses])
        await self._all("DELETE", "setSharedKey", who, [body] * NODES)

    async def delegate(self, who: Authorisation, delegates: Sequence[Address]) -> None:
        """Let them fetch the keys of all files of this wallet. Raises StorageFailed, AccessDenied."""
        body = {"address": str(who.address), "allFilesAccess": [str(address) for address in delegates]}
        await self._all("POST", "setAllFilesAccess", who, [body] * NODES)

    async def transfer_ownership(
        self, who: Authorisation, cid: Cid, new_owner: Address, *, reset_shared_to: bool = True
    ) -> None:
        """Make another wallet the owner, one node after the other as the service expects it. Raises as `share`."""
        body = _about(who, cid, newOwner=str(new_owner), resetSharedTo=reset_shared_to)
        for number in range(1, NODES + 1):
            _require_success(await self._node("POST", "transferOwnership", number, who, body))

    async def set_conditions(
        self, who: Authorisation, cid: Cid, conditions: AccessConditions, shards: Sequence[KeyShard] = ()
    ) -> None:
        """Let whoever meets the conditions fetch the key; with five shards, save them too.

        Raises BadRequest, StorageFailed, AccessDenied.
        """
        if len(shards) not in (0, NODES):
            raise BadRequest(f"each of the {NODES} nodes keeps one shard")
        body = _about(
            who,
            cid,
            conditions=list(conditions.conditions),
            aggregator=conditions.aggregator,
            chainType=conditions.chain_type,
        )
        if not shards:
            await self._all("PUT", "fileAccessConditions", who, [body] * NODES)
            return
        kind = {"decryptionType": "ACCESS_CONDITIONS"}
        await self._all(
            "POST", "fileAccessConditions", who, [body | kind | {"payload": _payload(shard)} for shard in shards]
        )

    async def conditions(self, cid: Cid) -> dict[str, Any]:
        """What the nodes say of a file to anybody: conditions, aggregator, sharedTo, owner. Raises StorageFailed."""
        reply = await self._host.ask("GET", f"/api/fileAccessConditions/get/{cid}")
        told = _good(reply)
        if not isinstance(told, dict):
            raise reply.failed("gave no conditions", reason="malformed")
        return told

    # --- who opens -------------------------------------------------------------------------------------------------

    async def shards(
        self, who: Authorisation, cid: Cid, owner: Address | None = None
    ) -> AsyncGenerator[KeyShard, None]:
        """Shards as they arrive, distinct and well-formed; whether they belong together, only their use tells.

        `owner` is named when access rests on his `delegate`. Raises, when fewer than three came, AccessDenied if nodes
        refused, StorageFailed otherwise.
        """
        body = _about(who, cid, dynamicData={}) | ({} if owner is None else {"ownerAddress": str(owner)})
        asked = [asyncio.create_task(self._shard(number, who, body)) for number in range(1, NODES + 1)]
        errors: list[StorageFailed | AccessDenied] = []
        seen: set[str] = set()
        try:
            for arrived in asyncio.as_completed(asked):
                try:
                    shard = await arrived
                except (StorageFailed, AccessDenied) as err:
                    errors.append(err)
                    continue
                if shard.index.lower() not in seen:
                    seen.add(shard.index.lower())
                    yield shard
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        if len(seen) < THRESHOLD:
            raise _too_few(self.name, cid, len(seen), errors)

    async def _shard(self, number: int, who: Authorisation, body: dict[str, Any]) -> KeyShard:
        reply = await self._node("POST", "retrieveSharedKey", number, who, body)
        told = _good(reply)
        try:
            return KeyShard.parse(told.get("payload") if isinstance(told, dict) else None)
        except BadRequest as err:
            raise reply.failed(f"node {number} gave no key shard", reason="malformed") from err

    async def _node(self, method: str, route: str, number: int, who: Authorisation, body: dict[str, Any]) -> Reply:
        token = bearer(who.token, "lighthouse_authorization")
        return await self._host.ask(method, f"/api/{route}/{number}", body, {"Authorization": token})

    async def _all(self, method: str, route: str, who: Authorisation, bodies: Sequence[dict[str, Any]]) -> None:
        """Every node says success, or this raises for the first that did not."""

        async def one(number: int, body: dict[str, Any]) -> None:
            try:
                _require_success(await self._node(method, route, number, who, body))
            except StorageFailed as err:
                raise StorageFailed(f"{err.detail} (key node {number}); do it again, that is safe", **err.data) from err

        asked = (one(number, body) for number, body in enumerate(bodies, 1))
        for failed in await asyncio.gather(*asked, return_exceptions=True):
            if failed is not None:
                raise failed

    def _tokens(self, reply: Reply) -> Tokens:
        if reply.status == 400:
            raise AccessDenied(f"{self.name}: {reply.words() or 'refused the signature'}: sign a fresh message")
        told = _good(reply)
        token, refresh = (told.get(name, "") if isinstance(told, dict) else "" for name in ("token", "refreshToken"))
        if not isinstance(token, str) or not token.startswith("jwt:") or not isinstance(refresh, str):
            raise reply.failed("gave no jwt: token", reason="malformed")
        return Tokens(Secret.of_text(token), Secret.of_text(refresh))


ShardsOf = Callable[[Grant], AsyncGenerator[KeyShard, None]]


class KavachSearch:
    """A `KeySearch` for Lighthouse-sealed files whose keys Kavach's nodes give to somebody. `KeyAccess` makes them."""

    def __init__(self, name: str, shards: ShardsOf, wrong: WrongKeys) -> None:
        """`name` is the host that errors name."""
        self._name, self._shards, self._wrong = name, shards, wrong

    async def candidates(self, header: bytes, grant: Grant) -> AsyncGenerator[KeySource, None]:
        """See `KeySearch`: the key of the first three shards, then those of all, the likeliest first."""
        if recognise(header) is not SealFormat.LIGHTHOUSE:
            return
        cid = grant.model.cid
        have: dict[str, KeyShard] = {}
        first = ""
        async with aclosing(self._shards(grant)) as arriving:
            async for shard in arriving:
                have.setdefault(shard.index.lower(), shard)
                if len(have) == THRESHOLD and not first:
                    first = recover_key(list(have.values()))
                    for source in self._offer(cid, first):
                        yield source
        for key in likely_keys(list(have.values())):
            if key != first:
                for source in self._offer(cid, key):
                    yield source
        raise WrongKey(
            f"{len(have)} key shards came from {self._name}, and no set of them opens {cid}: some are damaged or of "
            "another file, and its owner has to save them again",
            cid=cid,
        )

    def _offer(self, cid: str, text: str) -> Iterator[KeySource]:
        """The key as a source, unless it is known to be wrong; whoever comes back for more did not open the file."""
        key = Secret.of_text(text)
        if not self._wrong.known(cid, key):
            yield CallerKey(key)
            self._wrong.remember(cid, key)


class KeyAccess:
    """In whose name this node asks Kavach for keys: a caller's, who passed on his authorisation, or its own."""

    def __init__(self, kavach: Kavach, wrong: WrongKeys, node_key: Secret | None = None) -> None:
        """With `node_key` the node uses what owners shared with it or delegated to it; without it only callers'."""
        self._kavach, self._wrong, self._node_key = kavach, wrong, node_key

    def of_caller(self, address: Address, token: Secret) -> KavachSearch:
        """What the nodes give to the caller, by their own conditions. Raises BadRequest for a malformed token."""
        who = Authorisation.parse(address, token)

        def shards(grant: Grant) -> AsyncGenerator[KeyShard, None]:
            return self._kavach.shards(who, parse_cid(grant.model.cid))

        return KavachSearch(self._kavach.name, shards, self._wrong)

    def of_node(self) -> KavachSearch | None:
        """What the nodes give to this node; None when it does not use delegations."""
        if self._node_key is None:
            return None
        key = self._node_key

        def shards(grant: Grant) -> AsyncGenerator[KeyShard, None]:
            return self._delegated(key, grant)

        return KavachSearch(self._kavach.name, shards, self._wrong)

    async def _delegated(self, key: Secret, grant: Grant) -> AsyncGenerator[KeyShard, None]:
        """What the node gets by its own wallet; rule 4 first."""
        cid, owner = parse_cid(grant.model.cid), grant.model.owner
        told = (await self._kavach.conditions(cid)).get("owner")
        if not isinstance(told, str) or told.lower() != str(owner).lower():
            raise AccessDenied(
                f"at Kavach the file {cid} does not belong to {owner}, who registered the model: by its own delegation "
                "this node opens only what the model's owner owns there"
            )
        async with self._kavach.as_wallet(key) as who, aclosing(self._either(who, cid, owner)) as shards:
            async for shard in shards:
                yield shard

    async def _either(self, who: Authorisation, cid: Cid, owner: Address) -> AsyncGenerator[KeyShard, None]:
        """Shards of a file that was shared by itself, else of one whose owner delegated all his files."""
        for named in (None, owner):
            try:
                async with aclosing(self._kavach.shards(who, cid, named)) as shards:
                    async for shard in shards:
                        yield shard
            except AccessDenied:
                if named is not None:
                    raise
            else:
                return


def _about(who: Authorisation, cid: Cid, **members: Any) -> dict[str, Any]:
    return {"address": str(who.address), "cid": str(cid), **members}


def _payload(shard: KeyShard) -> dict[str, str]:
    return {"key": shard.key, "index": shard.index}


def _good(reply: Reply) -> Any:
    """The value of a successful reply. Raises AccessDenied, StorageFailed."""
    if 200 <= reply.status < 300:
        return reply.json()
    words = reply.words()
    if reply.status in _DENIED or "denied" in words.lower():
        raise AccessDenied(
            f"{reply.host}: {words or 'refused'} (HTTP {reply.status}): the owner shares the file with this wallet, or "
            "the wallet signs a fresh message of Kavach"
        )
    if reply.status == 404:
        raise reply.failed("has no key of this file: its owner saves the shards again", reason="not_found")
    raise reply.failed(f"answered HTTP {reply.status}: {words}")


def _require_success(reply: Reply) -> None:
    told = _good(reply)
    if not isinstance(told, dict) or str(told.get("message", "")).lower() != "success":
        raise reply.failed(f"did not say success: {reply.words()}", reason="malformed")


def _too_few(
    name: str, cid: Cid, count: int, errors: Sequence[StorageFailed | AccessDenied]
) -> StorageFailed | AccessDenied:
    """The error of a fetch: a refusal where there is one, else what went wrong first."""
    denied = next((err for err in errors if isinstance(err, AccessDenied)), None)
    if denied is not None:
        return AccessDenied(f"Kavach gives no key of {cid} to this wallet: {denied.detail}")
    told = "; ".join(dict.fromkeys(err.detail for err in errors)) or "shards that are all the same"
    reasons = {str(err.data.get("reason")) for err in errors}
    return StorageFailed(
        f"{name} gave {count} of the {THRESHOLD} key shards that {cid} needs: {told}; try again",
        cid=str(cid),
        gateway=name,
        reason=reasons.pop() if len(reasons) == 1 else "key_nodes",
    )
