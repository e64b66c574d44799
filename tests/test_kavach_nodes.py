"""Keys of Lighthouse-sealed files, fetched from key nodes that may be slow, dead, confused or hostile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from msgspec import structs

from divault.errors import AccessDenied, BadRequest, RateLimited, SettingsInvalid, StorageFailed, WrongKey
from divault.ipfs.cid import parse_cid
from divault.limits import WrongKeys
from divault.messages import address_of
from divault.storage.kavach import Authorisation, Kavach, KavachSearch, KeyAccess
from divault.values import Address, Grant, Secret
from divault.vault import lighthouse
from divault.vault.conditions import gate_conditions
from divault.vault.kavach import KeyShard, generate, recover_key, split_key
from divault.vault.keys import CallerKey
from divault.workers.opening import Opener
from tests.kavach_nodes import FileEntry, KavachNodes, answering, dead, saying, silent
from tests.sealed_models import blob, contents, grant, lighthouse_sealed, sealed

CID = parse_cid("bafkreibwimyyrqiqhl7difiu3gl6a5znf2ml7tgrh3uekfsitvrqczkzr4")
OTHER = parse_cid("bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy")
OWNER, NODE, STRANGER = (Secret(bytes([n]) * 32) for n in (1, 2, 3))
HEADER = bytes(28)


@pytest_asyncio.fixture
async def nodes() -> AsyncIterator[KavachNodes]:
    async with KavachNodes() as server:
        yield server


@pytest_asyncio.fixture
async def kavach(nodes: KavachNodes) -> AsyncIterator[Kavach]:
    client = Kavach(nodes.url, timeout_s=2.0)
    yield client
    await client.close()


async def keep(kavach: Kavach, shards: tuple[KeyShard, ...], cid=CID, share_with=()) -> None:
    async with kavach.as_wallet(OWNER) as who:
        await kavach.save(who, cid, shards, share_with)


async def fetched(kavach: Kavach, key: Secret = OWNER, owner: Address | None = None) -> list[KeyShard]:
    async with kavach.as_wallet(key) as who:
        return [shard async for shard in kavach.shards(who, CID, owner)]


def granted(owner: Secret = OWNER, cid=CID) -> Grant:
    model = structs.replace(grant().model, cid=cid.text, owner=address_of(owner))
    return structs.replace(grant(), model=model)


async def offered(search: KavachSearch | None, wanted: str, given: Grant | None = None) -> int:
    """How many keys it takes until the wanted one is offered."""
    assert search is not None
    count = 0
    async for source in search.candidates(HEADER, given or granted()):
        count += 1
        derived = source.unwrap(HEADER, None)
        if derived == Secret(lighthouse.derive_key(wanted.encode(), HEADER[:16])):
            return count
    raise AssertionError("never offered")


@pytest.fixture
def cheap_derivations(monkeypatch):
    monkeypatch.setattr(lighthouse, "derive_key", lambda text, salt: (text + salt)[:96])


@pytest_asyncio.fixture
async def search(kavach: Kavach) -> KavachSearch:
    async with kavach.as_wallet(OWNER) as who:
        return KeyAccess(kavach, WrongKeys()).of_caller(who.address, who.token)


# --- what an owner does -------------------------------------------------------------------------------------------


async def test_key_is_kept_and_given_to_its_owner(kavach):
    key, shards = generate()
    await keep(kavach, shards)

    got = await fetched(kavach)

    assert {s.index for s in shards} == {s.index for s in got}
    assert key.reveal().decode() == recover_key(got[:3])
    with pytest.raises(AccessDenied, match="Access Denied"):
        await fetched(kavach, STRANGER)


async def test_sharing_opens_and_revoking_closes(kavach):
    await keep(kavach, generate()[1])
    stranger = [address_of(STRANGER)]
    async with kavach.as_wallet(OWNER) as who:
        await kavach.share(who, CID, stranger)
    assert len(await fetched(kavach, STRANGER)) >= 3
    async with kavach.as_wallet(OWNER) as who:
        await kavach.revoke(who, CID, stranger)

    with pytest.raises(AccessDenied):
        await fetched(kavach, STRANGER)
    async with kavach.as_wallet(STRANGER) as who:
        with pytest.raises(AccessDenied):
            await kavach.share(who, CID, stranger)


async def test_conditions_are_set_alone_and_together_with_shards(kavach, nodes):
    conditions = gate_conditions(address_of(STRANGER), 5, 8453)
    async with kavach.as_wallet(OWNER) as who:
        await kavach.set_conditions(who, CID, conditions, generate()[1])
        created = nodes.files[CID.text].conditions
        await kavach.set_conditions(who, CID, conditions)
        with pytest.raises(BadRequest):
            await kavach.set_conditions(who, CID, conditions, generate()[1][:4])

    assert [a.method for a in nodes.asked if "fileAccess" in a.path] == ["POST"] * 5 + ["PUT"] * 5
    assert {"decryptionType", "payload", "conditions", "aggregator", "chainType", "address", "cid"} == set(created)
    assert len(await fetched(kavach)) >= 3


async def test_ownership_goes_node_after_node(kavach, nodes):
    await keep(kavach, generate()[1])
    async with kavach.as_wallet(OWNER) as who:
        await kavach.transfer_ownership(who, CID, address_of(STRANGER))

    asked = [a for a in nodes.asked if "transferOwnership" in a.path]
    assert [f"/api/transferOwnership/{n}" for n in range(1, 6)] == [a.path for a in asked]
    assert {"newOwner": str(address_of(STRANGER)), "resetSharedTo": True}.items() <= asked[0].body.items()


async def test_saving_needs_every_node_and_names_the_one_that_failed(kavach, nodes):
    nodes.faults[4] = saying("<html>502 Bad Gateway</html>", 502)

    with pytest.raises(StorageFailed, match=r"key node 4.*again") as caught:
        await keep(kavach, generate()[1])
    assert caught.value.data["reason"] == "http_502"
    assert "<html>" not in str(caught.value)
    nodes.faults[4] = answering({"message": "well"})
    with pytest.raises(StorageFailed, match="did not say success"):
        await keep(kavach, generate()[1])
    with pytest.raises(BadRequest):
        await keep(kavach, generate()[1][:4])


async def test_jwt_stands_for_a_signature_and_is_renewed(kavach):
    key, shards = generate()
    await keep(kavach, shards)
    tokens = await kavach.get_jwt(await kavach.authorise(OWNER))
    renewed = await kavach.refresh_jwt(address_of(OWNER), tokens.refresh)

    for token in (tokens.token, renewed.token):
        who = Authorisation.parse(address_of(OWNER), token)
        got = [shard async for shard in kavach.shards(who, CID)]
        assert key.reveal().decode() == recover_key(got[:3])
    with pytest.raises(AccessDenied, match="fresh"):
        await kavach.get_jwt(Authorisation.parse(address_of(OWNER), Secret.of_text("0x" + "11" * 65)))


@pytest.mark.parametrize("text", ["", "jwt", "0x", "0x" + "1" * 131, "jwt:a b", "jwt:\n", "jwt:\u00e9", "Bearer x"])
def test_what_is_no_authorisation_is_refused(text):
    with pytest.raises(BadRequest) as caught:
        Authorisation.parse(address_of(OWNER), Secret.of_text(text))

    assert caught.value.data["field"] == "lighthouse_authorization"


@pytest.mark.parametrize("url", ["", "ftp://x", "http://", "http://u:p@host", "http://host?x=1"])
def test_url_that_no_request_can_go_to_is_refused(url):
    with pytest.raises(SettingsInvalid) as caught:
        Kavach(url)

    assert caught.value.data["setting"] == "DIVAULT_LIGHTHOUSE_ENCRYPTION_URL"


# --- faults of nodes ----------------------------------------------------------------------------------------------

BROKEN = {
    "silent": silent,
    "dead": dead,
    "payload null": answering({"payload": None}),
    "no payload": answering({}),
    "a list": answering([1]),
    "text in json": answering("null"),
    "shard of zero": answering({"payload": {"key": "0" * 64, "index": "0" * 64}}),
    "short shard": answering({"payload": {"key": "ab", "index": "cd"}}),
    "nested message": answering({"message": {"message": {"message": "try later"}}}, 500),
    "message as text": answering({"message": '{"message": "try later"}'}, 500),
    "html 502": saying("<html>Bad Gateway</html>", 502),
    "html 200": saying("<html>Welcome</html>"),
    "empty 500": saying("", 500),
    "unknown file": answering({"message": "null"}, 404),
    "redirect": saying("", 302, Location="http://127.0.0.1:1/"),
    "long": saying("x" * 300_000),
}


@pytest.mark.parametrize("fault", BROKEN)
async def test_two_broken_nodes_do_not_keep_a_key(nodes, fault):
    """With a clock so slow that waiting for the broken ones would be an error."""
    key, shards = generate()
    await keep_on(nodes, shards)
    nodes.faults = {1: BROKEN[fault], 4: BROKEN[fault]}
    patient = Kavach(nodes.url, timeout_s=600)

    async with asyncio.timeout(30), patient.as_wallet(OWNER) as who:
        got: list[KeyShard] = []
        async for shard in patient.shards(who, CID):
            got.append(shard)
            if len(got) == 3:
                break
    await patient.close()

    assert key.reveal().decode() == recover_key(got)


@pytest.mark.parametrize("fault", [f for f in BROKEN if f != "silent"])
async def test_three_broken_nodes_are_a_typed_error_that_names_host_and_file(kavach, nodes, fault):
    await keep(kavach, generate()[1])
    nodes.faults = dict.fromkeys((1, 3, 5), BROKEN[fault])

    with pytest.raises(StorageFailed, match=CID.text) as caught:
        await fetched(kavach)

    assert (CID.text, kavach.name) == (caught.value.data["cid"], caught.value.data["gateway"])
    assert "<html>" not in str(caught.value)


async def test_silent_nodes_end_by_the_clock(nodes):
    kavach = Kavach(nodes.url, timeout_s=0.3)
    await keep(kavach, generate()[1])
    nodes.faults = dict.fromkeys((1, 3, 5), silent)

    with pytest.raises(StorageFailed) as caught:
        await fetched(kavach)
    await kavach.close()

    assert caught.value.data["reason"] == "timeout"


async def test_busy_node_is_asked_again_when_it_says(kavach, nodes):
    calls = []

    async def busy_once(body):
        calls.append(1)
        return await saying("slow down", 429, **{"Retry-After": "0"})(body) if len(calls) == 1 else None

    nodes.faults = {1: busy_once, 2: silent, 3: silent}
    await keep_on(nodes, generate()[1])

    async with kavach.as_wallet(OWNER) as who:
        got = []
        async for shard in kavach.shards(who, CID):
            got.append(shard)
            if len(got) == 3:
                break

    assert len(calls) == 2


async def keep_on(nodes: KavachNodes, shards: tuple[KeyShard, ...], cid=CID) -> None:
    """Put shards there without asking nodes that may be broken."""
    entry = nodes.files.setdefault(cid.text, FileEntry(str(address_of(OWNER)).lower()))
    entry.shards |= {n: {"key": s.key, "index": s.index} for n, s in enumerate(shards, 1)}


async def test_node_that_is_busy_for_long_is_not_waited_for(kavach, nodes):
    nodes.faults = dict.fromkeys(range(1, 6), saying("", 429, **{"Retry-After": "3600"}))

    with pytest.raises(StorageFailed) as caught:
        await fetched(kavach)

    assert caught.value.data["reason"] == "busy"


async def test_nothing_to_sign_is_a_typed_error():
    async with KavachNodes() as nodes:
        kavach = Kavach(nodes.url + "/elsewhere")
        with pytest.raises(StorageFailed):
            await kavach.authorise(OWNER)
        await kavach.close()


# --- wrong shards -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cheap_derivations")
@pytest.mark.parametrize("number", range(1, 6))
async def test_one_shard_of_another_file_is_outvoted(nodes, search, number):
    key, shards = generate()
    await keep_on(nodes, shards)
    alien = generate()[1][0]
    nodes.files[CID.text].shards[number] = {"key": alien.key, "index": alien.index}

    assert await offered(search, key.reveal().decode()) <= 2


@pytest.mark.usefixtures("cheap_derivations")
async def test_set_that_needs_four_shards_is_found(nodes, search):
    key = generate()[0]
    await keep_on(nodes, split_key(key, 4, 5))

    assert await offered(search, key.reveal().decode()) == 2


@pytest.mark.usefixtures("cheap_derivations")
async def test_damaged_shard_and_dead_node_together_are_survived(nodes, search):
    key, shards = generate()
    await keep_on(nodes, shards)
    alien = generate()[1][0]
    nodes.files[CID.text].shards[2] = {"key": alien.key, "index": alien.index}
    nodes.faults[5] = dead

    assert await offered(search, key.reveal().decode()) <= 5


@pytest.mark.usefixtures("cheap_derivations")
async def test_shards_that_belong_to_nothing_end_as_wrong_key_and_are_not_tried_twice(nodes, search):
    await keep_on(nodes, tuple(generate()[1][0] for _ in range(5)))

    with pytest.raises(WrongKey, match=nodes.url.removeprefix("http://")):
        await offered(search, "no such key")
    with pytest.raises(WrongKey):
        assert [source async for source in search.candidates(HEADER, granted())] == []


async def test_same_shard_from_every_node_is_no_set(nodes, kavach):
    await keep_on(nodes, (generate()[1][0],) * 5)

    with pytest.raises(StorageFailed, match="all the same"):
        await fetched(kavach)


async def test_age_file_asks_no_node(nodes, search):
    before = len(nodes.asked)

    assert [s async for s in search.candidates(b"age-encryption.org/v1\n", granted())] == []
    assert before == len(nodes.asked)


# --- in whose name ------------------------------------------------------------------------------------------------


def as_node(kavach: Kavach, key: Secret | None = NODE) -> KavachSearch | None:
    return KeyAccess(kavach, WrongKeys(), key).of_node()


@pytest.mark.usefixtures("cheap_derivations")
async def test_node_opens_what_was_shared_with_it(kavach):
    key, shards = generate()
    await keep(kavach, shards, share_with=[address_of(NODE)])

    assert await offered(as_node(kavach), key.reveal().decode()) == 1


@pytest.mark.usefixtures("cheap_derivations")
async def test_node_opens_by_a_delegation_of_all_files_and_not_without(kavach):
    key, shards = generate()
    await keep(kavach, shards)
    with pytest.raises(AccessDenied):
        await offered(as_node(kavach), key.reveal().decode())
    async with kavach.as_wallet(OWNER) as who:
        await kavach.delegate(who, [address_of(NODE)])

    assert await offered(as_node(kavach), key.reveal().decode()) == 1


@pytest.mark.usefixtures("cheap_derivations")
async def test_somebody_elses_file_is_not_opened_for_who_registered_its_cid(kavach):
    key, shards = generate()
    await keep(kavach, shards, share_with=[address_of(NODE)])

    with pytest.raises(AccessDenied, match="does not belong"):
        await offered(as_node(kavach), key.reveal().decode(), granted(owner=STRANGER))


async def test_without_the_setting_the_node_asks_nothing(kavach):
    assert as_node(kavach, None) is None


@pytest.mark.usefixtures("cheap_derivations")
async def test_two_loads_at_once_do_not_spoil_each_others_message(kavach):
    key, shards = generate()
    await keep(kavach, shards, share_with=[address_of(NODE)])

    counts = await asyncio.gather(*(offered(as_node(kavach), key.reveal().decode()) for _ in range(4)))

    assert counts == [1] * 4


# --- opening a real file ------------------------------------------------------------------------------------------


@pytest.fixture
def opener():
    with_process = Opener(max_model_bytes=1_000_000, timeout_s=30)
    yield with_process
    with_process.close()


async def test_file_opens_with_the_second_set_of_shards(opener, nodes, search, tmp_path: Path):
    key, shards = generate()
    await keep_on(nodes, shards)
    alien = generate()[1][0]
    nodes.files[CID.text].shards[1] = {"key": alien.key, "index": alien.index}

    async def later(body):
        await asyncio.sleep(0.2)

    nodes.faults = {4: later, 5: later}
    data = lighthouse_sealed(b"the model", key.reveal())

    opened = await opener.open(blob(tmp_path, data), granted(), [], search)

    assert contents(opened) == {"model": b"the model"}


async def test_file_of_another_key_stays_shut(opener, nodes, search, tmp_path: Path):
    await keep_on(nodes, generate()[1])
    data = lighthouse_sealed(b"the model", b"another key")

    with pytest.raises(WrongKey, match="5 key shards"):
        await opener.open(blob(tmp_path, data), granted(), [], search)


async def test_source_at_hand_comes_first(opener, nodes, search, tmp_path: Path):
    asked = len(nodes.asked)
    data = lighthouse_sealed(b"the model", b"k")

    opened = await opener.open(blob(tmp_path, data), granted(), [CallerKey(Secret(b"k"))], search)

    assert contents(opened) == {"model": b"the model"}
    assert asked == len(nodes.asked)


async def test_age_file_for_others_is_a_wrong_key_with_a_search_too(opener, search, tmp_path: Path):
    with pytest.raises(WrongKey, match="sealed to other"):
        await opener.open(blob(tmp_path, sealed(b"x")), granted(), [], search)


# --- wrong keys cost once -----------------------------------------------------------------------------------------


def test_wrong_key_is_tried_once_per_file():
    wrong, me = WrongKeys(), address_of(OWNER)
    tries: list[bytes] = []

    def attempt(cid: str, text: bytes) -> None:
        with wrong.attempt(me, cid, Secret(text)):
            tries.append(text)
            if text != b"right":
                raise WrongKey("no")

    for cid in ("cid", "cid", "cid", "other cid"):
        with pytest.raises(WrongKey):
            attempt(cid, b"k")
    attempt("cid", b"right")
    attempt("cid", b"right")

    assert tries == [b"k", b"k", b"right", b"right"]


def test_wallet_that_guesses_is_stopped_and_others_are_not():
    now = [0.0]
    wrong = WrongKeys(per_minute=3, clock=lambda: now[0])
    for number in range(3):
        with pytest.raises(WrongKey), wrong.attempt(address_of(OWNER), "cid", Secret(bytes([number]))):
            raise WrongKey("no")

    with pytest.raises(RateLimited) as caught, wrong.attempt(address_of(OWNER), "cid", Secret(b"right")):
        raise AssertionError("tried")
    assert 0 < caught.value.data["retry_after"] <= 20
    with wrong.attempt(address_of(STRANGER), "cid", Secret(b"right")):
        pass
    now[0] += 20
    with wrong.attempt(address_of(OWNER), "cid", Secret(b"right")):
        pass


def test_few_wrong_keys_are_remembered_and_none_of_them_in_clear():
    wrong = WrongKeys(most=2)
    for text in (b"a", b"b", b"c"):
        wrong.remember("cid", Secret(text))

    assert [wrong.known("cid", Secret(text)) for text in (b"a", b"b", b"c")] == [False, True, True]
    assert not wrong.known("cid2", Secret(b"c"))
