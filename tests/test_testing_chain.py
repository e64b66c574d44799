"""`divault.testing.TestChain`, on both chains: what users' own tests build on."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from divault.chain.gates import Gates
from divault.chain.vault import VaultReader
from divault.errors import AccessDenied, ChainUnavailable, ModelUnknown, TransactionFailed
from divault.testing import TestChain
from divault.values import Digest, GateType, Nonce, Principal, PrincipalKind, Usdc

CID = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"
OTHER_CID = "bafkreifjjcie6lypi6ny7amxnfftagclbuxndqonfipmb64f2km2devei4"


@pytest.fixture(params=["embedded", "anvil"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[TestChain]:
    async with TestChain.start(anvil=request.param == "anvil") as world:
        assert world.devnet.name == request.param
        yield world


async def test_model_of_the_helpers_is_what_the_node_reads(world: TestChain) -> None:
    model = await world.register("m1", CID, price=Usdc.parse("0.02"), minimum=100)
    opened = await world.register_open("m2", CID)
    reader = VaultReader(world.chain, world.vault)
    head = await world.chain.head()
    info, free = await reader.model(model, head), await reader.model(opened, head)

    assert (info.cid, info.token, info.price.atomic, info.min_balance) == (CID, world.token, 20_000, 100)
    assert (info.owner, info.payment_token, info.gate) == (world.publisher.address, world.usdc, GateType.TOKEN)
    assert (free.gate, free.price.atomic, free.min_balance) == (GateType.OPEN, 0, 0)

    await world.set_price(model, Usdc(7))
    await world.set_cid(model, OTHER_CID)
    changed = await reader.model(model, await world.chain.head())
    assert (changed.price.atomic, changed.cid) == (7, OTHER_CID)
    assert await reader.model(model, head) == info  # the old block still says what it said


async def test_wallets_come_with_what_was_asked_for_and_no_more(world: TestChain) -> None:
    wallet = await world.wallet(tokens=5, usdc=Usdc.parse("1.5"))

    assert await world.balance(world.token, wallet.address) == 5
    assert await world.balance(world.usdc, wallet.address) == 1_500_000
    await world.move_tokens(wallet, world.stranger.address, 5)
    assert await world.balance(world.token, world.stranger.address) == 5
    with pytest.raises(TransactionFailed):
        await world.move_tokens(wallet, world.stranger.address, 1)


async def test_gate_follows_transfers_and_is_undone_by_a_reorg(world: TestChain) -> None:
    model = await world.register("m1", CID, minimum=100)
    gates = Gates(world.chain, VaultReader(world.chain, world.vault, world.usdc), [world.usdc])
    user = world.consumer.address
    principal = Principal(user, PrincipalKind.BODY, Digest.ZERO, Nonce(bytes(32)), 0, 0, Usdc(0))
    with pytest.raises(AccessDenied):
        await gates.check(principal, model)

    before = await world.snapshot()
    await world.mint_tokens(user, 100)
    granted = await gates.check(principal, model)
    assert granted.have == 100
    await world.revert(before)
    await world.mine(2)

    with pytest.raises(AccessDenied):
        await gates.check(principal, model)
    forgetful = Gates(world.chain, VaultReader(world.chain, world.vault, world.usdc), [world.usdc])
    with pytest.raises(ChainUnavailable):  # the block that granted is no part of the chain any more
        await forgetful.check(principal, model, granted.block)
    await world.mint_tokens(user, 100)  # a wallet made anew knows the right nonce
    assert (await gates.check(principal, model)).have == 100


async def test_snapshot_serves_once(world: TestChain) -> None:
    snapshot = await world.snapshot()
    await world.revert(snapshot)

    with pytest.raises(ChainUnavailable):
        await world.revert(snapshot)


async def test_time_advances_and_unknown_models_stay_unknown(world: TestChain) -> None:
    before = (await world.chain.head()).timestamp
    await world.advance_time(3600)
    head = await world.chain.head()

    assert head.timestamp >= before + 3600
    with pytest.raises(ModelUnknown):
        await VaultReader(world.chain, world.vault).model((await world.register("m1", CID)).parse("m2"), head)
