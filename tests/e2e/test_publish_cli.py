"""`divault publish` as an owner types it, to a plain store and to Lighthouse, and what it refuses."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pickle
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from divault import keyfiles
from divault.messages import address_of
from divault.publishing import Publications
from divault.testing.lighthouse import LighthouseDouble
from divault.values import ModelId
from divault.vault.keys import NodeIdentity
from divault.vault.sealed import open_stream
from tests.e2e.conftest import World
from tests.e2e.test_http_identity import send, signed

pytestmark = pytest.mark.asyncio(loop_scope="session")


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str


async def run(folder: Path, environment: dict[str, str], *arguments: str, answer: str = "") -> Done:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *arguments),
        env={"PATH": os.defpath, "HOME": str(folder), "XDG_STATE_HOME": str(folder)} | environment,
        cwd=folder,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(answer.encode()), 60)
    return Done(process.returncode or 0, out.decode(), err.decode())


def owner_key(world: World, folder: Path) -> Path:
    """The publisher's key in a file."""
    file = folder / "owner.key"
    key = next(a.key for a in world.chain.devnet.accounts if a.address == world.chain.publisher.address)
    if not file.exists():
        file.touch(mode=0o600)
        file.write_text("0x" + key.reveal().hex())
    return file


async def publish(world: World, folder: Path, *arguments: str, answer: str = "", **settings: str) -> Done:
    """Run the command as the publisher: the model of the world at 0.02 unless the arguments say otherwise."""
    given = list(arguments)
    defaults = {
        "--price": "0.02",
        "--gate": f"{world.chain.token}:100",
        "--node": world.node.url,
        "--key": str(owner_key(world, folder)),
    }
    if not given or given[0].startswith("--"):
        given.insert(0, str(world.trained.path))
    for name, value in defaults.items():
        given += [] if name in given else [name, value]
    environment = world.environment() | {"DIVAULT_STORE_URL": world.store.url} | settings
    environment = {name: value for name, value in environment.items() if value}
    return await run(folder, environment, "-m", "divault", "publish", *given, answer=answer)


async def entry(world: World, name: str) -> dict[str, object] | None:
    status, body, _ = await world.request("GET", f"/api/v1/models/{name}")
    return body["model_info"] if status == 200 else None


def blocks(world: World) -> int:
    """Blocks in the store."""
    return sum(1 for path in (world.folder / "store").rglob("*") if path.is_file())


# --- what works -------------------------------------------------------------------------------------------------------


async def test_the_printed_lines_run_the_model(world: World, tmp_path: Path) -> None:
    done = await publish(world, tmp_path, "--id", "typed-model", "--yes")
    assert done.status == 0, done.err
    told = json.loads(done.out)
    key = await world.consumer()
    as_consumer = {"WALLET_KEY": "0x" + key.reveal().hex(), "WEB3_PROVIDER_URL": world.chain.devnet.url}
    answer = await run(tmp_path, as_consumer, "-c", told["python"])

    assert told["cid"] == (await entry(world, "typed-model"))["cid"]
    assert f"\n{told['python']}\n" in done.err
    assert len(told["python"].splitlines()) == 3
    assert answer.status == 0, answer.err
    assert "predictions" in answer.out
    assert "\x1b" not in done.out + done.err, "plain lines when piped"


async def test_a_folder_is_published_and_its_printed_lines_run_too(world: World, tmp_path: Path) -> None:
    network = tmp_path / "small-network"
    network.mkdir()
    save_file({"0.weight": torch.zeros(3, 4), "0.bias": torch.zeros(3)}, network / "model.safetensors")
    architecture = {"architecture": {"type": "mlp", "sizes": [4, 3], "activation": "relu"}}
    (network / "divault.json").write_text(json.dumps(architecture))
    done = await publish(world, tmp_path, str(network), "--price", "0", "--gate", "open", "--yes")
    assert done.status == 0, done.err
    key = {"WALLET_KEY": "0x" + secrets.token_hex(32)}
    answer = await run(tmp_path, key, "-c", json.loads(done.out)["python"])

    assert "recognised: torch" in done.err
    assert "warning" not in done.err
    assert answer.status == 0, answer.err
    assert "outputs" in answer.out or "predictions" in answer.out


async def test_an_owner_sees_format_example_and_cost_before_he_is_asked_once(world: World, tmp_path: Path) -> None:
    before = blocks(world)
    no = await publish(world, tmp_path, "--id", "asked-model", answer="n\n")
    assert (no.status, await entry(world, "asked-model"), blocks(world)) == (1, None, before)
    yes = await publish(world, tmp_path, "--id", "asked-model", answer="y\n")

    assert yes.status == 0, yes.err
    shown = yes.err[: yes.err.index("seal, upload and register?")]
    assert "recognised: sklearn, classification; loaded and run as a node does" in shown
    assert (
        "takes: features: a list of 30 number or a list of 1 or more a list of 30 number" in shown or "takes:" in shown
    )
    assert 'for example: {"features": [' in shown
    assert "warning: a pickle is a program" in shown
    assert f"asked-model at 0.02 USDC per call, for wallets with 100 raw units of {world.chain.token}" in shown
    assert f"opened by: {world.node.url} (0x" in shown
    assert "cost: up to 0.0" in shown
    assert f"{json.loads(yes.out)['bytes']} sealed bytes for 1 node go to {world.store.url}" in shown
    assert yes.err.count("[y/N]") == 1


async def test_the_command_of_the_readme_needs_a_key_and_nothing_else(world: World, tmp_path: Path) -> None:
    """No id, no store, no vault: the file's name, Lighthouse, and the nodes' vault."""
    (tmp_path / "my model (2).joblib").write_bytes(world.trained.path.read_bytes())
    async with LighthouseDouble(tmp_path / "double") as lighthouse:
        settings = lighthouse.settings() | {"DIVAULT_STORE_URL": "", "VAULT_CONTRACT_ADDRESS": ""}
        done = await publish(
            world, tmp_path, str(tmp_path / "my model (2).joblib"), "--price", "0", "--yes", **settings
        )
        assert done.status == 0, done.err
        (tmp_path / "node").mkdir()
        async with world.other_node(tmp_path / "node", DIVAULT_GATEWAY_URLS=lighthouse.gateway.url) as elsewhere:
            key = await world.consumer()
            answer = await send(world, await signed(world, ModelId.parse("my-model-2"), key, elsewhere), elsewhere)

    assert json.loads(done.out)["cid"] == (await entry(world, "my-model-2"))["cid"]
    assert "go to Lighthouse (counts against your plan there)" in done.err
    assert (answer[0], answer[1]["code"]) == (400, "wrong_key"), "fetched and verified; sealed to the first node alone"


async def test_the_owner_opens_what_he_published_unless_he_leaves_himself_out(world: World, tmp_path: Path) -> None:
    done = await publish(world, tmp_path, "--id", "own-copy", "--unchecked", "--yes")
    assert done.status == 0, done.err
    identity = keyfiles.read_identity(tmp_path / "owner.key.age")
    chain_id = world.chain.chain.chain_id
    records = Publications(tmp_path / "state" / "published")
    record = records.find(chain_id, world.chain.vault, ModelId.parse("own-copy"))
    sealed, opened = await fetched(world, json.loads(done.out)["cid"]), io.BytesIO()
    open_stream(io.BytesIO(sealed), opened, [NodeIdentity(identity)])
    without = await publish(world, tmp_path, "--id", "no-copy", "--no-owner-copy", "--unchecked", "--yes")
    other = records.find(chain_id, world.chain.vault, ModelId.parse("no-copy"))

    assert opened.getvalue() == world.trained.path.read_bytes()
    assert record.owner == identity.recipient
    assert f"age identity {tmp_path / 'owner.key.age'} (made now)" in done.err
    assert without.status == 0, without.err
    assert (other.owner, [node.url for node in other.nodes]) == (None, [world.node.url])


async def test_the_same_command_once_more_changes_nothing(world: World, tmp_path: Path) -> None:
    first = await publish(world, tmp_path, "--id", "twice", "--unchecked", "--yes")
    nonce = await world.chain.chain.nonce(world.chain.publisher.address)
    second = await publish(world, tmp_path, "--id", "twice", "--unchecked", "--yes")

    assert (first.status, second.status) == (0, 0), second.err
    assert json.loads(first.out) | {"transaction": None} == json.loads(second.out)
    assert await world.chain.chain.nonce(world.chain.publisher.address) == nonce


async def test_changed_content_is_published_anew(world: World, tmp_path: Path) -> None:
    model = tmp_path / "model.joblib"
    model.write_bytes(world.trained.path.read_bytes())
    first = await publish(world, tmp_path, str(model), "--id", "changing", "--unchecked", "--yes")
    model.write_bytes(b"something else")
    second = await publish(world, tmp_path, str(model), "--id", "changing", "--unchecked", "--yes")

    assert (first.status, second.status) == (0, 0), second.err
    assert json.loads(first.out)["cid"] != json.loads(second.out)["cid"]
    assert json.loads(second.out)["cid"] == (await entry(world, "changing"))["cid"]


async def test_an_owner_is_told_who_no_longer_opens_it(world: World, tmp_path: Path) -> None:
    (tmp_path / "node").mkdir()
    async with world.other_node(tmp_path / "node") as other:
        both = ("--node", world.node.url, "--node", other.url)
        first = await publish(world, tmp_path, "--id", "dropping", "--unchecked", "--yes", *both)
        second = await publish(world, tmp_path, "--id", "dropping", "--unchecked", "--yes")

    assert (first.status, second.status) == (0, 0), second.err
    assert "for 2 nodes go to" in first.err
    assert f"no longer opened by: {other.url} (0x" in second.err
    assert json.loads(first.out)["cid"] != json.loads(second.out)["cid"]


async def test_what_cannot_be_tried_here_is_published_unchecked(world: World, tmp_path: Path) -> None:
    (tmp_path / "unknown.bin").write_bytes(b"something new")
    done = await publish(world, tmp_path, str(tmp_path / "unknown.bin"), "--unchecked", "--yes")

    assert done.status == 0, done.err
    assert "recognised" not in done.err
    assert await entry(world, "unknown") is not None


# --- what is refused, with nothing uploaded and nothing registered ----------------------------------------------------


async def refused(world: World, folder: Path, *arguments: str, **settings: str) -> str:
    """What the command says when it refuses; checks that nothing was published."""
    before, nonce = blocks(world), await world.chain.chain.nonce(world.chain.publisher.address)
    done = await publish(world, folder, *arguments, "--yes", **settings)
    assert done.status == 1, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    assert blocks(world) == before
    assert await world.chain.chain.nonce(world.chain.publisher.address) == nonce
    return done.err


async def test_words_that_mean_nothing(world: World, tmp_path: Path) -> None:
    assert "field=gate" in await refused(world, tmp_path, "--gate", "closed")
    assert "field=price" in await refused(world, tmp_path, "--price", "free")


@pytest.mark.parametrize(
    ("what", "words"),
    [("wallet", "is no contract"), ("vault", "answers balanceOf with nothing that counts: reverted")],
)
async def test_a_gate_that_would_let_nobody_in(what: str, words: str, world: World, tmp_path: Path) -> None:
    gate = {"wallet": world.chain.consumer.address, "vault": world.chain.vault}[what]
    told = await refused(world, tmp_path, "--id", "for-nobody", "--gate", f"{gate}:1")

    assert f"the gate would let nobody in: on chain {world.chain.chain.chain_id} {gate} {words}" in told
    assert "code: bad_request  field=gate" in told
    assert "recognised" not in told, "before any work"
    assert not (tmp_path / "state" / "published").exists(), "not even sealed"


async def test_a_gate_whose_owner_holds_nothing_himself(world: World, tmp_path: Path) -> None:
    """That a token tells a balance is what counts, not how much."""
    token = await world.chain.deploy_token()
    done = await publish(world, tmp_path, "--id", "for-others", "--gate", f"{token}:1", "--unchecked", "--yes")

    assert done.status == 0, done.err


async def test_a_chain_out_of_reach(world: World, tmp_path: Path) -> None:
    told = await refused(world, tmp_path, WEB3_PROVIDER_URL="http://127.0.0.1:9")

    assert "127.0.0.1:9 is unreachable" in told
    assert "set WEB3_PROVIDER_URL to an endpoint that answers" in told


async def test_unreachable_node(world: World, tmp_path: Path) -> None:
    told = await refused(world, tmp_path, "--node", "http://127.0.0.1:9")

    assert "127.0.0.1:9" in told
    assert "code: " in told


async def test_another_node_than_the_one_named(world: World, tmp_path: Path) -> None:
    assert "code: node_untrusted" in await refused(world, tmp_path, "--node", f"{world.node.url}#0x{'11' * 20}")


async def test_node_of_another_vault(world: World, tmp_path: Path) -> None:
    told = await refused(world, tmp_path, VAULT_CONTRACT_ADDRESS=str(world.chain.token))

    assert f"serves the vault {world.chain.vault}, not {world.chain.token}" in told


async def test_chain_of_another_node(world: World, tmp_path: Path) -> None:
    told = await refused(world, tmp_path, DIVAULT_CHAIN_ID="1")

    assert "code: chain_unavailable" in told


async def test_no_coins_for_gas(world: World, tmp_path: Path) -> None:
    key = tmp_path / "poor.key"
    address = address_of(keyfiles.new_signing_key(key))
    told = await refused(world, tmp_path, "--id", "poor", "--key", str(key))

    assert f"{address} has 0 ETH" in told
    assert "reason=insufficient_funds" in told


async def test_somebody_elses_id(world: World, tmp_path: Path) -> None:
    await world.publish("theirs")
    key = tmp_path / "stranger.key"
    address = address_of(keyfiles.new_signing_key(key))
    await world.chain.publisher.send(address, value=10**18)
    told = await refused(world, tmp_path, "--id", "theirs", "--key", str(key))

    assert f"belongs to {world.chain.publisher.address}" in told


async def test_other_terms_than_the_vault_has(world: World, tmp_path: Path) -> None:
    """They would silently not be what the owner typed."""
    assert (await publish(world, tmp_path, "--id", "terms", "--unchecked", "--yes")).status == 0
    dearer = await refused(world, tmp_path, "--id", "terms", "--price", "0.03")
    wider = await refused(world, tmp_path, "--id", "terms", "--gate", "open")

    assert "field=price" in dearer
    assert "field=gate" in wider
    assert f"at 0.02 USDC with the gate {world.chain.token}:100" in dearer


async def test_nowhere_to_store(world: World, tmp_path: Path) -> None:
    assert "set LIGHTHOUSE_API_KEY" in await refused(world, tmp_path, DIVAULT_STORE_URL="")


async def test_a_wrong_api_key_registers_nothing(world: World, tmp_path: Path) -> None:
    async with LighthouseDouble(tmp_path / "double") as lighthouse:
        settings = lighthouse.settings() | {"LIGHTHOUSE_API_KEY": "not-the-key"}
        told = await refused(world, tmp_path, "--id", "refused-model", "--to", "lighthouse", **settings)

    assert "code: storage_failed" in told
    assert await entry(world, "refused-model") is None


async def test_content_that_no_node_loads(world: World, tmp_path: Path) -> None:
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    told = await refused(world, tmp_path, str(tmp_path / "evil.pkl"))

    assert "needs posix.system" in told
    assert "code: unsupported_model" in told
    assert not (tmp_path / "state" / "published").exists(), "not even sealed"


async def test_a_model_that_takes_too_long_to_load(world: World, tmp_path: Path) -> None:
    told = await refused(world, tmp_path, DIVAULT_LOAD_TIMEOUT_SECONDS="0.01")

    assert "code: deadline_exceeded" in told
    assert not (tmp_path / "state" / "published").exists(), "not even sealed"


class Evil:
    """A pickle that runs a command where nobody stops it."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/divault-was-here",)


async def fetched(world: World, cid: str) -> bytes:
    """The content as the store has it."""
    import aiohttp

    async with aiohttp.ClientSession() as session, session.get(f"{world.store.url}/ipfs/{cid}") as response:
        return await response.read()
