"""The published interface: every route with its published fields, and problem documents for what goes wrong."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import urllib.error
import urllib.request
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest

from divault.devnet.content import ContentStore
from divault.messages import address_of
from divault.values import ModelId, Secret, Usdc
from tests.e2e.conftest import World
from tests.e2e.test_http_identity import RUN, body_of, send, signed, signer

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def free_model(world: World, name: str = "published-model") -> ModelId:
    model = ModelId.parse(name)
    found = await world.request("GET", f"/api/v1/models/{model}")
    return model if found[0] == 200 else await world.publish(name)


async def test_health_probes_every_part(world: World) -> None:
    status, body, _ = await world.request("GET", "/health")

    assert (status, body["status"]) == (200, "healthy")
    assert body["services"] == dict.fromkeys(
        ("access_validator", "lighthouse_client", "inference_engine", "ledger", "chain"), "active"
    )
    assert all(check["checked_at"] > 0 and check["detail"] for check in body["checks"])
    assert body["sandbox"]["effective"] in ("standard", "strict")
    assert body["sandbox"]["checks"]["fs_read"] == body["sandbox"]["checks"]["spawn"] == "enforced"
    assert (await world.request("GET", "/health/live"))[0] == 200
    assert (await world.request("GET", "/health/ready"))[0] == 200


async def test_health_tells_when_a_part_is_down(world: World, tmp_path: Any) -> None:
    async with world.other_node(tmp_path, DIVAULT_GATEWAY_URLS="http://127.0.0.1:9") as node:
        status, body, _ = await world.request("GET", "/health", node)

    assert (status, body["status"], body["services"]["lighthouse_client"]) == (503, "unhealthy", "failed")
    assert body["services"]["chain"] == "active"


async def test_a_node_whose_gateway_is_away_is_ready_and_answers_calls_of_loaded_models(
    world: World, tmp_path: Any
) -> None:
    """A balancer takes out what is not ready."""
    key = await world.consumer()
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(ContentStore(world.folder / "store"))
        node = await stack.enter_async_context(world.other_node(tmp_path, DIVAULT_GATEWAY_URLS=gateway.url))
        model = await world.publish("loaded-once", node=node)
        other = await world.publish("loaded-never", node=node)
        assert (await send(world, await signed(world, model, key, node), node))[0] == 200
        await gateway.__aexit__(None, None, None)
        for _ in range(100):
            health = await world.request("GET", "/health", node)
            if health[0] == 503:
                break
            await asyncio.sleep(0.1)
        ready = await world.request("GET", "/health/ready", node)
        protocol = await world.request("GET", "/v2/health/ready", node)
        ran = await send(world, await signed(world, model, key, node), node)
        refused = await send(world, await signed(world, other, key, node), node)

    assert (health[0], health[1]["services"]["lighthouse_client"]) == (503, "failed")
    assert ready[:2] == (200, {"status": "ready"})
    assert protocol[:2] == (200, {"ready": True})
    assert ran[0] == 200
    assert (refused[0], refused[1]["code"]) == (502, "storage_failed"), "and a load says what is missing"


async def test_load_list_describe_run_and_unload(world: World) -> None:
    model, key = await free_model(world, "lifecycle-model"), await world.consumer()
    who = await signer(world, key)
    load = who.post(
        "/api/v1/models/load", model, {"model_id": model.text, "user_address": str(address_of(key))}, Usdc(0)
    )
    before = await send(world, await _at(world, "/api/v1/inference", model, key), path="/api/v1/inference")

    loaded = await send(world, load, path="/api/v1/models/load")
    listed = (await world.request("GET", "/api/v1/models"))[1]
    described = (await world.request("GET", f"/api/v1/models/{model}"))[1]["model_info"]
    ran = await send(world, await _at(world, "/api/v1/inference", model, key), path="/api/v1/inference")

    assert (before[0], before[1]["code"]) == (404, "model_not_loaded")
    assert loaded[0] == 200
    assert {"cid", "token_contract", "price_per_inference", "owner", "active", "total_inferences"} <= set(
        loaded[1]["model_info"]
    )
    result = loaded[1]["load_result"]
    assert (result["status"], result["device"]) == ("success", "cpu")
    assert result["sandbox"] in ("standard", "strict")
    assert result["bytes"] == world.trained.path.stat().st_size
    assert result["seconds"] > 0
    assert listed["status"] == "success"
    assert model.text in listed["loaded_models"]
    assert listed["count"] == len(listed["loaded_models"])
    assert {"model_id", "type", "loaded_at", "device"} <= set(described)
    assert described["example"]["features"]
    assert ran[0] == 200
    assert {"status", "model_id", "result", "message", "receipt"} <= set(ran[1])
    assert ran[1]["result"]["predictions"] == [world.trained.labels[0]]


async def _at(world: World, path: str, model: ModelId, key: Secret) -> Any:
    return (await signer(world, key)).post(path, model, body_of(world, model, key), Usdc(0))


async def test_another_cid_than_the_vaults_is_refused(world: World) -> None:
    model, key = await free_model(world), await world.consumer()
    body = body_of(world, model, key) | {"cid": "bafkreifzjut3te2nhyekklss27nh3k72ysco7y32koao5eei66wof36n5e"}

    status, answer, _ = await send(world, (await signer(world, key)).post(RUN, model, body, Usdc(0)))

    assert (status, answer["code"]) == (409, "cid_mismatch")
    assert answer["have"] == body["cid"]


async def test_an_unknown_model_is_unknown(world: World) -> None:
    key = await world.consumer()
    status, answer, _ = await send(world, await signed(world, ModelId.parse("nobody-made-it"), key))

    assert (status, answer["code"]) == (404, "model_unknown")
    assert (await world.request("GET", "/api/v1/models/nobody-made-it"))[0] == 404


async def test_every_error_is_a_problem_document(world: World) -> None:
    cases = [
        ("GET", "/nowhere", {}, 404, "route_unknown"),
        ("POST", "/api/v1/inference/run/", {"data": b"{}"}, 404, "route_unknown"),
        ("PUT", "/api/v1/inference", {}, 405, "method_not_allowed"),
        ("POST", RUN, {"data": b"{"}, 400, "bad_request"),
        ("POST", RUN, {"data": b'{"a": 1, "a": 2}'}, 400, "bad_request"),
        ("POST", RUN, {"data": b'{"a": NaN}'}, 400, "bad_request"),
        ("POST", RUN, {"data": b"\xff\xfe{\x00}\x00"}, 400, "bad_request"),
        ("POST", RUN, {"data": b"[" * 100_000}, 413, "sign_headers"),
        ("POST", RUN, {"data": b"[" * 5_000}, 400, "bad_request"),
        ("POST", RUN, {"data": b"{}"}, 422, "input_invalid"),
        ("POST", RUN, {"data": b"{}", "headers": {"content-type": "text/plain"}}, 400, "bad_request"),
        ("POST", RUN + "?x=1", {"data": b"{}"}, 400, "bad_request"),
        ("GET", "/api/v1/models/..%2f..%2fetc", {}, 404, "route_unknown"),
        ("GET", "/api/v1/models/-x", {}, 400, "bad_request"),
        ("GET", "/api/v1/results/0x12", {}, 401, "signature_incomplete"),
    ]
    for method, path, arguments, status, code in cases:
        sent: dict[str, Any] = {"headers": {"content-type": "application/json"}} | arguments
        got, body, headers = await world.request(method, path, **sent)
        assert (got, body.get("code")) == (status, code), (method, path, arguments, body)
        assert headers["content-type"].startswith("application/problem+json")
        assert {"type", "title", "status", "detail", "code", "error", "request_id"} <= set(body)
        assert (body["status"], body["error"]) == (status, code)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/api/v1/models/wine", "DELETE, GET, HEAD"),
        ("POST", "/api/v1/models/wine", "DELETE, GET, HEAD"),
        ("GET", "/api/v1/cache", "DELETE"),
        ("PATCH", "/api/v1/models", "GET, HEAD"),
        ("PUT", RUN, "POST"),
        ("DELETE", "/v2/models/wine/infer", "POST"),
        ("POST", "/v2/models/wine/versions/1", "GET, HEAD"),
        ("DELETE", "/openapi.json", "GET, HEAD"),
    ],
)
async def test_a_method_that_is_not_answered_is_told_with_all_that_are(
    world: World, method: str, path: str, allowed: str
) -> None:
    status, body, headers = await world.request(method, path)

    assert (status, body["code"]) == (405, "method_not_allowed")
    assert headers["allow"] == body["allowed"] == allowed


async def test_a_body_over_the_limit_is_refused_before_it_is_read(world: World) -> None:
    async def endless() -> Any:
        for _ in range(1000):
            yield b"x" * 65536

    sent = await asyncio.to_thread(sent_whole, world.node.url + RUN, b"x" * (9 * 1024 * 1024))
    asked = await asyncio.to_thread(waiting_to_be_asked, world.node.url, 9 * 1024 * 1024)
    declared = await world.request("POST", RUN, data=io.BytesIO(b"x" * (9 * 1024 * 1024)))
    chunked = await world.request("POST", RUN, data=endless(), headers={"content-type": "application/json"})

    assert sent == (413, "too_large"), "a client that reads nothing before it sent all"
    assert asked.startswith(b"HTTP/1.1 413 "), "a client that sends its body when it is asked to"
    assert (declared[0], declared[1]["code"]) == (413, "too_large")
    assert (chunked[0], chunked[1]["code"]) == (413, "too_large")


def sent_whole(url: str, body: bytes) -> tuple[int, str]:
    try:
        urllib.request.urlopen(urllib.request.Request(url, body, {"content-type": "application/json"}), timeout=30)
    except urllib.error.HTTPError as err:
        return err.code, json.load(err)["code"]
    return 200, ""


def waiting_to_be_asked(url: str, size: int) -> bytes:
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST {RUN} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {size}\r\nExpect: 100-continue\r\n\r\n"
        connection.sendall(head.encode())
        return connection.recv(4096)


async def test_what_no_route_answers_is_told_as_each_interface_tells_it(world: World) -> None:
    unknown = (await world.request("GET", "/v1/nothing"))[1]
    large = (await world.request("POST", "/v1/embeddings", data=io.BytesIO(b"x" * (9 * 1024 * 1024))))[1]
    ours = (await world.request("GET", "/api/v1/nothing"))[1]

    assert (unknown["error"]["code"], large["error"]["code"]) == ("route_unknown", "too_large")
    assert ours["error"] == "route_unknown"


async def test_no_browser_origin_may_call_unless_configured(world: World, tmp_path: Any) -> None:
    asked = {"origin": "https://dapp.example", "access-control-request-method": "POST"}
    refused = await _options(world.node.url, asked)
    async with world.other_node(tmp_path, DIVAULT_CORS_ORIGINS="https://dapp.example") as node:
        allowed = await _options(node.url, asked)
        other = await _options(node.url, asked | {"origin": "https://evil.example"})

    assert "access-control-allow-origin" not in refused
    assert allowed["access-control-allow-origin"] == "https://dapp.example"
    assert "access-control-allow-origin" not in other


async def _options(url: str, headers: dict[str, str]) -> dict[str, str]:
    async with aiohttp.ClientSession() as session, session.options(url + RUN, headers=headers) as response:
        return {name.lower(): value for name, value in response.headers.items()}


async def test_openapi_describes_every_route(world: World) -> None:
    document = (await world.request("GET", "/openapi.json"))[1]

    for path in ("/health", "/api/v1/models/load", "/api/v1/models", "/api/v1/models/{model_id}", "/api/v1/inference",
                 RUN, "/api/v1/cache", "/api/v1/node", "/api/v1/results/{request_id}"):  # fmt: skip
        assert path in document["paths"]
    shown = document["paths"][RUN]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"model_id", "user_address", "input_data", "user_signature", "nonce"} <= set(shown["properties"])


async def test_a_cleared_cache_says_what_was_freed(world: World) -> None:
    model, key = await free_model(world), await world.consumer()
    assert (await send(world, await signed(world, model, key)))[0] == 200
    request = (await signer(world, world.operator)).bare("DELETE", "/api/v1/cache")

    status, body, _ = await world.request("DELETE", "/api/v1/cache", headers=dict(request.exchange.headers or {}))

    assert (status, body["status"]) == (200, "success")
    assert body["models_unloaded"] >= 1
    assert body["bytes_freed"] > 0
    assert body["entries_freed"] >= 1
    assert body["entries_in_use"] == 0
    assert (await world.request("GET", "/api/v1/models"))[1]["count"] == 0
    assert (await send(world, await signed(world, model, key)))[0] == 200, "it is fetched anew"


async def test_a_wallet_that_asks_too_often_is_slowed_down(world: World, tmp_path: Any) -> None:
    key = await world.consumer()
    async with world.other_node(tmp_path, RATE_LIMIT_PER_MINUTE="2") as node:
        model = await world.publish("limited-model", node=node)
        answers = [await send(world, await signed(world, model, key, node), node) for _ in range(3)]
        other = await send(world, await signed(world, model, await world.consumer(), node), node)

    assert [status for status, _, _ in answers] == [200, 200, 429]
    assert answers[2][1]["code"] == "rate_limited"
    assert int(answers[2][2]["retry-after"]) >= 1
    assert other[0] == 200, "another wallet is not slowed down"


async def test_logs_hold_no_secret(world: World) -> None:
    model, key = await free_model(world), await world.consumer()
    request = await signed(world, model, key)
    assert (await send(world, request))[0] == 200
    await asyncio.sleep(0)

    log = (world.node.folder / "logs" / "div-backend.log").read_text()
    state = world.node.folder / "state"

    assert json.loads(request.exchange.body)["user_signature"] not in log
    for secret in ("node.key", "age.key"):
        assert (state / secret).read_text().strip().splitlines()[-1] not in log


async def test_a_run_that_is_refused_has_a_receipt_and_a_load_has_none(world: World) -> None:
    model, stranger = await free_model(world), await world.consumer(tokens=0)
    who = await signer(world, stranger)
    asked = {"model_id": model.text, "user_address": str(address_of(stranger))}

    load = await send(world, who.post("/api/v1/models/load", model, asked, Usdc(0)), path="/api/v1/models/load")
    run = await send(world, await signed(world, model, stranger))

    assert (load[0], load[1]["code"], "receipt" in load[1]) == (403, "access_denied", False)
    assert (run[0], run[1]["code"], "receipt" in run[1]) == (403, "access_denied", True)


async def test_of_a_free_run_the_receipt_is_kept_and_no_answer(world: World) -> None:
    model, key = await free_model(world), await world.consumer()
    ran = await send(world, request := await signed(world, model, key))
    path = f"/api/v1/results/{request.id}"
    headers = dict((await signer(world, key)).bare("GET", path).exchange.headers or {})
    status, body, _ = await world.request("GET", path, headers=headers)

    assert (status, body["code"]) == (404, "result_unknown")
    assert "answers of free calls are not kept" in body["detail"]
    assert body["receipt"]["receipt_hash"] == ran[1]["receipt"]["receipt_hash"]
