"""Where keys come from: the seam `KeySource` with its two implementations, and `KeySearch` for keys that are elsewhere.

Rules:

1. A source answers for the header alone and never sees the payload; None means "not mine".
2. What it gives is the key material of this one file (age file key, Lighthouse AES key), never its own secret: the
   process that opens the file learns nothing else.
3. The kind of file decides how a caller's text is read: for a passphrase file it is the passphrase, for a file sealed
   to recipients an age identity, for a Lighthouse file its key. It is never trimmed, decoded or normalised.
4. What has to be fetched is not a source: a `KeySearch` fetches, and gives sources one by one until one opens the file.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from enum import StrEnum
from typing import Protocol

from divault.errors import BadRequest
from divault.values import Grant, Secret
from divault.vault import lighthouse
from divault.vault.age import Identity, Passphrase
from divault.vault.header import Header, parse_header

MAX_KEY_BYTES = 4096
"""A Kavach key has 64 bytes and an identity 74; the rest is room for passphrases."""


class SealFormat(StrEnum):
    """The two kinds of sealed file."""

    AGE = "age"
    LIGHTHOUSE = "lighthouse"


def recognise(first_bytes: bytes) -> SealFormat:
    """The kind of a file by its first line. A Lighthouse file starts with 16 random bytes, so all else is one."""
    return SealFormat.AGE if first_bytes.startswith(b"age-encryption.org/") else SealFormat.LIGHTHOUSE


def costs_a_derivation(header: bytes) -> bool:
    """True when a caller's key takes scrypt or PBKDF2 here: run such an `unwrap` one at a time.

    Raises SealedFileDamaged (stage `header`).
    """
    return recognise(header) is SealFormat.LIGHTHOUSE or _is_passphrase_file(parse_header(header))


class KeySource(Protocol):
    """Something that may hold the key of a sealed file."""

    def unwrap(self, header: bytes, grant: Grant | None) -> Secret | None:
        """The key material of the file that starts with `header`, or None: not mine.

        `header` is a whole age header, or the first 28 bytes (salt and iv) of a Lighthouse file. Called in a thread.
        Raises SealedFileDamaged (stage `header`) for a header that breaks the format.
        """


class KeySearch(Protocol):
    """Somewhere else that may have the key of a sealed file, and not surely the right one at once."""

    def candidates(self, header: bytes, grant: Grant) -> AsyncGenerator[KeySource, None]:
        """Sources to try on the file that starts with `header`, best first; none: not mine.

        The next one is asked for only when the one before did not open the file. Raises StorageFailed, AccessDenied,
        and WrongKey when all that it gave were tried.
        """


class NodeIdentity:
    """The node's own age identity: opens what was sealed to the recipient that the node publishes."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity

    def unwrap(self, header: bytes, grant: Grant | None) -> Secret | None:  # noqa: ARG002  # the seam; this node opens all
        """The file key when one of the header's X25519 stanzas is for this node."""
        if recognise(header) is not SealFormat.AGE:
            return None
        return self._identity.unwrap(parse_header(header).stanzas)


class CallerKey:
    """The text that came with a request: an age identity, a passphrase or a Lighthouse key, as the file wants it."""

    def __init__(self, text: Secret) -> None:
        """Raises BadRequest for an empty text and one over 4096 bytes."""
        if not 0 < len(text) <= MAX_KEY_BYTES:
            raise BadRequest("a decryption key has 1 to 4096 bytes", field="decryption_key")
        self._text = text

    def unwrap(self, header: bytes, grant: Grant | None) -> Secret | None:  # noqa: ARG002  # the seam; the text is the grant
        """The key material; for Lighthouse always some, since only the tag at the end tells if it is right."""
        if recognise(header) is SealFormat.LIGHTHOUSE:
            return Secret(lighthouse.derive_key(self._text.reveal(), header[: lighthouse.SALT_BYTES]))
        parsed = parse_header(header)
        if _is_passphrase_file(parsed):
            return Passphrase(self._text).unwrap(parsed.stanzas)
        identity = self._identity()
        return identity.unwrap(parsed.stanzas) if identity else None

    def _identity(self) -> Identity | None:
        try:
            return Identity.parse(self._text.reveal().decode())
        except (BadRequest, UnicodeDecodeError):
            return None


def _is_passphrase_file(header: Header) -> bool:
    return any(stanza.kind == "scrypt" for stanza in header.stanzas)
