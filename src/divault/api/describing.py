"""JSON responses, and how a route's answers stand in OpenAPI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from pydantic import BaseModel
from starlette.responses import Response

from divault.api import schemas
from divault.values import Answer

JSON = "application/json"
PROBLEM = "application/problem+json"
_OF_THE_GUARD = (400, 413, 429, 503)
_OF_THE_FRAMEWORK = {"$ref": "#/components/schemas/HTTPValidationError"}
_NOTHING_ELSE: Mapping[int, Any] = {}
_OF_ANSWERS = ((b"content-type", JSON.encode()), (b"cache-control", b"no-store"))


def json_response(body: Mapping[str, Any], status: int = 200) -> Response:
    """Build a response that nobody keeps."""
    return Response(orjson.dumps(body), status, {"cache-control": "no-store"}, JSON)


def answer_response(answer: Answer) -> Response:
    """Build the response of a run, under the id of its signed request, so that a line of the log leads to its receipt.

    A kept answer that is given again goes under an id of its own.
    """
    headers = [(b"content-length", b"%d" % len(answer.body)), *_OF_ANSWERS]
    if answer.receipt is not None:
        headers.append((b"x-request-id", answer.receipt.envelope["receipt"]["requestHash"].encode()))
    return _Ready(answer.body, headers)


class _Ready(Response):
    """A response whose headers are bytes already."""

    def __init__(self, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        self.status_code = 200
        self.background = None
        self.body = body
        self.raw_headers = headers


def body_of(schema: type[BaseModel] | Mapping[str, Any], *, required: bool = True) -> dict[str, Any]:
    """Show a JSON body of a route, which is parsed from raw bytes; `schema` is a model, or JSON Schema itself."""
    shown = schema if isinstance(schema, Mapping) else schema.model_json_schema()
    return {"requestBody": {"required": required, "content": {JSON: {"schema": shown}}}}


def documented(
    success: Any, *problems: int, problem: type[BaseModel] = schemas.Problem, told: Mapping[int, Any] = _NOTHING_ELSE
) -> dict[int | str, dict[str, Any]]:
    """Name the answers of a route: its body for 200, and a problem document for each of the other statuses.

    Those that the guard gives in front of every route are added. `told`: bodies of statuses that are no problem.
    """
    found: dict[int | str, dict[str, Any]] = {200: {"model": success}}
    for status in sorted({*problems, *_OF_THE_GUARD}):
        found[status] = {"model": problem, "content": {PROBLEM: {}}}
    return found | {status: {"model": body} for status, body in told.items()}


def without_the_framework(document: dict[str, Any]) -> dict[str, Any]:
    """The description of all routes without what the framework adds by itself, and this program never answers.

    That is its own check of parameters, which are texts here and parsed by the routes, and problems in the media type
    of the route's successes.
    """
    for operation in (operation for path in document["paths"].values() for operation in path.values()):
        answers = operation["responses"]
        for status, answer in tuple(answers.items()):
            content = answer.get("content", {})
            if content.get(JSON, {}).get("schema") == _OF_THE_FRAMEWORK:
                del answers[status]
            elif PROBLEM in content:
                answer["content"] = {PROBLEM: next(shown for kind, shown in content.items() if kind != PROBLEM)}
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    return document
