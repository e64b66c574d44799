"""Claims of plain transfers: what is credited, what is refused and why, and that nothing odd gets through."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from pathlib import Path

import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from divault.chain.records import Log, Transaction, TransactionReceipt
from divault.errors import (
    ChainUnavailable,
    ModelFailed,
    NotReady,
    PaymentPending,
    PaymentRejected,
    PaymentRequired,
    PriceChanged,
)
from divault.payments import Payments, Terms, TransferCredit, binding_of
from divault.payments.transfer import TRANSFER_TOPIC, Claim, Evidence, Judgement, Verdict, judge, parse_hash
from divault.values import Address, BlockRef, Digest, Hold, TransferClaim, Usdc
from tests.counter import (
    BINDING,
    CHAIN_ID,
    NODE,
    OWNER,
    PRICE,
    STRANGER,
    TOKEN,
    USER,
    Counter,
    digest_of,
    grant_of,
    signed,
)


@pytest.fixture
async def counter(tmp_path: Path) -> AsyncIterator[Counter]:
    async with Counter(tmp_path) as opened:
        yield opened


async def refused(counter: Counter, tx: str, **options) -> PaymentRejected:
    with pytest.raises(PaymentRejected) as caught:
        await counter.infer(signed(tx=tx)[1], **options)
    return caught.value


async def test_without_payment_there_is_an_offer_and_no_trace(counter: Counter) -> None:
    _, call = signed(max_price=0)
    with pytest.raises(PaymentRequired) as caught:
        await counter.infer(call)
    offer = caught.value.data

    assert not isinstance(caught.value, PaymentRejected)
    assert [offer[n] for n in ("price", "price_usdc", "token", "owner")] == ["10000", "0.01", str(TOKEN), str(OWNER)]
    assert [offer["rails"], offer["x402Version"]] == [["transfer"], 2]
    assert offer["accepts"][0]["network"] == f"eip155:{CHAIN_ID}"
    assert offer["accepts"][0]["extra"]["binding"] == str(binding_of(NODE, USER))
    assert await counter.rows("SELECT * FROM request") == []
    assert await counter.chain_is_whole() == 0


async def test_the_whole_sum_becomes_credit_and_runs_draw_the_price(counter: Counter) -> None:
    await counter.infer(signed(tx=counter.chain.pay(25_000))[1])
    assert await counter.credit() == 15_000
    await counter.infer(signed()[1])
    assert await counter.credit() == 5_000
    with pytest.raises(PaymentRequired):
        await counter.infer(signed()[1])
    await counter.infer(signed(tx=counter.chain.pay(5_000))[1])

    assert await counter.credit() == 0
    assert counter.runs == 3


async def test_a_claim_that_with_the_credit_does_not_reach_the_price_is_refused(counter: Counter) -> None:
    await counter.infer(signed(tx=counter.chain.pay(15_000))[1])
    tx = counter.chain.pay(4_999)

    assert (await refused(counter, tx)).data["reason"] == "amount_too_low"
    assert await counter.credit() == 5_000


@pytest.mark.parametrize(
    ("payment", "reason"),
    [
        ({"payer": STRANGER}, "payer_mismatch"),
        ({"owner": STRANGER}, "recipient_mismatch"),
        ({"token": STRANGER}, "wrong_token"),
        ({"amount": PRICE.atomic - 1}, "amount_too_low"),
        ({"amount": 0}, "amount_too_low"),
        ({"binding": None}, "not_bound_to_node"),
        ({"binding": binding_of(STRANGER, USER)}, "not_bound_to_node"),
        ({"binding": binding_of(NODE, STRANGER)}, "not_bound_to_node"),
    ],
)
async def test_a_transfer_that_does_not_pay_is_refused_with_a_receipt(counter: Counter, payment, reason: str) -> None:
    tx = counter.chain.pay(**{"amount": PRICE.atomic, **payment})
    error = await refused(counter, tx)

    assert error.data["reason"] == reason
    assert error.data["accepts"]
    assert error.evidence is not None
    assert error.evidence["payment_key"] == f"transfer:{CHAIN_ID}:{tx}"
    assert counter.runs == 0
    assert await counter.credit() == 0
    assert await counter.rows("SELECT * FROM spent") == []


async def test_a_claimed_transfer_is_spent_for_everybody(counter: Counter) -> None:
    tx = counter.chain.pay(3 * PRICE.atomic)
    await counter.infer(signed(tx=tx)[1])

    assert (await refused(counter, tx)).data["reason"] == "already_spent"
    with pytest.raises(PaymentRejected) as caught:
        await counter.infer(signed(tx=tx, user=STRANGER)[1])
    assert caught.value.data["reason"] == "payer_mismatch"
    assert await counter.credit() == 2 * PRICE.atomic


async def test_after_a_failed_run_the_credit_pays_the_next_call(counter: Counter) -> None:
    async def fails(_: Hold) -> bytes:
        raise ModelFailed("it raised")

    with pytest.raises(ModelFailed):
        await counter.infer(signed(tx=counter.chain.pay(PRICE.atomic))[1], fails)
    await counter.infer(signed()[1])

    assert await counter.credit() == 0


async def test_an_unbound_transfer_counts_where_the_owner_has_no_other_node(counter: Counter) -> None:
    rail = TransferCredit(counter.ledger, counter.chain, Terms(frozenset({TOKEN})), sole_node_for=[OWNER])
    counter.payments = Payments(counter.ledger, rail)
    await counter.infer(signed(tx=counter.chain.pay(PRICE.atomic, binding=None))[1])

    assert counter.runs == 1


async def test_after_a_hand_over_a_payment_to_the_old_owner_does_not_count(counter: Counter) -> None:
    principal, call = signed(tx=counter.chain.pay(PRICE.atomic, owner=OWNER))
    with pytest.raises(PaymentRejected) as caught:
        async with (
            counter.ledger.outcome(principal, call),
            counter.payments.hold(grant_of(principal, owner=STRANGER), call),
        ):
            pass

    assert caught.value.data["reason"] == "recipient_mismatch"


async def test_a_transfer_in_a_token_that_is_not_served_is_refused(counter: Counter) -> None:
    principal, call = signed(tx=counter.chain.pay(PRICE.atomic, token=STRANGER))
    grant = grant_of(principal, token=STRANGER)
    with pytest.raises(PaymentRejected) as caught:
        async with counter.ledger.outcome(principal, call), counter.payments.hold(grant, call):
            pass

    assert [caught.value.data["reason"], caught.value.data["rails"]] == ["unsupported_token", []]


async def test_an_unknown_transfer_is_pending_then_the_same_bytes_run(counter: Counter) -> None:
    tx = counter.chain.pay(PRICE.atomic)
    receipt = counter.chain.receipts.pop(Digest.parse(tx))
    _, call = signed(tx=tx)
    with pytest.raises(PaymentPending) as caught:
        await counter.infer(call)
    counter.chain.receipts[Digest.parse(tx)] = receipt

    assert caught.value.data["reason"] == "tx_not_found"
    assert caught.value.data["retry_after"] > 0
    await counter.infer(call)
    assert await counter.chain_is_whole() == 1


async def test_a_transfer_waits_for_its_confirmations(counter: Counter) -> None:
    counter.rail = TransferCredit(counter.ledger, counter.chain, Terms(frozenset({TOKEN}), confirmations=3))
    counter.payments = Payments(counter.ledger, counter.rail)
    _, call = signed(tx=counter.chain.pay(PRICE.atomic))
    with pytest.raises(PaymentPending) as caught:
        await counter.infer(call)
    counter.chain.head_number += 2

    assert caught.value.data["reason"] == "not_enough_confirmations"
    await counter.infer(call)


async def test_a_transfer_in_a_block_that_was_reorganised_away_is_refused(counter: Counter) -> None:
    tx = counter.chain.pay(PRICE.atomic)
    counter.chain.reorged.add(100)

    assert (await refused(counter, tx)).data["reason"] == "not_canonical"


async def test_a_head_read_before_the_block_does_not_delay_the_claim(counter: Counter) -> None:
    tx = counter.chain.pay(PRICE.atomic)

    async def stale() -> BlockRef:
        return BlockRef(98, digest_of("98"), 0)

    counter.chain.head = stale  # type: ignore[method-assign]  # what a cached head looks like
    await counter.infer(signed(tx=tx)[1])

    assert counter.runs == 1


async def test_a_price_above_the_signed_maximum_is_refused_before_the_claim(counter: Counter) -> None:
    tx = counter.chain.pay(PRICE.atomic)
    with pytest.raises(PriceChanged) as caught:
        await counter.infer(signed(tx=tx, max_price=PRICE.atomic - 1)[1])

    assert [caught.value.data["have"], caught.value.data["need"]] == ["9999", "10000"]
    assert caught.value.evidence is not None
    assert counter.chain.asked == 0
    await counter.infer(signed(tx=tx)[1])


async def test_with_credit_at_hand_a_low_maximum_is_a_changed_price_not_an_offer(counter: Counter) -> None:
    await counter.infer(signed(tx=counter.chain.pay(2 * PRICE.atomic))[1])
    with pytest.raises(PriceChanged):
        await counter.infer(signed(max_price=1)[1])

    assert await counter.credit() == PRICE.atomic


async def test_a_chain_that_does_not_answer_uses_no_nonce(counter: Counter) -> None:
    tx = counter.chain.pay(PRICE.atomic)
    _, call = signed(tx=tx)
    works = counter.chain.receipt

    async def down(_: Digest) -> None:
        raise ChainUnavailable("no endpoint answers", retry_after=1)

    counter.chain.receipt = down  # type: ignore[method-assign]  # an endpoint that is down
    with pytest.raises(ChainUnavailable):
        await counter.infer(call)
    counter.chain.receipt = works  # type: ignore[method-assign]
    await counter.infer(call)

    assert await counter.chain_is_whole() == 1


async def test_a_dearer_rerun_of_a_released_request_is_refused_not_pending_for_ever(counter: Counter) -> None:
    async def broken(_: Hold) -> bytes:
        raise RuntimeError("a fault of ours")

    _, call = signed(tx=counter.chain.pay(PRICE.atomic), max_price=2 * PRICE.atomic)
    with pytest.raises(RuntimeError):
        await counter.infer(call, broken)
    with pytest.raises(PaymentRejected) as caught:
        await counter.infer(call, price=Usdc(PRICE.atomic + 1))

    assert caught.value.data["reason"] == "amount_too_low"
    assert await counter.credit() == PRICE.atomic


async def test_a_node_without_a_rail_serves_no_priced_model(counter: Counter) -> None:
    counter.payments = Payments(counter.ledger)
    with pytest.raises(NotReady):
        await counter.infer(signed(tx=counter.chain.pay(PRICE.atomic))[1])


async def test_two_claims_of_one_transaction_race_for_its_logs(counter: Counter) -> None:
    """Both are judged against the same evidence: the primary key decides, and nothing is credited twice."""
    tx = counter.chain.pay(2 * PRICE.atomic)
    ends = await asyncio.gather(*(counter.infer(signed(tx=tx)[1]) for _ in range(2)), return_exceptions=True)

    assert sum(isinstance(end, PaymentRejected) for end in ends) == 1
    assert await counter.credit() == PRICE.atomic


@pytest.mark.parametrize("text", ["", "0x", "0x1234", "0X" + "ab" * 32, "0x" + "AB" * 32, "ab" * 33, "0x" + "ab" * 33])
async def test_a_malformed_hash_is_refused_without_asking_the_chain(counter: Counter, text: str) -> None:
    assert (await refused(counter, text)).data["reason"] == "bad_tx_hash"
    assert counter.chain.asked == 0


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.from_regex(r"\A0x[0-9a-f]{60,68}\Z"), st.from_regex(r"\A\s?0x[0-9a-fA-F]{64}\n?\Z")))
def test_a_hash_has_one_spelling(text: str) -> None:
    digest = parse_hash(text)

    assert digest is None or str(digest) == text


HERE = BlockRef(100, digest_of("here"), 1000)
TX = digest_of("tx")
HONEST = (TRANSFER_TOPIC, Digest(bytes(12) + USER.raw), Digest(bytes(12) + OWNER.raw))
addresses = st.sampled_from([TOKEN, TOKEN, TOKEN, OWNER, STRANGER])
topics = st.one_of(st.just(HONEST), st.lists(st.sampled_from([*HONEST, digest_of("x")]), max_size=4).map(tuple))
amounts = st.one_of(st.integers(0, 9).map(lambda n: n.to_bytes(32, "big")), st.binary(max_size=40))


def mostly(right: object, *others: object) -> st.SearchStrategy:
    return st.sampled_from([right] * 5 + list(others))


@st.composite
def evidence(draw: st.DrawFn) -> Evidence:
    logs = tuple(
        Log(draw(addresses), draw(topics), draw(amounts), 100, HERE.hash, TX, index)
        for index in range(draw(st.integers(0, 4)))
    )
    receipt = TransactionReceipt(TX, draw(mostly(True, False)), 100, HERE.hash, USER, TOKEN, None, 0, logs)
    data = draw(mostly(BINDING.raw, b"", BINDING.raw + b"\0"))
    sent = Transaction(TX, draw(mostly(CHAIN_ID, 1, None)), USER, TOKEN, 0, 0, data, 100, HERE.hash)
    block = draw(mostly(HERE, replace(HERE, hash=digest_of("other")), None))
    return Evidence(draw(mostly(sent, None)), draw(mostly(receipt, None)), block, draw(st.integers(98, 110)))


def judged(found: Evidence, spent: Collection[int] = (), price: int = 1, binding: Digest | None = BINDING) -> Judgement:
    claim = Claim(str(TX), CHAIN_ID, TOKEN, USER, OWNER, Usdc(price), binding)
    return judge(claim, Terms(frozenset({TOKEN}), 1, 60), found, spent=spent, now=1030)


def honest(topics: tuple[Digest, ...] = HONEST, data: bytes = BINDING.raw) -> Evidence:
    log = Log(TOKEN, topics, (1).to_bytes(32, "big"), 100, HERE.hash, TX, 0)
    receipt = TransactionReceipt(TX, True, 100, HERE.hash, USER, TOKEN, None, 0, (log,))
    return Evidence(Transaction(TX, CHAIN_ID, USER, TOKEN, 0, 0, data, 100, HERE.hash), receipt, HERE, 100)


@pytest.mark.parametrize("topics", [HONEST[:1], HONEST[:2], (*HONEST, HONEST[0])])
def test_a_transfer_log_has_three_topics(topics: tuple[Digest, ...]) -> None:
    """Four are an ERC-721 token's: its last topic is an id, not an amount."""
    assert judged(honest()).verdict is Verdict.ACCEPT
    assert judged(honest(topics)).reason == "wrong_token"


@pytest.mark.parametrize("data", [b"", BINDING.raw[:-1], BINDING.raw + b"\0", BINDING.raw + bytes(32)])
def test_only_the_end_of_the_calldata_binds(data: bytes) -> None:
    assert judged(honest(data=b"\xa9" + BINDING.raw)).verdict is Verdict.ACCEPT
    assert judged(honest(data=data)).reason == "not_bound_to_node"


def test_the_fuzz_reaches_accepted_claims() -> None:
    assert find(evidence(), lambda found: judged(found).verdict is Verdict.ACCEPT)


@settings(max_examples=200, deadline=None)
@given(evidence(), st.sets(st.integers(0, 4), max_size=2), st.integers(0, 20), st.sampled_from([BINDING, None]))
def test_whatever_is_accepted_really_pays(found: Evidence, spent: set[int], price: int, binding: Digest | None) -> None:
    """An independent reading of the rules: of an accepted claim every fact holds, for any evidence at all."""
    judgement = judged(found, spent, price, binding)
    if judgement.verdict is not Verdict.ACCEPT:
        assert judgement.reason
        assert judgement.credit == Usdc(0)
        return
    total = 0
    for log in judgement.logs:
        sender, to = (Address(topic.raw[12:]) for topic in log.topics[1:])
        total += int.from_bytes(log.data, "big")
        assert [log.address, sender, to] == [TOKEN, USER, OWNER]
        assert log.index not in spent
    assert found.receipt is not None
    assert found.transaction is not None
    assert found.receipt.succeeded
    assert found.block == HERE
    assert binding is None or found.transaction.data == binding.raw
    assert price <= total == judgement.credit.atomic


async def test_odd_claims_never_break_the_counter(counter: Counter) -> None:
    for text in ("0x" + "00" * 32, "\ud800", "0x" + "\N{FULLWIDTH DIGIT ONE}" * 64, "null", "0x" + "ab" * 32 + "\n"):
        _, call = signed()
        with pytest.raises((PaymentRejected, PaymentPending)):
            await counter.infer(replace(call, payment=TransferClaim(text)))

    assert await counter.credit() == 0
