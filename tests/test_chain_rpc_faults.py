"""An endpoint that breaks a rule is not used, the next one is; with none left the chain is unavailable and says why."""

from __future__ import annotations

import asyncio
import contextlib
import json
import traceback
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from divault.chain.answers import Refused, Request, Reverted
from divault.chain.records import quantity
from divault.chain.rpc import Rpc, RpcLimits
from divault.errors import ChainUnavailable, SettingsInvalid
from divault.values import Digest, Secret
from tests.rpc_stub import CHAIN_ID, GENESIS, Stub, serving

NUMBER = Request("eth_blockNumber", (), quantity)
LIMITS = RpcLimits(timeout_s=0.5, max_bytes=20_000, rest_s=0.05)


@contextlib.asynccontextmanager
async def connected(*stubs: Stub, chain_id: int | None = CHAIN_ID, **options: Any) -> AsyncIterator[Rpc]:
    rpc = Rpc([stub.url for stub in stubs], chain_id, **{"limits": LIMITS, **options})
    try:
        yield rpc
    finally:
        await rpc.close()


async def html(stub: Stub, request: web.Request, asked: Any) -> web.StreamResponse:
    return web.Response(text="<html>please log in</html>", content_type="text/html")


async def status_500(stub: Stub, request: web.Request, asked: Any) -> web.StreamResponse:
    return web.json_response(stub.answer_all(asked), status=500)


async def redirect(stub: Stub, request: web.Request, asked: Any) -> web.StreamResponse:
    return web.Response(status=307, headers={"Location": str(request.url)})


async def cut(stub: Stub, request: web.Request, asked: Any) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "100"})
    await response.prepare(request)
    await response.write(b'{"jsonrpc"')
    assert request.transport is not None
    request.transport.close()
    return response


async def slow(stub: Stub, request: web.Request, asked: Any) -> web.StreamResponse:
    await asyncio.sleep(2)
    return web.json_response(stub.answer_all(asked))


async def drip(stub: Stub, request: web.Request, asked: Any) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        for _ in range(40):
            await response.write(b" ")
            await asyncio.sleep(0.05)
    return response


async def huge(stub: Stub, request: web.Request, asked: Any) -> web.StreamResponse:
    return web.Response(text=json.dumps(stub.answer_all(asked)) + " " * 40_000)


async def zipped(stub: Stub, request: web.Request, asked: Any) -> web.StreamResponse:
    response = web.json_response(stub.answer_all(asked))
    response.headers["Content-Encoding"] = "gzip"
    return response


def says(answer: Any) -> Any:
    async def misbehave(stub: Stub, request: web.Request, asked: Any) -> web.StreamResponse:
        return web.json_response(answer(asked["id"]) if callable(answer) else answer)

    return misbehave


FAULTS = {
    "html": html,
    "status 500": status_500,
    "redirect": redirect,
    "cut": cut,
    "slow": slow,
    "drip": drip,
    "huge": huge,
    "zipped": zipped,
    "another id": says(lambda n: {"jsonrpc": "2.0", "id": n + 1, "result": "0x7"}),
    "id as text": says(lambda n: {"jsonrpc": "2.0", "id": str(n), "result": "0x7"}),
    "id true": says({"jsonrpc": "2.0", "id": True, "result": "0x7"}),
    "no version": says(lambda n: {"id": n, "result": "0x7"}),
    "result and error": says(lambda n: {"jsonrpc": "2.0", "id": n, "result": "0x7", "error": None}),
    "neither": says(lambda n: {"jsonrpc": "2.0", "id": n}),
    "error as text": says(lambda n: {"jsonrpc": "2.0", "id": n, "error": "execution reverted"}),
    "null": says(None),
    "list": says(lambda n: [{"jsonrpc": "2.0", "id": n, "result": "0x7"}]),
    "leading zero": says(lambda n: {"jsonrpc": "2.0", "id": n, "result": "0x07"}),
    "a JSON number": says(lambda n: {"jsonrpc": "2.0", "id": n, "result": 7}),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_faulty_endpoint_is_no_answer_and_the_next_one_is(fault: str) -> None:
    async with serving() as bad, serving() as good:
        bad.breaks = FAULTS[fault]
        async with connected(bad) as alone:
            with pytest.raises(ChainUnavailable, match=f"eth_blockNumber: 127.0.0.1:{bad.port} ") as caught:
                await alone.call(NUMBER)
        async with connected(bad, good) as both:
            answered = await both.call(NUMBER)

    assert answered == 7
    assert "KEY-THAT" not in "".join(traceback.format_exception(caught.value))


async def test_an_unreachable_endpoint_is_passed_over() -> None:
    gone = Stub()
    async with serving(gone):
        pass  # its port is free again
    async with serving() as good, connected(gone, good) as rpc:
        answered = await rpc.call(NUMBER)
        again = await rpc.call(NUMBER)

        assert (answered, again) == (7, 7)
    async with connected(gone) as alone:
        with pytest.raises(ChainUnavailable, match="is unreachable"):
            await alone.call(NUMBER)


async def test_an_endpoint_of_another_chain_is_refused() -> None:
    async with serving() as other, serving() as good:
        other.chain_id = 1
        async with connected(other, good) as rpc:
            assert await rpc.call(NUMBER) == 7
            assert other.counted["eth_blockNumber"] == 0  # not even asked
        async with connected(other) as alone:
            with pytest.raises(
                ChainUnavailable, match=r"another chain \(1 instead of 77002\).*DIVAULT_CHAIN_ID"
            ) as caught:
                await alone.call(NUMBER)
            assert caught.value.data == {}, "asking again helps nobody"


async def test_beside_an_endpoint_that_may_come_back_another_chain_is_no_reason_to_give_up() -> None:
    async with serving() as other, serving() as broken:
        other.chain_id, broken.breaks = 1, html
        async with connected(other, broken) as both:
            with pytest.raises(ChainUnavailable, match="Try again shortly") as caught:
                await both.call(NUMBER)
            assert caught.value.data["retry_after"] == 2


async def test_the_same_chain_id_on_another_genesis_is_refused() -> None:
    async with serving() as stub:
        async with connected(stub, genesis=Digest.parse(GENESIS)) as right:
            assert await right.call(NUMBER) == 7
        async with connected(stub, genesis=Digest(b"\x22" * 32)) as wrong:
            with pytest.raises(ChainUnavailable, match="other genesis"):
                await wrong.call(NUMBER)
        stub.genesis = None
        async with connected(stub, genesis=Digest.parse(GENESIS)) as hidden:
            with pytest.raises(ChainUnavailable, match="does not show its genesis"):
                await hidden.call(NUMBER)


async def test_two_endpoints_that_disagree_about_genesis_are_not_mixed() -> None:
    async with serving() as first, serving() as second:
        second.genesis = "0x" + "33" * 32
        async with connected(first, second) as rpc:
            assert await rpc.call(NUMBER) == 7
            first.breaks = html
            with pytest.raises(ChainUnavailable, match="other genesis"):
                await rpc.call(NUMBER)


async def test_an_endpoint_that_comes_back_as_another_chain_is_refused() -> None:
    stub = Stub()
    async with serving(stub):
        rpc = Rpc([stub.url], CHAIN_ID, limits=LIMITS)
        assert await rpc.call(NUMBER) == 7
    async with serving(stub):  # the same address, the same chain: a kept connection that is gone is no fault
        assert await rpc.call(NUMBER) == 7
    stub.chain_id = 5
    async with serving(stub):  # the same address, another chain
        with pytest.raises(ChainUnavailable, match="another chain"):
            await rpc.call(NUMBER)
    await rpc.close()


async def test_a_chain_id_that_is_not_configured_is_learned_once() -> None:
    async with serving() as first, serving() as second:
        second.chain_id = 5
        async with connected(first, second, chain_id=None) as rpc:
            assert await rpc.connect() == CHAIN_ID
            first.breaks = html
            with pytest.raises(ChainUnavailable, match=r"another chain \(5 instead of 77002\)"):
                await rpc.call(NUMBER)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ({"code": 3, "message": "execution reverted", "data": "0x"}, "execution reverted"),
        ({"code": 3, "message": "x", "data": "0x08c379a0" + f"{32:064x}{4:064x}" + "6e6f7065".ljust(64, "0")}, "nope"),
        ({"code": -32603, "message": "VM Exception", "data": {"data": "0x4e487b71" + f"{0x11:064x}"}}, "panic 0x11"),
        ({"code": -32000, "message": "execution reverted", "data": "0xdeadbeef"}, "error deadbeef"),
        ({"code": -32000, "message": "out of gas"}, "out of gas"),
        ({"code": 3, "message": "y", "data": "0x08c379a0" + "ff" * 64}, ""),
    ],
)
async def test_a_failed_execution_is_an_answer_and_not_an_outage(error: dict[str, Any], reason: str) -> None:
    async with serving() as first, serving() as second, connected(first, second) as rpc:
        first.answers["eth_estimateGas"] = {"error": error}
        with pytest.raises(Reverted) as caught:
            await rpc.call(Request("eth_estimateGas", (), quantity))

    assert caught.value.reason == reason
    assert second.counted["eth_estimateGas"] == 0


async def test_a_refusal_is_asked_of_the_next_endpoint_and_kept_when_all_refuse() -> None:
    async with serving() as behind, serving() as good, connected(behind, good) as rpc:
        behind.answers["eth_blockNumber"] = {"error": {"code": -32000, "message": "header not found"}}
        assert await rpc.call(NUMBER) == 7
        good.answers["eth_blockNumber"] = {"error": {"code": -32005, "message": "limit\x1b[2J exceeded"}}
        with pytest.raises(Refused, match=r"limit\?\[2J exceeded"):
            await rpc.call(NUMBER)


async def test_a_providers_words_about_the_key_are_not_repeated(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as stub, connected(stub) as rpc:
        stub.answers["eth_blockNumber"] = {
            "error": {"code": -32005, "message": "KEY-THAT-NOBODY-SEES is over its limit"}
        }
        with pytest.raises(Refused) as caught:
            await rpc.call(NUMBER)
        stub.breaks = says({"jsonrpc": "2.0", "id": None, "error": {"code": 1, "message": "KEY-THAT-NOBODY-SEES?"}})
        with pytest.raises(ChainUnavailable) as outage:
            await rpc.batch([NUMBER, NUMBER])

    assert caught.value.message == "*** is over its limit"
    assert "KEY-THAT" not in outage.value.detail
    assert "KEY-THAT" not in caplog.text


async def test_a_batch_is_matched_by_id_and_split_at_the_limit() -> None:
    async def reversed_order(stub: Stub, request: web.Request, asked: Any) -> web.StreamResponse:
        return web.json_response(
            list(reversed(stub.answer_all(asked))) if isinstance(asked, list) else stub.answer(asked)
        )

    async with serving() as stub:
        stub.answers["b"] = {"result": "0xb"}
        stub.breaks = reversed_order
        async with connected(stub, limits=RpcLimits(timeout_s=1, max_batch=3)) as rpc:
            await rpc.connect()
            before = rpc.round_trips
            answers = await rpc.batch([NUMBER, Request("b", (), quantity), NUMBER, Request("c", (), quantity)])

            assert answers[:3] == [7, 11, 7]
            assert isinstance(answers[3], Refused)
            assert rpc.round_trips - before == 2
            assert await rpc.batch([]) == []


@pytest.mark.parametrize(
    "answer",
    [
        {"jsonrpc": "2.0", "id": None, "error": {"code": -32600, "message": "batches are not supported"}},
        [],
        [{"jsonrpc": "2.0", "id": 3, "result": "0x7"}, {"jsonrpc": "2.0", "id": 3, "result": "0x7"}],
    ],
)
async def test_a_batch_answered_in_part_or_twice_is_no_answer(answer: Any) -> None:
    async with serving() as stub, connected(stub) as rpc:
        stub.breaks = says(answer)
        with pytest.raises(ChainUnavailable):
            await rpc.batch([NUMBER, NUMBER])


@pytest.mark.parametrize(
    "url", ["", " , ", "ws://h/SECRET", "ftp://h/SECRET", "http:///SECRET", "SECRET", "http://h:99999/SECRET"]
)
def test_an_unusable_url_is_a_settings_error_that_does_not_repeat_it(url: str) -> None:
    with pytest.raises(SettingsInvalid) as caught:
        Rpc.parse(Secret.of_text(url), CHAIN_ID)

    assert "SECRET" not in str(caught.value)
    assert caught.value.data == {"setting": "WEB3_PROVIDER_URL"}


def test_only_host_and_port_of_an_url_are_shown() -> None:
    rpc = Rpc.parse(Secret.of_text("https://user:PASS@a.example/v2/KEY, http://b.example:8545/?k=KEY"), 8453)

    assert repr(rpc) == "Rpc(a.example:443, b.example:8545, chain 8453)"
