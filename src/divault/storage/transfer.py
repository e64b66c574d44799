"""One download: from sources that may lie, stall or know only part, into an output, until the DAG is complete.

Each source in turn gives what it can of what is still missing:

1. The root block alone, so that a size over the limit is refused before the transfer.
2. One CAR of everything, or of the gaps.
3. dag-pb nodes block by block, if the CAR did not bring them.
4. Leaves: a few block by block; many as ranges of the plain file, since raw leaves are the file's bytes; else by block.

Whoever sends a wrong block is not asked again. Rounds go on while they bring something new; a source that asks for
patience (429) is waited for only when no other helps.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

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
from divault.ipfs.cid import DAG_PB, RAW, make_cid, split_cid
from divault.ipfs.verifier import CarStream, Verifier, Wanted
from divault.storage.cache import Part
from divault.storage.source import Form, Storage, short_answer
from divault.values import Cid

P = ParamSpec("P")
T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with verified bytes and total bytes, from the event loop."""

MAX_SPANS = 8
"""Ranges of one CAR request; more gaps are merged, nearest first (the verifier allows for nodes sent 8 times)."""
FEW_BLOCKS = 16
"""So many missing leaves are asked for one by one; more as ranges."""
MAX_WAIT_S = 60.0
"""Longest Retry-After that is honoured in full; beyond it we come back earlier."""
MAX_WAITS = 5
"""So often a transfer waits for busy sources before it gives up."""

NODE_REASONS = ("disk", "cache_full")
"""Reasons of errors that no source is to blame for."""
SOURCE_FAULTS = (HashMismatch, CarMalformed, Truncated, TooManyExtraBytes, BlockTooLarge, MissingBlock)
"""Kinds of ContentInvalid that say something about the answer; all others are about the content itself."""
_LEAVES_SOURCE = {"unreachable", "timeout", "busy", "not_found", "redirect"}
"""Reasons after which asking the same source in another form would be a waste."""


@dataclass(slots=True)
class _Peer:
    """What this transfer has learned about a source."""

    source: Storage
    refused: set[Form] = field(default_factory=set)
    ready_at: float = 0.0


class Transfer:
    """Fills a part; `run` returns when everything is verified and written."""

    def __init__(
        self, cid: Cid, sources: Sequence[Storage], verifier: Verifier, part: Part, progress: Progress
    ) -> None:
        self._cid, self._verifier, self._part, self._progress = cid, verifier, part, progress
        self._peers = [_Peer(source) for source in sources]
        self._errors: list[tuple[str, StorageFailed]] = []

    async def run(self) -> None:
        """Raises StorageFailed (ContentInvalid among it) naming CID and sources."""
        waits = 0
        while not self._verifier.complete:
            before = self._achieved()
            for peer in self._peers:
                if not self._verifier.complete and peer.ready_at <= time.monotonic():
                    await self._from_peer(peer)
            if self._achieved() == before and not self._verifier.complete:
                busy = [peer.ready_at for peer in self._peers if peer.ready_at > time.monotonic()]
                if not busy or waits == MAX_WAITS:
                    raise self._failure()
                waits += 1
                await asyncio.sleep(max(0.0, min(busy) - time.monotonic()))

    def _achieved(self) -> int:
        return self._verifier.bytes_written + len(self._verifier.nodes)

    async def _from_peer(self, peer: _Peer) -> None:
        """Steps 1 to 4 of the module's list."""
        for form, step in (
            (Form.BLOCK, self._root),
            (Form.CAR, self._car),
            (Form.BLOCK, self._nodes),
            (Form.BLOCK, self._few_leaves),
            (Form.FILE, self._file),
            (Form.BLOCK, self._leaves),
        ):
            if self._verifier.complete:
                return
            if form in peer.refused:
                continue
            before = self._achieved()
            try:
                await step(peer.source)
            except StorageFailed as err:
                went_on = err.data.get("reason") == "cut" and self._achieved() > before
                if not self._blame(peer, form, err) or went_on:
                    return  # after a cut the next round asks for the gaps

    def _blame(self, peer: _Peer, form: Form, err: StorageFailed) -> bool:
        """Remember what a source did; True when another form of it is worth a try. Raises what no source can mend."""
        name, reason = peer.source.name, str(err.data.get("reason"))
        if reason in NODE_REASONS or (isinstance(err, ContentInvalid) and not isinstance(err, SOURCE_FAULTS)):
            raise named(err, self._cid, "" if reason in NODE_REASONS else name) from err
        self._errors.append((name, err))
        peer.refused |= _useless_after(err, form)
        if reason == "busy":
            peer.ready_at = time.monotonic() + min(float(err.data.get("retry_after", 1)), MAX_WAIT_S)
        return reason not in _LEAVES_SOURCE

    async def _root(self, source: Storage) -> None:
        if self._verifier.size is None:
            await self._blocks(source, self._verifier.missing())

    async def _car(self, source: Storage) -> None:
        spans = self._spans(self._verifier.missing(), MAX_SPANS)
        if spans is None:
            return
        stream = CarStream(self._verifier)
        async with aclosing(source.read(self._cid, spans, Form.CAR)) as pieces:
            async for piece in pieces:
                await self._use(stream.feed, piece)
                if self._verifier.complete:
                    return
        stream.finish()

    async def _nodes(self, source: Storage) -> None:
        while nodes := [wanted for wanted in self._verifier.missing() if wanted.codec == DAG_PB]:
            await self._blocks(source, nodes)

    async def _few_leaves(self, source: Storage) -> None:
        leaves = list(self._verifier.missing())
        if len(leaves) <= FEW_BLOCKS:
            await self._blocks(source, leaves)

    async def _leaves(self, source: Storage) -> None:
        await self._blocks(source, self._verifier.missing())

    async def _blocks(self, source: Storage, wanted: Iterable[Wanted], form: Form = Form.BLOCK) -> None:
        for multihash, codec in dict.fromkeys((w.multihash, w.codec) for w in list(wanted)):
            parts, _ = split_cid(b"\x01" + bytes([codec]) + multihash)
            cid = self._cid if self._verifier.size is None else make_cid(1, codec, parts.hash_code, parts.digest)
            if self._verifier.wants(multihash):
                block = await short_answer(source, cid, form, self._verifier.limits.max_block_bytes)
                await self._use(self._verifier.accept, multihash, block)

    async def _file(self, source: Storage) -> None:
        """Raw leaves out of the plain file; each is hashed before it counts. A raw root is the file itself."""
        if self._verifier.size is None and self._cid.codec == RAW:
            await self._blocks(source, self._verifier.missing(), Form.FILE)
            return
        leaves = sorted((w.offset, w.size, w.multihash) for w in self._verifier.missing() if w.codec == RAW and w.size)
        if not leaves:
            return
        spans = _merged([range(offset, offset + size) for offset, size, _ in leaves])
        async with aclosing(source.read(self._cid, spans, Form.FILE)) as pieces:
            have = bytearray()
            async for piece in pieces:
                have += piece
                while leaves and len(have) >= leaves[0][1]:
                    _, size, multihash = leaves.pop(0)
                    await self._use(self._verifier.accept, multihash, bytes(have[:size]))
                    del have[:size]
                if not leaves:
                    return
        raise Truncated("the file ended before its last leaf")

    async def _use(self, step: Callable[..., object], *arguments: object) -> None:
        """Verify and write in a thread (hashing and writing release the GIL), then tell how far we are."""
        await in_thread(self._step, step, *arguments)
        self._progress(self._verifier.bytes_written, self._verifier.size or 0)

    def _step(self, step: Callable[..., object], *arguments: object) -> None:
        try:
            step(*arguments)
        finally:
            self._part.flush()

    def _spans(self, missing: Iterable[Wanted], most: int) -> tuple[range, ...] | None:
        """What to ask a CAR for: () for everything, None when ranges can't name what is missing."""
        if not self._verifier.bytes_written:
            return ()
        spans = _merged([range(w.offset, w.offset + w.size) for w in missing if w.size])
        while len(spans) > most:
            nearest = min(range(1, len(spans)), key=lambda i: spans[i].start - spans[i - 1].stop)
            spans[nearest - 1 : nearest + 1] = [range(spans[nearest - 1].start, spans[nearest].stop)]
        return tuple(spans) or None

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


def _useless_after(err: StorageFailed, form: Form) -> set[Form]:
    """The forms in which a source need not be asked again after this error."""
    reason = err.data.get("reason")
    if isinstance(err, HashMismatch):
        # A wrong block may only mean that it ignores `format` and sends the plain file; all else is quarantine.
        return {Form.BLOCK, Form.CAR} if form is Form.BLOCK else set(Form)
    if reason == "not_found":
        return set(Form)
    return {form} if isinstance(err, ContentInvalid) or reason in ("unsupported", "encoded") else set()


def named(err: StorageFailed, cid: Cid, source: str = "") -> StorageFailed:
    """The same error, saying which content and, if there is one to name, which source it is about."""
    data = {**err.data, "cid": str(cid)} | ({"gateway": source} if source else {})
    origin = f"{cid} from {source}" if source else f"{cid}"
    return type(err)(err.detail if str(cid) in err.detail else f"{origin}: {err.detail}", **data)


async def in_thread(step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The blocking step in a thread. Cancelling waits for its end: it may be writing to a file that we close next."""
    work = asyncio.ensure_future(asyncio.to_thread(step, *args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([work])
        work.exception()  # looked at, so that nobody complains about it
        raise


def _merged(spans: Sequence[range]) -> list[range]:
    """Ascending and disjoint; what touches becomes one."""
    merged: list[range] = []
    for span in sorted(spans, key=lambda r: r.start):
        if merged and span.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, span.stop))
        else:
            merged.append(span)
    return merged
