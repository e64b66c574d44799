"""Where code is read from: the folders and files that a worker needs to see, and nothing else of the file system."""

from __future__ import annotations

import site
import sys
import sysconfig
from pathlib import Path


def library_paths() -> tuple[str, ...]:
    """Folders and files that a worker reads code from: the system's libraries, this Python, its packages, divault."""
    return _LIBRARIES


def _find() -> tuple[str, ...]:
    wanted = [
        "/usr", "/lib", "/lib64", "/etc/ld.so.cache", sys.prefix, sys.base_prefix, *site.getsitepackages(),
        sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), str(Path(__file__).parent.parent),
    ]  # fmt: skip
    found = dict.fromkeys(str(Path(path).resolve()) for path in wanted if Path(path).exists())
    return tuple(path for path in found if not any(path.startswith(f"{other}/") for other in found))


_LIBRARIES = _find()
"""Found at the import: asking later may need files that are out of reach by then."""
