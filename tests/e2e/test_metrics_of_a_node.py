"""A real node's figures: calls, refusals, payments and models show up; who asks from elsewhere sees no such route."""

from __future__ import annotations

import asyncio
import json

import pytest

from divault.cli.top import Reading, read
from divault.errors import AccessDenied, NotReady
from tests.e2e.conftest import World

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def look(world: World) -> Reading:
    return await asyncio.to_thread(read, world.node.url)


async def test_calls_refusals_and_payments_are_counted(world: World) -> None:
    model = (await world.publish("metered", price="0.02")).text
    member, stranger = await world.consumer(), await world.consumer(tokens=0)
    before = await look(world)
    async with world.client(member) as client:
        result = await client.run(model, {"features": world.trained.rows[0]}, max_price="0.02")
    async with world.client(stranger) as client:
        with pytest.raises(AccessDenied):
            await client.run(model, {"features": world.trained.rows[0]}, max_price="0.02")
    after = await look(world)

    def more(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    assert more("divault_receipts_total", status="ok") == 1
    assert more("divault_receipts_total", status="refused") == 1
    assert more("divault_charged_atomic_total") == 20_000
    assert more("divault_refusals_total", code="access_denied") == 1
    assert more("divault_load_seconds_count", outcome="ok") == 1
    assert more("divault_requests_total", route="/api/v1/inference/run", status="200") == 1
    for step in ("authenticate", "known", "gate", "hold", "open", "run", "charge"):
        assert more("divault_step_seconds_count", step=step) >= 1, step
    assert after.value("divault_model_up", model=model) == 1
    assert after.value("divault_model_pass_callers_sum", model=model) == 1
    assert after.value("divault_model_memory_bytes", model=model) > 10_000_000
    assert after.value("divault_chain_head_block") > 0
    async with asyncio.timeout(10):  # it is looked at once in five seconds
        while not (await look(world)).value("divault_cache_entries"):
            await asyncio.sleep(0.5)
    assert result.price.atomic == 20_000


async def test_nothing_of_callers_is_in_figures_or_logs(world: World) -> None:
    model = (await world.publish("unnamed")).text
    key = await world.consumer()
    async with world.client(key) as client:
        await client.run(model, {"features": world.trained.rows[0]})
        wallet = str(client.address).lower().removeprefix("0x")
    await world.request("POST", "/api/v1/inference?token=tell-nobody", json={"model_id": "tell-nobody"})
    _, _, headers = await world.request("GET", "/tell-nobody")
    _, _, told = await world.request("GET", "/api/v1/node")
    figures = str((await look(world)).samples).lower()
    logged = (world.node.folder / "logs/div-backend.log").read_text().lower()

    assert wallet not in figures
    assert "tell-nobody" not in figures + logged
    assert wallet not in logged
    lines = [json.loads(line) for line in logged.splitlines()]
    assert any(line["event"] == "request" and line["request_id"] == headers["x-request-id"] for line in lines)
    assert told["x-request-id"].startswith("0x")
    assert headers["divault-code"] == "route_unknown"


async def test_through_a_proxy_there_is_no_such_route(world: World) -> None:
    status, body, _ = await world.request("GET", "/metrics", headers={"X-Forwarded-For": "127.0.0.1"})

    assert (status, body["code"]) == (404, "route_unknown")


async def test_a_node_may_show_them_to_nobody(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    async with world.other_node(tmp_path_factory.mktemp("quiet"), DIVAULT_METRICS="off") as node:
        status, _, _ = await world.request("GET", "/metrics", node)
        with pytest.raises(NotReady, match="DIVAULT_METRICS"):
            await asyncio.to_thread(read, node.url)

    assert status == 404


async def test_the_command_prints_them_once(world: World) -> None:
    process = await asyncio.create_subprocess_exec(
        *("divault", "top", world.node.url, "--once"), stdout=asyncio.subprocess.PIPE, env={"PATH": _path()}
    )
    out, _ = await process.communicate()

    assert process.returncode == 0
    assert b"callers/pass" in out
    assert b"route_unknown" in out or b"requests" in out


def _path() -> str:
    import sys
    from pathlib import Path

    return str(Path(sys.executable).parent)
