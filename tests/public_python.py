"""A Python that every user can read, with divault and what a scikit-learn worker needs: hard links, so nearly free."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import divault
from divault.workers.users import closed_to_others

_PACKAGES = (
    "_pysha3", "divault-", "joblib", "lightgbm", "msgspec", "narwhals", "numpy", "orjson", "scikit_learn", "scipy",
    "sha3", "sklearn", "structlog", "threadpoolctl",
)  # fmt: skip
_LEFT_OUT = shutil.ignore_patterns("site-packages", "test", "tests", "idlelib", "tkinter", "ensurepip", "config-*")


_NAME = f"python{sys.version_info.major}.{sys.version_info.minor}"


def make(folder: Path) -> Path:
    """The program of a new environment in this folder, which must be open to everybody itself."""
    base = _base(folder / "base")
    program, packages = folder / "own" / "bin" / _NAME, folder / "own" / "lib" / _NAME / "site-packages"
    program.parent.mkdir(parents=True)
    program.symlink_to(base)
    (folder / "own" / "pyvenv.cfg").write_text(f"home = {base.parent}\ninclude-system-site-packages = false\n")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.name.startswith(_PACKAGES):
            _tree(entry, packages / entry.name)
    _tree(Path(divault.__file__).parent, packages / "divault")
    return program


def _base(folder: Path) -> Path:
    """This Python's own program, or a copy where that lies in somebody's home."""
    here, library = Path(sys.executable).resolve(), Path(sysconfig.get_path("stdlib"))
    if closed_to_others([str(here), str(library)]) is None:
        return here
    _tree(here, folder / "bin" / _NAME)
    _tree(library, folder / "lib" / _NAME)
    return folder / "bin" / _NAME


def _tree(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=_LEFT_OUT, copy_function=_link, symlinks=True)
    else:
        _link(str(source), str(target))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
