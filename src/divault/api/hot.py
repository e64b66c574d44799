"""The routes that models are run by, found before the framework looks: finding one in its list costs more than a run.

They stand in the framework's list too, which describes them (OpenAPI) and leads to the same functions; errors become
the same problem documents on both ways.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from divault.api.envelope import Incoming
from divault.api.guard import BODY_DONE
from divault.api.presence import Presence
from divault.api.problems import problem_response
from divault.errors import DivaultError
from divault.telemetry import new_request_id
from divault.values import Answer

Handler = Callable[[Incoming], Awaitable[Response]]


class RunningResponse(Response):
    """An answer that is sent while its run goes on."""

    run: asyncio.Task[Answer]


class HotRoutes:
    """Answers POST requests on paths that `find` knows by itself, and hands all others on to `app`."""

    def __init__(self, app: ASGIApp, find: Callable[[str], Handler | None], presence: Presence) -> None:
        self._app = app
        self._find = find
        self._presence = presence

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # its server leaves out the body
        handler = self._find(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if handler is None:
            await self._app(scope, receive, send)
            return
        incoming = await incoming_of(scope, receive)
        with self._presence.of(receive):
            response = await _answered(handler, incoming)
            del incoming  # how long the answer takes is its reader's matter
            _let_go(scope, response)
            await response(scope, receive, send)


async def incoming_of(scope: Scope, receive: Receive) -> Incoming:
    """The request, whose body stands whole in the first message (`Guard` sees to it)."""
    message = await receive()
    if message["type"] != "http.request":
        raise ClientDisconnect
    client = scope.get("client")
    return Incoming(
        raw=message.get("body", b""),
        method=scope["method"],
        path=scope["raw_path"].decode("latin-1"),
        query=scope["query_string"].decode("latin-1"),
        headers=[(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]],
        peer=client[0] if client else "",
    )


def _let_go(scope: Scope, response: Response) -> None:
    """Give the bytes of the body back, now or when the run has ended."""
    body_done = scope.get(BODY_DONE)
    if body_done is None:
        return
    if isinstance(response, RunningResponse):
        response.run.add_done_callback(lambda _: body_done())
    else:
        body_done()


async def _answered(handler: Handler, incoming: Incoming) -> Response:
    try:
        return await handler(incoming)
    except DivaultError as err:
        return problem_response(err, err.request_id or new_request_id(), incoming.path)
