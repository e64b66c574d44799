"""JSON over HTTP to the hosts of a service that nobody has to trust: bounded answers, typed failures, no redirects.

Rules:

1. An answer has at most 256 KiB, and is JSON: whatever says so, HTML with status 200 is a failure.
2. 429 and 503 are asked again after `Retry-After` (at most 10 s, twice), with the same bytes; nothing else is.
3. A redirect is not followed: a bearer token goes to the configured host alone.
4. No error repeats a token, a body that was sent, or more than 200 printable characters of what came.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import time
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from divault.errors import SettingsInvalid, StorageFailed
from divault.values import Secret

MAX_ANSWER_BYTES = 256 * 1024
MAX_WAIT_S = 10.0
TRIES = 3
_DEFAULT_WAIT_S = 1.0
_BUSY = (429, 503)
_UNPRINTABLE = re.compile(r"[^ -~]+")


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: its status and text."""

    host: str
    status: int
    text: str
    retry_after: float | None = None

    def json(self) -> Any:
        """The value. Raises StorageFailed (`not_json`)."""
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError) as err:
            kind = "a web page" if self.text.lstrip()[:1] == "<" else "something that is not JSON"
            raise self.failed(f"answered {kind} with HTTP {self.status}", reason="not_json") from err

    def failed(self, detail: str, *, reason: str | None = None) -> StorageFailed:
        """The error that says what this answer was."""
        waits = {} if self.retry_after is None else {"retry_after": self.retry_after}
        return StorageFailed(
            f"{self.host}: {detail}", gateway=self.host, reason=reason or f"http_{self.status}", **waits
        )

    def words(self) -> str:
        """What the service says went wrong, in at most 200 printable characters; messages may be nested."""
        try:
            told = self.json()
        except StorageFailed as err:
            return err.detail.partition(": ")[2]
        for _ in range(4):
            if isinstance(told, str) and told[:1] in ("{", "["):
                told = _decoded(told)
            if isinstance(told, list) and told:
                told = told[0]
            if isinstance(told, dict):
                told = told.get("message") or told.get("error") or ""
        return _UNPRINTABLE.sub(" ", told if isinstance(told, str) else "")[:200]


class ApiHost:
    """One base URL."""

    def __init__(self, url: str, setting: str, *, timeout_s: float = 30.0) -> None:
        """`timeout_s` bounds a whole exchange of `ask`. Raises SettingsInvalid for what is no http or https URL."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise SettingsInvalid(f"{setting} is written like https://host.example", setting=setting)
        self.name = parts.netloc
        self._base = url.rstrip("/")
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(10.0, timeout_s))
        self._session: aiohttp.ClientSession | None = None

    async def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        """The answer of any status. Raises StorageFailed: `unreachable`, `timeout`, `busy`, `too_large`."""
        session = self._open_session()
        told = {"Accept": "*/*", "Content-Type": "application/json", **(headers or {})}
        data = None if body is None else json.dumps(body, separators=(",", ":")).encode()

        async def once() -> Reply:
            async with (
                failures_of(self.name),
                session.request(
                    method, self._base + path, data=data, headers=told, timeout=self._timeout, allow_redirects=False
                ) as response,
            ):
                return await read_reply(self.name, response)

        return await patiently(once)

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession(headers={"User-Agent": "divault"})
        return self._session


async def patiently(once: Callable[[], Awaitable[Reply]]) -> Reply:
    """The reply of an exchange that is done again while the service asks for patience, by rule 2.

    Raises StorageFailed (`busy`) when it still does at the end.
    """
    for left in reversed(range(TRIES)):
        reply = await once()
        if reply.status not in _BUSY or (reply.status == 503 and reply.retry_after is None):
            return reply
        wait = _DEFAULT_WAIT_S if reply.retry_after is None else reply.retry_after
        if not left or wait > MAX_WAIT_S:
            raise reply.failed(f"is busy (HTTP {reply.status}): try again in {wait:g} s", reason="busy")
        await asyncio.sleep(wait)
    raise AssertionError  # the loop ends by return or raise


async def read_reply(host: str, response: aiohttp.ClientResponse) -> Reply:
    """The whole answer. Raises StorageFailed (`too_large`)."""
    if 300 <= response.status < 400:
        raise StorageFailed(
            f"{host}: answered with a redirect, which no token follows: set the URL that it really has",
            gateway=host,
            reason="redirect",
        )
    body = bytearray()
    async for piece in response.content.iter_chunked(64 * 1024):
        body += piece
        if len(body) > MAX_ANSWER_BYTES:
            raise StorageFailed(
                f"{host}: answered more than {MAX_ANSWER_BYTES} bytes", gateway=host, reason="too_large"
            )
    return Reply(
        host, response.status, body.decode("utf-8", "replace"), _seconds(response.headers.get("Retry-After", ""))
    )


@asynccontextmanager
async def failures_of(host: str) -> AsyncIterator[None]:
    """Turn what the transport raises into StorageFailed."""
    try:
        yield
    except TimeoutError as err:
        raise StorageFailed(f"{host}: no answer in time", gateway=host, reason="timeout") from err
    except (aiohttp.ClientError, OSError, ValueError) as err:
        kind = "unreachable" if isinstance(err, aiohttp.ClientConnectorError) else "cut"
        raise StorageFailed(
            f"{host}: the exchange broke off ({type(err).__name__})", gateway=host, reason=kind
        ) from err


def bearer(token: Secret, setting: str) -> str:
    """The header value. Raises SettingsInvalid for what no header can carry."""
    text = token.reveal().decode("utf-8", "replace")
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise SettingsInvalid("the token has characters that no header can carry", setting=setting)
    return f"Bearer {text}"


def _seconds(text: str) -> float | None:
    """`Retry-After`, as seconds or as a date."""
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time())
    except ValueError:
        return None


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
