"""A process that died and doesn't come back: who waits for it is told in the end, and what he reserved is his again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from divault.errors import DeadlineExceeded, ModelFailed, NotReady
from divault.values import OpenedModel
from divault.workers.pool import WorkerPool
from divault.workers.worker import Deadlines, Tuning, Worker
from tests.counter import PRICE, Counter, signed
from tests.small_service import model_of_the_counter, service_of
from tests.test_worker_hostile import until
from tests.test_worker_passes import ANY, said
from tests.worker_models import answer, hostile, opened

MakePool = Callable[..., WorkerPool]


@pytest.fixture
async def make_pool() -> AsyncIterator[MakePool]:
    pools: list[WorkerPool] = []

    def make(tuning: Tuning) -> WorkerPool:
        pools.append(WorkerPool(predict_timeout_s=10, load_timeout_s=60, tuning=tuning))
        return pools[-1]

    yield make
    for pool in pools:
        await pool.close()


async def loaded(pool: WorkerPool, model: OpenedModel, *, load_s: float, predict_s: float) -> Worker:
    """The model's worker, with these deadlines from now on: it came in its own time."""
    await pool.load(model)
    worker = pool._entries[model.model.key].worker
    worker._deadlines = Deadlines(load_s, predict_s)
    return worker


async def sharing(pool: WorkerPool, model: OpenedModel, *acts: str) -> list[asyncio.Task[Any]]:
    """Callers who are in one pass now, each of another wallet, and what they do in it."""
    first = asyncio.create_task(said(pool, model, {"tag": "first"}))
    await asyncio.sleep(0.005)
    asked = [
        asyncio.create_task(said(pool, model, {"tag": str(n), "act": act}, wallet=2 + n)) for n, act in enumerate(acts)
    ]
    await first
    assert len(pool._entries[model.model.key].worker._flight) == len(acts)
    return asked


async def comes_back(pool: WorkerPool, model: OpenedModel, worker: Worker) -> None:
    """It starts, as soon as there is nothing wrong with it, and answers."""
    worker._tuning = hostile("tagged")
    worker._deadlines = Deadlines(60, 10)
    await until(lambda: worker.state == "ready")
    assert await said(pool, model, {"tag": "later"}) == {"tag": "later", "callers": 1}


async def test_who_goes_again_does_not_wait_for_ever_for_a_process_that_never_comes(make_pool: MakePool) -> None:
    pool, model = make_pool(hostile("tagged", pass_share=ANY, deaths=1000)), opened(b"any")
    worker = await loaded(pool, model, load_s=0.4, predict_s=0.3)
    asked = await sharing(pool, model, "", "die")
    began = asyncio.get_running_loop().time()
    worker._tuning = hostile("load_hang", deaths=1000)
    ends = await asyncio.gather(*asked, return_exceptions=True)

    assert all(isinstance(end, NotReady) for end in ends), "neither is to blame, as far as anybody knows"
    assert all("send the same bytes again" in str(end) for end in ends)
    assert 0.6 < asyncio.get_running_loop().time() - began < 3, "a load and a predict deadline"
    assert worker.unused
    assert worker.state == "restarting"
    with pytest.raises(DeadlineExceeded, match="waited"):
        await said(pool, model, {"tag": "new"})
    await comes_back(pool, model, worker)


async def test_who_goes_again_waits_for_all_before_him_however_long_they_take(make_pool: MakePool) -> None:
    pool, model = make_pool(hostile("tagged", pass_share=ANY)), opened(b"any")
    worker = await loaded(pool, model, load_s=1.5, predict_s=0.4)
    *hang, innocent = await sharing(pool, model, *["hang"] * 6, "")
    began = asyncio.get_running_loop().time()

    assert (await innocent)["callers"] == 1
    assert asyncio.get_running_loop().time() - began > 1.5 + 0.4, "and longer than a process may be away"
    ends = await asyncio.gather(*hang, return_exceptions=True)
    assert all(isinstance(end, DeadlineExceeded) for end in ends)
    assert worker._away is None


async def test_who_brings_it_down_again_has_his_others_run_last(make_pool: MakePool) -> None:
    pool, model = make_pool(hostile("tagged", pass_share=ANY)), opened(b"any")
    await loaded(pool, model, load_s=60, predict_s=10)
    ended: list[str] = []

    async def one(tag: str, wallet: int, act: str) -> None:
        with contextlib.suppress(ModelFailed):
            await said(pool, model, {"tag": tag, "act": act}, wallet=wallet)
        ended.append(tag)

    first = asyncio.create_task(said(pool, model, {"tag": "first"}))
    await asyncio.sleep(0.005)
    asked = [one("evil", 2, "die"), one("evil too", 2, "die"), one("good", 3, ""), one("good too", 3, "")]
    tasks = [asyncio.create_task(each) for each in asked]
    await first
    await asyncio.gather(*tasks)

    assert ended == ["evil", "good", "good too", "evil too"]


async def test_starts_that_run_into_the_load_deadline_fail_the_model(make_pool: MakePool) -> None:
    """However short the window is beside them; and it is tried again after the window."""
    pool, model = make_pool(hostile("tagged", window_s=0.5)), opened(b"any")
    worker = await loaded(pool, model, load_s=0.4, predict_s=0.3)
    worker._tuning = hostile("load_hang", window_s=0.5)
    with pytest.raises(ModelFailed):
        await said(pool, model, {"tag": "dies", "act": "die"})
    await until(lambda: worker.state == "failed")

    assert len(worker._deaths) == 5
    with pytest.raises(NotReady, match=r"died 5 times within 0\.5 s, or could not be started as often"):
        await said(pool, model, {"tag": "new"})
    await comes_back(pool, model, worker)


async def test_deaths_that_lie_further_apart_than_the_window_fail_no_model(make_pool: MakePool) -> None:
    pool, model = make_pool(hostile("exit", window_s=0.05)), opened(b"any")
    worker = await loaded(pool, model, load_s=60, predict_s=10)
    for _ in range(7):
        with pytest.raises(ModelFailed):
            await answer(pool, model, {})
        await until(lambda: worker.state == "ready")
        await asyncio.sleep(0.06)

    assert len(worker._deaths) == 1


async def test_a_replaced_worker_ends_when_its_process_never_comes_back(make_pool: MakePool) -> None:
    pool, old = make_pool(hostile("tagged", pass_share=ANY, deaths=1000)), opened(b"any")
    worker = await loaded(pool, old, load_s=0.4, predict_s=0.3)
    asked = await sharing(pool, old, "", "die")
    worker._tuning = hostile("load_hang", deaths=1000)
    await pool.load(opened(b"any", cid="bafktwo"))
    assert worker in pool._leaving, "somebody waits for it"
    async with asyncio.timeout(10):
        ends = await asyncio.gather(*asked, return_exceptions=True)
        await until(lambda: not pool._leaving)

    assert all(isinstance(end, NotReady) for end in ends)
    assert worker.state == "closed"


async def test_a_model_that_is_unloaded_leaves_no_timer(make_pool: MakePool) -> None:
    pool, model = make_pool(hostile("tagged", pass_share=ANY)), opened(b"any")
    worker = await loaded(pool, model, load_s=60, predict_s=10)
    asked = await sharing(pool, model, "", "die")
    worker._tuning = hostile("load_hang")
    await until(lambda: worker.state == "restarting")
    away = worker._away
    assert away is not None
    await pool.unload(model.model.key)

    assert away.cancelled()
    ends = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(end, NotReady) for end in ends)


async def test_the_price_of_who_goes_again_is_his_when_the_process_never_comes(
    make_pool: MakePool, tmp_path: Path
) -> None:
    """And the same bytes are run once there is a process again."""
    model = model_of_the_counter()
    pool = make_pool(hostile("tagged", pass_share=ANY, deaths=1000))
    async with Counter(tmp_path) as counter:
        await counter.infer(signed(tx=counter.chain.pay(4 * PRICE.atomic))[1])
        worker = await loaded(pool, model, load_s=0.4, predict_s=0.3)
        service = service_of(counter, pool)
        calls = [replace(signed()[1], input_data=b'{"tag":"%s"}' % tag) for tag in (b"busy", b"a", b"b")]
        calls[2] = replace(calls[2], input_data=b'{"tag":"b","act":"die"}')
        asked = [asyncio.create_task(service.infer(call, load=True)) for call in calls]
        assert (await asked[0]).receipt is not None
        assert await counter.credit() == 0, "what the others reserved is not to be spent"
        worker._tuning = hostile("load_hang", deaths=1000)
        ends = await asyncio.gather(*asked[1:], return_exceptions=True)

        assert [(type(end), end.evidence) for end in ends] == [(NotReady, None)] * 2
        assert counter.ledger.pending == 0
        assert await counter.credit() == 2 * PRICE.atomic
        worker._tuning, worker._deadlines = hostile("tagged"), Deadlines(60, 10)
        assert b'"tag":"a"' in (await service.infer(calls[1], load=True)).body.replace(b": ", b":")
