"""Reads files of the containment corpus as a worker reads models; started by `test_sandbox` in a process of its own.

Arguments: the folder, then names of files. One line of JSON per file: its name and what became of it. No loader but the
ones of `divault.models` is used. Limits bound what a hole could do; an audit hook sees a probe being compiled.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

from divault import models
from divault.errors import DivaultError, SealedFileDamaged, UnsupportedModel
from divault.models import pickles
from divault.values import MemoryFile

LIMITS = {
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_FSIZE: 1 << 20,
    resource.RLIMIT_AS: 6 << 30,
    resource.RLIMIT_DATA: 2 << 30,
    resource.RLIMIT_CPU: 60,
}
_PROBE = ("ns['make']", "def attempt(")
"""Stands in the source of every probe, which has to be compiled before it can run."""
_compiled: list[str] = []


def main() -> None:
    """Read every file that the arguments name."""
    folder, *names = sys.argv[1:]
    sys.addaudithook(_watch)
    compile(f"# {_PROBE[0]}", "a check that the hook sees", "exec")
    if _compiled != [_PROBE[0]]:
        sys.exit("the hook is blind")
    _compiled.clear()
    for what, value in LIMITS.items():
        resource.setrlimit(what, (value, value))
    for name in names:
        sys.stdout.write(json.dumps({"file": name} | _read(Path(folder) / name)) + "\n")
        sys.stdout.flush()


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if event == "compile":
        source = arguments[0].decode("utf-8", "replace") if isinstance(arguments[0], bytes) else str(arguments[0])
        _compiled.extend(mark for mark in _PROBE if mark in source)


def _read(path: Path) -> dict[str, object]:
    fd = os.memfd_create("model", os.MFD_CLOEXEC)
    try:
        data = path.read_bytes()
        os.write(fd, data)
        os.lseek(fd, 0, os.SEEK_SET)
        # A file that holds data and no model is refused as a model; the corpus asks for what the pickle's loader says.
        verdicts = {"model": _verdict(lambda: models.load([MemoryFile("model", fd, len(data))], "cpu"))}
        if pickles.looks_pickled(MemoryFile("model", fd, len(data))):
            verdicts["pickle"] = _verdict(lambda: pickles.load(MemoryFile("model", fd, len(data))))
        return verdicts | {"compiled": list(_compiled)}
    finally:
        os.close(fd)


def _verdict(load) -> dict[str, str]:
    try:
        load()
    except UnsupportedModel as err:
        return {"verdict": "refused", "seen": str(err.data.get("seen"))}
    except SealedFileDamaged as err:
        return {"verdict": "error", "seen": err.detail}
    except DivaultError as err:
        return {"verdict": "other", "seen": err.code}
    return {"verdict": "loads", "seen": ""}


if __name__ == "__main__":
    main()
