"""Gateways that lie, stall, cut, redirect or flood: a fetch gives the right bytes or a typed error, never more.

`SCENARIOS` are the behaviours described in `vectors/ipfs`; `tests/vectors/test_ipfs.py` runs each of them.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from divault.devnet.content import ContentStore
from divault.errors import (
    BlockTooLarge,
    ContentInvalid,
    HashMismatch,
    NotAFile,
    SizeExceeded,
    StorageFailed,
    TooManyExtraBytes,
    UnsupportedCodec,
)
from divault.ipfs.car import CarReader, car_header, car_section
from divault.ipfs.cid import DAG_PB, RAW, SHA2_256, cid_bytes, make_cid, parse_cid
from divault.ipfs.dagpb import encode_node
from divault.ipfs.importer import UNIXFS_V0_2015, Profile
from divault.ipfs.unixfs import encode_file
from divault.ipfs.walk import raw_cid
from divault.storage.cache import CiphertextCache
from divault.storage.fetcher import Fetcher
from divault.storage.gateway import GatewayStorage
from divault.storage.local import LocalStore
from divault.storage.source import Form
from divault.values import Cid
from tests.fault_gateway import Ask, FaultGateway, Line, Twist

CONTENT = random.Random(7).randbytes(300_000)
LEAVES = Profile("test", 1, 16 * 1024, raw_leaves=True, width=8)
"""19 leaves under two levels of nodes."""


class Bench:
    """A store with the content, and a cache to fetch it into."""

    def __init__(self, folder: Path, content: bytes = CONTENT, profile: Profile = LEAVES) -> None:
        self.store = LocalStore(folder / "store")
        file = folder / "content"
        file.write_bytes(content)
        with file.open("rb") as opened:
            self.cid = self.store.put_file(opened, profile)
        self.cache_folder = folder / "cache"
        self.cache = CiphertextCache(self.cache_folder, 50_000_000)

    async def fetch(self, *gateways: FaultGateway, cid: Cid | None = None, timeout_s: float = 5.0) -> bytes:
        sources = [GatewayStorage(gateway.url, timeout_s=timeout_s) for gateway in gateways]
        try:
            fetcher = Fetcher(sources, self.cache, max_model_bytes=10_000_000)
            blob = await fetcher.fetch(cid or self.cid)
            assert blob.path.stat().st_mode & 0o777 == 0o600
            return blob.path.read_bytes()
        finally:
            for source in sources:
                source.close()

    def finished_files(self) -> list[str]:
        return [path.name for path in self.cache_folder.iterdir() if ".part" not in path.name]


async def honest(ask: Ask, body: bytes | None, line: Line) -> bool:
    return True


def on(form: Form, answer: Callable[[Ask, bytes | None, Line], Awaitable[object]]) -> Twist:
    """The twist for one form only."""

    async def twist(ask: Ask, body: bytes | None, line: Line) -> bool:
        if ask.form is not form:
            return True
        await answer(ask, body, line)
        return False

    return twist


async def not_supported(ask: Ask, body: bytes | None, line: Line) -> None:
    await line.ok(b"", "400 Bad Request")


async def html(ask: Ask, body: bytes | None, line: Line) -> bool:
    await line.ok(b"<html><body>We are sorry</body></html>", Content_Type="text/html")
    return False


async def flipped(ask: Ask, body: bytes | None, line: Line) -> bool:
    """Every leaf has a wrong bit; nodes are right."""
    if ask.form is not Form.CAR:
        return True
    out = car_header([])
    for section in CarReader().feed(body or b""):
        data = bytearray(section.data)
        if section.cid.codec == RAW:
            data[0] ^= 1
        out += car_section(raw_cid(section.cid), data)
    await line.ok(out)
    return False


async def server_error(ask: Ask, body: bytes | None, line: Line) -> bool:
    await line.ok(b"oops", "500 Internal Server Error")
    return False


# --- the scenarios of the vectors ---------------------------------------------------------------------------------


async def raw_html_200(folder: Path) -> None:
    bench = Bench(folder)
    async with FaultGateway(bench.store, html) as bad, FaultGateway(bench.store) as good:
        with pytest.raises(HashMismatch) as caught:
            await bench.fetch(bad)

        assert caught.value.data["cid"] == str(bench.cid)
        assert caught.value.data["gateway"] == bad.url.removeprefix("http://")
        assert list(bench.cache_folder.iterdir()) == []
        assert await bench.fetch(bad, good) == CONTENT


async def car_truncated_content_length(folder: Path) -> None:
    async def cut(ask: Ask, body: bytes | None, line: Line) -> None:
        if ask.ranges:
            await line.ok(body or b"")
            return
        await line.head("200 OK", Content_Length=len(body or b""))
        await line.raw((body or b"")[: len(body or b"") // 2])

    await resumes(folder, cut)


async def car_truncated_chunked(folder: Path) -> None:
    async def cut(ask: Ask, body: bytes | None, line: Line) -> None:
        half = (body or b"")[: len(body or b"") // 2] if not ask.ranges else body or b""
        await line.head("200 OK", Transfer_Encoding="chunked")
        await line.raw(b"%x\r\n%b\r\n" % (len(half), half))
        if ask.ranges:
            await line.raw(b"0\r\n\r\n")

    await resumes(folder, cut)


async def resumes(folder: Path, cut: Callable[[Ask, bytes | None, Line], Awaitable[None]]) -> None:
    """After the cut only the gaps are asked for."""
    bench = Bench(folder)
    async with FaultGateway(bench.store, on(Form.CAR, cut)) as gateway:
        assert await bench.fetch(gateway) == CONTENT
        later = [ask for ask in gateway.asks if ask.ranges]

    assert later
    assert all(ask.ranges[0].start > len(CONTENT) // 3 for ask in later)
    assert gateway.sent < len(CONTENT) * 1.2


async def car_clean_end_missing_tail(folder: Path) -> None:
    bench = Bench(folder)
    last = list(CarReader().feed(b"".join(bench.store.pieces(bench.cid, (), Form.CAR))))[-1].cid

    async def short(ask: Ask, body: bytes | None, line: Line) -> bool:
        if ask.form is Form.CAR:
            kept = [section for section in CarReader().feed(body or b"") if section.cid != last]
            await line.ok(car_header([]) + b"".join(car_section(raw_cid(s.cid), s.data) for s in kept))
            return False
        if ask.path != f"/ipfs/{bench.cid}" or ask.form is Form.FILE:
            await line.ok(b"", "404 Not Found")
            return False
        return True

    async with FaultGateway(bench.store, short) as first, FaultGateway(bench.store) as second:
        with pytest.raises(StorageFailed):
            await bench.fetch(first)
        assert await bench.fetch(first, second) == CONTENT

    assert second.sent < 50_000
    assert [ask.form for ask in second.asks if ask.form is Form.CAR and not ask.ranges] == []


async def slow_loris(folder: Path) -> None:
    async def drip(ask: Ask, body: bytes | None, line: Line) -> bool:
        await line.head("200 OK", Content_Length=len(body or b""))
        for byte in body or b"":
            await line.raw(bytes([byte]))
            await asyncio.sleep(0.05)
        return False

    bench = Bench(folder)
    async with FaultGateway(bench.store, drip) as slow, FaultGateway(bench.store) as good:
        assert await bench.fetch(slow, good, timeout_s=0.4) == CONTENT
        bench.cache.clear()
        with pytest.raises(StorageFailed) as caught:
            await bench.fetch(slow, timeout_s=0.4)

    assert caught.value.data["reason"] == "timeout"


async def endless_body(folder: Path) -> None:
    async def flood(ask: Ask, body: bytes | None, line: Line) -> None:
        await line.head("200 OK")
        await line.raw(car_header([]))
        chance = random.Random(1)
        while True:
            block = chance.randbytes(4096)
            await line.raw(car_section(cid_bytes(make_cid(1, RAW, SHA2_256, chance.randbytes(32))), block))

    async def twist(ask: Ask, body: bytes | None, line: Line) -> bool:
        if ask.form is Form.CAR:
            await flood(ask, body, line)
        elif ask.path != f"/ipfs/{bench.cid}" or ask.form is Form.FILE:
            await not_supported(ask, body, line)
        else:
            return True
        return False

    bench = Bench(folder)
    async with FaultGateway(bench.store, twist) as gateway:
        with pytest.raises(TooManyExtraBytes):
            await bench.fetch(gateway)
    assert gateway.sent < 16_000_000  # the cap is 1 MiB; the rest lay in socket buffers
    assert bench.finished_files() == []


async def gzip_bomb(folder: Path) -> None:
    bomb = gzip.compress(bytes(20_000_000))

    async def encoded(ask: Ask, body: bytes | None, line: Line) -> bool:
        await line.ok(bomb, Content_Encoding="gzip")
        return False

    bench = Bench(folder)
    async with FaultGateway(bench.store, encoded) as gateway, FaultGateway(bench.store) as good:
        with pytest.raises(StorageFailed) as caught:
            await bench.fetch(gateway)
        assert await bench.fetch(gateway, good) == CONTENT

    assert caught.value.data["reason"] == "encoded"
    assert {ask.headers["accept-encoding"] for ask in gateway.asks} == {"identity"}


async def status_429_retry_after(folder: Path) -> None:
    bench = Bench(folder)
    refusals: list[float] = []

    async def patience(ask: Ask, body: bytes | None, line: Line) -> bool:
        if len(refusals) >= 2:
            return True
        refusals.append(time.monotonic())
        await line.ok(b"", "429 Too Many Requests", Retry_After=1)
        return False

    async with FaultGateway(bench.store, patience) as gateway, FaultGateway(bench.store) as other:
        assert await bench.fetch(gateway, other) == CONTENT
        assert len(refusals) == 1  # the other one served meanwhile
        bench.cache.clear()
        assert await bench.fetch(gateway) == CONTENT
        waited = time.monotonic() - refusals[1]

    assert waited >= 1.0


async def redirect_loopback(folder: Path) -> None:
    bench = Bench(folder)
    async with FaultGateway(bench.store) as inside:

        async def away(ask: Ask, body: bytes | None, line: Line) -> bool:
            await line.ok(b"", "302 Found", Location=inside.url + ask.path)
            return False

        async def home(ask: Ask, body: bytes | None, line: Line) -> bool:
            await line.ok(b"", "302 Found", Location=f"{ask.path}?format={ask.form}")
            return False

        async with FaultGateway(bench.store, away) as gateway:
            with pytest.raises(StorageFailed) as caught:
                await bench.fetch(gateway)
        async with FaultGateway(bench.store, home) as circle:
            with pytest.raises(StorageFailed) as endless:
                await bench.fetch(circle)

    assert inside.asks == []
    assert caught.value.data["reason"] == "redirect"
    assert endless.value.data["reason"] == "redirect"
    assert len(circle.asks) == 4


async def redirect_file(folder: Path) -> None:
    async def away(ask: Ask, body: bytes | None, line: Line) -> bool:
        await line.ok(b"", "301 Moved Permanently", Location="file:///etc/passwd")
        return False

    bench = Bench(folder)
    async with FaultGateway(bench.store, away) as gateway:
        with pytest.raises(StorageFailed) as caught:
            await bench.fetch(gateway)

    assert caught.value.data["reason"] == "redirect"


async def one_bad_of_three(folder: Path) -> None:
    bench = Bench(folder)
    async with (
        FaultGateway(bench.store, flipped) as bad,
        FaultGateway(bench.store, server_error) as broken,
        FaultGateway(bench.store) as good,
    ):
        assert await bench.fetch(bad, broken, good) == CONTENT
        asked = len(bad.asks)
        bench.cache.clear()
        with pytest.raises(HashMismatch):
            await bench.fetch(bad)

    assert asked == 2  # root, CAR, and never again for this content
    assert bench.finished_files() == []


async def wrong_content_type(folder: Path) -> None:
    async def typed(ask: Ask, body: bytes | None, line: Line) -> bool:
        await line.ok(body or b"", Content_Type="application/octet-stream")
        return False

    bench = Bench(folder)
    async with FaultGateway(bench.store, typed) as gateway:
        assert await bench.fetch(gateway) == CONTENT


async def no_format_support(folder: Path) -> None:
    bench = Bench(folder)

    async def plain(ask: Ask, body: bytes | None, line: Line) -> bool:
        if ask.form is Form.FILE:
            return True
        await line.ok(CONTENT)
        return False

    async with FaultGateway(bench.store, plain) as gateway, FaultGateway(bench.store) as good:
        with pytest.raises(ContentInvalid):
            await bench.fetch(gateway)
        assert await bench.fetch(gateway, good) == CONTENT


async def dups_n_when_asked_y(folder: Path) -> None:
    content = b"".join(bytes([n % 3]) * LEAVES.chunk_bytes for n in range(12))
    bench = Bench(folder, content)

    async def once(ask: Ask, body: bytes | None, line: Line) -> None:
        out, seen = car_header([]), set()
        for section in CarReader().feed(body or b""):
            if section.cid.multihash not in seen:
                seen.add(section.cid.multihash)
                out += car_section(raw_cid(section.cid), section.data)
        await line.ok(out, Content_Type="application/vnd.ipld.car; version=1; order=dfs; dups=n")

    async with FaultGateway(bench.store, on(Form.CAR, once)) as gateway:
        assert await bench.fetch(gateway) == content

    assert [ask.form for ask in gateway.asks] == [Form.BLOCK, Form.CAR]


async def order_unk(folder: Path) -> None:
    content = random.Random(3).randbytes(3_000_000)
    bench = Bench(folder, content)

    async def shuffled(ask: Ask, body: bytes | None, line: Line) -> None:
        sections = [car_section(raw_cid(s.cid), s.data) for s in CarReader().feed(body or b"")]
        random.Random(2).shuffle(sections)
        await line.ok(car_header([]) + b"".join(sections), Content_Type="application/vnd.ipld.car; order=unk")

    async with FaultGateway(bench.store, on(Form.CAR, shuffled)) as gateway:
        assert await bench.fetch(gateway) == content


_CHILD = """
import asyncio, sys
from pathlib import Path
from divault.ipfs.cid import parse_cid
from divault.storage.cache import CiphertextCache
from divault.storage.fetcher import Fetcher
from divault.storage.gateway import GatewayStorage
url, folder, cid = sys.argv[1:]
fetcher = Fetcher([GatewayStorage(url)], CiphertextCache(Path(folder), 50_000_000), max_model_bytes=10_000_000)
asyncio.run(fetcher.fetch(parse_cid(cid), progress=lambda done, total: print(done, total, flush=True)))
"""


async def kill_and_resume(folder: Path) -> None:
    content = random.Random(5).randbytes(3_000_000)
    bench = Bench(folder, content)

    async def stalls(ask: Ask, body: bytes | None, line: Line) -> None:
        await line.head("200 OK", Content_Length=len(body or b""))
        await line.raw((body or b"")[: len(body or b"") * 62 // 100])
        await asyncio.sleep(60)

    async with FaultGateway(bench.store, on(Form.CAR, stalls)) as gateway:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            _CHILD,
            gateway.url,
            str(bench.cache_folder),
            str(bench.cid),
            stdout=asyncio.subprocess.PIPE,
        )
        assert child.stdout is not None
        async for line in child.stdout:
            done, total = map(int, line.split())
            if done >= total * 0.6 > 0:
                break
        child.send_signal(signal.SIGKILL)
        assert await child.wait() == -signal.SIGKILL
    assert bench.finished_files() == []

    async with FaultGateway(bench.store) as gateway:
        assert await bench.fetch(gateway) == content

    assert gateway.sent <= len(content) * 0.45


SCENARIOS: dict[str, Callable[[Path], Awaitable[None]]] = {
    "raw-html-200": raw_html_200,
    "car-truncated-content-length": car_truncated_content_length,
    "car-truncated-chunked": car_truncated_chunked,
    "car-clean-end-missing-tail": car_clean_end_missing_tail,
    "slow-loris": slow_loris,
    "endless-body": endless_body,
    "gzip-bomb": gzip_bomb,
    "429-retry-after": status_429_retry_after,
    "redirect-loopback": redirect_loopback,
    "redirect-file": redirect_file,
    "one-bad-of-three": one_bad_of_three,
    "wrong-content-type": wrong_content_type,
    "no-format-support": no_format_support,
    "dups-n-when-asked-y": dups_n_when_asked_y,
    "order-unk": order_unk,
    "kill-and-resume": kill_and_resume,
}


# --- beyond them --------------------------------------------------------------------------------------------------


async def test_oversize_root_is_refused_before_the_transfer(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    async with FaultGateway(bench.store) as gateway:
        fetcher = Fetcher([GatewayStorage(gateway.url)], bench.cache, max_model_bytes=len(CONTENT) - 1)
        with pytest.raises(SizeExceeded) as caught:
            await fetcher.fetch(bench.cid)
        exact = Fetcher([GatewayStorage(gateway.url)], bench.cache, max_model_bytes=len(CONTENT))
        assert [ask.form for ask in gateway.asks] == [Form.BLOCK]
        assert (await exact.fetch(bench.cid)).size == len(CONTENT)

    assert caught.value.data["have_bytes"] == len(CONTENT)
    assert caught.value.data["cid"] == str(bench.cid)


@pytest.mark.parametrize("forms", [(Form.BLOCK,), (Form.CAR,), (Form.BLOCK, Form.FILE)])
async def test_a_gateway_that_knows_only_some_forms_is_enough(tmp_path: Path, forms: tuple[Form, ...]) -> None:
    async def some(ask: Ask, body: bytes | None, line: Line) -> bool:
        if ask.form in forms:
            return True
        await not_supported(ask, body, line)
        return False

    bench = Bench(tmp_path)
    async with FaultGateway(bench.store, some) as gateway:
        assert await bench.fetch(gateway) == CONTENT


async def test_plain_file_server_gives_the_leaves_and_a_trustless_gateway_the_nodes(tmp_path: Path) -> None:
    async def plain(ask: Ask, body: bytes | None, line: Line) -> bool:
        if ask.form is not Form.FILE:
            await not_supported(ask, body, line)
            return False
        await line.ok(CONTENT)  # ignores Range, too
        return False

    async def nodes_only(ask: Ask, body: bytes | None, line: Line) -> bool:
        if ask.form is Form.BLOCK and len(body or b"") < 5_000:
            return True
        await not_supported(ask, body, line)
        return False

    bench = Bench(tmp_path)
    async with FaultGateway(bench.store, nodes_only) as trustless, FaultGateway(bench.store, plain) as server:
        assert await bench.fetch(trustless, server) == CONTENT

    assert trustless.sent < 20_000


async def test_wrong_bytes_of_a_plain_file_server_are_refused(tmp_path: Path) -> None:
    async def lies(ask: Ask, body: bytes | None, line: Line) -> bool:
        if ask.form is Form.BLOCK and len(body or b"") < 5_000:
            return True
        if ask.form is Form.FILE:
            await line.ok(bytes(len(CONTENT)))
        else:
            await not_supported(ask, body, line)
        return False

    bench = Bench(tmp_path)
    async with FaultGateway(bench.store, lies) as gateway:
        with pytest.raises(HashMismatch):
            await bench.fetch(gateway)

    assert bench.finished_files() == []


async def test_single_leaf_comes_from_a_plain_file_server(tmp_path: Path) -> None:
    async def plain(ask: Ask, body: bytes | None, line: Line) -> bool:
        if ask.form is Form.FILE:
            return True
        await not_supported(ask, body, line)
        return False

    bench = Bench(tmp_path, b"a small model")
    async with FaultGateway(bench.store, plain) as gateway:
        assert bench.cid.codec == RAW
        assert await bench.fetch(gateway) == b"a small model"


async def test_old_style_content_with_wrapped_leaves_is_fetched(tmp_path: Path) -> None:
    content = random.Random(9).randbytes(700_000)
    bench = Bench(tmp_path, content, UNIXFS_V0_2015)
    async with FaultGateway(bench.store) as gateway:
        assert await bench.fetch(gateway) == content


async def test_empty_file_is_a_file(tmp_path: Path) -> None:
    bench = Bench(tmp_path, b"")
    async with FaultGateway(bench.store) as gateway:
        assert await bench.fetch(gateway) == b""


async def test_identity_cid_needs_no_gateway(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    assert await bench.fetch(cid=make_cid(1, RAW, 0, b"inline")) == b"inline"


async def test_unknown_content_names_cid_and_gateway(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    absent = make_cid(1, RAW, SHA2_256, bytes(32))
    async with FaultGateway(bench.store) as gateway:
        with pytest.raises(StorageFailed) as caught:
            await bench.fetch(gateway, cid=absent)

    assert caught.value.data["reason"] == "not_found"
    assert caught.value.data["gateway"] == gateway.url.removeprefix("http://")
    assert str(absent) in caught.value.detail


async def test_dead_gateway_is_unreachable_and_the_next_one_serves(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    async with FaultGateway(bench.store) as gone:
        pass
    async with FaultGateway(bench.store) as gateway:
        with pytest.raises(StorageFailed) as caught:
            await bench.fetch(gone)
        assert await bench.fetch(gone, gateway) == CONTENT

    assert caught.value.data["reason"] == "unreachable"


async def test_no_gateway_at_all_says_so(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed) as caught:
        await Bench(tmp_path).fetch()

    assert caught.value.data["reason"] == "no_source"


async def test_several_failing_gateways_are_all_told(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    async with FaultGateway(bench.store, server_error) as first, FaultGateway(bench.store, html) as second:
        with pytest.raises(StorageFailed) as caught:
            await bench.fetch(first, second)

    for gateway in (first, second):
        assert gateway.url.removeprefix("http://") in str(caught.value.data["gateway"])
    assert "HTTP 500" in caught.value.detail


async def test_directory_is_refused_as_a_model_by_type(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    block = encode_node([(cid_bytes(bench.cid), b"model.bin", 1)], b"\x08\x01")
    digest = hashlib.sha256(block).digest()
    bench.store.put_block(b"\x12\x20" + digest, block)
    async with FaultGateway(bench.store) as gateway:
        with pytest.raises(NotAFile):
            await bench.fetch(gateway, cid=make_cid(1, DAG_PB, SHA2_256, digest))

    assert list(bench.cache_folder.iterdir()) == []


async def test_content_that_breaks_the_rules_is_not_asked_for_twice(tmp_path: Path) -> None:
    block = encode_node([], encode_file(b"abc") + b"\x18\x09")  # two sizes
    bench = Bench(tmp_path)
    digest = hashlib.sha256(block).digest()
    bench.store.put_block(b"\x12\x20" + digest, block)
    async with FaultGateway(bench.store) as first, FaultGateway(bench.store) as second:
        with pytest.raises(ContentInvalid) as caught:
            await bench.fetch(first, second, cid=make_cid(1, DAG_PB, SHA2_256, digest))

    assert caught.value.data["reason"] == "UnixFSInvalid"
    assert second.asks == []


async def test_cid_outside_the_policy_is_refused_without_a_request(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    async with FaultGateway(bench.store) as gateway:
        with pytest.raises(UnsupportedCodec):
            await bench.fetch(gateway, cid=make_cid(1, 0x71, SHA2_256, bytes(32)))

    assert gateway.asks == []


async def test_oversized_block_is_cut_off(tmp_path: Path) -> None:
    async def big(ask: Ask, body: bytes | None, line: Line) -> bool:
        await line.head("200 OK")
        while True:
            await line.raw(bytes(65536))

    bench = Bench(tmp_path)
    async with FaultGateway(bench.store, big) as gateway:
        with pytest.raises((BlockTooLarge, ContentInvalid)):
            await bench.fetch(gateway)

    assert gateway.sent < 60_000_000
    assert bench.finished_files() == []


async def test_connections_are_used_again_and_replaced_when_the_server_closed_them(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    async with ContentStore(tmp_path / "store") as server:
        source = GatewayStorage(server.url)
        for _ in range(3):
            assert await source.probe()
        connections = source._client._idle
        assert [len(idle) for idle in connections.values()] == [1]
        next(iter(connections.values()))[0].sock.shutdown(2)
        assert await source.probe()
        source.close()
    assert bench.cid == parse_cid(str(bench.cid))


async def test_missing_child_fails_the_fetch_with_what_the_gateway_said(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    blocks = [path for path in (tmp_path / "store" / "blocks").rglob("*") if path.is_file()]
    max(blocks, key=lambda path: path.stat().st_size).unlink()
    async with FaultGateway(bench.store) as gateway:
        with pytest.raises(StorageFailed) as caught:
            await bench.fetch(gateway)

    assert caught.value.data["cid"] == str(bench.cid)
    assert caught.value.data["reason"] == "not_found"
    assert bench.finished_files() == []
