"""The state of the chain: accounts and storage slots, with an undo journal that answers for older blocks. Pure.

Rules:

1. State changes by `apply` only; each change is journaled, so that any earlier mark can be restored or viewed.
2. The journal reaches back `KEEP` marks' worth of blocks; what is older is gone and said to be gone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Slot = tuple[bytes, int]


@dataclass(frozen=True, slots=True)
class Account:
    """Nonce, balance in wei, and code of an address."""

    nonce: int = 0
    balance: int = 0
    code: bytes = b""


NOBODY = Account()


@dataclass(slots=True)
class Changes:
    """New values of accounts and slots; what isn't named stays."""

    accounts: dict[bytes, Account] = field(default_factory=dict)
    slots: dict[Slot, int] = field(default_factory=dict)


class World:
    """Accounts and storage. `mark` names the present state for `undo_to` and `at`."""

    def __init__(self) -> None:
        self.accounts: dict[bytes, Account] = {}
        self.slots: dict[Slot, int] = {}
        self._journal: list[tuple[bytes, Account] | tuple[Slot, int]] = []
        self._forgotten = 0

    @property
    def mark(self) -> int:
        """Number of changes so far."""
        return self._forgotten + len(self._journal)

    def account(self, address: bytes) -> Account:
        """The account; a fresh one where nothing ever happened."""
        return self.accounts.get(address, NOBODY)

    def slot(self, address: bytes, index: int) -> int:
        """Value of a storage slot, 0 where never written."""
        return self.slots.get((address, index), 0)

    def apply(self, changes: Changes) -> Changes:
        """Make the changes; gives the changes that would take them back."""
        back = Changes(
            {address: self.account(address) for address in changes.accounts},
            {slot: self.slots.get(slot, 0) for slot in changes.slots},
        )
        self._journal += back.accounts.items()
        self._journal += back.slots.items()
        self.accounts.update(changes.accounts)
        self.slots.update(changes.slots)
        return back

    def slots_of(self, address: bytes) -> dict[Slot, int]:
        """Every slot of the address that was ever written, set to zero: what destroying the account does."""
        return {slot: 0 for slot in self.slots if slot[0] == address}

    def undo_to(self, mark: int) -> None:
        """Back to the state at `mark`. Raises ValueError when the journal no longer reaches that far."""
        for old in self._since(mark):
            _restore(self, old)
        del self._journal[mark - self._forgotten :]

    def at(self, mark: int) -> World:
        """A copy of the state at `mark`. Raises ValueError when the journal no longer reaches that far."""
        copy = World()
        copy.accounts, copy.slots = dict(self.accounts), dict(self.slots)
        for old in self._since(mark):
            _restore(copy, old)
        return copy

    def forget_before(self, mark: int) -> None:
        """Drop the means to return to states before `mark`."""
        drop = max(0, mark - self._forgotten)
        del self._journal[:drop]
        self._forgotten += drop

    def _since(self, mark: int) -> list[tuple[bytes, Account] | tuple[Slot, int]]:
        if mark < self._forgotten:
            raise ValueError("that state is no longer kept")
        return self._journal[mark - self._forgotten :][::-1]


def _restore(world: World, old: tuple[bytes, Account] | tuple[Slot, int]) -> None:
    key, value = old
    if isinstance(value, Account):
        world.accounts[key] = value  # type: ignore[index]  # an Account stands beside an address, a number beside a slot
    else:
        world.slots[key] = value  # type: ignore[index]  # the same
