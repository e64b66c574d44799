"""What the formats ask of the files they are given, and the two loops that every one of them needs."""

from __future__ import annotations

from typing import Any, Protocol


class Reader(Protocol):
    """A binary source: a file opened for reading, `io.BytesIO`, a wrapper that counts."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Bytes put into the buffer, 0 at the end of the source."""


class Writer(Protocol):
    """A binary sink; one that takes less than it was given is called again with the rest."""

    def write(self, data: memoryview, /) -> Any:
        """Number of bytes taken, or None for all of them."""


def fill(source: Reader, view: memoryview) -> int:
    """Read until the view is full or the source ends; the number of bytes read."""
    done = 0
    while done < len(view):
        count = source.readinto(view[done:])
        if not count:
            break
        done += count
    return done


def write_all(sink: Writer, view: memoryview) -> None:
    """Write the whole view, however little the sink takes at a time."""
    while view:
        taken = sink.write(view)
        view = view[len(view) if taken is None else taken :]


class Rest:
    """A source whose first bytes were read already: gives them again, then the rest."""

    def __init__(self, head: bytes, source: Reader) -> None:
        self._head = memoryview(head)
        self._source = source

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Bytes put into the buffer, 0 at the end of the source."""
        if not self._head:
            return self._source.readinto(buffer)
        count = min(len(buffer), len(self._head))
        buffer[:count] = self._head[:count]
        self._head = self._head[count:]
        return count
