"""One encrypted file of 256 MiB: Lighthouse's npm SDK beside divault, in one run.

"from a file": read and decrypted; ours into a sealed memory file. "cold load": fetched from the same double of
Lighthouse in another process and opened with the same key. There the SDK trusts what comes, while the node verifies
every byte, keeps the ciphertext and takes the fingerprint of the plaintext for its receipts. CPU counts all processes
of each. Memory is resident memory beyond the imported, idle program; the plaintext itself lies in the heap of the SDK,
and in a memory file of the node, which the last row adds.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import secrets
import shutil
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
from divault.values import Secret
from divault.vault import lighthouse
from divault.vault.keys import CallerKey
from divault.workers.opening import Opener
from divault.workers.opening_child import MemoryFile
from tests.sealed_models import grant

MIB = 1 << 20
SIZE = 256 * MIB
ROOT = Path(__file__).parent.parent
SDK = ROOT / "tests" / "js"
_HERE = "import sys; sys.path.insert(0, sys.argv[1]); from bench import bench_sdk; bench_sdk."


class _Noise:
    """So many random bytes."""

    def __init__(self, size: int) -> None:
        self._left = size

    def readinto(self, buffer: memoryview, /) -> int:
        count = min(len(buffer), self._left)
        buffer[:count] = os.urandom(count)
        self._left -= count
        return count


def run() -> list[dict[str, Any]]:
    """Rows of one load each."""
    with tempfile.TemporaryDirectory(prefix="divault-bench-") as name:
        key = secrets.token_hex(32)
        command = [sys.executable, "-c", _HERE + "serve(sys.argv[2], sys.argv[3])", str(ROOT), name, key]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            if server.stdout is None or server.stdin is None:
                raise RuntimeError("the server's pipes are missing")
            url, cid = server.stdout.readline().split()
            script = [_node(), str(ROOT / "bench" / "decrypt.mjs"), str(SDK), key]
            ours = [sys.executable, "-c", _HERE + "measure(*sys.argv[2:])", str(ROOT), key]
            pairs = {
                "from a file": (_told([*script, f"{name}/sealed"]), _told([*ours, f"{name}/sealed"])),
                "cold load": (_told([*script, url, cid]), _told([*ours, url, cid, f"{name}/cache"])),
            }
            server.stdin.close()
    rows = []
    for kind, (theirs, mine) in pairs.items():
        if not theirs["bytes"] == mine["bytes"] == SIZE:
            raise RuntimeError(f"not the whole file: {theirs['bytes']} and {mine['bytes']} bytes")
        grown, growth = theirs["peak"] - theirs["idle"], mine["peak"] - mine["idle"]
        sixth = 1 / 6 if kind == "from a file" else None
        rows += [
            _row(f"256 MiB, {kind}: CPU", mine["cpu"], "s", theirs["cpu"], sixth),
            _row(f"256 MiB, {kind}: memory beyond the idle program", growth, "MiB", grown, 1 / 20),
            _row(f"256 MiB, {kind}: wall time", mine["wall"], "s", theirs["wall"], None),
        ]
    rows.append(_row("256 MiB, cold load: memory with the memory file", growth + SIZE / MIB, "MiB", grown, None))
    return rows


def _row(name: str, figure: float, unit: str, theirs: float, most: float | None) -> dict[str, Any]:
    ratio = figure / theirs
    return {
        "name": name, "figure": round(figure, 2), "unit": unit, "yardstick": f"Lighthouse's SDK, {theirs:.2f} {unit}",
        "ratio": round(ratio, 3), "target": "" if most is None else f"<= 1/{round(1 / most)} of it",
        "holds": None if most is None else ratio <= most,
    }  # fmt: skip


def _node() -> str:
    found = shutil.which("node") or str(ROOT / ".venv" / "tools" / "bin" / "node24")
    if not (SDK / "node_modules").is_dir():
        raise RuntimeError("the SDK is not installed: make setup")
    return found


def _told(command: list[str]) -> dict[str, float]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


def serve(folder: str, key: str) -> None:
    """The double with the file in it, until stdin ends; runs in a process of its own."""
    asyncio.run(_serve(Path(folder), key))


async def _serve(folder: Path, key: str) -> None:
    from divault.storage.lighthouse import Lighthouse
    from divault.testing import LighthouseDouble

    path = folder / "sealed"
    with path.open("xb") as sealed:
        await asyncio.to_thread(lighthouse.seal, key.encode(), _Noise(SIZE), sealed)
    async with LighthouseDouble(folder / "blocks") as double:
        client = Lighthouse(
            double.api_key, upload_url=double.upload.url, api_url=double.api.url, gateway_urls=[double.gateway.url]
        )
        stored = await client.upload(path, encrypted=True)
        await client.close()
        print(double.gateway.url, stored.cid, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


def measure(key: str, where: str, cid: str = "", cache: str = "") -> None:
    """One opening, in a process of its own; prints what it took as JSON."""
    asyncio.run(_measure(key, where, cid, Path(cache)))


async def _measure(key: str, where: str, cid: str, folder: Path) -> None:
    idle, used, began = _tree_rss(), sum(os.times()[:4]), time.perf_counter()
    peak, done = idle, asyncio.Event()

    async def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _tree_rss())
            await asyncio.sleep(0.01)

    watching = asyncio.create_task(watch())
    count = await (_load(key, where, cid, folder) if cid else asyncio.to_thread(_open_file, key, Path(where)))
    wall = time.perf_counter() - began
    done.set()
    await watching
    cpu = sum(os.times()[:4]) - used
    print(json.dumps({"bytes": count, "cpu": cpu, "wall": wall, "idle": idle, "peak": peak}))


def _open_file(key: str, path: Path) -> int:
    file = MemoryFile()
    with io.FileIO(path) as source:
        prefix = source.read(lighthouse.PREFIX_BYTES)
        derived = lighthouse.derive_key(key.encode(), prefix[: lighthouse.SALT_BYTES])
        count = lighthouse.open_payload(derived, prefix[lighthouse.SALT_BYTES :], source, file)
    file.seal()
    return count


async def _load(key: str, url: str, cid: str, folder: Path) -> int:
    gateway, opener = GatewayStorage(url), Opener(max_model_bytes=2 * SIZE, timeout_s=120)
    fetcher = Fetcher([gateway], CiphertextCache(folder, 4 * SIZE), max_model_bytes=2 * SIZE)
    async with fetcher.arriving(parse_cid(cid)) as arrival:
        opened = await opener.open(arrival, grant(), [CallerKey(Secret.of_text(key))])
    opener.close()
    gateway.close()
    return opened.size


def _tree_rss() -> float:
    """MiB of this process and its children."""
    pages = 0
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()
    for process in ["self", *children]:
        try:
            pages += int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
        except (OSError, IndexError):
            continue  # it ended meanwhile
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB
