"""Recovery of a Lighthouse key from Kavach's shards: Lagrange interpolation at zero, in plain integers.

Values are 32-byte big-endian hex in the scalar field of BLS12-381; the key is the 64 lower-case characters themselves.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from divault.errors import BadRequest

FIELD_ORDER = 0x73EDA753299D7D483339D80809A1D80553BDA402FFFE5BFEFFFFFFFF00000001
"""Order of the scalar field of BLS12-381."""

_SCALAR = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)


@dataclass(frozen=True, slots=True, repr=False)
class KeyShard:
    """A point of the polynomial whose value at zero is the key: 32-byte big-endian hex, as Kavach's nodes give it."""

    key: str
    index: str

    @classmethod
    def parse(cls, value: object) -> Self:
        """From a decoded JSON object `{"key", "index"}`; other members are ignored. Raises BadRequest."""
        if not isinstance(value, dict):
            raise BadRequest("a key shard is an object with key and index")
        shard = cls(value.get("key", ""), value.get("index", ""))
        _scalar(shard.key)
        _scalar(shard.index)
        return shard


def recover_key(shards: Sequence[KeyShard]) -> str:
    """The key text that the shards interpolate to: 64 lower-case hex characters.

    Too few shards give a wrong key without a sign of it: only the tag of the file tells.
    Raises BadRequest for no shard, values outside the field, zero and repeated indices.
    """
    points = [(_scalar(shard.index), _scalar(shard.key)) for shard in shards]
    if not points or len({x for x, _ in points}) < len(points):
        raise BadRequest("key shards must be present and have distinct indices")
    total = 0
    for x, y in points:
        above = below = 1
        for other, _ in points:
            if other != x:
                above = above * other % FIELD_ORDER
                below = below * (other - x) % FIELD_ORDER
        total += y * above * pow(below, -1, FIELD_ORDER)
    return f"{total % FIELD_ORDER:064x}"


def _scalar(text: object) -> int:
    value = int(text, 16) if isinstance(text, str) and _SCALAR.fullmatch(text) else 0
    if not 0 < value < FIELD_ORDER:
        raise BadRequest("a key shard is two texts of 64 hex digits, above zero and below the field's order")
    return value
