"""Cold load and reload of a large sealed model: gateway -> verify -> cache -> open -> memory file, in one pass.

The yardstick is the time that the steps need at least on this machine, each measured alone in the same run: receiving,
hashing, writing a new file, opening into a memory file with its fingerprint, and what the gateway beside us costs. On C
cores no arrangement of them is quicker than their sum divided by C. The gateway serves blocks and ranges of a plain
file from the page cache; "on a line" it sends no more than 1 Gbit/s. Memory is touched before each measurement: in a
virtual machine the first touch of a page costs up to 2.5 s/GiB, which says nothing about a loader; and since the host
takes pages back at any time, steps and loads are measured three times, and the middle one counts.
"""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from divault.ipfs.cid import DAG_PB, parse_cid, parse_cid_bytes
from divault.ipfs.importer import Block, Importer
from divault.storage.cache import CiphertextCache
from divault.storage.fetcher import Fetcher
from divault.storage.gateway import GatewayStorage
from divault.values import Cid, OpenedModel
from divault.vault import stream
from divault.vault.age import Identity, Recipient
from divault.vault.keys import NodeIdentity
from divault.vault.sealed import seal_stream
from divault.workers.opening import Opener
from divault.workers.opening_child import MemoryFile
from tests.sealed_models import grant

MIB, GIB = 1 << 20, 1 << 30
SPEED_BYTES = 1 * GIB
LARGE_BYTES = 4 * GIB
LINE_BYTES = 256 * MIB
LINE_RATE = 125_000_000
"""1 Gbit/s."""
ROUNDS = 3
CORES = len(os.sched_getaffinity(0))
ME = Identity.generate()
Row = dict[str, Any]


def run() -> list[Row]:
    """All rows; needs 5 GiB of memory and 10 GiB in the folder for temporary files."""
    with tempfile.TemporaryDirectory(prefix="divault-bench-") as name:
        folder = Path(name)
        return [
            *asyncio.run(_speed(folder / "speed")),
            *asyncio.run(_on_a_line(folder / "line")),
            *asyncio.run(_large(folder / "large")),
        ]


async def _speed(folder: Path) -> list[Row]:
    async with _served(folder, SPEED_BYTES) as (url, cid, server):
        costs = _costs(url, folder, cid)
        cold, gateway = [], []
        for _ in range(ROUNDS):
            await asyncio.to_thread(shutil.rmtree, folder / "cache", ignore_errors=True)
            before = _cpu(server)
            cold.append(await _load(url, cid, folder))
            gateway.append(_cpu(server) - before)
        costs["gateway"] = median(gateway)
        wall, used = median(load.wall for load in cold), median(load.cpu for load in cold) + costs["gateway"]
        warm = median([(await _load(url, cid, folder)).wall for _ in range(ROUNDS)])
        checked = median([await _check(url, cid, folder) for _ in range(ROUNDS)])
    least = sum(costs.values())
    told = ", ".join(f"{name} {seconds:.2f}" for name, seconds in costs.items())
    again = costs["sha256"] + costs["open"]
    return [
        _row(Figure("cold load of 1 GiB: rate", 1 / wall, "GiB/s"), f"{told} s/GiB on {CORES} cores",
             least / CORES / wall, Target(0.85, of_ratio=True)),
        _row(Figure("cold load of 1 GiB: CPU of all processes", used, "s"), f"the same steps alone, {least:.2f} s",
             least / used),
        _row(Figure("reload of 1 GiB: verified again and opened", 1 / warm, "GiB/s"),
             f"sha256 and opening alone on {CORES} cores, {CORES / again:.2f} GiB/s", again / CORES / warm),
        _row(Figure("reload of 1 GiB: verified again", 1 / checked, "GiB/s"),
             f"sha256 alone on one core, {1 / costs['sha256']:.2f} GiB/s", costs["sha256"] / checked, Target(1.2)),
    ]  # fmt: skip


async def _on_a_line(folder: Path) -> list[Row]:
    async with _served(folder, LINE_BYTES, LINE_RATE) as (url, cid, _):
        load = await _load(url, cid, folder)
    rate = LINE_BYTES / load.wall
    return [
        _row(Figure("cold load on a line of 1 Gbit/s: rate", rate / GIB, "GiB/s"), "the line, 0.116 GiB/s",
             rate / LINE_RATE, Target(0.95, of_ratio=True)),
        _row(Figure("cold load on a line of 1 Gbit/s: last byte to usable file", load.tail * 1000, "ms"),
             "the load", load.tail / load.wall, Target(50.0, at_most=True)),
    ]  # fmt: skip


async def _large(folder: Path) -> list[Row]:
    async with _served(folder, LARGE_BYTES) as (url, cid, _):
        load = await _load(url, cid, folder)
    figure = Figure("cold load of 4 GiB: memory growth of the node", load.growth_mib, "MiB")
    return [_row(figure, "the model, 4096 MiB", load.growth_mib / 4096, Target(64.0, at_most=True))]


# --- one load ---------------------------------------------------------------------------------------------------------


class _Load:
    """What one load took: seconds, and MiB of resident memory beyond the start."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.wall = self.verified = self.tail = self.growth_mib = self.cpu = 0.0


async def _load(url: str, cid: Cid, folder: Path) -> _Load:
    _touch(2 * SPEED_BYTES)
    gateway = GatewayStorage(url)
    cache = CiphertextCache(folder / "cache", 8 * GIB)
    fetcher, opener = Fetcher([gateway], cache, max_model_bytes=6 * GIB), Opener(max_model_bytes=6 * GIB, timeout_s=300)
    before, load, start = _rss_mib(), _Load(), os.times()
    watching = asyncio.create_task(_watch(load, before))
    async with fetcher.arriving(cid) as arrival:
        verified = asyncio.create_task(arrival.blob())
        verified.add_done_callback(lambda _: setattr(load, "verified", time.perf_counter() - load.began))
        opened = await opener.open(arrival, grant(), [NodeIdentity(ME)])
        load.wall = time.perf_counter() - load.began
        await verified
    load.tail = load.wall - load.verified
    load.cpu = sum(os.times()[:4]) - sum(start[:4])
    watching.cancel()
    _close(opened)
    opener.close()
    gateway.close()
    return load


def _touch(count: int) -> None:
    child = os.fork()
    if not child:
        memory = bytearray(count)  # zeroed by writing where the kernel gave pages that are not there yet
        memory[::4096] = b"\x01" * len(range(0, count, 4096))
        os._exit(0)
    os.waitpid(child, 0)


async def _check(url: str, cid: Cid, folder: Path) -> float:
    """Seconds of verifying the cached file again, and nothing else."""
    gateway, began = GatewayStorage(url), time.perf_counter()
    await Fetcher([gateway], CiphertextCache(folder / "cache", 8 * GIB), max_model_bytes=6 * GIB).fetch(cid)
    gateway.close()
    return time.perf_counter() - began


async def _watch(load: _Load, before: float) -> None:
    while True:
        load.growth_mib = max(load.growth_mib, _rss_mib() - before)
        await asyncio.sleep(0.05)


def _close(opened: OpenedModel) -> None:
    for file in opened.files:
        os.close(file.fd)


def _rss_mib() -> float:
    """Anonymous and file pages; the memory files belong to the model, and nobody maps them here."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return int(status["VmRSS"].split()[0]) / 1024


def _cpu(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- the steps alone --------------------------------------------------------------------------------------------------


def _costs(url: str, folder: Path, cid: Cid) -> dict[str, float]:
    """CPU seconds per GiB of each step, over the size of the load: pages that were used before cost less."""
    size = SPEED_BYTES
    block = memoryview(bytearray(os.urandom(MIB)))
    sealed = folder / "step"
    with sealed.open("wb") as file:
        stream.seal_payload(bytes(32), _Numbered(size), file)
    steps: dict[str, Callable[[], None]] = {
        "receive": lambda: _receive(url, cid, size),
        "sha256": lambda: [hashlib.sha256(block).digest() for _ in range(size // MIB)] and None,
        "new file": lambda: _new_file(folder / "new", block, size),
        "open": lambda: open_alone(sealed),
    }
    return {name: median(_seconds(step) for _ in range(ROUNDS)) * GIB / size for name, step in steps.items()}


def _seconds(step: Callable[[], None]) -> float:
    _touch(SPEED_BYTES)
    start = time.process_time()
    step()
    return time.process_time() - start


def _receive(url: str, cid: Cid, size: int) -> None:
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host)
    connection.request("GET", f"/ipfs/{cid}", headers={"Range": f"bytes=0-{size - 1}"})
    response, buffer, left = connection.getresponse(), memoryview(bytearray(MIB)), size
    while left:
        left -= response.readinto(buffer)
    connection.close()


def _new_file(path: Path, block: memoryview, size: int) -> None:
    with path.open("wb", buffering=0) as file:
        for _ in range(size // MIB):
            file.write(block)
    path.unlink()


def open_alone(sealed: Path) -> None:
    """Into a memory file, and the fingerprint of the plaintext."""
    file, digest = MemoryFile(), hashlib.sha256()
    with io.FileIO(sealed) as source:
        stream.open_payload(bytes(32), source, file)
    buffer, at = memoryview(bytearray(256 * 1024)), 0
    while count := os.preadv(file.fd, [buffer], at):
        digest.update(buffer[:count])
        at += count
    os.close(file.fd)


class _Numbered:
    """Pseudo-random bytes with a counter each MiB, so that no two leaves are the same."""

    def __init__(self, size: int) -> None:
        self._left, self._count = size, 0
        self._block = bytearray(os.urandom(MIB))
        self._rest = memoryview(b"")

    def readinto(self, buffer: memoryview, /) -> int:
        if not self._rest:
            self._count += 1
            self._block[:8] = self._count.to_bytes(8, "big")
            self._rest = memoryview(self._block)[: self._left]
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        self._left -= count
        return count


# --- the gateway ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _served(folder: Path, size: int, pace: int = 0) -> AsyncIterator[tuple[str, Cid, int]]:
    """URL, CID and process id of a gateway with a sealed model of about this size; `pace` in bytes per second."""
    os.mkdir(folder)  # noqa: PTH102  # nothing else runs in this loop
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r}); "
        f"from bench.bench_load import serve; serve({str(folder)!r}, {size}, {str(ME.recipient)!r}, {pace})"
    )
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    if server.stdout is None or server.stdin is None:
        raise RuntimeError("the server's pipes are missing")
    url, cid = (await server.stdout.readline()).decode().split()
    try:
        yield url, parse_cid(cid), server.pid
    finally:
        server.stdin.close()
        await server.wait()


def serve(folder: str, size: int, recipient: str, pace: int) -> None:
    """Seal, import and serve until stdin ends; runs in a process of its own."""
    path, nodes = Path(folder, "sealed"), {}

    def keep(block: Block) -> None:
        if block.cid[1] == DAG_PB:
            nodes[parse_cid_bytes(block.cid).text] = bytes(block.data)

    with path.open("wb") as file:
        seal_stream(_Numbered(size), file, [Recipient.parse(recipient)])
    importer = Importer(emit=keep)
    with path.open("rb") as file:
        while piece := file.read(MIB):
            importer.update(piece)
    (root,) = importer.finish().values()
    listening = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listening.getsockname()[1]}", root, flush=True)
    threading.Thread(target=_accept, args=(listening, nodes, path, Line(pace)), daemon=True).start()
    sys.stdin.read()


class Line:
    """What all connections together may send."""

    def __init__(self, pace: int) -> None:
        self._pace, self._free_at, self._lock = pace, time.monotonic(), threading.Lock()

    def wait_for(self, count: int) -> None:
        """Until these bytes would have left."""
        if self._pace:
            with self._lock:
                self._free_at = max(self._free_at, time.monotonic()) + count / self._pace
                pause = self._free_at - time.monotonic()
            time.sleep(max(0.0, pause))


def _accept(listening: socket.socket, nodes: dict[str, bytes], path: Path, line: Line) -> None:
    while True:
        connection, _ = listening.accept()
        threading.Thread(target=_answer, args=(connection, nodes, path, line), daemon=True).start()


def _answer(connection: socket.socket, nodes: dict[str, bytes], path: Path, out: Line) -> None:
    """Blocks by `format=raw`, ranges of the file; nothing else."""
    with connection, connection.makefile("rb") as lines, path.open("rb") as file:
        while request := lines.readline():
            target, wanted = request.split()[1].decode(), ""
            while (line := lines.readline()) not in (b"\r\n", b""):
                name, _, value = line.decode().partition(":")
                wanted = value.strip() if name.lower() == "range" else wanted
            node = nodes.get(target.removeprefix("/ipfs/").partition("?")[0])
            if "format=raw" in target and node is not None:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(node), node))
            elif "format=" in target:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
            else:
                _send_range(connection, file.fileno(), (wanted, path.stat().st_size), out)


def _send_range(connection: socket.socket, file: int, asked: tuple[str, int], out: Line) -> None:
    wanted, size = asked
    first, last = (int(text) for text in wanted.removeprefix("bytes=").split("-")) if wanted else (0, size - 1)
    count = min(last, size - 1) - first + 1
    head = f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{first + count - 1}/{size}\r\n"
    connection.sendall(f"{head}Content-Length: {count}\r\n\r\n".encode())
    while count:
        sent = os.sendfile(connection.fileno(), file, first, min(count, 256 * 1024))
        first, count = first + sent, count - sent
        out.wait_for(sent)


# --- rows -------------------------------------------------------------------------------------------------------------


class Figure(NamedTuple):
    name: str
    value: float
    unit: str


class Target(NamedTuple):
    value: float
    of_ratio: bool = False
    at_most: bool = False


def _row(figure: Figure, yardstick: str, ratio: float, target: Target | None = None) -> Row:
    words, holds = "", None
    if target is not None:
        judged = ratio if target.of_ratio else figure.value
        holds = judged <= target.value if target.at_most else judged >= target.value
        words = f"{'<=' if target.at_most else '>='} {target.value:g}" + (
            " of it" if target.of_ratio else f" {figure.unit}"
        )
    return {
        "name": figure.name, "figure": round(figure.value, 2), "unit": figure.unit, "yardstick": yardstick,
        "ratio": round(ratio, 3), "target": words, "holds": holds,
    }  # fmt: skip
