"""Who is let in: signatures, nonces, nodes, chains; and who may unload and clear."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import secrets
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest

from divault.client.signing import Signed, Signer
from divault.messages import address_of, strict_object
from divault.messages.typed import Domain
from divault.testing.node import NodeProcess
from divault.values import ModelId, Secret, Usdc
from tests.e2e.conftest import World

pytestmark = pytest.mark.asyncio(loop_scope="session")
RUN = "/api/v1/inference/run"


async def signer(world: World, key: Secret, node: NodeProcess | None = None) -> Signer:
    async with world.client(key, node) as client:
        return await client._signer()


def body_of(world: World, model: ModelId, key: Secret) -> dict[str, Any]:
    return {
        "model_id": model.text,
        "user_address": str(address_of(key)),
        "input_data": {"features": world.trained.rows[0]},
    }


async def signed(world: World, model: ModelId, key: Secret, node: NodeProcess | None = None) -> Signed:
    return (await signer(world, key, node)).post(RUN, model, body_of(world, model, key), Usdc(0))


async def send(world: World, request: Signed | bytes, node: NodeProcess | None = None, path: str = RUN) -> Any:
    raw = request if isinstance(request, bytes) else request.exchange.body
    headers = {} if isinstance(request, bytes) else dict(request.exchange.headers or {})
    return await world.request("POST", path, node, data=raw, headers=headers | {"content-type": "application/json"})


async def published(world: World) -> ModelId:
    """One free, gated model for this file, published once."""
    model = ModelId.parse("identity-model")
    found = await world.request("GET", f"/api/v1/models/{model}")
    return model if found[0] == 200 else await world.publish(model.text)


async def test_a_signed_request_of_a_holder_is_answered(world: World) -> None:
    model, key = await published(world), await world.consumer()

    status, body, _ = await send(world, await signed(world, model, key))

    assert (status, body["status"], body["model_id"]) == (200, "success", model.text)
    assert body["receipt"]["receipt"]["user"].lower() == str(address_of(key)).lower()


async def test_a_hundred_copies_of_one_free_request_run_once(world: World) -> None:
    model, key = await published(world), await world.consumer()
    request = await signed(world, model, key)

    answers = await asyncio.gather(*(send(world, request) for _ in range(100)))

    assert Counter((status, body.get("code")) for status, body, _ in answers) == {
        (200, None): 1,
        (401, "nonce_used"): 99,
    }


async def test_a_request_for_another_node_is_refused(world: World, tmp_path: Path) -> None:
    model, key = await published(world), await world.consumer()
    request = await signed(world, model, key)

    async with world.other_node(tmp_path) as other:
        status, body, headers = await send(world, request, other)

    assert (status, body["code"], body["reason"]) == (401, "signature_invalid", "signer_mismatch")
    assert "www-authenticate" in headers
    assert (await send(world, request))[0] == 200, "its own node still takes it"


async def test_a_request_for_another_chain_is_refused(world: World) -> None:
    model, key = await published(world), await world.consumer()
    elsewhere = dataclasses.replace(await signer(world, key), chain_id=1)
    body = body_of(world, model, key)

    unnamed = await send(world, elsewhere.post(RUN, model, body, Usdc(0)))
    named = await send(world, elsewhere.post(RUN, model, body | {"chain_id": 1}, Usdc(0)))

    assert (unnamed[0], unnamed[1]["code"]) == (401, "signature_invalid")
    assert (named[0], named[1]["code"], named[1]["chain_id"]) == (401, "wrong_chain", world.chain.devnet.chain_id)


async def test_one_changed_byte_of_input_is_refused(world: World) -> None:
    model, key = await published(world), await world.consumer()
    request = await signed(world, model, key)
    first = request.exchange.body.index(b'"features":[') + len(b'"features":[')
    altered = bytearray(request.exchange.body)
    altered[first] = ord("1") if altered[first] != ord("1") else ord("2")

    status, body, _ = await send(world, bytes(altered))

    assert (status, body["code"]) == (401, "signature_invalid")
    assert (await send(world, request))[0] == 200, "the refused copy used nothing up"


async def test_a_client_written_from_the_published_example_learns_what_to_sign(world: World) -> None:
    model, key = await published(world), await world.consumer()
    example = body_of(world, model, key) | {"user_signature": "0x..."}

    status, body, headers = await send(world, json.dumps(example).encode(), path="/api/v1/inference")

    assert (status, body["code"], body["error"], body["status"]) == (
        401,
        "signature_incomplete",
        "signature_incomplete",
        401,
    )
    assert {"nonce", "issued_at", "expires_at"} <= set(body["missing"])
    assert "www-authenticate" in headers
    assert body["detail"]

    # A wallet that signs what it was given, and sends the body again as told, is let in.
    from eth_account import Account
    from eth_account.messages import encode_typed_data

    typed = body["typed_data"]
    message = encode_typed_data(full_message=typed | {"types": typed["types"]})
    signature = Account.sign_message(message, key.reveal()).signature.hex()
    again = example | body["send"] | {"user_signature": "0x" + signature.removeprefix("0x")}
    status, body, _ = await send(world, json.dumps(again).encode(), path="/api/v1/inference")
    assert (status, body.get("code")) in ((200, None), (404, "model_not_loaded"))


async def test_the_published_address_with_a_wrong_checksum_learns_it_too(world: World) -> None:
    body = {"model_id": "m1", "user_address": "0x742d35Cc6634C0532925a3b8D4C9db96C4b4d8b6", "user_signature": "0x..."}

    status, answer, _ = await send(world, json.dumps(body).encode())

    assert (status, answer["code"]) == (401, "signature_incomplete")
    assert answer["typed_data"]["message"]["node"]


async def test_without_an_address_there_is_nothing_to_sign(world: World) -> None:
    status, answer, _ = await send(world, b'{"model_id": "m1", "user_address": "me"}')

    assert (status, answer["code"]) == (422, "input_invalid")


async def test_a_stranger_is_refused_with_what_he_needs(world: World) -> None:
    model, key = await published(world), await world.consumer(tokens=99)

    status, body, _ = await send(world, await signed(world, model, key))

    assert (status, body["code"], body["have"], body["need"]) == (403, "access_denied", "99", "100")
    assert body["token"] == str(world.chain.token)
    assert body["receipt"]["receipt"]["status"] == "3"
    assert body["request_id"] == body["receipt"]["receipt"]["requestHash"]


async def test_nobody_unauthorised_unloads_or_clears(world: World) -> None:
    model, key = await published(world), await world.consumer()
    await send(world, await signed(world, model, key))
    path = f"/api/v1/models/{model}"
    holder = await signer(world, key)

    for method, where in (("DELETE", path), ("DELETE", "/api/v1/cache")):
        assert (await world.request(method, where))[0] == 401
        refused = await world.request(method, where, headers=dict(holder.bare(method, where).exchange.headers or {}))
        assert (refused[0], refused[1]["code"]) == (403, "not_operator")

    listed = (await world.request("GET", "/api/v1/models"))[1]
    assert model.text in listed["loaded_models"]


async def test_the_owner_unloads_his_model_and_an_operator_any(world: World) -> None:
    model, key = await published(world), await world.consumer()
    path = f"/api/v1/models/{model}"
    publisher_key = next(a.key for a in world.chain.devnet.accounts if a.address == world.chain.publisher.address)
    owner = await signer(world, publisher_key)
    operator = await signer(world, world.operator)

    for who in (owner, operator):
        assert (await send(world, await signed(world, model, key)))[0] == 200
        request = who.bare("DELETE", path)
        status, body, _ = await world.request("DELETE", path, headers=dict(request.exchange.headers or {}))
        assert (status, body["status"]) == (200, "success")
        again = await world.request("DELETE", path, headers=dict(request.exchange.headers or {}))
        assert (again[0], again[1]["code"]) == (401, "nonce_used")
        assert model.text not in (await world.request("GET", "/api/v1/models"))[1]["loaded_models"]


async def test_a_large_body_signs_headers(world: World) -> None:
    model, key = await published(world), await world.consumer()
    who = await signer(world, key)
    body = body_of(world, model, key) | {"input_data": {"features": world.trained.rows * 6}}
    request = who.post(RUN, model, body, Usdc(0))
    assert request.exchange.headers

    status, answer, _ = await send(world, request)
    tampered = await send(
        world,
        dataclasses.replace(request, exchange=dataclasses.replace(request.exchange, body=request.exchange.body + b" ")),
    )

    assert (status, len(answer["result"]["predictions"])) == (200, 6 * len(world.trained.rows))
    assert (tampered[0], tampered[1]["code"]) == (401, "signature_invalid")


async def test_a_large_body_with_its_signature_inside_is_told_to_sign_headers(world: World) -> None:
    model, key = await published(world), await world.consumer()
    body = body_of(world, model, key) | {"input_data": {"text": "x" * 70_000}}

    status, answer, _ = await send(world, orjson.dumps(body | {"nonce": "0x" + secrets.token_hex(32)}))

    assert (status, answer["code"]) == (413, "sign_headers")


async def test_a_restart_forgets_no_nonce(world: World, tmp_path: Path) -> None:
    model, key = await published(world), await world.consumer()
    async with world.other_node(tmp_path) as first:
        await world.publish("restart-model", node=first)
        model = ModelId.parse("restart-model")
        request = await signed(world, model, key, first)
        assert (await send(world, request, first))[0] == 200
    async with world.other_node(tmp_path) as second:
        status, body, _ = await send(world, request, second)

    assert (status, body["code"]) == (401, "nonce_used")


async def test_the_node_proves_its_address(world: World) -> None:
    _, about, _ = await world.request("GET", "/api/v1/node")
    descriptor = about["descriptor"]

    assert about["address"] == descriptor["descriptor"]["node"]
    assert Domain.parse(descriptor["domain"]).chain_id == world.chain.devnet.chain_id
    assert strict_object(orjson.dumps(about))["age_recipient"] == descriptor["descriptor"]["ageRecipient"]
