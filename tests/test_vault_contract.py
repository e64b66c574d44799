"""ModelVault on a real EVM: what its owner may do, and beside it that nobody else may."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from divault.chain import contracts
from divault.chain.wallet import Wallet
from divault.devnet import Devnet, start_devnet
from divault.errors import TransactionFailed
from divault.testing import TestChain
from divault.values import Address, Digest, ModelId, Usdc

CID = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"
OTHER_CID = "bafkreifjjcie6lypi6ny7amxnfftagclbuxndqonfipmb64f2km2devei4"
VAULT = contracts.load("ModelVault")
HOSTILE = Path(__file__).parent / "abi"


@pytest.fixture(scope="module")
def devnet() -> Iterator[Devnet]:
    with start_devnet(anvil=False) as devnet:
        yield devnet


@pytest.fixture
async def world(devnet: Devnet) -> AsyncIterator[TestChain]:
    world = await TestChain.deploy(devnet)
    yield world
    await world.close()


def events(receipt: Any, name: str) -> list[dict[str, Any]]:
    return [dict(event.args) for event in VAULT.events(receipt.logs, name)]


async def refused(world: TestChain, function: str, *args: Any, sender: Wallet | None = None) -> str:
    """The contract's own words when it refuses."""
    with pytest.raises(TransactionFailed) as caught:
        await world.call_vault(function, *args, sender=sender)
    return str(caught.value.data["reason"])


async def hostile(world: TestChain, name: str, *args: Any) -> Address:
    """An instance of one of the test contracts."""
    artifact = json.loads((HOSTILE / f"{name}.json").read_text())
    return await world.publisher.deploy_contract(contracts.of_artifact(name, artifact), *args)


# --- registration ----------------------------------------------------------------------------------------------------


async def test_registered_model_reads_back_as_the_published_tuple(world: TestChain) -> None:
    model = ModelId.parse("m1")
    receipt = await world.call_vault(
        "registerModel", model, CID, world.token, 20_000, 3, ["audio", "de"], "1.2.3", 10**18
    )
    info = await world.read_vault("getModelInfo", model)
    when = (await world.chain.head()).timestamp

    assert info == (
        *(CID, world.token, 20_000, world.publisher.address, True, 0, when, when),
        *(("audio", "de"), "1.2.3", 10**18),
    )
    assert await world.read_vault("models", model) == (*info[:8], *info[9:])  # the getter omits the tags
    assert await world.read_vault("paymentToken", model) == world.usdc
    assert await world.read_vault("gate", model) == (0, 0, 0)
    assert await world.read_vault("category", model) == 3
    assert await world.read_vault("manifestHash", model) == Digest.ZERO
    assert events(receipt, "ModelRegistered") == [
        {
            "modelId": model.key,
            "owner": world.publisher.address,
            "tokenContract": world.token,
            "cid": CID,
            "pricePerInference": 20_000,
        }
    ]
    assert events(receipt, "ContentChanged") == [{"modelId": model.key, "cid": CID, "version": 1}]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cid": ""}, "CidEmpty"),
        ({"token": Address.ZERO}, "GateTokenZero"),
        ({"minimum": 0}, "GateMinimumZero"),
        ({"model": Digest.ZERO}, "ModelIdZero"),
        ({"category": 7}, "CategoryUnknown(7, 6)"),
    ],
)
async def test_registration_refuses_what_can_t_be_served(world: TestChain, change: dict, reason: str) -> None:
    given = {"model": ModelId.parse("m1"), "cid": CID, "token": world.token, "category": 6, "minimum": 1} | change
    arguments = (given["model"], given["cid"], given["token"], 1, given["category"], [], "1", given["minimum"])

    assert (await refused(world, "registerModel", *arguments)).startswith(reason)
    assert await world.read_vault("totalModels") == 0


async def test_an_id_is_registered_once(world: TestChain) -> None:
    model = await world.register("m1", CID)

    assert (await refused(world, "registerModel", model, CID, world.token, 1, 6, [], "1", 1)).startswith("ModelExists")
    taken = await refused(world, "registerOpenModel", model, CID, 1, 6, [], "1", sender=world.stranger)
    assert taken == f"ModelExists({model.key}, {world.publisher.address})"


async def test_vault_without_a_payment_token_is_not_deployed(world: TestChain) -> None:
    with pytest.raises(TransactionFailed):
        await world.publisher.deploy("ModelVault", Address.ZERO)


async def test_ids_with_an_owner_in_them_do_not_collide(world: TestChain) -> None:
    owner = world.publisher.address
    one = await world.read_vault("generateModelId", owner, "ab", "c")

    assert one != await world.read_vault("generateModelId", owner, "a", "bc")
    assert one != await world.read_vault("generateModelId", world.stranger.address, "ab", "c")


# --- access ----------------------------------------------------------------------------------------------------------


async def has_access(world: TestChain, model: ModelId, user: Address) -> bool:
    return bool(await world.read_vault("hasAccess", model, user))


async def test_access_needs_the_minimum_and_an_active_model(world: TestChain) -> None:
    model, user = await world.register("m1", CID, minimum=100), world.consumer.address
    assert not await has_access(world, model, user)

    await world.mint_tokens(user, 99)
    assert not await has_access(world, model, user)
    await world.mint_tokens(user, 1)
    assert await has_access(world, model, user)
    await world.call_vault("deactivateModel", model)
    assert not await has_access(world, model, user)
    await world.call_vault("reactivateModel", model)
    assert await has_access(world, model, user)
    assert not await has_access(world, ModelId.parse("unknown"), user)


async def test_open_model_lets_everybody_in_until_it_is_inactive(world: TestChain) -> None:
    model = await world.register_open("m1", CID, price=Usdc(7))
    info = await world.read_vault("getModelInfo", model)

    assert (info[1], info[2], info[10]) == (Address.ZERO, 7, 0)
    assert await world.read_vault("gate", model) == (1, 0, 0)
    assert await has_access(world, model, world.stranger.address)
    await world.call_vault("deactivateModel", model)
    assert not await has_access(world, model, world.stranger.address)


@pytest.mark.parametrize(
    ("name", "args"),
    [("OddBalanceToken", (31,)), ("OddBalanceToken", (64,)), ("OddBalanceToken", (0,)), ("RevertingBalanceToken", ())],
)
async def test_token_without_a_proper_balance_denies(world: TestChain, name: str, args: tuple) -> None:
    model = await world.register("m1", CID, token=await hostile(world, name, *args))

    assert not await has_access(world, model, world.publisher.address)


async def test_exactly_32_bytes_are_a_balance_and_an_account_without_code_is_none(world: TestChain) -> None:
    good = await world.register("m1", CID, token=await hostile(world, "OddBalanceToken", 32))
    no_code = await world.register("m2", CID, token=world.stranger.address)

    assert await has_access(world, good, world.stranger.address)
    assert not await has_access(world, no_code, world.stranger.address)


async def test_gate_types_of_later_nodes_deny_here(world: TestChain) -> None:
    model = await world.register("m1", CID)
    await world.mint_tokens(world.consumer.address, 10)
    await world.call_vault("setGate", model, 2, world.token, 1, 77, 5)

    assert await world.read_vault("gate", model) == (2, 77, 5)
    assert not await has_access(world, model, world.consumer.address)


# --- the owner changes his model -------------------------------------------------------------------------------------


async def test_price_changes_and_says_what_it_was(world: TestChain) -> None:
    model = await world.register("m1", CID, price=Usdc(5))
    receipt = await world.set_price(model, Usdc(9))

    assert events(receipt, "PriceUpdated") == [{"modelId": model.key, "oldPrice": 5, "newPrice": 9}]
    assert (await world.read_vault("getModelInfo", model))[2] == 9
    updated = events(receipt, "ModelUpdated")[0]
    assert (updated["pricePerInference"], updated["active"]) == (9, True)


async def test_every_content_id_is_in_the_history(world: TestChain) -> None:
    model = await world.register("m1", CID)
    second = await world.set_cid(model, OTHER_CID, tags=["x"], version="2")
    same = await world.set_cid(model, OTHER_CID, version="3")
    third = await world.set_cid(model, CID)

    assert events(second, "ContentChanged") == [{"modelId": model.key, "cid": OTHER_CID, "version": 2}]
    assert events(same, "ContentChanged") == []
    assert events(third, "ContentChanged") == [{"modelId": model.key, "cid": CID, "version": 3}]
    assert await world.read_vault("contentVersion", model) == 3
    topic = VAULT.events(second.logs, "ContentChanged")[0].log.topics[0]
    history = await world.chain.logs([world.vault], [topic, model.key], (0, (await world.chain.head()).number))
    assert [event.args["cid"] for event in VAULT.events(history, "ContentChanged")] == [CID, OTHER_CID, CID]


async def test_content_can_t_be_emptied(world: TestChain) -> None:
    model = await world.register("m1", CID)

    assert (await refused(world, "updateModelMetadata", model, "", [], "2")).startswith("CidEmpty")
    assert (await world.read_vault("getModelInfo", model))[0] == CID


async def test_payment_token_and_price_change_together(world: TestChain) -> None:
    model, other = await world.register("m1", CID, price=Usdc(5)), await world.deploy_token()
    receipt = await world.call_vault("setPaymentToken", model, other, 10**18)

    assert await world.read_vault("paymentToken", model) == other
    assert (await world.read_vault("getModelInfo", model))[2] == 10**18
    assert events(receipt, "PaymentTokenUpdated")[0]["oldToken"] == world.usdc
    assert events(receipt, "PriceUpdated")[0]["newPrice"] == 10**18
    assert (await refused(world, "setPaymentToken", model, Address.ZERO, 1)) == "PaymentTokenZero()"


async def test_gate_changes_as_a_whole(world: TestChain) -> None:
    model, other = await world.register("m1", CID, minimum=5), await world.deploy_token()
    receipt = await world.call_vault("setGate", model, 0, other, 7, 0, 12)
    info = await world.read_vault("getModelInfo", model)

    assert (info[1], info[10], await world.read_vault("gate", model)) == (other, 7, (0, 0, 12))
    assert events(receipt, "GateUpdated")[0]["holdBlocks"] == 12
    await world.call_vault("setGate", model, 1, Address.ZERO, 0, 0, 0)
    assert await has_access(world, model, world.stranger.address)


@pytest.mark.parametrize(
    ("kind", "rest", "with_token", "reason"),
    [
        (0, (1, 0, 0), False, "GateTokenZero"),
        (0, (0, 0, 0), True, "GateMinimumZero"),
        (9, (0, 0, 0), True, "GateMinimumZero"),
        (1, (0, 0, 0), True, "OpenGateTakesNothing"),
        (1, (1, 0, 0), False, "OpenGateTakesNothing"),
        (1, (0, 1, 0), False, "OpenGateTakesNothing"),
        (1, (0, 0, 1), False, "OpenGateTakesNothing"),
    ],
)
async def test_half_a_gate_is_refused(
    world: TestChain, kind: int, rest: tuple[int, int, int], with_token: bool, reason: str
) -> None:
    model = await world.register("m1", CID)
    token = world.token if with_token else Address.ZERO

    assert (await refused(world, "setGate", model, kind, token, *rest)).startswith(reason)
    assert await world.read_vault("gate", model) == (0, 0, 0)


async def test_manifest_hash_is_set_and_taken_back(world: TestChain) -> None:
    model, digest = await world.register("m1", CID), Digest.keccak(b"manifest")
    await world.call_vault("setManifestHash", model, digest)
    assert await world.read_vault("manifestHash", model) == digest

    await world.call_vault("setManifestHash", model, Digest.ZERO)
    assert await world.read_vault("manifestHash", model) == Digest.ZERO


async def test_activity_switches_once_each_way(world: TestChain) -> None:
    model = await world.register("m1", CID)
    assert (await refused(world, "reactivateModel", model)) == f"AlreadyInState({model.key}, True)"

    receipt = await world.call_vault("deactivateModel", model)
    assert events(receipt, "ModelDeactivated") == [{"modelId": model.key, "owner": world.publisher.address}]
    assert (await refused(world, "deactivateModel", model)) == f"AlreadyInState({model.key}, False)"
    assert (await world.read_vault("totalActiveModels"), await world.read_vault("totalModels")) == (0, 1)
    assert events(await world.call_vault("reactivateModel", model), "ModelReactivated")


OWNER_ONLY = {
    "updatePrice": (1,),
    "updateModelMetadata": (CID, [], "2"),
    "setPaymentToken": (Address(b"\x01" * 20), 1),
    "setGate": (0, Address(b"\x01" * 20), 1, 0, 0),
    "setManifestHash": (Digest.ZERO,),
    "deactivateModel": (),
    "reactivateModel": (),
    "transferModel": (Address(b"\x01" * 20),),
}


@pytest.mark.parametrize("function", sorted(OWNER_ONLY))
async def test_nobody_but_the_owner_changes_a_model(world: TestChain, function: str) -> None:
    """Not a stranger, not the deployer of the vault: there is no administrator."""
    owner = await world.wallet(tokens=1000)
    model = ModelId.parse("m1")
    await world.call_vault("registerModel", model, CID, world.token, 1, 6, [], "1", 1, sender=owner)
    before = await world.read_vault("getModelInfo", model)

    for outsider in (world.publisher, world.stranger):  # the publisher deployed the vault
        reason = await refused(world, function, model, *OWNER_ONLY[function], sender=outsider)
        assert reason == f"NotModelOwner({model.key}, {outsider.address}, {owner.address})"
    assert await world.read_vault("getModelInfo", model) == before
    unknown = ModelId.parse("unknown")
    assert await refused(world, function, unknown, *OWNER_ONLY[function]) == f"ModelUnknown({unknown.key})"


async def test_every_function_that_writes_is_covered_above(world: TestChain) -> None:
    """A new function that changes state must come with its negative twin."""
    writing = {e["name"] for e in VAULT.abi if e["type"] == "function" and e["stateMutability"] not in ("view", "pure")}

    assert writing == {*OWNER_ONLY, "registerModel", "registerOpenModel", "acceptModel"}
    assert not [e for e in VAULT.abi if e.get("stateMutability") == "payable" or e["type"] in ("receive", "fallback")]


# --- two-step transfer -----------------------------------------------------------------------------------------------


async def test_model_changes_hands_only_when_the_new_owner_accepts(world: TestChain) -> None:
    model, heir = await world.register("m1", CID), world.consumer
    await world.call_vault("transferModel", model, heir.address)
    assert (await world.read_vault("getModelInfo", model))[3] == world.publisher.address
    reason = await refused(world, "acceptModel", model, sender=world.stranger)
    assert reason == f"NotPendingOwner({model.key}, {world.stranger.address}, {heir.address})"

    receipt = await world.call_vault("acceptModel", model, sender=heir)

    assert events(receipt, "ModelTransferred")[0]["newOwner"] == heir.address
    assert (await world.read_vault("getModelInfo", model))[3] == heir.address
    assert await world.read_vault("getModelsByOwner", world.publisher.address) == ()
    assert await world.read_vault("getModelsByOwner", heir.address) == (model.key,)
    assert (await refused(world, "updatePrice", model, 5)).startswith("NotModelOwner")
    await world.call_vault("updatePrice", model, 5, sender=heir)
    assert (await refused(world, "acceptModel", model, sender=heir)).startswith("NotPendingOwner")


async def test_offer_can_be_withdrawn(world: TestChain) -> None:
    model = await world.register("m1", CID)
    await world.call_vault("transferModel", model, world.consumer.address)
    await world.call_vault("transferModel", model, Address.ZERO)

    assert (await refused(world, "acceptModel", model, sender=world.consumer)).startswith("NotPendingOwner")


# --- lists -----------------------------------------------------------------------------------------------------------


async def test_lists_are_empty_before_the_first_model_and_past_the_end(world: TestChain) -> None:
    assert await world.read_vault("getAllModels", 0, 10) == ()
    assert await world.read_vault("getModelsByOwner", world.publisher.address) == ()
    assert await world.read_vault("getModelsByCategory", 200) == ()

    models = [(await world.register(f"m{i}", CID)).key for i in range(3)]

    assert await world.read_vault("getAllModels", 0, 2) == tuple(models[:2])
    assert await world.read_vault("getAllModels", 1, 2**256 - 1) == tuple(models[1:])
    assert await world.read_vault("getAllModels", 3, 5) == ()
    assert await world.read_vault("getAllModels", 2**256 - 1, 2**256 - 1) == ()
    assert await world.read_vault("getModelsByCategory", 6) == tuple(models)
    assert (await world.read_vault("totalModels"), await world.read_vault("totalInferences")) == (3, 0)


async def test_vault_takes_no_money(world: TestChain) -> None:
    with pytest.raises(TransactionFailed):
        await world.publisher.send(world.vault, value=1)
    assert await world.chain.balance(world.vault) == 0
