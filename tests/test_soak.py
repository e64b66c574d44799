"""A node under mixed load for a while (SOAK_SECONDS, default 60): the books stay true, and nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from divault.chain.wallet import Wallet
from divault.client import AsyncClient
from divault.devnet.content import ContentStore
from divault.errors import DivaultError
from divault.models import example
from divault.publishing import Listing, Publisher, SealedTo
from divault.testing import TestChain
from divault.testing.node import NodeProcess, node_environment, serving_node
from divault.values import ModelId, Usdc

SECONDS = float(os.environ.get("SOAK_SECONDS", "60"))
PRICE = Usdc.parse("0.02")
MODEL = "soaked"


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[tuple[TestChain, NodeProcess, list[list[float]]]]:
    """A chain, a node, and a model with a price behind a gate of one raw token."""
    async with AsyncExitStack() as stack:
        chain = await stack.enter_async_context(TestChain.start())
        store = await stack.enter_async_context(ContentStore(tmp_path / "blocks"))
        environ = node_environment(chain.devnet.url, chain.vault, chain.usdc, store.url)
        environ |= {"RATE_LIMIT_PER_MINUTE": "100000", "DIVAULT_RATE_LIMIT_PER_IP_PER_MINUTE": "1000000"}
        node = await stack.enter_async_context(serving_node(environ, tmp_path))
        trained = await asyncio.to_thread(example.train, tmp_path)
        async with AsyncClient(node.url, "0x" + "11" * 32, known_nodes=tmp_path / "known.json") as client:
            sealed_to = SealedTo.of(await client.node())
        publisher = Publisher(chain.publisher, chain.vault, store.url)
        await publisher.publish(trained.path, Listing(ModelId.parse(MODEL), PRICE, chain.token, 1), [sealed_to])
        yield chain, node, trained.rows


@pytest.mark.soak
@pytest.mark.timeout(0)
async def test_books_stay_true_and_nothing_is_left_behind(
    shop: tuple[TestChain, NodeProcess, list[list[float]]], tmp_path: Path
) -> None:
    chain, node, rows = shop
    wallets = [await chain.wallet(tokens=index % 4 and 1, usdc=Usdc.parse("100")) for index in range(8)]
    outcomes: Counter[str] = Counter()

    async def consume(wallet: Wallet, seconds: float) -> None:
        known = tmp_path / "known.json"
        client = AsyncClient(node.url, wallet._key, rpc=chain.devnet.url, known_nodes=known)
        await _consumer(client, rows, outcomes, seconds)

    await asyncio.gather(*(consume(wallet, 5.0) for wallet in wallets))  # warm: pools and caches are full
    before = _left_behind(node)
    await asyncio.gather(*(consume(wallet, SECONDS) for wallet in wallets))
    after = _left_behind(node)

    assert outcomes["ok"] > SECONDS
    assert outcomes["access_denied"] > 0
    assert outcomes["input_invalid"] > 0
    assert set(outcomes) <= {"ok", "access_denied", "input_invalid", "rate_limited"}
    assert await chain.balance(chain.usdc, chain.publisher.address) >= outcomes["ok"] * PRICE.atomic
    assert after["processes"] == before["processes"]
    assert after["descriptors"] <= before["descriptors"] + 8
    assert after["rss"] <= before["rss"] + 64 * 2**20


async def _consumer(client: AsyncClient, rows: list[list[float]], outcomes: Counter[str], seconds: float) -> None:
    """Calls one after the other; every fourth is one that the model does not take."""
    until = time.monotonic() + seconds
    async with client:
        while time.monotonic() < until:
            row = random.choice(rows)
            features = row if random.random() > 0.25 else row[:3]
            try:
                result = await client.run(MODEL, {"features": features}, max_price=str(PRICE))
                assert result.price == PRICE
                outcomes["ok"] += 1
            except DivaultError as err:
                outcomes[err.code] += 1


def _left_behind(node: NodeProcess) -> dict[str, int]:
    """Processes of the node's session, and descriptors and resident bytes of the node itself."""
    pid = node.process.pid
    status = Path(f"/proc/{pid}/status").read_text()
    resident = int(status.partition("VmRSS:")[2].split()[0]) * 1024
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {
        "processes": len(children),
        "descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "rss": resident,
    }
