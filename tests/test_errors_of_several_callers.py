"""What several callers wait for fails for all of them, and each has an error of his own: it collects his receipt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from divault.chain.blockcache import BlockCache
from divault.errors import DivaultError, HashMismatch, NotReady, StorageFailed, error_classes
from divault.ipfs.cid import make_cid
from divault.storage.arrival import Arrival
from divault.storage.cache import CiphertextCache
from divault.storage.fetcher import Fetcher
from divault.storage.source import Form, Piece
from divault.values import Cid, Usdc
from divault.workers import template as templates
from divault.workers.template import Templates
from tests.counter import STRANGER, USER, Counter, grant_of, principal_of, signed

CID = make_cid(1, 0x55, 0x12, bytes(range(32)))


class Empty:
    """A source that has nothing."""

    name, trustless = "gateway.example", True

    async def read(self, cid: Cid, ranges: Sequence[range] = (), form: Form = Form.CAR) -> AsyncGenerator[Piece, None]:
        await asyncio.sleep(0.01)
        raise StorageFailed("no such content", cid=str(cid), gateway=self.name, reason="not_found")
        yield b""


@pytest.fixture
def fetcher(tmp_path: Path) -> Fetcher:
    return Fetcher([Empty()], CiphertextCache(tmp_path / "cache", 10**6), max_model_bytes=10**6)


def of_their_own(errors: Sequence[Any]) -> list[tuple[type, str, dict[str, Any]]]:
    """What the errors say, when no two are one object."""
    assert all(isinstance(error, DivaultError) for error in errors), errors
    assert len(set(map(id, errors))) == len(errors)
    return [(type(error), error.detail, error.data) for error in errors]


def test_a_copy_says_the_same_and_has_nothing_of_the_callers() -> None:
    for cls in error_classes():
        error = cls("what to do next", **dict.fromkeys(cls.all_fields(), "x"))
        error.evidence, error.request_id = {"receipt": {"user": "somebody"}}, "0x01"
        copy = error.copy()

        assert of_their_own([error, copy]) == [(cls, error.detail, error.data)] * 2
        assert (copy.evidence, copy.request_id) == (None, None)
        assert copy.data is not error.data


def test_a_copy_keeps_the_reason_that_a_class_names() -> None:
    assert HashMismatch("other bytes").copy().data == {"reason": "HashMismatch"}


WAITS: dict[str, Callable[[Arrival], Awaitable[object]]] = {
    "all of it": lambda arrival: arrival.blob(),
    "its size": lambda arrival: arrival.size(),
    "its beginning": lambda arrival: arrival.upto(1),
}


@pytest.mark.parametrize("waits", WAITS)
async def test_a_file_that_does_not_come_is_told_to_each(fetcher: Fetcher, waits: str) -> None:
    async def wait() -> None:
        async with fetcher.file(CID) as arrival:
            await WAITS[waits](arrival)

    said = of_their_own(await asyncio.gather(*(wait() for _ in range(3)), return_exceptions=True))

    assert said == [said[0]] * 3
    assert said[0][0] is StorageFailed


async def test_each_wallet_has_the_receipt_of_its_own_request(fetcher: Fetcher, tmp_path: Path) -> None:
    """Two wallets wait for one file: the receipt of either is signed for that wallet, and told to nobody else."""
    async with Counter(tmp_path) as counter:

        async def ask(user: Any) -> Any:
            call = signed(max_price=0, user=user)[1]
            principal = principal_of(call)
            async with counter.ledger.outcome(principal, call):
                grant = grant_of(principal, Usdc(0))
                async with counter.payments.hold(grant, call), fetcher.arriving(CID) as arrival:
                    assert isinstance(arrival, Arrival)
                    await arrival.blob()

        errors = await asyncio.gather(ask(USER), ask(STRANGER), return_exceptions=True)

    of_their_own(errors)
    receipts = [error.evidence["receipt"] for error in errors if isinstance(error, DivaultError) and error.evidence]
    assert [receipt["user"] for receipt in receipts] == [str(USER), str(STRANGER)]


async def test_a_read_of_the_chain_that_fails_is_told_to_each() -> None:
    cache: BlockCache[str, int] = BlockCache(10)

    async def read() -> int:
        await asyncio.sleep(0)
        raise NotReady("down", retry_after=5)

    said = of_their_own(await asyncio.gather(*(cache.get("key", read) for _ in range(3)), return_exceptions=True))

    assert said == [(NotReady, "down", {"retry_after": 5})] * 3


async def test_a_template_that_cannot_start_is_told_to_each(monkeypatch: pytest.MonkeyPatch) -> None:
    async def start(*_: object) -> None:
        await asyncio.sleep(0)
        raise NotReady("no process is left", retry_after=5)

    monkeypatch.setattr(templates.Template, "start", start)
    pool = Templates(lambda: None)
    asked = (pool.fork("torch", (), lambda: None) for _ in range(3))
    said = of_their_own(await asyncio.gather(*asked, return_exceptions=True))

    assert said == [(NotReady, "no process is left", {"retry_after": 5})] * 3
