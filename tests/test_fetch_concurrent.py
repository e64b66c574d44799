"""Several callers want one model at once, or leave while it comes: one transfer, which ends when nobody waits."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from divault.storage.fetcher import Fetcher
from divault.storage.gateway import GatewayStorage
from divault.storage.source import Form
from tests.fault_gateway import Ask, FaultGateway, Line
from tests.test_fetch_faults import CONTENT, Bench, on


async def test_cancelled_fetch_ends_its_request_and_leaves_no_finished_file(tmp_path: Path) -> None:
    started = asyncio.Event()

    async def stalls(ask: Ask, body: bytes | None, line: Line) -> None:
        await line.head("200 OK", Content_Length=len(body or b""))
        await line.raw((body or b"")[:100_000])
        started.set()
        await asyncio.sleep(60)

    bench = Bench(tmp_path)
    async with FaultGateway(bench.store, on(Form.CAR, stalls)) as gateway:
        fetch = asyncio.create_task(bench.fetch(gateway, timeout_s=30))
        await started.wait()
        began = time.monotonic()
        fetch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetch

    assert time.monotonic() - began < 10  # not the 30 s of the socket
    assert bench.finished_files() == []
    assert bench.cache.usage().entries == 0


async def test_concurrent_fetches_share_one_transfer(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    async with FaultGateway(bench.store) as gateway:
        fetcher = Fetcher([GatewayStorage(gateway.url)], bench.cache, max_model_bytes=10_000_000)
        seen: list[tuple[int, int]] = []
        blobs = await asyncio.gather(
            *(fetcher.fetch(bench.cid, progress=lambda *now: seen.append(now)) for _ in range(20))
        )

    assert [ask.form for ask in gateway.asks] == [Form.BLOCK, Form.CAR]
    assert {blob.path for blob in blobs} == {blobs[0].path}
    assert blobs[0].path.read_bytes() == CONTENT
    assert (len(CONTENT), len(CONTENT)) in seen


async def test_one_waiter_that_leaves_does_not_end_the_transfer_of_the_other(tmp_path: Path) -> None:
    gate = asyncio.Event()

    async def waits(ask: Ask, body: bytes | None, line: Line) -> bool:
        await gate.wait()
        return True

    bench = Bench(tmp_path)
    async with FaultGateway(bench.store, waits) as gateway:
        fetcher = Fetcher([GatewayStorage(gateway.url)], bench.cache, max_model_bytes=10_000_000)
        leaves, stays = (asyncio.create_task(fetcher.fetch(bench.cid)) for _ in range(2))
        await asyncio.sleep(0.05)
        leaves.cancel()
        gate.set()
        blob = await stays

    assert leaves.cancelled()
    assert blob.path.read_bytes() == CONTENT
