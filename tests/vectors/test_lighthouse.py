"""Files, key shards, access conditions and requests made by the Lighthouse and Kavach packages."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from aiohttp import web

from divault.errors import AccessDenied, BadRequest, DivaultError, SealedFileDamaged, StorageFailed, WrongKey
from divault.ipfs.cid import parse_cid
from divault.messages import personal_digest, recover
from divault.storage.kavach import Authorisation, Kavach
from divault.storage.lighthouse import Lighthouse
from divault.values import Address, Cid, Secret
from divault.vault import lighthouse
from divault.vault.age import Identity
from divault.vault.conditions import AccessConditions, check_schema, gate_conditions
from divault.vault.kavach import FIELD_ORDER, KeyShard, likely_keys, recover_key, split_key
from divault.vault.keys import CallerKey, NodeIdentity, SealFormat, recognise
from divault.vault.sealed import open_stream, plain_size, read_preamble
from tests.vectors.test_age import Dribble
from tests.vectors_root import vectors_root

FOLDER = vectors_root() / "lighthouse"
VECTORS = json.loads((FOLDER / "vectors.json").read_text())
SHARDS = json.loads((FOLDER / "shards.json").read_text())
ODD_SIZES = (1, 15, 16, 17, 27, 28, 29)


@pytest.fixture(autouse=True)
def one_derivation_per_key(monkeypatch):
    """PBKDF2 costs 0.1 s: the same pair is derived once for all the ways of reading."""
    monkeypatch.setattr(lighthouse, "derive_key", _derived)


_real_derive = lighthouse.derive_key
_keys: dict[tuple[bytes, bytes], bytes] = {}


def _derived(text: bytes, salt: bytes) -> bytes:
    if (text, salt) not in _keys:
        _keys[text, salt] = _real_derive(text, salt)
    return _keys[text, salt]


def ways(data: bytes) -> list[io.RawIOBase | io.BytesIO]:
    """The file as a whole, and as a stream of unknown size in odd pieces (big files only in the largest ones)."""
    sizes = ODD_SIZES if len(data) < 100_000 else (1009, 65537)
    return [io.BytesIO(data), *(Dribble(data, size) for size in sizes)]


def source_of(password: str) -> CallerKey:
    return CallerKey(Secret.of_text(password))


@pytest.mark.parametrize("entry", VECTORS["files"], ids=lambda e: e["file"])
def test_file_opens_in_every_way_of_reading(entry):
    data = (FOLDER / entry["file"]).read_bytes()

    assert entry["ciphertext_sha256"] == hashlib.sha256(data).hexdigest()
    assert entry["plaintext_size"] == plain_size(read_preamble(io.BytesIO(data))[0], len(data))
    for way in ways(data):
        sink = io.BytesIO()
        assert entry["plaintext_size"] == open_stream(way, sink, [source_of(entry["password"])])
        assert entry["plaintext_sha256"] == hashlib.sha256(sink.getvalue()).hexdigest()


@pytest.mark.parametrize("entry", VECTORS["negative"], ids=lambda e: e["file"])
def test_negative_is_refused_in_every_way_of_reading(entry):
    data = (FOLDER / entry["file"]).read_bytes()
    expected, stage = (SealedFileDamaged, "header") if len(data) < 44 else (WrongKey, None)

    for way in ways(data):
        with pytest.raises(expected) as caught:
            open_stream(way, io.BytesIO(), [source_of(entry["password"])])
        assert stage == caught.value.data.get("stage")


def test_fourteen_files_and_eleven_negatives_are_there():
    assert (len(VECTORS["files"]), len(VECTORS["negative"])) == (14, 11)


def test_model_opens_and_computes():
    model = json.loads((FOLDER / "model.json").read_text())
    password = recover_key([KeyShard.parse(s) for s in model["key_shards"][:3]])
    sink = io.BytesIO()

    open_stream(io.BytesIO((FOLDER / model["file"]).read_bytes()), sink, [source_of(password)])

    assert model["password"] == password
    plain = sink.getvalue()
    assert model["plaintext_sha256"] == hashlib.sha256(plain).hexdigest()
    (length,) = struct.unpack("<Q", plain[:8])
    header, data = json.loads(plain[8 : 8 + length]), plain[8 + length :]
    tensors = {k: struct.unpack_from(f"<{(e - b) // 4}f", data, b) for k, (b, e) in offsets(header).items()}
    x = model["example"]["input"]
    rows = [tensors["weight"][i : i + len(x)] for i in range(0, len(tensors["weight"]), len(x))]
    products = [sum(w * v for w, v in zip(row, x, strict=True)) for row in rows]
    assert model["example"]["output"] == [p + b for p, b in zip(products, tensors["bias"], strict=True)]


def offsets(header: dict) -> dict[str, tuple[int, int]]:
    return {name: tuple(entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"}


def test_key_text_is_used_as_it_stands():
    entry = next(e for e in VECTORS["files"] if e["file"] == "node-15.enc")
    data = (FOLDER / entry["file"]).read_bytes()

    for other in (entry["password"].upper(), entry["password"] + "\n", " " + entry["password"]):
        with pytest.raises(WrongKey):
            open_stream(io.BytesIO(data), io.BytesIO(), [source_of(other)])


def test_sealed_here_opens_here_and_with_no_other_key():
    plain, sealed = bytes(range(256)) * 8200, io.BytesIO()
    assert len(plain) == lighthouse.seal(b"key", io.BytesIO(plain), sealed)
    sink = io.BytesIO()

    open_stream(io.BytesIO(sealed.getvalue()), sink, [source_of("key")])

    assert plain == sink.getvalue()
    assert len(plain) + 44 == len(sealed.getvalue())
    with pytest.raises(WrongKey):
        open_stream(io.BytesIO(sealed.getvalue()), io.BytesIO(), [source_of("kez")])
    with pytest.raises(BadRequest):
        lighthouse.seal(b"", io.BytesIO(plain), io.BytesIO())


def test_lighthouse_is_all_that_is_not_age():
    assert SealFormat.AGE is recognise(b"age-encryption.org/v1\n")
    assert SealFormat.LIGHTHOUSE is recognise(bytes(28))


@pytest.mark.parametrize("shards", SHARDS["sets"], ids=lambda s: s["name"])
def test_recovery_equals_the_sdk_for_right_and_wrong_subsets(shards):
    for case in shards["recover"]:
        picked = [KeyShard.parse(shards["key_shards"][i]) for i in case["shards"]]

        key = recover_key(picked)

        assert case["sdk_master_key"] == key
        assert case["equals_master"] == (key == shards["master_key"])


def test_all_recorded_recoveries_ran():
    assert sum(len(s["recover"]) for s in SHARDS["sets"]) == 38


@pytest.mark.parametrize("case", SHARDS["odd_recover_inputs"]["cases"], ids=lambda c: c["what"])
def test_odd_shards_are_refused_unless_the_values_are_fine(case):
    if case.get("result"):
        assert case["result"] == recover_key([KeyShard.parse(s) for s in case["shards"]])
    else:
        with pytest.raises(BadRequest):
            recover_key([KeyShard.parse(s) for s in case["shards"]])


def test_field_order_is_the_curves():
    from py_ecc.optimized_bls12_381 import curve_order

    assert int(SHARDS["field_modulus_hex"], 16) == curve_order == FIELD_ORDER


def test_errors_never_repeat_the_key():
    with pytest.raises(DivaultError) as caught:
        open_stream(io.BytesIO(bytes(100)), io.BytesIO(), [source_of("very secret words")])

    assert "secret" not in str(caught.value) + repr(caught.value.data)


def test_without_a_caller_key_it_is_a_wrong_key_and_says_what_to_send():
    with pytest.raises(WrongKey, match="decryption_key"):
        open_stream(io.BytesIO(bytes(100)), io.BytesIO(), [NodeIdentity(Identity.generate())])


# --- shards made here ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SHARDS["shardKey_inputs"], ids=lambda c: c["what"])
def test_odd_keys_are_split_as_the_sdk_splits_them_or_refused(case):
    """The SDK also splits text that is no number, and zero: both become a key of zeros, so here they are refused."""
    key = Secret.of_text(case["key"])
    if case["isShardable"] and case["recovers_to"] != "0" * 64:
        assert case["recovers_to"] == recover_key(split_key(key)[:3])
    else:
        with pytest.raises(BadRequest):
            split_key(key)


def test_only_the_odd_keys_that_become_zeros_are_treated_otherwise():
    assert {c["what"] for c in SHARDS["shardKey_inputs"] if c["recovers_to"] == "0" * 64} == {"not hex", "zero"}


@pytest.mark.parametrize("shards", [s for s in SHARDS["sets"] if s["shards_needed"] in (3, 4)], ids=lambda s: s["name"])
def test_every_set_of_the_sdk_is_found_among_the_likely_keys(shards):
    keys = list(likely_keys([KeyShard.parse(s) for s in shards["key_shards"]]))

    assert keys[0] == shards["master_key"]
    assert len(keys) == len(set(keys)) <= 15


# --- access conditions --------------------------------------------------------------------------------------------

CONDITIONS = json.loads((FOLDER / "access_conditions.json").read_text())
ONLY_HERE = {
    "two, aggregator naming a missing id",
    "two, unbalanced aggregator",
    "two, aggregator and and",
    "one, any aggregator",
}


@pytest.mark.parametrize("case", CONDITIONS, ids=lambda c: c["name"])
def test_condition_is_judged_as_by_the_schema(case):
    if case["kavach_0_2_1"] == "valid":
        check_schema(case["body"])
    else:
        with pytest.raises(BadRequest) as caught:
            check_schema(case["body"])
        assert caught.value.data["field"].split(".")[-1].split("[")[0] in case["kavach_0_2_1"]


@pytest.mark.parametrize("case", CONDITIONS, ids=lambda c: c["name"])
def test_aggregators_that_mean_nothing_are_refused_beyond_the_schema(case):
    if case["kavach_0_2_1"] == "valid" and case["name"] not in ONLY_HERE:
        assert list(AccessConditions.parse(case["body"]).conditions) == case["body"]["conditions"]
    else:
        with pytest.raises(BadRequest):
            AccessConditions.parse(case["body"])


def test_all_recorded_conditions_ran():
    assert len(CONDITIONS) == 58
    assert {c["name"] for c in CONDITIONS} >= ONLY_HERE


# --- requests -----------------------------------------------------------------------------------------------------

WIRE = json.loads((FOLDER / "sdk_wire_transcript.json").read_text())["exchange"]


def at(*numbers: int) -> list[dict]:
    return [WIRE[number] for number in numbers]


class Recorded:
    """Answers with what was recorded for the same method, path and body, and notes what came."""

    def __init__(self, exchange: list[dict]) -> None:
        self.left = list(exchange)
        self.strange: list[str] = []

    async def __aenter__(self) -> Recorded:
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = "http://{}:{}".format(*self._runner.addresses[0][:2])
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        for entry in self.left:
            if (entry["method"], entry["path"]) == (request.method, request.path_qs):
                break
        else:
            self.strange.append(f"{request.method} {request.path_qs}")
            return web.Response(status=418)
        self.left.remove(entry)
        if "json" in entry and await request.json() != entry["json"]:
            self.strange.append(f"{request.path_qs}: {await request.text()}")
        for name in {"Authorization", "Content-Type", "Encryption", "Accept"} & set(entry["headers"]):
            if request.headers.get(name, "").partition(";")[0] != entry["headers"][name].partition(";")[0]:
                self.strange.append(f"{request.path_qs} {name}: {request.headers.get(name)}")
        return web.json_response(entry["reply"], status=entry["status"])


@asynccontextmanager
async def replay(*numbers: int) -> AsyncIterator[Kavach]:
    """Whatever is done in the context sends exactly the recorded requests with these numbers."""
    async with Recorded(at(*numbers)) as recorded:
        kavach = Kavach(recorded.url)
        try:
            yield kavach
        finally:
            await kavach.close()
    assert recorded.strange == []
    assert [entry["path"] for entry in recorded.left] == []


def caller(number: int) -> tuple[Authorisation, Cid]:
    """Who sent the recorded request, and about which file."""
    entry = WIRE[number]
    token = entry["headers"]["Authorization"].removeprefix("Bearer ")
    address = Address.parse(entry["json"]["address"])
    return Authorisation.parse(address, Secret.of_text(token)), parse_cid(entry["json"]["cid"])


@pytest.mark.parametrize("first", [2, 36])
async def test_saving_sends_what_the_sdk_sends(first):
    numbers = range(first, first + 5)
    shards = [KeyShard.parse(WIRE[n]["json"]["payload"]) for n in numbers]
    async with replay(*numbers) as kavach:
        await kavach.save(*caller(first), shards)


async def test_sharing_and_revoking_send_what_the_sdk_sends():
    async with replay(*range(11, 16)) as kavach:
        await kavach.share(*caller(11), [Address.parse(WIRE[11]["json"]["shareTo"][0])])
    async with replay(*range(45, 50)) as kavach:
        await kavach.revoke(*caller(45), [Address.parse(WIRE[45]["json"]["revokeTo"][0])])


async def test_conditions_are_sent_and_read_as_by_the_sdk():
    who, cid = caller(27)
    sent = WIRE[27]["json"]
    conditions = gate_conditions(Address.parse(sent["conditions"][0]["contractAddress"]), 1_000_000, 8453)
    conditions = replace(conditions, chain_type="evm")  # any case is taken; the recorded caller wrote it small
    async with replay(*range(27, 33)) as kavach:
        await kavach.set_conditions(who, cid, conditions)
        told = await kavach.conditions(cid)

    assert told["conditions"] == list(conditions.conditions)
    assert told["owner"] == str(who.address).lower()


async def test_three_recorded_shards_make_the_recorded_key():
    async with replay(17, 18, 19) as kavach:
        who, _ = caller(17)
        shards = [await kavach._shard(number, who, WIRE[17]["json"]) for number in (3, 4, 5)]

    saved = [KeyShard.parse(WIRE[n]["json"]["payload"]) for n in range(2, 7)]
    assert recover_key(shards) == next(likely_keys(saved))


@pytest.mark.parametrize(
    ("number", "error"), [(9, AccessDenied), (21, AccessDenied), (23, StorageFailed), (51, AccessDenied)]
)
async def test_recorded_refusals_are_typed_errors(number, error):
    who, _ = caller(number)
    node = int(WIRE[number]["path"][-1])
    async with replay(number) as kavach:
        with pytest.raises(error):
            await kavach._shard(node, who, WIRE[number]["json"])


@pytest.mark.parametrize(
    ("asked", "used"), [(0, 2), (8, 9), (10, 11), (16, 17), (22, 23), (26, 27), (34, 36), (44, 45), (50, 51)]
)
async def test_message_is_asked_for_as_by_the_sdk_and_what_it_sent_is_its_signature(asked, used):
    who, _ = caller(used)
    async with replay(asked) as kavach:
        message = await kavach.auth_message(who.address)

    assert recover(personal_digest(message), who.token.reveal().decode()) == who.address


async def test_file_info_is_asked_for_as_by_the_sdk():
    async with Recorded(at(7)) as recorded:
        lighthouse_host = Lighthouse(None, api_url=recorded.url)
        info = await lighthouse_host.file_info(parse_cid(WIRE[7]["reply"]["cid"]))
        await lighthouse_host.close()

    assert (recorded.strange, recorded.left) == ([], [])
    assert (info.size, info.encrypted) == (700045, True)


@pytest.mark.parametrize(("number", "key", "reason"), [(1, b"apikey", "cid_mismatch"), (42, b"bad", "http_401")])
async def test_upload_is_sent_as_by_the_sdk(number, key, reason, tmp_path):
    """What is sent here is another file than the recorded one, so the recorded CID is refused."""
    path = tmp_path / "model.bin"
    path.write_bytes(b"another model")
    no_car = {"method": "POST", "path": "/api/v0/dag/import", "headers": {}, "status": 404, "reply": {}}
    async with Recorded([no_car, *at(number)]) as recorded:
        lighthouse_host = Lighthouse(Secret(key), upload_url=recorded.url)
        with pytest.raises(StorageFailed) as caught:
            await lighthouse_host.upload(path, encrypted=True)
        await lighthouse_host.close()

    assert (recorded.strange, recorded.left, caught.value.data["reason"]) == ([], [], reason)


def test_what_of_the_recorded_requests_has_no_counterpart_here():
    """`cat` (gateways are asked by CID), an upload of text, one without encryption, and repeated questions."""
    played = {0, 1, *range(2, 7), 7, 8, 9, 10, *range(11, 16), 16, 17, 18, 19, 21, 22, 23, 26, *range(27, 33), 34}
    played |= {*range(36, 41), 42, 44, *range(45, 50), 50, 51}
    rest = {n: WIRE[n]["path"].partition("?")[0].rpartition("/")[0] for n in range(len(WIRE)) if n not in played}

    assert len(WIRE) == 52
    assert rest == {
        20: "/api/v0/cat", 24: "/api/retrieveSharedKey", 25: "/api/retrieveSharedKey", 33: "/api/v0/cat",
        35: "/api/v0", 41: "/api/message", 43: "/api/v0",
    }  # fmt: skip
