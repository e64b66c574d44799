"""Who gets in, on a real chain: the balance at a named block decides, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from divault.chain import contracts
from divault.chain.chain import Chain
from divault.chain.contracts import Contract
from divault.devnet import start_devnet
from divault.errors import AccessDenied, ChainStale, ChainUnavailable, ModelUnknown, PaymentRejected
from divault.values import Address, BlockRef, GateType, ModelId
from tests.chain_world import CID, World, both_devnets, build, principal, world

__all__ = ["both_devnets", "world"]


def hostile(name: str) -> Contract:
    """A token that breaks the rules, compiled for tests."""
    artifact = json.loads((Path(__file__).parent / "abi" / f"{name}.json").read_text())
    return contracts.of_artifact(name, artifact)


async def test_the_exact_minimum_opens_the_gate(world: World) -> None:
    model = await world.register("m1", minimum=100)
    user = await world.wallet(tokens=100)

    grant = await world.gates.check(principal(user.address), model)

    assert (grant.have, grant.model.min_balance, grant.principal.user) == (100, 100, user.address)
    assert grant.model.cid == CID
    assert grant.block == await world.chain.head(fresh=True)


async def test_one_raw_unit_less_is_denied_with_what_would_open_it(world: World) -> None:
    model = await world.register("m1", minimum=100)
    user = await world.wallet(tokens=99)
    with pytest.raises(AccessDenied) as caught:
        await world.gates.check(principal(user.address), model)

    head = await world.chain.head(fresh=True)
    assert caught.value.data == {
        "have": "99",
        "need": "100",
        "token": str(world.token),
        "block": head.number,
        "block_hash": str(head.hash),
    }
    assert caught.value.detail == (
        f"wallet {user.address} holds 99 of {world.token}; 100 needed at block {head.number}: "
        "get 1 more, then call again"
    )


async def test_amounts_beyond_64_bits_are_exact(world: World) -> None:
    model = await world.register("m1", minimum=10**30)
    rich, poor = await world.wallet(tokens=10**30), await world.wallet(tokens=10**30 - 1)

    assert (await world.gates.check(principal(rich.address), model)).have == 10**30
    with pytest.raises(AccessDenied, match="get 1 more"):
        await world.gates.check(principal(poor.address), model)


async def test_a_transfer_away_closes_the_gate_at_the_next_head(world: World) -> None:
    model = await world.register("m1")
    user = await world.wallet(tokens=100)
    granted = await world.gates.check(principal(user.address), model)
    await user.transfer(world.token, world.owner.address, 1)
    with pytest.raises(AccessDenied) as caught:
        await world.gates.check(principal(user.address), model)

    assert caught.value.data["have"] == "99"
    at_its_own_block = await world.gates.check(principal(user.address), model, granted.block)
    assert at_its_own_block.have == 100


async def test_one_token_passed_around_opens_the_gate_for_its_holder_alone(world: World) -> None:
    model = await world.register("m1")
    first, second = await world.wallet(tokens=100), await world.wallet()
    with pytest.raises(AccessDenied):
        await world.gates.check(principal(second.address), model)
    await first.transfer(world.token, second.address, 100)

    assert (await world.gates.check(principal(second.address), model)).have == 100
    with pytest.raises(AccessDenied):
        await world.gates.check(principal(first.address), model)


async def test_tokens_that_came_in_after_the_cached_head_count(world: World) -> None:
    model = await world.register("m1")
    user = await world.wallet()
    chain = world.new_chain(head_ttl_s=600)
    gates = world.new_gates(chain)
    with pytest.raises(AccessDenied):
        await gates.check(principal(user.address), model)
    await world.mint(user.address, 100)

    assert (await gates.check(principal(user.address), model)).have == 100
    await chain.close()


async def test_a_check_at_a_head_seen_before_costs_no_call(world: World) -> None:
    model = await world.register("m1")
    user = await world.wallet(tokens=100)
    chain = world.new_chain(head_ttl_s=600)
    gates = world.new_gates(chain)
    first = await gates.check(principal(user.address), model)
    calls = chain.rpc.calls
    for _ in range(100):
        assert await gates.check(principal(user.address), model) == first

    assert chain.rpc.calls == calls
    assert calls <= 8  # two proofs of the chain, the head, three of the vault, the balance; one to spare
    await chain.close()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def ahead(chain: Chain, clock: Clock, seconds: float) -> None:
    """Let time pass, ask for the head, and wait until what that set off is done."""
    clock.now += seconds
    await chain.head()
    assert chain._ahead is not None
    await asyncio.wait_for(asyncio.shield(chain._ahead), 30)


async def test_who_called_lately_waits_for_nothing_at_the_next_block(world: World) -> None:
    model, clock = await world.register("m1"), Clock()
    cheap = await world.register("m2", minimum=1)
    staying, leaving = await world.wallet(tokens=100), await world.wallet(tokens=100)
    chain = world.new_chain(head_ttl_s=100, monotonic=clock)
    gates = world.new_gates(chain)
    before = await gates.check(principal(staying.address), model)
    await gates.check(principal(leaving.address), model)
    await gates.check(principal(leaving.address), cheap)
    await leaving.transfer(world.token, world.owner.address, 1)
    await ahead(chain, clock, 80)
    calls = chain.rpc.calls
    after = await gates.check(principal(staying.address), model)

    assert after.block.number > before.block.number
    assert (await gates.check(principal(leaving.address), cheap)).have == 99
    assert chain.rpc.calls == calls, "all of it was read ahead"
    with pytest.raises(AccessDenied) as caught:
        await gates.check(principal(leaving.address), model)
    assert caught.value.data["have"] == "99", "at the next block's own balance"
    calls = chain.rpc.calls
    await ahead(chain, clock, 80)
    assert chain.rpc.calls == calls + 1, "at the same block all that was read still counts"
    await world.mint(staying.address, 1)
    await ahead(chain, clock, 80)  # both asked at the last head
    await world.mint(staying.address, 1)
    calls = chain.rpc.calls
    await ahead(chain, clock, 80)
    assert chain.rpc.calls == calls + 1, "for those who no longer ask nothing but the head is read"
    await chain.close()


async def test_who_is_not_let_in_has_nothing_read_ahead_and_pushes_nobody_out(world: World) -> None:
    model, clock = await world.register("m1"), Clock()
    user, poor = await world.wallet(tokens=100), await world.wallet(tokens=99)
    chain = world.new_chain(head_ttl_s=100, monotonic=clock)
    gates = world.new_gates(chain)
    await gates.check(principal(user.address), model)
    for number in range(70):
        with contextlib.suppress(ModelUnknown):
            await gates.info(ModelId.parse(f"unknown-{number}"))
    with pytest.raises(AccessDenied):
        await gates.check(principal(poor.address), model)
    await world.mint(poor.address, 1)
    calls = chain.rpc.calls
    await ahead(chain, clock, 80)
    assert chain.rpc.calls - calls <= 1 + 3 + 1 + 2, "head, model, its caller's balance; two proofs of a connection"
    calls = chain.rpc.calls

    assert (await gates.check(principal(user.address), model)).have == 100
    assert chain.rpc.calls == calls
    await chain.close()


async def test_a_token_that_takes_much_gas_is_asked_again_with_more(world: World) -> None:
    """A read ahead has little; what it can't read so it does not take for an answer."""
    token = await world.owner.deploy("ModelAccessToken", "Hungry", "H", world.owner.address)
    model, clock = await world.register("m1", token=token), Clock()
    user = await world.wallet()
    await world.mint(user.address, 100, token)
    chain = world.new_chain(head_ttl_s=100, monotonic=clock)
    gates = world.new_gates(chain)
    assert (await gates.check(principal(user.address), model)).have == 100
    # Counts down from 10,000, which takes 260,000 gas, and returns 101.
    await world.rpc("anvil_setCode", str(token), "0x6127105b6001900380600357606560005260206000f3")
    await world.rpc("evm_mine")
    await ahead(chain, clock, 80)

    assert (await gates.check(principal(user.address), model)).have == 101
    await chain.close()


async def test_a_fresh_head_does_not_wait_for_what_is_read_ahead(world: World) -> None:
    clock, never = Clock(), asyncio.Event()
    chain = world.new_chain(head_ttl_s=1000, monotonic=clock)
    first = await chain.head()

    async def slow(_: BlockRef) -> None:
        await never.wait()

    chain.before_head(slow)
    await world.owner.send(world.owner.address)
    clock.now += 800
    await chain.head()
    await asyncio.sleep(0.05)
    await world.owner.send(world.owner.address)
    fresh = await asyncio.wait_for(chain.head(fresh=True), 30)
    never.set()
    assert chain._ahead is not None
    await asyncio.wait_for(asyncio.shield(chain._ahead), 30)

    assert fresh.number > first.number
    assert await chain.head() == fresh, "what was read earlier does not take its place"
    await chain.close()


async def unreachable(_: BlockRef) -> None:
    raise ChainUnavailable("gone", retry_after=1)


async def forever(_: BlockRef) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(("work", "ttl_s"), [(unreachable, 100), (forever, 0.4)])
async def test_what_can_not_be_read_ahead_is_read_when_it_is_asked_for(world: World, work: Any, ttl_s: float) -> None:
    """Nor does it keep the new head waiting longer than the last one counts."""
    model, clock = await world.register("m1"), Clock()
    user = await world.wallet(tokens=100)
    chain = world.new_chain(head_ttl_s=ttl_s, monotonic=clock)
    gates = world.new_gates(chain)
    await gates.check(principal(user.address), model)
    await world.mint(user.address, 1)
    chain.before_head(work)
    await ahead(chain, clock, 0.8 * ttl_s)

    assert (await gates.check(principal(user.address), model)).have == 101
    await chain.close()


async def test_a_denial_at_an_unchanged_head_costs_one_call(world: World) -> None:
    model = await world.register("m1")
    user = await world.wallet()
    chain = world.new_chain(head_ttl_s=600)
    gates = world.new_gates(chain)
    with pytest.raises(AccessDenied):
        await gates.check(principal(user.address), model)
    calls = chain.rpc.calls
    with pytest.raises(AccessDenied):
        await gates.check(principal(user.address), model)

    assert chain.rpc.calls == calls + 1
    await chain.close()


async def test_a_grant_of_a_block_that_was_reorganised_away_can_not_be_had_again(world: World) -> None:
    model = await world.register("m1")
    user = await world.wallet()
    snapshot = await world.rpc("evm_snapshot")
    await world.mint(user.address, 100)
    grant = await world.gates.check(principal(user.address), model)
    await world.rpc("evm_revert", snapshot)
    fresh = world.new_gates()
    with pytest.raises(AccessDenied):
        await fresh.check(principal(user.address), model)
    with pytest.raises(ChainUnavailable):
        await fresh.check(principal(user.address), model, grant.block)


async def test_a_cached_head_that_was_reorganised_away_is_read_again(world: World) -> None:
    model = await world.register("m1")
    user = await world.wallet(tokens=100)
    snapshot = await world.rpc("evm_snapshot")
    await world.rpc("evm_mine")
    chain = world.new_chain(head_ttl_s=600)
    orphan = await chain.head()
    await world.rpc("evm_revert", snapshot)

    grant = await world.new_gates(chain).check(principal(user.address), model)

    assert grant.block.hash != orphan.hash
    await chain.close()


async def test_a_deactivated_model_is_refused_until_it_is_back(world: World) -> None:
    model = await world.register("m1")
    user = await world.wallet(tokens=100)
    await world.vault_call("deactivateModel", model)
    with pytest.raises(ModelUnknown, match="deactivated by its owner"):
        await world.gates.check(principal(user.address), model)
    assert (await world.gates.info(model)).active is False
    await world.vault_call("reactivateModel", model)

    assert (await world.gates.check(principal(user.address), model)).have == 100


async def test_an_unknown_model_is_named(world: World) -> None:
    user = await world.wallet()
    with pytest.raises(ModelUnknown, match="no model nobody-registered") as caught:
        await world.gates.check(principal(user.address), ModelId.parse("nobody-registered"))

    assert caught.value.data == {"model_id": "nobody-registered"}


async def test_a_model_can_be_asked_for_by_its_key(world: World) -> None:
    model = await world.register("m1")
    user = await world.wallet(tokens=100)

    grant = await world.gates.check(principal(user.address), ModelId.parse(str(model.key)))

    assert grant.model.model.key == model.key


async def test_an_open_model_lets_everyone_in(world: World) -> None:
    model = ModelId.parse("open")
    await world.vault_call("registerOpenModel", model, CID, 0, 2, [], "1")
    user = await world.wallet()

    grant = await world.gates.check(principal(user.address), model)

    assert (grant.have, grant.model.gate) == (0, GateType.OPEN)


async def test_a_gate_that_its_owner_closes_is_closed(world: World) -> None:
    model = ModelId.parse("open")
    await world.vault_call("registerOpenModel", model, CID, 0, 2, [], "1")
    user = await world.wallet()
    await world.gates.check(principal(user.address), model)
    await world.vault_call("setGate", model, GateType.TOKEN, world.token, 5, 0, 0)
    with pytest.raises(AccessDenied, match="5 needed"):
        await world.gates.check(principal(user.address), model)


async def test_a_gate_of_a_type_that_nobody_knows_stays_closed(world: World) -> None:
    model = await world.register("m1")
    user = await world.wallet(tokens=100)
    await world.vault_call("setGate", model, 7, world.token, 100, 0, 0)
    with pytest.raises(AccessDenied, match="of type 7"):
        await world.gates.check(principal(user.address), model)


async def test_tokens_must_have_been_held_for_the_hold_blocks(world: World) -> None:
    model = await world.register("m1")
    await world.vault_call("setGate", model, GateType.TOKEN, world.token, 100, 0, 3)
    user = await world.wallet(tokens=100)
    with pytest.raises(AccessDenied, match=r"held 0 .* 100 must be there for 3 blocks") as caught:
        await world.gates.check(principal(user.address), model)
    for _ in range(3):
        await world.rpc("evm_mine")

    assert caught.value.data["have"] == "0"
    assert (await world.gates.check(principal(user.address), model)).have == 100


@pytest.mark.parametrize("size", [0, 31, 33, 64])
async def test_a_balance_that_is_not_exactly_32_bytes_denies(world: World, size: int) -> None:
    token = await world.owner.deploy_contract(hostile("OddBalanceToken"), size)
    model = await world.register("m1", token=token, minimum=1)
    user = await world.wallet()
    with pytest.raises(AccessDenied, match=f"returned {size} bytes instead of 32"):
        await world.gates.check(principal(user.address), model)


async def test_a_balance_of_exactly_32_bytes_from_the_same_token_grants(world: World) -> None:
    token = await world.owner.deploy_contract(hostile("OddBalanceToken"), 32)
    model = await world.register("m1", token=token, minimum=1)
    user = await world.wallet()

    assert (await world.gates.check(principal(user.address), model)).have == 2**256 - 1


async def test_a_reverting_balance_denies_and_is_no_outage(world: World) -> None:
    token = await world.owner.deploy_contract(hostile("RevertingBalanceToken"))
    model = await world.register("m1", token=token, minimum=1)
    user = await world.wallet()
    with pytest.raises(AccessDenied, match=r"tells no balance .*reverted") as caught:
        await world.gates.check(principal(user.address), model)

    assert caught.value.data["token"] == str(token)
    assert "have" not in caught.value.data


async def test_a_token_without_code_denies(world: World) -> None:
    model = await world.register("m1", token=Address(b"\x77" * 20), minimum=1)
    user = await world.wallet()
    with pytest.raises(AccessDenied, match="returned 0 bytes"):
        await world.gates.check(principal(user.address), model)


async def test_a_price_in_a_token_that_is_not_served_is_refused(world: World) -> None:
    model = await world.register("m1", price=20_000)
    user = await world.wallet(tokens=100)
    assert (await world.gates.check(principal(user.address), model)).model.price.atomic == 20_000
    await world.vault_call("setPaymentToken", model, world.token, 20_000)
    with pytest.raises(PaymentRejected) as caught:
        await world.gates.check(principal(user.address), model)
    assert caught.value.data["reason"] == "unsupported_token"
    assert caught.value.data["token"] == str(world.token)
    await world.vault_call("setPaymentToken", model, world.token, 0)

    assert (await world.gates.check(principal(user.address), model)).model.price.atomic == 0  # free needs no token


async def test_a_vault_of_the_published_shape_gets_the_defaults(world: World) -> None:
    """Its code is ours with the two younger selectors taken out of the dispatcher: calls to them revert."""
    model = await world.register("m1", price=1)
    user = await world.wallet(tokens=100)
    code = await world.chain.code(world.vault)
    for selector in ("01d46ce2", "5d818bd4"):
        assert code.count(bytes.fromhex(selector)) == 1
        code = code.replace(bytes.fromhex(selector), bytes.fromhex("fefefefe"))
    await world.rpc("anvil_setCode", str(world.vault), "0x" + code.hex())

    grant = await world.gates.check(principal(user.address), model)

    assert (grant.model.payment_token, grant.model.gate) == (world.usdc, GateType.TOKEN)


async def test_an_address_without_a_vault_is_an_outage_and_never_access(world: World) -> None:
    await world.register("m1")
    user = await world.wallet(tokens=100)
    world.vault = user.address
    with pytest.raises(ChainUnavailable, match="no ModelVault answers"):
        await world.new_gates().check(principal(user.address), ModelId.parse("m1"))


async def test_another_contract_at_the_vaults_address_is_never_access(world: World) -> None:
    user = await world.wallet(tokens=100)
    world.vault = world.token
    with pytest.raises(ModelUnknown):
        await world.new_gates().check(principal(user.address), ModelId.parse("m1"))


async def test_a_chain_that_went_away_is_an_outage_and_never_access() -> None:
    with start_devnet() as devnet:
        world = await build(devnet)
        model = await world.register("m1")
        user = await world.wallet(tokens=100)
        await world.gates.check(principal(user.address), model)
    with pytest.raises(ChainUnavailable):
        await world.gates.check(principal(user.address), model)
    await world.chain.close()


async def test_a_stale_head_is_never_access(world: World) -> None:
    model = await world.register("m1")
    user = await world.wallet(tokens=100)
    chain = world.new_chain(max_head_age_s=60, clock=lambda: 4e9)
    with pytest.raises(ChainStale):
        await world.new_gates(chain).check(principal(user.address), model)
    await chain.close()
