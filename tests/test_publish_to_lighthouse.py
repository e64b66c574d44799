"""Uploads whose CID nobody tells us, to services that answer in every shape, and some that lie."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from divault.devnet.content import ContentStore
from divault.errors import HashMismatch, SettingsInvalid, StorageFailed
from divault.ipfs.cid import multihash, parse_cid
from divault.ipfs.importer import PROFILES, UNIXFS_V0_2015, UNIXFS_V1_2025, V1_1M_174, V1_256K_174, Importer, Profile
from divault.settings import Settings
from divault.storage import upload as uploading
from divault.storage._api import MAX_ANSWER_BYTES, Reply
from divault.storage.lighthouse import Lighthouse
from divault.storage.local import CarImport, LocalStore
from divault.storage.upload import root_of
from divault.values import Secret

Answer = Callable[[str, str, int], web.Response]


def as_object(root: str, name: str, size: int) -> web.Response:
    return web.json_response({"Name": name, "Hash": root, "Size": str(size)})


def as_list(root: str, name: str, size: int) -> web.Response:
    return web.json_response([{"Name": name, "Hash": root, "Size": str(size)}])


def as_lines(root: str, name: str, size: int) -> web.Response:
    other = parse_cid("bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy")
    lines = ["storing", json.dumps({"Name": "first", "Hash": str(other)}), json.dumps({"Name": name, "Hash": root})]
    return web.Response(text="\n".join(lines) + "\n")


def as_kubo(root: str, name: str, size: int) -> web.Response:
    return web.Response(text=json.dumps({"Root": {"Cid": {"/": root}, "PinErrorMsg": ""}}) + "\n")


async def whole(part: Any) -> bytes:
    """In large chunks: with small ones aiohttp warns about itself when a read comes up short."""
    data = bytearray()
    while chunk := await part.read_chunk(1 << 20):
        data += chunk
    return bytes(data)


class UploadHost:
    """An upload and API host over a local store; a fault answers instead."""

    def __init__(self, store: LocalStore) -> None:
        self.store = store
        self.takes_car = False
        self.profile: Profile = V1_256K_174
        self.answer: Answer = as_object
        self.fault: Callable[[web.Request], Awaitable[web.StreamResponse | None]] | None = None
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.info: Any = None
        self.url = ""

    async def __aenter__(self) -> UploadHost:
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/api/v0/add", self._add)
        app.router.add_post("/api/v0/dag/import", self._import)
        app.router.add_get("/api/lighthouse/file_info", self._info)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = "http://{}:{}".format(*self._runner.addresses[0][:2])
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _add(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.path_qs, dict(request.headers)))
        if self.fault is not None and (answer := await self.fault(request)) is not None:
            return answer
        part = await (await request.multipart()).next()
        data = await whole(part)
        importer = self.store.importer(self.profile)
        importer.update(data)
        return self.answer(str(importer.finish()[self.profile]), part.filename, len(data))

    async def _import(self, request: web.Request) -> web.StreamResponse:
        if not self.takes_car:
            raise web.HTTPNotFound
        self.asked.append((request.path_qs, dict(request.headers)))
        if self.fault is not None and (answer := await self.fault(request)) is not None:
            return answer
        part = await (await request.multipart()).next()
        assert part.filename.endswith(".car")
        incoming = CarImport(self.store)
        incoming.update(await whole(part))
        return self.answer(str(incoming.finish()), part.filename, 1)

    async def _info(self, request: web.Request) -> web.StreamResponse:
        if self.info is None:
            return web.json_response({"error": "Not Found"}, status=400)
        return self.info if isinstance(self.info, web.Response) else web.json_response(self.info)


@pytest_asyncio.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[ContentStore]:
    async with ContentStore(tmp_path / "blocks") as store:
        yield store


@pytest_asyncio.fixture
async def host(gateway: ContentStore) -> AsyncIterator[UploadHost]:
    async with UploadHost(gateway.blocks) as server:
        yield server


@pytest_asyncio.fixture
async def lighthouse(host: UploadHost, gateway: ContentStore) -> AsyncIterator[Lighthouse]:
    client = Lighthouse(Secret(b"apikey"), upload_url=host.url, api_url=host.url, gateway_urls=[gateway.url])
    yield client
    await client.close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(uploading, "_APPEARS_S", (0.01, 0.01))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A chunk of 1 MiB and a rest, so that profiles of other chunks cut it another way."""
    path = tmp_path / "model.enc"
    path.write_bytes(os.urandom(1024 * 1024 + 17))
    return path


# --- what works ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [as_object, as_list, as_lines], ids=lambda a: a.__name__)
@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
async def test_plain_upload_is_recognised_whatever_way_it_was_cut(lighthouse, host, model, profile, answer):
    host.profile, host.answer = profile, answer

    stored = await lighthouse.upload(model, encrypted=True)

    importer = Importer([profile])
    importer.update(model.read_bytes())
    assert stored.cid == importer.finish()[profile]
    # Up to 174 MiB the two profiles of 1 MiB give one root.
    assert stored.profile == (UNIXFS_V1_2025 if profile is V1_1M_174 else profile).name
    assert stored.size == model.stat().st_size
    path, headers = host.asked[0]
    assert path == "/api/v0/add?wrap-with-directory=false&cid-version=1"
    assert (headers["Authorization"], headers["Encryption"]) == ("Bearer apikey", "true")
    assert "Content-Length" not in headers


@pytest.mark.parametrize("answer", [as_kubo, as_object], ids=lambda a: a.__name__)
async def test_car_goes_up_where_it_is_taken_and_fixes_the_root(lighthouse, host, model, answer):
    host.takes_car, host.answer = True, answer
    seen: list[tuple[int, int]] = []

    stored = await lighthouse.upload(model, progress=lambda done, total: seen.append((done, total)))

    assert stored.profile == "unixfs-v1-2025"
    assert [path for path, _ in host.asked] == ["/api/v0/dag/import"]
    assert seen[-1] == (stored.size, stored.size)
    assert seen == sorted(seen)


@pytest.mark.parametrize("size", [0, 1, 262144, 262145, 1048576])
async def test_small_files_at_the_edges_of_chunks(lighthouse, host, tmp_path, size):
    path = tmp_path / "small"
    path.write_bytes(b"\x07" * size)

    assert (await lighthouse.upload(path)).size == size


async def test_service_that_is_busy_is_asked_again(lighthouse, host, model):
    calls = []

    async def busy_once(request: web.Request) -> web.Response | None:
        calls.append(1)
        return web.Response(status=429, headers={"Retry-After": "0"}) if len(calls) == 1 else None

    host.fault = busy_once

    assert (await lighthouse.upload(model)).size == model.stat().st_size
    assert len(calls) == 2


async def test_content_that_appears_late_is_waited_for(lighthouse, host, model, gateway, monkeypatch):
    asked = []
    real = uploading._sample

    async def late(*arguments):
        asked.append(1)
        if len(asked) == 1:
            raise StorageFailed("not yet", reason="not_found")
        await real(*arguments)

    monkeypatch.setattr(uploading, "_sample", late)

    assert (await lighthouse.upload(model)).size == model.stat().st_size
    assert len(asked) == 2


async def test_gateway_of_plain_files_gives_a_sample_too(host, model):
    data = model.read_bytes()
    served = data

    async def plain(request: web.Request) -> web.Response:
        return web.Response(body=served)

    app = web.Application()
    app.router.add_get("/ipfs/{cid}", plain)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = "http://{}:{}".format(*runner.addresses[0][:2])
    lighthouse = Lighthouse(None, upload_url=host.url, api_url=host.url, gateway_urls=[url])

    assert (await lighthouse.upload(model)).profile == "v1-256k-174"
    served = bytes(len(data))
    with pytest.raises(HashMismatch, match="nothing is published"):
        await lighthouse.upload(model)
    await lighthouse.close()
    await runner.cleanup()


# --- what must not work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("takes_car", [False, True])
async def test_other_cid_than_ours_is_refused(lighthouse, host, model, takes_car):
    host.takes_car = takes_car
    host.answer = lambda root, name, size: as_object(
        "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy", name, size
    )

    with pytest.raises(StorageFailed, match="nothing is published") as caught:
        await lighthouse.upload(model)

    assert caught.value.data["reason"] == "cid_mismatch"
    assert caught.value.data["gateway"] == host.url.removeprefix("http://")
    assert caught.value.data["cid"] in str(caught.value)


async def test_altered_upload_is_refused(lighthouse, host, model):
    """The service stored something else and honestly says so."""
    real = host.store.importer

    def altering(profile: Profile) -> Importer:
        importer = real(profile)
        importer.update(b"x")
        return importer

    host.store.importer = altering  # type: ignore[method-assign]  # the fault under test

    with pytest.raises(StorageFailed, match="no name of it"):
        await lighthouse.upload(model)


async def test_gateway_without_the_file_fails_the_upload(host, model, tmp_path):
    async with ContentStore(tmp_path / "elsewhere") as empty:
        lighthouse = Lighthouse(None, upload_url=host.url, api_url=host.url, gateway_urls=[empty.url])
        with pytest.raises(StorageFailed) as caught:
            await lighthouse.upload(model)
        await lighthouse.close()

    assert caught.value.data["reason"] == "not_found"


async def test_second_gateway_is_asked_when_the_first_is_gone(host, model, gateway):
    lighthouse = Lighthouse(
        None, upload_url=host.url, api_url=host.url, gateway_urls=["http://127.0.0.1:9", gateway.url]
    )

    assert (await lighthouse.upload(model)).size == model.stat().st_size
    await lighthouse.close()


def text(body: str, status: int, **headers: str) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def fault(request: web.Request) -> web.Response:
        return web.Response(text=body, status=status, headers=headers, content_type="text/html")

    return fault


async def hang_up(request: web.Request) -> web.Response:
    await request.content.readany()
    request.transport.abort()
    return web.Response()


FAULTS = {
    "401": (text('{"error": "Authentication failed"}', 401), "http_401", "API key"),
    "402": (text("pay", 402), "http_402", "plan"),
    "403": (text("no", 403), "http_403", "API key"),
    "413": (text("", 413), "http_413", "size"),
    "429 for long": (text("", 429, **{"Retry-After": "99999"}), "busy", "try again"),
    "429 by date": (text("", 429, **{"Retry-After": "Fri, 31 Dec 2199 23:59:59 GMT"}), "busy", "try again"),
    "500 nested": (text('{"message": {"message": {"message": "disk full"}}}', 500), "http_500", "disk full"),
    "502 html": (text("<html><h1>Bad Gateway</h1></html>", 502), "http_502", "web page"),
    "200 html": (text("<html>hello</html>", 200), "not_json", "web page"),
    "200 empty": (text("", 200), "not_json", "JSON"),
    "200 null": (text("null", 200), "cid_mismatch", "no CID"),
    "200 no hash": (text("{}", 200), "cid_mismatch", "no CID"),
    "200 bad hash": (text('{"Hash": "Qm"}', 200), "cid_mismatch", "no CID"),
    "200 long": (text("x" * (MAX_ANSWER_BYTES + 1), 200), "too_large", "more than"),
    "redirect": (text("", 307, Location="http://127.0.0.1:9/"), "redirect", "redirect"),
    "hang up": (hang_up, "cut", "broke off"),
}


@pytest.mark.parametrize("takes_car", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
async def test_fault_of_the_service_is_a_typed_error_that_names_host_and_file(
    lighthouse, host, model, fault, takes_car
):
    host.fault, reason, words = FAULTS[fault]
    host.takes_car = takes_car

    with pytest.raises(StorageFailed, match=words) as caught:
        await lighthouse.upload(model)

    assert (reason, host.url.removeprefix("http://")) == (caught.value.data["reason"], caught.value.data["gateway"])
    assert caught.value.data["cid"] in str(caught.value)
    assert "<" not in str(caught.value)
    assert "apikey" not in str(caught.value) + repr(caught.value.data)


async def test_service_that_says_nothing_ends_by_the_clock(lighthouse, host, model, monkeypatch):
    async def silent(request: web.Request) -> None:
        await asyncio.sleep(600)

    host.fault = silent
    monkeypatch.setattr(uploading, "_TIMEOUT", aiohttp.ClientTimeout(total=None, sock_read=0.3))

    with pytest.raises(StorageFailed) as caught:
        await lighthouse.upload(model)

    assert caught.value.data["reason"] == "timeout"


async def test_host_that_is_not_there_is_a_typed_error(model):
    lighthouse = Lighthouse(None, upload_url="http://127.0.0.1:9", api_url="http://127.0.0.1:9")
    with pytest.raises(StorageFailed) as caught:
        await lighthouse.upload(model)
    await lighthouse.close()

    assert caught.value.data["reason"] == "unreachable"


async def test_file_that_is_not_there_is_a_typed_error(lighthouse, tmp_path):
    with pytest.raises(StorageFailed) as caught:
        await lighthouse.upload(tmp_path / "nothing")

    assert caught.value.data["reason"] == "file"


@pytest.mark.parametrize("key", [b"a b", b"a\n", "ä".encode(), b""])
async def test_api_key_that_no_header_carries_is_refused(host, model, key):
    lighthouse = Lighthouse(Secret(key), upload_url=host.url, api_url=host.url)
    with pytest.raises(SettingsInvalid) as caught:
        await lighthouse.upload(model)
    await lighthouse.close()

    assert caught.value.data["setting"] == "LIGHTHOUSE_API_KEY"


def test_dedicated_gateways_come_first_and_none_twice():
    of = {"DIVAULT_LIGHTHOUSE_GATEWAY_URLS": "http://a,http://b", "DIVAULT_GATEWAY_URLS": "http://b,http://c"}

    assert Settings.load(of, env_file=None).gateway_urls == ("http://a", "http://b", "http://c")
    assert Settings.load({"DIVAULT_GATEWAY_URLS": "http://c"}, env_file=None).gateway_urls == ("http://c",)


# --- file info ----------------------------------------------------------------------------------------------------

ROOT = parse_cid("bafkreibwimyyrqiqhl7difiu3gl6a5znf2ml7tgrh3uekfsitvrqczkzr4")
INFO = {"fileSizeInBytes": "700045", "cid": ROOT.text, "encryption": True, "fileName": "m", "mimeType": "a/b"}


async def test_file_info_is_read(lighthouse, host):
    host.info = INFO

    info = await lighthouse.file_info(ROOT)

    assert (info.cid, info.size, info.encrypted, info.name) == (ROOT, 700045, True, "m")


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (None, "not_found"),
        ([], "malformed"),
        ({}, "malformed"),
        (INFO | {"fileSizeInBytes": "many"}, "malformed"),
        (INFO | {"fileSizeInBytes": "-1"}, "malformed"),
        (INFO | {"fileSizeInBytes": None}, "malformed"),
        (INFO | {"cid": "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"}, "malformed"),
        (INFO | {"cid": "Qm"}, "malformed"),
        (web.Response(text="<html>", status=200), "not_json"),
    ],
    ids=str,
)
async def test_odd_file_info_is_a_typed_error(lighthouse, host, told, reason):
    host.info = told

    with pytest.raises(StorageFailed) as caught:
        await lighthouse.file_info(ROOT)

    assert caught.value.data["reason"] == reason


# --- whatever comes -----------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.just(ROOT.text),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["Hash", "Root", "Cid", "/", "message", "error", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(JSON.map(json.dumps) | st.text(max_size=40), max_size=4).map("\n".join))
def test_any_answer_is_a_cid_or_a_typed_error(body):
    reply = Reply("host", 200, body)
    try:
        root = root_of(reply)
    except StorageFailed as err:
        told = err.data["gateway"]
        assert told == "host", "the only error, and it names the host"  # either outcome is fine
    else:
        assert multihash(root) == multihash(ROOT)


@settings(max_examples=200, deadline=None)
@given(JSON.map(json.dumps) | st.text(max_size=300))
def test_words_of_any_answer_are_short_and_printable(body):
    words = Reply("host", 500, body).words()

    assert len(words) <= 300
    assert words.isprintable()


def test_roots_of_all_profiles_come_from_one_pass_and_differ():
    importer = Importer(PROFILES)
    for _ in range(5):
        importer.update(os.urandom(300_000))
    roots = importer.finish()

    assert len({multihash(cid) for cid in roots.values()}) == 3
    assert roots[UNIXFS_V0_2015].version == 0
