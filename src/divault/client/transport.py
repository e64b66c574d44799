"""One HTTP exchange with a node: bytes out, bytes or a typed error back."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from divault import errors
from divault.errors import DivaultError, NotReady

_MAX_ANSWER = 64 * 1024 * 1024  # bytes of one answer: four times what nodes let a model say
_PROBLEM = "application/problem+json"


@dataclass(frozen=True, slots=True)
class Exchange:
    """What goes out: `path` as signed, raw body, headers."""

    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] | None = None


class Transport:
    """Exchanges with the node at `url`. Follows no redirect: a signed request has one addressee."""

    def __init__(self, url: str, *, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=10)
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def send(self, exchange: Exchange) -> bytes:
        """Give the body of a success. Raises the error that the node answered with, NotReady without an answer."""
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout)
        headers = {"accept": "application/json", **(exchange.headers or {})}
        if exchange.body:
            headers["content-type"] = "application/json"
        try:
            async with self._session.request(
                exchange.method,
                self.url + exchange.path,
                data=io.BytesIO(exchange.body) if exchange.body else None,  # a file goes out in pieces
                headers=headers,
                allow_redirects=False,
            ) as response:
                raw = await _bounded(response)
        except (aiohttp.ClientError, TimeoutError) as err:
            raise NotReady(f"no answer from the node at {self.url}: {type(err).__name__}") from err
        if response.status != 200:
            raise _problem(response, raw)
        return raw


async def _bounded(response: aiohttp.ClientResponse) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_chunked(1 << 16):
        size += len(chunk)
        if size > _MAX_ANSWER:
            raise NotReady(f"the node's answer is over {_MAX_ANSWER} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def _problem(response: aiohttp.ClientResponse, raw: bytes) -> DivaultError:
    try:
        members: Any = orjson.loads(raw) if response.content_type == _PROBLEM else None
    except orjson.JSONDecodeError:
        members = None
    if not isinstance(members, dict):
        return NotReady(f"the node's answer has status {response.status} and is no problem document: is this a node?")
    error = errors.from_code(str(members.get("code")), str(members.get("detail")), members)
    receipt = members.get("receipt")
    error.evidence = receipt if isinstance(receipt, dict) else None
    return error
