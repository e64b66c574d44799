"""One download: from sources that may lie, stall or know only part, into an output, until the DAG is complete.

`plan` decides what is asked whom; here requests run side by side, what comes is verified and written, and what a source
did is remembered. Rounds go on while anything is left that is worth a try; a source that asks for patience (429), or
that broke down after it had delivered, is waited for only when no other helps.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Protocol

from divault.errors import (
    BlockTooLarge,
    CarMalformed,
    ContentInvalid,
    HashMismatch,
    MissingBlock,
    StorageFailed,
    TooManyExtraBytes,
    Truncated,
)
from divault.ipfs.cid import make_cid, multihash, split_cid
from divault.ipfs.verifier import CarStream, Verifier, Wanted, check_block
from divault.storage.arrival import Progress
from divault.storage.plan import LARGE_NODE_BYTES, Job, Peer, left_of, next_job
from divault.storage.source import Form, Piece, Storage, short_answer
from divault.storage.threads import in_thread
from divault.values import Cid

TICK_S = 0.25
"""So often stalled and superfluous requests are looked for."""
MAX_WAIT_S = 60.0
"""Longest Retry-After that is honoured in full; beyond it we come back earlier."""
MAX_WAITS = 5
"""So often a transfer waits for busy sources before it gives up."""
MAX_STRIKES = 2
"""So often in a row a source that had delivered may fail to answer before it is left alone."""
MAX_OUTSIDE_BYTES = 1024 * 1024
"""More of the file than this beside the span that was asked for, and the source does not know ranges."""
QUARANTINE_S = 600.0
"""So long a source that sent a wrong block is not asked for the same content again, while there are others."""

NODE_REASONS = ("disk", "cache_full")
"""Reasons of errors that no source is to blame for."""
SOURCE_FAULTS = (HashMismatch, CarMalformed, Truncated, TooManyExtraBytes, BlockTooLarge, MissingBlock)
"""Kinds of ContentInvalid that say something about the answer; all others are about the content itself."""
_SILENT = ("unreachable", "timeout")


class Flushed(Protocol):
    """What the verifier writes into; nothing is held back after `flush`."""

    def flush(self) -> None:
        """Called after every step."""


class Quarantine:
    """Which sources sent a wrong block of which content, for a while."""

    def __init__(self) -> None:
        self._until: dict[tuple[str, str], float] = {}

    def add(self, cid: Cid, source: str) -> None:
        """Keep the source away from this content."""
        now = time.monotonic()
        self._until = {key: until for key, until in self._until.items() if until > now}
        self._until[cid.text, source] = now + QUARANTINE_S

    def sources(self, cid: Cid, sources: Sequence[Storage]) -> list[Storage]:
        """Those that may be asked: all where each is in quarantine, since asking is the only way to learn more."""
        now = time.monotonic()
        clean = [source for source in sources if self._until.get((cid.text, source.name), 0.0) <= now]
        return clean or list(sources)


class Transfer:
    """Fills a part; `run` returns when everything is verified and written."""

    def __init__(
        self,
        cid: Cid,
        sources: Sequence[Storage],
        verifier: Verifier,
        part: Flushed,
        progress: Progress,
        quarantine: Quarantine | None = None,
    ) -> None:
        self._cid, self._verifier, self._part, self._progress = cid, verifier, part, progress
        self._quarantine = quarantine or Quarantine()
        self._peers = [Peer(source) for source in self._quarantine.sources(cid, sources)]
        self._lock = threading.Lock()
        self._running: dict[asyncio.Task[None], Job] = {}
        self._errors: list[tuple[str, StorageFailed]] = []

    async def run(self) -> None:
        """Raises StorageFailed (ContentInvalid among it) naming CID and sources."""
        waits, before = 0, 0
        try:
            while not self._verifier.complete:
                self._start_jobs(self._missing())
                if not self._running:
                    waits, before = 1 if self._achieved() > before else waits + 1, self._achieved()
                    await self._patience(waits)
                    continue
                ended, _ = await asyncio.wait(self._running, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
                missing = self._missing() if ended else []
                for task in ended:
                    self._settle(task, missing)
                self._end_superfluous()
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    def _start_jobs(self, missing: Sequence[Wanted]) -> None:
        while job := next_job(missing, list(self._running.values()), self._peers, time.monotonic()):
            self._running[asyncio.create_task(self._perform(job))] = job

    def _missing(self) -> list[Wanted]:
        with self._lock:
            return sorted(self._verifier.missing(), key=lambda want: (want.offset, want.size or 0, want.multihash))

    async def _patience(self, waits: int) -> None:
        """Sleep until a source is ready that asked for time. Raises when there is none."""
        busy = [peer.ready_at for peer in self._peers if peer.ready_at > time.monotonic()]
        if not busy or waits > MAX_WAITS:
            raise self._failure()
        await asyncio.sleep(max(0.0, min(busy) - time.monotonic()))

    def _settle(self, task: asyncio.Task[None], missing: Sequence[Wanted]) -> None:
        """A request ended: remember what it did not bring, or who is to blame. Raises what no source can mend."""
        job = self._running.pop(task)
        if task.cancelled():
            return
        err, left = task.exception(), left_of(job, missing)
        if err is None:
            job.peer.gaps |= {(job.form, want.multihash) for want in left}
        elif isinstance(err, StorageFailed):
            self._blame(job, err, left)
        else:
            raise err

    def _end_superfluous(self) -> None:
        """Another source was faster: what is still on its way here is no longer needed."""
        if not any(job.helped for job in self._running.values()):
            return
        missing = self._missing()
        for task, job in self._running.items():
            if not left_of(job, missing):
                task.cancel()

    # --- what a source did ----------------------------------------------------------------------------------------

    def _blame(self, job: Job, err: StorageFailed, left: Sequence[Wanted]) -> None:
        peer, name, reason = job.peer, job.peer.source.name, str(err.data.get("reason"))
        if reason in NODE_REASONS or (isinstance(err, ContentInvalid) and not isinstance(err, SOURCE_FAULTS)):
            raise named(err, self._cid, "" if reason in NODE_REASONS else name) from err
        if reason == "unranged":
            peer.whole_only = True
            return
        self._errors.append((name, err))
        if isinstance(err, HashMismatch):
            self._quarantine.add(self._cid, name)
        peer.refused |= _useless_after(err, job)
        if reason == "busy":
            peer.ready_at = time.monotonic() + min(float(err.data.get("retry_after", 1)), MAX_WAIT_S)
        elif reason in _SILENT:
            self._strike(peer)
        else:
            peer.gaps |= {(job.form, want.multihash) for want in _not_given(job, reason, left)}

    def _strike(self, peer: Peer) -> None:
        """A source does not answer: one that had delivered gets some seconds, any other is left alone."""
        if peer.ready_at > time.monotonic():
            return  # several requests of one outage
        peer.strikes += 1
        if peer.delivered and peer.strikes <= MAX_STRIKES:
            peer.ready_at = time.monotonic() + 2.0 ** (peer.strikes - 1)
        else:
            peer.refused |= set(Form)

    # --- one request ----------------------------------------------------------------------------------------------

    async def _perform(self, job: Job) -> None:
        if job.form is Form.BLOCK or (job.form is Form.FILE and job.wants[0].size is None):
            await self._blocks(job)
        elif job.form is Form.CAR:
            await self._car(job)
        else:
            await self._file(job)

    async def _blocks(self, job: Job) -> None:
        for want in job.wants:
            parts, _ = split_cid(b"\x01" + bytes([want.codec]) + want.multihash)
            is_root = want.multihash == multihash(self._cid)
            cid = self._cid if is_root else make_cid(1, want.codec, parts.hash_code, parts.digest)
            if self._verifier.wants(want.multihash):
                block = await short_answer(job.peer.source, cid, job.form, self._verifier.limits.max_block_bytes)
                await self._use(job, self._accept, [(want.multihash, block)])
            job.reached += 1

    async def _car(self, job: Job) -> None:
        stream = CarStream(self._verifier, self._lock, None if job.whole else job.span)
        async with aclosing(self._answer(job)) as pieces:
            async for piece in pieces:
                await self._use(job, stream.feed, piece)
                if self._has_enough(job, stream):
                    return
        stream.finish()

    def _has_enough(self, job: Job, stream: CarStream) -> bool:
        """True when the rest of the answer is of no use to this job."""
        if self._verifier.complete:
            return True
        if stream.outside_bytes > MAX_OUTSIDE_BYTES and not job.whole:
            self._take_whole(job)
            return not job.whole
        last = stream.last
        if last is None or not job.span or (last.size or 0) > LARGE_NODE_BYTES:
            return False
        if last.offset in job.span:
            job.reached = max(job.reached, min(last.offset + (last.size or 0), job.span.stop))
        return job.reached >= job.span.stop and not left_of(job, self._missing())

    def _take_whole(self, job: Job) -> None:
        """A source sends all to everybody: the first request that is under way there is to bring the rest, too."""
        job.peer.whole_only = True
        others = [other for other in self._running.values() if other.peer is job.peer and other.form is Form.CAR]
        if not any(other.whole for other in others):
            first = min(others, key=lambda other: other.span.start)
            first.whole, first.span = True, range(first.span.start, self._verifier.size or 0)

    async def _file(self, job: Job) -> None:
        """Raw leaves out of the plain file; each is hashed before it counts."""
        leaves = deque((want.offset, want.size or 0, want.multihash) for want in job.wants)
        cutter = _Cutter(0 if job.whole else job.span.start)
        async with aclosing(self._answer(job)) as pieces:
            async for piece in pieces:
                cutter.feed(piece)
                ready = []
                while leaves and (leaf := cutter.take(leaves[0][0], leaves[0][1])) is not None:
                    ready.append((leaves[0][2], leaf))
                    job.reached = leaves[0][0] + leaves[0][1]
                    leaves.popleft()
                await self._use(job, self._accept, ready)
                if not leaves or leaves[0][0] >= job.span.stop:
                    return
                cutter.keep(leaves[0][0])
        raise Truncated("the file ended before its last leaf")

    def _answer(self, job: Job) -> AsyncGenerator[Piece, None]:
        everything = job.whole or job.span == range(self._verifier.size or 0)
        return job.peer.source.read(self._cid, () if everything else (job.span,), job.form)

    def _accept(self, blocks: Sequence[tuple[bytes, Piece]]) -> None:
        for key, data in blocks:
            block = check_block(key, data, self._verifier.limits)
            with self._lock:
                self._verifier.use(block)

    async def _use(self, job: Job, step: Callable[..., object], *arguments: object) -> None:
        """Verify and write in a thread (hashing and writing release the GIL), then tell how far we are."""
        before = self._achieved()
        await in_thread(self._step, step, *arguments)
        if self._achieved() > before:
            job.moved, job.moved_at = True, time.monotonic()
            job.peer.delivered, job.peer.strikes = True, 0
        self._progress(self._verifier.bytes_written, self._verifier.size or 0)

    def _achieved(self) -> int:
        return self._verifier.bytes_written + len(self._verifier.nodes)

    def _step(self, step: Callable[..., object], *arguments: object) -> None:
        try:
            step(*arguments)
        finally:
            with self._lock:
                self._part.flush()

    def _failure(self) -> StorageFailed:
        """The error of the whole: the content's kind where a source sent wrong bytes, else the last reason."""
        if not self._peers:
            return StorageFailed(f"no source is set to fetch {self._cid} from", cid=str(self._cid), reason="no_source")
        if not self._errors:
            self._errors.append((self._peers[0].source.name, MissingBlock("the answers end before the content does")))
        faults = [(name, err) for name, err in self._errors if isinstance(err, ContentInvalid)]
        name, chosen = (faults or self._errors)[0]
        if len(self._peers) == 1:
            return named(chosen, self._cid, name)
        told = "; ".join(dict.fromkeys(f"{name}: {err.detail}" for name, err in self._errors))
        everyone = ", ".join(dict.fromkeys(peer.source.name for peer in self._peers))
        error = type(chosen) if len({type(err) for _, err in self._errors}) == 1 else StorageFailed
        reason = chosen.data.get("reason") if error is type(chosen) else "all_sources_failed"
        return error(f"no source gave all of {self._cid}: {told}", cid=str(self._cid), gateway=everyone, reason=reason)


class _Cutter:
    """Leaves out of a stream of pieces, without a copy where a leaf lies in one piece."""

    def __init__(self, at: int) -> None:
        self._at = at
        """Where what we have begins in the file."""
        self._have: Piece = b""

    def feed(self, piece: Piece) -> None:
        """The next piece of the stream; it may change after `keep`."""
        self._have = b"".join((self._have, piece)) if self._have else piece

    def take(self, offset: int, size: int) -> Piece | None:
        """The bytes of a leaf; None while they are not all there."""
        start = offset - self._at
        return self._have[start : start + size] if start + size <= len(self._have) else None

    def keep(self, offset: int) -> None:
        """Go on from this place of the file, with a copy of what we have of it."""
        start = min(offset - self._at, len(self._have))
        self._have = bytes(self._have[start:])
        self._at += start


def _not_given(job: Job, reason: str, left: Sequence[Wanted]) -> Sequence[Wanted]:
    """The blocks that are not asked for in this form again, so that a transfer without progress comes to its end."""
    if job.form is Form.BLOCK:
        return job.wants[job.reached : job.reached + 1] if reason in ("cut", "not_found") else left
    if job.moved:
        return ()
    return left[:1] if reason == "cut" else left  # behind a block that it lacks there may be others


def _useless_after(err: StorageFailed, job: Job) -> set[Form]:
    """The forms in which a source need not be asked again after this error."""
    reason, every = err.data.get("reason"), set(Form)
    if isinstance(err, HashMismatch):
        # A wrong block may only mean that it ignores `format` and sends the plain file; all else is quarantine.
        return {Form.BLOCK, Form.CAR} if job.form is Form.BLOCK else every
    if isinstance(err, Truncated) and job.moved:
        return set()  # a cut that looks like an end: the next request asks for the rest
    if reason == "redirect":
        return every
    if reason == "not_found":
        # It may lack one block of a file that it else has.
        return set() if job.form is Form.BLOCK and job.wants[0].size is not None else every
    return {job.form} if isinstance(err, ContentInvalid) or reason in ("unsupported", "encoded") else set()


def named(err: StorageFailed, cid: Cid, source: str = "") -> StorageFailed:
    """The same error, saying which content and, if there is one to name, which source it is about."""
    data = {**err.data, "cid": str(cid)} | ({"gateway": source} if source else {})
    origin = f"{cid} from {source}" if source else f"{cid}"
    return type(err)(err.detail if str(cid) in err.detail else f"{origin}: {err.detail}", **data)
