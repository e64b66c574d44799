"""Models, calls and hostile workers for tests of the pool: real processes, and what earlier steps would have proven."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import joblib
from msgspec.structs import replace

from divault.values import (
    BodySignature,
    Cid,
    Digest,
    Hold,
    ModelId,
    Nonce,
    OpenedModel,
    Output,
    SignedCall,
    Usdc,
)
from divault.workers.pool import WorkerPool
from divault.workers.worker import Tuning
from tests.memory_models import memory_file
from tests.sealed_models import SOMEBODY, grant

HOSTILE = Path(__file__).parent / "hostile_worker.py"


def opened(content: bytes | Mapping[str, bytes], name: str = "m", cid: str = "bafkone") -> OpenedModel:
    """A model as it comes out of its seal; whoever loads it owns its descriptors."""
    parts = {"model": content} if isinstance(content, bytes) else content
    files = tuple(memory_file(path, data) for path, data in parts.items())
    digest = hashlib.sha256(cid.encode()).digest()
    size = sum(file.size for file in files)
    return OpenedModel(ModelId.parse(name), Cid(cid, 1, 0x55, 0x12, digest), Digest(digest), size, files)


def dumped(estimator: Any) -> bytes:
    """The estimator's joblib file."""
    out = io.BytesIO()
    joblib.dump(estimator, out)
    return out.getvalue()


def hold(model: OpenedModel) -> Hold:
    """A reservation of a free run of this model."""
    granted = grant()
    info = replace(granted.model, model=model.model, cid=model.cid.text)
    return Hold(replace(granted, model=info), Usdc(0), SOMEBODY, None, 0)


def call(model: OpenedModel, data: Any, parameters: Any = None) -> SignedCall:
    """A call with this input; bytes are taken as they are."""
    proof = BodySignature("", Nonce(bytes(32)), 0, 0, Digest.ZERO)
    raw = data if isinstance(data, bytes | None) else json.dumps(data).encode()
    given = None if parameters is None else json.dumps(parameters).encode()
    return SignedCall(SOMEBODY, "POST", "/", b"", proof, model.model, Usdc(0), input_data=raw, parameters=given)


async def output(pool: WorkerPool, model: OpenedModel, data: Any) -> Output:
    return await pool.run(model, hold(model), call(model, data))


async def answer(pool: WorkerPool, model: OpenedModel, data: Any) -> Any:
    """The parsed result."""
    return json.loads((await output(pool, model, data)).result)


def hostile(behaviour: str, **figures: Any) -> Tuning:
    """A pool whose workers are `hostile_worker.py`: honest at load, then as the word says."""
    quick = {"first_pause_s": 0.01, "longest_pause_s": 0.05, "ping_s": 2.0} | figures
    return Tuning(command=(sys.executable, "-I", str(HOSTILE), behaviour), templates=False, **quick)


def alive(pid: int) -> bool:
    """True while the process runs; one that ended and waits for its parent counts as gone."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def children() -> set[int]:
    """Processes that this one started and that still run."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == os.getpid():
                found.add(int(entry.name))
    return found
