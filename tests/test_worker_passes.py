"""Several callers in one pass: what they share and what they never share, whoever of them brings the process down."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from sklearn.linear_model import LogisticRegression

import divault.workers.worker
from divault.errors import DeadlineExceeded, DivaultError, InputInvalid, ModelFailed, Overloaded
from divault.models.base import Piece
from divault.values import Address, OpenedModel
from divault.workers.pool import WorkerPool
from divault.workers.queue import MAX_PASS_BYTES, Job, Queue
from divault.workers.wire import Item
from divault.workers.worker import Tuning, Worker
from tests.worker_models import call, dumped, hold, hostile, opened

MakePool = Callable[..., WorkerPool]
ANY = 1000.0
"""Share of the deadline that a pass may take: who goes together does not hang on how long a run takes here."""


@pytest.fixture
async def make_pool() -> AsyncIterator[MakePool]:
    pools: list[WorkerPool] = []

    def make(tuning: Tuning | None = None, predict_s: float = 10) -> WorkerPool:
        pools.append(WorkerPool(predict_timeout_s=predict_s, load_timeout_s=60, tuning=tuning))
        return pools[-1]

    yield make
    for pool in pools:
        await pool.close()


async def said(pool: WorkerPool, model: OpenedModel, data: Any, wallet: int = 1, **more: Any) -> Any:
    asked = replace(call(model, data, more.pop("parameters", None)), user=Address(bytes([wallet]) * 20), **more)
    return json.loads((await pool.run(model, hold(model), asked)).result)


async def together(pool: WorkerPool, model: OpenedModel, asked: list[dict[str, Any]]) -> list[Any]:
    """One busy caller first, so that the others gather; gives an answer or error for each of the others."""
    first = asyncio.create_task(said(pool, model, {"tag": "first"}))
    await asyncio.sleep(0.005)
    found = await asyncio.gather(
        *(said(pool, model, one, wallet=1 + number % 7) for number, one in enumerate(asked)), return_exceptions=True
    )
    assert (await first)["tag"] == "first"
    return found


async def test_who_waits_goes_together_in_the_next_pass(make_pool: MakePool) -> None:
    pool, model = make_pool(hostile("tagged")), opened(b"any")
    await pool.load(model)
    found = await together(pool, model, [{"tag": str(n)} for n in range(12)])

    assert [one["tag"] for one in found] == [str(n) for n in range(12)]
    assert {one["callers"] for one in found} == {12}


async def test_a_single_caller_is_not_kept_waiting_for_others(make_pool: MakePool) -> None:
    pool, model = make_pool(hostile("tagged")), opened(b"any")
    await pool.load(model)

    assert [await said(pool, model, {"tag": "a"}) for _ in range(3)] == [{"tag": "a", "callers": 1}] * 3


async def test_who_were_answered_together_go_together_again(make_pool: MakePool) -> None:
    """One came later than the others: he must not go alone for ever, while all others wait for him."""
    pool, model = make_pool(hostile("tagged")), opened(b"any")
    await pool.load(model)
    seen: list[list[int]] = []

    async def caller(wallet: int) -> None:
        rounds = [(await said(pool, model, {"tag": "again"}, wallet=wallet))["callers"] for _ in range(12)]
        seen.append(rounds)

    others = [asyncio.create_task(caller(wallet)) for wallet in range(1, 8)]
    await asyncio.sleep(0.005)
    await asyncio.gather(caller(8), *others)

    shared = [callers for rounds in seen for callers in rounds[3:-3]]
    assert sum(callers == 8 for callers in shared) > 0.8 * len(shared), seen


async def test_who_do_not_come_back_are_hardly_ever_waited_for(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, model = make_pool(hostile("tagged")), opened(b"any")
    await pool.load(model)
    in_vain = 0
    real = Worker._held_in_vain

    def counted(self: Worker) -> None:
        nonlocal in_vain
        in_vain += 1
        real(self)

    monkeypatch.setattr(Worker, "_held_in_vain", counted)
    for _ in range(30):
        both = [asyncio.create_task(said(pool, model, {"tag": "once"}, wallet=wallet)) for wallet in (1, 2)]
        await asyncio.sleep(0.005)
        assert (await said(pool, model, {"tag": "late"}, wallet=3))["callers"] == 1
        await asyncio.gather(*both)

    assert 1 <= in_vain <= 8


async def test_who_leaves_while_others_are_waited_for_is_not_run(make_pool: MakePool) -> None:
    pool, model = make_pool(hostile("tagged")), opened(b"any")
    await pool.load(model)
    both = [asyncio.create_task(said(pool, model, {"tag": "once"}, wallet=wallet)) for wallet in (1, 2)]
    await asyncio.sleep(0.005)
    late = asyncio.create_task(said(pool, model, {"tag": "late"}, wallet=3))
    await asyncio.gather(*both)
    worker = pool._entries[model.model.key].worker
    assert worker._hold is not None
    late.cancel()
    with pytest.raises(asyncio.CancelledError):
        await late
    await asyncio.sleep(0.03)

    assert worker.idle
    assert worker._hold is None
    assert worker.figures.callers == 2
    assert (await said(pool, model, {"tag": "next"}))["callers"] == 1


async def test_whose_own_deadline_passes_while_others_are_waited_for_is_not_run(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divault.workers.worker, "_HOLD_SHARE", 20.0)
    monkeypatch.setattr(divault.workers.worker, "_LONGEST_HOLD_S", 0.3)
    pool, model = make_pool(hostile("tagged")), opened(b"any")
    await pool.load(model)
    await asyncio.gather(*(said(pool, model, {"tag": "once"}, wallet=wallet) for wallet in (1, 2)))
    worker = pool._entries[model.model.key].worker
    assert worker._hold is not None
    with pytest.raises(DeadlineExceeded):
        await said(pool, model, {"tag": "hurried"}, wallet=3, limit_s=0.05)
    await asyncio.sleep(0.5)

    assert worker.idle
    assert worker.figures.callers == 2


async def test_other_parameters_are_another_pass(make_pool: MakePool) -> None:
    pool, model = make_pool(hostile("tagged")), opened(b"any")
    await pool.load(model)
    first = asyncio.create_task(said(pool, model, {"tag": "first"}))
    await asyncio.sleep(0.005)
    asked = [said(pool, model, {"tag": str(n)}, parameters={"k": n % 3}, wallet=1 + n) for n in range(9)]
    found = await asyncio.gather(*asked)
    await first

    assert [one["tag"] for one in found] == [str(n) for n in range(9)]
    assert {one["callers"] for one in found} == {3}


async def test_a_refusal_in_a_pass_is_its_callers_alone(make_pool: MakePool) -> None:
    pool, model = make_pool(hostile("tagged")), opened(b"any")
    await pool.load(model)
    found = await together(pool, model, [{"tag": "a"}, {"tag": "b", "act": "refuse"}, {"tag": "c"}])

    assert (found[0]["tag"], found[2]["tag"]) == ("a", "c")
    assert isinstance(found[1], InputInvalid)
    assert found[1].detail == "b"


async def test_only_who_brings_the_process_down_hears_of_it(make_pool: MakePool) -> None:
    pool, model = make_pool(hostile("tagged")), opened(b"any")
    await pool.load(model)
    asked = [{"tag": str(n)} for n in range(6)]
    asked[3]["act"] = "die"
    found = await together(pool, model, asked)

    assert isinstance(found[3], ModelFailed)
    assert found[3].data["kind"] == "crashed"
    del found[3]
    assert [one["tag"] for one in found] == ["0", "1", "2", "4", "5"]
    assert {one["callers"] for one in found} == {1}, "each ran again alone"


@pytest.mark.parametrize("place", [0, 2])
async def test_who_hangs_a_pass_is_stopped_and_the_others_are_answered(make_pool: MakePool, place: int) -> None:
    """Wherever he stands: who waits behind him is not given up while he takes a whole deadline alone."""
    pool, model = make_pool(hostile("tagged", pass_share=ANY), predict_s=0.5), opened(b"any")
    await pool.load(model)
    asked = [{"tag": str(n)} for n in range(4)]
    asked[place]["act"] = "hang"
    found = await together(pool, model, asked)

    assert isinstance(found[place], DeadlineExceeded)
    assert "was stopped after 0.5 s" in found[place].detail
    del asked[place], found[place]
    assert found == [{"tag": one["tag"], "callers": 1} for one in asked]


@pytest.mark.parametrize("how", ["hangs up", "has a short deadline"])
async def test_who_brings_a_pass_down_and_leaves_first_leaves_nobody_to_blame(make_pool: MakePool, how: str) -> None:
    pool, model = make_pool(hostile("tagged", pass_share=ANY), predict_s=0.5), opened(b"any")
    await pool.load(model)
    first = asyncio.create_task(said(pool, model, {"tag": "first"}))
    await asyncio.sleep(0.005)
    act, limit_s = ("die", None) if how == "hangs up" else ("hang", 0.3)
    innocent = asyncio.create_task(said(pool, model, {"tag": "innocent"}, wallet=2))
    guilty = asyncio.create_task(said(pool, model, {"tag": "guilty", "act": act}, wallet=3, limit_s=limit_s))
    await first
    worker = pool._entries[model.model.key].worker
    assert len(worker._flight) == 2
    if limit_s is None:
        guilty.cancel()

    assert await innocent == {"tag": "innocent", "callers": 1}
    with pytest.raises((DeadlineExceeded, asyncio.CancelledError)):
        await guilty
    assert worker.figures.restarts == 1, "nobody who left is run again"


async def test_who_brings_the_process_down_alone_hears_of_it_and_is_not_run_again(make_pool: MakePool) -> None:
    pool, model = make_pool(hostile("tagged")), opened(b"any")
    await pool.load(model)
    with pytest.raises(ModelFailed):
        await said(pool, model, {"tag": "alone", "act": "die"})

    assert (await said(pool, model, {"tag": "next"}))["tag"] == "next"
    assert pool.figures()[0].restarts == 1


async def test_who_goes_again_is_not_given_up_while_the_process_restarts(make_pool: MakePool) -> None:
    tuning = hostile("tagged", pass_share=ANY, first_pause_s=0.8, longest_pause_s=0.8)
    pool, model = make_pool(tuning, predict_s=0.5), opened(b"any")
    await pool.load(model)
    found = await together(pool, model, [{"tag": "a"}, {"tag": "b", "act": "die"}])

    assert found[0] == {"tag": "a", "callers": 1}
    assert isinstance(found[1], ModelFailed)


async def test_who_goes_again_is_given_up_at_his_own_deadline(make_pool: MakePool) -> None:
    pool, model = make_pool(hostile("tagged", pass_share=ANY), predict_s=1.0), opened(b"any")
    await pool.load(model)
    first = asyncio.create_task(said(pool, model, {"tag": "first"}))
    await asyncio.sleep(0.005)
    hangs = asyncio.create_task(said(pool, model, {"tag": "hangs", "act": "hang"}, wallet=2))
    hurried = asyncio.create_task(said(pool, model, {"tag": "hurried"}, wallet=3, limit_s=1.5))
    patient = asyncio.create_task(said(pool, model, {"tag": "patient"}, wallet=4))
    await first
    with pytest.raises(DeadlineExceeded, match=r"no answer came within 1\.5 s"):
        await hurried

    assert not hangs.done(), "in his turn alone"
    assert await patient == {"tag": "patient", "callers": 1}
    with pytest.raises(DeadlineExceeded, match="was stopped"):
        await hangs


async def test_a_callers_own_deadline_ends_his_wait_and_nobody_elses(make_pool: MakePool) -> None:
    pool, model = make_pool(hostile("slow")), opened(b"any")
    await pool.load(model)
    patient = asyncio.create_task(said(pool, model, {}))
    await asyncio.sleep(0.02)
    with pytest.raises(DeadlineExceeded) as waiting:
        await said(pool, model, {}, limit_s=0.05)
    assert await patient == {"predictions": [1]}
    pid = pool.loaded()[0].pid
    with pytest.raises(DeadlineExceeded) as running:
        await said(pool, model, {}, limit_s=0.05)

    assert "was not run" in waiting.value.detail
    assert "no answer came within 0.05 s" in running.value.detail
    assert await said(pool, model, {}) == {"predictions": [1]}
    assert pool.loaded()[0].pid == pid, "an impatient caller takes the process from nobody"


async def test_whoever_is_impatient_costs_the_others_no_restart(make_pool: MakePool) -> None:
    pool, model = make_pool(hostile("tagged")), opened(b"any")
    await pool.load(model)
    pid = pool.loaded()[0].pid
    impatient = [said(pool, model, {"tag": "x"}, wallet=9, limit_s=0.001) for _ in range(50)]
    patient = [said(pool, model, {"tag": number}, wallet=number) for number in range(1, 8)]
    found = await asyncio.gather(*patient, *impatient, return_exceptions=True)

    assert [one["tag"] for one in found[:7]] == list(range(1, 8))
    assert all(isinstance(one, DeadlineExceeded) for one in found[7:])
    assert (pool.loaded()[0].pid, pool.figures()[0].restarts) == (pid, 0)


@pytest.mark.parametrize("how", ["his deadline", "hanging up"])
async def test_a_pass_that_nobody_waits_for_is_stopped_after_the_grace(make_pool: MakePool, how: str) -> None:
    pool, model = make_pool(hostile("tagged", grace_s=0.3)), opened(b"any")
    await pool.load(model)
    pid = pool.loaded()[0].pid
    limit_s = 0.1 if how == "his deadline" else None
    stuck = asyncio.create_task(said(pool, model, {"tag": "stuck", "act": "hang"}, limit_s=limit_s))
    await asyncio.sleep(0.1)
    if limit_s is None:
        stuck.cancel()
    with pytest.raises((DeadlineExceeded, asyncio.CancelledError)):
        await stuck
    began = time.monotonic()

    assert pool.loaded()[0].pid == pid, "not before the grace"
    assert (await said(pool, model, {"tag": "next"}))["tag"] == "next"
    assert pool.loaded()[0].pid != pid, "what ran for nobody was really stopped"
    assert time.monotonic() - began < 8, "long before the 10 s that a run may take"


async def test_a_pass_goes_on_for_the_one_who_still_waits(make_pool: MakePool) -> None:
    pool, model = make_pool(hostile("tagged", grace_s=0.0)), opened(b"any")
    await pool.load(model)
    first = asyncio.create_task(said(pool, model, {"tag": "first"}))
    await asyncio.sleep(0.005)
    leaving = asyncio.create_task(said(pool, model, {"tag": "leaving"}, wallet=2))
    staying = asyncio.create_task(said(pool, model, {"tag": "staying"}, wallet=3))
    await first
    leaving.cancel()

    assert await staying == {"tag": "staying", "callers": 2}
    assert pool.figures()[0].restarts == 0


async def test_all_who_hang_a_pass_are_stopped_one_by_one(make_pool: MakePool) -> None:
    pool, model = make_pool(hostile("tagged", pass_share=ANY), predict_s=0.3), opened(b"any")
    await pool.load(model)
    asked = [{"tag": "dies", "act": "die"}, *({"tag": n, "act": "hang"} for n in range(3))]
    found = await together(pool, model, asked)

    assert isinstance(found[0], ModelFailed)
    assert [one.detail for one in found[1:]] == ["the model was stopped after 0.3 s"] * 3, "none is forgotten"
    assert (await said(pool, model, {"tag": "next"}))["tag"] == "next"


async def test_whoever_hangs_again_has_his_other_requests_run_last() -> None:
    """Else one wallet's many would each take a deadline from the others of their pass."""
    queue, loop = Queue(), asyncio.get_running_loop()
    jobs = [Job(owner, Item(b"{}"), loop.create_future(), 0.0, 1.0) for owner in (b"a", b"a", b"b", b"a", b"c")]
    queue.put_back(jobs)
    (hangs,) = queue.take(9)
    queue.put_last(hangs.owner)

    assert [queue.take(9) for _ in range(4)] == [[jobs[2]], [jobs[4]], [jobs[1]], [jobs[3]]]
    assert not queue


async def test_a_wallet_that_floods_takes_nobody_elses_turn(make_pool: MakePool) -> None:
    pool, model = make_pool(hostile("count", max_queue=40)), opened(b"any")
    await pool.load(model)
    flood = [asyncio.create_task(said(pool, model, {}, wallet=9)) for _ in range(40)]
    await asyncio.sleep(0.02)
    others = await asyncio.gather(*(said(pool, model, {}, wallet=n) for n in range(1, 6)))
    for task in flood:
        task.cancel()

    assert max(others) <= 12, "five wallets share turns with the flood: each is among the first"


async def test_when_all_places_are_taken_who_has_most_gives_way() -> None:
    queue, loop = Queue(), asyncio.get_running_loop()

    def job(owner: bytes) -> Job:
        return Job(owner, Item(b"{}"), loop.create_future(), loop.time(), 1.0)

    def refusal() -> Overloaded:
        return Overloaded("full", retry_after=1)

    many = [job(b"many") for _ in range(4)]
    for one in many:
        queue.put(one, 4, refusal)
    few = [job(b"few") for _ in range(3)]
    queue.put(few[0], 4, refusal)
    queue.put(few[1], 4, refusal)
    with pytest.raises(Overloaded):
        queue.put(few[2], 4, refusal)

    assert [one.done.done() for one in many] == [False, False, True, True], "the newest of his"
    assert [one.owner for one in queue.take(1) + queue.take(1) + queue.take(1)] == [b"many", b"few", b"many"]
    for one in many:
        if one.done.done():
            one.done.exception()


async def test_large_parameters_fill_a_pass_like_large_inputs() -> None:
    queue, loop = Queue(), asyncio.get_running_loop()
    for owner, size in ((b"a", 1), (b"b", MAX_PASS_BYTES - 8), (b"c", 1)):
        item = Item(b"{}", b"p" * (MAX_PASS_BYTES // 2)) if size == 1 else Item(b"x" * size, b"{}")
        queue.put(Job(owner, item, loop.create_future(), 0.0, 1.0), 9, lambda: Overloaded("full", retry_after=1))

    assert [[job.owner for job in queue.take(8)] for _ in range(3)] == [[b"a"], [b"b"], [b"c"]]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), max_size=40), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_every_job_comes_once_in_the_order_of_its_owner(asked: list[tuple[int, int]], most: int) -> None:
    async def run() -> None:
        queue, loop = Queue(), asyncio.get_running_loop()
        jobs = [
            Job(bytes([owner]), Item(str(number).encode(), str(kind).encode()), loop.create_future(), 0.0, 1.0)
            for number, (owner, kind) in enumerate(asked)
        ]
        for job in jobs:
            queue.put(job, 1000, lambda: Overloaded("full", retry_after=1))
        taken: list[Job] = []
        while queue:
            part = queue.take(most)
            assert 0 < len(part) <= most
            assert len({job.item.parameters for job in part if job.item}) == 1
            taken += part
        assert sorted(map(id, taken)) == sorted(map(id, jobs))
        for owner in {job.owner for job in jobs}:
            assert [j for j in taken if j.owner == owner] == [j for j in jobs if j.owner == owner]

    asyncio.run(run())


kinds = st.tuples(st.integers(0, 2), st.sampled_from([1, MAX_PASS_BYTES // 3, MAX_PASS_BYTES]))


@given(st.lists(st.lists(kinds, min_size=1, max_size=4), min_size=1, max_size=12), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_a_lines_turn_comes_after_at_most_as_many_passes_as_lines_before_it(
    wallets: list[list[tuple[int, int]]], most: int
) -> None:
    """However the others' parameters and sizes fit together, and although each who was answered asks again at once."""

    async def run() -> None:
        queue, loop = Queue(), asyncio.get_running_loop()
        texts = {size: b"x" * size for size in (1, MAX_PASS_BYTES // 3, MAX_PASS_BYTES)}

        def put(owner: bytes, kind: int, size: int) -> None:
            item = Item(texts[size], str(kind).encode())
            queue.put(Job(owner, item, loop.create_future(), 0.0, 1.0), 1000, lambda: Overloaded("full", retry_after=1))

        for number, asked in enumerate(wallets):
            for one in asked:
                put(bytes([number]), *one)
        passes_left = {bytes([number]): number + 1 for number in range(len(wallets))}
        for _ in range(3 * len(wallets)):
            part = queue.take(most)
            passes_left = {owner: left - 1 for owner, left in passes_left.items()}
            answered = list(dict.fromkeys(job.owner for job in part))
            assert all(left >= 0 for left in passes_left.values()), passes_left
            assert all(left > 0 for owner, left in passes_left.items() if owner not in answered), passes_left
            for job in part:
                assert job.item is not None
                put(job.owner, int(job.item.parameters or b""), len(job.item.data))
            passes_left |= dict.fromkeys(answered, len(wallets))

    asyncio.run(run())


@pytest.mark.parametrize("most", [2, 16, 64])
async def test_whose_parameters_nobody_shares_is_not_passed_over_for_ever(most: int) -> None:
    """Two wallets fill every pass between them, by turns."""
    queue, loop = Queue(), asyncio.get_running_loop()

    def put(owner: bytes, kind: bytes) -> None:
        job = Job(owner, Item(b"{}", kind), loop.create_future(), 0.0, 1.0)
        queue.put(job, 1000, lambda: Overloaded("full", retry_after=1))

    for owner, kind, count in ((b"a", b"1", most), (b"odd", b"2", 1), (b"b", b"1", most)):
        for _ in range(count):
            put(owner, kind)
    crowd = queue.take(most)
    for job in crowd:
        put(job.owner, b"1")

    assert {job.owner for job in crowd} == {b"a", b"b"}
    assert [job.owner for job in queue.take(most)] == [b"odd"]
    assert {job.owner for job in queue.take(most)} == {b"a", b"b"}, "and nobody has lost his turn to him"


async def test_a_pass_looks_past_a_bounded_number_of_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    queue, loop, looks = Queue(), asyncio.get_running_loop(), 0
    shares = Job.shares_a_pass_with

    def counted(self: Job, other: Job) -> bool:
        nonlocal looks
        looks += 1
        return shares(self, other)

    monkeypatch.setattr(Job, "shares_a_pass_with", counted)
    done = loop.create_future()
    for number in range(3000):
        job = Job(str(number).encode(), Item(b"{}", str(number).encode()), done, 0.0, 1.0)
        queue.put(job, 3000, lambda: Overloaded("full", retry_after=1))

    assert [[job.owner for job in queue.take(64)] for _ in range(3)] == [[b"0"], [b"1"], [b"2"]]
    assert looks <= 3 * 300


acts = st.sampled_from([None, None, None, None, "refuse", "die"])


@given(st.lists(st.tuples(st.integers(1, 5), acts), min_size=1, max_size=20))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_answer_ever_reaches_another_caller(asked: list[tuple[int, str | None]]) -> None:
    """Through passes, refusals, crashes and second attempts each caller has his own tag back, or his own error."""

    async def run() -> None:
        tuning = hostile("tagged", deaths=1000)
        pool, model = WorkerPool(predict_timeout_s=10, load_timeout_s=60, tuning=tuning), opened(b"any")
        try:
            await pool.load(model)
            sent = [{"tag": f"{wallet}-{n}", "act": act} for n, (wallet, act) in enumerate(asked)]
            found = await asyncio.gather(
                *(said(pool, model, one, wallet) for one, (wallet, _) in zip(sent, asked, strict=True)),
                return_exceptions=True,
            )
        finally:
            await pool.close()
        for one, answer in zip(sent, found, strict=True):
            if one["act"] == "refuse":
                assert isinstance(answer, InputInvalid)
                assert answer.detail == one["tag"]
            elif one["act"] == "die":
                assert isinstance(answer, ModelFailed)
            else:
                assert not isinstance(answer, DivaultError), answer
                assert answer["tag"] == one["tag"]

    asyncio.run(run())


async def test_rows_of_many_wallets_equal_their_own_answers_alone(make_pool: MakePool) -> None:
    random = np.random.default_rng(3)
    rows = random.normal(size=(300, 4))
    estimator = LogisticRegression().fit(rows, rows[:, 0] > 0)
    pool, model = make_pool(), opened(dumped(estimator))
    await pool.load(model)
    found = await asyncio.gather(
        *(said(pool, model, {"features": row.tolist()}, 1 + n % 9) for n, row in enumerate(rows))
    )
    worker = pool._entries[model.model.key].worker

    alone = [estimator.predict_proba([row])[0] for row in rows]
    assert np.allclose([one["probabilities"][0] for one in found], alone, rtol=1e-9)
    assert sum(worker.figures.passes[1:]) > 0, "passes were shared"
    assert worker.figures.callers == 300


# --- pieces -------------------------------------------------------------------------------------------------------


async def test_pieces_come_before_their_answer(make_pool: MakePool) -> None:
    pool, model = make_pool(hostile("pieces")), opened(b"any")
    await pool.load(model)
    got: list[Piece] = []
    whole = await pool.run(model, hold(model), call(model, {}), got.append)

    assert [piece.text for piece in got] == [str(n) for n in range(10)]
    assert whole.result == b"10"
    assert (await pool.run(model, hold(model), call(model, {}))).result == b"10", "and without them, whole"


@pytest.mark.parametrize("limit_s", [None, 0.15])
async def test_who_leaves_in_the_middle_ends_the_work(make_pool: MakePool, limit_s: float | None) -> None:
    pool, model = make_pool(hostile("pieces")), opened(b"any")
    pid = (await pool.load(model)).pid
    got: list[Piece] = []
    asked = replace(call(model, {}), limit_s=limit_s)
    task = asyncio.create_task(pool.run(model, hold(model), asked, got.append))
    while len(got) < 2:
        await asyncio.sleep(0.01)
    if limit_s is None:
        task.cancel()
    await asyncio.wait([task])
    began = asyncio.get_running_loop().time()
    async with asyncio.timeout(5):
        while not pool._entries[model.model.key].worker.idle:
            await asyncio.sleep(0.01)

    assert asyncio.get_running_loop().time() - began < 0.5
    assert len(got) < 6
    assert pool.loaded()[0].pid == pid


async def test_pieces_without_end_are_stopped(make_pool: MakePool) -> None:
    pool, model = make_pool(hostile("endless_pieces")), opened(b"any")
    await pool.load(model)
    with pytest.raises(ModelFailed) as caught:
        await pool.run(model, hold(model), call(model, {}), lambda _: None)

    assert caught.value.data["kind"] == "protocol"
