"""Workers that break the rules of their line: killed, named, and nobody else is hurt. Real processes, real sockets."""

from __future__ import annotations

import asyncio
import json
import resource
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import orjson
import pytest

from divault.errors import DeadlineExceeded, InputInvalid, ModelFailed, NotReady
from divault.workers import sandbox
from divault.workers.pool import WorkerPool
from tests.hostile_worker import CHECKS, DESCRIPTION, MISDESCRIBED, PROBLEMS
from tests.worker_models import alive, answer, children, hostile, opened, output

MakePool = Callable[..., WorkerPool]


@pytest.fixture
async def make_pool() -> AsyncIterator[MakePool]:
    """Pools with hostile workers; at the end none of their processes is left."""
    before = children()
    pools: list[WorkerPool] = []

    def make(behaviour: str, predict_s: float = 5, load_s: float = 10, **figures: object) -> WorkerPool:
        pool = WorkerPool(predict_timeout_s=predict_s, load_timeout_s=load_s, tuning=hostile(behaviour, **figures))
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        await pool.close()
    assert children() <= before


PROTOCOL = [
    "giant", "large", "forged", "short_id", "garbage", "trailing", "twice", "wrong_kind", "nobody", "two", "nan",
    "not_json", "deep", "many", "negative_rows", "forbidden", "problem_data", "unwanted_piece", *PROBLEMS,
]  # fmt: skip


@pytest.mark.parametrize("behaviour", PROTOCOL)
async def test_who_breaks_the_protocol_is_killed_and_named(make_pool: MakePool, behaviour: str) -> None:
    pool = make_pool(behaviour)
    model = opened(b"any")
    pid = (await pool.load(model)).pid

    with pytest.raises(ModelFailed) as caught:
        await answer(pool, model, {})

    assert caught.value.data["kind"] == "protocol"
    assert pid is not None
    assert not alive(pid)


@pytest.mark.parametrize("behaviour", ["exit", "half", "deaf"])
async def test_who_ends_before_the_answer_fails_that_request_alone(make_pool: MakePool, behaviour: str) -> None:
    pool = make_pool(behaviour)
    model = opened(b"any")
    pid = (await pool.load(model)).pid

    with pytest.raises(ModelFailed) as caught:
        await answer(pool, model, {})
    await until(lambda: pool.loaded()[0].state == "ready")

    assert caught.value.data["kind"] == "crashed"
    assert pid is not None
    assert not alive(pid)
    assert await pool.probe()


async def test_an_honest_worker_of_the_same_kind_is_not_killed(make_pool: MakePool) -> None:
    pool = make_pool("honest")
    model = opened(b"any")
    pid = (await pool.load(model)).pid

    found = [await answer(pool, model, {}) for _ in range(3)]

    assert found == [{"predictions": [1]}] * 3
    assert pool.loaded()[0].pid == pid


@pytest.mark.parametrize("behaviour", ["hang", "drip"])
async def test_one_deadline_covers_the_whole_reply(make_pool: MakePool, behaviour: str) -> None:
    """A reply that comes byte by byte doesn't stretch it, and the work really ends."""
    pool = make_pool(behaviour, predict_s=0.4)
    model = opened(b"any")
    pid = (await pool.load(model)).pid

    began = time.monotonic()
    with pytest.raises(DeadlineExceeded) as caught:
        await answer(pool, model, {})

    assert caught.value.data == {"limit_s": "0.4"}
    assert time.monotonic() - began >= 0.4
    assert pid is not None
    assert not alive(pid)
    await until(lambda: pool.loaded()[0].state == "ready")
    assert pool.loaded()[0].pid != pid


async def test_who_speaks_unasked_is_restarted_until_given_up(make_pool: MakePool) -> None:
    pool = make_pool("unasked")
    await pool.load(opened(b"any"))

    await until(lambda: pool.loaded()[0].state == "failed")

    with pytest.raises(NotReady, match="m "):
        await pool.probe()


async def test_five_deaths_fail_the_model_and_it_is_tried_again_later(make_pool: MakePool) -> None:
    pool = make_pool("exit", window_s=1.5)
    model = opened(b"any")
    await pool.load(model)

    for _ in range(5):
        with pytest.raises(ModelFailed):
            await answer(pool, model, {})
    await until(lambda: pool.loaded()[0].state == "failed")

    with pytest.raises(NotReady) as caught:
        await answer(pool, model, {})
    assert caught.value.data["retry_after"] >= 1
    assert pool.find(model.model, model.cid) == model, "it stays loaded: a caller must not make it load again"
    await until(lambda: pool.loaded()[0].state == "ready")


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        ("confined_more", ModelFailed),
        ("confined_less", ModelFailed),
        ("confined_late", ModelFailed),
        ("load_undescribed", ModelFailed),
        *((behaviour, ModelFailed) for behaviour in MISDESCRIBED),
        ("load_forbidden", ModelFailed),
        ("load_exit", ModelFailed),
        ("load_hang", DeadlineExceeded),
    ],
)
async def test_a_failed_load_leaves_nothing(make_pool: MakePool, behaviour: str, error: type[Exception]) -> None:
    before, processes = descriptors(), children()
    pool = make_pool(behaviour, load_s=1.0 if behaviour == "load_hang" else 10)
    model = opened(b"any")

    with pytest.raises(error):
        await pool.load(model)

    assert descriptors() == before
    assert children() == processes
    assert pool.loaded() == []
    assert pool.find(model.model, model.cid) is None


async def test_a_cancelled_load_leaves_nothing(make_pool: MakePool) -> None:
    before, processes = descriptors(), children()
    pool = make_pool("load_hang")
    loading = asyncio.create_task(pool.load(opened(b"any")))
    await until(lambda: children() > processes)

    loading.cancel()
    await asyncio.wait([loading])

    assert loading.cancelled()
    assert descriptors() == before
    assert children() == processes


async def test_its_words_are_made_printable_and_short(make_pool: MakePool) -> None:
    pool = make_pool("terminal")
    model = opened(b"any")
    await pool.load(model)

    with pytest.raises(ModelFailed) as caught:
        await answer(pool, model, {})

    assert caught.value.detail.startswith("\\x1b[31mred\\u202e\\x0a")
    assert caught.value.detail.isascii()
    assert caught.value.detail.isprintable()


async def test_the_data_of_its_refusal_is_made_printable_and_short(make_pool: MakePool) -> None:
    pool = make_pool("refuse")
    model = opened(b"any")
    await pool.load(model)

    with pytest.raises(InputInvalid) as caught:
        await answer(pool, model, {})

    assert caught.value.data["field"].startswith("\\x1b[31m\\u202e\\x1b")
    assert len(caught.value.data["field"]) <= 1000
    assert caught.value.data["example"] == {"größe\\u202e": ["\\x1b[31m", float(2**70), 1]}
    assert orjson.dumps(caught.value.data)


async def test_a_flood_on_stderr_costs_no_memory_and_no_answer(make_pool: MakePool) -> None:
    pool = make_pool("flood")
    model = opened(b"any")
    await pool.load(model)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    found = await output(pool, model, {})

    assert found.result == b'{"predictions":[1]}'
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 8 << 10


async def test_what_it_started_ends_with_it(make_pool: MakePool) -> None:
    pool = make_pool("spawn")
    model = opened(b"any")
    await pool.load(model)
    helper = await answer(pool, model, {})
    assert alive(helper)

    await pool.unload(model.model.key)

    await until(lambda: not alive(helper))


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def until(holds: Callable[[], bool], limit_s: float = 20) -> None:
    """Return when it holds; fail when it never does."""
    async with asyncio.timeout(limit_s):
        while not holds():
            await asyncio.sleep(0.02)


def test_the_hostile_worker_describes_itself_well() -> None:
    """Otherwise every test above would fail at its load and prove nothing."""
    assert json.loads(json.dumps(DESCRIPTION)) == DESCRIPTION
    assert sandbox.CHECKS == CHECKS
