"""`GET /metrics`, for whom the operator lets read it."""

from __future__ import annotations

import asyncio
import ipaddress
from typing import Literal

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from divault.api.describing import documented
from divault.errors import RouteUnknown
from divault.metrics import CONTENT_TYPE, Metrics

MetricsFor = Literal["off", "local", "on"]
_FORWARDED = ("forwarded", "via", "x-forwarded", "x-real-ip", "cf-", "true-client-ip")
"""How the names of headers begin that proxies add."""


def add_metrics(router: APIRouter, metrics: Metrics, whom: MetricsFor) -> None:
    """Add the route to a router; to others than those who may read it, it is a route that isn't there."""

    @router.get("/metrics", tags=["node"], response_class=PlainTextResponse, responses=documented(None, 404))
    async def read(request: Request) -> Response:
        """Read the node's figures in Prometheus' text form."""
        if whom == "off" or (whom == "local" and not _is_local(request)):
            raise RouteUnknown("no such route; GET /docs lists them")
        return Response(await asyncio.to_thread(metrics.text), 200, {"cache-control": "no-store"}, CONTENT_TYPE)


def _is_local(request: Request) -> bool:
    """Whether it was sent from this machine, and not through a proxy on it."""
    if request.client is None or any(name.startswith(_FORWARDED) for name in request.headers):
        return False
    try:
        return ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False
