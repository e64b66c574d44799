"""What `divault doctor` and `/health` say of gateways and key nodes: all of them, and which one is at fault."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from divault.cli.diagnosis import Finding, diagnose
from divault.settings import Settings
from divault.storage.local import LocalStore
from divault.testing.lighthouse import LighthouseDouble
from tests.fault_gateway import Ask, FaultGateway, Line


async def finding(name: str, tmp_path: Path, **settings: str) -> Finding:
    environment = {
        "WEB3_PROVIDER_URL": "http://127.0.0.1:9",
        "MODEL_CACHE_DIR": str(tmp_path / "cache"),
        "DIVAULT_STATE_DIR": str(tmp_path / "state"),
        **settings,
    }
    (found,) = [test for test in await diagnose(Settings.load(environment)) if test.name == name]
    return found


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[FaultGateway]:
    async with FaultGateway(LocalStore(tmp_path / "store")) as gateway:
        yield gateway


async def plain_files(ask: Ask, body: bytes | None, line: Line) -> bool:
    await line.ok(b"", "404 Not Found")
    return False


async def test_each_gateway_is_named_with_what_it_serves(gateway: FaultGateway, tmp_path: Path) -> None:
    async with FaultGateway(LocalStore(tmp_path / "other"), plain_files) as plain:
        found = await finding("gateways", tmp_path, DIVAULT_GATEWAY_URLS=f"{gateway.url},{plain.url}")

    assert found.ok
    assert f"{_host(gateway)} (trustless)" in found.detail
    assert f"{_host(plain)} (plain files only)" in found.detail


async def test_a_silent_gateway_is_at_fault_although_another_serves(gateway: FaultGateway, tmp_path: Path) -> None:
    async with FaultGateway(LocalStore(tmp_path / "gone")) as gone:
        pass
    found = await finding("gateways", tmp_path, DIVAULT_GATEWAY_URLS=f"{gone.url},{gateway.url}")

    assert not found.ok
    assert _host(gone) in found.detail
    assert "DIVAULT_GATEWAY_URLS" in found.detail
    assert f"{_host(gateway)} (trustless)" in found.detail


async def test_key_nodes_are_asked_where_the_node_uses_them(tmp_path: Path) -> None:
    async with LighthouseDouble(tmp_path / "lighthouse") as double:
        host = double.settings()["DIVAULT_LIGHTHOUSE_ENCRYPTION_URL"]
        found = await finding(
            "key nodes", tmp_path, DIVAULT_KAVACH_DELEGATION="1", DIVAULT_LIGHTHOUSE_ENCRYPTION_URL=host
        )
        assert found.ok, found.detail
    silent = await finding("key nodes", tmp_path, DIVAULT_KAVACH_DELEGATION="1", DIVAULT_LIGHTHOUSE_ENCRYPTION_URL=host)

    assert not silent.ok
    assert host.removeprefix("http://") in silent.detail


def _host(gateway: FaultGateway) -> str:
    return gateway.url.removeprefix("http://")
