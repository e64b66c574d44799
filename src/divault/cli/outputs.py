"""Files that commands write: opened before the work is done, so that its result is never without a place."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from divault.errors import BadRequest


@contextmanager
def writing(path: Path, field: str) -> Iterator[None]:
    """For what makes or fills a file that an option names. Raises BadRequest where that can't be done."""
    try:
        yield
    except FileExistsError as err:
        raise BadRequest(f"{path} exists already", field=field) from err
    except OSError as err:
        raise BadRequest(f"{path} can't be written: {err.strerror}", field=field) from err


class Output:
    """A file that can be written, and is as it was until `write`. Use it in a `with` block; `field` names the option.

    A file that was not there is removed again where nothing was written.
    """

    def __init__(self, path: Path, field: str) -> None:
        """Raises BadRequest when it can't be written."""
        self._path = path
        self._field = field
        with writing(path, field):
            try:
                self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                self._made = True
            except FileExistsError:
                self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
                self._made = False

    def write(self, content: bytes) -> None:
        """Make this what the file holds. Raises BadRequest, for example when the disk is full."""
        with writing(self._path, self._field):
            if stat.S_ISREG(os.fstat(self._fd).st_mode):  # a device or pipe takes it as it comes
                os.ftruncate(self._fd, 0)
            self._made = False
            with os.fdopen(self._fd, "wb", closefd=False) as file:
                file.write(content)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
        if self._made:
            with suppress(FileNotFoundError):
                self._path.unlink()
