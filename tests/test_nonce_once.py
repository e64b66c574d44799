"""A nonce works once: under a flood of copies, after a restart, whatever the first use came to."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from divault.errors import AccessDenied, DivaultError, ModelFailed, NonceUsed, NotReady, Overloaded, RateLimited
from divault.limits import RefusalBudget
from divault.payments import books
from divault.payments.ledger import _FreeRun
from divault.payments.stages import Stage
from divault.receipts import answer_body, redact
from divault.values import Answer, Hold, SignedCall, Usdc
from tests.counter import PRICE, STRANGER, Counter, grant_of, principal_of, signed

FREE = Usdc(0)


@pytest.fixture
async def counter(tmp_path: Path) -> AsyncIterator[Counter]:
    async with Counter(tmp_path) as opened:
        yield opened


async def slow_yes(_: Hold) -> bytes:
    await asyncio.sleep(0.05)
    return b'"yes"'


async def fails(_: Hold) -> bytes:
    raise ModelFailed("it raised", kind="ValueError")


async def overloaded(_: Hold) -> bytes:
    raise Overloaded("queue full", retry_after=1)


async def test_of_100_copies_of_a_free_request_exactly_one_runs(counter: Counter) -> None:
    _, call = signed(max_price=0)
    ends = await asyncio.gather(
        *(counter.infer(call, slow_yes, price=FREE) for _ in range(100)), return_exceptions=True
    )

    assert counter.runs == 1
    assert sum(isinstance(end, Answer) for end in ends) == 1
    assert sum(isinstance(end, NonceUsed) for end in ends) == 99
    assert await counter.chain_is_whole() == 1


@pytest.mark.parametrize("work", [slow_yes, fails])
async def test_a_restart_does_not_forget_a_nonce(tmp_path: Path, work) -> None:
    _, call = signed(max_price=0)
    async with Counter(tmp_path) as counter:
        await asyncio.gather(counter.infer(call, work, price=FREE), return_exceptions=True)
    async with Counter(tmp_path) as counter:
        await counter.ledger.recover()
        with pytest.raises(NonceUsed):
            await counter.infer(call, price=FREE)

    assert counter.runs == 0


async def test_another_body_under_a_used_nonce_is_refused(counter: Counter) -> None:
    _, first = signed(max_price=0, nonce="n", body="a")
    _, other = signed(max_price=0, nonce="n", body="b")
    await counter.infer(first, price=FREE)
    with pytest.raises(NonceUsed):
        await counter.infer(other, price=FREE)


@pytest.mark.parametrize("work", [slow_yes, fails, overloaded])
async def test_another_body_under_a_priced_nonce_is_refused(counter: Counter, work) -> None:
    """Also after a release: the nonce belongs to the bytes that used it first."""
    _, first = signed(tx=counter.chain.pay(PRICE.atomic), nonce="n", body="a")
    _, other = signed(tx=counter.chain.pay(PRICE.atomic), nonce="n", body="b")
    await asyncio.gather(counter.infer(first, work), return_exceptions=True)
    with pytest.raises(NonceUsed):
        await counter.infer(other)
    with pytest.raises(NonceUsed):
        await counter.ledger.answered(principal_of(other))


async def test_a_free_run_that_outlasts_its_lease_is_answered_and_runs_once(tmp_path: Path) -> None:
    now = time.time()
    async with Counter(tmp_path, clock=lambda: now) as counter:
        _, call = signed(max_price=0)

        async def stuck(_: Hold) -> bytes:
            nonlocal now
            now += 181
            with pytest.raises(NonceUsed):
                await counter.infer(call, price=FREE)
            await counter.infer(signed(max_price=0)[1], price=FREE)
            assert await counter.rows("SELECT stage FROM request") == [("done",)]
            return b'"late"'

        assert b'"late"' in (await counter.infer(call, stuck, price=FREE)).body
        assert await counter.rows("SELECT stage FROM request") == [("done",), ("done",)]
        with pytest.raises(NonceUsed):
            await counter.infer(call, price=FREE)

    assert counter.runs == 2


@pytest.fixture
def full_disk(counter: Counter, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Undoes the next write that ends a free run as `consumed`, at its commit; and those that share it."""
    finish = books.finish

    def fails_at_commit(db: sqlite3.Connection, *told: Any, **more: Any) -> None:
        finish(db, *told, **more)
        if told[-1] is Stage.CONSUMED:
            monkeypatch.setattr(books, "finish", finish)
            asyncio.get_running_loop().call_soon(counter.state._undo, sqlite3.OperationalError("disk is full"))

    return lambda: monkeypatch.setattr(books, "finish", fails_at_commit)


async def left_unseen(counter: Counter, call: SignedCall) -> None:
    """A free run that began, and whose caller left."""
    begun = asyncio.Event()

    async def long(_: Hold) -> bytes:
        begun.set()
        return await asyncio.sleep(60, b"")

    task = asyncio.create_task(counter.infer(call, long, price=FREE))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_nonce_stays_used_when_the_write_that_says_so_fails(
    counter: Counter, full_disk: Callable[[], None]
) -> None:
    """At the end of the run, and again when what is left of it is ended."""
    _, call = signed(max_price=0)
    full_disk()
    await left_unseen(counter, call)
    assert await counter.rows("SELECT * FROM request") == []
    full_disk()
    with pytest.raises(NonceUsed):
        await counter.infer(call, price=FREE)
    with pytest.raises(NotReady):  # whoever comes next ends what has lapsed
        await counter.infer(signed(max_price=0)[1], price=FREE)
    with pytest.raises(NonceUsed):
        await counter.infer(call, price=FREE)
    await counter.infer(signed(max_price=0)[1], price=FREE)

    assert sorted(await counter.rows("SELECT stage FROM request")) == [("consumed",), ("done",)]
    with pytest.raises(NonceUsed):
        await counter.infer(call, price=FREE)
    assert counter.runs == 2


async def test_a_run_that_is_written_down_as_consumed_is_not_answered(counter: Counter) -> None:
    """Not even while that is on its way to the disk."""
    _, call = signed(max_price=0)

    async def given_up(_: Hold) -> bytes:
        counter.ledger._living.clear()  # as if nobody in this process worked on it
        counter.ledger._now = lambda: int(time.time()) + 200  # type: ignore[method-assign]
        tidying = asyncio.create_task(counter.ledger.consume(principal_of(signed(max_price=0)[1])))
        await asyncio.sleep(0)
        assert not tidying.done()
        return b'"late"'

    with pytest.raises(DivaultError) as refused:
        await counter.infer(call, given_up, price=FREE)

    assert refused.value.code in ("deadline_exceeded", "nonce_used")
    assert ("done",) not in await counter.rows("SELECT stage FROM request")


async def test_the_same_nonce_of_another_wallet_is_another_nonce(counter: Counter) -> None:
    _, first = signed(max_price=0, nonce="n")
    _, other = signed(max_price=0, nonce="n", user=STRANGER)
    await counter.infer(first, price=FREE)
    await counter.infer(other, price=FREE)

    assert counter.runs == 2


async def test_a_nonce_is_consumed_once_by_calls_without_receipt(counter: Counter) -> None:
    principal, call = signed(max_price=0)
    ends = await asyncio.gather(
        *(counter.ledger.consume(principal_of(call)) for _ in range(50)), return_exceptions=True
    )

    assert sum(end is None for end in ends) == 1
    assert sum(isinstance(end, NonceUsed) for end in ends) == 49
    with pytest.raises(NonceUsed):
        await counter.infer(call, price=FREE)
    with pytest.raises(NonceUsed):
        await counter.ledger.answered(principal)


async def test_a_run_that_was_turned_away_uses_no_nonce(counter: Counter) -> None:
    _, call = signed(max_price=0)
    with pytest.raises(Overloaded):
        await counter.infer(call, overloaded, price=FREE)
    await counter.infer(call, price=FREE)

    assert await counter.chain_is_whole() == 1


async def test_a_refusal_uses_the_nonce_and_has_a_receipt(counter: Counter) -> None:
    principal, call = signed(max_price=0)
    with pytest.raises(AccessDenied) as caught:
        async with counter.ledger.outcome(principal, call):
            raise AccessDenied("hold 100 more", have="0", need="100")

    assert caught.value.evidence is not None
    assert caught.value.evidence["receipt"]["status"] in (3, "3")
    with pytest.raises(NonceUsed):
        await counter.infer(call, price=FREE)
    assert await counter.chain_is_whole() == 1


async def test_copies_of_a_refused_request_get_one_receipt(counter: Counter) -> None:
    _, call = signed(max_price=0)

    async def refused() -> None:
        async with counter.ledger.outcome(principal_of(call), call):
            await asyncio.sleep(0)
            raise AccessDenied("hold 100 more", have="0", need="100")

    ends = await asyncio.gather(*(refused() for _ in range(20)), return_exceptions=True)

    assert sum(isinstance(end, AccessDenied) for end in ends) == 1
    assert sum(isinstance(end, NonceUsed) for end in ends) == 19
    assert await counter.chain_is_whole() == 1


async def test_what_was_seen_of_a_nonce_does_not_outlast_what_another_copy_made_of_it(counter: Counter) -> None:
    """Both copies saw a fresh nonce; the first is refused, on disk, before the second reserves its run."""
    _, call = signed(max_price=0)
    first, second = principal_of(call), principal_of(call)
    for copy in (first, second):
        assert await counter.ledger.answered(copy) is None
    with pytest.raises(AccessDenied):
        async with counter.ledger.outcome(first, call):
            raise AccessDenied("hold 100 more", have="0", need="100")
    with pytest.raises(NonceUsed):
        async with counter.ledger.outcome(second, call):
            await counter.ledger.reserve(grant_of(second, FREE), FREE)

    assert counter.ledger.pending == 0
    assert await counter.chain_is_whole() == 1


async def test_beyond_the_budget_a_refusal_has_no_receipt_and_uses_no_nonce(counter: Counter) -> None:
    budget = RefusalBudget(per_peer=2)
    ends: list[DivaultError] = []
    for _ in range(3):
        principal, call = signed(max_price=0)
        with pytest.raises(DivaultError) as caught:
            async with counter.ledger.outcome(principal, call, budget):
                raise AccessDenied("hold 100 more")
        ends.append(caught.value)

    assert [type(end) for end in ends] == [AccessDenied, AccessDenied, RateLimited]
    assert await counter.chain_is_whole() == 2
    await counter.infer(call, price=FREE)


async def test_a_failed_run_is_not_held_to_the_budget_of_refusals(counter: Counter) -> None:
    budget = RefusalBudget(per_peer=1)
    for _ in range(3):
        with pytest.raises(ModelFailed):
            await counter.infer(signed(max_price=0)[1], fails, price=FREE, budget=budget)

    assert await counter.chain_is_whole() == 3


async def test_errors_without_receipt_leave_no_trace(counter: Counter) -> None:
    principal, call = signed(max_price=0)
    with pytest.raises(RateLimited):
        async with counter.ledger.outcome(principal, call):
            raise RateLimited("slow down")

    assert await counter.rows("SELECT * FROM request") == []
    assert await counter.chain_is_whole() == 0


async def test_a_cancelled_free_run_keeps_its_nonce_used(counter: Counter) -> None:
    _, call = signed(max_price=0)
    await left_unseen(counter, call)
    with pytest.raises(NonceUsed):
        await counter.infer(call, price=FREE)


async def test_nonces_are_forgotten_long_after_their_signature_ended(tmp_path: Path) -> None:
    now = time.time()
    async with Counter(tmp_path, clock=lambda: now) as counter:
        for _ in range(3):
            await counter.infer(signed(max_price=0)[1], price=FREE)
        now += 60 + 299
        await counter.infer(signed(max_price=0)[1], price=FREE)
        kept = len(await counter.rows("SELECT * FROM request"))
        now += 62
        await counter.infer(signed(max_price=0)[1], price=FREE)

        assert kept == 4
        assert len(await counter.rows("SELECT * FROM request")) == 1
        assert await counter.chain_is_whole() == 5


async def test_a_free_answer_is_not_kept(counter: Counter) -> None:
    await counter.infer(signed(max_price=0)[1], price=FREE)

    assert await counter.rows("SELECT * FROM outcome") == []


async def test_a_kept_receipt_names_its_runtime_also_after_a_write_that_failed(
    counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = books.append_receipt

    def full(*_: Any) -> None:
        monkeypatch.setattr(books, "append_receipt", append)
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(books, "append_receipt", full)
    with pytest.raises(NotReady):
        await counter.infer(signed(max_price=0)[1], price=FREE)
    principals = []
    for _ in range(2):
        principal, call = signed(max_price=0)
        principals.append((principal, await counter.infer(call, price=FREE)))

    for principal, answer in principals:
        kept = await counter.state.read(lambda db, of=principal: books.receipt_of(db, of.request, of.user))
        assert answer.receipt is not None
        assert kept == redact(answer.receipt.envelope)
        assert kept["runtime"] == {"adapter": "test", "device": "cpu"}
    assert len(await counter.rows("SELECT hash FROM runtime")) == 1


@pytest.mark.parametrize("which", [0, 2])
@pytest.mark.parametrize("price", [FREE, PRICE])
async def test_an_answer_that_cannot_be_worded_disturbs_no_other_and_leaves_no_gap(
    counter: Counter, price: Usdc, which: int
) -> None:
    def unable(*_: Any) -> bytes:
        raise ModelFailed("no words", kind="answer_shape")

    def asked() -> SignedCall:
        return signed(tx=counter.chain.pay(price.atomic) if price.atomic else None, max_price=price.atomic)[1]

    calls = [asked() for _ in range(5)]
    words = [unable if place == which else answer_body for place in range(5)]
    asks = (counter.infer(call, price=price, wording=how) for call, how in zip(calls, words, strict=True))
    ends = await asyncio.gather(*asks, return_exceptions=True)

    assert [type(end) for end in ends] == [ModelFailed if place == which else Answer for place in range(5)]
    assert await counter.chain_is_whole() == 5, "four answers and a failure"


async def test_a_runtime_is_kept_once_for_all_runs_of_a_node(tmp_path: Path) -> None:
    for _ in range(2):
        async with Counter(tmp_path) as counter:
            await counter.infer(signed(max_price=0)[1], price=FREE)
            assert len(await counter.rows("SELECT hash FROM runtime")) == 1


async def test_a_free_call_takes_less_than_1500_bytes_in_the_file(tmp_path: Path) -> None:
    """What docs/how-to/run-a-node.md tells operators to reckon with."""
    sizes = []
    for count in (200, 800):
        async with Counter(tmp_path) as counter:
            for _ in range(count):
                await counter.infer(signed(max_price=0)[1], price=FREE)
            found = await counter.state.scan(lambda db: db.execute("PRAGMA database_list").fetchone())
            file = Path(found[2])
        sizes.append(file.stat().st_size)  # closed: all of the log is folded back

    assert 500 < (sizes[1] - sizes[0]) / 800 < 1500


async def test_what_is_written_of_an_older_presentation_ends_no_newer_one(counter: Counter) -> None:
    principal, _ = signed(max_price=0)
    older, newer = (_FreeRun(principal, attempt, lease_until=0) for attempt in (b"older", b"newer"))
    ledger = counter.ledger
    ledger._put_back([newer])
    ledger._put_back([older])

    assert not ledger._take(older)
    assert ledger._take(newer), "it holds the nonce, and alone"
    assert not ledger._free
