"""The cache of ciphertext under several processes, damage, crashes and a full disk; `divault cache` beside them."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import random
import sys
import time
from pathlib import Path

import pytest

import divault.storage.cache
from divault.devnet.content import ContentStore
from divault.errors import StorageFailed
from divault.ipfs.importer import Profile
from divault.ipfs.verifier import Limits
from divault.storage.cache import CiphertextCache, OnDisk
from divault.storage.fetcher import Fetcher
from divault.storage.gateway import GatewayStorage
from divault.storage.inventory import inventory, verify
from divault.storage.local import LocalStore
from divault.values import Cid
from tests.fault_gateway import FaultGateway
from tests.ipfs_folders import put_folder

LEAVES = Profile("test", 1, 16 * 1024, raw_leaves=True, width=8)
SIZE = 300_000


def put(store: LocalStore, folder: Path, seed: int, size: int = SIZE) -> tuple[Cid, bytes]:
    content = random.Random(seed).randbytes(size)
    file = folder / f"content-{seed}"
    file.write_bytes(content)
    with file.open("rb") as opened:
        return store.put_file(opened, LEAVES), content


def fetcher(cache: CiphertextCache, gateway: FaultGateway | ContentStore) -> Fetcher:
    return Fetcher([GatewayStorage(gateway.url)], cache, max_model_bytes=10_000_000)


_CHILD = """
import asyncio, hashlib, random, sys
from pathlib import Path
from divault.ipfs.cid import parse_cid
from divault.ipfs.verifier import Limits
from divault.storage.cache import CiphertextCache, OnDisk
from divault.storage.fetcher import Fetcher
from divault.storage.gateway import GatewayStorage
url, folder, bound, seed, *wanted = sys.argv[1:]

async def main():
    cache = CiphertextCache(Path(folder), int(bound))
    fetcher = Fetcher([GatewayStorage(url)], cache, max_model_bytes=10_000_000)
    chance = random.Random(int(seed))
    for _ in range(25):
        cid, sha256 = chance.choice(wanted).split("=")
        blob = await fetcher.fetch(parse_cid(cid))
        await asyncio.sleep(chance.random() * 0.02)  # others evict meanwhile, but not this one
        if hashlib.sha256(blob.path.read_bytes()).hexdigest() != sha256:
            sys.exit("wrong bytes")
        del blob

asyncio.run(main())
"""


async def test_processes_share_a_small_cache_without_wrong_bytes_or_more_than_its_bound(tmp_path: Path) -> None:
    store, folder, bound = LocalStore(tmp_path / "store"), tmp_path / "cache", 1_700_000
    contents = [put(store, tmp_path, seed) for seed in range(8)]
    wanted = [f"{cid}={hashlib.sha256(content).hexdigest()}" for cid, content in contents]
    cache = CiphertextCache(folder, bound)
    async with ContentStore(tmp_path / "store") as server:
        children = [
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _CHILD, server.url, str(folder), str(bound), str(seed), *wanted),
                stderr=asyncio.subprocess.PIPE,
            )
            for seed in range(4)
        ]
        most, ended = 0, asyncio.gather(*(child.communicate() for child in children))
        while not ended.done():
            most = max(most, cache.usage().bytes)
            inventory(cache)  # looking on disturbs nobody
            await asyncio.sleep(0.02)
        told = await ended

    assert [child.returncode for child in children] == [0, 0, 0, 0], [error.decode()[-400:] for _, error in told]
    assert cache.usage().bytes <= bound
    assert SIZE < most <= bound + SIZE  # a rename may be counted under both names
    assert all(right for _, right in verify(cache))


async def test_a_damaged_entry_is_found_when_read_and_fetched_anew(tmp_path: Path) -> None:
    store, cache = LocalStore(tmp_path / "store"), CiphertextCache(tmp_path / "cache", 10_000_000)
    cid, content = put(store, tmp_path, 1)
    async with FaultGateway(store) as gateway:
        source = fetcher(cache, gateway)
        path = (await source.fetch(cid)).path
        for place, spoiled in ((0, b"x"), (SIZE - 1, b"?"), (150_000, bytes(40_000))):
            with path.open("r+b") as file:
                file.seek(place)
                file.write(spoiled)
            asked = len(gateway.asks)
            assert (await source.fetch(cid)).path.read_bytes() == content
            assert len(gateway.asks) > asked
        asked = len(gateway.asks)
        assert (await source.fetch(cid)).path.read_bytes() == content
        assert len(gateway.asks) == asked


async def test_a_damaged_entry_keeps_its_descriptor_while_somebody_may_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its number is soon another file's, and that one would be read for a model."""
    monkeypatch.setattr(divault.storage.cache, "_TELL_BYTES", 50_000)
    store, cache = LocalStore(tmp_path / "store"), CiphertextCache(tmp_path / "cache", 10_000_000)
    cid, _ = put(store, tmp_path, 1)
    async with FaultGateway(store) as gateway:
        path = (await fetcher(cache, gateway).fetch(cid)).path
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    told: list[OnDisk] = []
    inode = path.stat().st_ino

    assert cache.open(cid, Limits(), told.append) is None
    descriptor = told[0].fd
    assert os.fstat(descriptor).st_ino == inode
    told.clear()
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.parametrize("lost", ["content", "nodes", "all nodes"])
async def test_what_a_crash_of_the_machine_leaves_under_the_final_name_is_fetched_anew(
    tmp_path: Path, lost: str
) -> None:
    """Nothing is synced: after a power cut a renamed file may be short, hold zeros, or lack its nodes."""
    store, cache = LocalStore(tmp_path / "store"), CiphertextCache(tmp_path / "cache", 10_000_000)
    cid, content = put(store, tmp_path, 2)
    async with FaultGateway(store) as gateway:
        source = fetcher(cache, gateway)
        path = (await source.fetch(cid)).path
        nodes = path.with_name(path.name + ".nodes")
        if lost == "content":
            os.truncate(path, 0)
            os.truncate(path, SIZE)
        elif lost == "nodes":
            os.truncate(nodes, nodes.stat().st_size // 2)
        else:
            nodes.unlink()
        asked = len(gateway.asks)
        assert (await source.fetch(cid)).path.read_bytes() == content
        assert len(gateway.asks) > asked


_LIMITED = """
import asyncio, resource, signal, sys
from pathlib import Path
from divault.errors import StorageFailed
from divault.ipfs.cid import parse_cid
from divault.ipfs.verifier import Limits
from divault.storage.cache import CiphertextCache, OnDisk
from divault.storage.fetcher import Fetcher
from divault.storage.gateway import GatewayStorage
url, folder, large, small = sys.argv[1:]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

async def main():
    fetcher = Fetcher([GatewayStorage(url)], CiphertextCache(Path(folder), 10_000_000), max_model_bytes=10_000_000)
    try:
        await fetcher.fetch(parse_cid(large))
    except StorageFailed as err:
        print(err.data["reason"], err.data["cid"])
    print(sorted(path.name[:2] for path in Path(folder).iterdir()))
    print((await fetcher.fetch(parse_cid(small))).size)

asyncio.run(main())
"""


async def test_a_full_disk_fails_that_load_alone_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    (large, _), (small, _) = put(store, tmp_path, 3), put(store, tmp_path, 4, 100_000)
    async with FaultGateway(store) as gateway:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _LIMITED, gateway.url, str(tmp_path / "cache"), str(large), str(small)),
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await child.communicate()

    failed, left, fetched = out.decode().splitlines()
    assert failed == f"disk {large}"
    assert left == "[]"
    assert fetched == "100000"


async def test_a_model_larger_than_the_cache_says_so(tmp_path: Path) -> None:
    store, cache = LocalStore(tmp_path / "store"), CiphertextCache(tmp_path / "cache", SIZE - 1)
    cid, _ = put(store, tmp_path, 5)
    async with FaultGateway(store) as gateway:
        with pytest.raises(StorageFailed) as caught:
            await fetcher(cache, gateway).fetch(cid)

    assert caught.value.data["reason"] == "cache_full"
    assert cache.usage().bytes == 0


async def test_the_least_recently_used_goes_first_and_what_is_in_use_stays(tmp_path: Path) -> None:
    store, cache = LocalStore(tmp_path / "store"), CiphertextCache(tmp_path / "cache", 3 * SIZE + 20_000)
    cids = [put(store, tmp_path, seed)[0] for seed in range(10, 15)]
    async with FaultGateway(store) as gateway:
        source = fetcher(cache, gateway)
        held = await source.fetch(cids[0])
        for number, cid in enumerate(cids[1:3]):
            await source.fetch(cid)
            _aged(cache, cid, 100 - number)
        _aged(cache, cids[0], 1000)
        await source.fetch(cids[3])
        assert {listed.cid for listed in inventory(cache)} == {cids[i].text for i in (0, 2, 3)}
        assert [listed.cid for listed in inventory(cache) if listed.in_use] == [cids[0].text]
        freed = cache.clear()
        assert (freed.entries, freed.in_use) == (2, 1)
        assert held.path.exists()
        del held
        assert cache.clear().entries == 1


def _aged(cache: CiphertextCache, cid: Cid, seconds: float) -> None:
    """As if it had been used so long ago."""
    (content,) = [content for content in cache.contents() if content.cid is not None and content.cid.text == cid.text]
    os.utime(content.path, (time.time() - seconds,) * 2)


# --- the command --------------------------------------------------------------------------------------------------


async def cache_command(folder: Path, *arguments: str) -> tuple[int, str, str]:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "divault", "cache", *arguments),
        env={"PATH": os.defpath, "MODEL_CACHE_DIR": str(folder), "COLUMNS": "200"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await child.communicate()
    return child.returncode or 0, out.decode(), err.decode()


async def test_the_command_lists_verifies_and_clears_beside_a_reader(tmp_path: Path) -> None:
    store, folder = LocalStore(tmp_path / "store"), tmp_path / "cache"
    cache = CiphertextCache(folder, 20_000_000_000)
    (used, _), (spoiled, _) = put(store, tmp_path, 20), put(store, tmp_path, 21)
    tree = put_folder(store, {"a": b"1", "b": b"2"})
    async with FaultGateway(store) as gateway:
        source = fetcher(cache, gateway)
        held = await source.fetch(used)
        path = (await source.fetch(spoiled)).path
        async with source.arriving(tree):
            pass

    status, listed, told = await cache_command(folder, "ls")
    assert (status, used.text in listed, spoiled.text in listed, tree.text in listed) == (0, True, True, True)
    assert next(line for line in listed.splitlines() if line.rstrip().endswith("yes")).split()[1] == used.text
    assert told.startswith("3 entries, ")

    status, checked, _ = await cache_command(folder, "verify")
    assert (status, checked.count("ok "), checked.count("DAMAGED")) == (0, 3, 0)

    with path.open("r+b") as file:
        file.seek(SIZE // 2)
        file.write(b"spoiled")
    status, checked, told = await cache_command(folder, "verify")
    assert (status, checked.count("ok "), checked.count("DAMAGED")) == (1, 2, 1)
    assert f"DAMAGED  {spoiled.text}" in checked
    assert "cache_damaged" in told
    assert not path.exists()

    status, cleared, _ = await cache_command(folder, "clear")
    assert (status, cleared.startswith("1 entries and "), "1 in use kept" in cleared) == (0, True, True)
    assert held.path.exists()


async def test_the_command_says_what_is_wrong_with_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")

    status, _, told = await cache_command(tmp_path / "file", "ls")

    assert status == 1
    assert "MODEL_CACHE_DIR" in told
