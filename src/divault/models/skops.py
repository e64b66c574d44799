"""scikit-learn estimators out of skops files: the same models as `sklearn`, in a format that is no program.

Rules:

1. Every type that a file names and skops does not trust by itself must be one that `allowed` gives to pickles.
2. Nothing falls back to pickle or joblib.
3. A `functools.partial` is built by `rebuilding`, or not at all: skops would have it take any function that is named.
4. Entries may unfold to 50 times the file, or 32 MiB; no name stands twice.
"""

from __future__ import annotations

import re
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from functools import cache
from typing import Any

from divault.errors import UnsupportedModel
from divault.models import allowed, rebuilding
from divault.models.base import LoadedModel, Place
from divault.models.containers import MAX_ENTRIES
from divault.models.files import head, only_file, path_of, the_file
from divault.models.pickles import FREE_BYTES, RATIO
from divault.models.sklearn import configure, fitted, tried
from divault.values import MemoryFile

_REPLACED_IN_PICKLES = frozenset(
    {
        "numpy.dtype",
        "scipy._lib.array_api_compat.numpy._aliases.asarray",
        "sklearn.cluster._kmeans._kmeans_single_elkan",
        "sklearn.cluster._kmeans._kmeans_single_lloyd",
    }
)
"""Pickles get something else for these; here they are read by numpy without objects, or only referred to."""
_CHECK_ARRAY = ("sklearn.utils.validation", "check_array")
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RecursionError, ImportError),
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, AssertionError),
)
"""What a malformed file makes zipfile, skops, numpy or an estimator raise."""
_VERSION = re.compile(rb'"_sklearn_version":[^}]{1,200}?"\\"(\d+\.\d+[\w.]{0,20})')
"""What the first estimator's state says."""


class SkopsFile:
    """The format: one skops file."""

    template = "sklearn"

    def recognises(self, files: Sequence[MemoryFile]) -> bool:
        """Whether the model is one zip with the schema that skops writes."""
        file = only_file(files)
        if file is None or not head(file, 4).startswith(b"PK\x03\x04"):
            return False
        try:
            with zipfile.ZipFile(path_of(file)) as archive, archive.open("schema.json") as schema:
                return b'"__loader__"' in schema.read(1 << 16)
        except (*_DAMAGE, RuntimeError):
            return False

    def load(self, files: Sequence[MemoryFile], place: Place) -> LoadedModel:  # noqa: ARG002 - it runs on the CPU alone
        """The estimator. Raises UnsupportedModel naming the first type that is not allowed, or the damage."""
        file = the_file(files, "a skops model")
        configure()
        try:
            _check_sizes(file)
            found = fitted(_loaded(path_of(file)))
        except _DAMAGE as err:
            text = str(err).encode("ascii", "backslashreplace").decode()[:120]
            raise UnsupportedModel(
                f"the skops file is damaged: {type(err).__name__} {text}",
                seen=f"a damaged skops file ({type(err).__name__})",
            ) from err
        return tried(found, "skops", lambda: _version_of(path_of(file)))


def _version_of(path: str) -> str:
    """The version of scikit-learn that a file says it is of; empty where it says none."""
    with zipfile.ZipFile(path) as archive:
        told = _VERSION.search(archive.read("schema.json"))
    return told[1].decode() if told else ""


def _check_sizes(file: MemoryFile) -> None:
    with zipfile.ZipFile(path_of(file)) as archive:
        entries = archive.infolist()
    if len(entries) > MAX_ENTRIES or len({entry.filename for entry in entries}) != len(entries):
        raise zipfile.BadZipFile("too many entries, or one twice")
    if sum(entry.file_size for entry in entries) > max(FREE_BYTES, RATIO * file.size):
        raise zipfile.BadZipFile(f"it unfolds to more than {RATIO} times its size")


def _loaded(path: str) -> Any:
    from skops.io import get_untrusted_types, load

    _restrict_partial()
    with warnings.catch_warnings():
        # Advice about versions, which nobody reads here.
        warnings.simplefilter("ignore")
        names = get_untrusted_types(file=path)
        for name in names:
            check_name(*name.rpartition(".")[::2])
        return load(path, trusted=names)


def check_name(module: str, name: str) -> None:
    """Raises UnsupportedModel unless pickles get just this object for the name."""
    if f"{module}.{name}" in _REPLACED_IN_PICKLES:
        return
    try:
        found = allowed.resolve(module, name)
    except UnsupportedModel:
        allowed.refused(module, name, "the skops file")
    if found is not getattr(allowed.imported(module, name), name, None):
        allowed.refused(module, name, "the skops file")


@cache
def _restrict_partial() -> None:
    """Have skops give every `functools.partial` to `rebuilding`."""
    from skops.io._audit import NODE_TYPE_MAPPING, Node, get_tree
    from skops.io._protocol import PROTOCOL

    class NumbersOnlyNode(Node):  # type: ignore[misc]  # skops is an extra, unknown to the checker
        """The function is never built, only named: what is built may be referred to from anywhere in the file."""

        def __init__(self, state: Any, load_context: Any, trusted: Any = None) -> None:
            super().__init__(state, load_context, trusted)
            content = state["content"]
            module, name = content["func"]["__module__"], content["func"]["__class__"]
            if (module, name) != _CHECK_ARRAY:
                allowed.refused(module, name, "the skops file")
            parts = {name: get_tree(content[name], load_context, trusted) for name in ("args", "kwds", "namespace")}
            self.children = {**parts}
            self.trusted = self._get_trusted(trusted, ["functools.partial"])

        def _construct(self) -> Any:
            stand_in = rebuilding.NumbersOnly(rebuilding.CHECK_ARRAY)
            stand_in.__setstate__((rebuilding.CHECK_ARRAY, *(part.construct() for part in self.children.values())))
            return stand_in

    NODE_TYPE_MAPPING["PartialNode", PROTOCOL] = NumbersOnlyNode
