"""One chain, one content store and one real node process for the end-to-end tests; each test brings its own model."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest_asyncio

from divault.client import AsyncClient
from divault.devnet.content import ContentStore
from divault.models import example
from divault.publishing import Listing, Publisher, SealedTo
from divault.testing import TestChain
from divault.testing.node import NodeProcess, node_environment, serving_node
from divault.values import Address, ModelId, Secret, Usdc

MINIMUM = 100


@dataclass(frozen=True)
class World:
    """What an end-to-end test plays in."""

    chain: TestChain
    store: ContentStore
    node: NodeProcess
    folder: Path
    trained: example.Trained
    operator: Secret

    def client(self, key: Secret, node: NodeProcess | None = None) -> AsyncClient:
        return AsyncClient(
            (node or self.node).url,
            key,
            rpc=self.chain.devnet.url,
            known_nodes=self.folder / "known.json",
            timeout_s=60,
        )

    async def publish(
        self,
        name: str,
        path: Path | None = None,
        *,
        price: str = "0",
        minimum: int = MINIMUM,
        node: NodeProcess | None = None,
    ) -> ModelId:
        """Seal to the node, store and register, as a publisher does."""
        async with self.client(Secret(secrets.token_bytes(32)), node) as client:
            sealed_to = SealedTo.of(await client.node())
        publisher = Publisher(self.chain.publisher, self.chain.vault, self.store.url)
        token = self.chain.token if minimum else None
        listing = Listing(ModelId.parse(name), Usdc.parse(price), token, minimum)
        return (await publisher.publish(path or self.trained.path, listing, [sealed_to])).info.model

    async def consumer(self, *, tokens: int = MINIMUM, usdc: str = "1") -> Secret:
        """Make a wallet with tokens and money; gives its key."""
        key = Secret(secrets.token_bytes(32))
        async with self.client(key) as client:
            address = client.address
        await self.chain.publisher.send(address, value=10**18)
        if tokens:
            await self.chain.mint_tokens(address, tokens)
        await self.chain.mint_usdc(address, Usdc.parse(usdc))
        return key

    @asynccontextmanager
    async def other_node(self, folder: Path, **settings: str) -> AsyncIterator[NodeProcess]:
        """Start another node on the same chain and store, with its own keys and settings."""
        environment = self.environment() | settings
        async with serving_node(environment, folder) as node:
            yield node

    def environment(self) -> dict[str, str]:
        return node_environment(self.chain.devnet.url, self.chain.vault, self.chain.usdc, self.store.url) | FAST

    async def request(
        self, method: str, path: str, node: NodeProcess | None = None, **arguments: Any
    ) -> tuple[int, dict[str, Any], dict[str, str]]:
        """One plain HTTP exchange: status, JSON body, headers in lower case."""
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, (node or self.node).url + path, **arguments) as response,
        ):
            body = await response.json(content_type=None)
            return response.status, body, {k.lower(): v for k, v in response.headers.items()}


FAST = {
    "DIVAULT_HEAD_TTL_SECONDS": "0",  # every decision on the newest block, so that tests need not wait for a second
    "INFERENCE_TIMEOUT_SECONDS": "3",
    "RATE_LIMIT_PER_MINUTE": "6000",
    "MAX_CONCURRENT_INFERENCES": "200",
}


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def world(tmp_path_factory: Any) -> AsyncIterator[World]:
    folder = tmp_path_factory.mktemp("world")
    (folder / "node").mkdir()
    operator = Secret(secrets.token_bytes(32))
    trained = await asyncio.to_thread(example.train, folder)
    async with TestChain.start() as chain, ContentStore(folder / "store") as store:
        settings = node_environment(chain.devnet.url, chain.vault, chain.usdc, store.url) | FAST
        settings["DIVAULT_OPERATORS"] = str(_address(operator))
        async with serving_node(settings, folder / "node") as node:
            yield World(chain, store, node, folder, trained, operator)


def _address(key: Secret) -> Address:
    from divault.messages import address_of

    return address_of(key)
