"""What the serving benchmarks share: a node with a model on a chain of its own, plain FastAPI beside it, and the load.

The load comes from wrk, one thread, keep-alive: the same bytes again and again, or signed requests, each of them sent
once. CPU time is that of a whole process tree; requests per second swing with what else the machine does.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from divault.client import AsyncClient
from divault.client.signing import Signer
from divault.devnet.content import ContentStore
from divault.messages import address_of
from divault.publishing import Listing, Publisher, SealedTo
from divault.testing import TestChain
from divault.testing.node import NodeProcess, node_environment, serving_node
from divault.values import Address, ModelId, Secret, Usdc

_HZ = os.sysconf("SC_CLK_TCK")
_MINIMUM = 1
_SETTINGS = {
    "RATE_LIMIT_PER_MINUTE": "10000000",
    "MAX_CONCURRENT_INFERENCES": "10000",
    "DIVAULT_RATE_LIMIT_PER_IP_PER_MINUTE": "100000000",
}
_LUA = """
local file = assert(io.open(%(path)s, "rb"))
local all = file:read("*a")
file:close()
local requests, at = {}, 1
while at <= #all do
  local size = tonumber(all:sub(at, at + 7), 16)
  requests[#requests + 1] = all:sub(at + 8, at + 7 + size)
  at = at + 8 + size
end
local next = 0
request = function()
  next = next %% #requests + 1
  return requests[next]
end
done = function(s, l, r)
  local e = s.errors
  io.write(string.format('\\n@@{"requests":%%d,"secs":%%.6f,"p50":%%.3f,"p99":%%.3f,"broken":%%d,"refused":%%d}\\n',
    s.requests, s.duration / 1e6, l:percentile(50) / 1e3, l:percentile(99) / 1e3,
    e.connect + e.read + e.write + e.timeout, e.status))
end
"""


@dataclass(frozen=True)
class Load:
    """What one run of the load generator gave."""

    requests: int
    per_second: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    """CPU time of the server's whole process tree per request."""


@dataclass(frozen=True)
class Serving:
    """A node that holds models, on a chain of its own."""

    chain: TestChain
    store: ContentStore
    node: NodeProcess
    folder: Path
    wallets: list[Secret]

    def client(self, key: Secret) -> AsyncClient:
        """A client of the node."""
        known = self.folder / "known.json"
        return AsyncClient(self.node.url, key, rpc=self.chain.devnet.url, known_nodes=known, timeout_s=60)

    async def publish(self, name: str, path: Path) -> ModelId:
        """Seal the model to the node, register it with a token gate and no price, and have the node load it."""
        async with self.client(self.wallets[0]) as client:
            sealed_to = SealedTo.of(await client.node())
            publisher = Publisher(self.chain.publisher, self.chain.vault, self.store.url)
            listing = Listing(ModelId.parse(name), Usdc(0), self.chain.token, _MINIMUM)
            model = (await publisher.publish(path, listing, [sealed_to])).info.model
            await client.load(model.text)
        return model

    async def tokens(self) -> list[str]:
        """A session's token for each wallet."""
        found = []
        for key in self.wallets:
            async with self.client(key) as client:
                found.append((await client.sign_in()).token)
        return found

    async def signers(self) -> list[Signer]:
        """The wallets as they sign for this node."""
        async with aiohttp.ClientSession() as session, session.get(self.node.url + "/api/v1/node") as response:
            told = await response.json()
        node, vault = Address.parse(told["address"]), Address.parse(told["vault"])
        return [Signer(key, node, told["chain_id"], vault, told["authority"]) for key in self.wallets]


@asynccontextmanager
async def serving(wallets: int = 16, *, chain_away_s: float = 0.0, **settings: str) -> AsyncIterator[Serving]:
    """A node, its chain and its store, and wallets that hold the gate's token; the first is the node's operator.

    `chain_away_s`: how much later than its chain answers the node hears it.
    """
    keys = [Secret(secrets.token_bytes(32)) for _ in range(wallets)]
    settings = {"DIVAULT_OPERATORS": str(address_of(keys[0]))} | settings
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent, prefix=".serving-") as text:
        folder = Path(text)
        (folder / "node").mkdir()
        async with (
            TestChain.start() as chain,
            ContentStore(folder / "store") as store,
            _away(chain.devnet.url, chain_away_s) as endpoint,
        ):
            environment = node_environment(endpoint, chain.vault, chain.usdc, store.url) | _SETTINGS | settings
            async with serving_node(environment, folder / "node") as node:
                world = Serving(chain, store, node, folder, keys)
                for key in keys:
                    await chain.mint_tokens(address_of(key), _MINIMUM)
                yield world


@asynccontextmanager
async def _away(url: str, seconds: float) -> AsyncIterator[str]:
    """The URL of what answers like this one, so much later."""
    if not seconds:
        yield url
        return

    async def relay(request: web.Request) -> web.Response:
        body = await request.read()
        await asyncio.sleep(seconds)
        async with session.post(url, data=body, headers={"content-type": "application/json"}) as answer:
            return web.Response(body=await answer.read(), status=answer.status, content_type="application/json")

    app = web.Application(client_max_size=1 << 24)
    app.router.add_post("/", relay)
    runner = web.AppRunner(app, access_log=None)
    async with aiohttp.ClientSession() as session:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


@asynccontextmanager
async def plain_server(program: str, *arguments: str) -> AsyncIterator[tuple[str, int]]:
    """A yardstick of `bench/yardsticks` in a process of its own; its URL and process id."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"bench.yardsticks.{program}", str(port), *arguments),
        cwd=Path(__file__).parent.parent,
        start_new_session=True,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        await _until_up(url)
        yield url, process.pid
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)  # some have processes that stay when asked to end
        await process.wait()


def raw_request(url: str, path: str, body: bytes, headers: dict[str, str] | None = None) -> bytes:
    """One HTTP/1.1 POST as its bytes."""
    host = url.removeprefix("http://")
    told = {"Host": host, "Content-Type": "application/json", "Content-Length": str(len(body))} | (headers or {})
    head = "".join(f"{name}: {value}\r\n" for name, value in told.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def load(url: str, pid: int, requests: Sequence[bytes], *, connections: int, seconds: int = 3) -> Load:
    """Send the requests in turn, over and over, for so long. Raises RuntimeError when one was not answered with 200."""
    with tempfile.TemporaryDirectory() as folder:
        data, script = Path(folder, "requests"), Path(folder, "load.lua")
        data.write_bytes(b"".join(f"{len(one):08x}".encode() + one for one in requests))
        script.write_text(_LUA % {"path": json.dumps(str(data))}, encoding="utf-8")
        before = cpu_seconds(pid)
        command = ("wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout=30", "-s", str(script), url)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        used = cpu_seconds(pid) - before
    told = re.search(r"^@@(.*)$", done.stdout, re.MULTILINE)
    if told is None:
        raise RuntimeError(f"wrk said: {done.stdout[-300:]}")
    found: dict[str, Any] = json.loads(told[1])
    if found["broken"] or found["refused"] or not found["requests"]:
        raise RuntimeError(f"the load was not answered: {found}")
    return Load(
        found["requests"],
        found["requests"] / found["secs"],
        found["p50"],
        found["p99"],
        used * 1e6 / found["requests"],
    )


def cpu_seconds(pid: int) -> float:
    """User and system time of the process and all its descendants that live, and of those that they reaped."""
    return sum(_own_seconds(one) for one in tree(pid))


def tree(pid: int) -> list[int]:
    """The process and its living descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        found.append(one)
        todo += children.get(one, [])
    return found


def _own_seconds(pid: int) -> float:
    fields = _stat(pid)
    return sum(map(int, fields[11:15])) / _HZ if fields else 0.0


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name; none for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    except OSError:
        return []


async def _until_up(url: str) -> None:
    async with asyncio.timeout(30), aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(url + "/up"):
                    return
            except aiohttp.ClientError:
                await asyncio.sleep(0.1)
