"""A priced answer that somebody began to read is paid for, whenever he leaves; a free one ends with its reader."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from msgspec.structs import replace

from divault.api.hot import HotRoutes
from divault.api.openai_routes import _handler
from divault.api.presence import Presence
from divault.errors import DeadlineExceeded, ModelFailed
from divault.models.base import Piece
from divault.service import Dialect, Service
from divault.values import Answer, SignedCall, Usdc
from divault.workers.pool import WorkerPool
from divault.workers.worker import Worker
from tests.counter import PRICE, Counter, output_of, signed
from tests.small_service import model_of_the_counter, service_of
from tests.test_http_connections import serving
from tests.worker_models import hostile

FREE = Usdc(0)


@pytest.fixture
async def counter(tmp_path: Path) -> AsyncIterator[Counter]:
    async with Counter(tmp_path) as made:
        await made.infer(signed(tx=made.chain.pay(4 * PRICE.atomic))[1])
        made.runs = 0
        yield made


class Slow:
    """A model of two words: the second comes, and the answer ends, when a test says so."""

    def __init__(self, end: Exception | None = None) -> None:
        self.begun, self.go, self.end = asyncio.Event(), asyncio.Event(), end
        self.stopped = 0

    def find(self, *_: object) -> Any:
        return SimpleNamespace(plaintext_sha256=None)

    def description(self, _: object) -> Any:
        return SimpleNamespace(runtime={}, task="text-generation", input_schema={})

    async def run(self, _: object, __: object, ___: object, on_piece: Any) -> Any:
        try:
            self.begun.set()
            if on_piece is not None:
                on_piece(Piece("one ", 0))
                on_piece(Piece("two", 0))
            await self.go.wait()
        except asyncio.CancelledError:
            self.stopped += 1
            raise
        if self.end is not None:
            raise self.end
        text = {"text": "one two", "finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 2}
        return output_of(orjson.dumps({"texts": [text]}))


async def left(service: Service, model: Slow, call: SignedCall, dialect: Dialect, *, times: int = 1) -> asyncio.Task:
    """A call whose caller left, and left again, after everything but the end was made."""
    asking = asyncio.create_task(service.infer(call, load=True, dialect=dialect))
    await model.begun.wait()
    for _ in range(times):
        asking.cancel()
        await asyncio.sleep(0.01)
    return asking


@pytest.mark.parametrize("times", [1, 3])
async def test_who_leaves_after_the_last_piece_has_paid(counter: Counter, times: int) -> None:
    model, read = Slow(), []
    service, (principal, call) = service_of(counter, model), signed()
    asking = await left(service, model, call, Dialect(on_piece=read.append), times=times)
    assert not asking.done(), "its run goes on"
    model.go.set()
    with pytest.raises(asyncio.CancelledError):
        await asking

    assert [piece.text for piece in read] == ["one ", "two"]
    assert await counter.credit() == 2 * PRICE.atomic
    answer = await counter.ledger.result(principal.request, call.user)
    assert (await service.infer(call, load=True)).body == answer.body, "the same call is answered from what is kept"
    assert (await counter.rows("SELECT count(*) FROM charge"), model.stopped) == ([(2,)], 0)
    assert await counter.chain_is_whole() == 2


async def test_who_leaves_before_a_whole_answer_pays_nothing(counter: Counter) -> None:
    model = Slow()
    asking = await left(service_of(counter, model), model, signed()[1], Dialect())
    with pytest.raises(asyncio.CancelledError):
        await asking

    assert model.stopped == 1
    assert await counter.credit() == 3 * PRICE.atomic


async def test_who_leaves_a_priced_stream_while_it_waits_is_not_run(counter: Counter) -> None:
    class Waiting(Slow):
        async def run(self, *told: Any) -> Any:
            self.begun.set()
            await super().run(*told[:3], None)

    model = Waiting()
    asking = await left(service_of(counter, model), model, signed()[1], Dialect(on_piece=lambda _: None))
    with pytest.raises(asyncio.CancelledError):
        await asking

    assert model.stopped == 1
    assert await counter.credit() == 3 * PRICE.atomic


async def test_a_free_stream_ends_with_its_reader(counter: Counter) -> None:
    model = Slow()
    service = service_of(counter, model, price=FREE)
    asking = await left(service, model, signed(max_price=0)[1], Dialect(on_piece=lambda _: None))
    with pytest.raises(asyncio.CancelledError):
        await asking

    assert model.stopped == 1


async def test_a_run_that_fails_after_its_pieces_costs_nothing_and_has_a_receipt(counter: Counter) -> None:
    model = Slow(ModelFailed("it died"))
    service, (_, call) = service_of(counter, model), signed()
    asking = await left(service, model, call, Dialect(on_piece=lambda _: None))
    model.go.set()
    with pytest.raises(ModelFailed) as caught:
        await asking
    receipt = caught.value.evidence["receipt"]  # type: ignore[index]  # a failed run has one

    assert (receipt["status"], receipt["price"]) == ("2", "0")
    assert await counter.credit() == 3 * PRICE.atomic


# --- with a real process, and its deadlines ---------------------------------------------------------------------------


@dataclass
class Shop:
    """A service with one model, which gives ten pieces in a second; a test says when a deadline passes."""

    service: Service
    worker: Worker
    read: list[Piece] = field(default_factory=list)

    async def ask(self, call: SignedCall, at_first: Callable[[], None] | None = None) -> Answer:
        """`at_first` is called when the first piece was handed on."""

        def take(piece: Piece) -> None:
            self.read.append(piece)
            if at_first is not None and len(self.read) == 1:
                asyncio.get_running_loop().call_soon(at_first)

        return await self.service.infer(call, load=True, dialect=Dialect(on_piece=take))

    def callers_deadline(self) -> None:
        for job in self.worker._flight:
            if job.expiry is not None:  # else nothing waits for it
                self.worker._give_up(job)


@asynccontextmanager
async def shop_of(counter: Counter, *, price: Usdc = PRICE) -> AsyncIterator[Shop]:
    pool = WorkerPool(predict_timeout_s=60, load_timeout_s=60, tuning=hostile("pieces"))
    await pool.load(model_of_the_counter())
    (entry,) = pool._entries.values()
    yield Shop(service_of(counter, pool, price=price), entry.worker)
    await pool.close()


async def test_a_callers_deadline_within_a_priced_stream_ends_nothing(counter: Counter) -> None:
    async with shop_of(counter) as shop:
        answer = await shop.ask(replace(signed()[1], limit_s=30), shop.callers_deadline)

    assert (len(shop.read), orjson.loads(answer.body)["result"]) == (10, 10)
    assert await counter.credit() == 2 * PRICE.atomic


async def test_a_callers_deadline_ends_a_free_stream(counter: Counter) -> None:
    async with shop_of(counter, price=FREE) as shop:
        with pytest.raises(DeadlineExceeded):
            await shop.ask(replace(signed(max_price=0)[1], limit_s=30), shop.callers_deadline)

    assert 0 < len(shop.read) < 10


async def test_a_callers_deadline_ends_his_wait_for_a_priced_stream(counter: Counter) -> None:
    async with shop_of(counter) as shop:
        begun = asyncio.Event()
        first = asyncio.create_task(shop.ask(signed()[1], begun.set))
        await begun.wait()
        late = Shop(shop.service, shop.worker)
        second = asyncio.create_task(late.ask(replace(signed()[1], limit_s=30)))
        while not shop.worker.waiting:
            await asyncio.sleep(0.01)
        shop.worker._expire(next(iter(shop.worker._queue)))
        with pytest.raises(DeadlineExceeded):
            await second
        await first

    assert late.read == []
    assert await counter.credit() == 2 * PRICE.atomic, "of three, one for the first"


async def test_the_nodes_deadline_ends_a_priced_stream_which_costs_nothing(counter: Counter) -> None:
    async with shop_of(counter) as shop:
        with pytest.raises(DeadlineExceeded) as caught:
            await shop.ask(signed()[1], shop.worker._overran)
    receipt = caught.value.evidence["receipt"]  # type: ignore[index]  # a run that was stopped has one

    assert 0 < len(shop.read) < 10
    assert (receipt["status"], receipt["price"]) == ("4", "0")
    assert await counter.credit() == 3 * PRICE.atomic


# --- over HTTP --------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def answering(service: Service, calls: list[SignedCall]) -> AsyncIterator[int]:
    """The port of a server whose requests are these calls, one after the other."""
    coming = iter(calls)
    node: Any = SimpleNamespace(service=service, envelopes=SimpleNamespace(foreign=lambda *_: next(coming)))

    async def nobody(*_: Any) -> None:
        raise AssertionError("another route")

    app = HotRoutes(nobody, {"/v1/completions": _handler(node, "completions")}.get, Presence())
    async with serving(app) as port:
        yield port


@pytest.mark.parametrize("price", [PRICE, FREE])
async def test_a_client_that_hangs_up_when_it_has_the_text_pays_for_it(counter: Counter, price: Usdc) -> None:
    model, calls = Slow(), [signed(max_price=price.atomic)[1] for _ in range(2)]
    body = json.dumps({"model": "m1", "prompt": "x", "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with answering(service_of(counter, model, price=price), calls) as port, asyncio.timeout(10):
        for _ in calls:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head + body)
            assert b'"one "' in await reader.readuntil(b'"two"')
            writer.close()
        if price.atomic:
            await asyncio.sleep(0.2)  # they are known to be gone
            model.go.set()
        while counter.ledger.pending:
            await asyncio.sleep(0.01)

    assert model.stopped == (0 if price.atomic else 2)
    assert await counter.credit() == (PRICE.atomic if price.atomic else 3 * PRICE.atomic)
    assert await counter.chain_is_whole() == (3 if price.atomic else 1)
