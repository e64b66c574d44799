"""`/openapi.json` and what the routes really answer: statuses, media types and bodies, errors included."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import aiohttp
import pytest

from divault.values import ModelId, Usdc
from tests.e2e.conftest import World
from tests.e2e.test_http_identity import RUN, body_of, send, signer
from tests.e2e.test_http_payment import PRICE, pay, priced
from tests.schemas import mismatch

pytestmark = pytest.mark.asyncio(loop_scope="session")
_SHOWN_ONLY = {"description", "examples", "default", "additionalProperties"}
GET_CASES: list[tuple[str, str, int]] = [
    ("/health", "/health", 200),
    ("/health/live", "/health/live", 200),
    ("/health/ready", "/health/ready", 200),
    ("/metrics", "/metrics", 200),
    ("/api/v1/node", "/api/v1/node", 200),
    ("/api/v1/models", "/api/v1/models", 200),
    ("/api/v1/models/{model_id}", "/api/v1/models/MODEL", 200),
    ("/api/v1/models/{model_id}", "/api/v1/models/-x", 400),
    ("/api/v1/models/{model_id}", "/api/v1/models/nobody-made-it", 404),
    ("/api/v1/results/{request_id}", "/api/v1/results/REQUEST", 401),
    ("/v2", "/v2", 200),
    ("/v2/health/live", "/v2/health/live", 200),
    ("/v2/health/ready", "/v2/health/ready", 200),
    ("/v2/models/{model_id}", "/v2/models/MODEL", 200),
    ("/v2/models/{model_id}", "/v2/models/MODEL?version=2", 200),
    ("/v2/models/{model_id}", "/v2/models/-x", 400),
    ("/v2/models/{model_id}", "/v2/models/nobody-made-it", 404),
    ("/v2/models/{model_id}/ready", "/v2/models/MODEL/ready", 200),
    ("/v2/models/{model_id}/ready", "/v2/models/MODEL/ready?version=2", 200),
    ("/v2/models/{model_id}/ready", "/v2/models/nobody-made-it/ready", 404),
    ("/v2/models/{model_id}/versions/{version}", "/v2/models/MODEL/versions/1", 200),
    ("/v2/models/{model_id}/versions/{version}", "/v2/models/MODEL/versions/2", 404),
    ("/v2/models/{model_id}/versions/{version}/ready", "/v2/models/MODEL/versions/1/ready", 200),
    ("/v2/models/{model_id}/versions/{version}/ready", "/v2/models/MODEL/versions/2/ready", 404),
    ("/v1/models", "/v1/models", 200),
    ("/v1/models/{model_id}", "/v1/models/MODEL", 200),
    ("/v1/models/{model_id}", "/v1/models/-x", 400),
    ("/v1/models/{model_id}", "/v1/models/nobody-made-it", 404),
]
"""Route, path, and the status that it is answered with."""


async def described(world: World) -> dict[str, Any]:
    return (await world.request("GET", "/openapi.json"))[1]


async def required_as_described(
    world: World, document: dict[str, Any], route: str, method: str, path: str, **arguments: Any
) -> int:
    """Send a request; gives its status. Fails where the answer is not one of those described."""
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, world.node.url + path, **arguments) as response,
    ):
        body = await response.json(content_type=None) if "json" in response.content_type else await response.text()
        answers = document["paths"][route][method.lower()]["responses"]
        assert str(response.status) in answers, (method, path, response.status, body)
        content = answers[str(response.status)]["content"]
        assert list(content) == [response.content_type], (method, path, response.status)
        schema = plain(content[response.content_type].get("schema", {}), document)
        assert mismatch(body, schema) == "", (method, path, response.status, body)
        return response.status


def plain(schema: Any, document: Mapping[str, Any]) -> Any:
    """The schema without references, and without what only people read."""
    if isinstance(schema, list):
        return [plain(one, document) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return plain(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]], document)
    found = {name: part for name, part in schema.items() if name not in _SHOWN_ONLY}
    members = {name: plain(part, document) for name, part in found.pop("properties", {}).items()}
    return {name: plain(part, document) for name, part in found.items()} | ({"properties": members} if members else {})


async def loaded(world: World) -> ModelId:
    model, key = ModelId.parse("described-model"), await world.consumer()
    if (await world.request("GET", f"/api/v1/models/{model}"))[0] != 200:
        await world.publish(model.text)
    async with world.client(key) as client:
        await client.load(model.text)
    return model


async def test_what_reads_answers_as_it_is_described(world: World) -> None:
    document, model = await described(world), await loaded(world)
    for route, path, status in GET_CASES:
        sent = path.replace("MODEL", model.text).replace("REQUEST", "0x" + "11" * 32)
        assert await required_as_described(world, document, route, "GET", sent) == status, path
        squeezed = {"content-encoding": "gzip"}
        assert await required_as_described(world, document, route, "GET", sent, headers=squeezed) == 400
    elsewhere = {"x-forwarded-for": "192.0.2.1"}

    assert await required_as_described(world, document, "/metrics", "GET", "/metrics", headers=elsewhere) == 404
    reading = {route for route, methods in document["paths"].items() if "get" in methods}
    assert reading == {route for route, _, _ in GET_CASES}, "a route without a case above"


async def test_a_stored_answer_and_a_stored_refusal_are_as_described(world: World) -> None:
    document, model, key = await described(world), await priced(world), await world.consumer()
    who = await signer(world, key)
    statuses = []
    for features in (world.trained.rows[0], [1.0]):
        body = body_of(world, model, key) | {"input_data": {"features": features}}
        body["payment"] = {"tx_hash": await pay(world, key)}
        request = who.post(RUN, model, body, PRICE)
        await send(world, request)
        path = f"/api/v1/results/{request.id}"
        headers = dict(who.bare("GET", path).exchange.headers or {})
        route = "/api/v1/results/{request_id}"
        statuses.append(await required_as_described(world, document, route, "GET", path, headers=headers))
    for name in ("0x12", "0x" + "11" * 32):
        path = f"/api/v1/results/{name}"
        headers = dict(who.bare("GET", path).exchange.headers or {})
        statuses.append(await required_as_described(world, document, route, "GET", path, headers=headers))

    assert statuses == [200, 422, 400, 404]


async def test_what_runs_and_ends_answers_as_it_is_described(world: World) -> None:
    document, model, key = await described(world), await loaded(world), await world.consumer()
    as_json = {"content-type": "application/json"}
    unsigned: list[tuple[str, str, str]] = [
        ("DELETE", "/api/v1/cache", "/api/v1/cache"),
        ("DELETE", "/api/v1/models/{model_id}", f"/api/v1/models/{model}"),
        ("DELETE", "/api/v1/models/{model_id}", "/api/v1/models/-x"),
        *(("POST", route, route.replace("{model_id}", model.text).replace("{version}", "1"))
          for route, methods in document["paths"].items() if "post" in methods),
    ]  # fmt: skip
    for method, route, path in unsigned:
        for data in (b"{}", b"[", b'{"model": "no-such-model", "user_address": 1}'):
            await required_as_described(world, document, route, method, path, data=data, headers=as_json)
    run = (await signer(world, key)).post(RUN, model, body_of(world, model, key), Usdc(0))
    sent: Any = {"data": run.exchange.body, "headers": as_json}

    assert await required_as_described(world, document, RUN, "POST", RUN, **sent) == 200


async def test_nothing_is_described_that_never_happens(world: World) -> None:
    document = await described(world)
    assert not {"HTTPValidationError", "ValidationError"} & document["components"]["schemas"].keys()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            told = {(one["in"], one["name"]) for one in operation.get("parameters", [])}
            assert told == {("path", name) for name in re.findall(r"{(\w+)}", path)}, path
            for status, answer in operation["responses"].items():
                assert "HTTPValidationError" not in str(answer), (path, status)
