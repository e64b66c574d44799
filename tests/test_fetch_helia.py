"""Fetching from a gateway that others wrote (Helia's verified-fetch), with its own ways of failing."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from divault.errors import StorageFailed
from divault.ipfs.cid import RAW, SHA2_256, make_cid
from divault.ipfs.importer import UNIXFS_V0_2015, UNIXFS_V1_2025, Importer
from divault.storage import gateway as gateway_module
from divault.storage.cache import CiphertextCache
from divault.storage.fetcher import Fetcher
from divault.storage.gateway import GatewayStorage
from divault.storage.local import LocalStore
from divault.storage.source import Form
from divault.values import Cid
from tests.fault_gateway import Ask, FaultGateway, Line
from tests.helia_gateway import HeliaGateway, add, block_files

pytestmark = pytest.mark.asyncio(loop_scope="module")
MIB = 1 << 20
CONTENT = random.Random(21).randbytes(13 * MIB + 12345)
ABSENT = make_cid(1, RAW, SHA2_256, bytes(32))


@dataclass(frozen=True)
class Scene:
    """A gateway, and what it has of `CONTENT`."""

    gateway: HeliaGateway
    modern: Cid
    old: Cid
    folder: Path


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def scene(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    folder = tmp_path_factory.mktemp("helia")
    file = folder / "content"
    file.write_bytes(CONTENT)
    (modern,) = await asyncio.to_thread(add, folder / "blocks", "unixfs-v1-2025", file)
    (old,) = await asyncio.to_thread(add, folder / "blocks", "unixfs-v0-2015", file)
    async with HeliaGateway(folder / "blocks") as gateway:
        yield Scene(gateway, modern, old, folder)


async def fetched(folder: Path, cid: Cid, *urls: str, timeout_s: float = 10.0) -> bytes:
    sources = [GatewayStorage(url, timeout_s=timeout_s) for url in urls]
    try:
        fetcher = Fetcher(sources, CiphertextCache(folder, 200 * MIB), max_model_bytes=100 * MIB)
        return (await fetcher.fetch(cid)).path.read_bytes()
    finally:
        for source in sources:
            source.close()


async def test_files_of_both_profiles_come_right(scene: Scene, tmp_path: Path) -> None:
    assert await fetched(tmp_path / "modern", scene.modern, scene.gateway.url) == CONTENT
    assert await fetched(tmp_path / "old", scene.old, scene.gateway.url) == CONTENT


async def test_our_importer_names_files_as_the_reference_does(tmp_path: Path) -> None:
    profiles = {"unixfs-v1-2025": UNIXFS_V1_2025, "unixfs-v0-2015": UNIXFS_V0_2015}
    contents = [CONTENT[:size] for size in (0, 1, MIB - 1, MIB, MIB + 1, 262_144, 262_145, 5 * MIB + 7)]
    contents.append(bytes(3 * MIB))  # the same leaf again and again
    files = []
    for number, content in enumerate(contents):
        files.append(tmp_path / str(number))
        files[-1].write_bytes(content)
    for name, profile in profiles.items():
        theirs = await asyncio.to_thread(add, tmp_path / "blocks", name, *files)
        for content, cid in zip(contents, theirs, strict=True):
            importer = Importer([profile])
            importer.update(content)
            assert importer.finish()[profile] == cid


async def test_the_probe_finds_it_trustless(scene: Scene) -> None:
    gateway = GatewayStorage(scene.gateway.url)
    assert await gateway.probe()
    assert gateway.trustless
    gateway.close()


async def test_an_unknown_root_names_gateway_and_cid(scene: Scene, tmp_path: Path) -> None:
    """It answers 504 for the block, then 200 and a CAR that breaks off."""
    with pytest.raises(StorageFailed) as caught:
        await fetched(tmp_path, ABSENT, scene.gateway.url)

    assert caught.value.data["gateway"] == scene.gateway.name
    assert caught.value.data["cid"] == str(ABSENT)
    assert list(tmp_path.iterdir()) == []


async def test_a_missing_child_keeps_what_is_verified_and_only_the_gap_is_fetched_later(
    scene: Scene, tmp_path: Path
) -> None:
    blocks, cache = tmp_path / "blocks", tmp_path / "cache"
    shutil.copytree(scene.folder / "blocks", blocks)
    gone = next(path for path in block_files(blocks) if path.stat().st_size == MIB)
    kept = gone.read_bytes()
    gone.unlink()
    async with HeliaGateway(blocks) as gateway:
        with pytest.raises(StorageFailed) as caught:
            await fetched(cache, scene.modern, gateway.url)
        assert caught.value.data["gateway"] == gateway.name
        assert [path.name for path in cache.iterdir() if ".part" not in path.name] == []
        gone.write_bytes(kept)
        asked: list[Ask] = []

        async def counted(ask: Ask, body: bytes | None, line: Line) -> bool:
            asked.append(ask)
            return True

        async with FaultGateway(_store_of(tmp_path), counted) as rest:
            assert await fetched(cache, scene.modern, rest.url) == CONTENT

    assert rest.sent < 2 * MIB
    assert [ask.form for ask in asked] in ([Form.BLOCK], [Form.CAR])


async def test_gateways_that_lack_different_blocks_complete_each_other(scene: Scene, tmp_path: Path) -> None:
    left, right = tmp_path / "left", tmp_path / "right"
    for folder, numbers in ((left, (0, 4)), (right, (1, 7))):
        shutil.copytree(scene.folder / "blocks", folder)
        leaves = sorted(path for path in block_files(folder) if path.stat().st_size == MIB)
        for number in numbers:
            leaves[number].unlink()
    async with HeliaGateway(left) as one, HeliaGateway(right) as two:
        assert await fetched(tmp_path / "cache", scene.modern, one.url, two.url) == CONTENT


async def test_answers_without_repeats_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under dups=n a filter that errs decides what is a repeat; whatever is left out comes block by block."""
    monkeypatch.setattr(gateway_module, "_CAR_QUERY", "format=car&car-order=dfs&car-dups=n")
    monkeypatch.setattr(gateway_module, "_CAR_TYPE", "application/vnd.ipld.car; version=1; order=dfs; dups=n")
    chance = random.Random(5)
    leaves = [chance.randbytes(256 * 1024) for _ in range(6)]
    content = b"".join(chance.choice(leaves) for _ in range(24))
    file = tmp_path / "content"
    file.write_bytes(content)
    (cid,) = await asyncio.to_thread(add, tmp_path / "blocks", "unixfs-v0-2015", file)
    async with HeliaGateway(tmp_path / "blocks") as gateway:
        source = GatewayStorage(gateway.url)
        sent = sum([len(piece) async for piece in source.read(cid)])
        source.close()
        assert await fetched(tmp_path / "cache", cid, gateway.url) == content

    assert sent < len(content)


async def test_plain_ranges_of_it_are_enough_beside_the_nodes(scene: Scene, tmp_path: Path) -> None:
    source = GatewayStorage(scene.gateway.url)
    wanted = range(5 * MIB + 3, 6 * MIB + 9)
    pieces = [bytes(piece) async for piece in source.read(scene.modern, [wanted], Form.FILE)]
    source.close()

    assert b"".join(pieces) == CONTENT[wanted.start : wanted.stop]


async def test_it_is_killed_in_the_middle(scene: Scene, tmp_path: Path) -> None:
    async with HeliaGateway(scene.folder / "blocks") as gateway:
        source = GatewayStorage(gateway.url, timeout_s=5)
        fetcher = Fetcher([source], CiphertextCache(tmp_path, 200 * MIB), max_model_bytes=100 * MIB)

        def kill(done: int, total: int) -> None:
            if done > total // 4 and gateway.process.returncode is None:
                gateway.process.kill()

        with pytest.raises(StorageFailed) as caught:
            await fetcher.fetch(scene.modern, progress=kill)
        source.close()

    assert caught.value.data["gateway"] == gateway.name
    assert await fetched(tmp_path, scene.modern, scene.gateway.url) == CONTENT


def _store_of(folder: Path) -> LocalStore:
    """The same blocks behind a gateway of ours that counts."""
    store, file = LocalStore(folder / "ours"), folder / "content"
    file.write_bytes(CONTENT)
    with file.open("rb") as opened:
        store.put_file(opened)
    return store
