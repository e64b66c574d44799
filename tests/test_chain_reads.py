"""Reads of a real chain: pinned to a block hash, one outcome per call, and records that match what happened."""

from __future__ import annotations

import pytest

from divault.chain import contracts, erc20
from divault.chain.answers import Reverted
from divault.chain.chain import ContractCall
from divault.devnet import MULTICALL
from divault.errors import ChainUnavailable
from divault.values import Address, BlockRef, Digest
from tests.chain_world import World, both_devnets, world

__all__ = ["both_devnets", "world"]

ZERO_TOPIC = Digest.ZERO


async def test_a_call_reads_the_state_of_its_block(world: World) -> None:
    user = await world.wallet(tokens=5)
    before = await world.chain.head()
    await world.mint(user.address, 3)
    after = await world.chain.head()
    ask = erc20.balance_of(user.address)

    assert erc20.parse_uint(await world.chain.call(world.token, ask, before)) == 5
    assert erc20.parse_uint(await world.chain.call(world.token, ask, after)) == 8


async def test_a_call_at_a_block_that_nobody_knows_is_an_outage(world: World) -> None:
    head = await world.chain.head()
    made_up = BlockRef(head.number, Digest(b"\x42" * 32), head.timestamp)
    with pytest.raises(ChainUnavailable, match="eth_call"):
        await world.chain.call(world.token, erc20.balance_of(world.owner.address), made_up)
    with pytest.raises(ChainUnavailable):
        await world.chain.calls([ContractCall(world.token, erc20.decimals())] * 2, made_up)


async def test_a_block_that_was_reorganised_away_can_not_be_read(world: World) -> None:
    snapshot = await world.rpc("evm_snapshot")
    await world.rpc("evm_mine")
    orphan = await world.chain.head()
    await world.rpc("evm_revert", snapshot)
    await world.rpc("evm_mine")
    await world.rpc("evm_mine")
    with pytest.raises(ChainUnavailable):
        await world.chain.call(world.token, erc20.decimals(), orphan)


@pytest.mark.parametrize("multicall", [None, MULTICALL])
async def test_several_reads_have_one_outcome_each_however_they_travel(world: World, multicall: Address | None) -> None:
    chain = world.new_chain(multicall=multicall)
    head = await chain.head()
    reads = [
        ContractCall(world.token, erc20.decimals()),
        ContractCall(world.token, bytes.fromhex("fefefefe")),  # no such function
        ContractCall(Address(b"\x55" * 20), erc20.decimals()),  # no code
    ]
    trips = chain.rpc.round_trips
    decimals, failed, nothing = await chain.calls(reads, head)

    assert chain.rpc.round_trips == trips + 1
    assert decimals == (18).to_bytes(32, "big")
    assert isinstance(failed, Reverted)
    assert nothing == b""
    assert await chain.calls([], head) == []
    await chain.close()


async def test_a_multicall_that_is_none_is_an_outage(world: World) -> None:
    reads = [ContractCall(world.token, erc20.decimals())] * 2
    for wrong in (world.token, Address(b"\x55" * 20)):
        chain = world.new_chain(multicall=wrong)
        with pytest.raises(ChainUnavailable, match="Multicall3"):
            await chain.calls(reads, await chain.head())
        await chain.close()


async def test_a_mined_transfer_is_seen_alike_in_transaction_receipt_block_and_logs(world: World) -> None:
    user = await world.wallet(tokens=100)
    sent = await user.transfer(world.token, world.owner.address, 40)
    tx = sent.transaction_hash
    transaction, receipt = await world.chain.transaction(tx), await world.chain.receipt(tx)
    block = await world.chain.block_by_hash(sent.block_hash)
    assert transaction is not None
    assert block is not None

    assert receipt == sent
    assert (transaction.sender, transaction.to, transaction.chain_id) == (
        user.address,
        world.token,
        world.chain.chain_id,
    )
    assert transaction.data == erc20.transfer(world.owner.address, 40)
    assert (transaction.block_hash, transaction.block_number) == (sent.block_hash, sent.block_number)
    assert block == await world.chain.block_by_number(sent.block_number)
    (log,) = sent.logs
    sender, recipient = (Digest(bytes(12) + who.raw) for who in (user.address, world.owner.address))
    assert log.topics == (erc20.TRANSFER_TOPIC, sender, recipient)
    assert (log.address, log.data) == (world.token, (40).to_bytes(32, "big"))
    assert await world.chain.logs([world.token], [erc20.TRANSFER_TOPIC, sender], block) == (log,)
    wide = (block.number - 1, block.number)
    assert await world.chain.logs([world.token], [erc20.TRANSFER_TOPIC, None, recipient], wide) == (log,)
    assert await world.chain.logs([world.usdc], [erc20.TRANSFER_TOPIC], block) == ()
    (event,) = contracts.load("ModelAccessToken").events(sent.logs, "Transfer", emitter=world.token)
    assert event.args == {"from": user.address, "to": world.owner.address, "value": 40}


async def test_what_is_not_there_is_none(world: World) -> None:
    nowhere = Digest(b"\x42" * 32)

    assert await world.chain.transaction(nowhere) is None
    assert await world.chain.receipt(nowhere) is None
    assert await world.chain.block_by_hash(nowhere) is None
    assert await world.chain.block_by_number(10**9) is None
    assert await world.chain.code(Address(b"\x55" * 20)) == b""


async def test_code_and_balance_are_read_at_a_block(world: World) -> None:
    head = await world.chain.head()

    assert len(await world.chain.code(world.vault, head)) > 1000
    assert await world.chain.balance(world.owner.address, head) > 10**18
