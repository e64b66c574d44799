"""What a LightGBM text file holds, checked to the last index before the library sees any of it.

Rules:

1. The library trusts the numbers in a model: a child or feature that points outside would read foreign memory.
2. It is handed a text written anew of the lines that were checked here and that an answer depends on, nothing else.
3. Every list is as long as the counts say, so memory goes with the size of the file.

Source: the files that `save_model` of LightGBM 2 to 4 writes.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from divault.errors import SealedFileDamaged, UnsupportedModel
from divault.models.boosters import MAX_OUTPUTS
from divault.models.files import head
from divault.models.rows import MAX_FEATURES
from divault.values import MemoryFile

SUPPORTED = "LightGBM 2 or later as the text of save_model: trees with numeric splits"
_START = re.compile(rb"tree\r?\nversion=v(\d{1,3})\r?\nnum_class=")
_VERSIONS = range(2, 5)
_WHOLE = re.compile(rb"\d{1,9}")
_INTEGERS = re.compile(rb"-?\d{1,9}( -?\d{1,9})*")
_FLOAT = rb"-?(\d{1,40}(\.\d{1,40})?(e[-+]?\d{1,4})?|inf|nan)"
_FLOATS = re.compile(_FLOAT + rb"( " + _FLOAT + rb")*")
_OBJECTIVE = re.compile(rb"[a-z_0-9]{1,40}( sqrt| [a-z_]{1,40}:" + _FLOAT + rb")*")
_CATEGORICAL = 1
_DECISIONS = (0, 2, 4, 6, 8, 10)
"""Numeric splits: 2 for the side of missing values, 4 and 8 for zero and NaN as missing."""
_END = b"end of trees"


@dataclass(frozen=True, slots=True)
class LightgbmModel:
    """A model that was checked."""

    objective: str
    """Its name; empty where the file has none, as for an objective of one's own."""
    features: int
    outputs: int
    """Numbers for a row: 1, or one for each class."""
    text: str
    """What was checked, as the library reads it."""


def is_lightgbm(file: MemoryFile) -> bool:
    """Whether the file starts as LightGBM's text files do. Never raises."""
    return _START.match(head(file, 64)) is not None


def read(file: MemoryFile) -> LightgbmModel:
    """The model. Raises UnsupportedModel for what is not supported, SealedFileDamaged for broken content."""
    with mmap.mmap(file.fd, 0, access=mmap.ACCESS_READ) as data:
        blocks = _blocks(data)
        header = next(blocks, {})
        outputs, features = _sizes(header)
        objective = _objective(header, outputs)
        out = _header(header, outputs, features, objective)
        trees = 0
        for block in blocks:
            out += _tree(block, features)
            trees += 1
    if trees % outputs:
        _damaged("another number of trees than its classes need")
    return LightgbmModel(objective.split(b" ")[0].decode(), features, outputs, (out + _END + b"\n").decode())


def _blocks(data: mmap.mmap) -> Iterator[dict[bytes, bytes]]:
    """The lines of the header and of each tree by their names. Raises SealedFileDamaged where the end is missing."""
    found: dict[bytes, bytes] = {}
    while line := data.readline():
        line = line.rstrip(b"\r\n")
        name, _, value = line.partition(b"=")
        if line == _END or name == b"Tree":
            yield found
            found = {}
        elif line and name in found:
            _damaged("a line that stands twice")
        elif line:
            found[name] = value
        if line == _END:
            return
    _damaged("it ends before its trees do")


def _sizes(header: Mapping[bytes, bytes]) -> tuple[int, int]:
    version = header.get(b"version", b"")[1:]
    if not _WHOLE.fullmatch(version) or int(version) not in _VERSIONS:
        _refused(f"a LightGBM model of version {version[:9].decode('ascii', 'backslashreplace')}")
    outputs, features = _whole(header, b"num_class"), _whole(header, b"max_feature_idx") + 1
    if features > MAX_FEATURES:
        _refused(f"a LightGBM model with {features} features, over {MAX_FEATURES}")
    if outputs > MAX_OUTPUTS:
        _refused(f"a LightGBM model with {outputs} classes, over {MAX_OUTPUTS}")
    if not outputs or _whole(header, b"num_tree_per_iteration") != outputs:
        _damaged("another number of trees for an iteration than classes")
    return outputs, features


def _objective(header: Mapping[bytes, bytes], outputs: int) -> bytes:
    """The objective's line; empty without one."""
    objective = header.get(b"objective", b"").rstrip(b" ")
    if not objective:
        return b""
    if not _OBJECTIVE.fullmatch(objective):
        _damaged("an objective that is none")
    classes = re.search(rb" num_class:(\d{1,9})(?: |$)", objective)
    several = objective.startswith(b"multiclass")
    if several and (classes is None or int(classes[1]) != outputs or outputs < 2 or objective.count(b":") > 2):
        _damaged("the objective has another number of classes than the model")
    if not several and outputs > 1:
        _damaged("several classes without an objective for them")
    return objective


def _header(header: Mapping[bytes, bytes], outputs: int, features: int, objective: bytes) -> bytearray:
    lines = [
        b"tree",
        b"version=" + header[b"version"],
        b"num_class=%d" % outputs,
        b"num_tree_per_iteration=%d" % outputs,
        b"label_index=0",
        b"max_feature_idx=%d" % (features - 1),
        *([b"objective=" + objective] if objective else []),
        *([b"average_output"] if b"average_output" in header else []),
        b"feature_names=" + b" ".join(b"Column_%d" % place for place in range(features)),
        b"feature_infos=" + b" ".join([b"none"] * features),
    ]
    return bytearray(b"\n".join(lines) + b"\n\n")


def _tree(found: Mapping[bytes, bytes], features: int) -> bytes:
    leaves = _whole(found, b"num_leaves")
    if not leaves:
        _damaged("a tree without leaves")
    if _whole(found, b"num_cat"):
        _categorical()
    if found.get(b"is_linear", b"0") != b"0":
        _refused("a LightGBM model with linear trees (linear_tree=true)")
    lines = [b"Tree=0", b"num_leaves=%d" % leaves, b"num_cat=0"]
    if leaves > 1:
        lines += _splits(found, leaves - 1, features)
        lines.append(_floats(found, b"threshold", leaves - 1))
    lines.append(_floats(found, b"leaf_value", leaves))
    return b"\n".join(lines) + b"\n\n\n"


def _splits(found: Mapping[bytes, bytes], count: int, features: int) -> list[bytes]:
    """The lines with whole numbers. Raises SealedFileDamaged where one points outside or the tree does not end."""
    decisions = found.get(b"decision_type") or b" ".join([b"0"] * count)
    told = {**found, b"decision_type": decisions}
    feature, decision = (_integers(told, name, count) for name in (b"split_feature", b"decision_type"))
    if (decision & _CATEGORICAL).any():
        _categorical()
    if feature.min() < 0 or feature.max() >= features or not np.isin(decision, _DECISIONS).all():
        _damaged("a tree that reads a feature which isn't there, or asks in an unknown way")
    sides = [_integers(told, name, count) for name in (b"left_child", b"right_child")]
    # Nodes are numbered as they were made, leaves from -1 down: a child that comes later leads to an end.
    if any((child[child >= 0] <= np.flatnonzero(child >= 0)).any() for child in sides):
        _damaged("a tree that leads back to itself")
    if not np.array_equal(np.sort(np.concatenate(sides)), np.r_[-count - 1 : 0, 1:count]):
        _damaged("a tree whose nodes are not the children of one each")
    names = (b"split_feature", b"decision_type", b"left_child", b"right_child")
    return [name + b"=" + told[name] for name in names]


def _whole(told: Mapping[bytes, bytes], name: bytes) -> int:
    text = told.get(name, b"")
    if not _WHOLE.fullmatch(text):
        _damaged(f"{name.decode()} is no number")
    return int(text)


def _integers(told: Mapping[bytes, bytes], name: bytes, count: int) -> NDArray[np.int64]:
    text = told.get(name, b"")
    if text.count(b" ") != count - 1 or not _INTEGERS.fullmatch(text):
        _damaged(f"{name.decode()} has not the {count} whole numbers that are expected")
    return np.array(text.split(b" "), dtype=np.int64)


def _floats(told: Mapping[bytes, bytes], name: bytes, count: int) -> bytes:
    """The line itself."""
    text = told.get(name, b"")
    if text.count(b" ") != count - 1 or not _FLOATS.fullmatch(text):
        _damaged(f"{name.decode()} has not the {count} numbers that are expected")
    return name + b"=" + text


def _damaged(what: str) -> NoReturn:
    raise SealedFileDamaged(f"the LightGBM file is broken: {what}", stage="payload")


def _refused(seen: str) -> NoReturn:
    raise UnsupportedModel(f"{seen}; this node loads {SUPPORTED}", seen=seen, supported=SUPPORTED)


def _categorical() -> NoReturn:
    _refused("a LightGBM model with categorical features (encode them as numbers before training)")
