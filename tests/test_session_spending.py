"""What a session spends: never more than its wallet allowed, once per idempotency key, and nothing without one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from divault.errors import (
    AllowanceExceeded,
    BadRequest,
    ModelFailed,
    NonceUsed,
    NotReady,
    PaymentRequired,
    PriceChanged,
    SessionInvalid,
)
from divault.payments import TransferCredit, books
from divault.state import State
from divault.values import Answer, Hold, SignedCall, Usdc
from tests.counter import (
    CHAIN_ID,
    OWNER,
    PRICE,
    TOKEN,
    USER,
    Counter,
    answer_yes,
    digest_of,
    of_session,
    principal_of,
    signed,
)
from tests.ledger_child import call_number
from tests.test_pay_crash import CHARGED, killed_at, nothing_is_lost

LOGIN, OTHER = digest_of("a session"), digest_of("another")


@pytest.fixture
async def counter(tmp_path: Path) -> AsyncIterator[Counter]:
    """A wallet with credit for ten calls, and a session that may spend three of them."""
    async with Counter(tmp_path) as opened:
        _, call = signed(tx=opened.chain.pay(11 * PRICE.atomic))
        await opened.infer(call)
        await opened.allow(LOGIN, 3 * PRICE.atomic)
        yield opened


def call(number: int, login=LOGIN) -> SignedCall:
    return of_session(login, f"key-{number}")


async def slow_yes(_: Hold) -> bytes:
    await asyncio.sleep(0.02)
    return b'"yes"'


async def fail(_: Hold) -> bytes:
    raise ModelFailed("no")


async def test_ten_calls_at_once_spend_what_is_allowed_and_no_more(counter: Counter) -> None:
    ends = await asyncio.gather(*(counter.infer(call(n), slow_yes) for n in range(10)), return_exceptions=True)
    refused = [end for end in ends if isinstance(end, AllowanceExceeded)]

    assert sum(isinstance(end, Answer) for end in ends) == 3
    assert len(refused) == 7
    assert all((end.data["have"], end.data["need"]) == ("0", str(PRICE.atomic)) for end in refused)
    assert await counter.credit() == 7 * PRICE.atomic
    assert await counter.used(LOGIN) == 3 * PRICE.atomic


async def test_a_session_that_may_spend_nothing_draws_nothing(counter: Counter) -> None:
    with pytest.raises(PriceChanged, match="sign in again"):
        await counter.infer(call(1, OTHER))
    await counter.allow(OTHER, 100 * PRICE.atomic, token=digest_address())
    with pytest.raises(PriceChanged):
        await counter.infer(call(2, OTHER))
    assert await counter.credit() == 10 * PRICE.atomic


def digest_address():
    """Another token than the model's."""
    return type(TOKEN)(b"\x66" * 20)


async def test_it_is_not_asked_to_spend_for_free_models(counter: Counter) -> None:
    for key in (None, "a"):
        assert await counter.infer(of_session(OTHER, key), price=Usdc(0))
    with pytest.raises(NonceUsed, match="Idempotency-Key"):
        await counter.infer(of_session(OTHER, "a"), price=Usdc(0))


async def test_a_call_that_nobody_can_send_again_leaves_a_receipt_and_no_row(counter: Counter) -> None:
    async def kept() -> tuple[int, int]:
        requests = await counter.rows("SELECT 1 FROM request WHERE login IS NOT NULL")
        return len(requests), len(await counter.rows("SELECT 1 FROM receipt"))

    _, before = await kept()
    for _ in range(2):
        await counter.infer(of_session(OTHER, None), price=Usdc(0))
    assert await kept() == (0, before + 2)
    with pytest.raises(ModelFailed):
        await counter.infer(of_session(OTHER, None), fail, price=Usdc(0))
    assert await kept() == (0, before + 3)
    await counter.infer(of_session(OTHER, "a"), price=Usdc(0))
    assert await kept() == (1, before + 4)


async def test_nothing_can_be_reserved_for_it(counter: Counter) -> None:
    principal = principal_of(of_session(LOGIN, None))
    account = books.Account(CHAIN_ID, TOKEN, USER, OWNER)
    wanted = books.Reservation(b"", int(time.time()) + 60, PRICE, account)
    with pytest.raises(ValueError, match="no row"):
        await counter.state.write(lambda db: books.reserve(db, principal, None, wanted))
    assert await counter.credit() == 10 * PRICE.atomic
    assert await counter.used(LOGIN) == 0


async def test_a_paid_call_without_a_key_is_told_to_bring_one(counter: Counter) -> None:
    with pytest.raises(BadRequest) as caught:
        await counter.infer(of_session(LOGIN, None))

    assert caught.value.data["field"] == "idempotency-key"
    assert await counter.used(LOGIN) == 0


async def test_without_credit_it_is_offered_first(counter: Counter) -> None:
    await counter.allow(OTHER, 11 * PRICE.atomic)
    for key in (None, "a"):
        with pytest.raises(PaymentRequired):
            await counter.infer(of_session(OTHER, key), price=Usdc(11 * PRICE.atomic))


@pytest.mark.parametrize("key", [None, "a"])
@pytest.mark.parametrize("paying", [False, True])
async def test_what_a_session_may_not_spend_is_not_offered(counter: Counter, key: str | None, paying: bool) -> None:
    """Money that is sent for such an offer could not be spent by the session that was told to send it."""
    dear = Usdc(11 * PRICE.atomic)
    await counter.allow(OTHER, dear.atomic - 1)
    tx = counter.chain.pay(dear.atomic) if paying else None
    with pytest.raises(PriceChanged, match="sign in again") as refused:
        await counter.infer(of_session(OTHER, key, tx=tx), price=dear)

    assert (refused.value.data["have"], refused.value.data["need"]) == (str(dear.atomic - 1), str(dear.atomic))
    assert await counter.credit() == 10 * PRICE.atomic, "and nothing was claimed"


async def kept(counter: Counter) -> list[tuple]:
    return await counter.rows("SELECT (SELECT count(*) FROM receipt), (SELECT count(*) FROM request)")


async def test_what_it_may_not_spend_uses_no_key_up(counter: Counter) -> None:
    """Nothing was signed or offered: its wallet signs in again, and the program sends what it sent."""
    before = await kept(counter)
    for _ in range(2):
        with pytest.raises(AllowanceExceeded) as refused:
            await counter.infer(call(1, OTHER))
        assert refused.value.evidence is None
    assert await kept(counter) == before

    assert (await counter.infer(call(1))).body, "from a session that may spend more"
    with pytest.raises(NonceUsed):
        await counter.infer(call(1, OTHER))


async def test_who_is_refused_while_another_call_holds_the_rest_may_come_again(counter: Counter) -> None:
    await counter.allow(OTHER, PRICE.atomic)
    first = asyncio.create_task(counter.infer(call(1, OTHER), forever))
    while await counter.used(OTHER) == 0:
        await asyncio.sleep(0)
    with pytest.raises(AllowanceExceeded):
        await counter.infer(call(2, OTHER))
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)

    assert (await counter.infer(call(2, OTHER))).body, "the same call"
    assert await counter.used(OTHER) == PRICE.atomic


async def test_a_transfer_is_not_claimed_by_a_call_that_another_was_faster_than(
    counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It saw enough of the allowance when it looked; at its reservation there is too little."""
    await counter.allow(OTHER, PRICE.atomic - 1)
    tx, before = counter.chain.pay(PRICE.atomic), await kept(counter)
    with monkeypatch.context() as patched:
        patched.setattr(TransferCredit, "_check_means", lambda *_: None)
        with pytest.raises(AllowanceExceeded) as refused:
            await counter.infer(of_session(OTHER, "a", tx=tx))
    assert refused.value.evidence is None
    assert (await kept(counter), await counter.credit()) == (before, 10 * PRICE.atomic)

    assert (await counter.infer(of_session(LOGIN, "a", tx=tx))).body
    assert await counter.credit() == 10 * PRICE.atomic, "claimed now, and spent"


async def test_a_price_above_the_calls_own_limit_uses_its_key_up(counter: Counter) -> None:
    """That call named its limit itself: what it was refused for can be proven."""
    limited = of_session(LOGIN, "a")
    limited = msgspec.structs.replace(limited, max_price=Usdc(1))
    for _ in range(2):
        with pytest.raises(PriceChanged, match="fresh Idempotency-Key") as refused:
            await counter.infer(limited)
        assert refused.value.evidence is not None


async def test_the_same_key_again_gives_the_same_answer_for_one_price(counter: Counter) -> None:
    first = await counter.infer(call(1))
    again = await counter.infer(call(1))

    assert first.body == again.body
    assert await counter.used(LOGIN) == PRICE.atomic


async def test_the_same_key_for_another_body_or_from_another_session_is_refused(counter: Counter) -> None:
    await counter.allow(OTHER, 3 * PRICE.atomic)
    await counter.infer(call(1))
    for other in (of_session(LOGIN, "key-1", body=b'{"a":1}'), call(1, OTHER)):
        with pytest.raises(NonceUsed):
            await counter.infer(other)
    assert await counter.credit() == 9 * PRICE.atomic


async def test_what_a_failed_run_held_may_be_spent_again(counter: Counter) -> None:
    for number in range(5):
        with pytest.raises(ModelFailed):
            await counter.infer(call(number), fail)
    assert await counter.used(LOGIN) == 0
    for number in range(5, 8):
        await counter.infer(call(number))
    assert await counter.used(LOGIN) == 3 * PRICE.atomic


async def test_a_caller_that_leaves_gives_it_back(counter: Counter) -> None:
    task = asyncio.create_task(counter.infer(call(1), slow_yes))
    while await counter.used(LOGIN) == 0:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert await counter.used(LOGIN) == 0
    assert (await counter.infer(call(1), answer_yes)).body


async def test_a_call_under_way_is_not_charged_once_its_session_was_ended(counter: Counter) -> None:
    row = (LOGIN.raw, b"", "https://node.example", "", "", 2**40, 0, 2**40)
    insert = (
        "INSERT INTO login(digest, nonce, user, origin, message, signature, expires_at, seen_at, ended, keep_until)"
        " VALUES (?, 'n', ?, ?, ?, ?, ?, ?, 1, ?)"
    )
    await counter.state.write(lambda db: db.execute(insert, row))
    with pytest.raises(SessionInvalid):
        await counter.infer(call(1))
    assert (await counter.used(LOGIN), await counter.credit()) == (0, 10 * PRICE.atomic)


async def forever(_: Hold) -> bytes:
    await asyncio.sleep(600)
    return b""


async def test_what_a_run_holds_beyond_its_lease_is_free_only_when_it_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: object, **__: object) -> None:
        raise NotReady("the disk is full")

    now = time.time()
    async with Counter(tmp_path, clock=lambda: now) as counter:
        await counter.infer(signed(tx=counter.chain.pay(3 * PRICE.atomic))[1])
        await counter.allow(LOGIN, PRICE.atomic)
        stuck = asyncio.create_task(counter.infer(call(1), forever))
        while await counter.used(LOGIN) == 0:
            await asyncio.sleep(0)
        with pytest.raises(PriceChanged):
            await counter.infer(call(2))
        now += 181
        with pytest.raises(PriceChanged):
            await counter.infer(call(3))
        monkeypatch.setattr(State, "write", full)
        stuck.cancel()
        await asyncio.gather(stuck, return_exceptions=True)
        monkeypatch.undo()
        assert await counter.infer(call(4))
        assert await counter.used(LOGIN) == PRICE.atomic


@pytest.mark.parametrize("point", ["inside-write-1", "running", "inside-write-2", "after-write-2"])
async def test_killed_at_a_step_the_allowance_is_spent_once(tmp_path: Path, point: str) -> None:
    killed_at(tmp_path, point, "session")
    async with Counter(tmp_path) as counter:
        await counter.ledger.recover()
        await nothing_is_lost(counter)
        assert await counter.used(LOGIN) == (PRICE.atomic if point in CHARGED else 0)
        for _ in range(2):
            await counter.infer(call_number(counter, 0, session=True))
        assert await counter.used(LOGIN) == PRICE.atomic
        assert await counter.rows("SELECT count(*) FROM charge") == [(1,)]
