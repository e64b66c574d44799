"""The routes of OpenAI's interface. What is translated, and how, is in `openai`."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from divault.api import schemas
from divault.api.describing import answer_response, body_of, documented, json_response
from divault.api.envelope import Incoming
from divault.api.hot import Handler, RunningResponse, incoming_of
from divault.api.measured import STREAM_CODE
from divault.api.node import Node
from divault.api.openai import TASKS, Asked, Kind, chunk, delta, dialect
from divault.api.problems import openai_error, problem
from divault.errors import DivaultError, ModelNotLoaded
from divault.models.base import Piece
from divault.telemetry import new_request_id
from divault.values import Answer, ModelId
from divault.workers.pool import Loaded

_PATHS: dict[str, Kind] = {
    "/v1/embeddings": "embeddings",
    "/v1/completions": "completions",
    "/v1/chat/completions": "chat",
}
_DONE = b"data: [DONE]\n\n"
_documented = partial(documented, problem=schemas.OpenAiProblem)


def openai_handlers(node: Node) -> dict[str, Handler]:
    """What answers POST on each path of the interface."""
    return {path: _handler(node, kind) for path, kind in _PATHS.items()}


def add_openai(router: APIRouter, node: Node) -> None:
    """Add the routes of the interface to a router."""
    handlers = openai_handlers(node)
    for path, kind in _PATHS.items():
        router.add_api_route(
            path,
            _described(handlers[path], kind),
            methods=["POST"],
            name=kind,
            tags=["openai"],
            openapi_extra=body_of(schemas.OPENAI[kind]),
            responses=_documented(schemas.OpenAiAnswer, 401, 402, 403, 404, 409, 422, 502, 504),
        )

    @router.get("/v1/models", tags=["openai"], responses=_documented(schemas.OpenAiModels))
    async def models() -> Response:
        """What is loaded."""
        return json_response({"object": "list", "data": [_model(loaded) for loaded in node.workers.loaded()]})

    @router.get("/v1/models/{model_id}", tags=["openai"], responses=_documented(schemas.OpenAiModel, 404))
    async def model(model_id: str) -> Response:
        """One loaded model."""
        key = ModelId.parse(model_id).key
        for loaded in node.workers.loaded():
            if loaded.model.key == key:
                return json_response(_model(loaded))
        raise ModelNotLoaded("this model is not loaded here: the first call loads it", model_id=model_id)


def _described(handler: Handler, kind: Kind) -> Any:
    async def route(request: Request) -> Response:
        return await handler(await incoming_of(request.scope, request.receive))

    route.__doc__ = (
        f"Run a model of the task {TASKS[kind]}, loading it if need be. Signed in headers (ERC-8128) or of a session, "
        "gated, paid from credit; with a receipt."
    )
    return route


def _model(loaded: Loaded) -> dict[str, Any]:
    about = {"id": loaded.model.text, "object": "model", "created": loaded.loaded_at, "owned_by": "its publisher"}
    return about | {"task": loaded.description.task}


def _handler(node: Node, kind: Kind) -> Handler:
    async def run(incoming: Incoming) -> Response:
        asked = Asked(kind, incoming.raw)
        call = node.envelopes.foreign(incoming, asked.model)
        name, created = secrets.token_hex(12), int(time.time())
        if not asked.stream:
            with _InItsWords(asked):
                answer = await node.service.infer(call, load=True, dialect=dialect(asked, name, created))
            return answer_response(answer)
        pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        how = dialect(asked, name, created, pieces.put_nowait)
        running = asyncio.create_task(node.service.infer(call, load=True, dialect=how))
        running.add_done_callback(lambda _: pieces.put_nowait(None))
        with _InItsWords(asked):
            return await _Stream(asked, name, created, running, pieces).begun()

    return run


class _InItsWords:
    """Errors in its context name fields as the interface calls them."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, DivaultError) and isinstance(error.data.get("field"), str):
            error.data["field"] = self._asked.name_of(error.data["field"])


class _Stream(RunningResponse):
    """Server-sent events of an answer that is being made. It ends its run when nobody reads it any more."""

    def __init__(
        self, asked: Asked, name: str, created: int, running: asyncio.Task[Answer], pieces: asyncio.Queue[Piece | None]
    ) -> None:
        super().__init__(None, 200, {"cache-control": "no-store"}, "text/event-stream")
        del self.headers["content-length"]
        self._asked, self._name, self._created = asked, name, created
        self.run = running
        self._pieces = pieces
        self._first: Piece | None = None
        self._code: str | None = None
        running.add_done_callback(lambda _: asked.forget())

    async def begun(self) -> _Stream:
        """Wait for the first piece or the end. Raises what the run raised before it gave anything."""
        try:
            self._first = await self._pieces.get()
            if self._first is None:
                await self.run
        except asyncio.CancelledError:
            await _ended(self.run)
            raise
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        """Send all of it; an error within it stands in the scope too, for whoever counts."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events():
                await send({"type": "http.response.body", "body": event, "more_body": True})
            if self._code is not None:
                scope[STREAM_CODE] = self._code
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await _ended(self.run)

    async def _events(self) -> AsyncIterator[bytes]:
        begun: set[int] = set()
        piece = self._first
        while piece is not None:
            yield self._chunk([self._delta(begun, piece.index, piece.text)])
            piece = await self._pieces.get()
        shown = bool(begun)
        try:
            body = orjson.loads((await self.run).body)
        except DivaultError as err:
            self._code = err.code
            told = problem(err, err.request_id or new_request_id())
            yield b"data: " + orjson.dumps(told | {"error": openai_error(told)}) + b"\n\n"
            return
        if not self._asked.members:  # a kept answer: nobody took the request apart for it
            self._asked.read()
            self._asked.forget()
        for choice in body["choices"]:
            text = "" if shown else choice.get("text", choice.get("message", {}).get("content", ""))
            if text:
                yield self._chunk([self._delta(begun, choice["index"], text)])
        ends = [self._delta(begun, choice["index"], "", choice["finish_reason"]) for choice in body["choices"]]
        yield self._chunk(ends, receipt=body["receipt"])
        if self._asked.usage_in_stream:
            yield self._chunk([], usage=body["usage"])
        yield _DONE

    def _delta(self, begun: set[int], index: int, text: str, finish: str | None = None) -> dict[str, Any]:
        """A choice of a chunk, and that there was one for this index."""
        first = index not in begun
        begun.add(index)
        return delta(self._asked, index, text, finish, first=first)

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return chunk(self._asked, self._name, self._created, choices, **more)


async def _ended(running: asyncio.Task[Answer]) -> None:
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError, DivaultError):
        await running
