"""The how-to on publishing to Lighthouse runs as it stands, and shows what really comes out."""

from __future__ import annotations

import asyncio
import io
import re
import secrets
from pathlib import Path

import pytest

from divault.ipfs.cid import parse_cid
from divault.messages import address_of
from divault.storage.kavach import Kavach
from divault.testing.lighthouse import LighthouseDouble
from divault.values import Secret
from divault.vault.kavach import recover_key
from divault.vault.keys import CallerKey
from divault.vault.sealed import open_stream
from tests.e2e.conftest import World
from tests.e2e.test_publish_cli import entry, owner_key
from tests.markdown_blocks import blocks, run_script, script

pytestmark = pytest.mark.asyncio(loop_scope="session")
PAGE = Path(__file__).parent.parent.parent / "docs/how-to/publish-to-lighthouse.md"
_CHANGING = (
    (r"https?://[\w.:]+", "URL"),
    (r"0x[0-9a-fA-F]{40,64}", "0x"),
    (r"\bbaf[a-z2-7]{20,}", "CID"),
    (r"/[\w./-]+/owner\.key\.age|owner\.key\.age", "KEY"),
    (r"-?[0-9]+(\.[0-9]+)?(e-?[0-9]+)?", "N"),
    (r"N(, N)+", "N"),
)


def shape(text: str) -> list[str]:
    """The lines, without what is another one each time."""
    for pattern, stands_for in _CHANGING:
        text = re.sub(pattern, stands_for, text)
    return [line for line in text.strip().splitlines() if line]


async def test_the_page_publishes_shows_what_comes_out_and_leaves_a_key_at_kavach(world: World, tmp_path: Path) -> None:
    (tmp_path / "breast-cancer.joblib").write_bytes(world.trained.path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"weights" * 1000)
    (tmp_path / "node").mkdir()
    owner_key(world, tmp_path)
    kavach_node, consumer = Secret(secrets.token_bytes(32)), await world.consumer()
    async with LighthouseDouble(tmp_path / "double") as lighthouse:
        gateway = {"DIVAULT_GATEWAY_URLS": lighthouse.gateway.url}
        async with world.other_node(tmp_path / "node", **gateway) as node:
            exports = lighthouse.settings() | {
                "WEB3_PROVIDER_URL": world.chain.devnet.url,
                "TOKEN": str(world.chain.token),
                "NODE": node.url,
                "NODE_ADDRESS": str(address_of(kavach_node)),
                "CONSUMER_KEY": "0x" + consumer.reveal().hex(),
            }
            text = "".join(f"export {name}={value}\n" for name, value in exports.items())
            done = await asyncio.to_thread(run_script, text + script(PAGE), tmp_path, timeout_s=90)
            assert done.returncode == 0, done.stdout
        stored = re.findall(r"stored \d+ bytes as (\w+) \(", done.stdout)[-1]
        kavach = Kavach(lighthouse.encryption.url)
        async with kavach.as_wallet(kavach_node) as who:
            shards = [shard async for shard in kavach.shards(who, parse_cid(stored))]
        await kavach.close()
    sealed, opened = (tmp_path / "model.enc").read_bytes(), io.BytesIO()
    open_stream(io.BytesIO(sealed), opened, [CallerKey(Secret.of_text(recover_key(shards[:3])))])
    (shown,) = [block.code for block in blocks(PAGE) if block.language == "text" and "recognised" in block.code]

    assert shape(shown) == shape(done.stdout)[: len(shape(shown))]
    assert await entry(world, "breast-cancer") is not None
    assert "'predictions': [" in done.stdout
    assert opened.getvalue() == b"weights" * 1000
