"""A large model in a node over HTTP: its load from cached ciphertext, the memory for it, and what unloading gives back.

The model is a state dict as safetensors with its architecture beside it. Memory is that of the node and all its
processes, their share of pages that they have in common, and all memory files of the machine. The node has loaded and
unloaded the model before: what workers are forked from stays for ten minutes, and is there before and after.
"""

from __future__ import annotations

import asyncio
import hashlib
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import orjson
import torch
from safetensors.torch import save_file

from bench.bench_load import open_alone
from bench.serving import Serving, serving, tree
from divault.vault import stream

_SIDE = 11_000
"""The model has so many times so many weights of four bytes: 484 MB."""
_ROUNDS = 3
MIB = 1 << 20
_KINDS = ("Pss_Anon", "Pss_File")


def _model(folder: Path) -> Path:
    files = {"model.safetensors": folder / "weights", "divault.json": folder / "told"}
    weights = torch.rand(_SIDE, _SIDE, generator=torch.Generator().manual_seed(0))
    save_file({"weight": weights, "bias": torch.zeros(_SIDE)}, files["model.safetensors"])
    files["divault.json"].write_bytes(orjson.dumps({"architecture": {"type": "linear", "in": _SIDE, "out": _SIDE}}))
    path = folder / "model.tar"
    with tarfile.open(path, "w") as tar:
        for name, file in files.items():
            tar.add(file, arcname=f"model/{name}")
    return path


def _taken(pid: int) -> float:
    """MiB of the process tree and of all memory files."""
    total = _field(Path("/proc/meminfo"), "Shmem")
    for one in tree(pid):
        try:
            total += sum(_field(Path(f"/proc/{one}/smaps_rollup"), kind) for kind in _KINDS)
        except OSError:  # it ended
            continue
    return total / 1024


def _field(path: Path, name: str) -> int:
    lines = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return next((int(line[1]) for line in lines if line[0] == f"{name}:"), 0)


async def _settled(pid: int) -> float:
    """What is taken once it has not changed for a second."""
    seen = [await asyncio.to_thread(_taken, pid)]
    while len(seen) < 5 or max(seen[-5:]) - min(seen[-5:]) > 1:
        await asyncio.sleep(0.25)
        seen.append(await asyncio.to_thread(_taken, pid))
    return seen[-1]


async def _load(world: Serving, model: str) -> tuple[float, float]:
    """Seconds of a load, and the most that was taken meanwhile in MiB."""
    pid, most, over = world.node.process.pid, 0.0, asyncio.Event()

    async def watch() -> None:
        nonlocal most
        while not over.is_set():
            most = max(most, await asyncio.to_thread(_taken, pid))
            await asyncio.sleep(0.01)

    watching = asyncio.create_task(watch())
    async with world.client(world.wallets[0]) as client:
        began = time.perf_counter()
        await client.load(model)
        took = time.perf_counter() - began
    over.set()
    await watching
    return took, most


def _passes(folder: Path, path: Path) -> float:
    """Seconds that verifying and opening as many bytes take, one after the other and each alone."""
    sealed = folder / "sealed"
    with path.open("rb") as source, sealed.open("wb") as file:
        stream.seal_payload(bytes(32), source, file)
    found = []
    for _ in range(_ROUNDS):
        began, digest = time.perf_counter(), hashlib.sha256()
        with sealed.open("rb", buffering=0) as file:
            while piece := file.read(MIB):
                digest.update(piece)
        open_alone(sealed)
        found.append(time.perf_counter() - began)
    sealed.unlink()
    return median(found)


async def _measured(folder: Path) -> list[dict[str, Any]]:
    path = _model(folder)
    size, least = path.stat().st_size / MIB, _passes(folder, path)
    async with serving(1) as world:
        model = (await world.publish("large", path)).text
        pid, took, most, left = world.node.process.pid, [], [], []
        for _ in range(_ROUNDS):
            await _unload(world, model)
            before = await _settled(pid)
            seconds, peak = await _load(world, model)
            took.append(seconds)
            most.append(peak - before)
            await _unload(world, model)
            left.append(await _settled(pid) - before)
            await _load(world, model)
    ratio, grown, kept = median(took) / least, median(most), median(left)
    name = f"a model of {size:.0f} MiB in a node"
    return [
        {
            "name": f"{name}: load from cached ciphertext",
            "figure": round(median(took), 2),
            "unit": "s",
            "yardstick": f"verifying and opening it, each alone: {least:.2f} s",
            "ratio": round(ratio, 2),
            "target": "<= 1.25 x yardstick",
            "holds": ratio <= 1.25,
        },
        _of_memory(f"{name}: most memory while it loads", grown, "the model", size, size + 64),
        _of_memory(f"{name}: memory that stays when it is unloaded", kept, "before its load", None, 16),
    ]


async def _unload(world: Serving, model: str) -> None:
    async with world.client(world.wallets[0]) as client:
        await client.unload(model)


def _of_memory(name: str, mib: float, yardstick: str, size: float | None, most: float) -> dict[str, Any]:
    return {
        "name": name,
        "figure": round(mib, 1),
        "unit": "MiB",
        "yardstick": yardstick if size is None else f"{yardstick}, {size:.0f} MiB",
        "ratio": None if size is None else round(mib / size, 2),
        "target": f"<= {most:.0f} MiB",
        "holds": mib <= most,
    }


def run() -> list[dict[str, Any]]:
    """Three rows; needs 2 GiB of memory and 2 GiB of disk."""
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent, prefix=".models-") as folder:
        return asyncio.run(_measured(Path(folder)))
