"""What a transfer asks whom for next: pure decisions over what is missing, what is under way and what each source did.

Order of things: the root block (its size decides whether anything else is fetched), the large dag-pb nodes block by
block, then the leaves in spans of the file. Rules:

1. Sources stand in the order of the settings. While little is missing, the first that can help works alone; a large
   file is spread over `MAX_JOBS` connections, `MAX_JOBS_PER_SOURCE` to one source.
2. A form that a source refused, or in which it left a block out, is not tried there again; so every transfer ends.
3. When nothing is left to begin, the idle help the slow: of a span that will need longer than `SLOW_S` they take the
   rear half, and what stands still (`STALL_S`) is asked for at another source as well; the first verified block wins.
4. A source that sent one wrong block is out for this content.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from divault.ipfs.cid import DAG_PB, RAW
from divault.ipfs.verifier import Wanted
from divault.storage.source import Form, Storage

MIB = 1024 * 1024
MAX_JOBS = 6
"""Requests of one transfer at a time; more gain nothing on any line measured, and each holds up to 4 MiB of memory."""
MAX_JOBS_PER_SOURCE = 3
"""Gateways limit requests by address; a few connections hide their latency."""
ALONE_BYTES = 8 * MIB
"""While no more than this is missing, one request brings it: a second would cost more than it saves."""
MIN_SPAN_BYTES, MAX_SPAN_BYTES = 4 * MIB, 32 * MIB
"""Of one request: large enough that asking is cheap, small enough that a failure costs little."""
STALL_S = 5.0
"""So long without a verified block, and the same bytes are asked for elsewhere."""
SLOW_S = 1.0
"""A span that needs longer than this from now on is shared with whoever is idle."""
BLOCKS_AT_ONCE = 16
"""Blocks that one job asks for, one after another."""
FEW_LEAVES = 2
"""So many missing leaves are asked for one by one before ranges of the plain file."""
LARGE_NODE_BYTES = 2 * MIB
"""A dag-pb block for more of the file than a block may hold has children, and is fetched before leaves."""


@dataclass(slots=True, eq=False)
class Peer:
    """What this transfer has learned about a source."""

    source: Storage
    refused: set[Form] = field(default_factory=set)
    gaps: set[tuple[Form, bytes]] = field(default_factory=set)
    """Blocks that it did not give in a form."""
    ready_at: float = 0.0
    strikes: int = 0
    """Failures in a row of a source that had delivered before."""
    delivered: bool = False
    whole_only: bool = False
    """It answers ranges with the whole file: one request at a time, for all of it."""

    def can(self, form: Form, want: Wanted) -> bool:
        """Whether asking for this block in this form is worth a try."""
        if form in self.refused or (form, want.multihash) in self.gaps:
            return False
        return form is not Form.FILE or (want.codec == RAW and want.size != 0)


@dataclass(slots=True, eq=False)
class Job:
    """One request (or, for blocks, a few) to one source, and the part of the file that it is about."""

    peer: Peer
    form: Form
    wants: list[Wanted]
    span: range
    """Bytes of the file; shrinks when somebody takes its rear over."""
    whole: bool = False
    """Ask for the file without ranges."""
    reached: int = 0
    """Where the last verified byte of it ends; of blocks, how many were asked for and came."""
    moved: bool = False
    """Something verified came."""
    began_at: float = field(default_factory=time.monotonic)
    moved_at: float = field(default_factory=time.monotonic)
    helped: bool = False
    """Somebody asks for the same bytes elsewhere."""

    def claims(self, want: Wanted) -> bool:
        """True when this job is to bring the block."""
        if self.form is Form.BLOCK or want.size is None:
            return any(want.multihash == own.multihash for own in self.wants)
        return want.offset in self.span

    def stalled(self, now: float) -> bool:
        """Nothing verified came for a while."""
        return now - self.moved_at > STALL_S

    def seconds_left(self, now: float) -> float:
        """At the rate of this job so far; 0 while it is too young to tell."""
        came, left, age = self.reached - self.span.start, self.span.stop - self.reached, now - self.began_at
        return age * left / max(came, 1) if age > SLOW_S else 0.0


def next_job(missing: Sequence[Wanted], running: Sequence[Job], peers: Sequence[Peer], now: float) -> Job | None:
    """The next request that is worth sending, None while there is none. `missing` by offset."""
    if len(running) >= MAX_JOBS:
        return None
    able = [peer for peer in peers if peer.ready_at <= now and _has_room(peer, running)]
    if not able:
        return None
    free = [want for want in missing if not any(job.claims(want) for job in running)]
    alone = _is_small(missing) and any(not job.stalled(now) for job in running)
    for peer in () if alone else able:
        job = _first_choice(peer, free, missing)
        if job is not None:
            return job
    return _help(missing, running, able, now)


def left_of(job: Job, missing: Iterable[Wanted]) -> list[Wanted]:
    """What the job has not brought yet."""
    return [want for want in missing if job.claims(want)]


def _has_room(peer: Peer, running: Sequence[Job]) -> bool:
    most = 1 if peer.whole_only else MAX_JOBS_PER_SOURCE
    return sum(job.peer is peer for job in running) < most


def _is_small(missing: Sequence[Wanted]) -> bool:
    return any(want.size is None for want in missing) or sum(want.size or 0 for want in missing) <= ALONE_BYTES


def _first_choice(peer: Peer, free: Sequence[Wanted], missing: Sequence[Wanted]) -> Job | None:
    """The first of the forms, in the order that fits what is free, for which something can be asked."""
    small = _is_small(missing)
    for form, fitting in _orders(peer, free, small=small):
        wants = [want for want in fitting if peer.can(form, want)]
        if wants and form is Form.BLOCK:
            return _blocks(peer, wants)
        if wants:
            return _span(peer, form, wants, missing)
    return None


def _orders(peer: Peer, free: Sequence[Wanted], *, small: bool) -> list[tuple[Form, list[Wanted]]]:
    every = list(free)
    if any(want.size is None for want in free):  # the root
        return [(Form.BLOCK, every), (Form.CAR, every), (Form.FILE, every)]
    nodes = [want for want in free if want.codec == DAG_PB]
    large = [] if small else [want for want in nodes if (want.size or 0) > LARGE_NODE_BYTES]
    leaves = [want for want in free if want.codec == RAW]
    files = [(Form.FILE, leaves)]
    ordered = [(Form.BLOCK, large), (Form.CAR, every), (Form.BLOCK, nodes)]
    ordered += [(Form.BLOCK, leaves), *files] if len(leaves) <= FEW_LEAVES else [*files, (Form.BLOCK, leaves)]
    return files + ordered if peer.source.trustless is False else ordered


def _blocks(peer: Peer, wants: Sequence[Wanted]) -> Job:
    chosen = list({want.multihash: want for want in wants}.values())[:BLOCKS_AT_ONCE]
    return Job(peer, Form.BLOCK, chosen, range(0))


def _span(peer: Peer, form: Form, wants: Sequence[Wanted], missing: Sequence[Wanted]) -> Job:
    """From the first of them on, without holes, as much as one request is to bring."""
    first = wants[0]
    if first.size is None:
        return Job(peer, form, list(wants), range(0), whole=True)
    total = sum(want.size or 0 for want in missing)
    if peer.whole_only:
        span = range(first.offset, _end(wants[-1]))
        return Job(peer, form, list(wants), span, whole=True, reached=first.offset)
    most = total if total <= ALONE_BYTES else min(MAX_SPAN_BYTES, max(MIN_SPAN_BYTES, total // (2 * MAX_JOBS)))
    chosen: list[Wanted] = []
    end = first.offset
    for want in wants:
        if want.offset > end or (chosen and _end(want) - first.offset > most):
            break
        chosen.append(want)
        end = max(end, _end(want))
    if chosen[0].size and (chosen[0].size or 0) > most:  # a node whose children are not known: only part of it
        end = first.offset + most
    return Job(peer, form, chosen, range(first.offset, max(end, first.offset + 1)), reached=first.offset)


def _end(want: Wanted) -> int:
    return want.offset + (want.size or 0)


def _help(missing: Sequence[Wanted], running: Sequence[Job], able: Sequence[Peer], now: float) -> Job | None:
    for job in running:
        if job.stalled(now) and not job.helped:
            helper = _again(job, missing, able)
            if helper is not None:
                job.helped = True
                return helper
    spans = [job for job in running if job.form is not Form.BLOCK and not job.whole and job.seconds_left(now) > SLOW_S]
    for job in sorted(spans, key=lambda job: job.seconds_left(now), reverse=True):
        helper = _rear_half(job, missing, able)
        if helper is not None:
            return helper
    return None


def _again(job: Job, missing: Sequence[Wanted], able: Sequence[Peer]) -> Job | None:
    """The same bytes from another source."""
    left = left_of(job, missing)
    others = [peer for peer in able if peer is not job.peer]
    found = (_first_choice(peer, left, missing) for peer in others) if left else iter(())
    return next((job for job in found if job is not None), None)


def _rear_half(job: Job, missing: Sequence[Wanted], able: Sequence[Peer]) -> Job | None:
    middle = (job.reached + job.span.stop) // 2
    rear = [want for want in left_of(job, missing) if want.offset >= middle]
    for peer in able if rear else ():
        if peer.whole_only:
            continue
        usable = list(takewhile(lambda want: peer.can(job.form, want), rear))  # noqa: B023  # used at once
        if len(usable) == len(rear):
            taken = Job(peer, job.form, rear, range(rear[0].offset, job.span.stop), reached=rear[0].offset)
            job.span = range(job.span.start, rear[0].offset)
            return taken
    return None
