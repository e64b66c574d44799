"""One run and one charge per payment; a paid answer is given again byte for byte; failure costs nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest

from divault.errors import (
    DeadlineExceeded,
    DivaultError,
    InputInvalid,
    ModelFailed,
    NotReady,
    Overloaded,
    PaymentRequired,
    RequestRunning,
    ResultUnknown,
    StorageFailed,
)
from divault.receipts import Outcome, check
from divault.state import State
from divault.values import Answer, Hold, SignedCall, Usdc
from tests.counter import CHAIN_ID, NODE, OWNER, PRICE, STRANGER, TOKEN, USER, Counter, grant_of, principal_of, signed


@pytest.fixture
async def counter(tmp_path: Path) -> AsyncIterator[Counter]:
    async with Counter(tmp_path) as opened:
        yield opened


async def slow_yes(_: Hold) -> bytes:
    await asyncio.sleep(0.05)
    return b'{"label": "yes"}'


def failing(error: BaseException):
    async def work(*_: object, **__: object) -> bytes:
        raise error

    return work


async def ends_of(counter: Counter, calls: list[SignedCall]) -> list[Answer | BaseException]:
    return await asyncio.gather(*(counter.infer(call, slow_yes) for call in calls), return_exceptions=True)


async def test_of_50_copies_of_a_paid_request_one_runs_and_the_others_learn_of_it(counter: Counter) -> None:
    _, call = signed(tx=counter.chain.pay(PRICE.atomic))
    ends = await ends_of(counter, [call] * 50)
    answers = [end for end in ends if isinstance(end, Answer)]

    assert counter.runs == 1
    assert len(answers) + sum(isinstance(end, RequestRunning) for end in ends) == 50
    assert {answers[0].body} == {answer.body for answer in answers}
    assert await counter.credit() == 0
    assert await counter.rows("SELECT count(*) FROM charge") == [(1,)]
    assert await counter.chain_is_whole() == 1


async def test_of_50_requests_with_one_transfer_one_runs(counter: Counter) -> None:
    tx = counter.chain.pay(PRICE.atomic)
    ends = await ends_of(counter, [signed(tx=tx)[1] for _ in range(50)])
    refused = [end for end in ends if isinstance(end, PaymentRequired)]

    assert counter.runs == 1
    assert len(refused) == 49
    assert {"already_spent"} == {end.data["reason"] for end in refused}
    assert all(end.evidence is not None for end in refused)
    assert await counter.credit() == 0
    assert await counter.chain_is_whole() == 50


async def test_of_50_requests_on_the_last_credit_one_runs(counter: Counter) -> None:
    await counter.infer(signed(tx=counter.chain.pay(2 * PRICE.atomic))[1])
    ends = await ends_of(counter, [signed()[1] for _ in range(50)])

    assert counter.runs == 2
    assert sum(type(end) is PaymentRequired for end in ends) == 49
    assert await counter.credit() == 0


async def test_a_paid_answer_is_given_again_byte_for_byte(tmp_path: Path) -> None:
    chain = None
    async with Counter(tmp_path) as counter:
        chain = counter.chain
        principal, call = signed(tx=chain.pay(PRICE.atomic))
        first = await counter.infer(call)
        again = [await counter.infer(call) for _ in range(5)]
        by_id = await counter.ledger.result(principal.request, USER)
    async with Counter(tmp_path, chain) as counter:
        after_restart = await counter.infer(call)

        assert {first.body} == {answer.body for answer in [*again, by_id, after_restart]}
        assert counter.runs == 0
        assert await counter.chain_is_whole() == 1


async def test_the_receipt_says_what_was_charged_and_holds(counter: Counter) -> None:
    principal, call = signed(tx=counter.chain.pay(PRICE.atomic))
    answer = await counter.infer(call)
    assert answer.receipt is not None
    receipt = answer.receipt.envelope["receipt"]
    key = f"credit:{CHAIN_ID}:{TOKEN}:{USER}:{OWNER}:1".lower()

    assert receipt["price"] == str(PRICE.atomic)
    assert receipt["requestHash"] == str(principal.request)
    assert answer.receipt.envelope["payment_key"] == key
    assert orjson.loads(answer.body)["receipt"] == answer.receipt.envelope
    assert Outcome.FAILED not in {step.outcome for step in check(answer.receipt.envelope)}


async def test_charge_numbers_count_up_per_account(counter: Counter) -> None:
    await counter.infer(signed(tx=counter.chain.pay(3 * PRICE.atomic))[1])
    await counter.infer(signed()[1])
    with pytest.raises(ModelFailed) as caught:
        await counter.infer(signed()[1], failing(ModelFailed("no")))
    await counter.infer(signed()[1])
    keys = await counter.rows("SELECT payment_key FROM charge ORDER BY payment_key")

    assert [key.rpartition(":")[2] for (key,) in keys] == ["1", "2", "4"]
    assert caught.value.evidence is not None
    assert caught.value.evidence["payment_key"].endswith(":3")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ModelFailed("it raised"), 2),
        (StorageFailed("no gateway answered"), 2),
        (InputInvalid("no such field"), 3),
        (DeadlineExceeded("too slow"), 4),
    ],
)
async def test_a_failed_run_costs_nothing_and_has_a_receipt(counter: Counter, error: DivaultError, status: int) -> None:
    principal, call = signed(tx=counter.chain.pay(PRICE.atomic))
    with pytest.raises(type(error)) as caught:
        await counter.infer(call, failing(error))
    receipt = caught.value.evidence["receipt"]

    assert [str(status), "0"] == [str(receipt["status"]), receipt["price"]]
    assert receipt["paymentRef"] != "0x" + "00" * 32
    assert await counter.credit() == PRICE.atomic
    await counter.infer(signed()[1])
    assert await counter.credit() == 0
    with pytest.raises(DivaultError) as again:
        await counter.ledger.result(principal.request, USER)
    assert again.value.evidence == caught.value.evidence


async def test_a_failed_paid_request_is_answered_with_the_same_receipt_again(counter: Counter) -> None:
    _, call = signed(tx=counter.chain.pay(PRICE.atomic))
    ends = []
    for _ in range(3):
        with pytest.raises(ModelFailed) as caught:
            await counter.infer(call, failing(ModelFailed("it raised", kind="ValueError")))
        ends.append((caught.value.detail, caught.value.data, caught.value.evidence))

    assert ends[0] == ends[1] == ends[2]
    assert counter.runs == 1
    assert await counter.chain_is_whole() == 1


@pytest.mark.parametrize("error", [Overloaded("queue full", retry_after=1), RuntimeError("a fault of ours")])
async def test_after_an_end_without_receipt_the_same_bytes_run(counter: Counter, error: BaseException) -> None:
    _, call = signed(tx=counter.chain.pay(PRICE.atomic))
    with pytest.raises(type(error)):
        await counter.infer(call, failing(error))
    assert await counter.credit() == PRICE.atomic
    answer = await counter.infer(call)

    assert isinstance(answer, Answer)
    assert await counter.credit() == 0
    assert await counter.chain_is_whole() == 1


@pytest.mark.parametrize("turns", range(0, 40, 3))
async def test_a_caller_who_leaves_at_any_moment_pays_for_an_answer_or_not_at_all(counter: Counter, turns: int) -> None:
    _, call = signed(tx=counter.chain.pay(PRICE.atomic))
    task = asyncio.create_task(counter.infer(call))
    for _ in range(turns):
        await asyncio.sleep(0.0003)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    answer = await counter.infer(call)

    assert orjson.loads(answer.body)["result"] == {"label": "yes"}
    assert await counter.credit() == 0
    assert await counter.rows("SELECT count(*) FROM charge") == [(1,)]
    assert await counter.rows("SELECT reserved FROM credit") == [("0",)]
    assert await counter.chain_is_whole() == 1


async def test_a_run_outlasts_its_lease_and_is_charged_while_its_copies_wait(tmp_path: Path) -> None:
    """Its caller may have waited for a turn, and for a load before that, as long as each of their deadlines says."""
    now = time.time()
    async with Counter(tmp_path, clock=lambda: now) as counter:
        _, call = signed(tx=counter.chain.pay(PRICE.atomic))

        async def slow(_: Hold) -> bytes:
            nonlocal now
            for _ in range(3):
                now += 200
                with pytest.raises(RequestRunning):
                    await counter.infer(call)
            return b'"late"'

        answer = await counter.infer(call, slow)

        assert counter.runs == 1
        assert orjson.loads((await counter.infer(call)).body)["result"] == "late"
        assert answer.receipt is not None
        assert await counter.rows("SELECT count(*) FROM charge") == [(1,)]
        assert await counter.credit() == 0


async def test_what_a_run_holds_beyond_its_lease_is_nobody_elses(tmp_path: Path) -> None:
    now = time.time()
    async with Counter(tmp_path, clock=lambda: now) as counter:
        await counter.infer(signed(tx=counter.chain.pay(2 * PRICE.atomic))[1])
        _, other = signed()

        async def slow(_: Hold) -> bytes:
            nonlocal now
            for _ in range(2):
                with pytest.raises(PaymentRequired):
                    await counter.infer(other)
                assert await counter.credit() == 0
                now += 181
            return b'"late"'

        await counter.infer(signed()[1], slow)

        assert await counter.rows("SELECT balance, reserved FROM credit") == [("0", "0")]
        assert await counter.chain_is_whole() == 2


async def test_a_run_whose_reservation_is_gone_is_neither_charged_nor_answered(counter: Counter) -> None:
    await counter.infer(signed(tx=counter.chain.pay(2 * PRICE.atomic))[1])

    async def robbed(_: Hold) -> bytes:
        await counter.ledger.recover()  # as if another process had begun on these books
        return b'"late"'

    with pytest.raises(DeadlineExceeded) as caught:
        await counter.infer(signed()[1], robbed)

    assert caught.value.evidence is not None
    assert await counter.credit() == PRICE.atomic
    assert await counter.rows("SELECT balance, reserved FROM credit") == [(str(PRICE.atomic), "0")]


@pytest.mark.parametrize("later", [0, 181])
async def test_a_run_that_nobody_could_end_lapses_with_its_lease(
    tmp_path: Path, later: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    async with Counter(tmp_path, clock=lambda: now) as counter:
        _, call = signed(tx=counter.chain.pay(PRICE.atomic))

        async def turned_away(_: Hold) -> bytes:
            nonlocal now
            now += later
            await counter.ledger.pulse()
            monkeypatch.setattr(State, "write", failing(NotReady("the disk is full")))
            raise Overloaded("queue full", retry_after=1)

        with pytest.raises(Overloaded):
            await counter.infer(call, turned_away)
        monkeypatch.undo()
        if not later:
            with pytest.raises(RequestRunning):
                await counter.infer(call)
            now += 181

        assert await counter.credit() == PRICE.atomic
        await counter.infer(call)
        assert await counter.rows("SELECT balance, reserved FROM credit") == [("0", "0")]


async def test_credit_is_the_payers_alone_and_for_that_owner_alone(counter: Counter) -> None:
    await counter.infer(signed(tx=counter.chain.pay(5 * PRICE.atomic))[1])
    _, foreign = signed(user=STRANGER)
    with pytest.raises(PaymentRequired):
        await counter.infer(foreign)

    assert await counter.credit() == 4 * PRICE.atomic
    assert await counter.credit(STRANGER) == 0
    assert await counter.credit(USER, STRANGER) == 0


async def test_results_are_for_the_user_who_signed(counter: Counter) -> None:
    principal, call = signed(tx=counter.chain.pay(PRICE.atomic))
    await counter.infer(call)
    with pytest.raises(ResultUnknown):
        await counter.ledger.result(principal.request, STRANGER)
    with pytest.raises(ResultUnknown):
        await counter.ledger.result(principal_of(signed()[1]).request, USER)


async def test_an_expired_answer_leaves_its_receipt_without_the_private_part(tmp_path: Path) -> None:
    now = time.time()
    async with Counter(tmp_path, clock=lambda: now) as counter:
        principal, call = signed(tx=counter.chain.pay(PRICE.atomic))
        answer = await counter.infer(call)
        now += 86_401
        with pytest.raises(ResultUnknown) as caught:
            await counter.ledger.result(principal.request, USER)
        await counter.infer(signed(max_price=0)[1], price=Usdc(0))

        assert answer.receipt is not None
        assert caught.value.evidence is not None
        assert caught.value.evidence["receipt_hash"] == str(answer.receipt.hash)
        assert caught.value.evidence["input_salt"] is None
        assert await counter.rows("SELECT * FROM outcome") == []


async def test_why_an_answer_is_not_kept_is_told_as_it_is(tmp_path: Path) -> None:
    now = time.time()
    async with Counter(tmp_path, clock=lambda: now) as counter:
        paid, call = signed(tx=counter.chain.pay(PRICE.atomic))
        await counter.infer(call)
        free, call = signed(max_price=0)
        await counter.infer(call, price=Usdc(0))
        failed, call = signed(max_price=0)
        with pytest.raises(ModelFailed):
            await counter.infer(call, failing(ModelFailed("no")), price=Usdc(0))

        assert (await counter.ledger.result(paid.request, USER)).body, "kept for a day"
        for principal, told in ((free, "answers of free calls are not kept"), (failed, "ended without an answer")):
            with pytest.raises(ResultUnknown, match=told) as caught:
                await counter.ledger.result(principal.request, USER)
            assert caught.value.evidence is not None
        now += 86_401
        with pytest.raises(ResultUnknown, match="not kept any more"):
            await counter.ledger.result(paid.request, USER)


async def test_successes_are_counted_from_receipts(counter: Counter) -> None:
    await counter.infer(signed(tx=counter.chain.pay(PRICE.atomic))[1])
    await counter.infer(signed(max_price=0)[1], price=Usdc(0))
    with pytest.raises(ModelFailed):
        await counter.infer(signed(max_price=0)[1], failing(ModelFailed("no")), price=Usdc(0))
    model = signed()[1].model

    assert await counter.ledger.successes() == 2
    assert await counter.ledger.successes(model) == 2


async def test_a_failed_run_names_the_model_and_runtime_it_stood_on(counter: Counter) -> None:
    async def opened_then_failed(hold: Hold) -> bytes:
        counter.ledger.opened(hold, hold.grant.block.hash, {"adapter": "test"})
        raise ModelFailed("it raised")

    with pytest.raises(ModelFailed) as caught:
        await counter.infer(signed(max_price=0)[1], opened_then_failed, price=Usdc(0))
    envelope = caught.value.evidence

    assert envelope["runtime"] == {"adapter": "test"}
    assert envelope["receipt"]["plaintextHash"] != "0x" + "00" * 32
    assert envelope["receipt"]["node"] == str(NODE)


async def test_one_principal_has_one_outcome(counter: Counter) -> None:
    principal, call = signed(max_price=0)
    async with counter.ledger.outcome(principal, call):
        with pytest.raises(RuntimeError, match="one Principal"):
            async with counter.ledger.outcome(principal, call):
                pass


async def test_the_pulse_writes_and_says_when_it_can_not(tmp_path: Path) -> None:
    async with Counter(tmp_path) as counter:
        await counter.ledger.pulse()
        await counter.ledger.pulse()
        assert len(await counter.rows("SELECT at FROM pulse")) == 1
    with pytest.raises(NotReady):
        await counter.ledger.pulse()


async def test_holding_outside_of_an_outcome_is_a_fault(counter: Counter) -> None:
    principal, call = signed(max_price=0)
    with pytest.raises(RuntimeError, match="outcome"):
        async with counter.payments.hold(grant_of(principal, Usdc(0)), call):
            pass


async def test_a_hold_that_nobody_charged_ends_with_the_outcome(counter: Counter) -> None:
    principal, call = signed(tx=counter.chain.pay(PRICE.atomic))
    async with counter.ledger.outcome(principal, call), counter.payments.hold(grant_of(principal), call):
        pass

    assert await counter.rows("SELECT stage FROM request") == [("released",)]
    assert await counter.rows("SELECT balance, reserved FROM credit") == [(str(PRICE.atomic), "0")]
