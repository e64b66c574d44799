"""Fetching 1 GiB by CID from a content store in another process: memory, CPU, and the reload from the cache."""

from __future__ import annotations

import asyncio
import hashlib
import io
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from divault.ipfs.cid import parse_cid
from divault.storage.cache import CiphertextCache
from divault.storage.fetcher import Fetcher
from divault.storage.gateway import GatewayStorage
from divault.storage.local import LocalStore

_LEAF = 1 << 20
_LEAVES = 1024  # 1 GiB in leaves of 1 MiB
_GIB = _LEAF * _LEAVES
_SERVER = """
import asyncio, pathlib, sys
from divault.devnet.content import ContentStore

async def main():
    async with ContentStore(pathlib.Path(sys.argv[1])) as store:
        print(store.url, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

asyncio.run(main())
"""
_MAKE = "import sys; sys.path.insert(0, sys.argv[1]); from bench.bench_fetch import make; make(sys.argv[2])"


class _Numbered(io.RawIOBase):
    """1 GiB whose leaves all differ: a counter in front of the same pseudo-random bytes."""

    def __init__(self) -> None:
        self._filler = (b"0123456789abcdef" * (_LEAF // 16))[:_LEAF]
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        leaf, offset = divmod(self._at, _LEAF)
        if leaf >= _LEAVES:
            return 0
        piece = (leaf.to_bytes(16, "big") + self._filler[16:])[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def _rss_mib() -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS")


async def _peak_during(work: Any) -> tuple[float, float, float]:
    """Growth of resident memory in MiB, CPU seconds and wall seconds of the work."""
    before, cpu, start = _rss_mib(), time.process_time(), time.perf_counter()
    peak, done = before, asyncio.Event()

    async def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _rss_mib())
            await asyncio.sleep(0.02)

    watching = asyncio.create_task(watch())
    await work
    done.set()
    await watching
    return max(peak, _rss_mib()) - before, time.process_time() - cpu, time.perf_counter() - start


def _unavoidable(folder: Path) -> float:
    """CPU seconds of hashing 1 GiB and writing it to a new file on this disk, and nothing else."""
    leaf = bytes(_LEAF)
    start = time.process_time()
    with (folder / "plain").open("wb", buffering=0) as file:
        for _ in range(_LEAVES):
            hashlib.sha256(leaf).digest()
            file.write(leaf)
    taken = time.process_time() - start
    (folder / "plain").unlink()
    return taken


async def _measure(url: str, cid_text: str, folder: Path) -> list[dict[str, Any]]:
    cid = parse_cid(cid_text)
    gateway = GatewayStorage(url)
    cache = CiphertextCache(folder / "cache", 4 * _GIB)
    cold = await _peak_during(Fetcher([gateway], cache, max_model_bytes=2 * _GIB).fetch(cid))
    warm = await _peak_during(Fetcher([gateway], cache, max_model_bytes=2 * _GIB).fetch(cid))
    gateway.close()
    least = _unavoidable(folder)
    plain = f"sha256 and a new file alone, {1 / least:.2f} GiB/s"
    return [
        _row("fetch of 1 GiB: memory growth", cold[0], "MiB", "the file, 1024 MiB", cold[0] / 1024, 64.0),
        _row("fetch of 1 GiB: rate by CPU time", 1 / cold[1], "GiB/s", plain, least / cold[1]),
        _row("fetch of 1 GiB: rate by wall time", 1 / cold[2], "GiB/s", "its CPU rate", cold[1] / cold[2]),
        _row("reload of 1 GiB from the cache: memory growth", warm[0], "MiB", "the file", warm[0] / 1024, 64.0),
        _row("reload of 1 GiB from the cache: rate by wall time", 1 / warm[2], "GiB/s", "the fetch", cold[2] / warm[2]),
    ]


def _row(
    name: str, figure: float, unit: str, yardstick: str, ratio: float, most: float | None = None
) -> dict[str, Any]:
    target, holds = ("", None) if most is None else (f"<= {most:g} {unit}", figure <= most)
    return {
        "name": name, "figure": round(figure, 2), "unit": unit, "yardstick": yardstick, "ratio": round(ratio, 3),
        "target": target, "holds": holds,
    }  # fmt: skip


def run() -> list[dict[str, Any]]:
    """Rows of one cold fetch and one reload."""
    with tempfile.TemporaryDirectory(prefix="divault-bench-") as name:
        folder = Path(name)
        # In a child, so that nothing of it counts as memory of the fetching process.
        made = subprocess.run(
            [sys.executable, "-c", _MAKE, str(Path(__file__).parent.parent), str(folder / "store")],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        with subprocess.Popen(
            [sys.executable, "-c", _SERVER, str(folder / "store")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as server:  # fmt: skip
            if server.stdout is None or server.stdin is None:
                raise RuntimeError("the server's pipes are missing")
            url = server.stdout.readline().strip()
            rows = asyncio.run(_measure(url, made.stdout.strip(), folder))
            server.stdin.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows.append(_row("fetch of 1 GiB: largest resident size of the process", peak, "MiB", "the file", peak / 1024))
    return rows


def make(directory: str) -> None:
    """Put the file into a store and print its CID; runs in a process of its own."""
    print(LocalStore(Path(directory)).put_file(io.BufferedReader(_Numbered(), _LEAF)))  # type: ignore[arg-type]
