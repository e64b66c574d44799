"""Many wallets and many models at one node, a flood and a model without end: every answer is its caller's own."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path

import aiohttp
import pytest

from divault.cli.top import read
from divault.client.signing import Signer
from divault.errors import DeadlineExceeded
from divault.values import Address, Secret
from tests import many_wallets
from tests.e2e.conftest import World

pytestmark = pytest.mark.asyncio(loop_scope="session")
LIMITS = {"INFERENCE_TIMEOUT_SECONDS": "1", "RATE_LIMIT_PER_MINUTE": "60", "MAX_CONCURRENT_INFERENCES": "10"}


async def test_a_flood_and_an_endless_model_cost_nobody_his_answer(world: World, tmp_path: Path) -> None:
    keys = [Secret(secrets.token_bytes(32)) for _ in range(82)]
    async with world.other_node(tmp_path, **LIMITS) as node:
        models = []
        for number in range(5):
            path = tmp_path / f"m{number}.onnx"
            path.write_bytes(many_wallets.endless() if number == 4 else many_wallets.adder(number))
            models.append(await world.publish(f"wallets{number}", path, minimum=0, node=node))
        async with world.client(keys[0], node) as client:
            for model in models:
                await client.load(model.text)
        async with aiohttp.ClientSession() as session, session.get(node.url + "/api/v1/node") as answer:
            told = await answer.json()
        identity = (Address.parse(told["address"]), told["chain_id"], Address.parse(told["vault"]), told["authority"])
        signers = [Signer(key, *identity) for key in keys]
        async with many_wallets.town(node.url, models[:4], signers, models[4], at_once=8) as town:
            seen = await town.serve(trouble=True)
        async with world.client(keys[0], node) as client:
            with pytest.raises(DeadlineExceeded):
                await client.run(models[4].text, {"inputs": [1]})
        async with aiohttp.ClientSession() as session, session.get(node.url + "/api/v1/models") as answer:
            states = {one["model_id"]: one["state"] for one in (await answer.json())["models"]}
        figures = await asyncio.to_thread(read, node.url)

    assert seen.crossed == []
    assert seen.refused.total() == 0
    assert len(seen.seconds) == 80
    assert {states[model.text] for model in models[:4]} == {"ready"}
    assert figures.value("divault_refusals_total", code="rate_limited") >= 1, "and a flood"
