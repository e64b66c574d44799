"""Finding, starting and stopping a devnet: what is missing is named, and a wrong chain is never written to."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from divault.devnet import anvil, start_devnet
from divault.devnet.anvil import AnvilProcess, find_anvil
from divault.errors import ChainUnavailable, SettingsInvalid


@pytest.fixture
def no_pyrevm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyrevm", None)


@pytest.fixture
def no_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(anvil, "_CHECKOUT", tmp_path)


def executable(folder: Path, script: str) -> Path:
    path = folder / "anvil"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_without_pyrevm_anvil_takes_over(no_pyrevm: None) -> None:
    with start_devnet() as devnet:
        assert devnet.name == "anvil"


def test_with_pyrevm_the_chain_is_embedded() -> None:
    with start_devnet() as devnet:
        assert devnet.name == "embedded"


def test_neither_says_what_to_install(no_pyrevm: None, no_tools: None) -> None:
    with pytest.raises(SettingsInvalid, match=r"divault\[devnet\].*anvil"):
        start_devnet(environ={"PATH": ""})
    with pytest.raises(SettingsInvalid, match="pyrevm"):
        start_devnet(anvil=False)
    with pytest.raises(SettingsInvalid, match="DIVAULT_ANVIL"):
        start_devnet(anvil=True, environ={})


def test_named_anvil_comes_before_the_one_on_path(tmp_path: Path, no_tools: None) -> None:
    (tmp_path / "named").mkdir()
    named, found = executable(tmp_path / "named", "true"), executable(tmp_path, "true")

    assert find_anvil({"DIVAULT_ANVIL": str(named), "PATH": str(tmp_path)}) == named
    assert find_anvil({"PATH": str(tmp_path)}) == found
    assert find_anvil({"PATH": ""}) is None
    with pytest.raises(SettingsInvalid, match="DIVAULT_ANVIL"):
        find_anvil({"DIVAULT_ANVIL": str(tmp_path / "missing")})


def test_anvil_that_dies_at_start_is_told_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(ChainUnavailable, match="out of luck"):
        AnvilProcess(executable(tmp_path, "echo out of luck; exit 3"), 77001)


def test_file_that_can_t_be_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "anvil"
    path.write_bytes(b"\x7fELF not really")
    path.chmod(0o755)

    with pytest.raises(SettingsInvalid, match="can't be started"):
        start_devnet(anvil=True, environ={"DIVAULT_ANVIL": str(path)})


def test_somebody_else_s_chain_is_never_written_to(tmp_path: Path) -> None:
    """A program that claims the port of another chain: the chain id gives it away before the first write."""
    with start_devnet(anvil=False, chain_id=77099) as other:
        port = other.url.rpartition(":")[2]
        script = f"echo Listening on 127.0.0.1:{port}; exec sleep 60"
        before = other.rpc("eth_getBlockByNumber", "latest", True)
        with pytest.raises(ChainUnavailable, match="not the anvil that was started"):
            start_devnet(anvil=True, environ={"DIVAULT_ANVIL": str(executable(tmp_path, script))})

        assert other.rpc("eth_getBlockByNumber", "latest", True) == before


def test_closing_ends_the_process() -> None:
    path = find_anvil({"PATH": ""})
    assert path is not None, "make setup puts anvil into .venv/tools/bin"
    process = AnvilProcess(path, 77001)
    assert process.alive()
    assert Path(f"/proc/{process.pid}").exists()

    process.close()
    process.close()
    assert not process.alive()
    assert not Path(f"/proc/{process.pid}").exists()


async def test_devnet_is_an_async_context_too() -> None:
    async with start_devnet(anvil=False) as devnet:
        assert devnet.rpc("eth_blockNumber") == "0x0"
    with pytest.raises(ChainUnavailable):
        devnet.rpc("eth_blockNumber")
