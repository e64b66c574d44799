"""The hostile ERC-20s do what they are for, on a real EVM, so that gates and payment tests may rely on them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from divault.chain import contracts, erc20
from divault.chain.contracts import Contract
from divault.chain.records import Log
from divault.devnet import Devnet, start_devnet
from divault.errors import TransactionFailed
from divault.testing import TestChain
from divault.values import Address

TO = Address(b"\x42" * 20)


@pytest.fixture(scope="module")
def devnet() -> Iterator[Devnet]:
    with start_devnet(anvil=False) as devnet:
        yield devnet


@pytest.fixture
async def world(devnet: Devnet) -> AsyncIterator[TestChain]:
    world = await TestChain.deploy(devnet)
    yield world
    await world.close()


def contract(name: str) -> Contract:
    return contracts.of_artifact(name, json.loads((Path(__file__).parent / "abi" / f"{name}.json").read_text()))


async def minted(world: TestChain, name: str, *args: Any) -> Address:
    token = await world.publisher.deploy_contract(contract(name), *args)
    await world.publisher.invoke(contract(name), token, "mint", world.publisher.address, 1000)
    return token


async def moved(world: TestChain, token: Address) -> int:
    return await world.balance(token, TO)


async def test_no_return_value_and_still_moves(world: TestChain) -> None:
    token = await minted(world, "NoReturnToken")
    receipt = await world.publisher.transfer(token, TO, 100)

    assert await moved(world, token) == 100
    assert receipt.logs[0].topics[0] == erc20.TRANSFER_TOPIC
    assert await world.chain.call(token, erc20.transfer(TO, 0), await world.chain.head()) == b""


async def test_false_instead_of_a_revert_moves_nothing(world: TestChain) -> None:
    token = await minted(world, "FalseToken")
    receipt = await world.publisher.transfer(token, TO, 100)

    assert (receipt.succeeded, receipt.logs, await moved(world, token)) == (True, (), 0)


async def test_revert_without_a_reason(world: TestChain) -> None:
    token = await minted(world, "RevertingToken")
    with pytest.raises(TransactionFailed):
        await world.publisher.transfer(token, TO, 100)

    assert await moved(world, token) == 0


async def test_fee_on_transfer_delivers_less_than_was_sent(world: TestChain) -> None:
    token = await minted(world, "FeeToken")
    receipt = await world.publisher.transfer(token, TO, 100)

    assert await moved(world, token) == 99
    assert [int.from_bytes(log.data, "big") for log in receipt.logs] == [99, 1]


@pytest.mark.parametrize("size", [0, 31, 32, 64])
async def test_balance_of_any_length(world: TestChain, size: int) -> None:
    token = await minted(world, "OddBalanceToken", size)

    assert await world.chain.call(token, erc20.balance_of(TO), await world.chain.head()) == b"\xff" * size


async def test_balance_that_reverts(world: TestChain) -> None:
    token = await minted(world, "RevertingBalanceToken")

    with pytest.raises(TransactionFailed, match="NoBalanceForYou"):
        await world.publisher.read(contract("RevertingBalanceToken"), token, "balanceOf", TO)


async def test_transfer_event_without_indexed_fields(world: TestChain) -> None:
    token = await minted(world, "UnindexedToken")
    log: Log = (await world.publisher.transfer(token, TO, 100)).logs[0]

    assert (log.topics, len(log.data)) == ((erc20.TRANSFER_TOPIC,), 96)


async def test_event_without_a_transfer(world: TestChain) -> None:
    token = await minted(world, "LyingToken")
    receipt = await world.publisher.transfer(token, TO, 100)

    assert len(receipt.logs[0].topics) == 3
    assert await moved(world, token) == 0
