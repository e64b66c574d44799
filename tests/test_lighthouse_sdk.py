"""Lighthouse's npm SDK, unmodified, and divault, each opening what the other one sealed.

The SDK sleeps a second after every call to a key node. So each test is a story of its own wallets, all stories start
together when the first test needs one, and each test awaits and judges its own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from msgspec import structs

from divault.errors import AccessDenied, DivaultError, NotAFile
from divault.ipfs.cid import make_cid, multihash, parse_cid
from divault.ipfs.dagpb import decode_node
from divault.limits import WrongKeys
from divault.messages import address_of
from divault.storage.cache import CiphertextCache
from divault.storage.fetcher import Fetcher
from divault.storage.gateway import GatewayStorage
from divault.storage.kavach import Kavach, KeyAccess
from divault.storage.lighthouse import Lighthouse, give_key
from divault.testing import LighthouseDouble
from divault.values import Address, Cid, Secret
from divault.vault import lighthouse
from divault.vault.conditions import gate_conditions
from divault.vault.kavach import KeyShard, generate, recover_key, split_key
from divault.workers.opening import Opener
from tests.lighthouse_sdk import Sdk, SdkThrew, account_sign, jwt, sign
from tests.sealed_models import contents, grant

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = secrets.token_bytes(700_001)  # three chunks
TOKEN = Address(b"\x11" * 20)
UNKNOWN = "bafkreibwimyyrqiqhl7difiu3gl6a5znf2ml7tgrh3uekfsitvrqczkzr4"


def wallet() -> Secret:
    return Secret(b"\x01" + secrets.token_bytes(31))


def written(key: Secret) -> str:
    return str(address_of(key))


class World:
    """Lighthouse, its SDK, and divault's own clients."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.holders: set[Address] = set()
        self.double = LighthouseDouble(folder / "blocks", evaluate=self._holds)
        self.sdk = Sdk(self.double)

    async def __aenter__(self) -> World:
        await self.double.__aenter__()
        await self.sdk.__aenter__()
        self.api_key = self.double.api_key.reveal().decode()
        self.kavach = Kavach(self.double.encryption.url)
        self.opener = Opener(max_model_bytes=10_000_000, timeout_s=60)
        self.gateway = GatewayStorage(self.double.gateway.url)
        cache = CiphertextCache(self.folder / "cache", 100_000_000)
        self.fetcher = Fetcher([self.gateway], cache, max_model_bytes=10_000_000)
        self.client = Lighthouse(
            self.double.api_key,
            upload_url=self.double.upload.url,
            api_url=self.double.api.url,
            gateway_urls=[self.double.gateway.url],
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self.opener.close()
        self.gateway.close()
        await self.client.close()
        await self.kavach.close()
        await self.sdk.__aexit__()
        await self.double.__aexit__(None, None, None)

    async def _holds(self, condition: Mapping[str, Any], address: Address) -> bool:
        """Everybody has 1000 of every token who is a holder, and nobody else has any."""
        assert condition["method"] == "balanceOf"
        return (1000 if address in self.holders else 0) >= int(condition["returnValueTest"]["value"])

    def file(self, data: bytes = MODEL, name: str = "model.bin") -> str:
        path = self.folder / secrets.token_hex(4) / name
        path.parent.mkdir()
        path.write_bytes(data)
        return str(path)

    async def publish(self, owner: Secret, *share_with: Address) -> tuple[Cid, str]:
        """What divault does: seal, store, leave the key; CID and key."""
        key, shards = generate()
        path, sealed = self.folder / secrets.token_hex(4), io.BytesIO()
        await asyncio.to_thread(lighthouse.seal, key.reveal(), io.BytesIO(MODEL), sealed)
        path.write_bytes(sealed.getvalue())
        stored = await self.client.upload(path, encrypted=True)
        async with self.kavach.as_wallet(owner) as who:
            await give_key(self.kavach, who, stored.cid, shards, share_with=share_with)
        return stored.cid, key.reveal().decode()

    async def plain(self, cid: str) -> bytes:
        """The file as it is stored, verified."""
        blob = await self.fetcher.fetch(parse_cid(cid))
        return blob.path.read_bytes()

    async def open(self, cid: str, who: Secret) -> bytes:
        """What a node does for a caller who passes on his word at Kavach: fetch, find the key, open."""
        blob = await self.fetcher.fetch(parse_cid(cid))
        async with self.kavach.as_wallet(who) as word:
            search = KeyAccess(self.kavach, WrongKeys()).of_caller(word.address, word.token)
            model = structs.replace(grant().model, cid=cid)
            opened = await self.opener.open(blob, structs.replace(grant(), model=model), [], search)
        (data,) = contents(opened).values()
        return data


Story = Callable[[World], Awaitable[Any]]
STORIES: dict[str, Story] = {}


def story(tell: Story) -> Story:
    STORIES[tell.__name__] = tell
    return tell


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def told(tmp_path_factory) -> AsyncIterator[dict[str, asyncio.Task[Any]]]:
    async with World(tmp_path_factory.mktemp("lighthouse")) as world:
        tasks = {name: asyncio.ensure_future(tell(world)) for name, tell in STORIES.items()}
        yield tasks
        await asyncio.gather(*tasks.values(), return_exceptions=True)


async def thrown(call: Awaitable[Any]) -> str:
    with pytest.raises(SdkThrew) as caught:
        await call
    return str(caught.value)


async def refused(call: Awaitable[Any]) -> DivaultError:
    with pytest.raises(DivaultError) as caught:
        await call
    return caught.value


# --- the SDK seals, divault opens ----------------------------------------------------------------------------------


@story
async def sdk_seals(world: World) -> dict[str, Any]:
    owner, stranger = wallet(), wallet()
    reply = await world.sdk("uploadEncrypted", world.file(), world.api_key, written(owner), sign(owner))
    cid = reply["data"][0]["Hash"]
    return {
        "reply": reply["data"],
        "info": await world.client.file_info(parse_cid(cid)),
        "opened": await world.open(cid, owner),
        "stranger": await refused(world.open(cid, stranger)),
    }


async def test_divault_opens_what_the_sdk_sealed(told) -> None:
    seen = await told["sdk_seals"]

    assert seen["opened"] == MODEL
    assert [item["Name"] for item in seen["reply"]] == ["model.bin"]
    assert (seen["info"].encrypted, seen["info"].size) == (True, len(MODEL) + lighthouse.OVERHEAD_BYTES)


async def test_stranger_does_not_open_what_the_sdk_sealed(told) -> None:
    stranger = (await told["sdk_seals"])["stranger"]

    assert type(stranger) is AccessDenied
    assert "Access Denied" in stranger.detail


@story
async def sdk_seals_many(world: World) -> list[bytes]:
    owner = wallet()
    folder = world.folder / "many"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_bytes(name.encode() * 1000)
    reply = await world.sdk("uploadEncrypted", str(folder), world.api_key, written(owner), jwt(owner))
    named = {item["Name"]: item["Hash"] for item in reply["data"]}
    return [await world.open(named[name], owner) for name in ("a", "b")]


async def test_divault_opens_several_files_that_the_sdk_sealed_with_a_token(told) -> None:
    assert await told["sdk_seals_many"] == [b"a" * 1000, b"b" * 1000]


@story
async def sdk_seals_text(world: World) -> bytes:
    owner = wallet()
    reply = await world.sdk("textUploadEncrypted", "hällo", world.api_key, written(owner), sign(owner))
    return await world.open(reply["data"][0]["Hash"], owner)


async def test_divault_opens_a_text_that_the_sdk_sealed(told) -> None:
    assert "hällo".encode() == await told["sdk_seals_text"]


@story
async def sdk_shards(world: World) -> dict[str, Any]:
    """`shardKey` of the SDK makes sets that need four shards; divault finds that out by itself."""
    owner = wallet()
    key, _ = generate()
    path = world.folder / "four"
    with path.open("xb") as sealed:
        await asyncio.to_thread(lighthouse.seal, key.reveal(), io.BytesIO(MODEL), sealed)
    cid = str((await world.client.upload(path)).cid)
    shards = (await world.sdk.kavach("shardKey", key.reveal().decode()))["keyShards"]
    saved = await world.sdk.kavach("saveShards", written(owner), cid, sign(owner), shards)
    return {"saved": saved["isSuccess"], "opened": await world.open(cid, owner)}


async def test_divault_opens_with_a_set_of_which_four_are_needed(told) -> None:
    assert await told["sdk_shards"] == {"saved": True, "opened": MODEL}


# --- divault seals, the SDK opens ----------------------------------------------------------------------------------


@story
async def divault_seals(world: World) -> dict[str, Any]:
    owner, stranger = wallet(), wallet()
    cid, key = await world.publish(owner)
    fetched = await world.sdk("fetchEncryptionKey", str(cid), written(owner), sign(owner))
    return {
        "info": (await world.sdk("getFileInfo", str(cid)))["data"],
        "key": (key, fetched["data"]["key"]),
        "opened": await world.sdk("decryptFile", str(cid), fetched["data"]["key"]),
        "wrong": await thrown(world.sdk("decryptFile", str(cid), "0" * 64)),
        "stranger": await thrown(world.sdk("fetchEncryptionKey", str(cid), written(stranger), sign(stranger))),
        "forged": await thrown(world.sdk("fetchEncryptionKey", str(cid), written(owner), "0x" + "11" * 65)),
        "anothers": await thrown(world.sdk("fetchEncryptionKey", str(cid), written(owner), sign(stranger))),
    }


async def test_sdk_opens_what_divault_published(told) -> None:
    seen = await told["divault_seals"]

    assert seen["opened"] == MODEL
    assert seen["key"][0] == seen["key"][1]
    assert seen["info"]["encryption"] is True
    assert seen["info"]["fileSizeInBytes"] == str(len(MODEL) + lighthouse.OVERHEAD_BYTES)


async def test_sdk_is_refused_with_a_wrong_key_as_a_stranger_and_without_a_true_signature(told) -> None:
    seen = await told["divault_seals"]

    assert seen["wrong"]
    assert "Access Denied" in seen["stranger"]
    assert "Invalid Signature" in seen["forged"]
    assert "Invalid Signature" in seen["anothers"]


@story
async def sdk_recovers(world: World) -> list[bool]:
    """Both packages make each other's shards into the same key."""
    key, shards = generate()
    four = split_key(key, 4, 5)
    made = await world.sdk.kavach("generate")
    told = [{"key": shard["key"], "index": shard["index"]} for shard in made["keyShards"]]
    recovered = [
        await world.sdk.kavach("recoverKey", [dataclasses.asdict(shard) for shard in some])
        for some in (shards[:3], shards, four[1:])
    ]
    ours = recover_key([KeyShard.parse(shard) for shard in told[2:]])
    return [item["masterKey"] == key.reveal().decode() for item in recovered] + [ours == made["masterKey"]]


async def test_keys_are_recovered_from_each_others_shards(told) -> None:
    assert await told["sdk_recovers"] == [True] * 4


# --- shared, revoked, passed on ------------------------------------------------------------------------------------


@story
async def sdk_shares(world: World) -> dict[str, Any]:
    owner, friend = wallet(), wallet()
    cid, _ = await world.publish(owner)
    text, before = str(cid), await refused(world.open(str(cid), friend))
    await world.sdk("shareFile", written(owner), [written(friend)], text, sign(owner))
    opened = await world.open(text, friend)
    await world.sdk("revokeFileAccess", written(owner), written(friend), text, sign(owner))
    return {"before": before, "opened": opened, "after": await refused(world.open(text, friend))}


async def test_file_shared_by_the_sdk_opens_here_until_the_sdk_revokes(told) -> None:
    seen = await told["sdk_shares"]

    assert seen["opened"] == MODEL
    assert [type(seen[when]) for when in ("before", "after")] == [AccessDenied] * 2


@story
async def divault_shares(world: World) -> dict[str, Any]:
    owner, friend = wallet(), wallet()
    cid, key = await world.publish(owner, address_of(friend))
    text = str(cid)
    fetched = await world.sdk("fetchEncryptionKey", text, written(friend), sign(friend))
    stolen = await world.sdk.kavach("shareToAddress", written(friend), text, sign(friend), [written(wallet())])
    async with world.kavach.as_wallet(owner) as who:
        await world.kavach.revoke(who, cid, [address_of(friend)])
    after = await thrown(world.sdk("fetchEncryptionKey", text, written(friend), sign(friend)))
    return {"same": fetched["data"]["key"] == key, "stolen": stolen, "after": after}


async def test_file_shared_here_opens_in_the_sdk_until_revoked_here(told) -> None:
    seen = await told["divault_shares"]

    assert seen["same"]
    assert "Access Denied" in seen["after"]


async def test_who_a_file_was_shared_with_cannot_share_it(told) -> None:
    stolen = (await told["divault_shares"])["stolen"]

    assert stolen["isSuccess"] is False
    assert "Denied" in str(stolen["error"])


@story
async def sdk_passes_on(world: World) -> dict[str, Any]:
    owner, heir = wallet(), wallet()
    cid, _ = await world.publish(owner)
    moved = await world.sdk.kavach("transferOwnership", written(owner), str(cid), written(heir), sign(owner))
    return {
        "moved": moved["isSuccess"],
        "owner": (await world.kavach.conditions(cid))["owner"] == written(heir),
        "heir": await world.open(str(cid), heir),
        "old owner": await refused(world.open(str(cid), owner)),
    }


async def test_file_passed_on_by_kavach_is_the_heirs_alone(told) -> None:
    seen = await told["sdk_passes_on"]

    assert (seen["moved"], seen["owner"], seen["heir"]) == (True, True, MODEL)
    assert type(seen["old owner"]) is AccessDenied


# --- access conditions ---------------------------------------------------------------------------------------------


@story
async def sdk_sets_conditions(world: World) -> dict[str, Any]:
    owner, holder, outsider = wallet(), wallet(), wallet()
    world.holders.add(address_of(holder))
    cid, _ = await world.publish(owner)
    text, gate = str(cid), gate_conditions(TOKEN, 1000, 8453)
    before = await refused(world.open(text, holder))
    await world.sdk("applyAccessCondition", written(owner), text, sign(owner), list(gate.conditions), gate.aggregator)
    return {
        "before": before,
        "told": (await world.sdk("getAccessConditions", text))["data"],
        "gate": list(gate.conditions),
        "holder": await world.open(text, holder),
        "outsider": await refused(world.open(text, outsider)),
    }


async def test_gate_set_by_the_sdk_lets_in_who_meets_it(told) -> None:
    seen = await told["sdk_sets_conditions"]

    assert seen["holder"] == MODEL
    assert seen["told"]["conditions"] == seen["gate"]
    assert [type(seen[who]) for who in ("before", "outsider")] == [AccessDenied] * 2


@story
async def divault_sets_conditions(world: World) -> dict[str, Any]:
    owner, holder, outsider = wallet(), wallet(), wallet()
    world.holders.add(address_of(holder))
    cid, key = await world.publish(owner)
    async with world.kavach.as_wallet(owner) as who:
        await world.kavach.set_conditions(who, cid, gate_conditions(TOKEN, 1000, 8453))
    fetched = await world.sdk("fetchEncryptionKey", str(cid), written(holder), sign(holder))
    denied = await thrown(world.sdk("fetchEncryptionKey", str(cid), written(outsider), sign(outsider)))
    return {"same": fetched["data"]["key"] == key, "denied": denied}


async def test_gate_set_here_lets_in_the_sdk_of_who_meets_it(told) -> None:
    seen = await told["divault_sets_conditions"]

    assert seen["same"]
    assert "Access Denied" in seen["denied"]


# --- plain files, accounts -----------------------------------------------------------------------------------------


@story
async def sdk_uploads(world: World) -> dict[str, Any]:
    owner = wallet()
    key = (await world.sdk("getApiKey", written(owner), account_sign(owner)))["data"]["apiKey"]
    one = (await world.sdk("upload", world.file(), key))["data"]
    text = (await world.sdk("uploadText", "plain", key, "note"))["data"]
    listed = (await world.sdk("getUploads", key))["data"]
    return {
        "bytes": await world.plain(one["Hash"]),
        "text": await world.plain(text["Hash"]),
        "used": (await world.sdk("getBalance", key))["data"]["dataUsed"],
        "listed": [(item["cid"], item["publicKey"], item["encryption"]) for item in listed["fileList"]],
        "expected": [(reply["Hash"], written(owner).lower(), False) for reply in (one, text)],
        "deals": (await world.sdk("dealStatus", one["Hash"]))["data"],
    }


async def test_divault_fetches_what_the_sdk_uploads_with_a_key_of_its_own(told) -> None:
    seen = await told["sdk_uploads"]

    assert seen["bytes"] == MODEL
    assert seen["text"] == b"plain"
    assert seen["listed"] == seen["expected"]
    assert (seen["used"], seen["deals"]) == (len(MODEL) + 5, [])


@story
async def sdk_uploads_folder(world: World) -> dict[str, Any]:
    folder = world.folder / "bundle"
    (folder / "inner").mkdir(parents=True)
    (folder / "model").write_bytes(MODEL)
    (folder / "inner/notes").write_bytes(b"notes")
    root = parse_cid((await world.sdk("upload", str(folder), world.api_key))["data"]["Hash"])
    block = world.double.blocks.get(multihash(root))
    links = {link.name: link.cid for link in decode_node(block).links}
    return {
        "names": sorted(links),
        "model": await world.plain(str(make_cid(*links[b"model"][:4]))),
        "as file": await refused(world.plain(str(root))),
    }


async def test_folder_of_the_sdk_is_a_directory_whose_files_divault_fetches(told) -> None:
    seen = await told["sdk_uploads_folder"]

    assert seen["names"] == [b"inner", b"model"]
    assert seen["model"] == MODEL
    assert type(seen["as file"]) is NotAFile


@story
async def sdk_uploads_car(world: World) -> dict[str, Any]:
    cid, _ = await world.publish(wallet())
    car = b"".join([piece async for piece in world.gateway.read(cid)])
    reply = await world.sdk("uploadCAR", world.file(car, "model.car"), world.api_key)
    return {"cid": str(cid), "reply": reply["data"]}


async def test_car_of_divault_goes_up_by_the_sdk_under_the_same_cid(told) -> None:
    seen = await told["sdk_uploads_car"]

    assert seen["reply"]["Root"]["Cid"]["/"] == seen["cid"]


@story
async def sdk_fails(world: World) -> dict[str, str]:
    owner, other, sealer = wallet(), wallet(), wallet()
    calls = {
        "bad key, sealed": world.sdk("uploadEncrypted", world.file(), "bad", written(sealer), jwt(sealer)),
        "bad key, plain": world.sdk("upload", world.file(), "bad"),
        "no such account": world.sdk("getBalance", "bad"),
        "another's signature": world.sdk("getApiKey", written(owner), account_sign(other)),
        "unknown file": world.sdk("getFileInfo", UNKNOWN),
        "key of an unknown file": world.sdk("fetchEncryptionKey", UNKNOWN, written(owner), jwt(owner)),
        "unknown content": world.sdk("decryptFile", UNKNOWN, "0" * 64),
    }
    return dict(zip(calls, await asyncio.gather(*map(thrown, calls.values())), strict=True))


async def test_sdk_is_refused_what_is_not_there_or_not_its_own(told) -> None:
    seen = await told["sdk_fails"]

    assert "Authentication failed" in seen["bad key, sealed"]
    assert "401" in seen["bad key, plain"]
    assert "401" in seen["no such account"]
    assert "fetch Error" in seen["key of an unknown file"]
    assert "404" in seen["unknown content"]
    assert all(seen.values())
