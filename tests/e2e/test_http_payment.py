"""Money: priced models, offers, transfers claimed by hash, one run per payment, answers that can be fetched again."""

from __future__ import annotations

import asyncio
import base64
import json
from collections import Counter
from typing import Any

import orjson
import pytest

from divault.chain.wallet import Wallet
from divault.client.signing import Signed
from divault.errors import PriceChanged
from divault.messages import address_of
from divault.receipts import check, require_valid
from divault.values import ModelId, Secret, Usdc
from tests.e2e.conftest import World
from tests.e2e.test_http_identity import RUN, body_of, send, signer

pytestmark = pytest.mark.asyncio(loop_scope="session")
PRICE = Usdc.parse("0.02")


async def priced(world: World) -> ModelId:
    model = ModelId.parse("priced-model")
    found = await world.request("GET", f"/api/v1/models/{model}")
    return model if found[0] == 200 else await world.publish(model.text, price="0.02")


async def pay(world: World, key: Secret, amount: Usdc = PRICE, *, node: bool = True) -> str:
    """Transfer to the owner, bound to the node; gives the transaction."""
    wallet = Wallet(key, world.chain.chain)
    async with world.client(key) as client:
        address = (await client.node()).address if node else wallet.address
    receipt = await wallet.pay(world.chain.usdc, world.chain.publisher.address, amount, address)
    return str(receipt.transaction_hash)


async def paid_request(world: World, model: ModelId, key: Secret, tx: str | None, limit: Usdc = PRICE) -> Signed:
    body = body_of(world, model, key)
    if tx is not None:
        body["payment"] = {"tx_hash": tx}
    return (await signer(world, key)).post(RUN, model, body, limit)


async def balances(world: World, key: Secret) -> tuple[int, int]:
    usdc, owner = world.chain.usdc, world.chain.publisher.address
    return await world.chain.balance(usdc, address_of(key)), await world.chain.balance(usdc, owner)


async def test_without_payment_there_is_an_offer(world: World) -> None:
    model, key = await priced(world), await world.consumer()

    status, body, headers = await send(world, await paid_request(world, model, key, None))

    assert (status, body["code"], body["price"], body["price_usdc"]) == (402, "payment_required", "20000", "0.02")
    assert body["owner"] == str(world.chain.publisher.address)
    assert body["rails"] == ["transfer"]
    offer = json.loads(base64.b64decode(headers["payment-required"]))
    assert (offer["x402Version"], offer["accepts"]) == (2, body["accepts"])
    assert offer["accepts"][0]["payTo"] == body["owner"]


async def test_an_offer_uses_nothing_up(world: World) -> None:
    model, key = await priced(world), await world.consumer()
    unpaid = await paid_request(world, model, key, None)
    assert (await send(world, unpaid))[0] == 402

    assert (await send(world, unpaid))[0] == 402


async def test_a_paid_call_runs_once_and_the_owner_has_the_money(world: World) -> None:
    model, key = await priced(world), await world.consumer()
    payer_before, owner_before = await balances(world, key)
    request = await paid_request(world, model, key, await pay(world, key))

    answers = await asyncio.gather(*(send(world, request) for _ in range(50)))

    counted = Counter((status, body.get("code")) for status, body, _ in answers)
    assert set(counted) <= {(200, None), (409, "request_running")}
    assert counted[200, None] >= 1
    receipts = {body["receipt"]["receipt_hash"] for status, body, _ in answers if status == 200}
    assert len(receipts) == 1
    assert await balances(world, key) == (payer_before - PRICE.atomic, owner_before + PRICE.atomic)


async def test_the_answer_comes_again_byte_for_byte(world: World) -> None:
    model, key = await priced(world), await world.consumer()
    request = await paid_request(world, model, key, await pay(world, key))
    first = await send(world, request)
    assert first[0] == 200

    second = await send(world, request)
    who = await signer(world, key)
    path = f"/api/v1/results/{request.id}"
    fetched = await world.request("GET", path, headers=dict(who.bare("GET", path).exchange.headers or {}))

    assert second[:2] == first[:2]
    assert fetched[:2] == first[:2]


async def test_nobody_else_reads_a_result(world: World) -> None:
    model, key, other = await priced(world), await world.consumer(), await world.consumer()
    request = await paid_request(world, model, key, await pay(world, key))
    assert (await send(world, request))[0] == 200
    path = f"/api/v1/results/{request.id}"

    theirs = await world.request(
        "GET", path, headers=dict((await signer(world, other)).bare("GET", path).exchange.headers or {})
    )
    unsigned = await world.request("GET", path)

    assert (theirs[0], theirs[1]["code"]) == (404, "result_unknown")
    assert (unsigned[0], unsigned[1]["code"]) == (401, "signature_incomplete")


async def test_one_payment_pays_for_one_run(world: World) -> None:
    model, key = await priced(world), await world.consumer()
    tx = await pay(world, key)
    requests = [await paid_request(world, model, key, tx) for _ in range(10)]

    answers = await asyncio.gather(*(send(world, request) for request in requests))

    counted = Counter(status for status, _, _ in answers)
    assert counted[200] == 1
    assert counted[402] == 9
    assert {body["reason"] for status, body, _ in answers if status == 402} == {"already_spent"}


async def test_the_rest_of_a_larger_payment_is_credit(world: World) -> None:
    model, key = await priced(world), await world.consumer()
    tx = await pay(world, key, Usdc.parse("0.05"))

    first = await send(world, await paid_request(world, model, key, tx))
    second = await send(world, await paid_request(world, model, key, None))
    third = await send(world, await paid_request(world, model, key, None))

    assert [answer[0] for answer in (first, second, third)] == [200, 200, 402]
    keys = [answer[1]["receipt"]["payment_key"] for answer in (first, second)]
    assert keys[0].startswith("credit:")
    assert keys[0] != keys[1]


async def test_a_transfer_of_another_wallet_or_for_another_node_pays_nothing(world: World) -> None:
    model, key, thief = await priced(world), await world.consumer(), await world.consumer()
    tx = await pay(world, key)

    stolen = await send(world, await paid_request(world, model, thief, tx))
    unbound = await send(world, await paid_request(world, model, key, await pay(world, key, node=False)))

    assert (stolen[0], stolen[1]["reason"]) == (402, "payer_mismatch")
    assert (unbound[0], unbound[1]["reason"]) == (402, "not_bound_to_node")
    assert stolen[1]["receipt"]["receipt"]["price"] == "0"
    assert (await send(world, await paid_request(world, model, key, tx)))[0] == 200, (
        "the payer's own claim still counts"
    )


async def test_a_price_above_the_signed_maximum_is_refused(world: World) -> None:
    model, key = await priced(world), await world.consumer()
    tx = await pay(world, key)

    status, body, _ = await send(world, await paid_request(world, model, key, tx, Usdc.parse("0.01")))

    assert (status, body["code"], body["have"], body["need"]) == (409, "price_changed", "10000", "20000")
    assert body["receipt"]["receipt"]["status"] == "3"


async def test_a_failed_run_costs_nothing(world: World) -> None:
    model, key = await priced(world), await world.consumer()
    tx = await pay(world, key)
    body = body_of(world, model, key) | {"input_data": {"features": [1.0]}, "payment": {"tx_hash": tx}}
    bad = (await signer(world, key)).post(RUN, model, body, PRICE)

    status, refusal, _ = await send(world, bad)
    again = await send(world, await paid_request(world, model, key, None))

    assert (status, refusal["code"]) == (422, "input_invalid")
    assert (refusal["receipt"]["receipt"]["price"], refusal["receipt"]["receipt"]["status"]) == ("0", "3")
    assert again[0] == 200, "the credit is still there"


async def test_malformed_payments_are_told(world: World) -> None:
    model, key = await priced(world), await world.consumer()

    async def answer(payment: Any) -> tuple[int, str]:
        body = body_of(world, model, key) | {"payment": payment}
        status, said, _ = await send(world, (await signer(world, key)).post(RUN, model, body, PRICE))
        return status, said["code"]

    assert await answer("0x12") == (400, "bad_request")
    assert await answer({"tx_hash": 5}) == (400, "bad_request")
    assert await answer({"tx_hash": "0xABC"}) == (402, "payment_required")
    assert await answer({"tx_hash": "0x" + "11" * 32}) == (409, "payment_pending")


async def test_the_client_pays_only_what_it_was_told_to(world: World) -> None:
    model, key = await priced(world), await world.consumer()
    async with world.client(key) as client:
        with pytest.raises(PriceChanged):
            await client.run(model.text, {"features": world.trained.rows[0]}, max_price="0.019999")
        before = await balances(world, key)
        result = await client.run(model.text, {"features": world.trained.rows[0]}, max_price="0.02")
        after = await balances(world, key)
        kept = await client.stored(result.request_id)
        node = await client.node()

    assert (before[0] - after[0], after[1] - before[1]) == (PRICE.atomic, PRICE.atomic)
    assert (result.price, kept.output, kept.receipt) == (PRICE, result.output, result.receipt)
    require_valid(check(result.receipt, node=node.address, result=result.raw))
    assert orjson.loads(result.response)["receipt"] == result.receipt


async def test_a_receipt_chain_has_no_gap(world: World) -> None:
    model, key = await priced(world), await world.consumer()
    await pay(world, key)
    receipts = []
    tx = await pay(world, key, Usdc.parse("0.06"))
    for payment in (tx, None, None):
        status, body, _ = await send(world, await paid_request(world, model, key, payment))
        assert status == 200
        receipts.append(body["receipt"])

    sequences = [int(envelope["receipt"]["sequence"]) for envelope in receipts]
    assert sequences == list(range(sequences[0], sequences[0] + 3))
    assert [e["receipt"]["prevReceiptHash"] for e in receipts[1:]] == [e["receipt_hash"] for e in receipts[:-1]]


async def test_a_priced_model_is_not_to_be_had_under_another_name(world: World) -> None:
    """Anybody can register any CID, for nothing, and the node's key opens whatever was sealed to the node."""
    model, key = await priced(world), await world.consumer()
    cid = (await world.request("GET", f"/api/v1/models/{model}"))[1]["model_info"]["cid"]
    thief = await world.chain.register_open("copied-model", cid)

    status, body, _ = await send(world, await paid_request(world, thief, key, None, Usdc(0)))

    assert (status, body["code"], body["seen"]) == (400, "unsupported_model", "a file sealed for another model")
    assert (await send(world, await paid_request(world, model, key, await pay(world, key))))[0] == 200
