"""The Lighthouse double: every route with its nearest refusal, every fault with what it does."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import re
import secrets
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from divault.devnet.content import ContentStore
from divault.errors import AccessDenied, HashMismatch, StorageFailed
from divault.ipfs.cid import make_cid, multihash, parse_cid
from divault.ipfs.dagpb import decode_node
from divault.ipfs.importer import UNIXFS_V0_2015, V1_256K_174, Importer, Profile
from divault.messages import address_of, personal_digest, signature_text
from divault.settings import Settings
from divault.storage.cache import CiphertextCache
from divault.storage.fetcher import Fetcher
from divault.storage.gateway import GatewayStorage
from divault.storage.kavach import Kavach
from divault.storage.lighthouse import Lighthouse
from divault.storage.source import Form
from divault.testing import LighthouseDouble, faults, key_nodes
from divault.testing.faults import at, at_node, first
from divault.testing.lighthouse import StoredFile
from divault.values import Address, Cid, Secret
from divault.vault.conditions import AccessConditions, gate_conditions
from divault.vault.kavach import KeyShard, generate, recover_key

OWNER, FRIEND, STRANGER = (Secret(bytes([n]) * 32) for n in (1, 2, 3))
UNKNOWN = "bafkreibwimyyrqiqhl7difiu3gl6a5znf2ml7tgrh3uekfsitvrqczkzr4"
DATA = bytes(range(256)) * 2000  # two chunks of the double's default profile
TOKEN = Address(b"\x11" * 20)
HOLDERS = {address_of(FRIEND)}


async def holds(condition: Mapping[str, Any], address: Address) -> bool:
    return (1000 if address in HOLDERS else 0) >= int(condition["returnValueTest"]["value"])


@pytest_asyncio.fixture
async def double(tmp_path: Path) -> AsyncIterator[LighthouseDouble]:
    async with LighthouseDouble(tmp_path / "blocks", evaluate=holds) as hosts:
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


class Asker:
    """One wallet that speaks to the hosts directly."""

    def __init__(self, http: aiohttp.ClientSession, double: LighthouseDouble, key: Secret) -> None:
        self._http, self._double, self._key = http, double, key
        self.address = str(address_of(key))

    async def word(self) -> str:
        async with self._http.get(f"{self._double.encryption.url}/api/message/{self.address}") as reply:
            (told,) = await reply.json()
        return signature_text(self._key, personal_digest(told["message"]))

    async def __call__(self, method: str, path: str, word: str | None = None, **body: Any) -> tuple[int, Any]:
        return await answer(
            self._http,
            method,
            self._double.encryption.url + path,
            json={"address": self.address, **body},
            headers={"Authorization": f"Bearer {word or await self.word()}"},
        )


@pytest.fixture
def ask(http, double):
    return lambda key=OWNER: Asker(http, double, key)


async def answer(http: aiohttp.ClientSession, method: str, url: str, **how: Any) -> tuple[int, Any]:
    async with http.request(method, url, allow_redirects=False, **how) as reply:
        body = await reply.read()
        is_json = reply.content_type == "application/json"
        return reply.status, json.loads(body) if is_json else body


def root(profile: Profile, data: bytes = DATA) -> str:
    importer = Importer([profile])
    importer.update(data)
    return str(importer.finish()[profile])


def form(*files: tuple[str, bytes], name: str = "file") -> aiohttp.FormData:
    data = aiohttp.FormData(quote_fields=False)  # as the SDK writes names of files in folders
    for filename, content in files:
        data.add_field(name, content, filename=filename, content_type="application/octet-stream")
    return data


async def add(
    http: aiohttp.ClientSession, double: LighthouseDouble, *files: tuple[str, bytes], query: str = "", **headers: str
) -> tuple[int, Any]:
    key = {"Authorization": f"Bearer {double.api_key.reveal().decode()}"} | headers
    return await answer(http, "POST", f"{double.upload.url}/api/v0/add{query}", data=form(*files), headers=key)


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


# --- key nodes -----------------------------------------------------------------------------------------------------


async def test_signature_counts_until_the_next_message(ask):
    owner = ask()
    old, new = await owner.word(), await owner.word()

    assert (await owner("POST", "/api/retrieveSharedKey/1", new, cid=UNKNOWN))[0] == 404
    assert await owner("POST", "/api/retrieveSharedKey/1", old, cid=UNKNOWN) == (406, {"message": "Invalid Signature"})


@pytest.mark.parametrize("word", ["", "0x", "0x" + "11" * 65, "jwt:no", "r:no", "words"])
async def test_nobody_gets_by_without_a_proof(ask, word):
    for node, (method, route) in itertools.product((1, 5), ROUTES):
        owner = ask()
        await owner.word()
        assert (await owner(method, f"/api/{route}/{node}", word or " ", cid=UNKNOWN))[0] == 406


ROUTES = [
    ("POST", "setSharedKey"), ("PUT", "setSharedKey"), ("DELETE", "setSharedKey"), ("POST", "retrieveSharedKey"),
    ("POST", "fileAccessConditions"), ("PUT", "fileAccessConditions"), ("POST", "transferOwnership"),
    ("POST", "setAllFilesAccess"),
]  # fmt: skip


async def test_token_stands_for_its_wallet_alone_and_is_renewed_once(ask, http, double):
    owner, stranger = ask(), ask(STRANGER)
    jwt = f"{double.encryption.url}/api/message/get-jwt"
    signed = {"address": owner.address, "signature": await owner.word(), "chain": "ALL"}
    status, tokens = await answer(http, "POST", jwt, json=signed)
    await stranger.word()

    assert status == 200
    assert (await owner("POST", "/api/retrieveSharedKey/1", tokens["token"], cid=UNKNOWN))[0] == 404
    assert (await stranger("POST", "/api/retrieveSharedKey/1", tokens["token"], cid=UNKNOWN))[0] == 406
    again = {"address": owner.address, "refreshToken": tokens["refreshToken"]}
    assert (await answer(http, "PUT", jwt, json=again))[1]["token"].startswith("jwt:")
    assert (await answer(http, "PUT", jwt, json=again))[0] == 400
    assert (await answer(http, "POST", jwt, json=signed | {"address": stranger.address}))[0] == 400


@pytest.mark.parametrize("address", ["0x1", "nobody", "0x" + "00" * 20])
async def test_what_is_no_address_gets_no_message(http, double, address):
    told = await answer(http, "GET", f"{double.encryption.url}/api/message/{address}")

    assert told == (400, {"message": "Invalid address"})


SHARDS = [{"key": shard.key, "index": shard.index} for shard in generate()[1]]


async def test_each_node_keeps_its_own_shard_and_state(ask):
    owner, friend = ask(), ask(FRIEND)
    await owner("POST", "/api/setSharedKey/1", cid=UNKNOWN, payload=SHARDS[0])
    await owner("POST", "/api/setSharedKey/2", cid=UNKNOWN, payload=SHARDS[1])
    await owner("PUT", "/api/setSharedKey/1", cid=UNKNOWN, shareTo=[friend.address])

    assert await friend("POST", "/api/retrieveSharedKey/1", cid=UNKNOWN) == (200, {"payload": SHARDS[0]})
    denied = (403, {"message": {"message": {"message": "Access Denied"}}})
    assert await friend("POST", "/api/retrieveSharedKey/2", cid=UNKNOWN) == denied
    assert await owner("POST", "/api/retrieveSharedKey/3", cid=UNKNOWN) == (404, {"message": "null"})


@pytest.mark.parametrize(
    ("method", "route", "body"),
    [
        ("POST", "setSharedKey", {"payload": SHARDS[1]}),
        ("PUT", "setSharedKey", {"shareTo": [str(address_of(STRANGER))]}),
        ("DELETE", "setSharedKey", {"revokeTo": []}),
        ("POST", "transferOwnership", {"newOwner": str(address_of(STRANGER))}),
        ("PUT", "fileAccessConditions", {"conditions": [], "chainType": "evm"}),
        ("POST", "fileAccessConditions", {"conditions": [], "payload": SHARDS[1]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_only_the_owner_acts_on_his_file(ask, method, route, body):
    owner, stranger = ask(), ask(STRANGER)
    await owner("POST", "/api/setSharedKey/1", cid=UNKNOWN, payload=SHARDS[0])

    assert await stranger(method, f"/api/{route}/1", cid=UNKNOWN, **body) == (403, {"message": "Access Denied"})
    assert await owner("POST", "/api/retrieveSharedKey/1", cid=UNKNOWN) == (200, {"payload": SHARDS[0]})
    assert (await owner(method, f"/api/{route}/1", cid=UNKNOWN, **body))[0] == 200


async def test_addresses_are_the_same_in_any_case(ask, double, http):
    owner = ask()
    await owner("POST", "/api/setSharedKey/1", cid=UNKNOWN, payload=SHARDS[0])
    word, owner.address = await owner.word(), owner.address.lower()

    assert (await owner("POST", "/api/retrieveSharedKey/1", word, cid=UNKNOWN))[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        {"cid": "Qm", "payload": SHARDS[0]},
        {"cid": UNKNOWN, "payload": None},
        {"cid": UNKNOWN, "payload": SHARDS[0] | {"key": "x" * 64}},
        {"cid": UNKNOWN, "payload": SHARDS[0], "sharedTo": "all"},
        {"cid": UNKNOWN, "payload": SHARDS[0], "sharedTo": ["all"]},
        {"payload": SHARDS[0]},
    ],
    ids=str,
)
async def test_malformed_save_is_a_bad_request_and_keeps_nothing(ask, double, body):
    assert (await ask()("POST", "/api/setSharedKey/1", **body))[0] == 400
    assert double.keys.nodes[0].files == {}


async def test_body_that_is_no_json_object_is_a_bad_request(http, double):
    for body in (b"", b"[]", b"{", b"null"):
        status, told = await answer(http, "POST", f"{double.encryption.url}/api/retrieveSharedKey/1", data=body)
        assert (status, set(told)) == (400, {"message"})


async def test_there_is_no_sixth_node(ask):
    assert (await ask()("POST", "/api/setSharedKey/6", cid=UNKNOWN, payload=SHARDS[0]))[0] == 404


async def saved(kavach: Kavach, *share_with: Address) -> tuple[Cid, str]:
    key, shards = generate()
    cid = parse_cid(UNKNOWN)
    async with kavach.as_wallet(OWNER) as who:
        await kavach.save(who, cid, shards, share_with)
    return cid, key.reveal().decode()


async def recovered(kavach: Kavach, key: Secret, owner: Address | None = None) -> str:
    async with kavach.as_wallet(key) as who:
        return recover_key([shard async for shard in kavach.shards(who, parse_cid(UNKNOWN), owner)])


async def test_delegate_who_names_the_owner_gets_his_keys_and_nobody_else_does(kavach):
    _, key = await saved(kavach)
    async with kavach.as_wallet(OWNER) as who:
        await kavach.delegate(who, [address_of(FRIEND)])

    assert await recovered(kavach, FRIEND, address_of(OWNER)) == key
    for asker, named in ((FRIEND, None), (FRIEND, address_of(STRANGER)), (STRANGER, address_of(OWNER))):
        with pytest.raises(AccessDenied):
            await recovered(kavach, asker, named)


async def test_conditions_let_in_who_meets_them_and_are_told_to_anybody(kavach):
    cid, key = await saved(kavach)
    async with kavach.as_wallet(OWNER) as who:
        await kavach.set_conditions(who, cid, gate_conditions(TOKEN, 1000, 8453))

    assert await recovered(kavach, FRIEND) == key
    with pytest.raises(AccessDenied):
        await recovered(kavach, STRANGER)
    told = await kavach.conditions(cid)
    assert told["owner"] == str(address_of(OWNER))
    assert told["conditions"][0]["returnValueTest"] == {"comparator": ">=", "value": "1000"}


async def test_conditions_that_nobody_evaluates_let_nobody_in(tmp_path):
    async with LighthouseDouble(tmp_path) as double:
        kavach = Kavach(double.encryption.url)
        cid, key = await saved(kavach)
        async with kavach.as_wallet(OWNER) as who:
            await kavach.set_conditions(who, cid, gate_conditions(TOKEN, 1, 8453))
        with pytest.raises(AccessDenied):
            await recovered(kavach, FRIEND)
        assert await recovered(kavach, OWNER) == key
        await kavach.close()


def _two(aggregator: str) -> AccessConditions:
    (one,) = gate_conditions(TOKEN, 1, 1).conditions
    body = {"address": "a", "cid": "c", "conditions": [one, one | {"id": 2}], "aggregator": aggregator}
    return AccessConditions.parse(body)


@pytest.mark.parametrize(
    ("aggregator", "met_by"),
    [
        ("([1] and [2])", {(True, True)}),
        ("([1] or [2])", {(True, True), (True, False), (False, True)}),
        ("[1] and ![2]", {(True, False)}),
        ("!([1] or [2])", {(False, False)}),
        ("[1] or [2] and ![1]", {(True, True), (True, False), (False, True)}),
    ],
)
def test_aggregators_hold_exactly_when_they_say(aggregator, met_by):
    conditions = _two(aggregator)

    assert {pair for pair in itertools.product((True, False), repeat=2) if conditions.met(pair)} == met_by


def test_no_conditions_are_never_met_and_a_result_that_is_missing_is_an_error():
    assert not AccessConditions((), "", "EVM").met(())
    with pytest.raises(ValueError, match="zip"):
        _two("[1] and [2]").met((True,))


async def test_malformed_conditions_are_a_bad_request(ask):
    owner = ask()
    await owner("POST", "/api/setSharedKey/1", cid=UNKNOWN, payload=SHARDS[0])
    (one,) = gate_conditions(TOKEN, 1, 1).conditions

    for odd in ({"conditions": [one, one]}, {"conditions": [{}]}, {"conditions": [one], "aggregator": "([1]"}, {}):
        assert (await owner("PUT", "/api/fileAccessConditions/1", cid=UNKNOWN, **odd))[0] == 400
    good = await owner("PUT", "/api/fileAccessConditions/1", cid=UNKNOWN, conditions=[one], aggregator="([1])")
    assert good == (200, {"message": "success"})


async def test_recorded_exchange_of_the_sdk_gets_the_recorded_answers(double, http, monkeypatch, vectors_dir):
    """Signatures in it are the SDK's own, so the texts that it signed are given again."""
    exchange = json.loads((vectors_dir / "lighthouse/sdk_wire_transcript.json").read_text())["exchange"]
    texts = [e["reply"][0]["message"].rpartition(" ")[2] for e in exchange if e["path"].startswith("/api/message/0x")]
    monkeypatch.setattr(key_nodes.secrets, "token_hex", lambda _bytes: texts.pop(0))
    uploads = [e["reply"] for e in exchange if e["path"].startswith("/api/v0/add") and e["status"] == 200]
    for (item,) in (reply for reply in uploads if isinstance(reply, list)):
        file = StoredFile(parse_cid(item["Hash"]), item["Name"], int(item["Size"]), TOKEN, encrypted=True)
        double.accounts.keep(file)
    checked = 0
    for entry in exchange:
        host = double.api if "/api/lighthouse/" in entry["path"] else double.encryption
        if entry["path"].startswith("/api/v0/"):
            continue  # contents were not recorded
        headers = {name: value for name, value in entry["headers"].items() if name != "Accept"}
        sent = json.dumps(entry["json"]) if "json" in entry else None
        status, told = await answer(http, entry["method"], host.url + entry["path"], data=sent, headers=headers)
        assert (entry["status"], _comparable(entry["reply"])) == (status, _comparable(told)), entry["path"]
        checked += 1

    assert checked > 30


def _comparable(reply: Any) -> Any:
    """Addresses in lower case; a family of chains without conditions may be left out."""
    told = json.loads(re.sub("0x[0-9a-fA-F]{40}", lambda found: found[0].lower(), json.dumps(reply)))
    if isinstance(told, dict):
        told = {name: value for name, value in told.items() if not name.startswith("conditions") or value}
    return told


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


def test_settings_of_the_double_are_settings_of_a_node(tmp_path):
    async def read() -> tuple[Settings, LighthouseDouble]:
        async with LighthouseDouble(tmp_path) as double:
            return Settings.load(double.settings(), env_file=None), double

    settings, double = asyncio.run(read())

    assert all(url.startswith("http://127.0.0.1:") for url in settings.gateway_urls)
    assert len(settings.gateway_urls) == 1
    assert double.upload.url == "", "no address once it stopped"
