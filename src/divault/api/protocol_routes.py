"""The routes of the Open Inference Protocol, version 2. What is translated, and how, is in `inference_protocol`."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from divault.api import schemas
from divault.api.describing import JSON, answer_response, body_of, documented, json_response
from divault.api.envelope import Incoming, unsigned_object
from divault.api.hot import Handler, incoming_of
from divault.api.inference_protocol import (
    BINARY_HEADER,
    EXTENSIONS,
    VERSION,
    Translation,
    index,
    metadata,
    object_in,
    truth_in,
)
from divault.api.node import Node
from divault.errors import BadRequest, ModelNotLoaded, RouteUnknown
from divault.values import ModelId
from divault.workers.pool import Loaded

_MODELS, _INFER = "/v2/models/", "/infer"
_TAGS: list[Any] = ["open inference protocol"]


def protocol_handler(node: Node, path: str) -> Handler | None:
    """What answers POST on this path, if it is one where a model is run."""
    if not path.startswith(_MODELS) or not path.endswith(_INFER):
        return None
    name, named, version = path[len(_MODELS) : -len(_INFER)].partition("/versions/")

    async def infer(incoming: Incoming) -> Response:
        _require_version(version if named else VERSION)
        call = node.envelopes.foreign(incoming, ModelId.parse(name))
        translation = Translation(incoming.raw, incoming.header(BINARY_HEADER))
        answer = await node.service.infer(call, load=False, dialect=translation.dialect)
        response = answer_response(answer)
        if (size := translation.header_size(answer.body)) is not None:
            response.headers.update({BINARY_HEADER: str(size), "content-type": "application/octet-stream"})
        return response

    return infer


def add_protocol(router: APIRouter, node: Node) -> None:
    """Add the routes of the protocol to a router."""
    _add_server(router, node)
    _add_models(router, node)
    _add_repository(router, node)


def _add_server(router: APIRouter, node: Node) -> None:
    @router.get("/v2", tags=_TAGS, responses=documented(schemas.ServerOut))
    async def server() -> Response:
        """Name and version of the server."""
        return json_response({"name": "divault", "version": node.version, "extensions": list(EXTENSIONS)})

    @router.get("/v2/health/live", tags=_TAGS, responses=documented(schemas.Live))
    async def live() -> Response:
        """Answer as long as the process serves at all."""
        return json_response({"live": True})

    @router.get("/v2/health/ready", tags=_TAGS, responses=documented(schemas.Ready, told={503: schemas.Ready}))
    async def ready() -> Response:
        """Whether calls of models that are loaded can be served now."""
        ok = await node.health.ready()
        return json_response({"ready": ok}, 200 if ok else 503)


def _add_models(router: APIRouter, node: Node) -> None:
    about: dict[str, Any] = {"tags": _TAGS, "responses": documented(schemas.ModelTensors, 404)}
    whether: dict[str, Any] = {
        "tags": _TAGS,
        "responses": documented(schemas.ModelReady, 404, told={503: schemas.ModelReady}),
    }
    runs: dict[str, Any] = {
        "tags": _TAGS,
        "openapi_extra": body_of(schemas.TENSORS_IN),
        "responses": documented(schemas.Tensors, 401, 402, 403, 404, 409, 422, 502, 504),
    }
    one, version_of_it = _MODELS + "{model_id}", _MODELS + "{model_id}/versions/{version}"

    @router.get(one, **about)
    async def model(model_id: str) -> Response:
        """What a loaded model takes and gives."""
        loaded = _loaded(node, model_id)
        return json_response(metadata(loaded.model.text, loaded.description))

    @router.get(version_of_it, **about)
    async def model_version(model_id: str, version: str) -> Response:
        """What a loaded model takes and gives."""
        _require_version(version)
        return await model(model_id)

    @router.get(one + "/ready", **whether)
    async def model_ready(model_id: str) -> Response:
        """Whether a model answers now."""
        ok = _loaded(node, model_id).state == "ready"
        return json_response({"name": model_id, "ready": ok}, 200 if ok else 503)

    @router.get(version_of_it + "/ready", **whether)
    async def model_version_ready(model_id: str, version: str) -> Response:
        """Whether a model answers now."""
        _require_version(version)
        return await model_ready(model_id)

    @router.post(one + _INFER, **runs)
    async def infer(request: Request, model_id: str) -> Response:
        """Run a loaded model. Signed in headers (ERC-8128) or of a session; gated, paid from credit; receipted."""
        handler = protocol_handler(node, request.scope["path"])
        if handler is None:
            raise RouteUnknown(f"no model is called {model_id[:80]}")
        return await handler(await incoming_of(request.scope, request.receive))

    @router.post(version_of_it + _INFER, **runs)
    async def infer_version(request: Request, model_id: str, version: str) -> Response:  # noqa: ARG001 - described
        """Run a loaded model. Signed in headers (ERC-8128) or of a session; gated, paid from credit; receipted."""
        return await infer(request, model_id)


def _add_repository(router: APIRouter, node: Node) -> None:
    @router.post("/v2/repository/index", tags=_TAGS, responses=documented(list[schemas.ModelState]))
    async def repository(request: Request) -> Response:
        """What is loaded; with `ready` in the body only what answers now."""
        asked = unsigned_object(await incoming_of(request.scope, request.receive))
        only_ready = truth_in(asked, "ready", default=False)
        states = ((loaded.model.text, loaded.state) for loaded in node.workers.loaded())
        rows = index(states, only_ready=only_ready)
        return Response(orjson.dumps(rows), 200, {"cache-control": "no-store"}, JSON)

    @router.post(
        "/v2/repository/models/{model_id}/load",
        tags=_TAGS,
        responses=documented(schemas.Nothing, 401, 402, 403, 404, 409, 502, 504),
    )
    async def load(request: Request, model_id: str) -> Response:
        """Fetch, verify, open and load a model. Signed in headers or of a session; the gate must be open."""
        incoming = await incoming_of(request.scope, request.receive)
        _require_no_parameters(incoming, {})
        await node.service.load(node.envelopes.foreign(incoming, ModelId.parse(model_id)))
        return json_response({})

    @router.post(
        "/v2/repository/models/{model_id}/unload",
        tags=_TAGS,
        responses=documented(schemas.Nothing, 401, 403, 404),
    )
    async def unload(request: Request, model_id: str) -> Response:
        """End the model's worker. Signed in headers by an operator or the model's owner."""
        incoming = await incoming_of(request.scope, request.receive)
        _require_no_parameters(incoming, {"unload_dependents": False})
        await node.service.unload(node.envelopes.foreign(incoming, ModelId.parse(model_id), session_does=False))
        return json_response({})


def _loaded(node: Node, model_id: str) -> Loaded:
    model = ModelId.parse(model_id)
    for loaded in node.workers.loaded():
        if loaded.model.key == model.key:
            return loaded
    raise ModelNotLoaded(
        f"{model} is not loaded here: POST /v2/repository/models/{model}/load first", model_id=model.text
    )


def _require_no_parameters(incoming: Incoming, neutral: dict[str, Any]) -> None:
    """Return only if a body changes nothing of what the vault names. Raises BadRequest, TooLarge."""
    for name, value in object_in(unsigned_object(incoming), "parameters").items():
        if name not in neutral or value is not neutral[name]:
            raise BadRequest(
                f"{name[:80]} is not taken here: a node loads what the vault names, as it is", field="parameters"
            )


def _require_version(version: str) -> None:
    if version != VERSION:
        raise RouteUnknown(f"a model has the version {VERSION} and no other here")
