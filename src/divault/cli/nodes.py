"""`divault nodes`: which nodes open a published model, and letting nodes in and shutting them out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from divault import keyfiles
from divault.chain.chain import Chain
from divault.chain.rpc import Rpc
from divault.chain.vault import VaultReader
from divault.chain.wallet import Wallet
from divault.cli import offer
from divault.cli.console import progress, say, show
from divault.cli.publisher import affordable, node_info, opened_store, require_chain, store_place
from divault.client.asynchronous import NodeInfo
from divault.errors import BadRequest, SettingsInvalid
from divault.publishing import Access, Changed, Publications, Publisher, SealedTo, Standing
from divault.settings import MB, Settings
from divault.storage.cache import CiphertextCache
from divault.storage.fetcher import Fetcher
from divault.storage.gateway import GatewayStorage
from divault.values import Address, ModelId, Secret
from divault.vault.age import Identity

app = typer.Typer(
    no_args_is_help=True,
    help="Let nodes in to a published model, and shut them out. Example: divault nodes ls breast-cancer",
)
Model = Annotated[str, typer.Argument(help="the model's id")]
Key = Annotated[Path, typer.Option("--key", "-k", help="the owner's wallet key file")]
OwnIdentity = Annotated[
    Path | None, typer.Option("--identity", help="the age identity that opens the model; default: KEY.age")
]
Store = Annotated[
    str | None, typer.Option("--to", help="lighthouse, or URL of a store; default: where it was published to")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="do not ask before anything is uploaded")]


@dataclass(frozen=True, slots=True)
class _Order:
    """What was asked for: nodes as they were typed."""

    model: ModelId
    nodes: tuple[str, ...]
    keep: tuple[str, ...] | None
    key: Secret
    identity: Identity
    store: str | None
    ask: bool


@app.command()
def ls(model: Model) -> None:
    """Print what the vault names, and the nodes that open it by this machine's record; needs no key.

    Example: divault nodes ls breast-cancer
    """
    show(asyncio.run(_ls(Settings.load(), ModelId.parse(model))))


@app.command()
def allow(
    model: Model,
    node: Annotated[
        list[str], typer.Option("--node", help="URL of a node to let in, URL#0xADDRESS to name it; repeatable")
    ],
    key: Key,
    identity: OwnIdentity = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", help="a node that opens it now, for where no record says so; repeatable"),
    ] = None,
    store: Store = None,
    *,
    yes: Yes = False,
) -> None:
    """Let nodes in: the sealed file gets a new header, a new CID and one transaction; the model is not opened.

    Killed or failed, run it again as it was: it goes on with the same file, and registers once.

    Example: divault nodes allow breast-cancer --node https://node.example#0xADDRESS -k owner.key
    """
    order = _order(model, (node, keep), (key, identity), store, ask=not yes)
    show(asyncio.run(_allow(Settings.load(), order)))


@app.command()
def revoke(
    model: Model,
    key: Key,
    node: Annotated[
        list[str] | None, typer.Option("--node", help="a node to shut out: its URL or 0xADDRESS; repeatable")
    ] = None,
    identity: OwnIdentity = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", help="URL of a node that stays; with it, only the named ones stay; repeatable"),
    ] = None,
    store: Store = None,
    *,
    everyone: Annotated[bool, typer.Option("--all", help="shut every node out")] = False,
    yes: Yes = False,
) -> None:
    """Shut nodes out of what comes: the model is sealed anew under another key, to those that stay.

    It takes nothing back: what a node could open, it may have kept, and the old file stays open to it for ever.

    Example: divault nodes revoke breast-cancer --node https://node.example -k owner.key
    """
    if everyone and keep:
        raise BadRequest("--all shuts every node out, and --keep names one that stays: give one of them", field="all")
    if not (node or keep or everyone):
        raise BadRequest("name the nodes to shut out with --node, or those that stay with --keep", field="node")
    order = _order(model, (node or [], [] if everyone else keep), (key, identity), store, ask=not yes)
    show(asyncio.run(_revoke(Settings.load(), order)))


def _order(
    model: str,
    nodes: tuple[list[str], list[str] | None],
    keys: tuple[Path, Path | None],
    store: str | None,
    *,
    ask: bool,
) -> _Order:
    key, identity = keys
    path = identity or key.with_name(key.name + ".age")
    if not path.exists():
        raise SettingsInvalid(
            f"there is no age identity at {path}: name the one that opens the model with --identity; if it was "
            "published without one of yours, publish it again, which seals it to your own as well"
        )
    keep = None if nodes[1] is None else tuple(nodes[1])
    return _Order(
        ModelId.parse(model),
        tuple(nodes[0]),
        keep,
        keyfiles.read_signing_key(key),
        keyfiles.read_identity(path),
        store,
        ask,
    )


async def _ls(settings: Settings, model: ModelId) -> dict[str, Any]:
    records = _records(settings)
    async with _chain(settings, []) as chain:
        vault = _vault(settings, records, (chain.chain_id, model), [])
        info = await VaultReader(chain, vault).model(model, await chain.head(fresh=True))
        record, unfinished = (
            records.find(chain.chain_id, vault, model),
            records.unfinished(chain.chain_id, vault, model),
        )
    current = record is not None and record.cid is not None and record.cid.text == info.cid
    if not current:
        say("this machine has no record of who opens that CID; the file itself does not tell")
    if unfinished is not None:
        say(f"a change is {unfinished.stage.value} and not registered: run its command again")
    return {
        "model_id": model.text,
        "vault": str(vault),
        "owner": str(info.owner),
        "cid": info.cid,
        "nodes": _nodes(record.nodes) if current and record is not None else None,
        "owner_recipient": str(record.owner) if current and record is not None and record.owner else None,
    }


async def _allow(settings: Settings, order: _Order) -> dict[str, Any]:
    asked = [await node_info(node, order.key) for node in (*order.nodes, *(order.keep or ()))]
    known = [SealedTo.of(node) for node in asked]
    nodes, present = known[: len(order.nodes)], known[len(order.nodes) :]
    async with _access(settings, order, asked) as access:
        standing = await access.standing(order.model)
        new = standing.missing(nodes)
        for node in nodes:
            if node not in new:
                say(f"opens it already: {_named(node)}")
        if not new:
            return _summary(order.model, Changed(standing.cid, standing.nodes, None))
        say(f"{order.model} is {standing.cid}")
        for node in standing.nodes or present:
            say(f"opened by: {_named(node)}")
        for node in new:
            say(f"to be let in: {_named(node)}")
        await _agreed(access, standing, order, "seal the key to them, upload and register?")
        with _shown(access, order.model) as shown:
            done = await shown.allow(order.model, nodes, present)
    return _told(order.model, done)


async def _revoke(settings: Settings, order: _Order) -> dict[str, Any]:
    asked = [await node_info(node, order.key) for node in order.keep or ()]
    keep = None if order.keep is None else [SealedTo.of(node) for node in asked]
    async with _access(settings, order, asked) as access:
        standing = await access.standing(order.model)
        gone = _matching(standing, order.nodes)
        stays = access.remaining(standing, gone, keep)
        say(f"{order.model} is {standing.cid}")
        stay = {node.recipient for node in stays}
        _warn(standing, [node for node in standing.nodes if node.recipient not in stay], order.nodes)
        for node in stays:
            say(f"still opened by: {_named(node)}")
        say("and by your own age identity")
        await _agreed(access, standing, order, "seal it anew, upload and register?")
        with _shown(access, order.model) as shown:
            done = await shown.revoke(order.model, gone, keep)
    return _told(order.model, done)


def _warn(standing: Standing, gone: Sequence[SealedTo], typed: Sequence[str]) -> None:
    """Say what a revocation does not do."""
    for name in [_named(node) for node in gone] or typed or ["every node that you do not keep"]:
        say(f"to be shut out: {name}")
    say(
        "this takes nothing back: who is shut out could read the whole model, and may have kept it in plain; and the "
        f"old ciphertext {standing.cid} stays readable for it for ever, wherever it is pinned. Only new versions are "
        "closed to it"
    )


def _matching(standing: Standing, names: Sequence[str]) -> list[SealedTo]:
    """The record's nodes that were named by URL, address, or both. Raises BadRequest for a name of none of them."""
    if standing.record is None:
        return []
    found: list[SealedTo] = []
    for name in names:
        matches = [node for node in standing.nodes if _is_named(node, name)]
        if not matches:
            have = ", ".join(_named(node) for node in standing.nodes) or "no node at all"
            raise BadRequest(f"{name} is none of the nodes that open {standing.cid}: {have}", field="node")
        found += matches
    return found


def _is_named(node: SealedTo, name: str) -> bool:
    url, _, address = name.partition("#")
    if name.startswith("0x"):
        url, address = "", name
    same_url = not url or url.rstrip("/") == node.url.rstrip("/")
    return same_url and address.lower() in ("", str(node.address).lower())


async def _agreed(access: Access, standing: Standing, order: _Order, question: str) -> None:
    """Show the cost and ask, once."""
    publisher = access.publisher
    cost = await affordable(publisher, standing.listing)
    size = "" if standing.record is None else f" ({standing.record.size} bytes)"
    say(
        f"cost: {offer.registration_words(cost)}; the sealed file{size} is stored anew at "
        f"{offer.store_words(publisher.store_name)}"
    )
    if order.ask:
        typer.confirm(question, abort=True, err=True)


@contextmanager
def _shown(access: Access, model: ModelId) -> Iterator[Access]:
    """Show the upload's progress."""
    with progress(f"storing {model}") as advance:
        yield replace(access, publisher=replace(access.publisher, progress=advance))


def _told(model: ModelId, done: Changed) -> dict[str, Any]:
    if done.published is None:
        say("it was so already: nothing was done")
    else:
        say(f"{model} was {done.before} and is {done.cid}")
        say("a node that has it loaded loads the new one with its next load, at the first call after this")
    return _summary(model, done)


def _summary(model: ModelId, done: Changed) -> dict[str, Any]:
    transaction = None if done.published is None else done.published.transaction
    return {
        "model_id": model.text,
        "old_cid": done.before.text,
        "cid": done.cid.text,
        "transaction": None if transaction is None else str(transaction),
        "nodes": _nodes(done.nodes),
    }


def _nodes(nodes: Sequence[SealedTo]) -> list[dict[str, str]]:
    return [{"url": node.url, "address": str(node.address), "age_recipient": str(node.recipient)} for node in nodes]


def _named(node: SealedTo) -> str:
    return f"{node.url} ({node.address})"


def _records(settings: Settings) -> Publications:
    return Publications(settings.divault_state_dir / "published")


@asynccontextmanager
async def _chain(settings: Settings, nodes: list[NodeInfo]) -> AsyncIterator[Chain]:
    chain = Chain(Rpc.parse(settings.web3_provider_url, settings.divault_chain_id), head_ttl_s=0)
    try:
        await require_chain(chain, nodes)
        yield chain
    finally:
        await chain.close()


@asynccontextmanager
async def _access(settings: Settings, order: _Order, nodes: list[NodeInfo]) -> AsyncIterator[Access]:
    records = _records(settings)
    async with AsyncExitStack() as stack:
        chain = await stack.enter_async_context(_chain(settings, nodes))
        vault = _vault(settings, records, (chain.chain_id, order.model), nodes)
        record = records.find(chain.chain_id, vault, order.model)
        place = store_place(settings, order.store or (record.store if record else None))
        store = await stack.enter_async_context(opened_store(settings, place))
        gateways = [GatewayStorage(url) for url in _gateways(settings, place)]
        for gateway in gateways:
            stack.callback(gateway.close)
        cache = CiphertextCache(settings.model_cache_dir, settings.divault_cache_max_mb * MB)
        fetcher = Fetcher(gateways, cache, max_model_bytes=settings.max_model_bytes)
        wallet = Wallet(order.key, chain)
        publisher = Publisher(wallet, vault, store, settings.lighthouse_api_key, records, say)
        yield Access(publisher, records, fetcher, order.identity)


def _gateways(settings: Settings, place: str) -> list[str]:
    """A plain store gives what it took."""
    return list(dict.fromkeys((*settings.gateway_urls, *([place] if "://" in place else ()))))


def _vault(settings: Settings, records: Publications, model: tuple[int, ModelId], nodes: Sequence[NodeInfo]) -> Address:
    """The vault of the settings, else the one of the record, else that of the nodes, which have to agree.

    Raises SettingsInvalid when nothing says which, BadRequest for a node of another vault.
    """
    known = [settings.vault_contract_address] if settings.vault_contract_address else records.vaults(*model)
    known = known or list(dict.fromkeys(node.vault for node in nodes))
    if len(known) != 1:
        raise SettingsInvalid(
            f"set VAULT_CONTRACT_ADDRESS to the vault of {model[1]}: from this machine it was published to "
            f"{' and '.join(map(str, known)) or 'none'}",
            setting="VAULT_CONTRACT_ADDRESS",
        )
    for node in nodes:
        if node.vault != known[0]:
            raise BadRequest(f"the node {node.url} serves the vault {node.vault}, not {known[0]}", field="node")
    return known[0]
