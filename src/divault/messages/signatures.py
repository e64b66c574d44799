"""secp256k1 signatures over 32-byte digests: the strict rules that every verifier of the project uses.

1. Text is hex digits with an optional lower-case `0x`, of even length [`bad_hex`].
2. 65 bytes r, s, v, or 64 bytes in the compact form of EIP-2098 [`bad_length`].
3. 0 < r < n and 0 < s < n [`bad_rs`]; v is 0, 1, 27 or 28 [`bad_v`]; low s only, so that one signature has one s
   [`high_s`].
4. A recovery that fails equals nobody [`signer_mismatch`].
5. One signature still has several encodings: never use its bytes as an identity.

These are the rules for keys. What contract wallets sign has no form of its own, and whether it counts only the chain
can say: who accepts them too asks a `Signers` (`chain.contract_wallets`).

Own signatures are deterministic (RFC 6979), low s, with v 27 or 28.

>>> from divault.values import Digest
>>> key = parse_key("0x" + "11" * 32)
>>> digest = Digest.keccak(b"hello")
>>> recover(digest, "0x" + sign_digest(key, digest).hex()) == address_of(key)
True
"""

from __future__ import annotations

import re
from typing import NoReturn, Protocol

from coincurve import PrivateKey, PublicKey

from divault.errors import BadRequest
from divault.keccak import keccak256
from divault.messages.reasons import refusal
from divault.values import Address, Digest, Secret

_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141  # SEC 2 v2, section 2.4.1
_HALF_ORDER = _ORDER // 2
_HEX = re.compile(r"(?:0x)?((?:[0-9a-fA-F]{2})*)", re.ASCII)
_KEY = re.compile(r"0x[0-9a-fA-F]{64}", re.ASCII)
_RECOVERY_ID = {0: b"\0", 1: b"\1", 27: b"\0", 28: b"\1"}
_TOP_BIT = 1 << 255


def parse_key(text: str) -> Secret:
    """A signing key from `0x` and 64 hex digits. Raises BadRequest (without the text) for anything else."""
    if not isinstance(text, str) or not _KEY.fullmatch(text):
        raise BadRequest("a signing key is 0x and 64 hex digits")
    raw = bytes.fromhex(text[2:])
    if not 0 < int.from_bytes(raw, "big") < _ORDER:
        raise BadRequest("a signing key is a number between 1 and the order of secp256k1")
    return Secret(raw)


def address_of(key: Secret) -> Address:
    """The account of a signing key (32 bytes, from `parse_key`)."""
    return _address(PrivateKey(key.reveal()).public_key)


class SigningKey:
    """A key that is ready to sign: deriving what signing needs costs twice the signature itself."""

    def __init__(self, key: Secret) -> None:
        self._key = PrivateKey(key.reveal())

    def text(self, digest: Digest) -> str:
        """The same as `signature_text`."""
        return _text(self._key, digest)

    def __repr__(self) -> str:
        return "SigningKey(***)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a signing key is not pickled")


def sign_digest(key: Secret, digest: Digest) -> bytes:
    """The 65 bytes r, s, v (27 or 28) of the key's deterministic low-s signature of the digest."""
    return _signed(PrivateKey(key.reveal()), digest)


def _signed(key: PrivateKey, digest: Digest) -> bytes:
    raw = key.sign_recoverable(digest.raw, hasher=None)
    return raw[:64] + bytes([27 + raw[64]])


def _text(key: PrivateKey, digest: Digest) -> str:
    return "0x" + _signed(key, digest).hex()


def signature_text(key: Secret, digest: Digest) -> str:
    """`sign_digest` as it goes over the wire: `0x` and 130 hex digits."""
    return _text(PrivateKey(key.reveal()), digest)


def recover(digest: Digest, signature: str) -> Address:
    """Who signed the digest, by rules 1 to 4. Raises SignatureInvalid with the rule's reason."""
    return recover_raw(digest, signature_bytes(signature))


def require_signer(digest: Digest, signature: str, claimed: Address) -> None:
    """Return only if `claimed` signed the digest. Raises SignatureInvalid with the broken rule's reason."""
    require_signer_raw(digest, signature_bytes(signature), claimed)


def require_signer_raw(digest: Digest, signature: bytes, claimed: Address) -> None:
    """As `require_signer`, from the bytes of a signature."""
    if recover_raw(digest, signature) != claimed:
        raise refusal("signer_mismatch", f"the signature is not by {claimed} over this request: sign it as it is sent")


class Signers(Protocol):
    """Whose signatures count."""

    async def require(self, digest: Digest, signature: str, claimed: Address, peer: str) -> bool:
        """Return only if `claimed` signed the digest: False by a key, True as a contract wallet.

        `peer` asks for it, and is limited by. Raises SignatureInvalid with the broken rule's reason; RateLimited and
        ChainUnavailable where it takes more than a key.
        """
        ...


class KeysOnly:
    """Signatures of keys count, and no others."""

    async def require(self, digest: Digest, signature: str, claimed: Address, peer: str) -> bool:  # noqa: ARG002
        """As `Signers` says."""
        require_signer(digest, signature, claimed)
        return False


def signature_bytes(text: str) -> bytes:
    """Any number of bytes from hex text, by rule 1. Raises SignatureInvalid, reason `bad_hex`."""
    match = _HEX.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise refusal("bad_hex", "a signature is 0x and an even number of hex digits")
    return bytes.fromhex(match[1])


def recover_raw(digest: Digest, signature: bytes) -> Address:
    """Who signed the digest, from the bytes of a signature, by rules 2 to 4. Raises SignatureInvalid."""
    try:
        return _address(PublicKey.from_signature_and_message(_canonical(signature), digest.raw, hasher=None))
    except ValueError as err:  # no point of the curve has this r
        raise refusal("signer_mismatch", "no key gives this signature: sign again") from err


def _canonical(signature: bytes) -> bytes:
    """The 65 bytes r, s, recovery id; rules 2 and 3."""
    if len(signature) not in (64, 65):
        raise refusal("bad_length", f"a signature has 65 bytes, or 64 in compact form; this one has {len(signature)}")
    r = int.from_bytes(signature[:32], "big")
    s = int.from_bytes(signature[32:64], "big")
    v = signature[64] if len(signature) == 65 else s >> 255
    if len(signature) == 64:  # EIP-2098: the top bit of s is the parity
        s &= _TOP_BIT - 1
    if not (0 < r < _ORDER and 0 < s < _ORDER):
        raise refusal("bad_rs", "r and s of a signature lie between 1 and the curve's order")
    if v not in _RECOVERY_ID:
        raise refusal("bad_v", "v of a signature is 0, 1, 27 or 28")
    if s > _HALF_ORDER:
        raise refusal("high_s", "s of a signature lies in the lower half of the curve's order")
    return signature[:32] + s.to_bytes(32, "big") + _RECOVERY_ID[v]


def _address(key: PublicKey) -> Address:
    return Address(keccak256(key.format(compressed=False)[1:])[12:])
