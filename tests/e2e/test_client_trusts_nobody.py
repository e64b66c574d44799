"""The client against nodes that lie, lose answers or changed: it never returns what it can't prove."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import orjson
import pytest
from aiohttp import web

from divault.client import AsyncClient
from divault.errors import (
    DeadlineExceeded,
    ModelFailed,
    NodeUntrusted,
    NotReady,
    PaymentRequired,
    PriceChanged,
    ReceiptInvalid,
    ResultUnknown,
    SignatureInvalid,
)
from divault.messages import Domain, address_of, parse_key, signature_text
from divault.receipts.fields import RECEIPT
from divault.values import Secret, Usdc
from tests.e2e.conftest import World
from tests.e2e.test_http_identity import published
from tests.e2e.test_http_payment import PRICE, balances, priced

pytestmark = pytest.mark.asyncio(loop_scope="session")
Change = Callable[[str, bytes], bytes | None]
"""What becomes of an answer, by its path; None: the connection is cut instead."""


@asynccontextmanager
async def between(world: World, change: Change, *, problem: bool = False) -> AsyncIterator[str]:
    """Stand between the client and the real node; gives the URL that the client is told.

    With `problem` an answer that was changed comes as a problem document.
    """

    async def relay(request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        headers = {k: v for k, v in request.headers.items() if k.lower() not in ("host", "content-length")}
        async with (
            aiohttp.ClientSession() as session,
            session.request(request.method, world.node.url + request.path_qs, data=raw, headers=headers) as answer,
        ):
            told = await answer.read()
            body = change(request.path, told)
            if body is None:
                assert request.transport is not None
                request.transport.close()
                return web.Response()
            if problem and body != told:
                return web.Response(body=body, status=503, content_type="application/problem+json")
            return web.Response(
                body=body, status=answer.status, headers={"content-type": answer.headers["content-type"]}
            )

    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{tail:.*}", relay)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def client(world: World, url: str, key: Secret, **rest: str) -> AsyncClient:
    return AsyncClient(
        url,
        key,
        rpc=world.chain.devnet.url,
        known_nodes=world.folder / f"{secrets.token_hex(4)}.json",
        timeout_s=30,
        **rest,
    )


def altered_result(path: str, raw: bytes) -> bytes:
    return raw.replace(b'"predictions":[', b'"predictions":[7', 1)


async def test_an_altered_result_is_not_returned(world: World) -> None:
    model, key = await published(world), await world.consumer()
    async with between(world, altered_result) as url, client(world, url, key) as liar:
        with pytest.raises(ReceiptInvalid) as refused:
            await liar.run(model.text, {"features": world.trained.rows[0]})

    assert refused.value.data["field"] == "output"


async def test_a_receipt_that_calls_this_wallet_a_contract_is_not_believed(world: World) -> None:
    """Its request's signature could not be checked then."""
    model, key = await published(world), await world.consumer()

    def disowned(path: str, raw: bytes) -> bytes:
        return raw.replace(b'"request_signer":null', b'"request_signer":"contract"', 1)

    async with between(world, disowned) as url, client(world, url, key) as liar:
        with pytest.raises(ReceiptInvalid) as refused:
            await liar.run(model.text, {"features": world.trained.rows[0]})

    assert refused.value.data["field"] == "request_signer"


async def test_an_old_answer_is_not_taken_for_a_new_one(world: World) -> None:
    model, key = await published(world), await world.consumer()
    kept: list[bytes] = []

    def replayed(path: str, raw: bytes) -> bytes:
        if path.endswith("/inference/run"):
            kept.append(raw)
            return kept[0]
        return raw

    async with between(world, replayed) as url, client(world, url, key) as liar:
        await liar.run(model.text, {"features": world.trained.rows[0]})
        with pytest.raises(ReceiptInvalid) as refused:
            await liar.run(model.text, {"features": world.trained.rows[0]})

    assert refused.value.data["field"] == "requestHash"


async def test_a_node_that_is_not_the_pinned_one_gets_no_request(world: World) -> None:
    model, key = await published(world), await world.consumer()
    seen: list[str] = []

    def watch(path: str, raw: bytes) -> bytes:
        seen.append(path)
        return raw

    stranger = str(address_of(Secret(secrets.token_bytes(32))))
    async with between(world, watch) as url, client(world, url, key, node=stranger) as pinned:
        with pytest.raises(NodeUntrusted):
            await pinned.run(model.text, {"features": world.trained.rows[0]})

    assert seen == ["/api/v1/node"]


async def test_a_node_that_changed_behind_its_url_is_refused(world: World, tmp_path: Path) -> None:
    model, key = await published(world), await world.consumer()
    known = tmp_path / "known.json"
    async with between(world, lambda _, raw: raw) as url:
        async with AsyncClient(url, key, known_nodes=known) as first:
            await first.run(model.text, {"features": world.trained.rows[0]})
        known.write_bytes(orjson.dumps({url: str(address_of(Secret(secrets.token_bytes(32))))}))
        async with AsyncClient(url, key, known_nodes=known) as later:
            with pytest.raises(NodeUntrusted) as refused:
                await later.run(model.text, {"features": world.trained.rows[0]})

    assert refused.value.data["have"] == str(address_of_node(world))


def address_of_node(world: World) -> str:
    state = world.node.folder / "state" / "node.key"
    return str(address_of(parse_key(state.read_text().strip())))


async def test_a_descriptor_signed_by_somebody_else_is_refused(world: World) -> None:
    key = await world.consumer()

    def renamed(path: str, raw: bytes) -> bytes:
        members = orjson.loads(raw)
        if path == "/api/v1/node":
            members["descriptor"]["descriptor"]["ageRecipient"] = "age1somebodyelse"
        return orjson.dumps(members)

    async with between(world, renamed) as url, client(world, url, key) as liar:
        with pytest.raises(NodeUntrusted):
            await liar.node()


async def test_lost_answers_of_a_paid_call_cost_one_price(world: World) -> None:
    model, key = await priced(world), await world.consumer()
    before = await balances(world, key)
    lost: list[str] = []

    def lossy(path: str, raw: bytes) -> bytes | None:
        if path.endswith("/inference/run") and b'"receipt"' in raw and len(lost) < 5:
            lost.append(path)
            return None
        return raw

    async with between(world, lossy) as url, client(world, url, key) as unlucky:
        result = await unlucky.run(model.text, {"features": world.trained.rows[0]}, max_price="0.02")

    after = await balances(world, key)
    assert len(lost) == 5
    assert (before[0] - after[0], after[1] - before[1]) == (PRICE.atomic, PRICE.atomic)
    assert result.price == PRICE


async def test_lost_answers_of_a_prepaid_call_cost_one_price(world: World) -> None:
    model, key = await priced(world), await world.consumer()
    async with world.client(key) as direct:
        node = await direct.node()
    from divault.chain.wallet import Wallet

    wallet = Wallet(key, world.chain.chain)
    paid = await wallet.pay(world.chain.usdc, world.chain.publisher.address, Usdc(3 * PRICE.atomic), node.address)
    async with world.client(key) as direct:
        await direct.run(
            model.text, {"features": world.trained.rows[0]}, max_price="0.02", payment=str(paid.transaction_hash)
        )
    lost: list[str] = []

    def lossy(path: str, raw: bytes) -> bytes | None:
        if path.endswith("/inference/run") and len(lost) < 3:
            lost.append(path)
            return None
        return raw

    async with between(world, lossy) as url, client(world, url, key) as unlucky:
        await unlucky.run(model.text, {"features": world.trained.rows[0]}, max_price="0.02")  # draws on credit
    async with world.client(key) as direct:
        await direct.run(model.text, {"features": world.trained.rows[0]}, max_price="0.02")
        before = await balances(world, key)
        await direct.run(model.text, {"features": world.trained.rows[0]}, max_price="0.02")  # credit is used up: pays

    assert (await balances(world, key))[0] == before[0] - PRICE.atomic


async def test_an_offer_that_asks_too_much_is_not_paid(world: World) -> None:
    model, key = await priced(world), await world.consumer()
    before = await balances(world, key)

    def dearer(path: str, raw: bytes) -> bytes:
        return raw.replace(b'"20000"', b'"900000"') if b'"payment_required"' in raw else raw

    async with between(world, dearer) as url, client(world, url, key) as careful:
        result = await careful.run(model.text, {"features": world.trained.rows[0]}, max_price="0.02")
        with pytest.raises(PriceChanged):
            await careful.run(model.text, {"features": world.trained.rows[0]}, max_price="0.01")

    assert result.price == PRICE
    assert (await balances(world, key))[0] == before[0] - PRICE.atomic


async def test_a_relay_gets_no_header_signature_that_its_target_takes(world: World) -> None:
    """Header signatures name a node by host and port alone, so the client must not let anybody else name them."""
    model, key = await published(world), await world.consumer()
    async with world.client(key) as direct:
        await direct.run(model.text, {"features": world.trained.rows[0]})
    async with between(world, lambda _, raw: raw) as url, client(world, url, world.operator) as relayed:
        with pytest.raises(SignatureInvalid):
            await relayed.unload(model.text)
    async with world.client(key) as direct:
        assert model.text in [row["model_id"] for row in await direct.models()]


async def test_header_signatures_reach_this_machine_by_either_name(world: World) -> None:
    key = await world.consumer()
    async with client(world, world.node.url.replace("127.0.0.1", "localhost"), key) as local:
        with pytest.raises(ResultUnknown):
            await local.stored("0x" + "11" * 32)


async def test_a_node_without_a_rail_is_not_paid(world: World) -> None:
    model, key = await priced(world), await world.consumer()
    before = await balances(world, key)

    def railless(_: str, raw: bytes) -> bytes:
        return raw.replace(b'"rails":["transfer"]', b'"rails":[]') if b'"payment_required"' in raw else raw

    async with between(world, railless) as url, client(world, url, key) as careful:
        with pytest.raises(PaymentRequired):
            await careful.run(model.text, {"features": world.trained.rows[0]}, max_price="0.02")

    assert await balances(world, key) == before


async def test_a_receipt_for_another_model_is_refused(world: World) -> None:
    """Signed by the node itself, and bound to this very request."""
    model, key = await published(world), await world.consumer()
    node_key = parse_key((world.node.folder / "state" / "node.key").read_text().strip())

    def renamed(path: str, raw: bytes) -> bytes:
        if not path.endswith("/inference/run"):
            return raw
        answer = orjson.loads(raw)
        envelope = answer["receipt"]
        envelope["receipt"]["modelId"] = "0x" + "77" * 32
        digest = Domain.parse(envelope["domain"]).digest(RECEIPT.hash(RECEIPT.parse(envelope["receipt"])))
        envelope |= {"receipt_hash": str(digest), "signature": signature_text(node_key, digest)}
        envelope |= {"request": None, "checksums": None}
        return orjson.dumps(answer)

    async with between(world, renamed) as url, client(world, url, key) as liar:
        with pytest.raises(ReceiptInvalid) as refused:
            await liar.run(model.text, {"features": world.trained.rows[0]})

    assert refused.value.data["field"] == "modelId"


@pytest.mark.parametrize("member", [b'"x"', b"[]", b"-1", b"1e308"])
async def test_a_strange_wish_to_wait_is_no_crash(world: World, member: bytes) -> None:
    model, key = await published(world), await world.consumer()
    busy = b'{"code":"overloaded","detail":"busy","retry_after":' + member + b"}"
    tries: list[str] = []

    def once_busy(path: str, raw: bytes) -> bytes:
        tries.append(path)
        return busy if tries.count(path) == 1 and path.endswith("/inference/run") else raw

    async with between(world, once_busy, problem=True) as url, client(world, url, key) as patient:
        result = await patient.run(model.text, {"features": world.trained.rows[0]})

    assert result.output["predictions"]


async def test_what_is_no_node_is_told_apart(world: World) -> None:
    key = await world.consumer()
    async with between(world, lambda _, __: b"<html>hello</html>") as url, client(world, url, key) as lost:
        with pytest.raises(NodeUntrusted):
            await lost.node()
    async with client(world, "http://127.0.0.1:9", key) as nobody:
        with pytest.raises(NotReady):
            await nobody.node()


async def test_a_paid_call_without_an_answer_keeps_its_payment_findable(world: World) -> None:
    """The node may not have taken the claim; where it answers that it ran, it has."""
    model, key = await priced(world), await world.consumer()

    def pending(path: str, raw: bytes) -> bytes:
        unpaid = b'"payment_required"' in raw or not path.endswith("/inference/run")
        return raw if unpaid else b'{"code":"payment_pending","detail":"not final yet"}'

    def failed(path: str, raw: bytes) -> bytes:
        return pending(path, raw).replace(b"payment_pending", b"model_failed")

    notes = []
    for change, refusal in ((pending, DeadlineExceeded), (failed, ModelFailed)):
        async with between(world, change, problem=True) as url:
            hasty = AsyncClient(url, key, rpc=world.chain.devnet.url, known_nodes=world.folder / url[-5:], timeout_s=5)
            async with hasty:
                with pytest.raises(refusal) as refused:
                    await hasty.run(model.text, {"features": world.trained.rows[0]}, max_price="0.02")
        notes.append(refused.value.__notes__[-1])
        if change is pending:
            key = await world.consumer()

    assert "pass it as payment=" in notes[0]
    assert "it is credit at this node now" in notes[1]
