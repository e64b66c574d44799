"""`divault publish`: seal, store and register a model in one go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from divault import keyfiles
from divault.chain.chain import Chain
from divault.chain.rpc import Rpc
from divault.chain.wallet import Wallet
from divault.cli.console import progress, say, show
from divault.client import AsyncClient
from divault.errors import BadRequest
from divault.publishing import Listing, Publications, Published, Publisher, SealedTo
from divault.settings import Settings
from divault.storage.lighthouse import Lighthouse
from divault.values import Address, ModelId, Secret, Usdc
from divault.vault.age import Recipient

app = typer.Typer()


@app.command()
def publish(
    path: Annotated[Path, typer.Argument(help="the model: a file, or a folder")],
    model: Annotated[str, typer.Option("--id", help="the name under which consumers call it")],
    price: Annotated[str, typer.Option("--price", help="USDC per call, for example 0.02")],
    gate: Annotated[str, typer.Option("--gate", help="0xTOKEN:MINIMUM in raw units, or open")],
    node: Annotated[list[str], typer.Option("--node", help="URL#0xADDRESS of a node that may open it; repeatable")],
    store: Annotated[str, typer.Option("--to", help="URL of the store that takes the ciphertext, or lighthouse")],
    key: Annotated[Path, typer.Option("--key", "-k", help="the owner's wallet key file")],
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask before the transaction")] = False,
    owner_copy: Annotated[
        bool, typer.Option("--owner-copy/--no-owner-copy", help="seal to KEY.age too, so that you can open it")
    ] = True,
) -> None:
    """Seal a model to nodes, store it by CID and register it with a gate and a price.

    Example: divault publish model.joblib --id breast-cancer --price 0.02 --gate 0xTOKEN:100
    --node http://127.0.0.1:8000 --to http://127.0.0.1:5001 -k owner.key
    """
    token, minimum = _gate(gate)
    listing = Listing(ModelId.parse(model), Usdc.parse(price), token, minimum)
    settings = Settings.load()
    gate_words = "every wallet" if token is None else f"wallets with {minimum} raw units of {token}"
    say(f"{model} at {listing.price} USDC per call, for {gate_words}, opened by {len(node)} node(s)")
    if not yes:
        typer.confirm("seal, upload and register?", abort=True)
    signing_key = keyfiles.read_signing_key(key)
    owner = _owner(key) if owner_copy else None
    done = asyncio.run(_publish(settings, path, listing, (node, store, owner), signing_key))
    say(f"published {model}: {done.size} bytes as {done.cid}")
    show(_summary(done))


async def _publish(
    settings: Settings, path: Path, listing: Listing, where: tuple[list[str], str, Recipient | None], key: Secret
) -> Published:
    nodes, store, owner = where
    sealed_to = [await _sealed_to(node, settings.vault, key) for node in nodes]
    chain = Chain(Rpc.parse(settings.web3_provider_url, settings.divault_chain_id), head_ttl_s=0)
    try:
        await chain.connect()
        async with _store(settings, store) as place:
            records = Publications(settings.divault_state_dir / "published")
            publisher = Publisher(Wallet(key, chain), settings.vault, place, settings.lighthouse_api_key, records, say)
            with progress(f"storing {path.name}") as advance:
                return await publisher.publish(path, listing, sealed_to, owner=owner, progress=advance)
    finally:
        await chain.close()


@asynccontextmanager
async def _store(settings: Settings, store: str) -> AsyncIterator[str | Lighthouse]:
    if store != "lighthouse":
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


async def _sealed_to(node: str, vault: Address, key: Secret) -> SealedTo:
    url, _, pinned = node.partition("#")
    async with AsyncClient(url, key, node=pinned or None) as client:
        info = await client.node()
    if info.vault != vault:
        raise BadRequest(f"the node {url} serves the vault {info.vault}, not {vault}", field="node")
    return SealedTo.of(info)


def _owner(key: Path) -> Recipient:
    path = key.with_name(key.name + ".age")
    is_new = not path.exists()
    recipient = keyfiles.identity(path).recipient
    made = "made" if is_new else "found"
    say(f"sealed to your own age identity too ({made} at {path}): with it you allow and revoke nodes later")
    return recipient


def _gate(text: str) -> tuple[Address | None, int]:
    if text == "open":
        return None, 0
    token, _, minimum = text.partition(":")
    if not minimum.isascii() or not minimum.isdecimal() or int(minimum) == 0:
        raise BadRequest("a gate is 0xTOKEN:MINIMUM with at least 1 raw unit, or open", field="gate")
    return Address.parse(token), int(minimum)


def _summary(done: Published) -> dict[str, Any]:
    return {
        "model_id": done.info.model.text,
        "cid": done.cid.text,
        "bytes": done.size,
        "transaction": None if done.transaction is None else str(done.transaction),
        "owner": str(done.info.owner),
        "price_usdc": str(done.info.price),
    }
