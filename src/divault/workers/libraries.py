"""Where code is read from: the folders and files that a worker needs to see, and nothing else of the file system."""

from __future__ import annotations

import site
import sys
import sysconfig
from pathlib import Path

_SYSTEM = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache")


def library_paths() -> tuple[str, ...]:
    """Folders and files that a worker reads code from: the system's libraries, this Python, its packages, divault."""
    return _LIBRARIES


def python_paths() -> tuple[str, ...]:
    """Of these, folders of this Python, its packages and divault, as they are named; some may lie in others."""
    named = (
        sys.prefix, sys.base_prefix, *site.getsitepackages(), sysconfig.get_path("stdlib"),
        sysconfig.get_path("platstdlib"), str(Path(__file__).parent.parent),
    )  # fmt: skip
    return tuple(path for path in dict.fromkeys(named) if Path(path).exists())


def _find() -> tuple[str, ...]:
    wanted = [*(path for path in _SYSTEM if Path(path).exists()), *python_paths()]
    found = dict.fromkeys(str(Path(path).resolve()) for path in wanted)
    return tuple(path for path in found if not any(path.startswith(f"{other}/") for other in found))


_LIBRARIES = _find()
"""Found at the import: asking later may need files that are out of reach by then."""
