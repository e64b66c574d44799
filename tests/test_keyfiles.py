"""Key files are there whole or not at all, and what keeps one from being made is told with what mends it."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from divault import keyfiles
from divault.errors import SettingsInvalid
from tests.test_cli_files import divault

MAKERS = (keyfiles.new_signing_key, keyfiles.new_identity)


@pytest.mark.parametrize("make", MAKERS)
def test_a_key_file_is_private_and_alone(make: object, tmp_path: Path) -> None:
    make(tmp_path / "folder" / "a.key")

    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["a.key"]
    assert stat.S_IMODE((tmp_path / "folder" / "a.key").stat().st_mode) == 0o600


@pytest.mark.parametrize("make", MAKERS)
def test_a_file_that_is_there_stays_as_it_is(make: object, tmp_path: Path) -> None:
    (tmp_path / "a.key").write_text("mine")
    with pytest.raises(SettingsInvalid, match="never overwritten"):
        make(tmp_path / "a.key")

    assert (tmp_path / "a.key").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["a.key"]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_nothing_and_names_the_fix(
    make: object, number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(keyfiles.os, "fsync", full)
        with pytest.raises(SettingsInvalid, match="there is no room, free some") as told:
            make(tmp_path / "a.key", "DIVAULT_STATE_DIR")

    assert "set DIVAULT_STATE_DIR" in told.value.detail
    assert told.value.data == {"setting": "DIVAULT_STATE_DIR"}
    assert list(tmp_path.iterdir()) == []
    make(tmp_path / "a.key", "DIVAULT_STATE_DIR")


@pytest.mark.parametrize("words", [("keys", "new", "a.key"), ("keys", "age", "a.key"), ("keys", "node")], ids=" ".join)
def test_a_command_that_can_write_nothing_leaves_no_key_that_blocks_the_next(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "divault", *words], cwd=tmp_path, env={"PATH": os.defpath}, capture_output=True,
        text=True, timeout=60, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
    )  # fmt: skip
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    again = divault(*words, cwd=tmp_path)

    assert (done.returncode, "a.key can't be written" in done.stderr or "set DIVAULT_STATE_DIR" in done.stderr) == (
        1,
        True,
    ), done.stderr
    assert "Traceback" not in done.stderr
    assert left == []
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("read", [keyfiles.signing_key, keyfiles.identity])
def test_an_empty_file_is_told_from_one_that_holds_something_else(read: object, tmp_path: Path) -> None:
    (tmp_path / "empty.key").touch()
    (tmp_path / "other.key").touch(mode=0o600)
    (tmp_path / "other.key").write_text("\n")
    with pytest.raises(SettingsInvalid, match=r"is empty, as a start that was broken off leaves it: remove it"):
        read(tmp_path / "empty.key")
    with pytest.raises(SettingsInvalid, match="holds no"):
        read(tmp_path / "other.key")


def test_a_place_that_cannot_be_made_is_named_by_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    state = divault("keys", "node", cwd=tmp_path, DIVAULT_STATE_DIR="file")
    key = divault("keys", "node", cwd=tmp_path, DIVAULT_NODE_KEY_FILE="file/node.key")
    age = divault("keys", "node", cwd=tmp_path, DIVAULT_AGE_IDENTITY_FILE="file/age.key")

    for done, name in ((state, "STATE_DIR"), (key, "NODE_KEY_FILE"), (age, "AGE_IDENTITY_FILE")):
        assert done.returncode == 1
        assert f"set DIVAULT_{name} to another place" in done.stderr
        assert f"setting=DIVAULT_{name}" in done.stderr
