"""A JSON-RPC endpoint on loopback that keeps the rules, until it is told how to break one."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import web

from divault.values import Secret

CHAIN_ID = 77002
GENESIS = "0x" + "11" * 32
Misbehaviour = Callable[["Stub", web.Request, Any], Awaitable[web.StreamResponse]]


class Stub:
    """One endpoint: its chain, what it counted, and how it misbehaves (None: not at all)."""

    def __init__(self) -> None:
        self.chain_id = CHAIN_ID
        self.genesis: str | None = GENESIS
        self.number = 7
        self.timestamp = 1_700_000_000
        self.answers: dict[str, Any] = {"eth_blockNumber": {"result": "0x7"}}
        self.contracts: dict[str, dict[str, Any]] = {}
        """Outcome of an `eth_call` by the selector of its data."""
        self.counted: Counter[str] = Counter()
        self.breaks: Misbehaviour | None = None
        self.delay_s = 0.0
        self.port = 0

    @property
    def url(self) -> Secret:
        """With a key in it, as providers give them."""
        return Secret.of_text(f"http://127.0.0.1:{self.port}/v2/KEY-THAT-NOBODY-SEES")

    def answer(self, call: dict[str, Any]) -> dict[str, Any]:
        """The right answer to one call."""
        method = call["method"]
        self.counted[method] += 1
        if method == "eth_chainId":
            outcome: dict[str, Any] = {"result": hex(self.chain_id)}
        elif method == "eth_getBlockByNumber":
            outcome = {"result": self._block(call["params"][0])}
        elif method == "eth_call":
            outcome = self.contracts[call["params"][0]["data"][2:10]]
        else:
            outcome = self.answers.get(method, {"error": {"code": -32601, "message": "no such method"}})
        return {"jsonrpc": "2.0", "id": call["id"], **outcome}

    def answer_all(self, asked: Any) -> Any:
        """The right answer to a call or a batch."""
        return [self.answer(call) for call in asked] if isinstance(asked, list) else self.answer(asked)

    def _block(self, which: str) -> dict[str, Any] | None:
        if which == "0x0":
            return self.genesis and {"number": "0x0", "hash": self.genesis, "timestamp": "0x0"}
        return {"number": hex(self.number), "hash": f"0x{self.number:064x}", "timestamp": hex(self.timestamp)}

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """One HTTP exchange."""
        asked = json.loads(await request.read())
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        proving = isinstance(asked, list) and asked[0]["method"] == "eth_chainId"
        if self.breaks is not None and not proving:
            return await self.breaks(self, request, asked)
        return web.json_response(self.answer_all(asked))


@contextlib.asynccontextmanager
async def serving(stub: Stub | None = None) -> AsyncIterator[Stub]:
    """The stub on a port of the system's choice."""
    stub = stub or Stub()
    app = web.Application()
    app.router.add_post("/v2/KEY-THAT-NOBODY-SEES", stub.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", stub.port)
    await site.start()
    stub.port = runner.addresses[0][1]
    try:
        yield stub
    finally:
        await runner.cleanup()
