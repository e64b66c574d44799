"""ModelAccessToken on a real EVM: only the owner mints, and a sale pays the owner and nobody else."""

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
from divault.keccak import keccak256
from divault.testing import TestChain
from divault.values import Address, Usdc

TOKEN = contracts.load("ModelAccessToken")
USDC = contracts.load("TestUSDC")
ONE = 10**18
NATIVE = Address.ZERO


@pytest.fixture(scope="module")
def devnet() -> Iterator[Devnet]:
    with start_devnet(anvil=False) as devnet:
        yield devnet


@pytest.fixture
async def world(devnet: Devnet) -> AsyncIterator[TestChain]:
    world = await TestChain.deploy(devnet)
    yield world
    await world.close()


async def call(world: TestChain, function: str, *args: Any, sender: Wallet | None = None) -> Any:
    return await (sender or world.publisher).invoke(TOKEN, world.token, function, *args)


async def buy(world: TestChain, buyer: Wallet, *args: Any, value: int = 0) -> Any:
    return await buyer.send(world.token, TOKEN.encode("buy", *args), value=value, gas=300_000)


async def test_owner_mints_and_nobody_else(world: TestChain) -> None:
    await world.mint_tokens(world.consumer.address, 5)
    assert await world.balance(world.token, world.consumer.address) == 5

    with pytest.raises(TransactionFailed, match="OwnableUnauthorizedAccount"):
        await call(world, "mint", world.stranger.address, 5, sender=world.stranger)
    assert await world.balance(world.token, world.stranger.address) == 0


async def test_holder_passes_tokens_on_and_no_more_than_he_has(world: TestChain) -> None:
    await world.mint_tokens(world.consumer.address, 5)
    await world.move_tokens(world.consumer, world.stranger.address, 5)
    assert await world.balance(world.token, world.stranger.address) == 5

    with pytest.raises(TransactionFailed):
        await world.move_tokens(world.consumer, world.stranger.address, 1)


async def test_owner_is_told_under_both_names_and_hands_over_in_two_steps(world: TestChain) -> None:
    await call(world, "transferOwnership", world.consumer.address)
    assert await world.publisher.read(TOKEN, world.token, "owner") == world.publisher.address
    with pytest.raises(TransactionFailed, match="OwnableUnauthorizedAccount"):
        await call(world, "acceptOwnership", sender=world.stranger)

    await call(world, "acceptOwnership", sender=world.consumer)
    assert await world.publisher.read(TOKEN, world.token, "modelOwner") == world.consumer.address
    with pytest.raises(TransactionFailed):
        await world.mint_tokens(world.publisher.address, 1)


async def test_nothing_is_sold_until_the_owner_says_so(world: TestChain) -> None:
    with pytest.raises(TransactionFailed, match="OwnableUnauthorizedAccount"):
        await call(world, "setSale", NATIVE, 1, sender=world.stranger)
    with pytest.raises(TransactionFailed):
        await buy(world, world.consumer, ONE, NATIVE, 10**18)
    with pytest.raises(TransactionFailed, match="NotForSale"):
        await call(world, "buy", ONE, NATIVE, 10**18, sender=world.consumer)


async def test_sale_in_usdc_pays_the_owner_in_the_same_transaction(world: TestChain) -> None:
    await call(world, "setSale", world.usdc, 2_000_000)  # 2 USDC for a whole token
    buyer = await world.wallet(usdc=Usdc.parse("10"))
    await buyer.invoke(USDC, world.usdc, "approve", world.token, 3_000_000)
    await call(world, "buy", ONE + ONE // 2, world.usdc, 3_000_000, sender=buyer)

    assert await world.balance(world.token, buyer.address) == ONE + ONE // 2
    assert await world.balance(world.usdc, world.publisher.address) == 3_000_000
    assert await world.balance(world.usdc, world.token) == 0
    assert await world.balance(world.usdc, buyer.address) == 7_000_000


async def test_sale_in_coins_pays_the_owner_in_the_same_transaction(world: TestChain) -> None:
    await call(world, "setSale", NATIVE, 10**15)
    buyer = await world.wallet()
    before = await world.chain.balance(world.publisher.address)
    await buy(world, buyer, 3 * ONE, NATIVE, 3 * 10**15, value=3 * 10**15)

    assert await world.balance(world.token, buyer.address) == 3 * ONE
    assert await world.chain.balance(world.publisher.address) == before + 3 * 10**15
    assert await world.chain.balance(world.token) == 0


async def test_token_whose_owner_is_gone_takes_no_money(world: TestChain) -> None:
    await call(world, "setSale", NATIVE, 10**15)
    await call(world, "renounceOwnership")

    with pytest.raises(TransactionFailed):
        await world.consumer.send(world.token, TOKEN.encode("buy", ONE, NATIVE, 10**15), value=10**15)
    assert await world.balance(world.token, world.consumer.address) == 0


async def test_payment_token_that_lies_buys_nothing(world: TestChain) -> None:
    """`transferFrom` that answers false moved nothing, so nothing is minted."""
    artifact = json.loads((Path(__file__).parent / "abi" / "FalseToken.json").read_text())
    lying = await world.publisher.deploy_contract(contracts.of_artifact("FalseToken", artifact))
    await call(world, "setSale", lying, 1)

    with pytest.raises(TransactionFailed, match="SafeERC20FailedOperation"):
        await call(world, "buy", ONE, lying, 1, sender=world.consumer)


@pytest.mark.parametrize(
    ("amount", "native", "limit", "value", "error"),
    [
        (ONE, True, 10**15, 10**15 - 1, "ValueMismatch"),
        (ONE, True, 10**15, 10**15 + 1, "ValueMismatch"),
        (ONE, True, 10**15 - 1, 10**15, "SaleTermsChanged"),
        (ONE, False, 10**18, 0, "SaleTermsChanged"),
        (0, True, 10**15, 0, "AmountZero"),
    ],
)
async def test_other_terms_than_the_sale_s_buy_nothing(
    world: TestChain, amount: int, native: bool, limit: int, value: int, error: str
) -> None:
    await call(world, "setSale", NATIVE, 10**15)
    data = TOKEN.encode("buy", amount, NATIVE if native else world.usdc, limit)
    with pytest.raises(TransactionFailed) as caught:
        await world.consumer.send(world.token, data, value=value)

    signature = next(e for e in TOKEN.abi if e.get("name") == error)
    types = ",".join(item["type"] for item in signature["inputs"])
    assert keccak256(f"{error}({types})".encode())[:4].hex() in str(caught.value)
    assert await world.balance(world.token, world.consumer.address) == 0


async def test_fractions_cost_at_least_one_atom(world: TestChain) -> None:
    await call(world, "setSale", world.usdc, 1)

    assert await world.publisher.read(TOKEN, world.token, "costOf", 1) == 1
    assert await world.publisher.read(TOKEN, world.token, "costOf", ONE + 1) == 2
