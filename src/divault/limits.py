"""How often and how much one wallet, one peer or everybody may ask: token buckets and counters in memory.

Rules:

1. Before the signature only the peer address and a global byte budget count (`PeerLimits`): whoever could spend another
   wallet's bucket without its key would lock that wallet out.
2. After the signature each wallet has its own bucket and a cap on runs at once (`WalletLimits`). A further copy of a
   request that is already in flight takes nothing: it is about to be refused as a copy. Another request under the same
   nonce is no copy: it goes as far as its gate.
3. A key that did not open a file is not tried on it again, and a wallet that guesses is stopped (`WrongKeys`).
4. Signed refusals cost a signature and a row for ever, so they have a budget of their own per peer and for the node.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Self

from divault.errors import Overloaded, RateLimited, WrongKey
from divault.values import Address, Principal, Secret

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
        level = self._level(key, now)
        taken = level >= 1
        self._levels[key] = (level - 1 if taken else level, now)
        self._levels.move_to_end(key)
        if len(self._levels) > _MAX_BUCKETS:
            self._levels.popitem(last=False)
        return 0.0 if taken else (1 - level) / self._rate

    def wait(self, key: object) -> float:
        """Seconds until there is a token, 0.0 if there is one; takes none."""
        return max(0.0, 1 - self._level(key, self._clock())) / self._rate

    def _level(self, key: object, now: float) -> float:
        level, then = self._levels.get(key, (self._capacity, now))
        return min(self._capacity, level + max(0.0, now - then) * self._rate)  # no clock takes tokens away


class WalletLimits:
    """What one authenticated wallet may do at once and per minute."""

    def __init__(self, per_minute: int, at_once: int, *, clock: Clock = time.monotonic) -> None:
        self._buckets = Buckets(per_minute, clock=clock)
        self._per_minute = per_minute
        self._at_once = at_once
        self._running: dict[Address, dict[bytes, int]] = {}
        """How many copies of each request are in flight."""

    def admit(self, principal: Principal) -> AbstractContextManager[None]:
        """Let one request of the wallet in while the context lasts, which raises RateLimited."""
        return _Admission(self, principal)

    def enter(self, principal: Principal) -> None:
        """Count one request. Raises RateLimited."""
        running = self._running.get(principal.user, {})
        request = principal.request.raw
        if request not in running:
            self._check(principal.user, len(running))
        running[request] = running.get(request, 0) + 1
        self._running[principal.user] = running

    def leave(self, principal: Principal) -> None:
        """One that was counted has ended."""
        running, request = self._running[principal.user], principal.request.raw
        running[request] -= 1
        if not running[request]:
            del running[request]
        if not running:
            del self._running[principal.user]

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


class _Admission:
    """One request that is let in. A class of its own, because a generator costs each call as much as the rest here."""

    __slots__ = ("_limits", "_principal")

    def __init__(self, limits: WalletLimits, principal: Principal) -> None:
        self._limits = limits
        self._principal = principal

    def __enter__(self) -> None:
        self._limits.enter(self._principal)

    def __exit__(self, *_: object) -> None:
        self._limits.leave(self._principal)


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

    def bytes_in_flight(self) -> BytesInFlight:
        """A context that bytes of a body are reserved in."""
        return BytesInFlight(self)

    def take(self, size: int) -> None:
        """Reserve bytes of a body. Raises Overloaded."""
        if size > self._free:
            raise Overloaded("the node holds as many request bytes as it may; try again", retry_after=1)
        self._free -= size

    def give_back(self, size: int) -> None:
        """They are not held any more."""
        self._free += size


class BytesInFlight:
    """Bytes that one request holds, until they are given back or the context ends."""

    __slots__ = ("_limits", "_size")

    def __init__(self, limits: PeerLimits) -> None:
        self._limits = limits
        self._size = 0

    def take(self, size: int) -> None:
        """Reserve so many more. Raises Overloaded."""
        self._limits.take(size)
        self._size += size

    def give_back(self) -> None:
        """The body is not needed any more."""
        size, self._size = self._size, 0
        self._limits.give_back(size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()


class WrongKeys:
    """Keys that were tried on a file and did not open it. A derivation costs 0.1 s to seconds, so each is tried once.

    What is remembered of a key is a keyed digest, useless outside this process; keys that opened a file leave nothing.
    """

    def __init__(self, per_minute: int = 10, most: int = 10_000, *, clock: Clock = time.monotonic) -> None:
        """`per_minute` wrong keys of one wallet; `most` are remembered, the oldest is forgotten first."""
        self._buckets = Buckets(per_minute, clock=clock)
        self._per_minute = per_minute
        self._most = most
        self._pepper = secrets.token_bytes(32)
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def known(self, cid: str, key: Secret) -> bool:
        """True when this key is known not to open this file."""
        return self._name(cid, key) in self._seen

    @contextmanager
    def attempt(self, user: Address, cid: str, key: Secret) -> Iterator[None]:
        """One try of a caller's key while the context lasts; a `WrongKey` that leaves it is counted and remembered.

        Raises WrongKey at once for a key that failed before, RateLimited for a wallet with too many of them.
        """
        if wait := self._buckets.wait(user):
            raise RateLimited(
                f"more than {self._per_minute} wrong keys per minute from this wallet: check the key before you go on",
                retry_after=wait,
                limit=self._per_minute,
            )
        if self.known(cid, key):
            self._buckets.take(user)
            raise WrongKey("this key was tried on this file before and does not open it: send another", cid=cid)
        try:
            yield
        except WrongKey:
            self._buckets.take(user)
            self.remember(cid, key)
            raise

    def remember(self, cid: str, key: Secret) -> None:
        """This key does not open this file."""
        self._seen[self._name(cid, key)] = None
        if len(self._seen) > self._most:
            self._seen.popitem(last=False)

    def _name(self, cid: str, key: Secret) -> bytes:
        return hashlib.blake2b(cid.encode() + b"\0" + key.reveal(), key=self._pepper, digest_size=32).digest()


class RefusalBudget:
    """How many signed refusals are issued: `per_peer` per minute to one address, `per_node` per minute in all."""

    def __init__(self, per_peer: int = 60, per_node: int = 600, *, clock: Clock = time.monotonic) -> None:
        self._peers = Buckets(per_peer, clock=clock)
        self._node = Buckets(per_node, clock=clock)

    def spend(self, peer: str) -> None:
        """Count one refusal receipt. Raises RateLimited when the budget is spent: then there is no receipt."""
        if wait := self._peers.take(peer) or self._node.take("node"):
            raise RateLimited("too many refused calls; wait before the next one", retry_after=wait)
