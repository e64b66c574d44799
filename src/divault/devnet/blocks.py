"""Blocks, receipts and logs: header hashes, transaction and receipt roots and bloom as on a Cancun chain. Pure.

A block's hash is keccak256 of its RLP header, so parent and child prove each other. One field means something else than
on a public chain: `stateRoot` is a hash over the parent's and this block's outcome, not a Merkle root of accounts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from divault.devnet import rlp
from divault.devnet.answers import show
from divault.devnet.machine import GAS_LIMIT, RawLog, Surroundings
from divault.devnet.transactions import SignedTransaction
from divault.keccak import keccak256

_EMPTY_UNCLES = keccak256(rlp.encode([]))
_EMPTY_TRIE = keccak256(rlp.encode(b""))
_MIN_BASE_FEE = 7
"""EIP-1559 never falls below it: an eighth of less rounds to nothing."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """Outcome of a mined transaction."""

    tx: SignedTransaction
    succeeded: bool
    gas_used: int
    cumulative_gas: int
    price: int
    logs: tuple[RawLog, ...]
    first_log: int
    created: bytes | None

    def consensus(self) -> bytes:
        """The bytes that go into the receipts root."""
        logs: list[rlp.Source] = [[log.address, list(log.topics), log.data] for log in self.logs]
        body = rlp.encode([int(self.succeeded), self.cumulative_gas, bloom(self.logs), logs])
        return body if self.tx.kind == 0 else bytes([self.tx.kind]) + body


@dataclass(frozen=True, slots=True)
class Header:
    """What the block hash covers, as far as it varies on this chain."""

    parent: bytes
    state: bytes
    transactions: bytes
    receipts: bytes
    bloom: bytes
    number: int
    gas_used: int
    timestamp: int
    prevrandao: bytes
    base_fee: int
    coinbase: bytes = bytes(20)

    def encode(self) -> bytes:
        """RLP of all fields of a Cancun header."""
        return rlp.encode(
            [
                *(self.parent, _EMPTY_UNCLES, self.coinbase, self.state, self.transactions, self.receipts, self.bloom),
                *(0, self.number, GAS_LIMIT, self.gas_used, self.timestamp, b"", self.prevrandao, bytes(8)),
                *(self.base_fee, _EMPTY_TRIE, 0, 0, bytes(32)),
            ]
        )

    def next_base_fee(self) -> int:
        """Base fee of the child (EIP-1559), wei per gas."""
        target = GAS_LIMIT // 2
        change = self.base_fee * abs(self.gas_used - target) // target // 8
        if self.gas_used > target:
            return self.base_fee + max(1, change)
        return max(_MIN_BASE_FEE, self.base_fee - change)

    def surroundings(self) -> Surroundings:
        """What a call at this block sees of it."""
        return Surroundings(self.number, self.timestamp, self.prevrandao, self.coinbase)


@dataclass(frozen=True, slots=True)
class Block:
    """A mined block; its hash is computed once, by `make`."""

    header: Header
    hash: bytes
    receipts: tuple[Receipt, ...]
    size: int

    @classmethod
    def make(cls, header: Header, receipts: Sequence[Receipt]) -> Block:
        """The block of this header and these receipts."""
        encoded = header.encode()
        size = len(encoded) + sum(len(receipt.tx.raw) for receipt in receipts)
        return cls(header, keccak256(encoded), tuple(receipts), size)

    def to_json(self, chain_id: int, *, full: bool) -> dict[str, Any]:
        """As eth_getBlockBy... answers; `full` puts whole transactions where hashes stand."""
        head = self.header
        transactions: list[Any] = [show(receipt.tx.hash) for receipt in self.receipts]
        if full:
            transactions = [self.transaction_json(index, chain_id) for index in range(len(self.receipts))]
        return {
            "number": hex(head.number),
            "hash": show(self.hash),
            "parentHash": show(head.parent),
            "sha3Uncles": show(_EMPTY_UNCLES),
            "miner": show(head.coinbase),
            "stateRoot": show(head.state),
            "transactionsRoot": show(head.transactions),
            "receiptsRoot": show(head.receipts),
            "logsBloom": show(head.bloom),
            "difficulty": "0x0",
            "gasLimit": hex(GAS_LIMIT),
            "gasUsed": hex(head.gas_used),
            "timestamp": hex(head.timestamp),
            "extraData": "0x",
            "mixHash": show(head.prevrandao),
            "nonce": show(bytes(8)),
            "baseFeePerGas": hex(head.base_fee),
            "withdrawalsRoot": show(_EMPTY_TRIE),
            "blobGasUsed": "0x0",
            "excessBlobGas": "0x0",
            "parentBeaconBlockRoot": show(bytes(32)),
            "size": hex(self.size),
            "uncles": [],
            "withdrawals": [],
            "transactions": transactions,
        }

    def transaction_json(self, index: int, chain_id: int) -> dict[str, Any]:
        """The mined transaction at this index."""
        receipt = self.receipts[index]
        return {**receipt.tx.to_json(chain_id), **self._place(index), "gasPrice": hex(receipt.price)}

    def receipt_json(self, index: int) -> dict[str, Any]:
        """As eth_getTransactionReceipt answers."""
        receipt = self.receipts[index]
        tx = receipt.tx
        return {
            "transactionHash": show(tx.hash),
            **self._place(index),
            "type": hex(tx.kind),
            "from": show(tx.sender),
            "to": None if tx.to is None else show(tx.to),
            "status": hex(receipt.succeeded),
            "gasUsed": hex(receipt.gas_used),
            "cumulativeGasUsed": hex(receipt.cumulative_gas),
            "effectiveGasPrice": hex(receipt.price),
            "contractAddress": None if receipt.created is None else show(receipt.created),
            "logs": self.logs_json(index),
            "logsBloom": show(bloom(receipt.logs)),
        }

    def logs_json(self, index: int) -> list[dict[str, Any]]:
        """The logs of the transaction at this index."""
        receipt = self.receipts[index]
        common = {"transactionHash": show(receipt.tx.hash), **self._place(index)}
        return [
            {
                "address": show(log.address),
                "topics": [show(topic) for topic in log.topics],
                "data": show(log.data),
                **common,
                "blockTimestamp": hex(self.header.timestamp),
                "logIndex": hex(receipt.first_log + offset),
                "removed": False,
            }
            for offset, log in enumerate(receipt.logs)
        ]

    def _place(self, index: int) -> dict[str, str]:
        return {
            "blockHash": show(self.hash),
            "blockNumber": hex(self.header.number),
            "transactionIndex": hex(index),
        }


def bloom(logs: Sequence[RawLog]) -> bytes:
    """The 2048-bit filter over addresses and topics (yellow paper 4.3.1)."""
    bits = 0
    for log in logs:
        for entry in (log.address, *log.topics):
            digest = keccak256(entry)
            for at in (0, 2, 4):
                bits |= 1 << (int.from_bytes(digest[at : at + 2], "big") & 2047)
    return bits.to_bytes(256, "big")


def list_root(items: Sequence[bytes]) -> bytes:
    """Root of the Merkle-Patricia trie that maps RLP(index) to each item (yellow paper 4.3.2)."""
    if not items:
        return _EMPTY_TRIE
    leaves = {_nibbles(rlp.encode(index)): item for index, item in enumerate(items)}
    return keccak256(rlp.encode(_node(leaves)))


def _nibbles(key: bytes) -> bytes:
    return bytes(part for byte in key for part in (byte >> 4, byte & 15))


def _node(leaves: Mapping[bytes, bytes]) -> rlp.Source:
    """The node over these leaves, keyed by what is left of their paths."""
    if len(leaves) == 1:
        ((path, value),) = leaves.items()
        return [_compact(path, leaf=True), value]
    shared = _common_prefix(min(leaves), max(leaves))
    if shared:
        return [_compact(min(leaves)[:shared], leaf=False), _reference(_rest(leaves, shared))]
    branches: list[rlp.Source] = []
    for nibble in range(16):
        below = {path[1:]: value for path, value in leaves.items() if path[:1] == bytes([nibble])}
        branches.append(_reference(below) if below else b"")
    return [*branches, leaves.get(b"", b"")]


def _rest(leaves: Mapping[bytes, bytes], shared: int) -> dict[bytes, bytes]:
    return {path[shared:]: value for path, value in leaves.items()}


def _reference(leaves: Mapping[bytes, bytes]) -> rlp.Source:
    node = _node(leaves)
    encoded = rlp.encode(node)
    return node if len(encoded) < 32 else keccak256(encoded)


def _common_prefix(first: bytes, last: bytes) -> int:
    size = 0
    while size < min(len(first), len(last)) and first[size] == last[size]:
        size += 1
    return size


def _compact(path: bytes, *, leaf: bool) -> bytes:
    flag = 2 * leaf + len(path) % 2
    nibbles = bytes([flag]) + path if len(path) % 2 else bytes([flag, 0]) + path
    return bytes(nibbles[i] << 4 | nibbles[i + 1] for i in range(0, len(nibbles), 2))
