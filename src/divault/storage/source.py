"""The seam `Storage`: where bytes come from. A source promises nothing; the fetcher verifies every block.

The bytes of `read` are one of three forms, named by the caller:

- `Form.BLOCK`: exactly the block that the CID names. No ranges.
- `Form.CAR`: one CARv1 that holds at least the blocks of the file under the CID that overlap the ranges, parents before
  children, best in depth-first order. More blocks are tolerated up to a cap.
- `Form.FILE`: the bytes of the file under the CID, the ranges back to back and nothing between them.

`ranges` are `range(first, end)` in bytes of the file, ascending and disjoint; none at all means everything.

What a source can't give it refuses by StorageFailed with one of these reasons: `unsupported` (this form, ever),
`unranged` (a range that does not start at 0 was answered with the whole file), `not_found` (this content), `busy` (with
`retry_after` seconds), `unreachable`, `timeout`, `cut` (the answer ended early), `encoded`, `redirect`, or `http_` and
the status.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from enum import StrEnum
from typing import Protocol

from divault.errors import BlockTooLarge, StorageFailed
from divault.values import Cid

Piece = bytes | memoryview


class Form(StrEnum):
    """What the bytes of an answer are; the values are those of the gateways' `format` parameter."""

    BLOCK = "raw"
    CAR = "car"
    FILE = "file"


class Storage(Protocol):
    """A source of content."""

    @property
    def name(self) -> str:
        """How errors call it: the host of a gateway, never a path or a key."""

    @property
    def trustless(self) -> bool | None:
        """Whether it gives blocks and CARs, as far as it was probed; None where nobody looked yet."""

    def read(self, cid: Cid, ranges: Sequence[range] = (), form: Form = Form.CAR) -> AsyncGenerator[Piece, None]:
        """The bytes, in pieces of any size (about 1 MiB is best), each good until the next one is asked for.

        Closing the generator ends the transfer.

        Raises StorageFailed, before or between pieces.
        """


async def short_answer(source: Storage, cid: Cid, form: Form, most: int) -> bytes:
    """An answer that can't be longer than a block. Raises BlockTooLarge over `most` bytes, or as `read` does."""
    answer = bytearray()
    async with aclosing(source.read(cid, (), form)) as pieces:
        async for piece in pieces:
            answer += piece
            if len(answer) > most:
                raise BlockTooLarge(f"over {most} bytes for one block")
    return bytes(answer)


def refused(source: str, cid: Cid, reason: str, detail: str, *, retry_after: float | None = None) -> StorageFailed:
    """The error that a source raises."""
    waits = {} if retry_after is None else {"retry_after": retry_after}
    return StorageFailed(f"{source}: {detail}", cid=str(cid), gateway=source, reason=reason, **waits)
