"""Any order of paying, calling, finishing, failing, leaving, waiting and crashing keeps the books true."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from divault.errors import DivaultError, ModelFailed, Overloaded
from divault.values import Answer, Hold, SessionToken, SignedCall
from tests.counter import PRICE, Counter, TransfersInMemory, digest_of, of_session, signed

LEASE_S = 180
LOGIN = digest_of("a session")
ENDS = {
    "answer": None,
    "fail": ModelFailed("it raised"),
    "turn away": Overloaded("queue full", retry_after=1),
    "break": RuntimeError("a fault of ours"),
}


@dataclass
class Run:
    """A call under way: its work waits for the machine to say how it ends."""

    call: SignedCall
    task: asyncio.Task[Answer] | None = None
    end: asyncio.Future[bytes] | None = None
    until: float = 0
    started: list[None] = field(default_factory=list)


def _name(call: SignedCall) -> bytes:
    """What tells a call from others of the wallet."""
    proof = call.proof
    return (proof.idempotency_key or "").encode() if isinstance(proof, SessionToken) else proof.nonce.raw  # type: ignore[union-attr]


class Books(RuleBasedStateMachine):
    """The machine knows what was paid in and what was answered; the ledger has to agree after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.root = Path(tempfile.mkdtemp(prefix="books"))
        self.life = 0
        self.chain = TransfersInMemory()
        self.now = time.time()
        self.paid = 0
        self.calls: list[SignedCall] = []
        self.runs: list[Run] = []
        self.answers: dict[bytes, bytes] = {}
        self.counter = self._open()

    @initialize(prices=st.integers(0, 3))
    def sign_in(self, prices: int) -> None:
        """One wallet opens a session that may spend so many prices."""
        self.do(self.counter.allow(LOGIN, prices * PRICE.atomic))

    def _open(self) -> Counter:
        async def opened() -> Counter:
            return Counter(self.root / str(self.life), self.chain, clock=lambda: self.now, lease_s=LEASE_S)

        return self.do(opened())

    def do(self, work: Any) -> Any:
        return self.runner.run(work)

    @rule(prices=st.integers(1, 3), extra=st.integers(0, 1))
    def sign_a_call_with_a_transfer(self, prices: int, extra: int) -> None:
        self.calls.append(signed(tx=self.chain.pay(prices * PRICE.atomic + extra))[1])

    @rule()
    def sign_a_call_on_credit(self) -> None:
        self.calls.append(signed()[1])

    @rule(paying=st.booleans(), named=st.sampled_from([True, True, True, False]))
    def make_a_call_of_the_session(self, paying: bool, named: bool) -> None:
        tx = self.chain.pay(PRICE.atomic) if paying else None
        self.calls.append(of_session(LOGIN, f"key {len(self.calls)}" if named else None, tx=tx))

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def send(self, data: st.DataObject) -> None:
        """Any call, new or sent before; it either runs now, or ends at once."""
        run = Run(data.draw(st.sampled_from(self.calls)), until=self.now + LEASE_S)

        async def sent() -> None:
            run.end = asyncio.get_running_loop().create_future()

            async def work(_: Hold) -> bytes:
                run.started.append(None)
                return await run.end  # type: ignore[misc]  # set two lines above

            run.task = asyncio.create_task(self.counter.infer(run.call, work))
            while not (run.task.done() or run.started):
                await asyncio.wait([run.task], timeout=0.002)

        self.do(sent())
        self._note(run)
        if not run.task.done():  # type: ignore[union-attr]  # set by `sent`
            self.runs.append(run)

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), end=st.sampled_from([*ENDS, "leave"]))
    def finish(self, data: st.DataObject, end: str) -> None:
        run = data.draw(st.sampled_from(self.runs))
        self.runs.remove(run)

        async def finished() -> None:
            if end == "leave":
                run.task.cancel()
            elif (error := ENDS[end]) is not None:
                run.end.set_exception(error.with_traceback(None))
            else:
                run.end.set_result(f'"answer {len(self.answers)}"'.encode())
            await asyncio.wait([run.task])

        self.do(finished())
        self._note(run)

    @rule(seconds=st.sampled_from([1, LEASE_S // 2, LEASE_S + 1]))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(recover=st.booleans())
    def crash(self, recover: bool) -> None:
        """What is on disk at this moment goes on in a new process; the old one can change nothing any more."""
        before, self.life = self.root / str(self.life), self.life + 1
        shutil.copytree(before, self.root / str(self.life))
        self.teardown_life()
        self.counter = self._open()
        if recover:
            self.do(self.counter.ledger.recover())

    def _note(self, run: Run) -> None:
        if run.task is None or not run.task.done() or run.task.cancelled():
            return
        error = run.task.exception()
        assert error is None or isinstance(error, DivaultError | RuntimeError)
        if error is None:
            body = self.answers.setdefault(_name(run.call), run.task.result().body)
            assert body == run.task.result().body

    @invariant()
    def the_books_are_true(self) -> None:
        async def checked() -> None:
            counter = self.counter
            await counter.chain_is_whole()
            credited = sum(int(amount) for (amount,) in await counter.rows("SELECT amount FROM spent"))
            charges = [request for (request,) in await counter.rows("SELECT request FROM charge")]
            credit = await counter.rows("SELECT balance, reserved FROM credit")
            held = await counter.rows("SELECT price FROM request WHERE stage = 'reserved'")
            ((most, used),) = await counter.rows("SELECT most, used FROM allowance") or [("0", "0")]
            spent = await counter.rows(
                "SELECT request.price FROM request LEFT JOIN charge ON charge.request = request.digest"
                " WHERE login IS NOT NULL AND (stage = 'reserved' OR charge.payment_key IS NOT NULL)"
            )
            balance = sum(int(amount) for amount, _ in credit)

            assert balance == credited - len(charges) * PRICE.atomic
            assert sum(int(amount) for _, amount in credit) == sum(int(price) for (price,) in held)
            assert balance >= len(held) * PRICE.atomic
            assert int(used) == sum(int(price) for (price,) in spent)
            assert int(used) <= int(most)
            assert len(charges) == len(set(charges))
            assert len(charges) >= len(self.answers)
            kept = await counter.rows("SELECT request FROM outcome WHERE code IS NULL")
            assert {request for (request,) in kept} == set(charges)

        self.do(checked())

    def teardown_life(self) -> None:
        async def ended() -> None:
            await self.counter.state.close()
            for run in self.runs:
                run.task.cancel()  # type: ignore[union-attr]  # a run in the list has its task
            await asyncio.gather(*(run.task for run in self.runs), return_exceptions=True)

        self.do(ended())
        self.runs.clear()

    def teardown(self) -> None:
        self.teardown_life()
        self.runner.close()
        shutil.rmtree(self.root)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)
