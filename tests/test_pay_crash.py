"""SIGKILL at every step: the payer is charged nothing or exactly one price, and what was charged can be fetched."""

from __future__ import annotations

import asyncio
import hashlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest

from divault.errors import RequestRunning
from tests.counter import PRICE, Counter
from tests.ledger_child import POINTS, call_number

ORPHANS = """
    SELECT charge.request FROM charge
    LEFT JOIN outcome USING(request) LEFT JOIN receipt ON receipt.hash = charge.receipt
    WHERE outcome.body IS NULL OR receipt.status != 1
"""
"""Charges without a kept answer or without a receipt of success."""
CHARGED = ("after-write-2", "before-answer")


@contextmanager
def child(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.ledger_child", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent) as process:
        try:
            yield process
        finally:
            process.kill()  # SIGKILL: nothing in it can tidy up


def killed_at(folder: Path, point: str, *how: str) -> None:
    with child(str(folder), point, *how) as process:
        assert process.stdout is not None
        line = process.stdout.readline()

    assert line == f"at {point}\n"
    assert process.wait() == -9


async def nothing_is_lost(counter: Counter) -> None:
    """The books' invariants: no reservation is left, every charge has its answer and receipt, money adds up."""
    await counter.chain_is_whole()
    (credited,) = (await counter.rows("SELECT coalesce(sum(amount), 0) FROM spent"))[0]
    (charges,) = (await counter.rows("SELECT count(*) FROM charge"))[0]
    rest = await counter.rows("SELECT balance, reserved FROM credit")

    assert sum(int(balance) for balance, _ in rest) == credited - charges * PRICE.atomic
    assert {reserved for _, reserved in rest} <= {"0"}
    assert await counter.rows(ORPHANS) == []


@pytest.mark.parametrize("point", POINTS)
async def test_killed_at_a_step_the_same_bytes_end_in_one_charge(tmp_path: Path, point: str) -> None:
    killed_at(tmp_path, point)
    async with Counter(tmp_path) as counter:
        await counter.ledger.recover()
        charged_before = (await counter.rows("SELECT count(*) FROM charge"))[0][0]
        await nothing_is_lost(counter)
        call = call_number(counter, 0)
        answer = await counter.infer(call)
        again = await counter.infer(call)

        assert charged_before == (1 if point in CHARGED else 0)
        assert counter.runs == 1 - charged_before
        assert answer.body == again.body
        assert (orjson.loads(answer.body)["result"] == "from the child") is (point in CHARGED)
        assert await counter.rows("SELECT count(*) FROM charge") == [(1,)]
        assert await counter.credit() == 0
        assert await counter.chain_is_whole() == 1


async def test_without_recovery_the_lease_gives_the_credit_back(tmp_path: Path) -> None:
    killed_at(tmp_path, "running")
    now = time.time()
    async with Counter(tmp_path, clock=lambda: now) as counter:
        call = call_number(counter, 0)
        with pytest.raises(RequestRunning):
            await counter.infer(call)
        assert await counter.credit() == 0
        now += 181

        assert await counter.credit() == PRICE.atomic
        await counter.infer(call)
        await nothing_is_lost(counter)


@pytest.mark.parametrize("round_number", range(4))
async def test_killed_at_any_moment_under_load_nothing_told_is_lost(tmp_path: Path, round_number: int) -> None:
    told: dict[int, str] = {}
    with child(str(tmp_path)) as process:
        assert process.stdout is not None
        for line in process.stdout:
            _, number, digest = line.split()
            told[int(number)] = digest
            if len(told) >= 40 + 7 * round_number:
                await asyncio.sleep(random.random() * 0.01)  # any moment will do
                break
    async with Counter(tmp_path) as counter:
        await counter.ledger.recover()
        calls = [call_number(counter, number) for number in range(max(told) + 1)]
        await nothing_is_lost(counter)
        for number, digest in told.items():
            answer = await counter.infer(calls[number])

            assert hashlib.sha256(answer.body).hexdigest() == digest
        assert counter.runs == 0
        for call in calls:
            await counter.infer(call)
        await nothing_is_lost(counter)
        assert await counter.credit() % PRICE.atomic == 0
