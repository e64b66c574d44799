"""EIP-191 `personal_sign`: what wallets sign when they show a person a text."""

from __future__ import annotations

from divault.values import Digest


def personal_digest(message: str | bytes) -> Digest:
    r"""The digest that a wallet signs for a text (its UTF-8 bytes) or for bytes; EIP-191 version 0x45.

    >>> str(personal_digest("hello"))
    '0x50b2c43fd39106bafbba0da34fc430e1f91e3c96ea2acee2bc34119f92b37750'
    """
    raw = message.encode() if isinstance(message, str) else message
    return Digest.keccak(b"\x19Ethereum Signed Message:\n%d%b" % (len(raw), raw))
