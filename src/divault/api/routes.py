"""The HTTP routes: each parses, calls one method of the service and shows what it gave.

Authentication has no list of protected paths: a route that touches a model or changes state can only be written with a
`SignedCall`, and only the service turns one into an answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from divault.api import schemas, views
from divault.api.describing import answer_response, body_of, documented, json_response
from divault.api.envelope import Incoming, require_json
from divault.api.hot import Handler, incoming_of
from divault.api.node import Node
from divault.api.openai_routes import add_openai, openai_handlers
from divault.api.protocol_routes import add_protocol, protocol_handler
from divault.api.sign_in_routes import add_sign_in
from divault.values import Digest, ModelId, SignedCall

_INFERENCE, _RUN = "/api/v1/inference", "/api/v1/inference/run"


def routes(node: Node) -> APIRouter:
    """Build the router of one node."""
    router = APIRouter()
    _add_public(router, node)
    _add_models(router, node)
    _add_inference(router, node)
    add_sign_in(router, node)
    add_protocol(router, node)
    add_openai(router, node)
    return router


def _add_public(router: APIRouter, node: Node) -> None:
    @router.get("/health", tags=["node"], responses=documented(schemas.HealthOut, told={503: schemas.HealthOut}))
    async def health() -> Response:
        """Every part of the node, really probed within the last 5 seconds."""
        checks = await node.health.checks()
        body = views.health_view(checks, node.sandbox(), node.version)
        return json_response(body, 200 if body["status"] == "healthy" else 503)

    @router.get("/health/live", tags=["node"], responses=documented(schemas.Status))
    async def live() -> Response:
        """Answer as long as the process serves at all."""
        return json_response({"status": "alive"})

    @router.get("/health/ready", tags=["node"], responses=documented(schemas.Status, told={503: schemas.Status}))
    async def ready() -> Response:
        """Whether calls of models that are loaded can be served now."""
        ok = await node.health.ready()
        return json_response({"status": "ready" if ok else "not ready"}, 200 if ok else 503)

    @router.get("/api/v1/node", tags=["node"], responses=documented(schemas.NodeOut))
    async def node_route() -> Response:
        """Who this node is: address, age recipient, chain, vault, rails, limits, and its signed descriptor."""
        return json_response(await node.describe())


def _add_models(router: APIRouter, node: Node) -> None:
    @router.post(
        "/api/v1/models/load",
        tags=["models"],
        openapi_extra=body_of(schemas.LoadBody),
        responses=documented(schemas.LoadAnswer, 401, 402, 403, 404, 409, 422, 502, 504),
    )
    async def load(request: Request) -> Response:
        """Fetch, verify, open and load a model. Signed; the gate must be open for the wallet."""
        result = await node.service.load(await _call(node, request))
        return json_response(views.load_view(result, await node.ledger.successes(result.model.model)))

    @router.get("/api/v1/models", tags=["models"], responses=documented(schemas.ModelsAnswer))
    async def models() -> Response:
        """What is loaded."""
        rows = [views.worker_view(loaded) for loaded in node.workers.loaded()]
        ids = [row["model_id"] for row in rows]
        return json_response({"status": "success", "loaded_models": ids, "count": len(ids), "models": rows})

    @router.get("/api/v1/models/{model_id}", tags=["models"], responses=documented(schemas.ModelAnswer, 404))
    async def model(model_id: str) -> Response:
        """What the vault says of a model, and what its worker says if it is loaded."""
        parsed = ModelId.parse(model_id)
        info = await node.gates.info(parsed)
        view: dict[str, Any] = {"model_id": model_id, "state": "not loaded"}
        view |= views.vault_view(info, await node.ledger.successes(parsed))
        for loaded in node.workers.loaded():
            if loaded.model.key == parsed.key:
                view |= views.worker_view(loaded)
        return json_response({"status": "success", "model_info": view})

    @router.delete("/api/v1/models/{model_id}", tags=["models"], responses=documented(schemas.Answer, 401, 403, 404))
    async def unload(request: Request, model_id: str) -> Response:
        """End the model's worker. ERC-8128 headers of an operator or of the model's owner."""
        parsed = await node.service.unload(await _call(node, request, ModelId.parse(model_id), session_does=False))
        return json_response({"status": "success", "message": f"{parsed} is unloaded"})

    @router.delete("/api/v1/cache", tags=["models"], responses=documented(schemas.Answer, 401, 403))
    async def clear(request: Request) -> Response:
        """Unload all models and drop cached ciphertext. ERC-8128 headers of an operator."""
        models, freed = await node.service.clear_caches(await _call(node, request, session_does=False))
        message = (
            f"{models} models unloaded, {freed.entries} files and {freed.bytes} bytes of ciphertext dropped, "
            f"{freed.in_use} in use kept"
        )
        told = {"models_unloaded": models, "entries_freed": freed.entries, "bytes_freed": freed.bytes}
        return json_response({"status": "success", "message": message, **told, "entries_in_use": freed.in_use})


def _add_inference(router: APIRouter, node: Node) -> None:
    told: Any = {
        "tags": ["inference"],
        "openapi_extra": body_of(schemas.InferenceBody),
        "responses": documented(schemas.InferenceAnswer, 401, 402, 403, 404, 409, 422, 502, 504),
    }

    hot = _own_handlers(node)

    @router.post(_INFERENCE, **told)
    async def inference(request: Request) -> Response:
        """Run a loaded model. Signed, gated, paid for if it has a price; answers with a signed receipt."""
        return await hot[_INFERENCE](await _incoming(request))

    @router.post(_RUN, **told)
    async def run(request: Request) -> Response:
        """Load the model if need be, and run it."""
        return await hot[_RUN](await _incoming(request))

    @router.get(
        "/api/v1/results/{request_id}",
        tags=["inference"],
        # Also the error that the request ended with.
        responses=documented(schemas.InferenceAnswer, 401, 402, 403, 404, 409, 422, 502, 504),
    )
    async def result(request: Request, request_id: str) -> Response:
        """Give the stored answer and receipt of a request, to its wallet. ERC-8128 headers, or a session."""
        call = await _call(node, request)
        return answer_response(await node.service.result(call, Digest.parse(request_id)))


def hot_handlers(node: Node) -> Callable[[str], Handler | None]:
    """What answers POST on a path, where that is one on which models are run."""
    own = _own_handlers(node) | openai_handlers(node)
    return lambda path: own.get(path) or protocol_handler(node, path)


def _own_handlers(node: Node) -> dict[str, Handler]:

    async def inference(incoming: Incoming) -> Response:
        return answer_response(await node.service.infer(_parsed(node, incoming), load=False))

    async def run(incoming: Incoming) -> Response:
        return answer_response(await node.service.infer(_parsed(node, incoming), load=True))

    return {_INFERENCE: inference, _RUN: run}


def _parsed(node: Node, incoming: Incoming, model: ModelId | None = None, *, session_does: bool = True) -> SignedCall:
    if incoming.method == "POST":
        require_json(incoming)
    return node.envelopes.parse(incoming, model, session_does=session_does)


async def _call(node: Node, request: Request, model: ModelId | None = None, *, session_does: bool = True) -> SignedCall:
    return _parsed(node, await _incoming(request), model, session_does=session_does)


async def _incoming(request: Request) -> Incoming:
    return await incoming_of(request.scope, request.receive)
