"""`divault publish` as an owner types it, to a plain store and to Lighthouse, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from divault.testing.lighthouse import LighthouseDouble
from divault.values import ModelId
from tests.e2e.conftest import World
from tests.e2e.test_http_identity import send, signed

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def publish(world: World, folder: Path, name: str, store: str, **settings: str) -> tuple[int, str, str]:
    """Run the command as the publisher; gives exit status, standard output and standard error."""
    key = next(a.key for a in world.chain.devnet.accounts if a.address == world.chain.publisher.address)
    file = folder / "owner.key"
    file.write_text("0x" + key.reveal().hex())
    file.chmod(0o600)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "divault", "publish", str(world.trained.path), "--id", name, "--price", "0"),
        *("--gate", f"{world.chain.token}:100", "--node", world.node.url, "--to", store, "-k", str(file), "--yes"),
        env={"PATH": os.defpath, "XDG_STATE_HOME": str(folder)} | world.environment() | settings,
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode or 0, out.decode(), err.decode()


async def test_what_is_published_to_a_store_runs(world: World, tmp_path: Path) -> None:
    status, out, err = await publish(world, tmp_path, "typed-model", world.store.url)
    assert status == 0, err
    told = json.loads(out)

    answer = await send(world, await signed(world, ModelId.parse("typed-model"), await world.consumer()))

    assert told["cid"] == (await world.request("GET", "/api/v1/models/typed-model"))[1]["model_info"]["cid"]
    assert answer[0] == 200
    assert "\x1b" not in out + err, "plain lines when piped"


async def test_what_is_published_to_lighthouse_is_there_under_our_cid(world: World, tmp_path: Path) -> None:
    async with LighthouseDouble(tmp_path / "double") as lighthouse:
        status, out, err = await publish(world, tmp_path, "lighthouse-model", "lighthouse", **lighthouse.settings())
        assert status == 0, err
        (tmp_path / "node").mkdir()
        async with world.other_node(tmp_path / "node", DIVAULT_GATEWAY_URLS=lighthouse.gateway.url) as elsewhere:
            key = await world.consumer()
            answer = await send(
                world, await signed(world, ModelId.parse("lighthouse-model"), key, elsewhere), elsewhere
            )

    assert (
        json.loads(out)["cid"]
        == (await world.request("GET", "/api/v1/models/lighthouse-model"))[1]["model_info"]["cid"]
    )
    assert (answer[0], answer[1]["code"]) == (400, "wrong_key"), "fetched and verified; sealed to the first node alone"


async def test_a_wrong_api_key_registers_nothing(world: World, tmp_path: Path) -> None:
    async with LighthouseDouble(tmp_path / "double") as lighthouse:
        settings = lighthouse.settings() | {"LIGHTHOUSE_API_KEY": "not-the-key"}
        status, _, err = await publish(world, tmp_path, "refused-model", "lighthouse", **settings)

    assert (status, "code: storage_failed" in err) == (1, True)
    assert (await world.request("GET", "/api/v1/models/refused-model"))[0] == 404
