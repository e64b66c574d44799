"""Large files over several connections and gateways: spans, help for the slow, quarantine, resume that counts bytes."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from pathlib import Path

import pytest

from divault.errors import HashMismatch, StorageFailed
from divault.ipfs.car import CarReader, car_header, car_section
from divault.ipfs.cid import DAG_PB, RAW, CidParts, make_cid
from divault.ipfs.importer import Profile
from divault.ipfs.walk import raw_cid
from divault.storage import plan
from divault.storage.cache import CiphertextCache
from divault.storage.fetcher import Fetcher
from divault.storage.gateway import GatewayStorage
from divault.storage.source import Form
from divault.values import Cid
from tests.fault_gateway import Ask, FaultGateway, Line, Twist
from tests.test_fetch_faults import Bench, not_supported, on

SIZE = 40 * 1024 * 1024
LARGE = Profile("test", 1, 128 * 1024, raw_leaves=True, width=32)
"""320 leaves below 10 nodes of 4 MiB and a root."""
NODES = 60_000
"""More than all dag-pb blocks of it, sent for every span."""


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(11).randbytes(SIZE)


@pytest.fixture
def bench(tmp_path: Path, content: bytes) -> Bench:
    return Bench(tmp_path, content, LARGE)


async def fetched(bench: Bench, *gateways: FaultGateway, cid: Cid | None = None, timeout_s: float = 10.0) -> bytes:
    sources = [GatewayStorage(gateway.url, timeout_s=timeout_s) for gateway in gateways]
    try:
        fetcher = Fetcher(sources, CiphertextCache(bench.cache_folder, 4 * SIZE), max_model_bytes=2 * SIZE)
        return (await fetcher.fetch(cid or bench.cid)).path.read_bytes()
    finally:
        for source in sources:
            source.close()


class Counted:
    """How many answers were under way at once, over all gateways that share it."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def twist(self, pause_s: float = 0.05) -> Twist:
        async def twist(ask: Ask, body: bytes | None, line: Line) -> bool:
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(pause_s)
            try:
                await line.ok(body or b"")
            finally:
                self.now -= 1
            return False

        return twist


async def dripped(body: bytes, line: Line) -> None:
    """64 KiB each 0.1 s: a slow line that does deliver."""
    await line.head("200 OK", Content_Length=len(body))
    for at in range(0, len(body), 65536):
        await line.raw(body[at : at + 65536])
        await asyncio.sleep(0.1)


def spans_of(gateway: FaultGateway) -> list[range]:
    return [ask.ranges[0] for ask in gateway.asks if ask.ranges]


async def test_a_large_file_comes_in_spans_over_several_connections_and_gateways(bench: Bench, content: bytes) -> None:
    counted = Counted()
    async with FaultGateway(bench.store, counted.twist()) as one, FaultGateway(bench.store, counted.twist()) as two:
        assert await fetched(bench, one, two) == content

    assert 2 <= counted.most <= plan.MAX_JOBS
    assert spans_of(one)
    assert spans_of(two)
    assert all(len(span) <= plan.MAX_SPAN_BYTES for span in spans_of(one) + spans_of(two))
    # Nothing twice: every byte of the file once, and the nodes on the way to each span.
    assert one.sent + two.sent < SIZE + NODES * len(one.asks + two.asks)


async def test_nodes_come_before_leaves(bench: Bench, content: bytes) -> None:
    async with FaultGateway(bench.store) as gateway:
        assert await fetched(bench, gateway) == content

    forms = [ask.form for ask in gateway.asks]
    assert forms[:11] == [Form.BLOCK] * 11
    assert set(forms[11:]) == {Form.CAR}


async def test_a_small_file_is_one_request_to_the_first_gateway(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    async with FaultGateway(bench.store) as first, FaultGateway(bench.store) as second:
        await bench.fetch(first, second)

    assert [ask.form for ask in first.asks] == [Form.BLOCK, Form.CAR]
    assert second.asks == []


async def test_the_quick_take_over_from_the_slow(bench: Bench, content: bytes) -> None:
    async def slow(ask: Ask, body: bytes | None, line: Line) -> None:
        await dripped(body or b"", line)

    async with FaultGateway(bench.store, on(Form.CAR, slow)) as dripping, FaultGateway(bench.store) as quick:
        assert await fetched(bench, dripping, quick) == content

    assert quick.sent > 3 * dripping.sent
    assert dripping.sent + quick.sent < SIZE * 1.3


async def test_what_stands_still_is_asked_for_elsewhere(
    bench: Bench, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "STALL_S", 0.5)
    stood: list[Ask] = []

    async def stands(ask: Ask, body: bytes | None, line: Line) -> None:
        await line.head("200 OK", Content_Length=len(body or b""))
        await line.raw((body or b"")[: len(body or b"") // 3])
        stood.append(ask)
        await asyncio.sleep(60)

    async with FaultGateway(bench.store, on(Form.CAR, stands)) as stalled, FaultGateway(bench.store) as good:
        assert await fetched(bench, stalled, good, timeout_s=30.0) == content

    assert stood  # and none of the 30 s of its sockets was waited for: the test's own limit is shorter


async def test_a_silent_first_gateway_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "STALL_S", 0.3)

    async def silent(ask: Ask, body: bytes | None, line: Line) -> bool:
        await asyncio.sleep(60)
        return False

    bench = Bench(tmp_path)
    async with FaultGateway(bench.store, silent) as first, FaultGateway(bench.store) as second:
        assert await bench.fetch(first, second, timeout_s=30.0)

    assert [ask.form for ask in second.asks] == [Form.BLOCK, Form.CAR]


async def test_one_wrong_block_puts_a_gateway_into_quarantine_for_this_content_alone(
    bench: Bench, content: bytes
) -> None:
    other = Bench(bench.cache_folder.parent / "other", b"something else")

    async def lies(ask: Ask, body: bytes | None, line: Line) -> None:
        out, leaves = car_header([]), 0
        for section in CarReader().feed(body or b""):
            data = bytearray(section.data)
            leaves += section.cid.codec == RAW
            if leaves == 2:  # the first is right
                data[-1] ^= 1
            out += car_section(raw_cid(section.cid), data)
        await line.ok(out)

    async with FaultGateway(bench.store, on(Form.CAR, lies)) as liar, FaultGateway(bench.store) as good:
        sources = [GatewayStorage(gateway.url) for gateway in (liar, good)]
        cache = CiphertextCache(bench.cache_folder, 4 * SIZE)
        fetcher = Fetcher(sources, cache, max_model_bytes=2 * SIZE)
        blob = await fetcher.fetch(bench.cid)
        assert blob.path.read_bytes() == content
        asked = len(liar.asks)
        del blob
        cache.clear()
        assert (await fetcher.fetch(bench.cid)).path.read_bytes() == content
        assert len(liar.asks) == asked  # again the same content: not asked
        with pytest.raises(StorageFailed):
            await fetcher.fetch(other.cid)
        assert len(liar.asks) == asked + 1  # other content: asked as before
        alone = Fetcher(sources[:1], cache, max_model_bytes=2 * SIZE)
        cache.clear()
        with pytest.raises(HashMismatch) as caught:
            await alone.fetch(bench.cid)
        for source in sources:
            source.close()

    assert caught.value.data["gateway"] == liar.url.removeprefix("http://")
    assert cache.usage().entries == 0


async def test_gateways_that_lack_blocks_complete_each_other(bench: Bench, content: bytes) -> None:
    leaves = _leaf_cids(bench)

    def without(lacks: set[bytes]) -> Twist:
        async def twist(ask: Ask, body: bytes | None, line: Line) -> bool:
            """As real ones do: a CAR that is cut before the block, 404 for the block itself."""
            if ask.form is Form.BLOCK:
                missing = any(cid.multihash in lacks for cid in leaves if ask.path.endswith(_text(cid)))
                if missing:
                    await line.ok(b"", "404 Not Found")
                return not missing
            if ask.form is Form.FILE:
                await not_supported(ask, body, line)
                return False
            kept = car_header([])
            for section in CarReader().feed(body or b""):
                if section.cid.multihash in lacks:
                    await line.head("200 OK", Content_Length=len(body or b""))
                    await line.raw(kept)
                    return False
                kept += car_section(raw_cid(section.cid), section.data)
            return True

        return twist

    odd = {cid.multihash for number, cid in enumerate(leaves) if number % 40 == 3}
    even = {cid.multihash for number, cid in enumerate(leaves) if number % 40 == 23}
    async with FaultGateway(bench.store, without(odd)) as one, FaultGateway(bench.store, without(even)) as two:
        assert await fetched(bench, one, two) == content
    async with FaultGateway(bench.store, without(odd)) as one, FaultGateway(bench.store, without(odd)) as two:
        bench.cache.clear()
        with pytest.raises(StorageFailed) as caught:
            await fetched(bench, one, two)

    assert str(bench.cid) in caught.value.detail
    assert "404" in caught.value.detail


def _leaf_cids(bench: Bench) -> list[CidParts]:
    car = b"".join(bench.store.pieces(bench.cid, (), Form.CAR))
    return [section.cid for section in CarReader().feed(car) if section.cid.codec != DAG_PB]


def _text(cid: CidParts) -> str:
    return str(make_cid(1, cid.codec, cid.hash_code, cid.digest))


@pytest.mark.parametrize("form", [Form.CAR, Form.FILE])
async def test_a_gateway_that_ignores_ranges_sends_the_file_about_once(
    bench: Bench, content: bytes, form: Form
) -> None:
    async def whole(ask: Ask, body: bytes | None, line: Line) -> bool:
        if ask.form is Form.BLOCK and len(body or b"") < 100_000:
            return True
        if ask.form is not form:
            await not_supported(ask, body, line)
            return False
        everything = b"".join(bench.store.pieces(bench.cid, (), form))
        await line.head("200 OK", Content_Length=len(everything))
        for at in range(0, len(everything), 1 << 20):
            await line.raw(everything[at : at + (1 << 20)])
        return False

    async with FaultGateway(bench.store, whole) as gateway:
        assert await fetched(bench, gateway) == content

    assert gateway.sent < SIZE * 1.6


async def test_a_busy_gateway_is_left_in_peace_until_it_is_ready(bench: Bench, content: bytes) -> None:
    refused: list[float] = []
    clock = asyncio.get_running_loop().time

    async def busy(ask: Ask, body: bytes | None, line: Line) -> bool:
        if ask.form is Form.CAR and len(refused) < 3 and (not refused or clock() - refused[0] < 1.0):
            refused.append(clock())
            await line.ok(b"", "429 Too Many Requests", Retry_After=1)
            return False
        return True

    async with FaultGateway(bench.store, busy) as gateway:
        assert await fetched(bench, gateway) == content
        first_again = next(ask for ask in gateway.asks if ask.form is Form.CAR)
        assert first_again.ranges

    assert 1 <= len(refused) <= 3  # those that were under way together, none after the answer


_CHILD = """
import asyncio, sys
from pathlib import Path
from divault.ipfs.cid import parse_cid
from divault.storage.cache import CiphertextCache
from divault.storage.fetcher import Fetcher
from divault.storage.gateway import GatewayStorage
url, folder, cid, size = sys.argv[1:]
fetcher = Fetcher([GatewayStorage(url)], CiphertextCache(Path(folder), 4 * int(size)), max_model_bytes=2 * int(size))
asyncio.run(fetcher.fetch(parse_cid(cid), progress=lambda done, total: print(done, total, flush=True)))
"""


@pytest.mark.parametrize("part", [0.1, 0.6, 0.85])
async def test_a_killed_fetch_goes_on_and_fetches_nothing_twice(bench: Bench, content: bytes, part: float) -> None:
    async def paced(ask: Ask, body: bytes | None, line: Line) -> None:
        await line.head("200 OK", Content_Length=len(body or b""))
        for at in range(0, len(body or b""), 1 << 18):
            await line.raw((body or b"")[at : at + (1 << 18)])
            await asyncio.sleep(0.005)

    async with FaultGateway(bench.store, on(Form.CAR, paced)) as gateway:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _CHILD, gateway.url, str(bench.cache_folder), str(bench.cid), str(SIZE)),
            stdout=asyncio.subprocess.PIPE,
        )
        assert child.stdout is not None
        done = 0
        async for line in child.stdout:
            done, total = map(int, line.split())
            if done >= total * part > 0:
                break
        child.send_signal(signal.SIGKILL)
        assert await child.wait() == -signal.SIGKILL
    assert bench.finished_files() == []
    assert part * SIZE <= done < SIZE

    async with FaultGateway(bench.store) as gateway:
        assert await fetched(bench, gateway) == content

    # What was verified stays: the rest, and the nodes above each span of it.
    assert gateway.sent <= SIZE - done + NODES * len(gateway.asks)
