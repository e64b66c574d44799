"""What `divault doctor` and `/health` say: every gateway and key node, and what would keep the node from starting."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from divault import app
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
        "DIVAULT_LOG_DIR": str(tmp_path / "logs"),
        "PORT": "0",
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


async def test_no_gateway_at_all_is_a_fault_unless_lighthouse_has_one(gateway: FaultGateway, tmp_path: Path) -> None:
    none = await finding("gateways", tmp_path, DIVAULT_GATEWAY_URLS=",")
    own = await finding("gateways", tmp_path, DIVAULT_GATEWAY_URLS=",", DIVAULT_LIGHTHOUSE_GATEWAY_URLS=gateway.url)

    assert (none.ok, "name one in DIVAULT_GATEWAY_URLS" in none.detail) == (False, True)
    assert own.ok, own.detail


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


async def test_a_device_is_looked_for_in_a_worker(tmp_path: Path) -> None:
    found = await finding("device", tmp_path, DIVAULT_DEVICE="cuda:99")

    assert not found.ok
    assert "the device 'cuda:99' is not here" in found.detail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
async def test_a_cache_that_cannot_be_written_is_told_with_the_fix(
    number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write = Path.write_bytes

    def fail(path: Path, content: bytes) -> int:
        if path.name.startswith(".doctor-"):
            path.touch()  # a full disk takes the name and no content
            raise OSError(number, os.strerror(number), str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fail)
    found = await finding("disk", tmp_path)

    assert not found.ok
    assert "set MODEL_CACHE_DIR" in found.detail
    assert ("there is no room, free some" in found.detail) is (number == errno.ENOSPC)
    assert "Errno" not in found.detail
    assert list((tmp_path / "cache").iterdir()) == []


async def test_the_log_is_opened_where_the_node_writes_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    good = await finding("log", tmp_path, DIVAULT_LOG_DIR=str(tmp_path / "logs"))
    bad = await finding("log", tmp_path, DIVAULT_LOG_DIR=str(tmp_path / "file"))
    none = await finding("log", tmp_path, DIVAULT_LOG_DIR="")

    assert (good.ok, bad.ok, none.ok) == (True, False, True)
    assert "DIVAULT_LOG_DIR" in bad.detail


async def test_the_address_is_listened_on(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        in_use = await finding("address", tmp_path, HOST="127.0.0.1", PORT=port)
    free = await finding("address", tmp_path, HOST="127.0.0.1", PORT=port)
    elsewhere = await finding("address", tmp_path, HOST="192.0.2.1")  # of nobody: RFC 5737
    unknown = await finding("address", tmp_path, HOST="no-such-host.invalid")

    assert (in_use.ok, "set PORT" in in_use.detail) == (False, True)
    assert (free.ok, free.detail) == (True, f"http://127.0.0.1:{port} is free")
    assert (elsewhere.ok, "set HOST" in elsewhere.detail) == (False, True)
    assert (unknown.ok, "set HOST" in unknown.detail) == (False, True)


async def test_the_library_for_traces_is_looked_for_where_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = await finding("traces", tmp_path, DIVAULT_OTLP_ENDPOINT="http://127.0.0.1:9/v1/traces")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    missing = await finding("traces", tmp_path, DIVAULT_OTLP_ENDPOINT="http://127.0.0.1:9/v1/traces")

    assert (here.ok, missing.ok) == (True, False)
    assert "otel" in missing.detail


@pytest.mark.parametrize("name", ["keys", "state", "disk", "log"])
async def test_nothing_is_written_where_models_read_libraries(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(app, "library_paths", lambda: [tmp_path.resolve()])
    found = await finding(name, tmp_path)

    assert (found.ok, "DIVAULT_STATE_DIR lies among" in found.detail) == (False, True)
    assert list(tmp_path.iterdir()) == []


def _host(gateway: FaultGateway) -> str:
    return gateway.url.removeprefix("http://")
