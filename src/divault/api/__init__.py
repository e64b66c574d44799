"""The HTTP face of a node: FastAPI routes behind a guard, errors as problem documents."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp

from divault.api.describing import without_the_framework
from divault.api.guard import Guard
from divault.api.hot import HotRoutes
from divault.api.inference_protocol import BINARY_HEADER
from divault.api.measured import Measured, Routes
from divault.api.metrics_route import MetricsFor, add_metrics
from divault.api.node import Node
from divault.api.presence import Presence
from divault.api.problems import STATUS, failure_response, problem_response
from divault.api.routes import hot_handlers, routes
from divault.errors import BadRequest, DivaultError, MethodNotAllowed, RouteUnknown
from divault.limits import PeerLimits
from divault.metrics import Metrics
from divault.telemetry import new_request_id
from divault.traces import Traces

__all__ = ["ApiLimits", "Node", "create_api"]

_ABOUT = (
    "Runs sealed models for wallets that may: gated by tokens, paid to their owners, answered with signed receipts."
)


@dataclass(frozen=True, slots=True)
class ApiLimits:
    """What is decided before a request is read."""

    peers: PeerLimits
    max_body_bytes: int
    metrics: Metrics = field(default_factory=Metrics)
    metrics_for: MetricsFor = "off"
    """Who may read `/metrics`: nobody, this machine alone, everybody."""
    traces: Traces | None = None
    log_successes: bool = False
    cors_origins: Sequence[str] = ()
    """Browser origins that may call; none by default."""


class _Described(FastAPI):
    """Its description says what the routes answer, and nothing of what they never do."""

    def openapi(self) -> dict[str, Any]:
        """The description, made when it is first asked for."""
        if self.openapi_schema is None:
            self.openapi_schema = without_the_framework(super().openapi())
        return self.openapi_schema


def create_api(node: Node, limits: ApiLimits) -> Measured:
    """Build the ASGI application of a node."""
    # No redirects: a signature is for one path, and their target would be whatever the Host header says.
    app = _Described(title="DIV Inference Backend", version=node.version, description=_ABOUT, redirect_slashes=False)
    router = routes(node)
    add_metrics(router, limits.metrics, limits.metrics_for)
    app.include_router(router)
    app.add_exception_handler(DivaultError, _refused)
    every = [route for route in (*router.routes, *app.routes) if isinstance(route, Route)]
    app.add_exception_handler(HTTPException, _unrouted(every))
    app.add_exception_handler(Exception, _failed)
    hot = HotRoutes(app, hot_handlers(node), Presence())
    guarded: ASGIApp = Guard(hot, limits=limits.peers, max_body_bytes=limits.max_body_bytes)
    templates = [getattr(route, "path", "") for route in (*router.routes, *app.routes)]
    served = [
        (route.path, method) for route in router.routes if isinstance(route, Route) for method in route.methods or ()
    ]
    limits.metrics.expect(codes=STATUS, faults=served)
    if limits.cors_origins:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=list(limits.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=[
                *("divault-code", "payment-required", "payment-response", "retry-after", "x-request-id"),
                BINARY_HEADER,
            ],
        )
    # Around everything, so that a browser's question before its request has an id and is counted too.
    return Measured(guarded, limits.metrics, Routes(templates), traces=limits.traces, verbose=limits.log_successes)


async def _refused(request: Request, error: Exception) -> Response:
    if not isinstance(error, DivaultError):
        raise error
    return problem_response(error, error.request_id or new_request_id(), request.url.path)


def _unrouted(routes: Sequence[Route]) -> Callable[[Request, Exception], Awaitable[Response]]:
    """What answers where none of the routes does."""

    async def answer(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 500)
        if status == 405:
            allowed = ", ".join(sorted(_methods_at(request, routes)))
            refusal: DivaultError = MethodNotAllowed(
                f"{request.method} is not answered here, but {allowed}", allowed=allowed
            )
        elif status == 404:
            refusal = RouteUnknown("no such route; GET /docs lists them")
        else:
            refusal = BadRequest("the request can't be read")
        return problem_response(refusal, new_request_id(), request.url.path)

    return answer


def _methods_at(request: Request, routes: Sequence[Route]) -> set[str]:
    """All that is answered at the path of a request. The framework names those of the first route only."""
    found: set[str] = set()
    for route in routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            found |= route.methods or set()
    return found | {"HEAD"} if "GET" in found else found


async def _failed(request: Request, error: Exception) -> Response:
    return failure_response(error, request.url.path)
