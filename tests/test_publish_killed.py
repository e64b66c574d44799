"""A publish that is killed at any moment and run again: one CID, one registration, and nothing half-published."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import secrets
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio

from divault.chain.vault import VaultReader
from divault.chain.wallet import SignedTransaction
from divault.errors import BadRequest, ModelUnknown, TransactionFailed
from divault.messages import address_of
from divault.publishing import Listing, Publications, Publisher, SealedTo, Stage
from divault.testing import TestChain
from divault.testing.lighthouse import LighthouseDouble
from divault.values import Digest, ModelId, ModelInfo, Secret, Usdc
from divault.vault.age import Identity
from tests.publish_child import POINTS

pytestmark = pytest.mark.asyncio(loop_scope="module")
REGISTERED = Digest.keccak(b"ModelRegistered(bytes32,address,address,string,uint256)")
CHANGED = Digest.keccak(b"ContentChanged(bytes32,string,uint256)")
BEFORE_SEALED = "before-record-sealed"


@dataclass
class Shop:
    """A chain, Lighthouse on this machine, and a publisher's folder."""

    chain: TestChain
    lighthouse: LighthouseDouble
    folder: Path

    def order(self, name: str, identity: Identity) -> dict[str, str]:
        key = next(a.key for a in self.chain.devnet.accounts if a.address == self.chain.publisher.address)
        path = self.folder / f"{name}.bin"
        if not path.exists():
            path.write_bytes(secrets.token_bytes(3 << 20))
        return {
            "rpc": self.chain.devnet.url,
            "key": key.reveal().hex(),
            "api_key": self.lighthouse.api_key.reveal().decode(),
            "upload": self.lighthouse.upload.url,
            "gateway": self.lighthouse.gateway.url,
            "folder": str(self.folder / "published"),
            "vault": str(self.chain.vault),
            "token": str(self.chain.token),
            "model": name,
            "recipient": str(identity.recipient),
            "path": str(path),
        }

    def records(self) -> Publications:
        return Publications(self.folder / "published")

    async def info(self, name: str) -> ModelInfo | None:
        chain = self.chain.chain
        try:
            return await VaultReader(chain, self.chain.vault).model(ModelId.parse(name), await chain.head(fresh=True))
        except ModelUnknown:
            return None

    async def events(self, name: str, topic: Digest) -> int:
        key = ModelId.parse(name).key
        head = await self.chain.chain.head(fresh=True)
        return len(await self.chain.chain.logs([self.chain.vault], [topic, key], (0, head.number)))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shop(tmp_path_factory) -> AsyncIterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    async with TestChain.start(anvil=False) as chain, LighthouseDouble(folder / "lighthouse") as lighthouse:
        yield Shop(chain, lighthouse, folder)


async def child(order: dict[str, str], point: str = "") -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.publish_child", *([point] if point else [])),
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


async def run(order: dict[str, str]) -> tuple[str, str]:
    process = await child(order)
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, err.decode()
    _, cid, transaction = out.decode().split()
    return cid, transaction


def kept(shop: Shop, name: str) -> list[Path]:
    """Sealed files and drafts of the model."""
    files = (shop.folder / "published").glob(f"*{ModelId.parse(name).key}*")
    return [path for path in files if path.suffix not in (".json", ".lock")]


@pytest.mark.parametrize("point", POINTS)
async def test_killed_publish_run_again_has_one_cid_and_one_registration(shop: Shop, point: str) -> None:
    identity = Identity.generate()
    order = shop.order(f"killed-{point}", identity)
    await killed_at(order, point)
    left = [path.read_bytes() for path in kept(shop, order["model"]) if path.suffix == ".age"]
    before = await shop.info(order["model"])
    unfinished = shop.records().unfinished(shop.chain.chain.chain_id, shop.chain.vault, ModelId.parse(order["model"]))

    cid, _ = await run(order)
    record = shop.records().find(shop.chain.chain.chain_id, shop.chain.vault, ModelId.parse(order["model"]))

    assert (await shop.info(order["model"])).cid == cid == record.cid.text
    assert await shop.events(order["model"], REGISTERED) == 1
    assert await shop.events(order["model"], CHANGED) == 1
    assert record.stage is Stage.REGISTERED
    assert kept(shop, order["model"]) == []
    if before is not None:
        assert before.cid == cid
    if left and point != BEFORE_SEALED:
        assert len(left[0]) == record.size
        assert record.sha256 == unfinished.sha256, "the seal was not made again"
    if unfinished is not None and unfinished.cid is not None:
        assert unfinished.cid.text == cid


@pytest.mark.parametrize("seed", range(2))
async def test_killed_at_random_moments_again_and_again(shop: Shop, seed: int) -> None:
    dice = random.Random(seed)
    order = shop.order(f"random-{seed}", Identity.generate())
    cids = set()
    for _ in range(3):
        process = await child(order)
        try:
            await asyncio.wait_for(process.wait(), dice.uniform(0.35, 1.2))
        except TimeoutError:
            process.kill()
        await process.communicate()
        where = (shop.chain.chain.chain_id, shop.chain.vault, ModelId.parse(order["model"]))
        record = shop.records().unfinished(*where) or shop.records().find(*where)
        if record is not None:
            cids.add(record.sha256)
    cid, _ = await run(order)

    assert (await shop.info(order["model"])).cid == cid
    assert await shop.events(order["model"], REGISTERED) == 1
    assert await shop.events(order["model"], CHANGED) == 1
    assert len(cids) <= 1, "sealed once"
    assert kept(shop, order["model"]) == []


async def test_registration_that_waits_unmined_is_not_sent_twice(shop: Shop) -> None:
    order = shop.order("waiting", Identity.generate())
    await shop.chain.rpc("evm_setAutomine", False)
    try:
        await killed_at(order, "after-sending")
        nonce = await shop.chain.chain.nonce(shop.chain.publisher.address)
        again = asyncio.create_task(run(order))
        await asyncio.sleep(1.0)
        assert await shop.chain.chain.nonce(shop.chain.publisher.address) == nonce, "no second one waits"
        await shop.chain.mine()
        cid, _ = await again
    finally:
        await shop.chain.rpc("evm_setAutomine", True)

    assert (await shop.info("waiting")).cid == cid
    assert await shop.events("waiting", REGISTERED) == 1
    assert await shop.chain.chain.nonce(shop.chain.publisher.address) == nonce


async def test_registration_that_waited_is_not_taken_for_one_on_other_terms(shop: Shop) -> None:
    order = shop.order("terms", Identity.generate())
    await shop.chain.rpc("evm_setAutomine", False)
    try:
        await killed_at(order, "after-sending")
        again = await child(order | {"price": "0.03"})
        await asyncio.sleep(1.0)
        await shop.chain.mine()
        _, err = await asyncio.wait_for(again.communicate(), 30)
    finally:
        await shop.chain.rpc("evm_setAutomine", True)

    assert b"the vault offers terms at 0.02 USDC" in err
    assert (await run(order))[1] == "None"


async def test_registration_that_lost_its_nonce_is_signed_anew(shop: Shop) -> None:
    order = shop.order("overtaken", Identity.generate())
    await killed_at(order, "after-record-sent")
    shop.chain.publisher._next_nonce = 0  # the child signed with its own count
    await shop.chain.publisher.send(shop.chain.stranger.address, value=1)

    cid, _ = await run(order)

    assert (await shop.info("overtaken")).cid == cid
    assert await shop.events("overtaken", REGISTERED) == 1


async def test_registration_that_is_refused_is_replaced_under_its_own_nonce(shop: Shop) -> None:
    """So that one of the two at most is ever mined."""
    order = shop.order("refused", Identity.generate())
    await killed_at(order, "after-record-sent")
    chain, records = shop.chain.chain, shop.records()
    record = records.unfinished(chain.chain_id, shop.chain.vault, ModelId.parse("refused"))
    fees = {"maxFeePerGas": 1, "maxPriorityFeePerGas": 1, "type": 2, "chainId": chain.chain_id, "gas": 10**6}
    raw = shop.chain.publisher._sign(
        {"to": str(shop.chain.vault), "value": 0, "data": b"", "nonce": record.sent.nonce, **fees}
    )
    before = SignedTransaction(Digest.keccak(raw), record.sent.nonce, raw)  # one that pays too little by now
    records.save(replace(record, sent=before))
    cid, transaction = await run(order)
    mined = await chain.transaction(Digest.parse(transaction))

    assert (await shop.info("refused")).cid == cid
    assert mined.nonce == before.nonce
    assert mined.hash != before.hash
    with pytest.raises(TransactionFailed):
        await chain.send_raw(before.raw)
    assert await shop.events("refused", REGISTERED) == 1


@pytest.mark.parametrize(
    ("point", "what"),
    [("after-record-sealed", "plaintext"), ("after-record-stored", "recipients"), ("after-sending", "plaintext")],
)
async def test_changed_plaintext_or_recipients_are_sealed_anew(shop: Shop, point: str, what: str) -> None:
    order = shop.order(f"changed-{point}-{what}", Identity.generate())
    await killed_at(order, point)
    where = (shop.chain.chain.chain_id, shop.chain.vault, ModelId.parse(order["model"]))
    before = shop.records().unfinished(*where)
    if what == "plaintext":
        Path(order["path"]).write_bytes(secrets.token_bytes(1 << 20))
    else:
        order["recipient"] = str(Identity.generate().recipient)

    cid, _ = await run(order)
    record = shop.records().find(*where)

    assert record.sha256 != before.sha256
    assert before.cid is None or before.cid.text != cid
    assert (await shop.info(order["model"])).cid == cid
    assert await shop.events(order["model"], REGISTERED) == 1
    assert await shop.events(order["model"], CHANGED) == (2 if point == "after-sending" else 1)


async def test_same_publish_once_more_changes_nothing(shop: Shop) -> None:
    order = shop.order("again", Identity.generate())
    first, transaction = await run(order)
    nonce = await shop.chain.chain.nonce(shop.chain.publisher.address)

    assert (first, "None") == await run(order)
    assert transaction != "None"
    assert await shop.chain.chain.nonce(shop.chain.publisher.address) == nonce


async def test_new_content_keeps_tags_and_version(shop: Shop) -> None:
    order = shop.order("tagged", Identity.generate())
    entry = (ModelId.parse("tagged"), "bafkqaaa", shop.chain.token, Usdc(20_000), 6, ["tabular"], "7", 100)
    await shop.chain.call_vault("registerModel", *entry)
    cid, _ = await run(order)
    info = await shop.info("tagged")

    assert (info.cid, info.tags, info.version) == (cid, ("tabular",), "7")


async def test_damaged_sealed_file_is_sealed_anew(shop: Shop) -> None:
    order = shop.order("damaged", Identity.generate())
    await killed_at(order, "after-record-sealed")
    (sealed,) = kept(shop, "damaged")
    with sealed.open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"damage")

    cid, _ = await run(order)

    assert (await shop.info("damaged")).cid == cid


async def test_two_publishes_at_once_do_not_race(shop: Shop) -> None:
    order = shop.order("raced", Identity.generate())
    first = await child(order, "after-record-sealed")
    assert await asyncio.wait_for(first.stdout.readline(), 30) == b"at after-record-sealed\n"
    second = await child(order)
    _, err = await asyncio.wait_for(second.communicate(), 30)
    first.kill()
    await first.communicate()

    assert second.returncode == 1
    assert b"NotReady" in err
    assert await shop.info("raced") is None


async def test_somebody_elses_id_is_refused_before_anything_is_sealed(shop: Shop) -> None:
    order = shop.order("taken", Identity.generate())
    await run(order)
    other = next(a.key for a in shop.chain.devnet.accounts if a.address == shop.chain.stranger.address)
    assert address_of(Secret(other.reveal())) == shop.chain.stranger.address
    uploads = len(shop.lighthouse.upload.asked)
    process = await child(order | {"key": other.reveal().hex(), "folder": str(shop.folder / "stranger")})
    _, err = await asyncio.wait_for(process.communicate(), 30)

    assert b"belongs to" in err
    assert not (shop.folder / "stranger").exists()
    assert len(shop.lighthouse.upload.asked) == uploads


async def test_content_that_changed_after_it_was_agreed_to_is_not_uploaded(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"the new content")
    agreed = Digest(hashlib.sha256(b"the content that was shown").digest())
    publisher = Publisher(shop.chain.publisher, shop.chain.vault, shop.lighthouse.upload.url)
    node = SealedTo("http://127.0.0.1:1", shop.chain.publisher.address, Identity.generate().recipient)
    uploads = len(shop.lighthouse.upload.asked)
    with pytest.raises(BadRequest, match="changed while it was being published"):
        await publisher.publish(tmp_path / "model", Listing(ModelId.parse("swapped"), Usdc(0)), [node], expected=agreed)

    assert len(shop.lighthouse.upload.asked) == uploads
    assert await shop.info("swapped") is None
