"""The how-to on changing who serves runs as it stands, and shows what really comes out."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.e2e.conftest import World
from tests.e2e.test_publish_cli import entry, owner_key, publish
from tests.e2e.test_publish_page import shape
from tests.markdown_blocks import blocks, run_script, script

pytestmark = pytest.mark.asyncio(loop_scope="session")
PAGE = Path(__file__).parent.parent.parent / "docs/how-to/change-who-serves.md"


async def test_the_page_lets_a_node_in_shuts_one_out_and_closes_the_model(world: World, tmp_path: Path) -> None:
    done = await publish(world, tmp_path, "--id", "breast-cancer", "--unchecked", "--yes")
    assert done.status == 0, done.err
    (tmp_path / "node").mkdir()
    key = owner_key(world, tmp_path)
    async with world.other_node(tmp_path / "node") as other:
        exports = {
            "WEB3_PROVIDER_URL": world.chain.devnet.url,
            "DIVAULT_GATEWAY_URLS": world.store.url,
            "DIVAULT_STATE_DIR": str(tmp_path / "state"),
            "NODE": world.node.url,
            "OTHER": other.url,
        }
        text = "".join(f"export {name}={value}\n" for name, value in exports.items())
        ran = await asyncio.to_thread(run_script, text + script(PAGE), tmp_path, timeout_s=90)
        assert ran.returncode == 0, ran.stdout
    allowed, revoked, closed = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("allowed", "revoked", "closed")
    )
    printed = shape(ran.stdout)
    shown = [shape(block.code) for block in blocks(PAGE) if block.language == "text"][:2]

    assert key.name == "owner.key"
    for lines in shown:
        start = printed.index(lines[1]) - 1
        assert printed[start : start + len(lines)] == lines
    assert [node["url"] for node in allowed["nodes"]] == [world.node.url, other.url]
    assert [node["url"] for node in revoked["nodes"]] == [other.url]
    assert closed["nodes"] == []
    assert [allowed["old_cid"], revoked["old_cid"], closed["old_cid"]] == [
        json.loads(done.out)["cid"],
        allowed["cid"],
        revoked["cid"],
    ]
    assert (await entry(world, "breast-cancer"))["cid"] == closed["cid"]
