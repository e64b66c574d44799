"""Models in Lighthouse's format: the key in the request, the caller's word at Kavach, the node's own delegation."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from divault.errors import AccessDenied, BadRequest, DivaultError, RateLimited, StorageFailed, WrongKey
from divault.messages import address_of
from divault.storage.kavach import Kavach
from divault.storage.upload import publish_file
from divault.testing.node import NodeProcess
from divault.values import Address, Cid, Secret
from divault.vault import lighthouse
from divault.vault.kavach import generate
from tests.e2e.conftest import MINIMUM, World
from tests.kavach_nodes import KavachNodes, dead, silent

pytestmark = pytest.mark.asyncio(loop_scope="session")
_numbers = itertools.count()


@dataclass(frozen=True)
class Scene:
    """A node with delegation, Kavach's nodes beside it, and the publisher's key."""

    world: World
    nodes: KavachNodes
    kavach: Kavach
    node: NodeProcess
    node_address: Address
    owner: Secret

    async def model(self, folder: Path, *share_with: Address) -> tuple[str, Cid, str]:
        """A model of the publisher, sealed as Lighthouse does it: its name, its CID and its key."""
        key, shards = generate()
        path = folder / f"model{next(_numbers)}.enc"
        with self.world.trained.path.open("rb") as plain, path.open("xb") as sealed:
            await asyncio.to_thread(lighthouse.seal, key.reveal(), plain, sealed)
        cid = await publish_file(path, self.world.store.url)
        async with self.kavach.as_wallet(self.owner) as who:
            await self.kavach.save(who, cid, shards, share_with)
        await self.world.chain.register(path.stem, cid.text, minimum=MINIMUM)
        return path.stem, cid, key.reveal().decode()

    async def load(self, key: Secret, model: str, **how: Any) -> dict[str, Any]:
        async with self.world.client(key, self.node) as client:
            return await client.load(model, **how)

    async def word_of(self, key: Secret) -> str:
        return (await self.kavach.authorise(key)).token.reveal().decode()


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def scene(world: World, tmp_path_factory: Any) -> AsyncIterator[Scene]:
    async with KavachNodes() as nodes:
        settings = {"DIVAULT_LIGHTHOUSE_ENCRYPTION_URL": nodes.url, "DIVAULT_KAVACH_DELEGATION": "1"}
        async with world.other_node(tmp_path_factory.mktemp("kavach"), **settings) as node:
            owner = world.chain.devnet.accounts[0].key
            async with world.client(owner, node) as client:
                address = (await client.node()).address
            kavach = Kavach(nodes.url)
            yield Scene(world, nodes, kavach, node, address, owner)
            await kavach.close()


@pytest.fixture(autouse=True)
def honest_again(scene: Scene) -> None:
    scene.nodes.faults.clear()


async def test_key_in_the_request_opens_and_a_wrong_one_does_not(scene: Scene, tmp_path: Path) -> None:
    model, cid, key = await scene.model(tmp_path)
    consumer = await scene.world.consumer()
    asked = len(scene.nodes.asked)

    for _ in range(2):
        with pytest.raises(WrongKey) as caught:
            await scene.load(consumer, model, decryption_key=key.upper())
        assert caught.value.data["cid"] == cid.text
    assert "before" in caught.value.detail, "the second time nothing is derived"
    loaded = await scene.load(consumer, model, decryption_key=key)

    assert loaded["load_result"]["bytes"] == scene.world.trained.path.stat().st_size
    assert asked == len(scene.nodes.asked), "with a key at hand nobody is asked for one"


async def test_wallet_that_guesses_is_stopped(scene: Scene, tmp_path: Path) -> None:
    model, _, key = await scene.model(tmp_path)
    guesser = await scene.world.consumer()
    for _ in range(10):
        with pytest.raises(WrongKey):
            await scene.load(guesser, model, decryption_key="no")

    with pytest.raises(RateLimited):
        await scene.load(guesser, model, decryption_key=key)


async def test_callers_word_opens_what_was_shared_with_him(scene: Scene, tmp_path: Path) -> None:
    friend, stranger = await scene.world.consumer(), await scene.world.consumer()
    model, _, _ = await scene.model(tmp_path, address_of(friend))

    with pytest.raises(AccessDenied, match="Access Denied"):
        await scene.load(stranger, model, lighthouse_authorization=await scene.word_of(stranger))
    with pytest.raises(AccessDenied, match="Invalid Signature"):
        await scene.load(stranger, model, lighthouse_authorization=await scene.word_of(friend))
    loaded = await scene.load(friend, model, lighthouse_authorization=await scene.word_of(friend))

    assert loaded["status"] == "success"


async def test_delegation_opens_with_a_dead_and_a_silent_node(scene: Scene, tmp_path: Path) -> None:
    model, _, _ = await scene.model(tmp_path, scene.node_address)
    scene.nodes.faults |= {2: dead, 4: silent}

    assert (await scene.load(await scene.world.consumer(), model))["status"] == "success"


async def test_without_delegation_the_file_stays_shut_until_it_comes(scene: Scene, tmp_path: Path) -> None:
    model, _, _ = await scene.model(tmp_path)
    consumer = await scene.world.consumer()
    with pytest.raises(AccessDenied, match="Kavach gives no key"):
        await scene.load(consumer, model)
    async with scene.kavach.as_wallet(scene.owner) as who:
        await scene.kavach.delegate(who, [scene.node_address])

    assert (await scene.load(consumer, model))["status"] == "success"


async def test_file_of_somebody_else_is_not_opened_by_delegation(scene: Scene, tmp_path: Path) -> None:
    """A stranger registers the publisher's file under a gate of his own; the node has the publisher's delegation."""
    _, cid, _ = await scene.model(tmp_path, scene.node_address)
    thief = scene.world.chain.stranger
    await scene.world.chain.call_vault("registerOpenModel", _key("stolen"), cid.text, 0, 6, [], "1", sender=thief)

    with pytest.raises(AccessDenied, match="does not belong"):
        await scene.load(await scene.world.consumer(tokens=0), "stolen")


def _key(name: str) -> Any:
    from divault.values import ModelId

    return ModelId.parse(name)


async def test_gate_comes_before_kavach(scene: Scene, tmp_path: Path) -> None:
    outsider = await scene.world.consumer(tokens=0)
    model, _, _ = await scene.model(tmp_path, address_of(outsider), scene.node_address)
    word = await scene.word_of(outsider)
    asked = len(scene.nodes.asked)

    with pytest.raises(AccessDenied) as caught:
        await scene.load(outsider, model, lighthouse_authorization=word)

    assert caught.value.data["need"] == str(MINIMUM)
    assert asked == len(scene.nodes.asked)


async def test_kavach_out_of_reach_is_a_storage_error_that_names_it(scene: Scene, tmp_path: Path) -> None:
    model, cid, _ = await scene.model(tmp_path, scene.node_address)
    scene.nodes.faults |= dict.fromkeys((1, 2, 3), dead)

    with pytest.raises(StorageFailed, match=cid.text) as caught:
        await scene.load(await scene.world.consumer(), model)

    assert caught.value.data["gateway"] == scene.nodes.url.removeprefix("http://")


@pytest.mark.parametrize(
    "how",
    [
        {"lighthouse_authorization": "word"},
        {"lighthouse_authorization": ""},
        {"lighthouse_authorization": "jwt:x", "decryption_key": "k"},
    ],
    ids=str,
)
async def test_malformed_word_is_a_bad_request(scene: Scene, tmp_path: Path, how: dict[str, str]) -> None:
    model, _, _ = await scene.model(tmp_path)

    with pytest.raises(DivaultError) as caught:
        await scene.load(await scene.world.consumer(), model, **how)

    assert type(caught.value) is BadRequest
    assert caught.value.data["field"] == "lighthouse_authorization"
