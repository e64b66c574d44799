"""The filter of eth_getLogs: addresses and topics, each position a value, a choice of values, or anything. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from divault.devnet.answers import data, invalid
from divault.devnet.blocks import Block
from divault.devnet.machine import RawLog

_FIELDS = {"address", "topics", "fromBlock", "toBlock", "blockHash"}


@dataclass(frozen=True, slots=True)
class LogFilter:
    """`addresses` empty: any; a topic position that is empty: any."""

    addresses: frozenset[bytes]
    topics: tuple[frozenset[bytes], ...]

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> LogFilter:
        """From the parameter of eth_getLogs, whose block range the caller reads. Raises RpcRefused."""
        unknown = fields.keys() - _FIELDS
        if unknown:
            raise invalid(f"a filter has no field {min(unknown)!r}")
        topics = fields.get("topics") or []
        if not isinstance(topics, list) or len(topics) > 4:
            raise invalid("topics are a list of at most four")
        return cls(_choice(fields.get("address"), 20), tuple(_choice(topic, 32) for topic in topics))

    def matching(self, block: Block) -> Iterator[dict[str, Any]]:
        """The block's logs that pass, in order, as JSON."""
        for index, receipt in enumerate(block.receipts):
            if any(self._passes(log) for log in receipt.logs):
                rows = block.logs_json(index)
                yield from (row for row, log in zip(rows, receipt.logs, strict=True) if self._passes(log))

    def _passes(self, log: RawLog) -> bool:
        if self.addresses and log.address not in self.addresses:
            return False
        if len(self.topics) > len(log.topics):
            return False
        return all(not wanted or topic in wanted for wanted, topic in zip(self.topics, log.topics, strict=False))


def _choice(value: Any, size: int) -> frozenset[bytes]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    return frozenset(data(item, size) for item in values)
