"""Transactions: sent once, mined and successful, or an error that names transaction and reason."""

from __future__ import annotations

import asyncio
import secrets

import pytest

from divault.chain import contracts, erc20
from divault.chain.wallet import Wallet
from divault.errors import ChainUnavailable, TransactionFailed
from divault.values import Address, ModelId, Secret, Usdc
from tests.chain_world import CID, World, both_devnets, world

__all__ = ["both_devnets", "world"]


async def test_many_transactions_at_once_get_a_nonce_each(world: World) -> None:
    user = await world.wallet()
    to = Address(secrets.token_bytes(20))

    receipts = await asyncio.gather(*(user.send(to, value=1) for _ in range(10)))

    assert all(receipt.succeeded for receipt in receipts)
    assert len({receipt.transaction_hash for receipt in receipts}) == 10
    assert await world.chain.balance(to) == 10
    assert await world.chain.nonce(user.address) == 10


async def test_a_revert_is_told_in_the_contracts_own_terms_before_anything_is_sent(world: World) -> None:
    stranger = await world.wallet()
    model = await world.register("m1")
    with pytest.raises(TransactionFailed) as caught:
        await stranger.invoke(contracts.load("ModelVault"), world.vault, "updatePrice", model, 5)

    assert caught.value.data["reason"] == f"NotModelOwner({model.key}, {stranger.address}, {world.owner.address})"
    assert await world.chain.nonce(stranger.address) == 0


async def test_a_transaction_that_fails_on_chain_names_itself_and_its_reason(world: World) -> None:
    poor = await world.wallet(tokens=1)
    with pytest.raises(TransactionFailed, match="failed") as caught:
        await poor.send(world.token, erc20.transfer(world.owner.address, 2), gas=100_000)  # no estimate, so it is sent

    assert caught.value.data["transaction"].startswith("0x")
    assert caught.value.data["reason"] == "error e450d38c"  # ERC20InsufficientBalance
    assert await world.chain.nonce(poor.address) == 1


async def test_a_failing_estimate_sends_nothing(world: World) -> None:
    poor = await world.wallet(tokens=1)
    with pytest.raises(TransactionFailed, match="would fail"):
        await poor.transfer(world.token, world.owner.address, 2)

    assert await world.chain.nonce(poor.address) == 0


async def test_a_wallet_without_coins_is_refused_by_the_node(world: World) -> None:
    empty = Wallet(Secret(secrets.token_bytes(32)), world.chain)
    with pytest.raises(TransactionFailed):
        await empty.send(world.owner.address, value=1, gas=21_000)


async def test_a_payment_ends_with_the_mark_of_node_and_payer(world: World) -> None:
    node, payer = Address(b"\x0d" * 20), await world.wallet()
    await world.owner.invoke(contracts.load("TestUSDC"), world.usdc, "mint", payer.address, 50_000)

    receipt = await payer.pay(world.usdc, world.owner.address, Usdc.parse("0.02"), node)

    transaction = await world.chain.transaction(receipt.transaction_hash)
    assert transaction is not None
    assert transaction.data.endswith(erc20.payment_mark(node, payer.address).raw)
    assert erc20.payment_mark(node, payer.address) != erc20.payment_mark(payer.address, node)
    (log,) = receipt.logs
    assert (log.address, int.from_bytes(log.data, "big")) == (world.usdc, 20_000)
    balance = await payer.read(contracts.load("TestUSDC"), world.usdc, "balanceOf", payer.address)
    assert balance == 30_000


@pytest.mark.parametrize("minted", [0, 19_999])
async def test_a_payment_that_the_wallet_cannot_make_says_what_is_missing(world: World, minted: int) -> None:
    node, payer = Address(b"\x0d" * 20), await world.wallet()
    await world.owner.invoke(contracts.load("TestUSDC"), world.usdc, "mint", payer.address, minted)
    with pytest.raises(TransactionFailed, match=f"send it {Usdc(20_000 - minted)} more") as caught:
        await payer.pay(world.usdc, world.owner.address, Usdc.parse("0.02"), node)

    assert caught.value.data == {"reason": "insufficient_funds"}
    assert await world.chain.nonce(payer.address) == 0


async def test_a_payment_that_fails_for_another_reason_says_that_one(world: World) -> None:
    payer = await world.wallet()
    await world.owner.invoke(contracts.load("TestUSDC"), world.usdc, "mint", payer.address, 50_000)
    with pytest.raises(TransactionFailed, match="would fail") as caught:
        await payer.pay(world.usdc, Address(bytes(20)), Usdc.parse("0.02"), payer.address)

    assert caught.value.data["reason"] != "insufficient_funds"


async def test_fees_do_not_grow_by_being_paid(world: World) -> None:
    user = await world.wallet()
    before = await world.chain.fees()
    for _ in range(20):
        await user.send(user.address, value=0)
    after = await world.chain.fees()

    assert after.gas_price <= before.gas_price


async def test_a_gas_price_over_the_limit_sends_nothing(world: World) -> None:
    key = secrets.token_bytes(32)
    careful = Wallet(Secret(key), world.chain, max_fee_wei=1)
    with pytest.raises(TransactionFailed, match="pays at most 1"):
        await careful.send(world.owner.address, gas=21_000)


async def test_a_transaction_that_is_not_mined_in_time_is_named(world: World) -> None:
    user = await world.wallet()
    hasty = Wallet(user._key, world.chain, timeout_s=0.05)
    await world.rpc("evm_setAutomine", False)
    try:
        with pytest.raises(TransactionFailed, match="not mined") as caught:
            await hasty.send(world.owner.address, value=1)
    finally:
        await world.rpc("evm_setAutomine", True)
        await world.rpc("evm_mine")

    assert caught.value.data["reason"] == "not_mined"
    assert await world.chain.nonce(user.address) == 1


async def test_a_registration_and_its_events_read_back(world: World) -> None:
    vault = contracts.load("ModelVault")
    model = ModelId.parse("m1")
    arguments = (model, CID, world.token, Usdc(20_000), 2, ["a", "b"], "1", 7)
    receipt = await world.owner.invoke(vault, world.vault, "registerModel", *arguments)
    (registered,) = vault.events(receipt.logs, "ModelRegistered", emitter=world.vault)
    (content,) = vault.events(receipt.logs, "ContentChanged")

    assert registered.args["modelId"] == model.key
    assert registered.args["owner"] == world.owner.address
    assert content.args == {"modelId": model.key, "cid": CID, "version": 1}
    assert await world.owner.read(vault, world.vault, "totalModels") == 1
    assert await world.owner.read(vault, world.vault, "gate", model) == (0, 0, 0)
    info = await world.owner.read(vault, world.vault, "getModelInfo", model)
    assert (info[0], info[1], info[2], info[8], info[10]) == (CID, world.token, 20_000, ("a", "b"), 7)
    assert vault.events(receipt.logs, "ModelRegistered", emitter=world.token) == []


async def test_another_contracts_answer_is_not_decoded(world: World) -> None:
    with pytest.raises(ChainUnavailable, match="something else than its ABI"):
        contracts.load("ModelVault").decode("getModelInfo", bytes(31))
    with pytest.raises(TransactionFailed):
        await world.owner.read(contracts.load("ModelVault"), world.token, "totalModels")


def test_wrong_names_and_arguments_are_the_callers_mistake() -> None:
    vault = contracts.load("ModelVault")
    for call in (
        lambda: contracts.load("../ModelVault"),
        lambda: contracts.load("Nothing"),
        lambda: vault.encode("nothing"),
        lambda: vault.encode("updatePrice", ModelId.parse("m1")),
        lambda: vault.encode("updatePrice", ModelId.parse("m1"), -1),
        lambda: vault.encode("updatePrice", "m1", 1),
        lambda: vault.events([], "Nothing"),
        lambda: erc20.transfer(Address.ZERO, 2**256),
        lambda: Wallet(Secret(bytes(32)), None),  # type: ignore[arg-type]  # fails before it looks at the chain
    ):
        with pytest.raises(ValueError):  # noqa: PT011 - programming errors have no codes
            call()


async def test_a_key_is_not_shown(world: World) -> None:
    assert repr(world.owner) == f"Wallet({world.owner.address})"
