"""Whatever a caller sends, and wherever, is in no line of a real node's log and in none of its figures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from divault.cli.top import read
from divault.client.signing import Signed
from divault.messages import address_of
from divault.testing.node import NodeProcess
from divault.values import ModelId, Usdc
from tests.e2e.conftest import World

pytestmark = pytest.mark.asyncio(loop_scope="session")
RUN, LOAD = "/api/v1/inference/run", "/api/v1/models/load"
ORIGIN = "https://app.example"
PATHS = [
    RUN, LOAD, "/api/v1/inference", "/api/v1/cache", "/api/v1/models/{}", "/api/v1/results/{}", "/v1/embeddings",
    "/api/v1/auth/nonce", "/api/v1/auth/login", "/api/v1/auth/logout", "/v1/chat/completions", "/v2/models/{}/infer",
    "/v2/models/{}/versions/{}/infer", "/{}", "/health/live",
]  # fmt: skip
FIELDS = [
    "model_id", "user_address", "input_data", "user_signature", "nonce", "issued_at", "max_price", "parameters",
    "payment", "decryption_key", "lighthouse_authorization", "cid", "vault", "model", "input", "messages", "inputs",
    "message", "signature", "spend", "everywhere",
]  # fmt: skip
HEADERS = [
    "authorization", "cookie", "signature", "signature-input", "content-digest", "x-payment", "payment-signature",
    "user-agent", "referer", "x-request-id", "divault-max-price", "divault-timeout", "traceparent", "content-type",
    "content-encoding", "origin", "idempotency-key", "divault-payment",
]  # fmt: skip
TELLTALE = "zqtell"
SECRETS = st.text("abcdefghijklmnopqrstuvwxyzABCDEF0123456789", max_size=30).map(TELLTALE.__add__)


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def talkative(world: World, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[NodeProcess]:
    """A node that logs everything it ever logs."""
    more = {
        "DIVAULT_OPERATORS": str(address_of(world.operator)),
        "DEBUG": "true",
        "DIVAULT_CORS_ORIGINS": ORIGIN,
        "DIVAULT_RATE_LIMIT_PER_IP_PER_MINUTE": "100000",
    }
    async with world.other_node(tmp_path_factory.mktemp("talkative"), **more) as node:
        yield node


def logged(node: NodeProcess) -> str:
    return (node.folder / "logs/div-backend.log").read_text()


async def logged_with(node: NodeProcess, told: str) -> str:
    """The log, once it has this: a line is written right after its answer has left."""
    async with asyncio.timeout(10):
        while told not in (log := logged(node)):
            await asyncio.sleep(0.01)
    return log


async def send(world: World, node: NodeProcess, request: Signed) -> str:
    headers = dict(request.exchange.headers or {}) | {"content-type": "application/json"}
    path = request.exchange.path
    _, _, told = await world.request("POST", path, node, data=request.exchange.body, headers=headers)
    return told["x-request-id"]


class Door:
    """Where requests of one test go; named shortly where a test fails."""

    def __init__(self, world: World, node: NodeProcess) -> None:
        self.world = world
        self.node = node


@pytest.fixture(scope="module")
def door(world: World, talkative: NodeProcess) -> Door:
    return Door(world, talkative)


@settings(deadline=None, max_examples=100)
@given(
    path=st.sampled_from(PATHS),
    method=st.sampled_from(["POST", "GET", "DELETE", "PUT"]),
    fields=st.dictionaries(st.sampled_from(FIELDS), SECRETS | st.lists(SECRETS, max_size=2), max_size=8),
    headers=st.dictionaries(st.sampled_from(HEADERS), SECRETS, max_size=5),
    secret=SECRETS,
    bearer=st.booleans(),
)
async def test_unproved_requests(
    door: Door, *, path: str, method: str, fields: dict[str, Any], headers: dict[str, str], secret: str, bearer: bool
) -> None:
    where = path.replace("{}", secret) + f"?{secret}={secret}"
    body = json.dumps(fields | {secret: secret})
    if bearer and "authorization" in headers:
        headers["authorization"] = f"Bearer div1_{headers['authorization']}"
    status, answer, told = await door.world.request(method, where, door.node, data=body, headers=headers)

    assert status < 500, answer
    assert TELLTALE not in await logged_with(door.node, told["x-request-id"])


async def test_a_session_leaves_neither_its_token_nor_its_text(world: World, talkative: NodeProcess) -> None:
    model = (await world.publish("session-logged", node=talkative)).text
    async with world.client(await world.consumer(), talkative) as client:
        login = await client.sign_in(spend="0.01")
        headers = {"authorization": f"Bearer {login.token}", "idempotency-key": TELLTALE}
        body = {"model_id": model, "input_data": {"features": world.trained.rows[0]}}
        status, answer, _ = await world.request("POST", RUN, talkative, json=body, headers=headers)
        await client.sign_out(login.token)
        _, _, told = await world.request("POST", RUN, talkative, json=body, headers=headers)
    log = await logged_with(talkative, told["x-request-id"])
    request = answer["receipt"]["request"]

    assert status == 200, answer
    secrets = (login.token, login.token[5:45], request["message"], answer["receipt"]["request_signature"][2:], TELLTALE)
    assert [secret for secret in secrets if secret in log] == []


@pytest.mark.parametrize(
    ("path", "members"),
    [
        (RUN, {"input_data": {"features": [1.0, 2.0, TELLTALE]}}),
        (RUN, {"input_data": {TELLTALE: TELLTALE}}),
        (RUN, {"input_data": {"features": "right"}, "parameters": {TELLTALE: TELLTALE}}),
        (RUN, {"input_data": {"features": "right"}, "payment": {"tx_hash": "0x" + TELLTALE}}),
        (RUN, {"input_data": {"features": "right"}, "decryption_key": TELLTALE}),
        (LOAD, {"decryption_key": TELLTALE}),
        (LOAD, {"lighthouse_authorization": TELLTALE}),
        (LOAD, {"cid": TELLTALE}),
    ],
)
async def test_proved_requests(world: World, talkative: NodeProcess, path: str, members: dict[str, Any]) -> None:
    """Here the caller's words reach the model, the key search and the ledger."""
    model = await published(world, talkative)
    key = await world.consumer()
    if path == LOAD:
        await unload(world, talkative, model)
    members = json.loads(json.dumps(members).replace('"right"', json.dumps([*world.trained.rows[0]])))
    body = {"model_id": model.text, "user_address": str(address_of(key))} | members
    async with world.client(key, talkative) as client:
        request = (await client._signer()).post(path, model, body, Usdc(0))
    told = await send(world, talkative, request)

    log = (await logged_with(talkative, told)).lower()
    assert TELLTALE not in log
    assert str(address_of(key)).lower()[2:] not in log
    assert TELLTALE not in str((await asyncio.to_thread(read, talkative.url)).samples)


async def published(world: World, node: NodeProcess) -> ModelId:
    """One model for this file, published once, and loaded."""
    model = ModelId.parse("talked-about")
    found = await world.request("GET", f"/api/v1/models/{model}", node)
    return model if found[0] == 200 else await world.publish(model.text, node=node)


async def unload(world: World, node: NodeProcess, model: ModelId) -> None:
    """By the operator."""
    async with world.client(world.operator, node) as client:
        if any(row["model_id"] == model.text for row in await client.models()):
            await client.unload(model.text)


async def test_a_success_is_one_line_with_its_id(world: World, talkative: NodeProcess) -> None:
    model, key = await published(world, talkative), await world.consumer()
    before = len(logged(talkative).splitlines())
    async with world.client(key, talkative) as client:
        result = await client.run(model.text, {"features": world.trained.rows[0]})
    _, _, last = await world.request("GET", "/health/live", talkative)
    log = await logged_with(talkative, last["x-request-id"])
    lines = [json.loads(line) for line in log.splitlines()[before:]]
    (line,) = (line for line in lines if line.get("route") == RUN and line["status"] == 200)

    assert set(line) == {
        "request_id", "route", "method", "status", "code", "milliseconds", "bytes", "event", "level", "timestamp"
    }  # fmt: skip
    assert (line["level"], line["code"], line["request_id"]) == ("debug", None, result.request_id)
    assert line["bytes"] > 500


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/health"), ("GET", "/health/live"), ("GET", "/api/v1/node"), ("GET", "/api/v1/models"),
        ("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/metrics"), ("GET", "/nowhere"), ("PATCH", "/health"),
        ("POST", "/api/v1/inference"), ("OPTIONS", "/api/v1/inference"), ("HEAD", "/health"), ("GET", "/v2"),
    ],
)  # fmt: skip
async def test_every_answer_has_an_id_and_is_counted(
    world: World, talkative: NodeProcess, method: str, path: str
) -> None:
    asking = {"origin": ORIGIN, "access-control-request-method": "POST"} if method == "OPTIONS" else {}
    before = await counted(talkative, method, path)
    status, headers = await head_of(talkative, method, path, asking)
    after = await counted(talkative, method, path)

    assert headers["x-request-id"].startswith("0x")
    await logged_with(talkative, headers["x-request-id"])
    more = {key: after[key] - before.get(key, 0) for key in after}
    assert more.get(str(status)) == (2 if path == "/metrics" else 1), (before, after)


async def test_what_is_no_http_is_counted_and_told_once(talkative: NodeProcess) -> None:
    before, written = await counted(talkative, "other", "no route"), len(logged(talkative).splitlines())
    where = urlsplit(talkative.url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    writer.write(f"\x00{TELLTALE}\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    after, lines = await counted(talkative, "other", "no route"), logged(talkative).splitlines()[written:]

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert after["400"] - before.get("400", 0) == 1
    assert len([line for line in lines if '"status": 400' in line]) == 1
    assert not any("libraries" in line or TELLTALE in line for line in lines)


async def counted(node: NodeProcess, method: str, path: str) -> dict[str, float]:
    """How many answers there were on this route, by status."""
    found = await asyncio.to_thread(read, node.url)
    route = path if path in {dict(tags).get("route") for _, tags in found.samples} else "other"
    statuses = found.labels("divault_requests_total", "status")
    name = "divault_requests_total"
    return {one: found.value(name, method=method, status=one, route=route) for one in statuses}


async def head_of(node: NodeProcess, method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str]]:
    async with aiohttp.ClientSession() as session, session.request(method, node.url + path, headers=headers) as answer:
        await answer.read()
        return answer.status, {name.lower(): value for name, value in answer.headers.items()}


async def test_the_secret_of_a_key_is_never_spelled(talkative: NodeProcess) -> None:
    keys = [path.read_text().strip() for path in (talkative.folder / "state").glob("*.key")]

    assert keys
    assert all(word not in logged(talkative) for key in keys for word in key.split() if len(word) > 20)
