"""Who waits for one model, and who comes next: a turn for each caller, however much one of them sends.

Rules:

1. Each owner (a wallet) has a line of its own, first come, first served; the lines take turns.
2. When all places are taken and one owner holds at least two more of them than the newcomer's, the newest of his is
   told to come back instead of the newcomer.
3. A pass takes requests with equal parameters only, and one that went wrong in company goes alone.
4. Each pass begins with the line whose turn it is, and a line that doesn't fit into another's pass keeps its place: so
   its head is run after as many passes, at most, as there are lines before it.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from divault.errors import Overloaded
from divault.models.base import Piece
from divault.workers import wire

MAX_PASS_BYTES = 8 << 20
"""Input and parameters of all callers in one pass; who has more goes alone."""
_MOST_PASSED = 256
"""Lines that don't fit which a pass looks past, in 50 us: who stands behind more of them waits for their turns."""


@dataclass(slots=True, eq=False)
class Job:
    """One caller's request for one model; without an item it asks whether the worker is there."""

    owner: bytes
    item: wire.Item | None
    done: asyncio.Future[wire.Success]
    arrived: float
    """Loop time, as all times here."""
    run_s: float
    """How long a pass with it may take."""
    limit_s: float | None = None
    """The caller's own deadline, if he set one, from his arrival: for waiting and running together."""
    on_piece: Callable[[Piece], None] | None = None
    """Gets the answer's pieces as they are made; such a request goes alone."""
    priced: bool = False
    """Its answer is paid for: once a piece of it was handed on, its caller's own deadline doesn't end it any more."""
    alone: bool = False
    """It went wrong in company."""
    expiry: asyncio.TimerHandle | None = None

    @property
    def deadline(self) -> float:
        """When its caller gives it up; infinite where he set none."""
        return math.inf if self.limit_s is None else self.arrived + self.limit_s

    def latest(self, now: float) -> float:
        """When it is given up, if it waits from now on: for as long as it might run, or until its caller's deadline."""
        return min(now + self.run_s, self.deadline)

    @property
    def size(self) -> int:
        """Bytes of input and parameters."""
        return self.item.size if self.item is not None else 0

    def shares_a_pass_with(self, other: Job) -> bool:
        """Whether both may go at once (rule 3)."""
        if self.item is None or other.item is None or self.alone or other.alone:
            return False
        return self.on_piece is other.on_piece is None and self.item.parameters == other.item.parameters


class Queue:
    """The lines of one model."""

    def __init__(self) -> None:
        self._lines: OrderedDict[bytes, deque[Job]] = OrderedDict()
        self._first: deque[Job] = deque()
        """What was taken before, and goes again ahead of everybody."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Job]:
        """Everybody who waits."""
        return chain(self._first, *self._lines.values())

    def oldest(self) -> float | None:
        """When the one who waits longest came."""
        heads = [line[0].arrived for line in (*self._lines.values(), self._first) if line]
        return min(heads, default=None)

    def put(self, job: Job, places: int, refusal: Callable[[], Overloaded]) -> None:
        """Take the job in, by rule 2. Raises the refusal, or gives it to the one whose place it takes."""
        if self._count >= places:
            self._make_room(job.owner, refusal)
        self._lines.setdefault(job.owner, deque()).append(job)
        self._count += 1

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Let these go next, each alone, in this order."""
        self._first.extendleft(reversed(jobs))
        self._count += len(jobs)

    def put_last(self, owner: bytes) -> None:
        """Of those who go again, let this owner's go after the others'."""
        self._first = deque(sorted(self._first, key=lambda job: job.owner == owner))

    def drop(self, job: Job) -> None:
        """Take the job out, if it waits."""
        line = self._first if job in self._first else self._lines.get(job.owner, ())
        if job in line:
            line.remove(job)  # type: ignore[union-attr]  # it is in there, so it is no empty tuple
            self._count -= 1
            if not line and line is not self._first:
                del self._lines[job.owner]

    def take(self, most: int) -> list[Job]:
        """The next pass: at most so many jobs; empty when nobody waits."""
        if self._first:
            self._count -= 1
            return [self._first.popleft()]
        if not self._lines:
            return []
        found = [self._pop(next(iter(self._lines)))]
        turn: Collection[bytes] = self._lines
        while turn and len(found) < most:
            owners = self._company(found, turn, most)
            found += [self._pop(owner) for owner in owners]
            # Another turn is for these alone: who did not fit, fits no better now.
            turn = [owner for owner in owners if owner in self._lines]
        return found

    def _company(self, found: Sequence[Job], turn: Iterable[bytes], most: int) -> list[bytes]:
        """Whose heads go along with these jobs, of the lines whose turn it is. Who doesn't fit keeps his place."""
        size, room, passed = sum(job.size for job in found), most - len(found), 0
        owners: list[bytes] = []
        for owner in turn:
            if len(owners) == room or passed == _MOST_PASSED:
                break
            job = self._lines[owner][0]
            if size + job.size <= MAX_PASS_BYTES and job.shares_a_pass_with(found[0]):
                owners.append(owner)
                size += job.size
            else:
                passed += 1
        return owners

    def take_all(self) -> list[Job]:
        """Everybody who waits."""
        jobs = list(self)
        self._lines.clear()
        self._first.clear()
        self._count = 0
        return jobs

    def _pop(self, owner: bytes) -> Job:
        """The head of the owner's line, which has had its turn."""
        line = self._lines[owner]
        job = line.popleft()
        self._count -= 1
        if line:
            self._lines.move_to_end(owner)
        else:
            del self._lines[owner]
        return job

    def _make_room(self, owner: bytes, refusal: Callable[[], Overloaded]) -> None:
        greediest = max(self._lines, key=lambda one: len(self._lines[one]), default=owner)
        if len(self._lines.get(greediest, ())) < len(self._lines.get(owner, ())) + 2:
            raise refusal()
        newest = self._lines[greediest][-1]
        self.drop(newest)
        if not newest.done.done():
            newest.done.set_exception(refusal())
