"""A server on loopback with two doors: at `url` faults act, at the inner one it is always honest.

A fault gets the request, and may have the honest answer for it, which it takes from the inner door; so faults can
spoil whatever the server does, without the server knowing of them.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

_PER_HOP = {"host", "connection", "content-length", "transfer-encoding", "keep-alive", "date", "server", "expect"}
_MAX_BODY_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Answer:
    """An honest answer as a whole. `headers` leave out what belongs to one connection, and the length."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The value of the body. Raises ValueError."""
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that came to the public door. `body` is the value of a JSON body, else None."""

    method: str
    path: str
    headers: dict[str, str] = field(repr=False)
    body: Any = None


class Honest(Protocol):
    """The answer that a request would get without faults; with `without`, one that lacks these headers."""

    async def __call__(self, *, without: Iterable[str] = ()) -> Answer:
        """Ask the inner door."""


Fault = Callable[[web.Request, Honest], Awaitable[web.StreamResponse | None]]
"""What a host does instead; None leaves the request to the next fault, and after the last to the host itself."""


class Host:
    """One server. `faults` may be changed at any time; `asked` are the requests in order of arrival."""

    def __init__(self, routes: Iterable[web.AbstractRouteDef], middlewares: Sequence[Middleware] = ()) -> None:
        self.faults: list[Fault] = []
        self.asked: list[Asked] = []
        self.url = ""
        """`http://127.0.0.1:PORT` while it runs."""
        self._routes, self._middlewares = list(routes), middlewares
        self._runner: web.AppRunner | None = None
        self._session: aiohttp.ClientSession | None = None
        self._inner = ""

    async def start(self) -> None:
        """Listen on two ports that the system chooses."""
        app = web.Application(middlewares=[self._spoil, *self._middlewares], client_max_size=_MAX_BODY_BYTES)
        app.add_routes(self._routes)
        # A client that hangs up ends its handler: a silent host does not keep it for ever.
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        for _ in range(2):
            await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url, self._inner = ("http://{}:{}".format(*address[:2]) for address in self._runner.addresses)
        self._session = aiohttp.ClientSession(auto_decompress=False)

    async def stop(self) -> None:
        """Close both doors; requests that are still held end."""
        if self._session is not None:
            await self._session.close()
        if self._runner is not None:
            await self._runner.cleanup()
        self._session, self._runner, self.url = None, None, ""

    @web.middleware
    async def _spoil(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._came_inside(request):
            return await handler(request)
        is_json = request.content_type == "application/json" and request.body_exists
        body = _value(await request.read()) if is_json else None
        self.asked.append(Asked(request.method, request.path_qs, dict(request.headers), body))

        async def honest(*, without: Iterable[str] = ()) -> Answer:
            return await self._ask_inside(request, {name.lower() for name in without})

        for fault in tuple(self.faults):
            response = await fault(request, honest)
            if response is not None:
                return response
        return await handler(request)

    def _came_inside(self, request: web.Request) -> bool:
        name = request.transport.get_extra_info("sockname") if request.transport is not None else None
        return name is not None and self._inner.endswith(f":{name[1]}")

    async def _ask_inside(self, request: web.Request, without: set[str]) -> Answer:
        if self._session is None:
            raise RuntimeError("the host does not run")
        left_out = _PER_HOP | without
        headers = {name: value for name, value in request.headers.items() if name.lower() not in left_out}
        body = await request.read() if request.body_exists else None
        async with self._session.request(
            request.method, self._inner + request.raw_path, headers=headers, data=body, allow_redirects=False
        ) as response:
            told = {name: value for name, value in response.headers.items() if name.lower() not in _PER_HOP}
            return Answer(response.status, told, await response.read())


def _value(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None
