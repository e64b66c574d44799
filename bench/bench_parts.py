"""What no signed call can do without: the least that a call could cost on this machine.

The parts are those of `bench_serve`'s call: an HTTP request, a body that is read strictly, a signature, the model's
pass, the ledger's rows on disk and a signed receipt. First each alone and warm, then all in one program with nothing
between them, beside plain FastAPI. What a whole call costs beyond that is what is checked and told.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import orjson
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression

from bench.parts import BODY, DIGEST, ROW, SIGNATURE, SIGNER, model_pass, rows_of_call
from bench.serving import Load, load, plain_server, raw_request
from divault.messages import body_hash, recover, strict_object
from divault.state import State

_TOGETHER = 18
"""Calls that share a commit when 64 come at once."""
_PASS = 16


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


async def _ledger(path: Path, *, signed: bool) -> float:
    async with State(path) as state:
        for number in range(1200):  # until the log is written over
            works = [rows_of_call(number * _TOGETHER + each, signed=signed) for each in range(_TOGETHER)]
            await asyncio.gather(*(state.write(work, guarded=False) for work in works))
            if number == 900:
                began = time.process_time()
        return (time.process_time() - began) / (299 * _TOGETHER) * 1e6


async def _together(folder: Path, how: str, *connections: int) -> list[Load]:
    """All parts in one program, after two seconds to warm up."""
    async with plain_server("parts_together", str(folder), how) as (url, pid):
        request = raw_request(url, "/", BODY)
        await asyncio.to_thread(load, url, pid, [request], connections=64, seconds=2)
        return [await asyncio.to_thread(load, url, pid, [request], connections=count) for count in connections]


async def _plain(folder: Path) -> list[Load]:
    """Plain FastAPI with 64 connections, and with one."""
    data = load_breast_cancer()
    joblib.dump(LogisticRegression(max_iter=5000).fit(data.data, data.target), folder / "model.joblib")
    async with plain_server("plain_fastapi", str(folder / "model.joblib")) as (url, pid):
        request = raw_request(url, "/predict", orjson.dumps({"features": ROW}))
        await asyncio.to_thread(load, url, pid, [request], connections=64, seconds=1)
        return [await asyncio.to_thread(load, url, pid, [request], connections=count) for count in (64, 1)]


def _row(name: str, figure: float, unit: str, against: str = "none", asked: float | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "figure": round(figure, 2 if figure < 10 else 1),
        "unit": unit,
        "yardstick": against,
        "ratio": None if asked is None else round(figure / asked, 2),
        "target": None,
        "holds": None,
    }


def _rows_together(folder: Path) -> list[dict[str, Any]]:
    many, one = asyncio.run(_plain(folder))
    found = []
    for how, name, asked_us, times in (
        ("signed", "all parts in one program, EIP-712", 250, 1.5),
        ("session", "all but hash and signer in one program, a session's token", 125, 3),
    ):
        together, alone = asyncio.run(_together(folder, how, 64, 1))
        asked = f"asked of a whole call: {asked_us} us"
        found.append(_row(f"{name}, 64 connections", together.cpu_us, "us CPU", asked, asked_us))
        asked = f"plain FastAPI: {many.per_second:.0f}/s; asked of a whole call: {times:g} x"
        found.append(_row("the same: rate", together.per_second, "/s", asked, many.per_second))
        asked = f"plain FastAPI, asked of a whole call: {one.p50_ms:.2f} ms"
        found.append(_row("the same, one connection: p50", alone.p50_ms, "ms", asked, one.p50_ms))
    return found


def run() -> list[dict[str, Any]]:
    """Microseconds of CPU of each part, their sums, and what they take when one program does them all."""
    members, answers = strict_object(BODY), model_pass()
    inputs = [orjson.dumps(members["input_data"])] * _PASS
    http = asyncio.run(_http())
    read = _cpu_us(lambda: strict_object(BODY))
    hashed, recovered = _cpu_us(lambda: body_hash(members)), _cpu_us(lambda: recover(DIGEST, SIGNATURE))
    passed = _cpu_us(lambda: answers(inputs), 100) / _PASS
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent, prefix=".parts-") as text:
        folder = Path(text)
        nonce, receipt = (asyncio.run(_ledger(folder / str(how), signed=how)) for how in (True, False))
        together = _rows_together(folder)
    signed = _cpu_us(lambda: SIGNER.text(DIGEST))
    both, us = http + read + passed + signed, "us CPU"
    return [
        _row("an HTTP request and an answer of 4 kB, 64 connections", http, us),
        _row("a body of 30 numbers, read strictly", read, us),
        _row("its canonical hash", hashed, us),
        _row("the signer, recovered", recovered, us),
        _row(f"a row of the model, {_PASS} in a pass, JSON to JSON", passed, us),
        _row(f"the rows of a signed, free call, {_TOGETHER} in a commit, synced", nonce, us),
        _row("the row of one by a session's token", receipt, us),
        _row("a receipt's signature", signed, us),
        _row("all of these, EIP-712", both + hashed + recovered + nonce, us, "asked of a whole call: 250 us", 250),
        _row("all but hash and signer, a session's token", both + receipt, us, "asked of a whole call: 125 us", 125),
        *together,
    ]
