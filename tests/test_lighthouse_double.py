"""The Lighthouse double's upload host, API host and gateway: every route with its nearest refusal."""

from __future__ import annotations

import asyncio
import io
import itertools
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from divault.devnet.content import ContentStore
from divault.ipfs.cid import make_cid, multihash, parse_cid
from divault.ipfs.dagpb import decode_node
from divault.ipfs.importer import UNIXFS_V0_2015, V1_256K_174, Importer, Profile
from divault.messages import address_of, personal_digest, signature_text
from divault.settings import Settings
from divault.storage.lighthouse import Lighthouse
from divault.testing import LighthouseDouble
from divault.values import Cid
from tests.lighthouse_wire import (
    DATA,
    OWNER,
    STRANGER,
    UNKNOWN,
    add,
    answer,
    form,
)


@pytest_asyncio.fixture
async def double(tmp_path: Path) -> AsyncIterator[LighthouseDouble]:
    async with LighthouseDouble(tmp_path / "blocks") as hosts:
        yield hosts


@pytest_asyncio.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
def cid(double: LighthouseDouble) -> Cid:
    """Content that the gateway has."""
    return double.blocks.put_file(io.BytesIO(DATA))


def root(profile: Profile, data: bytes = DATA) -> str:
    importer = Importer([profile])
    importer.update(data)
    return str(importer.finish()[profile])


# --- upload host ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("query", "profile"), [("?cid-version=1", V1_256K_174), ("?cid-version=0", UNIXFS_V0_2015)])
async def test_file_gets_its_true_cid_and_is_served(http, double, query, profile):
    status, told = await add(http, double, ("m.bin", DATA), query=query)

    assert (status, told) == (200, {"Name": "m.bin", "Hash": root(profile), "Size": str(len(DATA))})
    assert await answer(http, "GET", f"{double.gateway.url}/ipfs/{told['Hash']}") == (200, DATA)


async def test_sealed_file_is_answered_as_a_list_and_so_are_several(http, double):
    one = await add(http, double, ("m", DATA), Encryption="true")
    two = await add(http, double, ("a", b"a"), ("b", b"b"), Encryption="true")

    assert one == (200, [{"Name": "m", "Hash": root(V1_256K_174), "Size": str(len(DATA))}])
    assert [item["Hash"] for item in two[1]] == [root(V1_256K_174, b"a"), root(V1_256K_174, b"b")]


@pytest.mark.parametrize(
    ("files", "query", "name", "names"),
    [
        ((("a", b"a"), ("b", b"b")), "", None, [b"a", b"b"]),
        ((("box/a", b"a"), ("box/in/b", b"b")), "", "box", [b"a", b"in"]),
        ((("a", b"a"),), "?wrap-with-directory=true", None, [b"a"]),
    ],
    ids=["flat", "nested", "wrapped"],
)
async def test_several_files_are_a_directory(http, double, files, query, name, names):
    _, told = await add(http, double, *files, query=query)

    node = decode_node(double.blocks.get(multihash(parse_cid(told["Hash"]))))
    assert [link.name for link in node.links] == names
    assert double.blocks.get(node.links[0].cid.multihash) == b"a"
    assert told["Name"] == (name or told["Hash"])
    assert make_cid(*node.links[0].cid[:4]) == parse_cid(root(V1_256K_174, b"a"))


async def test_car_goes_in_under_its_root(http, double, tmp_path):
    async with ContentStore(tmp_path / "elsewhere") as store:
        there = store.blocks.put_file(io.BytesIO(DATA))
        _, car = await answer(http, "GET", f"{store.url}/ipfs/{there}?format=car")
    route = f"{double.upload.url}/api/v0/dag/import"
    key = {"Authorization": f"Bearer {double.api_key.reveal().decode()}"}

    good = await answer(http, "POST", route, data=form(("m.car", car)), headers=key)
    cut = await answer(http, "POST", route, data=form(("m.car", car[:-1])), headers=key)

    assert (good[0], good[1]["Root"]["Cid"]["/"]) == (200, str(there))
    assert await answer(http, "GET", f"{double.gateway.url}/ipfs/{there}") == (200, DATA)
    assert cut[0] == 400


@pytest.mark.parametrize("route", ["add", "dag/import"])
@pytest.mark.parametrize("key", [{}, {"Authorization": "Bearer bad"}, {"Authorization": "bad"}], ids=str)
async def test_upload_needs_a_key_of_an_account(http, double, route, key):
    told = await answer(http, "POST", f"{double.upload.url}/api/v0/{route}", data=form(("m", b"m")), headers=key)

    assert told == (401, {"error": "Authentication failed"})


@pytest.mark.parametrize("body", [b"{}", form(("m", b"m"), name="other")], ids=["no form", "no file"])
async def test_upload_without_a_file_is_a_bad_request(http, double, body):
    key = {"Authorization": f"Bearer {double.api_key.reveal().decode()}"}
    status, told = await answer(http, "POST", f"{double.upload.url}/api/v0/add", data=body, headers=key)

    assert status == 400
    assert set(told) == {"error"}


# --- API host ------------------------------------------------------------------------------------------------------


async def api_key(http, double, key=OWNER, signer=OWNER, *, as_form=False) -> tuple[int, Any]:
    address = str(address_of(key))
    _, text = await answer(http, "GET", f"{double.api.url}/api/auth/get_auth_message?publicKey={address}")
    body = {"publicKey": address, "signedMessage": signature_text(signer, personal_digest(text))}
    how = {"data": body} if as_form else {"json": body}
    return await answer(http, "POST", f"{double.api.url}/api/auth/create_api_key", **how)


@pytest.mark.parametrize("as_form", [False, True])
async def test_account_has_a_key_for_a_signature_and_sees_its_own_files(http, double, as_form):
    status, key = await api_key(http, double, as_form=as_form)
    mine = {"Authorization": f"Bearer {key}"}
    await add(http, double, ("mine", DATA), **mine)
    await add(http, double, ("somebody's", b"x"))

    _, usage = await answer(http, "GET", f"{double.api.url}/api/user/user_data_usage", headers=mine)
    _, files = await answer(http, "GET", f"{double.api.url}/api/user/files_uploaded?lastKey=null", headers=mine)
    assert status == 200
    assert usage["dataUsed"] == len(DATA)
    assert [(file["fileName"], file["cid"]) for file in files["fileList"]] == [("mine", root(V1_256K_174))]
    assert files["fileList"][0]["publicKey"] == str(address_of(OWNER)).lower()


async def test_no_key_without_the_addresss_own_signature(http, double):
    assert await api_key(http, double, OWNER, STRANGER) == (401, {"error": "Invalid signature"})
    nobody = {"publicKey": "0x1", "signedMessage": "0x"}
    assert (await answer(http, "POST", f"{double.api.url}/api/auth/create_api_key", json=nobody))[0] == 400


@pytest.mark.parametrize("route", ["user_data_usage", "files_uploaded"])
async def test_account_is_shown_to_its_key_alone(http, double, route):
    assert (await answer(http, "GET", f"{double.api.url}/api/user/{route}"))[0] == 401


async def test_facts_of_a_file_that_is_there_and_of_one_that_is_not(http, double):
    await add(http, double, ("m.bin", DATA), Encryption="true")
    url, stored = double.api.url, root(V1_256K_174)

    status, info = await answer(http, "GET", f"{url}/api/lighthouse/file_info?cid={stored}")
    assert (status, info["fileSizeInBytes"], info["encryption"]) == (200, str(len(DATA)), True)
    assert await answer(http, "GET", f"{url}/api/lighthouse/deal_status?cid={stored}") == (200, [])
    for route, asked in itertools.product(("file_info", "deal_status"), (UNKNOWN, "Qm", "")):
        assert (await answer(http, "GET", f"{url}/api/lighthouse/{route}?cid={asked}"))[0] == 400


# --- gateway -------------------------------------------------------------------------------------------------------


async def test_gateway_serves_file_range_block_and_car(http, double, cid):
    url = f"{double.gateway.url}/ipfs/{cid}"

    assert await answer(http, "GET", url) == (200, DATA)
    assert await answer(http, "POST", f"{double.gateway.url}/api/v0/cat/{cid}") == (200, DATA)
    assert await answer(http, "GET", url, headers={"Range": "bytes=5-9"}) == (206, DATA[5:10])
    assert await answer(http, "GET", f"{url}?format=raw") == (200, double.blocks.get(multihash(cid)))
    assert (await answer(http, "GET", f"{url}?format=car"))[1].count(DATA[:1000]) >= 1


@pytest.mark.parametrize(("method", "path"), [("GET", "/ipfs/"), ("POST", "/api/v0/cat/")])
async def test_gateway_has_no_content_that_is_not_there(http, double, method, path):
    assert (await answer(http, method, f"{double.gateway.url}{path}{UNKNOWN}"))[0] == 404
    assert (await answer(http, method, f"{double.gateway.url}{path}Qm"))[0] == 400
    assert (await answer(http, "POST", f"{double.gateway.url}/api/v0/add"))[0] == 404, "uploads have another host"


def test_settings_of_the_double_are_settings_of_a_node(tmp_path):
    async def read() -> tuple[Settings, LighthouseDouble]:
        async with LighthouseDouble(tmp_path) as double:
            return Settings.load(double.settings(), env_file=None), double

    settings, double = asyncio.run(read())

    assert all(url.startswith("http://127.0.0.1:") for url in settings.gateway_urls)
    assert len(settings.gateway_urls) == 1
    assert double.upload.url == "", "no address once it stopped"


async def test_command_prints_settings_that_lead_to_a_running_double(tmp_path):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "divault", "lighthouse", str(tmp_path / "content")),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    said = (await asyncio.wait_for(process.stdout.readuntil(b"\n\n"), 60)).decode()
    (tmp_path / ".env").write_text(said)
    settings = Settings.load({}, env_file=tmp_path / ".env")
    (tmp_path / "model").write_bytes(DATA)
    client = Lighthouse(
        settings.lighthouse_api_key,
        upload_url=settings.divault_lighthouse_upload_url,
        api_url=settings.divault_lighthouse_api_url,
        gateway_urls=settings.gateway_urls,
    )
    stored = await client.upload(tmp_path / "model")
    await client.close()
    process.send_signal(signal.SIGINT)
    _, errors = await process.communicate()

    assert (process.returncode, errors.decode()) == (0, "serving until Ctrl-C\n")
    assert (tmp_path / "content").is_dir()
    assert stored.size == len(DATA)
