"""The ledger: durable writes per second, alone and 64 at a time, and paid calls (reserve, charge, signed receipt).

Against the same SQLite settings with one transaction per write. The files lie beside this module, on the disk of the
checkout: a temporary folder may be memory, where a commit costs nothing.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from divault.payments import Account, Ledger
from divault.payments.books import Incoming
from divault.receipts import ReceiptIssuer
from divault.state import State
from divault.values import (
    Address,
    BlockRef,
    BodySignature,
    Digest,
    GateType,
    Grant,
    ModelId,
    ModelInfo,
    Nonce,
    Output,
    Principal,
    PrincipalKind,
    Secret,
    SignedCall,
    Usdc,
)

_ALONE, _TOGETHER, _AT_ONCE, _CALLS = 300, 6400, 64, 640
_INSERT = "INSERT INTO spent VALUES (1, 'bench', ?, x'00', '1', 0)"
_PRICE = Usdc(100)
_USER, _OWNER, _TOKEN, _VAULT = (Address(bytes([n]) * 20) for n in (1, 2, 3, 4))
_RUNTIME = {"adapter": "sklearn", "device": "cpu", "libraries": {"numpy": "2.4.6", "python": "3.11.7"}, "threads": 1}


def _naive(folder: Path) -> float:
    """Writes per second with one transaction each, on one connection."""
    asyncio.run(State(folder / "ledger.sqlite3").close())
    db = sqlite3.connect(folder / "ledger.sqlite3", isolation_level=None)
    db.execute("PRAGMA synchronous = FULL")
    started = time.perf_counter()
    for number in range(_ALONE):
        db.execute("BEGIN IMMEDIATE")
        db.execute(_INSERT, (str(number),))
        db.execute("COMMIT")
    rate = _ALONE / (time.perf_counter() - started)
    db.close()
    return rate


async def _rate(total: int, at_once: int, work: Callable[[int], Awaitable[object]]) -> float:
    """Completions per second with `at_once` callers who each wait for theirs."""
    numbers = iter(range(total))

    async def caller() -> None:
        for number in numbers:
            await work(number)

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(at_once)))
    return total / (time.perf_counter() - started)


async def _writes(folder: Path, total: int, at_once: int) -> float:
    async with State(folder / "ledger.sqlite3") as state:
        return await _rate(total, at_once, lambda n: state.write(lambda db: db.execute(_INSERT, (str(n),))))


def _call() -> tuple[SignedCall, Grant]:
    now, nonce = int(time.time()), Nonce(os.urandom(32))
    model, request = ModelId.parse("m1"), Digest.keccak(nonce.raw)
    proof = BodySignature("0x", nonce, now, now + 60, request)
    call = SignedCall(_USER, "POST", "/api/v1/inference", b"{}", proof, model, _PRICE, input_data=b'{"features":[1]}')
    principal = Principal(_USER, PrincipalKind.BODY, request, nonce, now + 60, now, _PRICE)
    active = True
    info = ModelInfo(model, "bafkqaaa", _TOKEN, _PRICE, _OWNER, active, 0, 0, 0, (), "1", 1, _TOKEN, GateType.TOKEN)
    return call, Grant(principal, info, BlockRef(1, request, now), 1)


async def _paid_calls(folder: Path, total: int, at_once: int) -> float:
    async with State(folder / "ledger.sqlite3") as state:
        ledger = Ledger(state, ReceiptIssuer(Secret(b"\x01" * 32), 31337, _VAULT))
        account = Account(31337, _TOKEN, _USER, _OWNER)

        async def one(_: int) -> None:
            call, grant = _call()
            incoming = Incoming(grant.principal.request, ((0, _PRICE.atomic),))
            async with ledger.outcome(grant.principal, call):
                hold = await ledger.reserve(grant, _PRICE, account, incoming)
                await ledger.charge(hold, call, Output(b"[0]", _RUNTIME, Digest.ZERO, 1))

        return await _rate(total, at_once, one)


def _measure(work: Callable[[Path], Any]) -> Any:
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent, prefix=".ledger-") as folder:
        return work(Path(folder))


def run() -> list[dict[str, Any]]:
    """Rows of the ledger."""
    naive = _measure(_naive)
    alone = _measure(lambda folder: asyncio.run(_writes(folder, _ALONE, 1)))
    together = _measure(lambda folder: asyncio.run(_writes(folder, _TOGETHER, _AT_ONCE)))
    paid = _measure(lambda folder: asyncio.run(_paid_calls(folder, _CALLS, _AT_ONCE)))
    against = f"one transaction per write: {naive:.0f}/s"
    rows = [
        ("ledger, durable writes, one caller", alone, ">= 0.5 x yardstick", alone >= 0.5 * naive),
        ("ledger, durable writes, 64 callers", together, ">= 4 x yardstick", together >= 4 * naive),
        ("ledger, paid calls with receipt, 64 callers", paid, ">= 300/s", paid >= 300),
    ]
    return [
        {
            "name": name,
            "figure": round(figure),
            "unit": "/s",
            "yardstick": against,
            "ratio": round(figure / naive, 2),
            "target": target,
            "holds": bool(holds),
        }
        for name, figure, target, holds in rows
    ]
