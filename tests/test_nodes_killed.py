"""Letting a node in or shutting one out: killed at any moment and run again, and on top of what others did."""

from __future__ import annotations

import asyncio
import io
import json
import secrets
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from divault.chain.vault import VaultReader
from divault.devnet.content import ContentStore
from divault.errors import BadRequest, NotReady, StorageFailed, TransactionFailed, WrongKey
from divault.publishing import Access, Listing, Publication, Publications, Publisher, SealedTo
from divault.storage.cache import CiphertextCache
from divault.storage.fetcher import Fetcher
from divault.storage.gateway import GatewayStorage
from divault.storage.upload import publish_file
from divault.testing import TestChain
from divault.values import Cid, Digest, ModelId, Secret, Usdc, VerifiedBlob
from divault.vault import lighthouse
from divault.vault.age import Identity, Passphrase
from divault.vault.keys import NodeIdentity
from divault.vault.sealed import open_stream, seal_stream
from tests.ipfs_folders import put_folder

pytestmark = pytest.mark.asyncio(loop_scope="module")
POINTS = {
    "allow": ("after-record-sealed", "mid-upload", "after-record-stored", "after-sending", "before-record-registered"),
    "revoke": ("before-record-sealed", "after-record-sent", "after-record-registered"),
}
CHANGED = Digest.keccak(b"ContentChanged(bytes32,string,uint256)")
OWNER, FIRST, SECOND = (Identity.generate() for _ in range(3))
PLAIN = secrets.token_bytes(1_500_000)


@dataclass
class Market:
    """A chain, a store, and an owner's machine."""

    chain: TestChain
    store: ContentStore
    gateway: GatewayStorage
    folder: Path

    @property
    def records(self) -> Publications:
        return Publications(self.folder / "published")

    def node(self, identity: Identity) -> SealedTo:
        number = {FIRST: 1, SECOND: 2}.get(identity, 3)
        return SealedTo(f"http://127.0.0.1:{number}", self.chain.publisher.address, identity.recipient)

    def access(self, identity: Identity = OWNER, records: Publications | None = None) -> Access:
        records = records or self.records
        publisher = Publisher(self.chain.publisher, self.chain.vault, self.store.url, records=records)
        fetcher = Fetcher([self.gateway], CiphertextCache(self.folder / "cache", 1 << 28), max_model_bytes=1 << 26)
        return Access(publisher, records, fetcher, identity)

    async def publish(self, name: str, *to: Identity, owner: Identity | None = OWNER) -> ModelId:
        """Sealed to the first node unless others are named."""
        path = self.folder / "model.bin"
        path.write_bytes(PLAIN)
        model = ModelId.parse(name)
        nodes = [self.node(identity) for identity in to or (FIRST,)]
        await self.access().publisher.publish(path, Listing(model, Usdc(0)), nodes, owner=owner and owner.recipient)
        return model

    def order(self, do: str, model: ModelId, identity: Identity) -> dict[str, str]:
        key = next(a.key for a in self.chain.devnet.accounts if a.address == self.chain.publisher.address)
        node = self.node(identity)
        return {
            "do": do,
            "rpc": self.chain.devnet.url,
            "key": key.reveal().hex(),
            "store": self.store.url,
            "folder": str(self.folder / "published"),
            "cache": str(self.folder / "cache"),
            "vault": str(self.chain.vault),
            "model": model.text,
            "identity": OWNER.reveal_text(),
            "url": node.url,
            "recipient": str(node.recipient),
        }

    async def cid(self, model: ModelId) -> str:
        chain = self.chain.chain
        return (await VaultReader(chain, self.chain.vault).model(model, await chain.head(fresh=True))).cid

    async def changes(self, model: ModelId) -> int:
        """How often the vault got a CID for it."""
        head = await self.chain.chain.head(fresh=True)
        return len(await self.chain.chain.logs([self.chain.vault], [CHANGED, model.key], (0, head.number)))

    async def opens(self, model: ModelId, *identities: Identity) -> list[bool]:
        """Who opens what the vault names."""
        url = f"{self.store.url}/ipfs/{await self.cid(model)}"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            data = await response.read()
        return [opens(data, identity) for identity in identities]

    def record(self, model: ModelId) -> Publication | None:
        return self.records.find(self.chain.chain.chain_id, self.chain.vault, model)

    def left(self, model: ModelId) -> list[str]:
        files = (self.folder / "published").glob(f"*{model.key}*")
        return [path.name for path in files if path.suffix not in (".json", ".lock")]


def opens(data: bytes, identity: Identity) -> bool:
    plain = io.BytesIO()
    try:
        open_stream(io.BytesIO(data), plain, [NodeIdentity(identity)])
    except WrongKey:
        return False
    assert plain.getvalue() == PLAIN
    return True


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def market(tmp_path_factory) -> AsyncIterator[Market]:
    folder = tmp_path_factory.mktemp("market")
    async with TestChain.start(anvil=False) as chain, ContentStore(folder / "store") as store:
        gateway = GatewayStorage(store.url)
        yield Market(chain, store, gateway, folder)
        gateway.close()


async def child(order: dict[str, str], *point: str) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.nodes_child", *point),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    process.stdin.write(json.dumps(order).encode() + b"\n")
    await process.stdin.drain()
    return process


async def killed_at(order: dict[str, str], point: str) -> None:
    process = await child(order, point)
    line = await asyncio.wait_for(process.stdout.readline(), 30)
    assert line == f"at {point}\n".encode(), (line, await process.stderr.read())
    process.kill()
    await process.communicate()


async def run(order: dict[str, str]) -> str:
    process = await child(order)
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, err.decode()
    return out.decode().split()[1]


# --- killed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("do", "point"), [(do, point) for do, points in POINTS.items() for point in points])
async def test_killed_and_run_again_is_one_cid_and_one_registration(market: Market, do: str, point: str) -> None:
    model = await market.publish(f"{do}-{point}", *((FIRST, SECOND) if do == "revoke" else ()))
    order = market.order(do, model, SECOND)
    await killed_at(order, point)
    unfinished = market.records.unfinished(market.chain.chain.chain_id, market.chain.vault, model)

    cid = await run(order)

    assert cid == await market.cid(model) == market.record(model).cid.text
    assert await market.changes(model) == 2
    assert await market.opens(model, OWNER, FIRST, SECOND) == [True, True, do == "allow"]
    assert market.left(model) == []
    assert unfinished is None or unfinished.sha256 == market.record(model).sha256, "made once"
    assert unfinished is None or unfinished.cid is None or unfinished.cid.text == cid


async def test_a_registration_that_waits_is_mined_before_another_change_builds_on_it(market: Market) -> None:
    third = Identity.generate()
    model = await market.publish("waiting-change", FIRST)
    await market.chain.rpc("evm_setAutomine", False)
    try:
        await killed_at(market.order("allow", model, SECOND), "after-sending")
        other = asyncio.create_task(run(market.order("allow", model, third)))
        await asyncio.sleep(1.0)
        assert await market.changes(model) == 1
        while not other.done():
            await market.chain.mine()
            await asyncio.sleep(0.1)
        await other
    finally:
        await market.chain.rpc("evm_setAutomine", True)

    assert await market.opens(model, OWNER, FIRST, SECOND, third) == [True] * 4
    assert [node.recipient for node in market.record(model).nodes] == [i.recipient for i in (FIRST, SECOND, third)]


async def test_two_changes_at_once_do_not_race(market: Market) -> None:
    model = await market.publish("raced-change")
    where = (market.chain.chain.chain_id, market.chain.vault, model)
    with market.records.locked(*where), pytest.raises(NotReady):
        await market.access().allow(model, [market.node(SECOND)])
    assert await market.changes(model) == 1


# --- what a change leaves as it was, and what it builds on ------------------------------------------------------------


async def test_tags_version_and_terms_stay(market: Market) -> None:
    model = await market.publish("tagged-change")
    await market.chain.call_vault("updateModelMetadata", model.key, await market.cid(model), ["tabular"], "7")
    await market.chain.call_vault("updatePrice", model.key, 30_000)
    await market.access().allow(model, [market.node(SECOND)])
    info = (await market.access().standing(model)).info

    assert (info.tags, info.version, info.price) == (("tabular",), "7", Usdc(30_000))


async def test_the_same_publish_after_it_changes_nothing_and_without_the_node_seals_anew(market: Market) -> None:
    model = await market.publish("same-again")
    allowed = await market.access().allow(model, [market.node(SECOND)])
    await market.publish("same-again", FIRST, SECOND)
    assert await market.cid(model) == allowed.cid.text
    await market.publish("same-again", FIRST)

    assert await market.opens(model, OWNER, FIRST, SECOND) == [True, True, False]


async def test_a_change_that_was_begun_is_dropped_for_another_one(market: Market) -> None:
    model = await market.publish("other-mind", FIRST, SECOND)
    third = Identity.generate()
    await killed_at(market.order("allow", model, third), "after-record-stored")
    await market.access().revoke(model, [market.node(SECOND)])

    assert await market.opens(model, OWNER, FIRST, SECOND, third) == [True, True, False, False]
    assert await market.changes(model) == 2


async def test_a_record_about_another_cid_is_none(market: Market) -> None:
    """Another machine published since: who opens that is not known here."""
    model = await market.publish("elsewhere-too")
    elsewhere = replace(market, folder=market.folder / "elsewhere")
    elsewhere.folder.mkdir()
    await elsewhere.publish("elsewhere-too", FIRST, SECOND)
    access = market.access()

    assert (await access.standing(model)).record is None
    with pytest.raises(BadRequest, match="--keep"):
        await access.revoke(model, [market.node(SECOND)])
    with pytest.raises(BadRequest, match="--keep"):
        await access.allow(model, [market.node(SECOND)])
    with pytest.raises(BadRequest, match="sealed to 3 recipients"):
        await access.allow(model, [market.node(Identity.generate())], [market.node(FIRST)])
    assert await market.changes(model) == 2
    done = await access.allow(model, [market.node(SECOND)], [market.node(FIRST), market.node(SECOND)])
    assert done.published is None
    assert len((await access.standing(model)).nodes) == 2


class Overtaken(Fetcher):
    """While it fetches, the vault gets another CID."""

    def __init__(self, inner: Fetcher, change: Any) -> None:
        self._inner, self._change = inner, change

    async def fetch(self, cid: Cid, *, progress: Any = None) -> VerifiedBlob:
        blob = await self._inner.fetch(cid, progress=progress)
        await self._change()
        return blob


async def test_what_somebody_published_meanwhile_is_not_undone(market: Market) -> None:
    model = await market.publish("overtaken-change")
    access = market.access()

    async def change() -> None:
        await market.chain.set_cid(model, "bafkqaaa")

    with pytest.raises(TransactionFailed, match="run it again"):
        await replace(access, fetcher=Overtaken(access.fetcher, change)).allow(model, [market.node(SECOND)])
    assert await market.cid(model) == "bafkqaaa"


# --- refused, with nothing uploaded and nothing registered -----------------------------------------------------------


async def test_owner_without_a_copy_is_told_to_publish_again(market: Market) -> None:
    model = await market.publish("no-copy", owner=None)
    for change in (market.access().allow, market.access().revoke):
        keep = () if change.__name__ == "allow" else ([],)
        with pytest.raises(WrongKey, match="publish the model again without --no-owner-copy"):
            await change(model, [market.node(SECOND if change.__name__ == "allow" else FIRST)], *keep)
    assert await market.changes(model) == 1
    assert market.left(model) == []


async def test_who_goes_must_not_have_the_key_of_who_stays(market: Market) -> None:
    model = await market.publish("shared-key", FIRST, SECOND)
    with pytest.raises(BadRequest, match="same age identity"):
        await market.access(identity=SECOND).revoke(model, [market.node(SECOND)])
    with pytest.raises(BadRequest, match="same age identity"):
        await market.access().revoke(model, [market.node(SECOND)], [market.node(FIRST), market.node(SECOND)])
    with pytest.raises(BadRequest, match="nobody would be left"):
        await market.access().revoke(model, [market.node(FIRST), market.node(SECOND)])
    assert await market.changes(model) == 1


async def test_everybody_is_shut_out_when_that_is_said(market: Market) -> None:
    model = await market.publish("closed", FIRST, SECOND)
    done = await market.access().revoke(model, [], keep=[])

    assert await market.opens(model, OWNER, FIRST, SECOND) == [True, False, False]
    assert done.nodes == market.record(model).nodes == ()
    await market.access().allow(model, [market.node(FIRST)])
    assert await market.opens(model, OWNER, FIRST, SECOND) == [True, True, False]


async def test_a_store_that_answers_another_cid_registers_nothing(market: Market) -> None:
    model = await market.publish("lied-to")
    cid = await market.cid(model)

    async def lie(request: web.Request) -> web.Response:
        await request.read()
        return web.json_response({"Hash": "bafkreifzjut3te2nhyekklss27nh3k72ysco7y32koao5eei66wof36n5e"})

    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/{path:.*}", lie)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    access = market.access()
    liar = replace(access.publisher, store=f"http://127.0.0.1:{runner.addresses[0][1]}")
    try:
        for change, arguments in (("allow", ([market.node(SECOND)],)), ("revoke", ([], [market.node(SECOND)]))):
            with pytest.raises(StorageFailed) as caught:
                await getattr(replace(access, publisher=liar), change)(model, *arguments)
            assert caught.value.data["reason"] == "cid_mismatch"
    finally:
        await runner.cleanup()

    assert await market.cid(model) == cid
    assert market.record(model).cid.text == cid


@pytest.mark.parametrize("kind", ["passphrase", "lighthouse", "folder", "nothing"])
async def test_what_has_no_header_to_widen(market: Market, tmp_path: Path, kind: str) -> None:
    model = await market.publish(f"other-{kind}")
    cid = await unusual(market, tmp_path / "file", kind)
    await market.chain.set_cid(model, cid)
    words = {"passphrase": "passphrase", "lighthouse": "Kavach", "folder": "folder on IPFS", "nothing": "has no such"}
    known = [market.node(FIRST)]
    for change, arguments in (("allow", ([market.node(SECOND)], known)), ("revoke", ([], known))):
        with pytest.raises((BadRequest, StorageFailed), match=words[kind]):
            await getattr(market.access(), change)(model, *arguments)
    assert await market.cid(model) == cid
    assert market.left(model) == []


async def unusual(market: Market, path: Path, kind: str) -> str:
    """The CID of something else than a file sealed to recipients."""
    if kind == "nothing":
        return "bafkreifzjut3te2nhyekklss27nh3k72ysco7y32koao5eei66wof36n5e"
    if kind == "folder":
        return str(put_folder(market.store.blocks, {"model.age": b"sealed"}))
    with path.open("wb") as sink:
        if kind == "passphrase":
            seal_stream(io.BytesIO(b"model"), sink, [Passphrase(Secret.of_text("secret words"), work_factor=10)])
        else:
            lighthouse.seal(b"key", io.BytesIO(b"model" * 100), sink)
    return str(await publish_file(path, market.store.url))
