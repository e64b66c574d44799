"""Settings that can't work are refused when they are read, by the name of the variable and in words that help."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from divault import cli
from divault.errors import SettingsInvalid
from divault.settings import Settings, variables
from tests.test_cli_files import divault

VAULT = "0x" + "11" * 20


def refused(**variables: str) -> SettingsInvalid:
    with pytest.raises(SettingsInvalid) as caught:
        Settings.load(variables, env_file=None)
    return caught.value


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("INFERENCE_TIMEOUT_SECONDS", "inf", "finite"),
        ("INFERENCE_TIMEOUT_SECONDS", "1e300", "less than or equal to 86400"),
        ("DIVAULT_LOAD_TIMEOUT_SECONDS", "nan", "finite"),
        ("DIVAULT_HEAD_TTL_SECONDS", "inf", "finite"),
        ("DIVAULT_MODEL_MEMORY_MB", "1", "no model fits"),
        ("DIVAULT_MODEL_MEMORY_MB", "249", "no model fits"),
        ("DIVAULT_MODEL_MEMORY_MB", "-1", "greater than or equal to 0"),
        ("DIVAULT_DEVICE", "cpu:1", "none of auto, cpu, mps, cuda and cuda:N"),
        ("DIVAULT_OTLP_ENDPOINT", "nonsense", "begins with http:// or https://"),
        ("DIVAULT_OTLP_ENDPOINT", "http://collector:port/v1/traces", "is no URL"),
        ("DIVAULT_PUBLIC_URL", "nonsense", "begins with http:// or https://"),
        ("DIVAULT_PUBLIC_URL", "https://me:secret@node.example", "without a name or password"),
        ("DIVAULT_GATEWAY_URLS", "http://127.0.0.1:8080,gateway.example", "'***' is no URL"),
        ("DIVAULT_STORE_URL", "ftp://store.example", "begins with http:// or https://"),
        ("DIVAULT_CORS_ORIGINS", "nonsense", "no origin"),
        ("DIVAULT_CORS_ORIGINS", "https://shop.example,https://shop.example/", "no origin"),
        ("DIVAULT_CORS_ORIGINS", "https://Shop.example", "no origin"),
        ("DIVAULT_CORS_ORIGINS", "https://shop.example:443", "no origin"),
        ("VAULT_CONTRACT_ADDRESS", "hello", "hex digits"),
        ("DIVAULT_OPERATORS", f"{VAULT},hello", "hex digits"),
    ],
)
def test_what_cannot_work_is_refused_by_its_name(name: str, value: str, words: str) -> None:
    error = refused(**{name: value})

    assert error.data["setting"] == name
    assert error.detail.startswith(f"{name}: ")
    assert words in error.detail
    assert "secret" not in error.detail


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("INFERENCE_TIMEOUT_SECONDS", "86400"),
        ("DIVAULT_MODEL_MEMORY_MB", "0"),
        ("DIVAULT_MODEL_MEMORY_MB", "250"),
        ("DIVAULT_DEVICE", "cuda:1"),
        ("DIVAULT_OTLP_ENDPOINT", "http://127.0.0.1:4318/v1/traces"),
        ("DIVAULT_PUBLIC_URL", "https://node.example/below"),
        ("DIVAULT_GATEWAY_URLS", "http://[::1]:8080"),
        ("DIVAULT_CORS_ORIGINS", "*"),
        ("DIVAULT_CORS_ORIGINS", "https://shop.example, http://localhost:3000, chrome-extension://abcdef"),
    ],
)
def test_what_can_work_is_taken_as_it_is(name: str, value: str) -> None:
    found = getattr(Settings.load({name: value}, env_file=None), name.lower())

    shown = ", ".join(found) if isinstance(found, tuple) else str(found)
    assert shown.removesuffix(".0") == value


def test_the_environment_stands_over_the_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("PORT=1\nHOST=127.0.0.1\n")
    found = variables({"PORT": "2"}, env_file=tmp_path / ".env")

    assert found == {"PORT": "2", "HOST": "127.0.0.1"}


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"HOST=\xff\n")
    done = divault("config", cwd=tmp_path)

    assert (done.returncode, done.stderr) == (1, "error: .env is no text in UTF-8\n  code: settings_invalid\n")


@pytest.mark.parametrize("port", ["99999", "-1"])
def test_a_port_of_the_command_line_is_checked_like_one_of_the_settings(port: str, tmp_path: Path) -> None:
    done = divault("serve", "--port", port, cwd=tmp_path)

    assert (done.returncode, "setting=PORT" in done.stderr) == (1, True), done.stderr


def test_a_state_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = divault("keys", "node", cwd=tmp_path, DIVAULT_STATE_DIR="file")

    assert (done.returncode, "the folder of file/node.key can't be made" in done.stderr) == (1, True), done.stderr


def test_a_log_that_cannot_be_written_is_named_before_the_node_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = divault("serve", cwd=tmp_path, DIVAULT_LOG_DIR="file", VAULT_CONTRACT_ADDRESS=VAULT)

    assert done.returncode == 1
    assert "file/div-backend.log can't be written" in done.stderr
    assert "setting=DIVAULT_LOG_DIR" in done.stderr


def test_any_other_place_that_cannot_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "app_for", lambda _: Path("/proc/none").read_bytes)
    with pytest.raises(SystemExit) as caught:
        cli.main()

    assert caught.value.code == 1
    assert capsys.readouterr().err == (
        "error: /proc/none can't be used: No such file or directory\n  code: settings_invalid\n"
    )


def test_a_fault_of_no_place_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app_for", lambda _: lambda: os.close(2**20))
    with pytest.raises(OSError, match="Bad file descriptor"):
        cli.main()


def test_anvil_may_be_named_in_the_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DIVAULT_ANVIL=nowhere/anvil\n")
    done = divault("demo", "--anvil", "--once", cwd=tmp_path)

    assert (done.returncode, "DIVAULT_ANVIL names no file" in done.stderr) == (1, True), done.stderr
