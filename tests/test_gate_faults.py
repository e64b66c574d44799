"""Whatever an endpoint or a contract says that it should not: never access, and rightly told as denied or as down."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from eth_abi.abi import encode

from divault.chain.chain import Chain
from divault.chain.gates import Gates
from divault.chain.rpc import Rpc, RpcLimits
from divault.chain.vault import VaultReader
from divault.errors import AccessDenied, ChainUnavailable, DivaultError, ModelUnknown
from divault.values import Address, GateType, ModelId
from tests.chain_world import principal
from tests.rpc_stub import CHAIN_ID, Stub, serving
from tests.test_chain_rpc_faults import html
from tests.test_chain_vault_entry import ENTRY, encoded

INFO, PAYMENT, GATE, BALANCE = "b005b08b", "01d46ce2", "5d818bd4", "70a08231"
VAULT, USDC, USER, MODEL = Address(b"\x01" * 20), Address(b"\x02" * 20), Address(b"\x03" * 20), ModelId.parse("m1")
REVERT = {"error": {"code": 3, "message": "execution reverted", "data": "0x"}}
REFUSED = {"error": {"code": -32000, "message": "header not found"}}


def returns(data: bytes) -> dict[str, Any]:
    return {"result": "0x" + data.hex()}


def words(*values: int) -> dict[str, Any]:
    return returns(b"".join(value.to_bytes(32, "big") for value in values))


def entry(**changes: Any) -> dict[str, Any]:
    fields = {"token": 1, "price": 2, "owner": 3, "minimum": 10}
    values = list(ENTRY)
    for name, value in changes.items():
        values[fields[name]] = value
    return returns(encoded(tuple(values)))


@contextlib.asynccontextmanager
async def gated(**answers: dict[str, Any]) -> AsyncIterator[tuple[Gates, Stub]]:
    """Gates before a stub on which everything is in order, but for the answers given."""
    good = {
        "INFO": entry(),
        "PAYMENT": words(int.from_bytes(USDC.raw, "big")),
        "GATE": words(0, 0, 0),
        "BALANCE": words(10**18),
    }
    selectors = {"INFO": INFO, "PAYMENT": PAYMENT, "GATE": GATE, "BALANCE": BALANCE}
    async with serving() as stub:
        stub.contracts = {selectors[name]: outcome for name, outcome in {**good, **answers}.items()}
        chain = Chain(Rpc([stub.url], CHAIN_ID, limits=RpcLimits(timeout_s=0.5)), head_ttl_s=60)
        yield Gates(chain, VaultReader(chain, VAULT, USDC), [USDC]), stub
        await chain.close()


async def test_everything_in_order_is_a_grant() -> None:
    async with gated() as (gates, _):
        grant = await gates.check(principal(USER), MODEL)

    assert (grant.have, grant.model.payment_token, grant.model.min_balance) == (10**18, USDC, 10**18)


@pytest.mark.parametrize("which", ["INFO", "PAYMENT", "GATE", "BALANCE"])
@pytest.mark.parametrize(
    "outcome", [REFUSED, {"result": None}, {"result": "0x0"}, {"result": 1}, {"result": "garbage"}]
)
async def test_an_endpoint_that_does_not_answer_one_of_the_reads_is_an_outage(
    which: str, outcome: dict[str, Any]
) -> None:
    async with gated(**{which: outcome}) as (gates, _):
        with pytest.raises(ChainUnavailable):
            await gates.check(principal(USER), MODEL)


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ({"BALANCE": REVERT}, AccessDenied),
        ({"BALANCE": returns(b"")}, AccessDenied),
        ({"BALANCE": returns(b"\xff" * 31)}, AccessDenied),
        ({"BALANCE": returns(b"\xff" * 64)}, AccessDenied),
        ({"BALANCE": {"error": {"code": -32000, "message": "out of gas"}}}, AccessDenied),
        ({"BALANCE": words(10**18 - 1)}, AccessDenied),
        ({"INFO": entry(minimum=0)}, AccessDenied),
        ({"INFO": entry(token=bytes(20))}, AccessDenied),
        ({"INFO": entry(minimum=0, token=bytes(20)), "GATE": REVERT}, AccessDenied),
        ({"INFO": REVERT}, ModelUnknown),
        ({"INFO": entry(owner=bytes(20))}, ModelUnknown),
        ({"INFO": returns(bytes(70_000))}, ModelUnknown),
        ({"INFO": returns(b"")}, ChainUnavailable),
        ({"INFO": returns(encoded(ENTRY)[:-32])}, ChainUnavailable),
        ({"INFO": returns(encode(["string", "address", "uint256"], ["bafy", USER.raw, 1]))}, ChainUnavailable),
        ({"PAYMENT": words(2**160)}, ChainUnavailable),
        ({"PAYMENT": words(1, 2)}, ChainUnavailable),
        ({"GATE": words(0)}, ChainUnavailable),
        ({"GATE": words(0, 0, 0, 0)}, ChainUnavailable),
        ({"GATE": words(2, 0, 0)}, AccessDenied),
        ({"GATE": words(2**255, 0, 0)}, AccessDenied),
    ],
)
async def test_what_a_contract_should_not_say_is_never_access(
    answers: dict[str, Any], error: type[DivaultError]
) -> None:
    async with gated(**answers) as (gates, _):
        with pytest.raises(error):
            await gates.check(principal(USER), MODEL)


@pytest.mark.parametrize("absent", [REVERT, returns(b"")])
async def test_a_vault_without_payment_token_and_gate_gets_the_defaults(absent: dict[str, Any]) -> None:
    async with gated(PAYMENT=absent, GATE=absent) as (gates, _):
        grant = await gates.check(principal(USER), MODEL)

    assert (grant.model.payment_token, grant.model.gate, grant.model.hold_blocks) == (USDC, GateType.TOKEN, 0)


async def test_an_open_gate_asks_for_no_balance() -> None:
    async with gated(GATE=words(1, 0, 0), INFO=entry(minimum=0, token=bytes(20)), BALANCE=REVERT) as (gates, stub):
        assert (await gates.check(principal(USER), MODEL)).have == 0
        assert stub.counted["eth_call"] == 3


async def test_an_outage_after_a_cached_head_is_never_access() -> None:
    async with gated() as (gates, stub):
        await gates.info(ModelId.parse("another"))
        stub.breaks = html
        with pytest.raises(ChainUnavailable):
            await gates.check(principal(USER), MODEL)


async def test_fifty_callers_at_a_new_head_share_the_reads() -> None:
    async with gated() as (gates, stub):
        stub.delay_s = 0.05
        grants = await asyncio.gather(*(gates.check(principal(USER), MODEL) for _ in range(50)))

    assert len(grants) == 50
    assert stub.counted["eth_call"] == 4
