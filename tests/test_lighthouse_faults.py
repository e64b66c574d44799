"""Every fault of the Lighthouse double with what it does, and what divault makes of it."""

from __future__ import annotations

import asyncio
import io
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from divault.errors import AccessDenied, HashMismatch, StorageFailed
from divault.storage.cache import CiphertextCache
from divault.storage.fetcher import Fetcher
from divault.storage.gateway import GatewayStorage
from divault.storage.kavach import Kavach
from divault.storage.lighthouse import Lighthouse
from divault.storage.source import Form
from divault.testing import LighthouseDouble, faults
from divault.testing.faults import at, at_node, first
from divault.values import Cid
from divault.vault.kavach import KeyShard
from tests.lighthouse_wire import (
    DATA,
    OWNER,
    SHARDS,
    STRANGER,
    UNKNOWN,
    add,
    answer,
    recovered,
    saved,
)


@pytest_asyncio.fixture
async def double(tmp_path: Path) -> AsyncIterator[LighthouseDouble]:
    async with LighthouseDouble(tmp_path / "blocks") as hosts:
        yield hosts


@pytest_asyncio.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest_asyncio.fixture
async def kavach(double: LighthouseDouble) -> AsyncIterator[Kavach]:
    client = Kavach(double.encryption.url, timeout_s=2.0)
    yield client
    await client.close()


@pytest_asyncio.fixture
async def gateway(double: LighthouseDouble) -> AsyncIterator[GatewayStorage]:
    source = GatewayStorage(double.gateway.url, timeout_s=2.0)
    yield source
    source.close()


@pytest.fixture
def cid(double: LighthouseDouble) -> Cid:
    """Content that the gateway has."""
    return double.blocks.put_file(io.BytesIO(DATA))


# --- faults of any host --------------------------------------------------------------------------------------------


async def body_of(http: aiohttp.ClientSession, url: str) -> tuple[int, bytes, BaseException | None]:
    """Status, what came of the body, and how that ended."""
    async with http.get(url, allow_redirects=False) as reply:
        came = bytearray()
        try:
            async for piece in reply.content.iter_any():
                came += piece
        except aiohttp.ClientError as err:
            return reply.status, bytes(came), err
        return reply.status, bytes(came), None


async def test_connection_drops_in_the_middle_of_a_body(http, double, cid):
    double.gateway.faults.append(faults.cut_after(1000))
    async with http.get(f"{double.gateway.url}/ipfs/{cid}") as reply:
        assert reply.headers["Content-Length"] == str(len(DATA))
    status, came, error = await body_of(http, f"{double.gateway.url}/ipfs/{cid}")

    assert (status, came) == (200, DATA[:1000])
    assert isinstance(error, aiohttp.ClientPayloadError)


async def test_wrong_bytes_come_under_a_cid(http, double, cid):
    double.gateway.faults.append(faults.wrong_bytes(7, 2))

    status, came, error = await body_of(http, f"{double.gateway.url}/ipfs/{cid}")

    assert (status, error, len(came)) == (200, None, len(DATA))
    assert [i for i, (one, other) in enumerate(zip(came, DATA, strict=True)) if one != other] == [7, 8]


@pytest.mark.parametrize(("by", "cut"), [(-5, False), (5, True)])
async def test_content_length_is_off(http, double, cid, by, cut):
    double.gateway.faults.append(faults.wrong_length(by))

    status, came, error = await body_of(http, f"{double.gateway.url}/ipfs/{cid}")

    assert (status, came) == (200, DATA[: len(DATA) + min(by, 0)])
    assert isinstance(error, aiohttp.ClientPayloadError) == cut


async def test_content_appears_late(http, double, cid):
    double.gateway.faults.append(first(2, faults.missing()))
    url = f"{double.gateway.url}/ipfs/{cid}"

    assert [(await answer(http, "GET", url))[0] for _ in range(4)] == [404, 404, 200, 200]


@pytest.mark.parametrize("status", [200, 502])
async def test_web_page_comes_instead(http, double, cid, status):
    double.gateway.faults.append(faults.web_page(status))
    async with http.get(f"{double.gateway.url}/ipfs/{cid}") as reply:
        assert (reply.status, reply.content_type) == (status, "text/html")
        assert (await reply.text()).startswith("<!doctype html>")


async def test_host_is_silent_or_dead(http, double):
    double.api.faults.append(at("file_info", faults.silent()))
    double.api.faults.append(at("deal_status", faults.dead()))
    with pytest.raises(TimeoutError):
        await http.get(f"{double.api.url}/api/lighthouse/file_info", timeout=aiohttp.ClientTimeout(total=0.3))
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await http.get(f"{double.api.url}/api/lighthouse/deal_status")

    assert (await answer(http, "GET", f"{double.api.url}/api/user/user_data_usage"))[0] == 401, "others still answer"


async def test_silent_host_can_be_stopped(tmp_path, http):
    async with LighthouseDouble(tmp_path) as double:
        double.api.faults.append(faults.silent())
        waiting = asyncio.create_task(answer(http, "GET", double.api.url))
        while not double.api.asked:
            await asyncio.sleep(0.01)
    with pytest.raises(aiohttp.ClientError):
        await waiting


async def test_redirect_goes_where_it_says(http, double, cid):
    double.gateway.faults.append(faults.redirect(double.upload.url + "{path}", 308))
    async with http.get(f"{double.gateway.url}/ipfs/{cid}", allow_redirects=False) as reply:
        assert reply.status == 308
        assert reply.headers["Location"] == f"{double.upload.url}/ipfs/{cid}"


async def test_body_drips(http, double, cid):
    double.gateway.faults.append(faults.drip(len(DATA) // 4, 0.05))
    start = asyncio.get_running_loop().time()

    status, came, error = await body_of(http, f"{double.gateway.url}/ipfs/{cid}")

    assert (status, came, error) == (200, DATA, None)
    assert asyncio.get_running_loop().time() - start >= 0.2


async def test_range_is_ignored(http, double, cid):
    double.gateway.faults.append(first(1, faults.no_range()))
    url, part = f"{double.gateway.url}/ipfs/{cid}", {"Range": "bytes=0-9"}

    assert await answer(http, "GET", url, headers=part) == (200, DATA)
    assert await answer(http, "GET", url, headers=part) == (206, DATA[:10])


async def test_host_asks_for_patience(http, double):
    double.upload.faults.append(first(1, faults.busy("7")))
    async with http.post(f"{double.upload.url}/api/v0/add") as reply:
        assert (reply.status, reply.headers["Retry-After"]) == (429, "7")
    assert (await add(http, double, ("m", b"m")))[0] == 200


async def test_first_counts_only_what_the_fault_concerns_and_all_requests_are_noted(http, double, cid):
    double.gateway.faults.append(first(1, at("format=raw", faults.missing())))
    url = f"{double.gateway.url}/ipfs/{cid}"

    statuses = [(await answer(http, "GET", url + query))[0] for query in ("", "?format=raw", "?format=raw")]
    assert statuses == [200, 404, 200]
    assert [asked.path for asked in double.gateway.asked] == [
        f"/ipfs/{cid}{q}" for q in ("", "?format=raw", "?format=raw")
    ]


# --- what divault makes of them ------------------------------------------------------------------------------------


async def through(source: GatewayStorage, cid: Cid, folder: Path) -> bytes:
    cache = CiphertextCache(folder / secrets.token_hex(4), 10_000_000)
    blob = await Fetcher([source], cache, max_model_bytes=10_000_000).fetch(cid)
    return blob.path.read_bytes()


async def test_fetch_survives_one_fault_and_refuses_wrong_bytes(double, gateway, cid, tmp_path):
    assert await through(gateway, cid, tmp_path) == DATA
    double.gateway.faults.append(faults.wrong_bytes(500))
    with pytest.raises(StorageFailed, match=str(cid)):
        await through(gateway, cid, tmp_path)
    double.gateway.faults[:] = [faults.web_page()]
    with pytest.raises(StorageFailed):
        await through(gateway, cid, tmp_path)
    double.gateway.faults.clear()

    assert await through(gateway, cid, tmp_path) == DATA


async def test_gateway_that_redirects_to_this_machine_is_not_followed(double, gateway, cid):
    double.gateway.faults.append(faults.redirect(double.upload.url + "{path}"))
    with pytest.raises(StorageFailed) as caught:
        [piece async for piece in gateway.read(cid, (), Form.BLOCK)]

    assert caught.value.data["reason"] == "redirect"


async def test_upload_whose_sample_is_wrong_publishes_nothing(double, tmp_path):
    path = tmp_path / "model"
    path.write_bytes(DATA)
    client = Lighthouse(
        double.api_key,
        upload_url=double.upload.url,
        api_url=double.api.url,
        gateway_urls=[double.gateway.url],
    )
    double.gateway.faults.append(faults.wrong_bytes())
    with pytest.raises(HashMismatch):
        await client.upload(path)
    double.gateway.faults.clear()
    stored = await client.upload(path, encrypted=True)

    assert (await client.file_info(stored.cid)).encrypted
    await client.close()


@pytest.mark.parametrize(
    "fault",
    [
        faults.silent, faults.dead, faults.null_payload, faults.web_page, lambda: faults.web_page(502), faults.missing,
        lambda: faults.cut_after(10), lambda: faults.redirect("http://127.0.0.1:9{path}"),
        lambda: faults.answering([]), lambda: faults.answering("text"),
    ],
    ids=["silent", "dead", "null", "html 200", "html 502", "404", "cut", "redirect", "list", "text"],
)  # fmt: skip
async def test_key_comes_with_two_broken_nodes_and_not_with_three(double, fault):
    kavach = Kavach(double.encryption.url, timeout_s=0.5)
    _, key = await saved(kavach)
    double.encryption.faults += [at_node(2, fault()), at_node(4, fault())]
    assert await recovered(kavach, OWNER) == key
    double.encryption.faults.append(at_node(5, fault()))

    with pytest.raises(StorageFailed, match=UNKNOWN):
        await recovered(kavach, OWNER)
    await kavach.close()


async def test_shards_are_corrupt_or_of_another_file(double, kavach):
    cid, _ = await saved(kavach)
    alien = KeyShard(**SHARDS[0])
    double.encryption.faults += [at_node(1, faults.corrupt_shard()), at_node(2, faults.other_shard(alien))]
    true = [double.keys.shard(number, cid) for number in range(1, 6)]
    async with kavach.as_wallet(OWNER) as who:
        came = {shard async for shard in kavach.shards(who, cid)}

    assert came & set(true) == set(true[2:])
    (corrupt,) = came - set(true) - {alien}
    assert (corrupt.index, corrupt.key[:-1]) == (true[0].index, true[0].key[:-1])
    assert alien in came


async def test_corrupt_shard_is_no_way_past_a_refusal(double, kavach):
    await saved(kavach)
    double.encryption.faults += [at_node(number, faults.corrupt_shard()) for number in range(1, 6)]

    with pytest.raises(AccessDenied):
        await recovered(kavach, STRANGER)
