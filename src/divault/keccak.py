"""Keccak-256 as Ethereum uses it (the padding of the competition entry, not of FIPS 202's SHA-3)."""

from __future__ import annotations

from collections.abc import Callable


def _pick() -> Callable[[bytes], bytes]:
    try:  # the C extension: 1 us for 100 bytes
        import sha3  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:  # no wheel for this platform: pycryptodome, 5 us for 100 bytes, same bytes
        from Crypto.Hash import keccak

        return lambda data: keccak.new(digest_bits=256, data=data).digest()
    new = sha3.keccak_256
    return lambda data: new(data).digest()  # type: ignore[no-any-return, unused-ignore]


keccak256: Callable[[bytes], bytes] = _pick()
"""The 32-byte Keccak-256 digest of a byte string."""
