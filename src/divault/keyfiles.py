"""Key files on disk: a wallet's or node's signing key, and an age identity. Always mode 0600, never overwritten.

A file is there whole or not at all: it is written under another name, brought to the disk and linked to its own.

A signing key file holds `0x` and 64 hex digits. An age identity file is what the `age-keygen` command writes: comment
lines and one `AGE-SECRET-KEY-1...` line, so that `age -d -i FILE` opens the same models.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import tempfile
from pathlib import Path

from divault.errors import BadRequest, SettingsInvalid
from divault.messages import parse_key
from divault.values import Secret
from divault.vault.age import Identity

_MAX_BYTES = 4096  # a key file is two lines


def new_signing_key(path: Path, setting: str | None = None) -> Secret:
    """Make a secp256k1 key in a new file. Raises SettingsInvalid when the file exists or can't be written.

    `setting`: the one that names the place, for what is said then.
    """
    text = "0x" + secrets.token_bytes(32).hex()
    key = parse_key(text)
    _create(path, text + "\n", setting)
    return key


def read_signing_key(path: Path) -> Secret:
    """Read a signing key. Raises SettingsInvalid for a missing, readable-by-others or malformed file."""
    try:
        return parse_key(_read(path).strip())
    except BadRequest as err:
        raise SettingsInvalid(f"{path} holds no signing key: one line, 0x and 64 hex digits") from err


def new_identity(path: Path, setting: str | None = None) -> Identity:
    """Make an age identity in a new file; `setting` and errors are those of `new_signing_key`."""
    identity = Identity.generate()
    _create(path, f"# public key: {identity.recipient}\n{identity.reveal_text()}\n", setting)
    return identity


def read_identity(path: Path) -> Identity:
    """Read an age identity. Raises SettingsInvalid for a missing, readable-by-others or malformed file."""
    lines = [line.strip() for line in _read(path).splitlines() if line.strip() and not line.startswith("#")]
    try:
        (line,) = lines
        return Identity.parse(line)
    except (ValueError, BadRequest) as err:
        raise SettingsInvalid(f"{path} holds no age identity: one line AGE-SECRET-KEY-1...") from err


def signing_key(path: Path, setting: str | None = None) -> Secret:
    """Read the key at `path`, or make it at the first start; `setting` names the place. Raises SettingsInvalid."""
    return read_signing_key(path) if path.exists() else new_signing_key(path, setting)


def identity(path: Path, setting: str | None = None) -> Identity:
    """Read the age identity at `path`, or make it at the first start; `setting` likewise. Raises SettingsInvalid."""
    return read_identity(path) if path.exists() else new_identity(path, setting)


def _create(path: Path, text: str, setting: str | None) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as err:
        raise _unwritten(f"the folder of {path} can't be made", err, setting) from err
    try:
        fd, draft = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent)  # mode 0600
        try:
            with os.fdopen(fd, "w", encoding="ascii") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.link(draft, path)  # unlike a rename it never replaces a file
        finally:
            Path(draft).unlink()
    except FileExistsError as err:
        raise SettingsInvalid(f"{path} exists; a key file is never overwritten: name another or remove it") from err
    except OSError as err:
        raise _unwritten(f"{path} can't be written", err, setting) from err


def _unwritten(what: str, err: OSError, setting: str | None) -> SettingsInvalid:
    elsewhere = "name another place" if setting is None else f"set {setting} to another place"
    full = err.errno in (errno.ENOSPC, errno.EDQUOT)
    fix = f"there is no room, free some or {elsewhere}" if full else f"{err.strerror}; make it writable or {elsewhere}"
    return SettingsInvalid(f"{what}: {fix}", **({} if setting is None else {"setting": setting}))


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(_MAX_BYTES + 1)
    except OSError as err:
        raise SettingsInvalid(f"{path} can't be read: {err.strerror}") from err
    if not raw:
        raise SettingsInvalid(
            f"{path} is empty, as a start that was broken off leaves it: remove it, and a new key is made; if there "
            "was a key in it, put that back from a backup first"
        )
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SettingsInvalid(f"{path} may be read by others: chmod 600 {path}")
    try:
        return raw[:_MAX_BYTES].decode("ascii")
    except UnicodeDecodeError as err:
        raise SettingsInvalid(f"{path} is no key file") from err
