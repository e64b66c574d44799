"""The encrypted files of Lighthouse: AES-256-GCM over the whole file, keyed by a text.

Rules:

1. 16 bytes of salt, 12 of iv, ciphertext, 16 of tag: 44 bytes more than the plaintext, no magic, no chunks.
2. The key is text: its UTF-8 bytes go into PBKDF2-HMAC-SHA256 (250000 rounds, about 0.1 s) unchanged, never as hex.
3. Only the tag at the very end tells whether key and file are right; nothing written before counts until then.
4. The one-shot AEAD interface is never used here: it panics at 2 GiB and copies the file.

The format carries no commitment to its key, so a wrong key and a damaged file look alike: callers that verified the
CID first know that the key is wrong.
"""

from __future__ import annotations

import hashlib
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import AEADDecryptionContext, Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import GCM

from divault.errors import BadRequest, SealedFileDamaged, WrongKey
from divault.vault.streams import Reader, Writer, fill, write_all

SALT_BYTES = 16
IV_BYTES = 12
PREFIX_BYTES = SALT_BYTES + IV_BYTES
TAG_BYTES = 16
OVERHEAD_BYTES = PREFIX_BYTES + TAG_BYTES
ROUNDS = 250_000

_BLOCK = 1 << 19
"""Half a MiB stays in the caches of a core; more gains nothing (measured)."""
_SLACK = 15
"""`update_into` wants room for a cipher block less one byte, though GCM never uses it."""


def derive_key(key_text: bytes, salt: bytes) -> bytes:
    """The AES key, 32 bytes; costs about 0.1 s of CPU and releases the GIL. Raises BadRequest for an empty key."""
    if not key_text:
        raise BadRequest("the decryption key is empty", field="decryption_key")
    return hashlib.pbkdf2_hmac("sha256", key_text, salt, ROUNDS, 32)


def open_payload(key: bytes, iv: bytes, source: Reader, sink: Writer) -> int:
    """Write the plaintext of ciphertext and tag in `source`; its size in bytes.

    What the sink got is worthless until this returned. Raises WrongKey when the tag does not hold,
    SealedFileDamaged (stage `payload`) when there is no room for a tag.
    """
    context = Cipher(AES256(key), GCM(iv)).decryptor()
    sealed, plain = memoryview(bytearray(_BLOCK + TAG_BYTES)), memoryview(bytearray(_BLOCK + _SLACK))
    held = total = 0
    while True:
        # The last 16 bytes seen are held back: they are the tag if the source ends here.
        filled = held + fill(source, sealed[held:])
        body = filled - TAG_BYTES
        if body < 0:
            raise SealedFileDamaged("the sealed file ends before its authentication tag: it was cut", stage="payload")
        total += _pass_on(context, sealed[:body], plain, sink)
        if filled < len(sealed):
            _finish(context, bytes(sealed[body:filled]))
            return total
        sealed[:TAG_BYTES] = sealed[-TAG_BYTES:]
        held = TAG_BYTES


def seal(key_text: bytes, source: Reader, sink: Writer) -> int:
    """Write everything in `source` as a Lighthouse file; the number of plaintext bytes. Raises BadRequest."""
    salt, iv = os.urandom(SALT_BYTES), os.urandom(IV_BYTES)
    context = Cipher(AES256(derive_key(key_text, salt)), GCM(iv)).encryptor()
    write_all(sink, memoryview(salt + iv))
    plain, sealed = memoryview(bytearray(_BLOCK)), memoryview(bytearray(_BLOCK + _SLACK))
    total = 0
    while count := fill(source, plain):
        total += _pass_on(context, plain[:count], sealed, sink)
    context.finalize()
    write_all(sink, memoryview(context.tag))
    return total


def _pass_on(context: CipherContext, data: memoryview, out: memoryview, sink: Writer) -> int:
    count = context.update_into(data, out) if data else 0
    write_all(sink, out[:count])
    return count


def _finish(context: AEADDecryptionContext, tag: bytes) -> None:
    try:
        context.finalize_with_tag(tag)
    except InvalidTag:
        raise WrongKey(
            "this key does not open the file: its Lighthouse tag does not hold, and if the file is the one that its CID"
            " names, the key is the wrong one"
        ) from None
