"""How often and how much one wallet, one peer or everybody may ask: token buckets and counters in memory.

Rules:

1. Before the signature only the peer address and a global byte budget count (`PeerLimits`): whoever could spend another
   wallet's bucket without its key would lock that wallet out.
2. After the signature each wallet has its own bucket and a cap on runs at once (`WalletLimits`). A further copy of a
   request that is already in flight takes nothing: it is about to be refused as a copy.
3. Signed refusals cost a signature and a row for ever, so they have a budget of their own per peer and for the node.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from divault.errors import Overloaded, RateLimited
from divault.values import Address, Principal

Clock = Callable[[], float]
_MAX_BUCKETS = 100_000  # buckets remembered; the least recently used is forgotten, which only ever favours its owner


class Buckets:
    """Token buckets by key: `per_minute` tokens flow in per minute, up to that many are saved."""

    def __init__(self, per_minute: int, *, clock: Clock = time.monotonic) -> None:
        self._rate = per_minute / 60
        self._capacity = float(per_minute)
        self._clock = clock
        self._levels: OrderedDict[object, tuple[float, float]] = OrderedDict()

    def take(self, key: object) -> float:
        """Take one token: 0.0 if there was one, otherwise the seconds until there is."""
        now = self._clock()
        level, then = self._levels.pop(key, (self._capacity, now))
        level = min(self._capacity, level + (now - then) * self._rate)
        taken = level >= 1
        self._levels[key] = (level - 1 if taken else level, now)
        if len(self._levels) > _MAX_BUCKETS:
            self._levels.popitem(last=False)
        return 0.0 if taken else (1 - level) / self._rate


class WalletLimits:
    """What one authenticated wallet may do at once and per minute."""

    def __init__(self, per_minute: int, at_once: int, *, clock: Clock = time.monotonic) -> None:
        self._buckets = Buckets(per_minute, clock=clock)
        self._per_minute = per_minute
        self._at_once = at_once
        self._running: dict[Address, dict[bytes, int]] = {}

    @asynccontextmanager
    async def admit(self, principal: Principal) -> AsyncIterator[None]:
        """Let one request of the wallet in while the context lasts. Raises RateLimited."""
        running = self._running.setdefault(principal.user, {})
        nonce = principal.nonce.raw
        try:
            if nonce not in running:
                self._check(principal.user, len(running))
            running[nonce] = running.get(nonce, 0) + 1
            try:
                yield
            finally:
                running[nonce] -= 1
                if not running[nonce]:
                    del running[nonce]
        finally:
            if not running:
                self._running.pop(principal.user, None)

    def _check(self, user: Address, running: int) -> None:
        if running >= self._at_once:
            raise RateLimited(
                f"this wallet has {running} runs under way; wait for one to finish", retry_after=1, limit=self._at_once
            )
        if wait := self._buckets.take(user):
            raise RateLimited(
                f"more than {self._per_minute} calls per minute from this wallet",
                retry_after=wait,
                limit=self._per_minute,
            )


class PeerLimits:
    """What one network address may ask before anybody knows who it is, and the bytes all requests hold together."""

    def __init__(self, per_minute: int, max_bytes_in_flight: int, *, clock: Clock = time.monotonic) -> None:
        self._buckets = Buckets(per_minute, clock=clock)
        self._per_minute = per_minute
        self._free = max_bytes_in_flight

    def knock(self, peer: str) -> None:
        """Count one request. Raises RateLimited."""
        if wait := self._buckets.take(peer):
            raise RateLimited(
                f"more than {self._per_minute} requests per minute from this address",
                retry_after=wait,
                limit=self._per_minute,
            )

    @contextmanager
    def bytes_in_flight(self, size: int) -> Iterator[None]:
        """Reserve `size` bytes of body while the context lasts. Raises Overloaded."""
        if size > self._free:
            raise Overloaded("the node holds as many request bytes as it may; try again", retry_after=1)
        self._free -= size
        try:
            yield
        finally:
            self._free += size


class RefusalBudget:
    """How many signed refusals are issued: `per_peer` per minute to one address, `per_node` per minute in all."""

    def __init__(self, per_peer: int = 60, per_node: int = 600, *, clock: Clock = time.monotonic) -> None:
        self._peers = Buckets(per_peer, clock=clock)
        self._node = Buckets(per_node, clock=clock)

    def spend(self, peer: str) -> None:
        """Count one refusal receipt. Raises RateLimited when the budget is spent: then there is no receipt."""
        if wait := self._peers.take(peer) or self._node.take("node"):
            raise RateLimited("too many refused calls; wait before the next one", retry_after=wait)
