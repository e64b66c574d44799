"""`divault nodes` with two real nodes: who serves after each command, what it says, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from divault import keyfiles
from divault.testing.node import NodeProcess
from divault.values import ModelId, Secret
from tests.e2e.conftest import World
from tests.e2e.test_http_identity import send, signed
from tests.e2e.test_publish_cli import Done, blocks, entry, fetched, owner_key, publish, run

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def nodes(world: World, folder: Path, *arguments: str, answer: str = "", **settings: str) -> Done:
    """Run `divault nodes` as the publisher, unless the arguments name another key."""
    given = list(arguments)
    if given[0] != "ls" and "--key" not in given:
        given += ["--key", str(owner_key(world, folder))]
    environment = world.environment() | {"VAULT_CONTRACT_ADDRESS": ""} | settings
    environment = {name: value for name, value in environment.items() if value}
    return await run(folder, environment, "-m", "divault", "nodes", *given, answer=answer)


async def told(world: World, folder: Path, *arguments: str, **settings: str) -> tuple[dict[str, Any], str]:
    """What a command that succeeds prints, on stdout and stderr."""
    done = await nodes(world, folder, *arguments, **settings)
    assert done.status == 0, done.err
    return json.loads(done.out), done.err


async def refused(world: World, folder: Path, *arguments: str, **settings: str) -> str:
    """What a command says that refuses; checks that nothing was registered."""
    before = await world.chain.chain.nonce(world.chain.publisher.address)
    done = await nodes(world, folder, *arguments, **settings)
    assert (done.status, done.out) == (1, ""), done.err
    assert "Traceback" not in done.err
    assert await world.chain.chain.nonce(world.chain.publisher.address) == before
    return done.err


async def answer(world: World, model: str, key: Secret, node: NodeProcess) -> Any:
    """What the node predicts, or the code of its refusal."""
    _, body, _ = await send(world, await signed(world, ModelId.parse(model), key, node), node)
    return body["result"]["predictions"] if "result" in body else body["code"]


async def published(world: World, folder: Path, name: str, *arguments: str) -> str:
    """A free model, sealed to the world's node and its owner; gives its CID."""
    done = await publish(world, folder, "--id", name, "--price", "0", "--unchecked", "--yes", *arguments)
    assert done.status == 0, done.err
    return json.loads(done.out)["cid"]


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def other(world: World, tmp_path_factory) -> AsyncIterator[NodeProcess]:
    """A second node on the same chain and store."""
    async with world.other_node(tmp_path_factory.mktemp("other")) as node:
        yield node


async def test_a_node_is_let_in_and_another_shut_out(world: World, tmp_path: Path, other: NodeProcess) -> None:
    first = await published(world, tmp_path, "moving")
    consumer = await world.consumer()
    before = [await answer(world, "moving", consumer, node) for node in (world.node, other)]
    nonce = await world.chain.chain.nonce(world.chain.publisher.address)

    allowed, allowing = await told(world, tmp_path, "allow", "moving", "--node", other.url, "--yes")
    both = [await answer(world, "moving", consumer, node) for node in (world.node, other)]
    listed, _ = await told(world, tmp_path, "ls", "moving")
    again, saying = await told(world, tmp_path, "allow", "moving", "--node", other.url, "--yes")
    revoked, revoking = await told(world, tmp_path, "revoke", "moving", "--node", world.node.url, "--yes")
    after = [await answer(world, "moving", consumer, node) for node in (world.node, other)]

    assert before == [[world.trained.labels[0]], "wrong_key"]
    assert both == [before[0], before[0]]
    assert after == ["wrong_key", before[0]]
    assert [allowed["old_cid"], revoked["old_cid"]] == [first, allowed["cid"]]
    assert (await entry(world, "moving"))["cid"] == revoked["cid"]
    assert await world.chain.chain.nonce(world.chain.publisher.address) == nonce + 2
    assert [node["url"] for node in listed["nodes"]] == [world.node.url, other.url]
    assert (again["cid"], again["transaction"]) == (allowed["cid"], None)
    assert f"opens it already: {other.url} (0x" in saying
    assert [node["url"] for node in revoked["nodes"]] == [other.url]
    assert f"moving was {first} and is {allowed['cid']}" in allowing
    assert "loads the new one with its next load" in allowing
    assert f"the old ciphertext {allowed['cid']} stays readable for it for ever" in revoking
    assert len(await fetched(world, allowed["cid"])) > 0, "and so it is"


async def test_an_owner_is_told_before_he_is_asked_once(world: World, tmp_path: Path, other: NodeProcess) -> None:
    cid = await published(world, tmp_path, "asked")
    before = blocks(world)
    no = await nodes(world, tmp_path, "allow", "asked", "--node", other.url, answer="n\n")
    assert (no.status, no.out.strip(), blocks(world)) == (1, "", before)
    yes = await nodes(world, tmp_path, "allow", "asked", "--node", other.url, answer="y\n")
    never = await nodes(world, tmp_path, "revoke", "asked", "--node", other.url, answer="n\n")

    assert yes.status == 0, yes.err
    shown = yes.err[: yes.err.index("[y/N]")]
    assert f"opened by: {world.node.url} (0x" in shown
    assert f"to be let in: {other.url} (0x" in shown
    assert "cost: up to 0.0" in shown
    assert f"bytes) is stored anew at {world.store.url}" in shown
    assert yes.err.count("[y/N]") == 1
    asked = never.err[: never.err.index("[y/N]")]
    assert f"to be shut out: {other.url} (0x" in asked
    assert "may have kept it in plain" in asked
    assert f"still opened by: {world.node.url} (0x" in asked
    assert never.status == 1
    assert (await entry(world, "asked"))["cid"] == json.loads(yes.out)["cid"] != cid


async def test_who_may_not(world: World, tmp_path: Path, other: NodeProcess) -> None:
    await published(world, tmp_path, "mine-alone")
    stranger, other_identity = tmp_path / "stranger.key", tmp_path / "other.age"
    keyfiles.new_signing_key(stranger)
    keyfiles.new_identity(tmp_path / "stranger.key.age")
    keyfiles.new_identity(other_identity)
    allow = ("allow", "mine-alone", "--yes", "--node", other.url)
    revoke = ("revoke", "mine-alone", "--yes", "--node", world.node.url, "--keep", other.url)
    not_his = await refused(world, tmp_path, *allow, "--key", str(stranger))
    wrong = await refused(world, tmp_path, *revoke, "--identity", str(other_identity))
    missing = await refused(world, tmp_path, *allow, "--identity", str(tmp_path / "nothing.age"))
    pinned = await refused(world, tmp_path, *allow[:-1], f"{other.url}#0x{'11' * 20}")

    assert "only its owner changes who serves it" in not_his
    assert "code: wrong_key" in wrong
    assert "publish the model again without --no-owner-copy" in wrong
    assert "there is no age identity at" in missing
    assert "code: node_untrusted" in pinned


async def test_what_means_nothing(world: World, tmp_path: Path) -> None:
    await published(world, tmp_path, "last-one")
    revoke = ("revoke", "last-one", "--yes")
    address = json.loads((await nodes(world, tmp_path, "ls", "last-one")).out)["nodes"][0]["address"]

    assert "nobody would be left to serve it" in await refused(world, tmp_path, *revoke, "--node", address)
    assert "is none of the nodes that open" in await refused(world, tmp_path, *revoke, "--node", "http://127.0.0.1:9")
    assert "name the nodes to shut out" in await refused(world, tmp_path, *revoke)
    assert "set VAULT_CONTRACT_ADDRESS" in await refused(world, tmp_path, "revoke", "nobodys", "--all", "--yes")


async def test_without_a_record_the_owner_names_the_nodes(world: World, tmp_path: Path, other: NodeProcess) -> None:
    await published(world, tmp_path, "forgotten")
    (tmp_path / "state").rename(tmp_path / "lost")
    to = {"VAULT_CONTRACT_ADDRESS": str(world.chain.vault), "DIVAULT_STORE_URL": world.store.url}
    allow = ("allow", "forgotten", "--yes", "--node", other.url)
    listed, saying = await told(world, tmp_path, "ls", "forgotten", **to)
    nothing = await refused(world, tmp_path, *allow, **to)
    allowed, _ = await told(world, tmp_path, *allow, "--keep", world.node.url, **to)
    (tmp_path / "state").rename(tmp_path / "lost-again")
    kept, _ = await told(world, tmp_path, "revoke", "forgotten", "--keep", other.url, "--yes", **to)
    consumer = await world.consumer()
    answers = [await answer(world, "forgotten", consumer, node) for node in (world.node, other)]

    assert listed["nodes"] is None
    assert "no record of who opens that CID" in saying
    assert "name every node that opens it now with --keep" in nothing
    assert [node["url"] for node in allowed["nodes"]] == [world.node.url, other.url]
    assert [node["url"] for node in kept["nodes"]] == [other.url]
    assert answers == ["wrong_key", [world.trained.labels[0]]]
