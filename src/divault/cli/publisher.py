"""`divault publish`: recognise, seal, store and register a model in one go, asking once."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from divault import keyfiles
from divault.chain import configured
from divault.chain.chain import Chain
from divault.chain.rpc import Rpc
from divault.chain.wallet import Wallet
from divault.cli import offer
from divault.cli.console import progress, say, show
from divault.cli.naming import named_node
from divault.client import AsyncClient
from divault.client.asynchronous import NodeInfo
from divault.errors import BadRequest, SettingsInvalid, TransactionFailed
from divault.publishing import (
    Cost,
    Listing,
    Publications,
    Published,
    Publisher,
    Recognised,
    SealedTo,
    measure,
    recognise,
    sealed_size,
)
from divault.settings import Settings
from divault.storage.lighthouse import Lighthouse
from divault.values import Address, Digest, Secret
from divault.vault.age import Recipient

app = typer.Typer()
LIGHTHOUSE = "lighthouse"


@dataclass(frozen=True, slots=True)
class _Order:
    """What was asked for."""

    path: Path
    listing: Listing
    nodes: tuple[str, ...]
    store: str
    key: Secret
    owner: Recipient | None
    ask: bool
    unchecked: bool
    code_bearing: bool


@app.command()
def publish(
    path: Annotated[Path, typer.Argument(help="the model: a file, or a folder")],
    price: Annotated[str, typer.Option("--price", help="USDC per call, for example 0.02")],
    gate: Annotated[str, typer.Option("--gate", help="0xTOKEN:MINIMUM in raw units, or open")],
    node: Annotated[list[str], typer.Option("--node", help="URL of a node that may open it, URL#0xADDRESS to name it")],
    key: Annotated[Path, typer.Option("--key", "-k", help="the owner's wallet key file")],
    model: Annotated[
        str | None, typer.Option("--id", help="the name under which consumers call it; default: the file's")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option("--to", help="lighthouse, or URL of a store; default: DIVAULT_STORE_URL, else lighthouse"),
    ] = None,
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask before it leaves this machine")] = False,
    no_owner_copy: Annotated[
        bool, typer.Option("--no-owner-copy", help="do not seal it to your own age identity, KEY.age, as well")
    ] = False,
    code_bearing: Annotated[
        bool, typer.Option("--code-bearing", help="publish a format that carries code, for nodes that allow it")
    ] = False,
    unchecked: Annotated[bool, typer.Option("--unchecked", help="publish without loading it here first")] = False,
) -> None:
    """Seal a model to nodes, store it by CID and register it with a gate and a price; `--node` may be repeated.

    Killed or failed, run it again as it was: it goes on with the same sealed file, and registers once.

    Example: divault publish model.joblib --price 0.02 --gate 0xTOKEN:100 --node https://node.example -k owner.key
    """
    settings = Settings.load()
    token, minimum = offer.gate(gate)
    listing = Listing(offer.model_id(model, path), offer.price(price), token, minimum)
    place, signing_key = store_place(settings, store), keyfiles.read_signing_key(key)
    owner = None if no_owner_copy else _owner(key)
    order = _Order(path, listing, tuple(node), place, signing_key, owner, not yes, unchecked, code_bearing)
    done, found, first = asyncio.run(_publish(settings, order))
    say(f"published {listing.model}: {done.size} bytes as {done.cid}; consumers call it with")
    lines = offer.consumer_lines(listing, first, found)
    sys.stderr.write(f"\n{lines}\n\n")  # as it is: a console would take some of it for markup
    show(_summary(done) | {"python": lines})


async def _publish(settings: Settings, order: _Order) -> tuple[Published, Recognised | None, SealedTo]:
    nodes = [await node_info(node, order.key) for node in order.nodes]
    vault = _vault(settings, nodes)
    sealed_to = [SealedTo.of(node) for node in nodes]
    chain = Chain(Rpc.parse(settings.web3_provider_url, settings.divault_chain_id), head_ttl_s=0)
    try:
        await require_chain(chain, nodes)
        async with opened_store(settings, order.store) as store:
            records = Publications(settings.divault_state_dir / "published")
            publisher = Publisher(Wallet(order.key, chain), vault, store, settings.lighthouse_api_key, records, say)
            await publisher.require_gate(order.listing)
            cost = await affordable(publisher, order.listing)
            found = await _recognised(settings, order)
            expected = await _agreed(publisher, order, sealed_to, (found, cost))
            with progress(f"storing {order.path.name}") as advance:
                done = await replace(publisher, progress=advance).publish(
                    order.path, order.listing, sealed_to, owner=order.owner, expected=expected
                )
    finally:
        await chain.close()
    return done, found, sealed_to[0]


async def _recognised(settings: Settings, order: _Order) -> Recognised | None:
    if order.unchecked:
        return None
    found = await recognise(order.path, allow_code=order.code_bearing, timeout_s=settings.divault_load_timeout_seconds)
    for line in offer.recognised_lines(found):
        say(line)
    return found


async def affordable(publisher: Publisher, listing: Listing) -> Cost:
    """What the registration costs, if the wallet has it and the id can be had. Raises TransactionFailed, BadRequest."""
    cost = await publisher.cost(listing)
    if cost.balance < cost.wei:
        raise TransactionFailed(
            f"{publisher.wallet.address} has {offer.eth(cost.balance)} ETH and the registration costs up to "
            f"{offer.eth(cost.wei)}: send it some first; nothing was published",
            reason="insufficient_funds",
        )
    return cost


async def _agreed(
    publisher: Publisher, order: _Order, nodes: list[SealedTo], told: tuple[Recognised | None, Cost]
) -> Digest:
    """The sha256 of what the owner agreed to publish, after he saw who gets it and what it costs."""
    found, cost = told
    if found is None:
        sha256, size = await asyncio.to_thread(measure, order.path)
    else:
        sha256, size = found.sha256, found.size
    recipients = [*(node.recipient for node in nodes), *((order.owner,) if order.owner else ())]
    for line in offer.offer_lines(order.listing, nodes, publisher.vault):
        say(line)
    for node in publisher.dropped(order.listing.model, nodes):
        say(f"no longer opened by: {node.url} ({node.address}); name it with --node as well to keep it")
    say(offer.cost_line(cost, sealed_size(size, recipients, order.listing.model), order.store, len(nodes)))
    if order.ask:
        typer.confirm("seal, upload and register?", abort=True, err=True)
    return sha256


@asynccontextmanager
async def opened_store(settings: Settings, store: str) -> AsyncIterator[str | Lighthouse]:
    """The store, as `Publisher` takes it, while the context lasts."""
    if store != LIGHTHOUSE:
        yield store
        return
    lighthouse = Lighthouse(
        settings.lighthouse_api_key,
        upload_url=settings.divault_lighthouse_upload_url,
        api_url=settings.divault_lighthouse_api_url,
        gateway_urls=settings.divault_lighthouse_gateway_urls,
    )
    try:
        yield lighthouse
    finally:
        await lighthouse.close()


def store_place(settings: Settings, store: str | None) -> str:
    """The store to use: the one given, else that of the settings. Raises SettingsInvalid when nothing says which."""
    place = store or settings.divault_store_url or (LIGHTHOUSE if settings.lighthouse_api_key else None)
    if place is None:
        raise SettingsInvalid(
            "nothing says where the model goes: set LIGHTHOUSE_API_KEY for Lighthouse, or name a store with --to",
            setting="LIGHTHOUSE_API_KEY",
        )
    return place


async def node_info(node: str, key: Secret) -> NodeInfo:
    """Who the node is, after it proved it. Raises NodeUntrusted, NotReady (nobody there)."""
    url, pinned = named_node(node)
    async with AsyncClient(url, key, node=pinned) as client:
        return await client.node()


def _vault(settings: Settings, nodes: list[NodeInfo]) -> Address:
    """The vault of the settings, else that of the nodes, which then have to agree. Raises BadRequest."""
    vault = settings.vault_contract_address or nodes[0].vault
    if settings.vault_contract_address is None:
        say(f"VAULT_CONTRACT_ADDRESS is not set, so this takes the vault that {nodes[0].url} names")
    for node in nodes:
        if node.vault != vault:
            raise BadRequest(f"the node {node.url} serves the vault {node.vault}, not {vault}", field="node")
    return vault


async def require_chain(chain: Chain, nodes: list[NodeInfo]) -> None:
    """Connect the chain. Raises BadRequest for a node of another chain, ChainUnavailable."""
    chain_id = await configured.connect(chain)
    for node in nodes:
        if node.chain_id != chain_id:
            raise BadRequest(
                f"the node {node.url} serves chain {node.chain_id}, and WEB3_PROVIDER_URL is chain {chain_id}",
                field="node",
            )


def _owner(key: Path) -> Recipient:
    path = key.with_name(key.name + ".age")
    made = "found" if path.exists() else "made now"
    recipient = keyfiles.identity(path).recipient
    say(f"you will open it too, with the age identity {path} ({made}): keep it, to allow and revoke nodes later")
    return recipient


def _summary(done: Published) -> dict[str, Any]:
    return {
        "model_id": done.info.model.text,
        "cid": done.cid.text,
        "bytes": done.size,
        "transaction": None if done.transaction is None else str(done.transaction),
        "owner": str(done.info.owner),
        "price_usdc": str(done.info.price),
    }
