"""ERC-6492: a signature of a contract wallet that isn't deployed yet, wrapped with what deploys it. Parsing only.

Whether the inner signature counts is a question to the chain; until it is asked nothing here is accepted.
"""

from __future__ import annotations

from dataclasses import dataclass

from divault.messages.reasons import refusal
from divault.values import Address

_MAGIC = bytes.fromhex("6492" * 16)
_HEAD = 96  # three ABI words: factory, offset of calldata, offset of the inner signature


@dataclass(frozen=True, slots=True)
class WrappedSignature:
    """The factory that deploys the wallet, the call that does it, and the signature that the wallet will judge."""

    factory: Address
    calldata: bytes
    inner: bytes


def unwrap(signature: bytes) -> WrappedSignature | None:
    """The parts of an ERC-6492 signature; None when it does not end in the ERC's 32 bytes.

    Only the canonical ABI encoding of (address, bytes, bytes) is read, to its exact length. Raises SignatureInvalid,
    reason `bad_wrapper`.
    """
    if not signature.endswith(_MAGIC):
        return None
    body = signature[: -len(_MAGIC)]
    if len(body) < _HEAD or any(body[:12]):
        raise refusal("bad_wrapper", "an ERC-6492 signature wraps (address, bytes, bytes)")
    calldata, end = _tail(body, 1, _HEAD)
    inner, end = _tail(body, 2, end)
    if end != len(body):
        raise refusal("bad_wrapper", "bytes are left over in an ERC-6492 signature")
    return WrappedSignature(Address(body[12:32]), calldata, inner)


def _tail(body: bytes, index: int, start: int) -> tuple[bytes, int]:
    """The dynamic value of a head word, which has to lie at `start`; and where it ends with its padding."""
    if _word(body, 32 * index) != start or len(body) < start + 32:
        raise refusal("bad_wrapper", "offsets of an ERC-6492 signature are not canonical")
    first, size = start + 32, _word(body, start)
    end = first + -(-size // 32) * 32
    if end > len(body) or any(body[first + size : end]):
        raise refusal("bad_wrapper", "a value of an ERC-6492 signature is cut or padded with something")
    return body[first : first + size], end


def _word(body: bytes, at: int) -> int:
    return int.from_bytes(body[at : at + 32], "big")
