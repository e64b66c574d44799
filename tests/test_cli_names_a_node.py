"""`--node`: a URL, and who must be there. What is neither is refused with the right form, before anything is sent."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from divault import cli
from divault.keyfiles import new_signing_key

SOMEBODY = "0x" + "11" * 20
COMMANDS = pytest.mark.parametrize("command", ["call", "sign-in", "publish"])


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """What a command says of a node when it ends with a typed error."""
    monkeypatch.chdir(tmp_path)
    new_signing_key(tmp_path / "me.key")
    (tmp_path / "model.bin").write_bytes(b"weights")
    rest = {
        "call": ["model", "{}"],
        "sign-in": [],
        "publish": ["model.bin", "--price", "0", "--gate", "open", "--to", "http://127.0.0.1:9"],
    }

    def run(command: str, node: str) -> str:
        words = ["divault", command, *rest[command], "--key", "me.key", "--node", node]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 1
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ("127.0.0.1:8000", "begins with http:// or https://, as in http://127.0.0.1:8000"),
        ("localhost", "begins with http:// or https://"),
        ("ftp://node.example", "begins with http:// or https://"),
        ("http://node.example:port", "begins with http:// or https://"),
        (f"#{SOMEBODY}", "begins with http:// or https://"),
        ("http://127.0.0.1:9#0x12", "behind the # of http://127.0.0.1:9#0x12 there is no address"),
        ("http://127.0.0.1:9#", "without one leave the # out"),
    ],
)
@COMMANDS
def test_a_node_that_is_named_wrongly_is_refused(command: str, node: str, words: str, said) -> None:
    told = said(command, node)

    assert words in told
    assert "code: bad_request  field=node" in told


@pytest.mark.parametrize("pin", ["", f"#{SOMEBODY}"])
@COMMANDS
def test_a_node_that_is_named_rightly_is_asked(command: str, pin: str, said) -> None:
    told = said(command, f"http://127.0.0.1:9{pin}")

    assert "no answer from the node at http://127.0.0.1:9:" in told
    assert "code: not_ready" in told
