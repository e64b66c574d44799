"""The seam of model formats: what recognises a model's files, loads them and runs inputs. Lives in the worker alone.

A format is recognised by its bytes, never by a file's name and never by trying to load it. A loaded model takes parsed
JSON values and gives JSON values; limits and JSON itself are kept by the worker.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from divault.values import MemoryFile

DTYPES = ("float32", "bfloat16", "float16")
_SOURCE = re.compile(r"/onnxruntime/\S+:\d+ ")
_MOST_READ = 4096  # characters of an error; names that a file chooses may stand in it
_QUALIFIERS = re.compile(r"^(const )?(\[with [^\]]*\] )?")


@dataclass(frozen=True, slots=True)
class Place:
    """Where networks run, and in which numbers; formats that run on the CPU in their own numbers take no notice."""

    device: str = "cpu"
    """`auto`, `cpu`, `cuda`, `cuda:N` or `mps`."""
    dtype: str = "float32"
    """One of `DTYPES`: of weights and of what is computed with them."""


CPU = Place()


@dataclass(frozen=True, slots=True)
class Description:
    """What is known of a loaded model without running it. All values are JSON."""

    format: str
    """`sklearn`, `torch`, `huggingface`, `onnx`, `xgboost`, `lightgbm`: the published `model_type`."""
    task: str
    device: str
    input_schema: Mapping[str, Any]
    """JSON Schema of `input_data`."""
    output_schema: Mapping[str, Any]
    """JSON Schema of `result`."""
    example: Mapping[str, Any]
    """An `input_data` that this model takes."""
    runtime: Mapping[str, Any]
    """adapter, arch, determinism, device, dtype, libraries, threads: what could change an answer."""
    code: bool = False
    """Whether the file brings code that runs here: such a model can do whatever its confinement lets it do."""
    together: int = 1
    """Most callers that one pass takes; 1 where what one sends may change the answer, or the time, of another."""
    tolerance: float = 0.0
    """Most that a number of an answer differs, relative to its size or to 1, when the same input stands in a batch."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """One caller's `input_data` and `parameters`, parsed strictly (no NaN, no duplicate keys)."""

    data: Any
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """One caller's result: JSON values with finite numbers, and how many rows it covers."""

    result: Any
    rows: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a text while it is written."""

    text: str
    index: int = 0
    """Which of the caller's texts it goes on."""


class LoadedModel(Protocol):
    """A model in memory."""

    @property
    def description(self) -> Description:
        """What it is and takes."""

    def predict(self, batch: Sequence[Inputs]) -> list[Answer]:
        """One answer per caller, in order: the same, within the tolerance, whoever else is in the batch.

        Raises InputInvalid (field, expected, example), ModelFailed. What it raises is about the batch: who sent several
        callers asks for each alone then, so that only one hears of his own input.
        """


class StreamingModel(LoadedModel, Protocol):
    """A model that can give an answer in pieces; its `predict` gives the same whole."""

    def stream(self, inputs: Inputs) -> Iterator[Piece | Answer]:
        """One caller's pieces as they are made, and last the Answer, as `predict` gives it.

        Closing the iterator ends the work. Raises InputInvalid before the first piece; ModelFailed.
        """


class ModelFormat(Protocol):
    """One family of models."""

    @property
    def template(self) -> str:
        """A name in `libraries`: its process may be forked with these imported. Empty: a process of its own."""

    def recognises(self, files: Sequence[MemoryFile]) -> bool:
        """Whether these files are of this family, by their bytes."""

    def load(self, files: Sequence[MemoryFile], place: Place) -> LoadedModel:
        """The model in memory. Raises UnsupportedModel (seen, supported), SealedFileDamaged for broken content."""


def words_of(err: Exception) -> str:
    """The first line of what a library says, in ASCII: a stack with paths of this machine may follow it.

    Of onnxruntime, what follows the place in its source and the signature there, which alone take 200 characters.

    >>> words_of(RuntimeError("FAIL : /onnxruntime/a.h:46 void f(const std::map<int, g(int)>&) const Opset 30 is new"))
    'Opset 30 is new'
    """
    line = str(err)[:_MOST_READ].partition("\n")[0]
    place = _SOURCE.search(line)
    if place is not None:
        line = _after_signature(line[place.end() :]) or line
    return line.encode("ascii", "backslashreplace").decode()[:200]


def _after_signature(text: str) -> str:
    """What follows a C++ signature: it ends at a space that stands in no bracket, after that of its arguments."""
    depth, arguments = 0, False
    for place, character in enumerate(text):
        depth += (character in "([<{") - (character in ")]>}")
        arguments |= character == ")" and depth == 0
        if arguments and depth == 0 and text[place + 1 : place + 2] == " ":
            return _QUALIFIERS.sub("", text[place + 2 :])
    return ""
