"""From Lighthouse's own SDK to a paid answer: it seals, stores and shares the model, a node serves it."""

from __future__ import annotations

from pathlib import Path

import pytest

from divault.errors import AccessDenied
from divault.messages import address_of
from divault.testing import LighthouseDouble
from tests.e2e.conftest import MINIMUM, World
from tests.lighthouse_sdk import Sdk, sign

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_model_that_the_sdk_sealed_and_shared_answers(world: World, tmp_path: Path) -> None:
    owner = world.chain.devnet.accounts[0].key
    who = str(address_of(owner))
    (tmp_path / "node").mkdir()
    async with LighthouseDouble(tmp_path / "blocks") as double:
        settings = double.settings() | {"DIVAULT_KAVACH_DELEGATION": "1"}
        async with Sdk(double) as sdk, world.other_node(tmp_path / "node", **settings) as node:
            async with world.client(owner, node) as client:
                node_address = str((await client.node()).address)
            path = str(world.trained.path)
            reply = await sdk("uploadEncrypted", path, settings["LIGHTHOUSE_API_KEY"], who, sign(owner))
            cid = reply["data"][0]["Hash"]
            await world.chain.register("sealed-by-the-sdk", cid, minimum=MINIMUM)
            consumer = await world.consumer()
            async with world.client(consumer, node) as client:
                with pytest.raises(AccessDenied, match="Kavach"):
                    await client.load("sealed-by-the-sdk")
                shared = await sdk("shareFile", who, [node_address], cid, sign(owner))
                result = await client.run("sealed-by-the-sdk", {"features": world.trained.rows[0]})
            health = (await world.request("GET", "/health", node))[1]

    assert shared["data"]["status"] == "Success"
    assert result.output["predictions"] == world.trained.labels[:1]
    assert health["services"]["key_nodes"] == "active"
