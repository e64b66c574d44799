"""A sealed file is opened while it is on its way: no byte before it is verified, no model before all of it is."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from divault.errors import HashMismatch, SealedFileDamaged, StorageFailed, WrongKey
from divault.ipfs.importer import Profile
from divault.storage.cache import CiphertextCache
from divault.storage.fetcher import Fetcher
from divault.storage.gateway import GatewayStorage
from divault.storage.source import Form
from divault.vault.age import Identity
from divault.vault.keys import NodeIdentity
from divault.workers.opening import Opener
from tests.fault_gateway import Ask, FaultGateway, Line, Twist
from tests.sealed_models import ME, contents, grant, memory_files_at_hand, sealed
from tests.test_fetch_faults import Bench, on
from tests.test_open_sealed_model import children

NODE = [NodeIdentity(ME)]
PLAIN = random.Random(3).randbytes(6_000_000)
SEALED = sealed(PLAIN)
LEAVES = Profile("test", 1, 64 * 1024, raw_leaves=True, width=256)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, SEALED, LEAVES)


@pytest.fixture
async def opener() -> AsyncIterator[Opener]:
    opener = Opener(max_model_bytes=50_000_000, timeout_s=20)
    yield opener
    opener.close()


def fetcher(bench: Bench, gateway: FaultGateway) -> Fetcher:
    return Fetcher(
        [GatewayStorage(gateway.url)], CiphertextCache(bench.cache_folder, 50_000_000), max_model_bytes=20_000_000
    )


def until(gate: asyncio.Event, share: float) -> Twist:
    """Sends so much of each CAR, and the rest when the gate opens."""

    async def half(ask: Ask, body: bytes | None, line: Line) -> None:
        body = body or b""
        cut = int(len(body) * share)
        await line.head("200 OK", Content_Length=len(body))
        await line.raw(body[:cut])
        await gate.wait()
        await line.raw(body[cut:])

    return on(Form.CAR, half)


async def test_what_is_verified_is_opened_while_the_rest_comes(bench: Bench, opener: Opener) -> None:
    gate, before = asyncio.Event(), children()
    async with (
        FaultGateway(bench.store, until(gate, 0.5)) as gateway,
        fetcher(bench, gateway).arriving(bench.cid) as arrival,
    ):
        opening = asyncio.create_task(opener.open(arrival, grant(), NODE))
        while not (opened_so_far := _memory_of(children() - before)) > 2_000_000:
            assert not opening.done()
            await asyncio.sleep(0.01)
        assert opened_so_far <= len(PLAIN) * 0.5
        gate.set()
        opened = await opening

    assert contents(opened) == {"model": PLAIN}
    assert children() == before


async def test_the_wrong_key_is_known_before_the_rest_is_fetched(bench: Bench, opener: Opener) -> None:
    gate, stranger = asyncio.Event(), [NodeIdentity(Identity.generate())]
    async with FaultGateway(bench.store, until(gate, 0.1)) as gateway:
        with pytest.raises(WrongKey):
            async with fetcher(bench, gateway).arriving(bench.cid) as arrival:
                await opener.open(arrival, grant(), stranger)
        assert not gate.is_set()

    assert gateway.sent < len(SEALED) * 0.2
    assert bench.finished_files() == []


async def test_a_wrong_last_block_gives_no_model(bench: Bench, opener: Opener) -> None:
    """Everything before it was opened already, and the age file may even be whole: the CID decides."""

    async def spoiled(ask: Ask, body: bytes | None, line: Line) -> None:
        body = body or b""
        await line.ok(body[:-1] + bytes([body[-1] ^ 1]))

    before = children()
    async with FaultGateway(bench.store, on(Form.CAR, spoiled)) as gateway:
        source = fetcher(bench, gateway)
        with pytest.raises(HashMismatch):
            async with source.arriving(bench.cid) as arrival:
                await opener.open(arrival, grant(), NODE)

    assert memory_files_at_hand() == []
    assert children() == before


async def test_a_gateway_that_dies_on_the_way_gives_no_model(bench: Bench, opener: Opener) -> None:
    async def cut(ask: Ask, body: bytes | None, line: Line) -> bool:
        if ask.form is Form.CAR and not ask.ranges:
            await line.head("200 OK", Content_Length=len(body or b""))
            await line.raw((body or b"")[: len(body or b"") * 3 // 4])
        elif ask.path == f"/ipfs/{bench.cid}" and ask.form is Form.BLOCK:
            return True
        else:
            await line.ok(b"", "503 Service Unavailable")
        return False

    before = children()
    async with FaultGateway(bench.store, cut) as gateway:
        with pytest.raises(StorageFailed) as caught:
            async with fetcher(bench, gateway).arriving(bench.cid) as arrival:
                await opener.open(arrival, grant(), NODE)

    assert caught.value.data["gateway"] == gateway.url.removeprefix("http://")
    assert caught.value.data["cid"] == str(bench.cid)
    assert children() == before
    assert memory_files_at_hand() == []


async def test_a_damaged_seal_ends_the_transfer_early(tmp_path: Path, opener: Opener) -> None:
    data = bytearray(SEALED)
    data[200_000] ^= 1
    bench, gate = Bench(tmp_path, bytes(data), LEAVES), asyncio.Event()
    async with FaultGateway(bench.store, until(gate, 0.2)) as gateway:
        with pytest.raises(SealedFileDamaged) as caught:
            async with fetcher(bench, gateway).arriving(bench.cid) as arrival:
                await opener.open(arrival, grant(), NODE)

    assert caught.value.data["cid"] == str(bench.cid)
    assert gateway.sent < len(data) * 0.3


async def test_a_cached_file_found_damaged_on_the_way_is_fetched_anew(bench: Bench, opener: Opener) -> None:
    async with FaultGateway(bench.store) as gateway:
        source = fetcher(bench, gateway)
        blob = await source.fetch(bench.cid)
        with blob.path.open("r+b") as file:
            file.seek(5_000_000)
            file.write(b"damage")
        del blob
        asked = len(gateway.asks)
        async with source.arriving(bench.cid) as arrival:
            opened = await opener.open(arrival, grant(), NODE)

    assert contents(opened) == {"model": PLAIN}
    assert len(gateway.asks) > asked


async def test_who_leaves_does_not_end_the_opening_of_another(bench: Bench, opener: Opener) -> None:
    gate = asyncio.Event()
    async with FaultGateway(bench.store, until(gate, 0.3)) as gateway:
        source = fetcher(bench, gateway)

        async def load() -> bytes:
            async with source.arriving(bench.cid) as arrival:
                return contents(await opener.open(arrival, grant(), NODE))["model"]

        leaves, stays = asyncio.create_task(load()), asyncio.create_task(load())
        await asyncio.sleep(0.3)
        leaves.cancel()
        await asyncio.gather(leaves, return_exceptions=True)
        gate.set()
        assert await stays == PLAIN

    assert [ask.form for ask in gateway.asks] == [Form.BLOCK, Form.CAR]


def _memory_of(processes: set[int]) -> int:
    """Bytes in the memory files of these processes."""
    sizes = [0]
    for process in processes:
        for entry in Path(f"/proc/{process}/fd").glob("*"):
            try:
                if "memfd:" in os.readlink(entry):  # noqa: PTH115  # the target is no path
                    sizes.append(entry.stat().st_size)
            except OSError:
                continue
    return max(sizes)
