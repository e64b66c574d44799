"""Signed raw transactions: parsed strictly, sender recovered, checked against the chain id. Pure.

Accepted: legacy with replay protection (EIP-155), type 1 (EIP-2930), type 2 (EIP-1559). Everything else is refused by
name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from divault.devnet import rlp
from divault.devnet.answers import SERVER_ERROR, RpcRefused, show
from divault.errors import SignatureInvalid
from divault.keccak import keccak256
from divault.messages.signatures import recover_raw
from divault.values import Digest

AccessList = tuple[tuple[bytes, tuple[int, ...]], ...]
_FIELDS = {0: 9, 1: 11, 2: 12}


@dataclass(frozen=True, slots=True)
class SignedTransaction:
    """A transaction whose signature holds. Prices are wei per gas; for types 0 and 1 tip and maximum are one price."""

    kind: int
    nonce: int
    max_tip: int
    max_price: int
    gas: int
    to: bytes | None
    value: int
    data: bytes
    access_list: AccessList
    v: int
    r: int
    s: int
    hash: bytes
    raw: bytes
    sender: bytes

    def price(self, base_fee: int) -> int:
        """Wei per gas that it pays in a block with this base fee."""
        return min(self.max_price, base_fee + self.max_tip)

    def intrinsic_gas(self) -> int:
        """What it costs before the first instruction (Shanghai rules: EIP-2028, 2930, 3860)."""
        zeros = self.data.count(0)
        gas = 21_000 + 4 * zeros + 16 * (len(self.data) - zeros)
        gas += sum(2_400 + 1_900 * len(slots) for _, slots in self.access_list)
        return gas if self.to is not None else gas + 32_000 + 2 * ((len(self.data) + 31) // 32)

    def to_json(self, chain_id: int) -> dict[str, Any]:
        """The fields that a node shows, without those of the block."""
        fields: dict[str, Any] = {
            "hash": show(self.hash),
            "type": hex(self.kind),
            "chainId": hex(chain_id),
            "nonce": hex(self.nonce),
            "from": show(self.sender),
            "to": None if self.to is None else show(self.to),
            "value": hex(self.value),
            "gas": hex(self.gas),
            "gasPrice": hex(self.max_price),
            "input": show(self.data),
            "v": hex(self.v),
            "r": hex(self.r),
            "s": hex(self.s),
        }
        if self.kind >= 1:
            fields["yParity"] = hex(self.v)
            fields["accessList"] = [
                {"address": show(a), "storageKeys": [f"0x{s:064x}" for s in slots]} for a, slots in self.access_list
            ]
        if self.kind == 2:
            fields["maxFeePerGas"], fields["maxPriorityFeePerGas"] = hex(self.max_price), hex(self.max_tip)
        return fields


def parse(raw: bytes, chain_id: int) -> SignedTransaction:
    """From the bytes of eth_sendRawTransaction. Raises RpcRefused naming what is wrong."""
    try:
        kind, items = _envelope(raw)
        return _parse(kind, items, raw, chain_id)
    except ValueError as err:
        raise RpcRefused(SERVER_ERROR, f"invalid transaction: {err}") from None


def _envelope(raw: bytes) -> tuple[int, list[rlp.Item]]:
    if not raw:
        raise ValueError("no bytes")
    kind = 0 if raw[0] >= 0xC0 else raw[0]
    if kind not in _FIELDS or (kind == 0 and raw[0] < 0xC0):
        raise ValueError(f"transaction type {raw[0]} is not supported: types 0, 1 and 2 are")
    items = rlp.decode(raw if kind == 0 else raw[1:])
    if not isinstance(items, list) or len(items) != _FIELDS[kind]:
        raise ValueError(f"type {kind} has {_FIELDS[kind]} fields")
    return kind, items


def _parse(kind: int, items: list[rlp.Item], raw: bytes, chain_id: int) -> SignedTransaction:
    body, (v, r, s) = items[:-3], [_number(item) for item in items[-3:]]
    parity, payload = _legacy(body, v, chain_id) if kind == 0 else _typed(kind, body, v, chain_id)
    tip, price, gas, to, value, data = _common(body if kind == 0 else body[1:], kind)
    return SignedTransaction(
        kind=kind,
        nonce=_number(body[0 if kind == 0 else 1], 64),
        max_tip=tip,
        max_price=price,
        gas=gas,
        to=to,
        value=value,
        data=data,
        access_list=() if kind == 0 else _access_list(body[-1]),
        v=v,
        r=r,
        s=s,
        hash=keccak256(raw),
        raw=raw,
        sender=_sender(keccak256(payload), r, s, parity),
    )


def _legacy(body: list[rlp.Item], v: int, chain_id: int) -> tuple[int, bytes]:
    if v < 35:
        raise ValueError("only replay-protected (EIP-155) transactions are allowed")
    _same_chain((v - 35) // 2, chain_id)
    return (v - 35) % 2, rlp.encode([*body, chain_id, b"", b""])


def _typed(kind: int, body: list[rlp.Item], v: int, chain_id: int) -> tuple[int, bytes]:
    if v > 1:
        raise ValueError("y parity is 0 or 1")
    _same_chain(_number(body[0]), chain_id)
    return v, bytes([kind]) + rlp.encode(body)


def _same_chain(have: int, want: int) -> None:
    if have != want:
        raise ValueError(f"invalid chain id for signer: have {have} want {want}")


def _common(fields: list[rlp.Item], kind: int) -> tuple[int, int, int, bytes | None, int, bytes]:
    """Tip, price, gas, to, value and data; `fields` begins with the nonce."""
    tip = _number(fields[1])
    price = _number(fields[2]) if kind == 2 else tip
    gas, to, value, data = fields[3:7] if kind == 2 else fields[2:6]
    if tip > price:
        raise ValueError("max priority fee per gas higher than max fee per gas")
    if not isinstance(to, bytes) or len(to) not in (0, 20) or not isinstance(data, bytes):
        raise ValueError("`to` has 20 bytes or none, and data is bytes")
    return tip, price, _number(gas, 64), to or None, _number(value), data


def _access_list(item: rlp.Item) -> AccessList:
    entries: list[tuple[bytes, tuple[int, ...]]] = []
    for entry in item if isinstance(item, list) else [item]:
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], list):
            raise ValueError("an access list entry is an address and a list of slots")
        address, slots = entry
        if not isinstance(address, bytes) or len(address) != 20:
            raise ValueError("an access list names an address of 20 bytes")
        if not all(isinstance(slot, bytes) and len(slot) == 32 for slot in slots):
            raise ValueError("a storage key has 32 bytes")
        entries.append((address, tuple(int.from_bytes(slot, "big") for slot in slots if isinstance(slot, bytes))))
    return tuple(entries)


def _number(item: rlp.Item, bits: int = 256) -> int:
    if not isinstance(item, bytes) or len(item) * 8 > bits or item[:1] == b"\0":
        raise ValueError(f"expected a whole number of at most {bits} bits without leading zeros")
    return int.from_bytes(item, "big")


def _sender(digest: bytes, r: int, s: int, parity: int) -> bytes:
    try:
        return recover_raw(Digest(digest), r.to_bytes(32, "big") + s.to_bytes(32, "big") + bytes([parity])).raw
    except SignatureInvalid as err:
        raise ValueError(f"invalid signature ({err.data['reason']}): {err.detail}") from err
