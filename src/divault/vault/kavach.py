"""Kavach's shards of a Lighthouse key: made, and put together again, in plain integers.

Rules:

1. Values are 32-byte big-endian hex in the scalar field of BLS12-381; the key is the 64 lower-case characters
   themselves. The key is a polynomial's value at zero, a shard is its value at a random index.
2. Too few shards, or one wrong shard, give a wrong key without a sign of it: only the tag of the file tells. Shards
   over the number that is needed do tell (`likely_keys`): those of one polynomial confirm each other.
3. Uploads use 3 of 5. Sets that the JavaScript `shardKey` made with the same numbers need 4: their polynomial is one
   degree higher.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Self

from divault.errors import BadRequest
from divault.values import Secret

FIELD_ORDER = 0x73EDA753299D7D483339D80809A1D80553BDA402FFFE5BFEFFFFFFFF00000001
"""Order of the scalar field of BLS12-381."""
THRESHOLD = 3
"""Shards that make a key, in the sets of uploads."""
NODES = 5
"""Kavach's nodes, each of which keeps one shard."""

_SCALAR = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)
_Point = tuple[int, int]


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


def generate(threshold: int = THRESHOLD, count: int = NODES) -> tuple[Secret, tuple[KeyShard, ...]]:
    """A new key (64 hex characters) and its shards, of which `threshold` make it again. Raises BadRequest."""
    key = Secret.of_text(f"{_random_scalar():064x}")
    return key, split_key(key, threshold, count)


def split_key(key: Secret, threshold: int = THRESHOLD, count: int = NODES) -> tuple[KeyShard, ...]:
    """Shards of a key that exists, at random indices; `threshold` of them make it again.

    Raises BadRequest for a key that is not 64 hex digits between zero and the field's order, and for numbers that make
    no set.
    """
    if not 1 <= threshold <= count <= 255:
        raise BadRequest("a set has 1 to 255 shards, and needs no more of them than there are")
    polynomial = [_scalar(key.reveal().decode("ascii", "replace")), *(_random_scalar() for _ in range(threshold - 1))]
    points: dict[int, int] = {}
    while len(points) < count:
        x = _random_scalar()
        y = _value(polynomial, x)
        if y:  # a shard of zero would be refused by whoever reads it
            points[x] = y
    return tuple(KeyShard(f"{y:064x}", f"{x:064x}") for x, y in points.items())


def recover_key(shards: Sequence[KeyShard]) -> str:
    """The key text that the shards interpolate to: 64 lower-case hex characters.

    Too few shards give a wrong key without a sign of it: only the tag of the file tells.
    Raises BadRequest for no shard, values outside the field, zero and repeated indices.
    """
    points = _points(shards)
    if not points or len({x for x, _ in points}) < len(points):
        raise BadRequest("key shards must be present and have distinct indices")
    return f"{_interpolated(points, 0):064x}"


def likely_keys(shards: Sequence[KeyShard], threshold: int = THRESHOLD) -> Iterator[str]:
    """Every key text that the shards may hold, the likeliest first, none twice: at most 15 for five shards.

    A shard that does not fit (damaged, or of another file) is outvoted: a polynomial that most shards lie on comes
    first; without a vote, four shards of rule 3 are likelier than a damaged one. Repeated indices are dropped.
    Raises BadRequest for values outside the field.
    """
    points = list(dict(_points(shards)).items())
    found: dict[str, tuple[int, int]] = {}
    for needed in (threshold, threshold + 1):
        for few in combinations(points, needed):
            agreeing = sum(_interpolated(few, x) == y for x, y in points)
            key = f"{_interpolated(few, 0):064x}"
            # How many shards confirm it beyond those that any polynomial of this degree goes through.
            found.setdefault(key, (agreeing - needed, needed))
    yield from sorted(found, key=lambda key: found[key], reverse=True)


def _points(shards: Sequence[KeyShard]) -> list[_Point]:
    return [(_scalar(shard.index), _scalar(shard.key)) for shard in shards]


def _interpolated(points: Sequence[_Point], at: int) -> int:
    """The value at `at` of the polynomial through the points (Lagrange)."""
    total = 0
    for x, y in points:
        above = below = 1
        for other, _ in points:
            if other != x:
                above = above * (at - other) % FIELD_ORDER
                below = below * (x - other) % FIELD_ORDER
        total += y * above * pow(below, -1, FIELD_ORDER)
    return total % FIELD_ORDER


def _value(polynomial: Sequence[int], x: int) -> int:
    total = 0
    for coefficient in reversed(polynomial):
        total = (total * x + coefficient) % FIELD_ORDER
    return total


def _random_scalar() -> int:
    return 1 + secrets.randbelow(FIELD_ORDER - 1)


def _scalar(text: object) -> int:
    value = int(text, 16) if isinstance(text, str) and _SCALAR.fullmatch(text) else 0
    if not 0 < value < FIELD_ORDER:
        raise BadRequest("a key shard is two texts of 64 hex digits, above zero and below the field's order")
    return value
