"""Folders on IPFS as models: every name and block verified, every file sealed, or nothing is opened."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from divault.errors import (
    ContentInvalid,
    DivaultError,
    DuplicateName,
    StorageFailed,
    SymlinkRefused,
    TooLarge,
    UnsafeName,
    UnsupportedModel,
    WrongKey,
)
from divault.ipfs.cid import cid_bytes, make_cid
from divault.storage.arrival import FolderArrival
from divault.storage.cache import CiphertextCache
from divault.storage.fetcher import Fetcher
from divault.storage.gateway import GatewayStorage
from divault.storage.local import LocalStore
from divault.storage.source import Form
from divault.values import Cid, ModelId, OpenedModel
from divault.vault.keys import NodeIdentity
from divault.vault.sealed import seal_stream
from divault.workers.opening import Opener
from tests.fault_gateway import FaultGateway
from tests.ipfs_folders import DIRECTORY, SYMLINK, put_folder, put_node
from tests.sealed_models import ME, contents, grant, memory_files_at_hand, sealed, tar_of

NODE = [NodeIdentity(ME)]
WEIGHTS = random.Random(1).randbytes(3_000_000)
PLAIN = {"config.json": b'{"a": 1}', "model.safetensors": WEIGHTS, "tokenizer/vocab.txt": b"one\ntwo\n"}
SEALED = {
    "config.json.age": sealed(PLAIN["config.json"]),
    "model.safetensors": sealed(WEIGHTS),
    "tokenizer": {"vocab.txt.age": sealed(PLAIN["tokenizer/vocab.txt"])},
}


class Bench:
    def __init__(self, folder: Path) -> None:
        self.store = LocalStore(folder / "store")
        self.cache = CiphertextCache(folder / "cache", 50_000_000)

    def fetcher(self, *gateways: FaultGateway) -> Fetcher:
        return Fetcher([GatewayStorage(gateway.url) for gateway in gateways], self.cache, max_model_bytes=20_000_000)

    async def open(self, cid: Cid, opener: Opener, *gateways: FaultGateway) -> OpenedModel:
        async with self.fetcher(*gateways).arriving(cid) as arrival:
            return await opener.open(arrival, grant(), NODE)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
async def opener() -> AsyncIterator[Opener]:
    opener = Opener(max_model_bytes=10_000_000, timeout_s=30)
    yield opener
    opener.close()


@pytest.fixture(autouse=True)
def no_memory_file_is_left() -> None:
    yield
    assert memory_files_at_hand() == []


@pytest.mark.parametrize("shards", [False, True])
async def test_a_folder_of_sealed_files_is_a_model(bench: Bench, opener: Opener, shards: bool) -> None:
    cid = put_folder(bench.store, SEALED, shards=shards)
    async with FaultGateway(bench.store) as gateway:
        opened = await bench.open(cid, opener, gateway)

    assert opened.cid == cid
    assert opened.size == sum(map(len, PLAIN.values()))
    lines = [f"{hashlib.sha256(PLAIN[name]).hexdigest()} {len(PLAIN[name])} {name}\n" for name in sorted(PLAIN)]
    assert opened.plaintext_sha256.raw == hashlib.sha256("".join(lines).encode()).digest()
    assert contents(opened) == PLAIN


async def test_a_folder_is_opened_from_the_cache_when_no_gateway_answers(bench: Bench, opener: Opener) -> None:
    cid = put_folder(bench.store, SEALED, shards=True)
    async with FaultGateway(bench.store) as gateway:
        contents(await bench.open(cid, opener, gateway))

    assert contents(await bench.open(cid, opener, gateway)) == PLAIN


async def test_a_kept_list_that_was_altered_is_fetched_anew(bench: Bench, opener: Opener, tmp_path: Path) -> None:
    cid = put_folder(bench.store, SEALED)
    async with FaultGateway(bench.store) as gateway:
        contents(await bench.open(cid, opener, gateway))
        (kept,) = (tmp_path / "cache").glob("*.folder")
        kept.write_bytes(kept.read_bytes().replace(b"config.json", b"c0nfig.json"))
        asked = len(gateway.asks)

        assert contents(await bench.open(cid, opener, gateway)) == PLAIN

    assert len(gateway.asks) > asked


async def test_a_folder_with_one_sealed_tar_is_that_model(bench: Bench, opener: Opener) -> None:
    cid = put_folder(bench.store, {"model.tar.age": sealed(tar_of(sorted(PLAIN.items())))})
    async with FaultGateway(bench.store) as gateway:
        opened = await bench.open(cid, opener, gateway)

    assert opened.cid == cid
    assert contents(opened) == PLAIN


async def test_an_unsealed_file_ends_the_load_and_is_named(bench: Bench, opener: Opener) -> None:
    cid = put_folder(bench.store, SEALED | {"README.md": b"# not sealed, and longer than the shortest seal is"})
    async with FaultGateway(bench.store) as gateway:
        with pytest.raises(WrongKey) as caught:
            await bench.open(cid, opener, gateway)

    assert caught.value.data["file"] == "README.md"
    assert "README.md of the folder" in caught.value.detail


async def test_a_file_sealed_for_another_model_ends_the_load(bench: Bench, opener: Opener) -> None:
    other = io.BytesIO()
    seal_stream(io.BytesIO(b"x"), other, [ME.recipient], ModelId.parse("another"))
    cid = put_folder(bench.store, SEALED | {"extra": other.getvalue()})
    async with FaultGateway(bench.store) as gateway:
        with pytest.raises(UnsupportedModel) as caught:
            await bench.open(cid, opener, gateway)

    assert caught.value.data["seen"] == "a file sealed for another model"
    assert caught.value.data["file"] == "extra"


async def test_all_files_together_are_held_under_the_limit(bench: Bench, opener: Opener) -> None:
    part = sealed(bytes(4_000_000))
    cid = put_folder(bench.store, dict.fromkeys(("a", "b", "c"), part))
    async with FaultGateway(bench.store) as gateway:
        with pytest.raises(TooLarge) as caught:
            await bench.open(cid, opener, gateway)
        fits = put_folder(bench.store, dict.fromkeys(("a", "b"), part))
        opened = await bench.open(fits, opener, gateway)

    assert caught.value.data["have_bytes"] == 12_000_000
    assert set(contents(opened)) == {"a", "b"}


async def test_many_files_one_after_another_are_held_under_the_limit_as_well(bench: Bench, opener: Opener) -> None:
    part = sealed(bytes(1_000_000))
    async with FaultGateway(bench.store) as gateway:
        with pytest.raises(TooLarge):
            await bench.open(put_folder(bench.store, {f"{n:02}": part for n in range(11)}), opener, gateway)
        opened = await bench.open(put_folder(bench.store, {f"{n:02}": part for n in range(10)}), opener, gateway)

    assert len(contents(opened)) == 10


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({}, "empty"),
        ({"m": sealed(b"1"), "m.age": sealed(b"2")}, "one name"),
        ({"a": sealed(b"1"), "b": sealed(tar_of([("x", b"2")]))}, "tar beside other files"),
        ({f"file-{number}": b"x" for number in range(129)}, "129 files"),
    ],
)
async def test_a_folder_that_is_no_model_is_refused(
    bench: Bench, opener: Opener, tree: dict[str, bytes], words: str
) -> None:
    async with FaultGateway(bench.store) as gateway:
        with pytest.raises(UnsupportedModel, match=words):
            await bench.open(put_folder(bench.store, tree), opener, gateway)


@pytest.mark.parametrize(
    ("names", "error"),
    [
        ([b".."], UnsafeName),
        ([b"a/b"], UnsafeName),
        ([b""], UnsafeName),
        ([b"nul\0"], UnsafeName),
        ([b"Model", b"model"], DuplicateName),
        (["\u00e9".encode(), "e\u0301".encode()], DuplicateName),
    ],
)
async def test_unsafe_names_are_refused_before_any_file_is_fetched(
    bench: Bench, opener: Opener, names: list[bytes], error: type[ContentInvalid]
) -> None:
    leaf = cid_bytes(bench.store.put_file(io.BytesIO(sealed(b"x"))))
    cid = put_node(bench.store, [(leaf, name, 1) for name in names], DIRECTORY)
    async with FaultGateway(bench.store) as gateway:
        with pytest.raises(error) as caught:
            await bench.open(cid, opener, gateway)
        assert {ask.path for ask in gateway.asks} == {f"/ipfs/{cid}"}

    assert caught.value.data["cid"] == str(cid)


async def test_a_symbolic_link_is_refused(bench: Bench, opener: Opener) -> None:
    link = put_node(bench.store, [], SYMLINK)
    async with FaultGateway(bench.store) as gateway:
        with pytest.raises(SymlinkRefused):
            await bench.open(put_folder(bench.store, {"passwd": link}), opener, gateway)


async def test_a_missing_block_of_the_directory_names_cid_and_gateway(
    bench: Bench, opener: Opener, tmp_path: Path
) -> None:
    whole = put_folder(bench.store, SEALED)
    lacking = Bench(tmp_path / "lacking")
    for block in (tmp_path / "store" / "blocks").rglob("*"):
        if block.is_file() and b"vocab.txt.age" not in block.read_bytes():
            lacking.store.put_block(bytes.fromhex(block.name), block.read_bytes())
    async with FaultGateway(lacking.store) as partial, FaultGateway(bench.store) as good:
        with pytest.raises(StorageFailed) as caught:
            await lacking.open(whole, opener, partial)
        assert contents(await lacking.open(whole, opener, partial, good)) == PLAIN

    assert caught.value.data["gateway"] == partial.url.removeprefix("http://")


async def test_one_missing_file_ends_the_load(bench: Bench, opener: Opener) -> None:
    absent = make_cid(1, 0x55, 0x12, bytes(32))
    async with FaultGateway(bench.store) as gateway:
        with pytest.raises(StorageFailed) as caught:
            await bench.open(put_folder(bench.store, SEALED | {"z": absent}), opener, gateway)

    assert str(absent) in caught.value.detail


async def test_a_folder_is_not_a_file_for_those_who_want_one(bench: Bench) -> None:
    cid = put_folder(bench.store, SEALED)
    async with FaultGateway(bench.store) as gateway:
        fetcher = bench.fetcher(gateway)
        with pytest.raises(DivaultError, match="directory"):
            await fetcher.fetch(cid)
        async with fetcher.arriving(cid) as arrival:
            assert isinstance(arrival, FolderArrival)
            assert arrival.names == ("config.json.age", "model.safetensors", "tokenizer/vocab.txt.age")
        assert Form.CAR not in {ask.form for ask in gateway.asks}
