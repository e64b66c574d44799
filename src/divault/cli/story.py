"""The demo's story on a development chain: everything real but the money.

Each step does the thing with the same code that publishers, nodes and consumers use, prints one line, and leaves its
facts in the report.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from divault.chain.chain import Chain
from divault.chain.rpc import Rpc
from divault.chain.wallet import Wallet
from divault.cli.console import out
from divault.client import AsyncClient
from divault.devnet import Devnet
from divault.devnet.content import ContentStore
from divault.models import example
from divault.publishing import Listing, Publisher, SealedTo
from divault.testing.node import NodeProcess, node_environment, serving_node
from divault.values import Address, ModelId, Secret, Usdc

MODEL = "breast-cancer"
PRICE = "0.02"
GATE_MINIMUM = 100 * 10**18
"""Raw units: 100 tokens with 18 decimals."""


@dataclass(slots=True)
class Report:
    """What happened, step by step; `--json` writes it."""

    started: float = field(default_factory=time.monotonic)
    steps: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def step(self, name: str, line: str, **facts: Any) -> None:
        """Print and keep one step."""
        seconds = round(time.monotonic() - self.started, 2)
        self.steps.append({"step": len(self.steps) + 1, "name": name, "seconds": seconds, "line": line, **facts})
        out.print(f"[dim]{seconds:6.2f} s[/dim]  [bold]{len(self.steps):2}[/bold]  {line}")

    def as_json(self) -> bytes:
        """Everything, for programs."""
        document = {"steps": self.steps, "seconds": self.steps[-1]["seconds"], **self.facts}
        return f"{json.dumps(document, indent=1)}\n".encode()


@dataclass(frozen=True, slots=True)
class World:
    """The chain with its contracts, the people, and the content store."""

    devnet: Devnet
    chain: Chain
    store: ContentStore
    owner: Wallet
    consumer: Wallet
    usdc: Address
    token: Address
    vault: Address


@dataclass(frozen=True, slots=True)
class Stage:
    """The world and a node in a process of its own; `folder` holds what the node and the people keep."""

    there: World
    node: NodeProcess
    folder: Path
    report: Report

    def client(self, key: Secret) -> AsyncClient:
        """Somebody's client of the node."""
        return AsyncClient(self.node.url, key, rpc=self.there.devnet.url, known_nodes=self.folder / "known.json")


@asynccontextmanager
async def world(devnet: Devnet, folder: Path, report: Report) -> AsyncIterator[World]:
    """Deploy the contracts on the chain and open a content store beside it."""
    report.step("chain", f"A chain runs in this process: id {devnet.chain_id}, JSON-RPC at {devnet.url}")
    chain = Chain(Rpc.parse(Secret.of_text(devnet.url), devnet.chain_id), head_ttl_s=0)
    async with ContentStore(folder / "store") as store:
        report.step("store", f"A content store serves files by their content id (CID) at {store.url}")
        deployer, owner, consumer = (Wallet(account.key, chain) for account in devnet.accounts[:3])
        usdc = await deployer.deploy("TestUSDC")
        vault = await deployer.deploy("ModelVault", usdc)
        token = await owner.deploy("ModelAccessToken", "Breast Cancer Access", "BCA", owner.address)
        report.step(
            "contracts",
            f"Contracts are deployed: ModelVault {vault}, test USDC {usdc}, the owner's access token {token}",
        )
        report.facts |= {
            "chain_id": devnet.chain_id,
            "chain_backend": devnet.name,
            "rpc": devnet.url,
            "store": store.url,
            "addresses": {
                "vault": str(vault),
                "usdc": str(usdc),
                "access_token": str(token),
                "owner": str(owner.address),
                "consumer": str(consumer.address),
            },
        }
        try:
            yield World(devnet, chain, store, owner, consumer, usdc, token, vault)
        finally:
            await chain.close()


@asynccontextmanager
async def stage(there: World, folder: Path, address: tuple[str, int], report: Report) -> AsyncIterator[Stage]:
    """Start a node in a process of its own; end it after the context."""
    environment = node_environment(there.devnet.url, there.vault, there.usdc, there.store.url)
    environment |= {"HOST": address[0], "PORT": str(address[1])}
    async with serving_node(environment, folder) as node:
        report.step("node", f"A node serves at {node.url}, in a process of its own")
        report.facts["node_url"] = node.url
        yield Stage(there, node, folder, report)


async def publish(on: Stage) -> example.Trained:
    """Train a model, seal it to the node, store and register it."""
    there, report = on.there, on.report
    trained = await asyncio.to_thread(example.train, on.folder)
    report.step(
        "train",
        f"The owner trained a model on 455 of 569 tumours; it is right on {trained.accuracy:.1%} of the other "
        f"{len(trained.rows)}",
    )
    async with on.client(there.devnet.accounts[1].key) as client:
        about = await client.node()
    publisher = Publisher(there.owner, there.vault, there.store.url)
    listing = Listing(ModelId.parse(MODEL), Usdc.parse(PRICE), there.token, GATE_MINIMUM, tags=("tabular", "demo"))
    done = await publisher.publish(trained.path, listing, [SealedTo.of(about)])
    report.step("seal", f"It was sealed (encrypted) to the node's key and stored: {done.size} bytes, CID {done.cid}")
    report.step(
        "register",
        f"It is registered: {PRICE} USDC per call, for wallets with 100 access tokens (transaction {done.transaction})",
    )
    report.facts["addresses"] |= {"node": str(about.address)}
    report.facts |= {
        "accuracy_before_sealing": trained.accuracy,
        "model_id": MODEL,
        "model_key": str(ModelId.parse(MODEL).key),
        "cid": done.cid.text,
        "sealed_bytes": done.size,
        "price_atomic": str(done.info.price.atomic),
        "transactions": {"register": str(done.transaction)},
    }
    return trained
