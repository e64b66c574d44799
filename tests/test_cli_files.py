"""The command line without a node: keys, sealing, opening, verifying, settings; and help with an example everywhere."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from divault.cli import app_for
from divault.cli.commands import COMMANDS as COMMANDS_OF
from divault.cli.commands import GROUPS
from divault.values import Digest
from divault.vault.age import Identity
from tests.test_receipts import DRAFT, issuer

COMMANDS = [["serve"], ["demo"], ["publish"], ["seal"], ["open"], ["call"], ["verify"], ["doctor"], ["config"],
            ["keys", "new"], ["keys", "age"], ["keys", "show"], ["keys", "node"], ["receipt", "redact"],
            ["lighthouse"]]  # fmt: skip


def divault(*words: str | Path, cwd: Path, typed: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "divault", *map(str, words)],
        cwd=cwd, env={"PATH": os.defpath} | environment, capture_output=True, text=True, timeout=60, check=False,
        input=typed,
    )  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_shows_an_example(words: list[str]) -> None:
    from typer.testing import CliRunner

    done = CliRunner().invoke(app_for(words), [*words, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})

    assert done.exit_code == 0
    assert f"divault {' '.join(words)}" in done.output.split("Example:", 1)[1]


def test_each_command_is_found_alone_as_among_all() -> None:
    """What a command needs is imported when it is called, so the map says where each of them is."""
    everything = names_of(app_for(()))

    assert set(everything) == {name for names in COMMANDS_OF.values() for name in names} | set(GROUPS)
    for name in everything:
        assert name in names_of(app_for(["--version", name, "x"]))
        assert len(names_of(app_for([name]))) < len(everything)
    for line in ([], ["--help"], ["sreve"], ["--help", "sreve"]):
        assert names_of(app_for(line)) == everything


def names_of(app: typer.Typer) -> list[str]:
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    return list(command.commands)


def test_keys_of_wallets_need_nothing_of_a_node(tmp_path: Path) -> None:
    code = "import sys; from divault.cli import main; sys.argv = ['divault', 'keys', 'new', 'me.key']\ntry: main()\n"
    code += "except SystemExit: pass\nprint([name for name in ('fastapi', 'aiohttp', 'uvloop') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "[]"


def test_keys_are_private_and_never_overwritten(tmp_path: Path) -> None:
    made = divault("keys", "new", "me.key", cwd=tmp_path)
    again = divault("keys", "new", "me.key", cwd=tmp_path)
    shown = divault("keys", "show", "me.key", cwd=tmp_path)
    (tmp_path / "me.key").chmod(0o644)
    readable = divault("keys", "show", "me.key", cwd=tmp_path)

    assert made.returncode == 0
    assert made.stdout.strip().startswith("0x")
    assert stat.S_IMODE((tmp_path / "me.key").stat().st_mode) == 0o644
    assert (again.returncode, "never overwritten" in again.stderr) == (1, True)
    assert shown.stdout == made.stdout
    assert (readable.returncode, "chmod 600" in readable.stderr) == (1, True)


def test_what_is_sealed_opens_with_the_identity_and_with_no_other(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"weights" * 1000)
    recipient = divault("keys", "age", "mine", cwd=tmp_path).stdout.strip()
    divault("keys", "age", "other", cwd=tmp_path)

    sealed = divault("seal", "model.bin", "-o", "model.age", "-r", recipient, cwd=tmp_path)
    opened = divault("open", "model.age", "-o", "again.bin", "-i", "mine", cwd=tmp_path)
    refused = divault("open", "model.age", "-o", "stolen.bin", "-i", "other", cwd=tmp_path)

    assert sealed.returncode == 0, sealed.stderr
    assert json.loads(sealed.stdout)["recipients"] == [recipient]
    assert opened.returncode == 0, opened.stderr
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "model.bin").read_bytes()
    assert (refused.returncode, "wrong_key" in refused.stderr) == (1, True)
    assert not (tmp_path / "stolen.bin").exists()


def test_a_damaged_file_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"weights" * 100_000)
    recipient = divault("keys", "age", "mine", cwd=tmp_path).stdout.strip()
    divault("seal", "model.bin", "-o", "model.age", "-r", recipient, cwd=tmp_path)
    damaged = bytearray((tmp_path / "model.age").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "model.age").write_bytes(damaged)

    done = divault("open", "model.age", "-o", "again.bin", "-i", "mine", cwd=tmp_path)

    assert (done.returncode, "sealed_file_damaged" in done.stderr) == (1, True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "model.age", "model.bin"]


def test_opening_never_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"weights")
    recipient = divault("keys", "age", "mine", cwd=tmp_path).stdout.strip()
    divault("seal", "model.bin", "-o", "model.age", "-r", recipient, cwd=tmp_path)

    done = divault("open", "model.age", "-o", "model.bin", "-i", "mine", cwd=tmp_path)

    assert (done.returncode, "exists" in done.stderr) == (1, True)
    assert (tmp_path / "model.bin").read_bytes() == b"weights"


def test_passphrases_come_from_a_pipe_and_folders_become_one_tar(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "sub" / "b.txt").write_text("b")

    seal = divault("seal", "model", "-o", "m.age", "-p", cwd=tmp_path, typed="secret words\n")
    right = divault("open", "m.age", "-o", "m.tar", "-p", cwd=tmp_path, typed="secret words\n")
    wrong = divault("open", "m.age", "-o", "n.tar", "-p", cwd=tmp_path, typed="other words\n")

    assert (seal.returncode, right.returncode) == (0, 0), seal.stderr + right.stderr
    assert "\x1b" not in seal.stderr, "nothing but plain lines when piped"
    with tarfile.open(tmp_path / "m.tar") as tar:
        assert tar.getnames() == ["a.txt", "sub/b.txt"]
    assert (wrong.returncode, "wrong_key" in wrong.stderr) == (1, True)


def test_a_folder_with_a_link_is_not_sealed(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "link").symlink_to("/etc/passwd")
    recipient = str(Identity.generate().recipient)

    done = divault("seal", "model", "-o", "m.age", "-r", recipient, cwd=tmp_path)

    assert (done.returncode, "bad_request" in done.stderr) == (1, True)


def test_verify_names_the_field_that_was_changed(tmp_path: Path) -> None:
    envelope = issuer().issue(DRAFT, 0, Digest.ZERO).envelope
    (tmp_path / "receipt.json").write_text(json.dumps(envelope))
    good = divault("verify", "receipt.json", "--node", envelope["receipt"]["node"], cwd=tmp_path)
    envelope["receipt"]["price"] = "1"
    (tmp_path / "receipt.json").write_text(json.dumps(envelope))
    bad = divault("verify", "receipt.json", cwd=tmp_path)
    redacted = divault("receipt", "redact", "receipt.json", cwd=tmp_path)

    assert good.returncode == 0, good.stderr
    assert bad.returncode == 1
    assert "field=price" in bad.stderr
    public = json.loads(redacted.stdout)
    assert [public[name] for name in ("request", "request_signature", "input_salt", "output_salt")] == [None] * 4


def test_an_unknown_setting_is_named_with_its_neighbour(tmp_path: Path) -> None:
    done = divault("config", cwd=tmp_path, DIVAULT_OPERATOR="0x")

    assert done.returncode == 1
    assert "did you mean DIVAULT_OPERATORS?" in done.stderr


def test_config_masks_what_is_secret(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("WEB3_PROVIDER_URL=https://rpc.example/v2/KEY123\nLIGHTHOUSE_API_KEY=lh-secret\n")
    done = divault("config", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "KEY123" not in done.stdout
    assert "lh-secret" not in done.stdout
    assert "https://rpc.example/***" in done.stdout


def test_serve_refuses_to_start_without_a_vault_or_chain(tmp_path: Path) -> None:
    unset = divault("serve", cwd=tmp_path, PORT="0")
    unreachable = divault(
        "serve", cwd=tmp_path, PORT="0", WEB3_PROVIDER_URL="http://127.0.0.1:9",
        VAULT_CONTRACT_ADDRESS="0x" + "11" * 20, USDC_CONTRACT_ADDRESS="0x" + "22" * 20,
    )  # fmt: skip
    code = divault("serve", cwd=tmp_path, PORT="0", DIVAULT_ALLOW_CODE_MODELS="1", DIVAULT_SANDBOX="off")

    assert (unset.returncode, "VAULT_CONTRACT_ADDRESS" in unset.stderr) == (1, True)
    assert (unreachable.returncode, "chain_unavailable" in unreachable.stderr) == (1, True)
    assert (code.returncode, "DIVAULT_ALLOW_CODE_MODELS" in code.stderr) == (1, True)


@pytest.mark.parametrize(
    "words",
    [["seal", "model.bin", "-r", str(Identity.generate().recipient)], ["open", "model.age", "-i", "mine"],
     ["receipt", "redact", "receipt.json"]],
    ids=lambda words: words[0],
)  # fmt: skip
def test_a_place_that_cannot_be_written_is_named(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"weights")
    recipient = divault("keys", "age", "mine", cwd=tmp_path).stdout.strip()
    divault("seal", "model.bin", "-o", "model.age", "-r", recipient, cwd=tmp_path)
    (tmp_path / "receipt.json").write_text(json.dumps(issuer().issue(DRAFT, 0, Digest.ZERO).envelope))

    missing = divault(*words, "-o", "nowhere/out", cwd=tmp_path)
    there = divault(*words, "-o", "out", cwd=tmp_path)

    assert missing.returncode == 1
    assert "error: nowhere/out can't be written: No such file or directory" in missing.stderr
    assert "code: bad_request  field=output" in missing.stderr
    assert there.returncode == 0, there.stderr


def test_the_demo_tells_nothing_when_its_report_has_no_place(tmp_path: Path) -> None:
    done = divault("demo", "--once", "--json", "nowhere/report.json", cwd=tmp_path)

    assert (done.returncode, done.stdout) == (1, "")
    assert "nowhere/report.json can't be written" in done.stderr
