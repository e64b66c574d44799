"""The owner names another CID while calls are under way: the newer file serves, and whoever is at work is answered."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from divault.errors import NotReady
from divault.ipfs.cid import make_cid
from divault.limits import WalletLimits
from divault.metrics import Metrics
from divault.service import LoadResult, Parts, Service
from divault.values import BlockRef, Cid, Digest, Grant, ModelId, ModelInfo, OpenedModel, SignedCall
from divault.workers.pool import WorkerPool
from tests.sealed_models import grant
from tests.worker_models import alive, answer, call, hostile, opened

OLD, NEW = (make_cid(1, 0x55, 0x12, bytes([number]) * 32) for number in (1, 2))
MODEL = OpenedModel(ModelId.parse("m"), NEW, Digest.ZERO, 0, ())


@dataclass
class Desk:
    """A service with real workers. What is fetched and opened, and what the vault says to whom, is stated here."""

    pool: WorkerPool
    loads: list[Cid] = field(default_factory=list)
    old_at: tuple[int, ...] = (9, 10)
    """Blocks at which the vault names the old CID."""
    head: int = 0
    """The newest block that anybody was checked at, unless a test says another."""
    late: asyncio.Event = field(default_factory=asyncio.Event)
    """Calls that were granted at block 10 go on from here."""

    def service(self) -> Service:
        parts = dict.fromkeys(one.name for one in fields(Parts)) | {
            "authenticator": SimpleNamespace(authenticate=self._authenticate),
            "gates": SimpleNamespace(check=self._check, info=self._info),
            "ledger": SimpleNamespace(consume=self._consume),
            "fetcher": SimpleNamespace(arriving=self._arriving),
            "opener": SimpleNamespace(open=self._open),
            "kavach": SimpleNamespace(of_node=lambda: None),
            "workers": self.pool,
            "limits": WalletLimits(1000, 1000),
            "metrics": Metrics(),
        }
        return Service(Parts(**parts))

    async def _authenticate(self, asked: SignedCall) -> Any:
        return replace(grant().principal, received_at=int(asked.peer))

    async def _check(self, principal: Any, model: Any) -> Grant:
        block = principal.received_at
        self.head = max(block, self.head)
        return replace(grant(), principal=principal, model=self._named(block), block=BlockRef(block, Digest.ZERO, 0))

    async def _info(self, model: Any) -> ModelInfo:
        return self._named(self.head)

    def _named(self, block: int) -> ModelInfo:
        return replace(grant().model, cid=(OLD if block in self.old_at else NEW).text)

    async def _consume(self, principal: Any) -> None:
        if principal.received_at == 10:
            await self.late.wait()

    @asynccontextmanager
    async def _arriving(self, cid: Cid) -> AsyncIterator[Cid]:
        yield cid

    async def _open(self, cid: Cid, *_: Any) -> OpenedModel:
        self.loads.append(cid)
        return loadable(cid)


def loadable(cid: Cid) -> OpenedModel:
    return replace(opened(b"any"), cid=cid)


def at(block: int) -> SignedCall:
    """A call whose gate is checked at this block: since block 11 the vault names the new CID."""
    return replace(call(MODEL, {}), peer=str(block))


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    pool = WorkerPool(predict_timeout_s=10, load_timeout_s=60, tuning=hostile("slow"))
    yield Desk(pool)
    await pool.close()


async def test_an_older_grant_does_not_bring_the_old_file_back(desk: Desk) -> None:
    service = desk.service()
    await service.load(at(9))
    late = asyncio.create_task(service.load(at(10)))
    await asyncio.sleep(0)
    loaded = (await service.load(at(11))).loaded
    desk.late.set()

    with pytest.raises(NotReady, match="send the same bytes again") as refused:
        await late
    assert refused.value.data == {"retry_after": 1}
    assert not refused.value.receipt, "he did nothing wrong: no refusal is kept under his nonce"
    assert desk.loads == [OLD, NEW]
    assert [one.pid for one in desk.pool.loaded()] == [loaded.pid], "the new one goes on"


async def test_what_the_vault_names_now_counts_and_not_what_the_model_was_loaded_for(desk: Desk) -> None:
    service = desk.service()
    desk.old_at = (15,)
    await service.load(at(12))
    await service.load(at(20))
    with pytest.raises(NotReady):
        await service.load(at(15))

    assert isinstance(await service.load(at(12)), LoadResult), "an older grant of the same CID is as good"
    with pytest.raises(NotReady):
        await service.load(at(15))
    assert desk.loads == [NEW]


async def test_a_grant_at_a_lower_block_loads_what_the_vault_names_after_the_chain_went_back(desk: Desk) -> None:
    """A reorg, or a chain for development that was reverted: numbers begin again below those that were seen."""
    service = desk.service()
    desk.old_at = (9,)
    await service.load(at(30))
    desk.head = 8
    await service.load(at(9))

    assert desk.loads == [NEW, OLD]


async def test_an_owner_who_takes_his_change_back_has_the_old_file_loaded_again(desk: Desk) -> None:
    service = desk.service()
    desk.old_at = (10, 12)
    late = asyncio.create_task(service.load(at(10)))
    await asyncio.sleep(0)
    await service.load(at(11))
    desk.head = 12
    desk.late.set()
    await late

    assert desk.loads == [NEW, OLD]


async def test_an_older_grant_loads_where_nothing_is_loaded(desk: Desk) -> None:
    service = desk.service()
    await service.load(at(11))
    await desk.pool.unload(MODEL.model.key)
    await service.load(at(9))
    await service.load(at(12))

    assert desk.loads == [NEW, OLD, NEW]


# --- the pool -------------------------------------------------------------------------------------------------------


async def test_a_replaced_worker_answers_whoever_was_sent_to_it_and_ends(desk: Desk) -> None:
    pool, old = desk.pool, loadable(OLD)
    pid = (await pool.load(old)).pid or 0
    asked = [asyncio.create_task(answer(pool, old, {})) for _ in range(3)]
    await asyncio.sleep(0.01)
    await pool.load(loadable(NEW))

    assert pool.find(MODEL.model, OLD) is None
    assert alive(pid)
    assert await asyncio.gather(*asked) == [{"predictions": [1]}] * 3
    async with asyncio.timeout(10):
        while pool._leaving:
            await asyncio.sleep(0.01)
    assert not alive(pid)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(old.files[0].fd)


async def test_a_replaced_worker_that_nobody_uses_ends_at_once(desk: Desk) -> None:
    pid = (await desk.pool.load(loadable(OLD))).pid or 0
    await desk.pool.load(loadable(NEW))

    assert not alive(pid)
    assert not desk.pool._leaving


@pytest.mark.parametrize("how", ["unload", "close"])
async def test_unloading_ends_a_replaced_worker_too(desk: Desk, how: str) -> None:
    pool, old = desk.pool, loadable(OLD)
    pid = (await pool.load(old)).pid or 0
    asked = [asyncio.create_task(answer(pool, old, {})) for _ in range(3)]
    await asyncio.sleep(0.01)
    await pool.load(loadable(NEW))
    await (pool.unload(MODEL.model.key) if how == "unload" else pool.close())

    ends = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(ends[-1], NotReady)
    assert not alive(pid)
    assert not pool._leaving


async def test_a_replaced_worker_takes_memory_and_threads_until_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = WorkerPool(predict_timeout_s=10, load_timeout_s=60, tuning=hostile("slow"), memory_bytes=1 << 40)
    old, new = loadable(OLD), loadable(NEW)
    try:
        await pool.load(old)
        asked = asyncio.create_task(answer(pool, old, {}))
        await asyncio.sleep(0.01)
        await pool.load(new)
        taken, _ = await pool._measured()
        assert {worker.opened.cid for worker in taken} == {OLD, NEW}
        _, fits = pool._choose(dict.fromkeys(taken, 1 << 39), 0, 1, MODEL.model.key)
        assert not fits
        for worker in taken:
            worker.threads = 2
        monkeypatch.setattr("divault.workers.pool.cores", lambda: 6)
        other: Any = SimpleNamespace(opened=SimpleNamespace(model=SimpleNamespace(key="another")))
        assert pool.threads_left(other) == 2
        await asked
    finally:
        await pool.close()
