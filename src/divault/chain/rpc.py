"""JSON-RPC over HTTP to one chain through several endpoints.

Rules:

1. An endpoint is used only after it proved chain id and genesis block, and proves them again on every new connection:
   an answer that came over a new connection is released only after that proof. What isn't configured is learned from
   the first endpoint that answers and kept for the life of the `Rpc`.
2. An answer is used only if it is HTTP 200, whole, within the size limit, JSON-RPC 2.0 with the ids asked for, and of
   the shape that the request's parser demands. Anything else is the endpoint's fault, and the next endpoint is asked.
3. An error object is an answer, not a fault: `Reverted` says that the EVM ran and failed, `Refused` is any other one.
   A `Refused` is asked of the remaining endpoints too (a lagging node doesn't know a block that another has).
4. When no endpoint is left: ChainUnavailable, naming per host what failed. A URL may hold an API key, so no message,
   log or exception chain carries more than host and port.

```python
rpc = Rpc.parse(Secret.of_text("https://a.example/KEY,https://b.example"), chain_id=8453)
number = await rpc.call(Request("eth_blockNumber", (), quantity))
```
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Self, TypeVar

import aiohttp
import orjson
from yarl import URL

from divault.chain.answers import Refused, Request, Reverted, parse_answers
from divault.chain.records import Malformed, block, optional, quantity
from divault.errors import ChainUnavailable, SettingsInvalid
from divault.values import BlockRef, Digest, Secret

T = TypeVar("T")

_HEADERS = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
_SETTING = "WEB3_PROVIDER_URL"


@dataclass(frozen=True, slots=True)
class RpcLimits:
    """Bounds of every exchange with an endpoint."""

    timeout_s: float = 5.0
    """From sending to the last byte, per endpoint and HTTP request."""
    max_bytes: int = 16_000_000
    """Of one HTTP answer: a block range full of logs fits, a runaway server doesn't."""
    max_batch: int = 50
    """Calls per HTTP request; public endpoints refuse batches over 100 and some over 50."""
    rest_s: float = 1.0
    """How long an endpoint is asked last after its first fault; doubles with each, up to 30 s."""


class Rpc:
    """A client of one chain. Bound to the event loop of its first call; safe for concurrent use within it."""

    def __init__(
        self,
        urls: Sequence[Secret],
        chain_id: int | None = None,
        *,
        genesis: Digest | None = None,
        limits: RpcLimits | None = None,
    ) -> None:
        """Connects at the first call. `genesis` is the hash of block 0. Raises SettingsInvalid for an unusable URL."""
        if not urls:
            raise SettingsInvalid("name at least one RPC endpoint", setting=_SETTING)
        self.chain_id = chain_id
        self.genesis = genesis
        self.limits = limits or RpcLimits()
        self.calls = 0
        """JSON-RPC calls sent so far, proofs of the chain id included."""
        self.round_trips = 0
        """HTTP requests sent so far."""
        self._endpoints = [_Endpoint(self, url) for url in urls]
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    def parse(
        cls,
        urls: Secret,
        chain_id: int | None = None,
        *,
        genesis: Digest | None = None,
        limits: RpcLimits | None = None,
    ) -> Self:
        """From a comma-separated list of http(s) URLs, the preferred one first. Raises SettingsInvalid."""
        parts = [part.strip() for part in urls.reveal().decode("utf-8", "replace").split(",")]
        return cls([Secret.of_text(part) for part in parts if part], chain_id, genesis=genesis, limits=limits)

    @property
    def hosts(self) -> tuple[str, ...]:
        """Host and port of each endpoint; all of a URL that may be shown."""
        return tuple(endpoint.name for endpoint in self._endpoints)

    def __repr__(self) -> str:
        return f"Rpc({', '.join(self.hosts)}, chain {self.chain_id})"

    async def connect(self) -> int:
        """The chain id, proved by an endpoint now. Raises ChainUnavailable."""
        answer = (await self._ask([Request("eth_chainId", (), quantity)]))[0]
        if not isinstance(answer, int) or answer != self.chain_id:
            raise ChainUnavailable("the RPC endpoint does not tell its chain id", retry_after=2)
        return answer

    async def call(self, request: Request[T]) -> T:
        """The parsed result. Raises Reverted, Refused, ChainUnavailable."""
        answer = (await self._ask([request]))[0]
        if isinstance(answer, Reverted | Refused):
            raise answer
        return answer  # type: ignore[no-any-return]  # parse_answers ran this request's own parser

    async def batch(self, requests: Sequence[Request[T]]) -> list[T | Reverted | Refused]:
        """One entry per request, in order, in as few HTTP requests as the limit allows. Raises ChainUnavailable."""
        step = self.limits.max_batch
        answers: list[T | Reverted | Refused] = []
        for start in range(0, len(requests), step):
            answers += await self._ask(requests[start : start + step])
        return answers

    async def close(self) -> None:
        """Close all connections. A later call opens new ones."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _ask(self, requests: Sequence[Request[Any]]) -> list[Any]:
        faults: list[tuple[str, _Fault]] = []
        refused: list[Any] | None = None
        for endpoint in sorted(self._endpoints, key=_Endpoint.resting):  # stable: the configured order among the well
            try:
                answers = await endpoint.ask(requests)
            except _Fault as fault:
                faults.append((endpoint.name, fault))
                continue
            if not any(isinstance(answer, Refused) for answer in answers):
                return answers
            refused = answers
        if refused is not None:
            return refused
        said = "; ".join(f"{name} {fault}" for name, fault in faults)
        if all(isinstance(fault, _OtherChain) for _, fault in faults):
            raise ChainUnavailable(
                f"no RPC endpoint is of this chain: {said}. Set DIVAULT_CHAIN_ID or {_SETTING} right"
            )
        raise ChainUnavailable(
            f"no RPC endpoint answered {requests[0].method}: {said}. Try again shortly", retry_after=2
        )

    def session(self) -> aiohttp.ClientSession:
        """The shared session, opened in the running loop at first use. For this module."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                auto_decompress=False,  # a small body can't unfold into a large one
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=_HEADERS,
                timeout=aiohttp.ClientTimeout(total=self.limits.timeout_s),
                trace_configs=[_connection_tracer()],
            )
        return self._session


class _Fault(Exception):
    """Why an endpoint can't be used now; its text holds nothing of the URL and goes into ChainUnavailable."""


class _OtherChain(_Fault):
    """It answers, for a chain that is not the configured one: asking again helps nobody."""


class _Dropped(Exception):
    """A kept connection had been closed by the other end before it answered."""


class _Endpoint:
    """One URL, whether it proved its chain, and how long it is asked last."""

    def __init__(self, rpc: Rpc, url: Secret) -> None:
        self.name = _host(url)
        self._rpc = rpc
        self._url = url
        self._proved = False
        self._proving = asyncio.Lock()
        self._faults = 0
        self._rest_until = 0.0
        self._next_id = 1

    def resting(self) -> bool:
        """True for a while after a fault: it is asked last."""
        return time.monotonic() < self._rest_until

    async def ask(self, requests: Sequence[Request[Any]]) -> list[Any]:
        """Answers of an endpoint that proved its chain on the connection used. Raises _Fault."""
        try:
            if not self._proved:
                async with self._proving:
                    if not self._proved:
                        await self._prove()
            answers, new_connection = await self._exchange(requests)
            if new_connection:
                await self._prove()
        except _Fault:
            self._proved = False
            self._faults += 1
            self._rest_until = time.monotonic() + min(30.0, self._rpc.limits.rest_s * 2 ** min(self._faults - 1, 5))
            raise
        self._faults = 0
        return answers

    async def _prove(self) -> None:
        """Chain id and genesis are those of the configuration (or the first seen). Raises _Fault."""
        requests: list[Request[Any]] = [
            Request("eth_chainId", (), quantity),
            Request("eth_getBlockByNumber", ("0x0", False), optional(block)),
        ]
        (chain_id, first), _ = await self._exchange(requests)
        expected = self._rpc.chain_id
        if not isinstance(chain_id, int) or chain_id != (chain_id if expected is None else expected):
            shown = chain_id if isinstance(chain_id, int) else "no chain id"
            raise _OtherChain(f"serves another chain ({shown} instead of {expected})")
        known = self._rpc.genesis
        if isinstance(first, BlockRef):
            if known not in (None, first.hash):
                raise _OtherChain("serves another chain (same id, other genesis block)")
            self._rpc.genesis = first.hash
        elif known is not None:
            raise _Fault("does not show its genesis block")
        self._rpc.chain_id = chain_id
        self._proved = True

    async def _exchange(self, requests: Sequence[Request[Any]]) -> tuple[list[Any], bool]:
        """Answers, and whether a new connection was made for them. Raises _Fault."""
        first_id = self._next_id
        self._next_id += len(requests)
        items = [
            {"jsonrpc": "2.0", "id": first_id + index, "method": request.method, "params": request.params}
            for index, request in enumerate(requests)
        ]
        payload = orjson.dumps(items if len(items) > 1 else items[0])
        self._rpc.calls += len(requests)
        try:
            body, new_connection = await self._post(payload)
        except _Dropped:  # the server closed an idle connection: that is no fault yet, a new one is asked once
            body, new_connection = await self._post(payload)
        try:
            answers = parse_answers(body, requests, first_id)
        except Malformed as err:
            raise _Fault(f"answered {requests[0].method} with {self._without_key(str(err))}") from None
        for answer in answers:
            if isinstance(answer, Reverted | Refused):
                answer.message = self._without_key(answer.message)
        return answers, new_connection

    def _without_key(self, text: str) -> str:
        """A stranger's words without any part of the URL that could be an API key: providers do quote them."""
        url = URL(self._url.reveal().decode())
        for part in {*url.parts, *url.query.values(), url.user or "", url.password or ""}:
            if len(part) >= 6:  # shorter ones ("v2", "/") are no keys
                text = text.replace(part, "***")
        return text

    async def _post(self, payload: bytes) -> tuple[bytes, bool]:
        trace = SimpleNamespace(new=False)
        self._rpc.round_trips += 1
        try:
            async with self._rpc.session().post(
                URL(self._url.reveal().decode()), data=payload, allow_redirects=False, trace_request_ctx=trace
            ) as response:
                return await self._whole_body(response), trace.new
        except TimeoutError:
            raise _Fault(f"timed out after {self._rpc.limits.timeout_s:g} s") from None
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as err:
            if not trace.new and not isinstance(err, aiohttp.ClientConnectorError):
                raise _Dropped from None
            raise _Fault(f"is unreachable ({type(err).__name__})") from None
        except (aiohttp.ClientError, ValueError) as err:  # their texts may quote the URL: only the class is told
            raise _Fault(f"failed ({type(err).__name__})") from None

    async def _whole_body(self, response: aiohttp.ClientResponse) -> bytes:
        if response.status != 200:
            raise _Fault(f"answered HTTP {response.status}")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise _Fault("answered with an encoded body")
        limit = self._rpc.limits.max_bytes
        body = bytearray()
        async for piece in response.content.iter_any():
            body += piece
            if len(body) > limit:
                raise _Fault(f"answered more than {limit} bytes")
        return bytes(body)


def _connection_tracer() -> aiohttp.TraceConfig:
    """Marks the request (its `trace_request_ctx.new`) for which a connection was made."""

    async def mark(_session: aiohttp.ClientSession, context: SimpleNamespace, _params: object) -> None:
        context.trace_request_ctx.new = True

    tracer = aiohttp.TraceConfig()
    tracer.on_connection_create_end.append(mark)
    return tracer


def _host(url: Secret) -> str:
    try:
        parsed = URL(url.reveal().decode())
        name = f"{parsed.host}:{parsed.port}"
    except ValueError:
        raise SettingsInvalid("an RPC endpoint is not a URL", setting=_SETTING) from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise SettingsInvalid("an RPC endpoint starts with http:// or https:// and names a host", setting=_SETTING)
    return name
