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


def documented(success: Any, *problems: int) -> dict[int | str, dict[str, Any]]:
    """Name the answers of a route: its body for 200, and a problem document for each of the other statuses."""
    found: dict[int | str, dict[str, Any]] = {200: {"model": success}}
    for status in problems:
        found[status] = {"model": schemas.Problem, "content": {"application/problem+json": {}}}
    return found
