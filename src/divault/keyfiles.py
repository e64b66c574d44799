"""Key files on disk: a wallet's or node's signing key, and an age identity. Always mode 0600, never overwritten.

A signing key file holds `0x` and 64 hex digits. An age identity file is what the `age-keygen` command writes: comment
lines and one `AGE-SECRET-KEY-1...` line, so that `age -d -i FILE` opens the same models.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from divault.errors import BadRequest, SettingsInvalid
from divault.messages import parse_key
from divault.values import Secret
from divault.vault.age import Identity

T = TypeVar("T")
_MAX_BYTES = 4096  # a key file is two lines


def new_signing_key(path: Path) -> Secret:
    """Make a secp256k1 key in a new file. Raises SettingsInvalid when the file exists."""
    text = "0x" + secrets.token_bytes(32).hex()
    key = parse_key(text)
    _create(path, text + "\n")
    return key


def read_signing_key(path: Path) -> Secret:
    """Read a signing key. Raises SettingsInvalid for a missing, readable-by-others or malformed file."""
    try:
        return parse_key(_read(path).strip())
    except BadRequest as err:
        raise SettingsInvalid(f"{path} holds no signing key: one line, 0x and 64 hex digits") from err


def new_identity(path: Path) -> Identity:
    """Make an age identity in a new file. Raises SettingsInvalid when the file exists."""
    identity = Identity.generate()
    _create(path, f"# public key: {identity.recipient}\n{identity.reveal_text()}\n")
    return identity


def read_identity(path: Path) -> Identity:
    """Read an age identity. Raises SettingsInvalid for a missing, readable-by-others or malformed file."""
    lines = [line.strip() for line in _read(path).splitlines() if line.strip() and not line.startswith("#")]
    try:
        (line,) = lines
        return Identity.parse(line)
    except (ValueError, BadRequest) as err:
        raise SettingsInvalid(f"{path} holds no age identity: one line AGE-SECRET-KEY-1...") from err


def signing_key(path: Path) -> Secret:
    """Read the key at `path`, or make it at the first start."""
    return _read_or_make(path, read_signing_key, new_signing_key)


def identity(path: Path) -> Identity:
    """Read the age identity at `path`, or make it at the first start."""
    return _read_or_make(path, read_identity, new_identity)


def _read_or_make(path: Path, read: Callable[[Path], T], make: Callable[[Path], T]) -> T:
    return read(path) if path.exists() else make(path)


def _create(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as err:
        raise SettingsInvalid(f"the folder of {path} can't be made: {err.strerror}") from err
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as err:
        raise SettingsInvalid(f"{path} exists; a key file is never overwritten: name another or remove it") from err
    except OSError as err:
        raise SettingsInvalid(f"{path} can't be written: {err.strerror}") from err
    with os.fdopen(fd, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(_MAX_BYTES + 1)
    except OSError as err:
        raise SettingsInvalid(f"{path} can't be read: {err.strerror}") from err
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SettingsInvalid(f"{path} may be read by others: chmod 600 {path}")
    try:
        return raw[:_MAX_BYTES].decode("ascii")
    except UnicodeDecodeError as err:
        raise SettingsInvalid(f"{path} is no key file") from err
