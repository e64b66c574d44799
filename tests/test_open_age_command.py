"""Debian's `age` opens what is sealed here, and what it makes opens here."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import shutil
import subprocess
from pathlib import Path

import pytest

from divault.errors import WrongKey
from divault.values import Secret
from divault.vault.age import Identity, Passphrase, Recipient
from divault.vault.keys import CallerKey, NodeIdentity
from divault.vault.sealed import open_stream, seal_stream

PASSPHRASE = "correct horse battery staple"
SIZES = [0, 1, 65536, 200_001]


def command(name: str) -> str:
    """Path of the program; `make setup` installs it (conftest puts its folder on PATH)."""
    found = shutil.which(name)
    assert found, f"{name} is missing: run `make setup`"
    return found


@pytest.fixture(scope="module")
def key_file(tmp_path_factory) -> Path:
    """An identity made by age-keygen."""
    path = tmp_path_factory.mktemp("age") / "key.txt"
    subprocess.run([command("age-keygen"), "-o", path], check=True, capture_output=True)
    return path


def identity_of(path: Path) -> Identity:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return Identity.parse(lines[0])


def age(*arguments: str | Path, data: bytes = b"") -> bytes:
    return subprocess.run([command("age"), *arguments], check=True, input=data, capture_output=True).stdout


def age_on_a_terminal(*arguments: str | Path) -> None:
    """Run `age` with a terminal of its own and type the passphrase whenever it asks."""
    near, far = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", command("age"), *arguments],
        stdin=far,
        stdout=far,
        stderr=far,
    )
    os.close(far)
    seen = answered = 0
    screen = b""
    while select.select([near], [], [], 30)[0]:
        try:
            screen += os.read(near, 4096)
        except OSError:
            break  # the terminal is gone with its last process
        seen = len(re.findall(rb"passphrase[^\n]*: ", screen))
        if seen > answered:
            answered = seen
            os.write(near, PASSPHRASE.encode() + b"\n")
    os.close(near)
    assert process.wait(30) == 0, screen.decode(errors="replace")


def sealed_here(plain: bytes, *recipients: Recipient | Passphrase) -> bytes:
    out = io.BytesIO()
    seal_stream(io.BytesIO(plain), out, recipients)
    return out.getvalue()


def opened_here(data: bytes, *sources: NodeIdentity | CallerKey) -> bytes:
    out = io.BytesIO()
    open_stream(io.BytesIO(data), out, sources)
    return out.getvalue()


def test_key_of_age_keygen_has_the_recipient_it_says(key_file):
    assert f"# public key: {identity_of(key_file).recipient}" in key_file.read_text()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("armor", [[], ["-a"]])
def test_file_of_the_age_command_opens_here(key_file, size, armor):
    plain = os.urandom(size)
    mine, other = identity_of(key_file), Identity.generate()

    data = age("-r", str(other.recipient), "-r", str(mine.recipient), *armor, data=plain)

    assert plain == opened_here(data, NodeIdentity(mine))
    assert plain == opened_here(data, CallerKey(Secret.of_text(other.reveal_text())))
    with pytest.raises(WrongKey):
        opened_here(data, NodeIdentity(Identity.generate()))


@pytest.mark.parametrize("size", SIZES)
def test_file_sealed_here_opens_with_the_age_command(key_file, size):
    plain = os.urandom(size)
    recipients = [Identity.generate().recipient, identity_of(key_file).recipient]

    assert plain == age("-d", "-i", key_file, data=sealed_here(plain, *recipients))
    with pytest.raises(subprocess.CalledProcessError):
        age("-d", "-i", key_file, data=sealed_here(plain, recipients[0]))


def test_our_identity_works_in_the_age_command(tmp_path):
    mine = Identity.generate()
    (tmp_path / "key").write_text(mine.reveal_text() + "\n")

    assert age("-d", "-i", tmp_path / "key", data=sealed_here(b"model", mine.recipient)) == b"model"


def test_passphrase_file_of_the_age_command_opens_here(tmp_path):
    (tmp_path / "plain").write_bytes(b"a model" * 1000)
    age_on_a_terminal("-p", "-o", tmp_path / "sealed", tmp_path / "plain")

    data = (tmp_path / "sealed").read_bytes()

    assert opened_here(data, CallerKey(Secret.of_text(PASSPHRASE))) == b"a model" * 1000
    with pytest.raises(WrongKey):
        opened_here(data, CallerKey(Secret.of_text(PASSPHRASE + " ")))


def test_passphrase_file_sealed_here_opens_with_the_age_command(tmp_path):
    passphrase = Passphrase(Secret.of_text(PASSPHRASE), work_factor=12)
    (tmp_path / "sealed").write_bytes(sealed_here(b"a model" * 1000, passphrase))

    age_on_a_terminal("-d", "-o", tmp_path / "plain", tmp_path / "sealed")

    assert (tmp_path / "plain").read_bytes() == b"a model" * 1000
