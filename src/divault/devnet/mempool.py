"""Transactions that wait to be mined, per sender in order of nonce. Pure.

A replacement with the same nonce must pay at least a tenth more, as public nodes demand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from divault.devnet.answers import SERVER_ERROR, RpcRefused
from divault.devnet.transactions import SignedTransaction

MAX_PENDING = 10_000
"""Most transactions kept; a loop that forgets to mine is told, not fed."""


class Mempool:
    """Waiting transactions by sender and nonce, and by hash."""

    def __init__(self) -> None:
        self._by_sender: dict[bytes, dict[int, SignedTransaction]] = {}
        self._by_hash: dict[bytes, SignedTransaction] = {}

    def get(self, digest: bytes) -> SignedTransaction | None:
        """The waiting transaction with this hash."""
        return self._by_hash.get(digest)

    def add(self, tx: SignedTransaction) -> None:
        """Let it wait, in place of one with the same nonce that pays less. Raises RpcRefused."""
        waiting = self._by_sender.setdefault(tx.sender, {})
        old = waiting.get(tx.nonce)
        if tx.hash in self._by_hash:
            raise RpcRefused(SERVER_ERROR, "already known")
        if len(self._by_hash) >= MAX_PENDING:
            raise RpcRefused(SERVER_ERROR, "txpool is full")
        if old is not None:
            if 10 * tx.max_price < 11 * old.max_price or 10 * tx.max_tip < 11 * old.max_tip:
                raise RpcRefused(SERVER_ERROR, "replacement transaction underpriced")
            del self._by_hash[old.hash]
        waiting[tx.nonce] = tx
        self._by_hash[tx.hash] = tx

    def remove(self, tx: SignedTransaction) -> None:
        """Mined or dropped."""
        self._by_hash.pop(tx.hash, None)
        self._by_sender.get(tx.sender, {}).pop(tx.nonce, None)

    def clear(self) -> None:
        """Forget all of them."""
        self._by_sender.clear()
        self._by_hash.clear()

    def next_nonce(self, sender: bytes, mined: int) -> int:
        """The first nonce from `mined` on that nothing waits with."""
        waiting = self._by_sender.get(sender, {})
        while mined in waiting:
            mined += 1
        return mined

    def ready(self, mined: Callable[[bytes], int]) -> Iterator[SignedTransaction]:
        """In order of arrival, those whose nonce is next once the ones before them are mined."""
        taken: dict[bytes, int] = {}
        rest = list(self._by_hash.values())
        while rest:
            later = []
            for tx in rest:
                wanted = taken.get(tx.sender, mined(tx.sender))
                if tx.nonce == wanted:
                    taken[tx.sender] = wanted + 1
                    yield tx
                else:
                    later.append(tx)
            if len(later) == len(rest):
                return
            rest = later
