"""Keys of age v1 and the stanzas that lead from them to the file key (age v1 s3; X25519, scrypt).

>>> me = Identity.generate()
>>> stanza = me.recipient.wrap(Secret(bytes(16)))
>>> me.unwrap((stanza,)) == Secret(bytes(16)), Identity.generate().unwrap((stanza,)) is None
(True, True)
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from divault.errors import BadRequest, SealedFileDamaged
from divault.values import Secret
from divault.vault import bech32
from divault.vault.header import FILE_KEY_BYTES, Header, Stanza, decode_base64, encode_base64, encode_header

PAYLOAD_NONCE_BYTES = 16
DEFAULT_WORK_FACTOR = 18
"""As the `age` command: 256 MiB and about a second."""

_IDENTITY_PREFIX = "age-secret-key-"
_RECIPIENT_PREFIX = "age"
_ZERO_NONCE = bytes(12)
"""Safe here alone: every wrap key is used once."""


@dataclass(frozen=True, slots=True)
class Recipient:
    """Whom a file is sealed to: an X25519 public key, spelled `age1...`."""

    raw: bytes

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `age1...` in lower case. Raises BadRequest; post-quantum recipients are not supported."""
        prefix, raw = bech32.decode(text)
        if prefix != _RECIPIENT_PREFIX or text != text.lower() or len(raw) != 32:
            raise BadRequest("an age recipient is age1 and 58 lower-case characters")
        return cls(raw)

    def __str__(self) -> str:
        return bech32.encode(_RECIPIENT_PREFIX, self.raw)

    def wrap(self, file_key: Secret) -> Stanza:
        """The stanza by which the owner of this recipient's identity finds the file key."""
        ephemeral = X25519PrivateKey.generate()
        share = ephemeral.public_key().public_bytes_raw()
        wrap_key = _x25519_wrap_key(_shared(ephemeral, self.raw), share, self.raw)
        body = ChaCha20Poly1305(wrap_key).encrypt(_ZERO_NONCE, file_key.reveal(), None)
        return Stanza("X25519", (encode_base64(share).decode(),), body)


class Identity:
    """The private half of a recipient, spelled `AGE-SECRET-KEY-1...`; can't be printed or pickled."""

    __slots__ = ("_secret", "recipient")

    def __init__(self, secret: Secret) -> None:
        if len(secret) != 32:
            raise ValueError("an age identity has 32 bytes")
        self._secret = secret
        self.recipient = Recipient(self._private().public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> Self:
        """A new one, from the system's random source."""
        return cls(Secret(secrets.token_bytes(32)))

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `AGE-SECRET-KEY-1...` in upper case. Raises BadRequest, without repeating the text."""
        prefix, raw = bech32.decode(text)
        if prefix != _IDENTITY_PREFIX or text != text.upper() or len(raw) != 32:
            raise BadRequest("an age identity is AGE-SECRET-KEY-1 and 58 upper-case characters (X25519 only)")
        return cls(Secret(raw))

    def reveal_text(self) -> str:
        """The spelling for a key file. Whoever sees it opens everything sealed to this identity."""
        return bech32.encode(_IDENTITY_PREFIX, self._secret.reveal()).upper()

    def unwrap(self, stanzas: Sequence[Stanza]) -> Secret | None:
        """The file key, from the first X25519 stanza that this identity opens.

        Raises SealedFileDamaged (stage `header`) for a share whose shared secret is zero.
        """
        for stanza in stanzas:
            if stanza.kind == "X25519" and (key := self._unwrap_one(stanza)) is not None:
                return key
        return None

    def _unwrap_one(self, stanza: Stanza) -> Secret | None:
        share = decode_base64(stanza.args[0].encode())
        try:
            shared = _shared(self._private(), share)
        except BadRequest:
            raise SealedFileDamaged("a recipient stanza holds a point of low order", stage="header") from None
        return _unwrapped(_x25519_wrap_key(shared, share, self.recipient.raw), stanza.body)

    def _private(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(self._secret.reveal())

    def __repr__(self) -> str:
        return f"Identity(of {self.recipient})"


class Passphrase:
    """A passphrase as the one way into a file; its UTF-8 bytes are used as they are."""

    __slots__ = ("_secret", "_work_factor")

    def __init__(self, secret: Secret, *, work_factor: int = DEFAULT_WORK_FACTOR) -> None:
        """`work_factor` counts for sealing alone: scrypt takes 2^work_factor KiB of memory."""
        if not len(secret):
            raise BadRequest("an empty passphrase protects nothing")
        self._secret = secret
        self._work_factor = work_factor

    def wrap(self, file_key: Secret) -> Stanza:
        """The only stanza of a file sealed with this passphrase."""
        salt = secrets.token_bytes(16)
        wrap_key = self._wrap_key(salt, self._work_factor)
        body = ChaCha20Poly1305(wrap_key).encrypt(_ZERO_NONCE, file_key.reveal(), None)
        return Stanza("scrypt", (encode_base64(salt).decode(), str(self._work_factor)), body)

    def unwrap(self, stanzas: Sequence[Stanza]) -> Secret | None:
        """The file key. Takes up to 1 GiB and seconds: the header parser has capped the work factor."""
        for stanza in stanzas:
            if stanza.kind == "scrypt":
                wrap_key = self._wrap_key(decode_base64(stanza.args[0].encode()), int(stanza.args[1]))
                return _unwrapped(wrap_key, stanza.body)
        return None

    def _wrap_key(self, salt: bytes, factor: int) -> bytes:
        # OpenSSL wants a ceiling: 2^factor KiB of table and less than 1 MiB around it.
        return hashlib.scrypt(
            self._secret.reveal(),
            salt=b"age-encryption.org/v1/scrypt" + salt,
            n=1 << factor,
            r=8,
            p=1,
            maxmem=(1024 << factor) + (1 << 20),
            dklen=32,
        )


def new_header(recipients: Sequence[Recipient | Passphrase], beside: Sequence[Stanza] = ()) -> tuple[bytes, Secret]:
    """Bytes of a header and its fresh file key; `beside` are further stanzas, which the MAC covers too.

    Raises BadRequest for no recipient, and for a passphrase that does not stand alone.
    """
    if not recipients or (len(recipients) + len(beside) > 1 and any(isinstance(r, Passphrase) for r in recipients)):
        raise BadRequest("seal to one passphrase, or to one or more recipients; a passphrase stands alone")
    file_key = Secret(secrets.token_bytes(FILE_KEY_BYTES))
    stanzas = [*(recipient.wrap(file_key) for recipient in recipients), *beside]
    return encode_header(stanzas, lambda covered: header_mac(file_key, covered)), file_key


def header_mac(file_key: Secret, covered: bytes) -> bytes:
    """HMAC-SHA256 over the header up to and including `---`."""
    return hmac.digest(_hkdf(file_key.reveal(), None, b"header"), covered, "sha256")


def check_mac(file_key: Secret, header: Header) -> None:
    """Raises SealedFileDamaged (stage `mac`) when somebody changed the header."""
    if not hmac.compare_digest(header_mac(file_key, header.covered), header.mac):
        raise SealedFileDamaged("the header of the sealed file was altered: its MAC does not hold", stage="mac")


def payload_key(file_key: Secret, nonce: bytes) -> Secret:
    """The key of the payload that follows `nonce`."""
    return Secret(_hkdf(file_key.reveal(), nonce, b"payload"))


def _hkdf(secret: bytes, salt: bytes | None, info: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt, info).derive(secret)


def _x25519_wrap_key(shared: bytes, share: bytes, recipient: bytes) -> bytes:
    return _hkdf(shared, share + recipient, b"age-encryption.org/v1/X25519")


def _shared(private: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise BadRequest("this X25519 key is a point of low order: nothing may be sealed to it") from None


def _unwrapped(wrap_key: bytes, body: bytes) -> Secret | None:
    try:
        return Secret(ChaCha20Poly1305(wrap_key).decrypt(_ZERO_NONCE, body, None))
    except InvalidTag:
        return None
