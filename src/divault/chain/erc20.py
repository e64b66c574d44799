"""ERC-20 calls by hand: calldata in, exact results out. Pure.

A balance is the 32 bytes that `balanceOf` returned and nothing else: a short, long or failed answer is no balance.
"""

from __future__ import annotations

from divault.chain.records import Malformed
from divault.values import UINT256_MAX, Address, Digest

TRANSFER_TOPIC = Digest(bytes.fromhex("ddf252ad1be2c89b69c2b068fc378daa952ba7f163c4a11628f55a4df523b3ef"))
"""topic0 of `Transfer(address indexed from, address indexed to, uint256 value)`."""
_BALANCE_OF = bytes.fromhex("70a08231")  # balanceOf(address)
_TRANSFER = bytes.fromhex("a9059cbb")  # transfer(address,uint256)
_DECIMALS = bytes.fromhex("313ce567")  # decimals()


def balance_of(holder: Address) -> bytes:
    """Calldata that asks for the holder's balance in raw units."""
    return _BALANCE_OF + bytes(12) + holder.raw


def decimals() -> bytes:
    """Calldata that asks how many digits follow the point; for display only."""
    return _DECIMALS


def parse_uint(returned: bytes) -> int:
    """The one uint256 that was returned. Raises Malformed unless it is exactly 32 bytes."""
    if len(returned) != 32:
        raise Malformed(f"returned {len(returned)} bytes instead of 32")
    return int.from_bytes(returned, "big")


def transfer(to: Address, amount: int, tail: bytes = b"") -> bytes:
    """Calldata that moves `amount` raw units; ERC-20 ignores the `tail`. Raises ValueError for an impossible amount."""
    if not 0 <= amount <= UINT256_MAX:
        raise ValueError("an amount is 0 to 2^256 - 1 raw units")
    return _TRANSFER + bytes(12) + to.raw + amount.to_bytes(32, "big") + tail


def payment_mark(node: Address, payer: Address) -> Digest:
    """keccak256(node || payer): the tail by which a plain transfer pays for calls at one node only."""
    return Digest.keccak(node.raw + payer.raw)
