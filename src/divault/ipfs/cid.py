"""Content ids: strict text and binary forms (multiformats/cid), and the policy of what we fetch by them.

Rules:

1. One reading or none: no trailing bytes, no padding, no mixed case, no pad bits, no whitespace, no path.
2. Version 0 is 46 base58 characters (34 bytes `12 20` + digest) and never stands inside a multibase.
3. Versions 2 and 3 are reserved, so refused; varints are minimal and at most 9 bytes.
4. Blocks match by multihash; the codec that rules their interpretation is the one of the *link*.
5. Policy (`check_policy`): codecs raw and dag-pb; sha2-256 or sha2-512 in full length, or identity up to 128 bytes.

>>> cid = parse_cid("bafkreifzjut3te2nhyekklss27nh3k72ysco7y32koao5eei66wof36n5e")
>>> cid.version, hex(cid.codec), cid.digest.hex()[:8]
(1, '0x55', 'b94d27b9')
>>> parse_cid_bytes(cid_bytes(cid)) == cid
True
"""

from __future__ import annotations

import base64
import hashlib
from functools import lru_cache
from typing import Literal, NamedTuple

from divault.errors import HashMismatch, InsecureHash, InvalidCID, UnsupportedCodec, UnsupportedHash
from divault.ipfs import varint
from divault.values import Cid

RAW = 0x55
DAG_PB = 0x70
IDENTITY = 0x00
SHA2_256 = 0x12
SHA2_512 = 0x13

MAX_TEXT = 512
"""Characters; checked before decoding, because base58 costs the square of its length."""
MAX_IDENTITY_BYTES = 128
"""Readers must refuse longer identity digests (UnixFS specification)."""

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_BASE36 = "0123456789abcdefghijklmnopqrstuvwxyz"
_BASE32 = "abcdefghijklmnopqrstuvwxyz234567"
_HEX = "0123456789abcdef"
_BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_BASE64URL = _BASE64[:-2] + "-_"
_FULL_LENGTH = {SHA2_256: 32, SHA2_512: 64}
_HASHES = {SHA2_256: hashlib.sha256, SHA2_512: hashlib.sha512}


class CidParts(NamedTuple):
    """What a binary CID says; `multihash` is the key by which blocks match."""

    version: Literal[0, 1]
    codec: int
    hash_code: int
    digest: bytes
    multihash: bytes


def parse_cid(text: str) -> Cid:
    """The content id that this text spells. Bases b, B, f, F, k, z, u and m; version 0 as `Qm...`.

    Checks the form alone (see `check_policy`). Raises InvalidCID.
    """
    if not isinstance(text, str) or not text.isascii() or not 0 < len(text) <= MAX_TEXT:
        raise InvalidCID(f"a CID is 1 to {MAX_TEXT} ASCII characters")
    return _parsed(text)


@lru_cache(maxsize=1024)  # every call names the CID of its model, at 30 us a time
def _parsed(text: str) -> Cid:
    if len(text) == 46 and text.startswith("Qm"):
        parts = _whole(_big_base(text, _BASE58))
        if parts.version != 0:
            raise InvalidCID("this Qm... text is no CIDv0")
    else:
        parts = _whole(_multibase(text))
        if parts.version == 0:
            raise InvalidCID("a CIDv0 has no multibase prefix")
    return Cid(text, parts.version, parts.codec, parts.hash_code, parts.digest)


def parse_cid_bytes(data: bytes | memoryview) -> Cid:
    """The content id that these bytes are, to the last one; its text is the default spelling. Raises InvalidCID."""
    parts = _whole(bytes(data))
    return make_cid(parts.version, parts.codec, parts.hash_code, parts.digest)


def make_cid(version: Literal[0, 1], codec: int, hash_code: int, digest: bytes) -> Cid:
    """A content id from its fields, spelled base58 (version 0) or base32 (version 1)."""
    raw = _assemble(version, codec, hash_code, digest)
    text = _to_base58(raw) if version == 0 else "b" + base64.b32encode(raw).decode().rstrip("=").lower()
    return Cid(text, version, codec, hash_code, digest)


def cid_bytes(cid: Cid) -> bytes:
    """The binary form."""
    return _assemble(cid.version, cid.codec, cid.hash_code, cid.digest)


def multihash(cid: Cid) -> bytes:
    """Hash code, length and digest: what a block must hash to, whatever the version or codec."""
    return varint.encode(cid.hash_code) + varint.encode(len(cid.digest)) + cid.digest


def split_cid(data: bytes | memoryview, at: int = 0) -> tuple[CidParts, int]:
    """The binary CID that starts at `at`, and the position behind it. Raises InvalidCID."""
    if bytes(data[at : at + 2]) == b"\x12\x20":
        if len(data) < at + 34:
            raise InvalidCID("a CIDv0 has 34 bytes")
        raw = bytes(data[at : at + 34])
        return CidParts(0, DAG_PB, SHA2_256, raw[2:], raw), at + 34
    try:
        version, position = varint.read(data, at, len(data))
        codec, start = varint.read(data, position, len(data)) if version == 1 else (0, position)
        hash_code, position = varint.read(data, start, len(data))
        length, position = varint.read(data, position, len(data))
    except ValueError as err:
        raise InvalidCID(f"not a binary CID: {err}") from err
    if version != 1:
        raise InvalidCID(f"CID version {version} does not exist or is reserved")
    if length > len(data) - position:
        raise InvalidCID("the digest is shorter than declared")
    end = position + length
    if hash_code == IDENTITY and length > MAX_IDENTITY_BYTES:
        raise InvalidCID(f"an identity CID holds at most {MAX_IDENTITY_BYTES} bytes")
    return CidParts(1, codec, hash_code, bytes(data[position:end]), bytes(data[start:end])), end


def check_policy(cid: Cid | CidParts) -> None:
    """Nothing, when we fetch by such a CID. Raises UnsupportedCodec, UnsupportedHash or InsecureHash."""
    if cid.codec not in (RAW, DAG_PB):
        raise UnsupportedCodec(f"codec 0x{cid.codec:x}: only raw (0x55) and dag-pb (0x70) are read")
    if cid.hash_code == IDENTITY:
        return
    full = _FULL_LENGTH.get(cid.hash_code)
    if full is None:
        raise UnsupportedHash(f"hash 0x{cid.hash_code:x}: only sha2-256, sha2-512 and identity are accepted")
    if len(cid.digest) != full:
        raise InsecureHash(f"a digest of {len(cid.digest)} bytes where the hash gives {full}")


def check_hash(expected: bytes, data: bytes | bytearray | memoryview) -> None:
    """Nothing, when `data` hashes to the multihash `expected` (within policy). Raises HashMismatch."""
    if expected[0] == IDENTITY:
        matches = expected[1:] == varint.encode(len(data)) + bytes(data)
    else:
        matches = expected[2:] == _HASHES[expected[0]](data).digest()
    if not matches:
        raise HashMismatch(f"a block of {len(data)} bytes does not hash to {expected.hex()[:20]}...")


def _whole(data: bytes) -> CidParts:
    parts, end = split_cid(data)
    if end != len(data):
        raise InvalidCID(f"{len(data) - end} bytes after the end of the CID")
    return parts


def _assemble(version: int, codec: int, hash_code: int, digest: bytes) -> bytes:
    tail = varint.encode(hash_code) + varint.encode(len(digest)) + digest
    if version == 0:
        return tail
    return b"\x01" + varint.encode(codec) + tail


def _multibase(text: str) -> bytes:
    prefix, body = text[0], text[1:]
    if prefix in "BF":  # upper-case twins of b and f
        if body != body.upper():
            raise InvalidCID("mixed case")
        prefix, body = prefix.lower(), body.lower()
    match prefix:
        case "b":
            return _bit_base(body, _BASE32, 5)
        case "f":
            return _bit_base(body, _HEX, 4)
        case "m":
            return _bit_base(body, _BASE64, 6)
        case "u":
            return _bit_base(body, _BASE64URL, 6)
        case "z":
            return _big_base(body, _BASE58)
        case "k":
            return _big_base(body, _BASE36)
    raise InvalidCID("unknown multibase; a CID starts with Qm, b, B, f, F, k, z, u or m")


def _bit_base(text: str, alphabet: str, bits: int) -> bytes:
    """Bases of a power of two, without padding; the bits that fill no byte are fewer than one digit, and zero."""
    value = _digits(text, alphabet)
    spare = len(text) * bits % 8
    if spare >= bits or value & ((1 << spare) - 1):
        raise InvalidCID("the last character is not one that a writer would write")
    return (value >> spare).to_bytes(len(text) * bits // 8, "big")


def _big_base(text: str, alphabet: str) -> bytes:
    """Bases that are no power of two: one big number, each leading zero digit a zero byte."""
    value = _digits(text, alphabet)
    zeros = len(text) - len(text.lstrip(alphabet[0]))
    return bytes(zeros) + value.to_bytes((value.bit_length() + 7) // 8, "big")


def _digits(text: str, alphabet: str) -> int:
    value, base = 0, len(alphabet)
    for character in text:
        digit = alphabet.find(character)
        if digit < 0:
            raise InvalidCID("a character that does not belong to the base of this CID")
        value = value * base + digit
    return value


def _to_base58(data: bytes) -> str:
    value, out = int.from_bytes(data, "big"), ""
    while value:
        value, digit = divmod(value, 58)
        out = _BASE58[digit] + out
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + out
