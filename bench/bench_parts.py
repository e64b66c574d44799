"""What no signed call can do without, each part alone and warm: the least that a call could cost on this machine.

The parts are those of `bench_serve`'s call: an HTTP request, a body that is read strictly, a signature, the model's
pass, the ledger's rows on disk and a signed receipt. What a whole call costs beside their sum is Python between them,
and caches that 64 calls at once share.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import orjson
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression

from bench.serving import load, plain_server, raw_request
from divault import models
from divault.messages import SigningKey, body_hash, recover, signature_text, strict_object
from divault.models.base import CPU
from divault.state import State
from divault.values import Digest, MemoryFile, Secret
from divault.workers import child, wire

_KEY, _DIGEST = Secret(b"\x4c" * 32), Digest.keccak(b"a request")
_TOGETHER, _WRITES = 18, 5400
"""Calls that share a commit when 64 come at once, and how many are measured."""
_PASS = 16
_ENVELOPE = os.urandom(640)


def _cpu_us(work: Callable[[], Any], rounds: int = 2000) -> float:
    """Microseconds of CPU, in the best of five batches."""
    found = []
    for _ in range(5):
        began = time.process_time()
        for _ in range(rounds):
            work()
        found.append((time.process_time() - began) / rounds * 1e6)
    return min(found)


async def _http() -> float:
    async with plain_server("bare_asgi") as (url, pid):
        request = raw_request(url, "/", b"x" * 900)
        await asyncio.to_thread(load, url, pid, [request], connections=64, seconds=1)
        return (await asyncio.to_thread(load, url, pid, [request], connections=64)).cpu_us


def _rows(number: int, *, signed: bool) -> Callable[[sqlite3.Connection], object]:
    """What an answered free call writes: its receipt, and where it was signed its nonce."""
    user, nonce, request = os.urandom(20), os.urandom(32), os.urandom(32)

    def work(db: sqlite3.Connection) -> None:
        db.execute(
            "INSERT INTO receipt(log, sequence, hash, previous, request, user, model, status, envelope)"
            " VALUES (1, ?, ?, ?, ?, ?, ?, 1, ?)",
            (number, request, request, request, user, nonce, _ENVELOPE),
        )
        if signed:
            db.execute(
                "INSERT INTO request(user, nonce, digest, stage, priced, keep_until) VALUES (?, ?, ?, 'done', 0, ?)",
                (user, nonce, request, 1_790_000_000 + number // 1000),
            )

    return work


async def _ledger(path: Path, *, signed: bool) -> float:
    async with State(path) as state:
        for number in range(1200):  # until the log is written over
            works = [_rows(number * _TOGETHER + each, signed=signed) for each in range(_TOGETHER)]
            await asyncio.gather(*(state.write(work, guarded=False) for work in works))
            if number == 900:
                began = time.process_time()
        return (time.process_time() - began) / (299 * _TOGETHER) * 1e6


def _model(row: list[float]) -> Callable[[], Any]:
    data = load_breast_cancer()
    fd = os.memfd_create("model")
    with os.fdopen(os.dup(fd), "wb") as file:
        joblib.dump(LogisticRegression(max_iter=5000).fit(data.data, data.target), file)
    model = models.load([MemoryFile("model.joblib", fd, os.fstat(fd).st_size)], CPU)
    items = [wire.Item(orjson.dumps({"features": row}), None)] * _PASS
    return lambda: child._answers(model, items)  # noqa: SLF001 - what a worker does between two frames


def _row(name: str, figure: float, asked_us: int | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "figure": round(figure, 1),
        "unit": "us CPU",
        "yardstick": "none" if asked_us is None else f"asked of a whole call: {asked_us} us",
        "ratio": None if asked_us is None else round(figure / asked_us, 2),
        "target": None,
        "holds": None,
    }


def run() -> list[dict[str, Any]]:
    """Microseconds of CPU of each part, and their sums."""
    row = load_breast_cancer().data[0].tolist()
    body = orjson.dumps({"model_id": "m1", "user_address": "0x" + "ab" * 20, "input_data": {"features": row}})
    members, signer, signature = strict_object(body), SigningKey(_KEY), signature_text(_KEY, _DIGEST)
    http = asyncio.run(_http())
    read = _cpu_us(lambda: strict_object(body))
    hashed, recovered = _cpu_us(lambda: body_hash(members)), _cpu_us(lambda: recover(_DIGEST, signature))
    passed = _cpu_us(_model(row), 100) / _PASS
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent, prefix=".parts-") as folder:
        nonce, receipt = (asyncio.run(_ledger(Path(folder, str(how)), signed=how)) for how in (True, False))
    signed = _cpu_us(lambda: signer.text(_DIGEST))
    both = http + read + passed + signed
    return [
        _row("an HTTP request and an answer of 4 kB, 64 connections", http),
        _row("a body of 30 numbers, read strictly", read),
        _row("its canonical hash", hashed),
        _row("the signer, recovered", recovered),
        _row(f"a row of the model, {_PASS} in a pass, JSON to JSON", passed),
        _row(f"the rows of a signed, free call, {_TOGETHER} in a commit, synced", nonce),
        _row("the row of one by a session's token", receipt),
        _row("a receipt's signature", signed),
        _row("all of these, EIP-712", both + hashed + recovered + nonce, 250),
        _row("all but hash and signer, a session's token", both + receipt, 125),
    ]
