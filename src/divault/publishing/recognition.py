"""What a model is, and the proof that a node will load it: loaded here as a node would, before anything is sealed.

Rules:

1. The files are the ones that come out of the seal: one file, or the members of the tar that a folder becomes.
2. They are read in a worker process, confined like a node's, with a deadline; this process never reads them itself.
3. What no node loads is refused with what was seen, and with the safe format to save it in instead.
4. A format that carries code runs on nodes whose operator allows that: it is published on request, and not run here.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from divault.errors import (
    DeadlineExceeded,
    DivaultError,
    ModelFailed,
    Overloaded,
    SealedFileDamaged,
    SettingsInvalid,
    UnsupportedModel,
)
from divault.models.base import CPU, Description
from divault.models.unsupported import SUPPORTED_TEXT
from divault.publishing.sealing import copy_plaintext
from divault.values import Digest, MemoryFile
from divault.workers import opening_child, wire
from divault.workers.answers import described
from divault.workers.process import COMMAND, Process

_CODE = re.compile(r"TorchScript|torch\.export|a pickled model \(")
"""How formats name what a node runs only if its operator allows code."""
_THREADS = 2
_EXTRAS = {
    "sklearn": "sklearn",
    "scipy": "sklearn",
    "joblib": "sklearn",
    "numpy": "sklearn",
    "torch": "torch",
    "safetensors": "torch",
    "transformers": "hf",
    "tokenizers": "hf",
    "onnxruntime": "onnx",
    "xgboost": "boosters",
    "lightgbm": "boosters",
    "PIL": "images",
}
"""Which extra of this package brings a library; a library of any other name is an extra of its own name."""
_MISSING = re.compile(r"raised ModuleNotFoundError: No module named '([A-Za-z0-9_]+)")
_SAFE = {
    "skops": "save it with skops",
    "safetensors": "save its state dict as safetensors with an architecture in divault.json",
    "onnx": "export it to ONNX",
    "xgboost": "save it with its own save_model",
}
_INSTEAD = (
    (
        re.compile(r"TorchScript|torch\.export|PyTorch file|pickled object|pickled model|torch\.save"),
        ("safetensors", "onnx"),
    ),
    (re.compile(r"HDF5|Keras|SavedModel"), ("onnx",)),
    (re.compile(r"xgboost\.|lightgbm\."), ("xgboost",)),
    (re.compile(r"pickle|joblib"), ("skops", "onnx")),
)
"""Formats that are plain data, for each kind of what is not."""


@dataclass(frozen=True, slots=True)
class Recognised:
    """A model as a node will see it."""

    sha256: Digest
    """Of the file, or of the tar that the folder becomes: what a seal of it would hold."""
    size: int
    """The same in bytes."""
    seen: str
    """The format, in words."""
    description: Description | None
    """None for a format that carries code, which was not run here."""
    warnings: tuple[str, ...] = ()

    @property
    def carries_code(self) -> bool:
        """Whether only nodes that allow such formats run it."""
        return self.description is None


async def recognise(
    path: Path,
    *,
    allow_code: bool = False,
    timeout_s: float = 120.0,
    command: Sequence[str] = COMMAND,
) -> Recognised:
    """Load the model at `path` in a worker, run its example, and say what it is. Nothing stays in memory.

    Raises UnsupportedModel (with what to do instead), ModelFailed (it crashed or raised), DeadlineExceeded,
    SettingsInvalid (a library is missing here), BadRequest (nothing readable there), NotReady.
    """
    async with _plain_files(path) as (files, digest, size):
        try:
            async with asyncio.timeout(timeout_s):
                return await _loaded(files, (digest, size), command)
        except TimeoutError:
            limit = f"{timeout_s:g}"
            raise DeadlineExceeded(
                f"{path.name} was not loaded within {limit} s, so a node would give it up; nothing was published",
                limit_s=limit,
            ) from None
        except (UnsupportedModel, SealedFileDamaged) as err:
            if allow_code and _CODE.search(_seen(err)):
                return Recognised(digest, size, _seen(err), None)
            raise _unsupported(path, err) from err
        except ModelFailed as err:
            raise _failed(path, err) from err


async def _loaded(files: Sequence[MemoryFile], what: tuple[Digest, int], command: Sequence[str]) -> Recognised:
    process = await Process.start(command, files, _THREADS, lambda: None)
    try:
        memory = 3 * sum(file.size for file in files)  # as a node gives it
        limits = wire.Confine(id=wire.new_id(), keep=[file.fd for file in files], memory_bytes=memory)
        wire.expect(await process.ask(limits), wire.Confined)
        order = wire.Load(
            id=wire.new_id(),
            files=[wire.File(file.name, file.fd, file.size) for file in files],
            device=CPU.device,
            dtype=CPU.dtype,
            threads=_THREADS,
        )
        reply = await process.ask(order)
        if isinstance(reply, wire.Failed):
            raise wire.reported(reply.problem, wire.LOAD_ERRORS)
        description = described(wire.expect(reply, wire.Ready).description)
        warnings = [*_warnings(description), *await _example_warnings(process, description)]
    finally:
        await process.kill()
    return Recognised(*what, description.format, description, tuple(warnings))


async def _example_warnings(process: Process, description: Description) -> list[str]:
    """Empty when the model answers its own example. Raises ModelFailed when it dies of it."""
    item = wire.Item(msgspec.json.encode(description.example), None)
    answers = wire.expect(await process.ask(wire.Run(id=wire.new_id(), items=[item])), wire.Answers).items
    if len(answers) != 1:
        raise wire.broken("it answered another number of callers than it was asked for")
    if not isinstance(answers[0], wire.Problem):
        wire.check_json(answers[0].result)
        return []
    problem = wire.reported(answers[0], wire.RUN_ERRORS)
    return [f"it loads, but does not take the inferred example ({problem.detail}): tell consumers what it takes"]


def _warnings(description: Description) -> list[str]:
    # Of the formats that nodes load, this one alone is read by an interpreter of instructions.
    if description.format != "sklearn" or description.runtime.get("adapter") in ("skops", "onnx"):
        return []
    instead = "".join(f"; {way}" for way in safe_formats("pickle"))
    return [f"a pickle is a program that rebuilds the model; nodes run only those parts of it that they know{instead}"]


@asynccontextmanager
async def _plain_files(path: Path) -> AsyncIterator[tuple[list[MemoryFile], Digest, int]]:
    """The files that come out of a seal of `path`, in memory; closed at the end."""
    files: list[MemoryFile] = []
    try:
        try:
            digest, size = await asyncio.to_thread(_read, path, files)
        except UnsupportedModel as err:
            raise _unsupported(path, err) from err
        except OSError as err:
            raise Overloaded(
                f"{path.name} can't be tried here ({err.strerror}): publish it as it is with --unchecked",
                retry_after=60,
            ) from err
        yield files, digest, size
    finally:
        for file in files:
            os.close(file.fd)


def _read(path: Path, files: list[MemoryFile]) -> tuple[Digest, int]:
    whole, digest = opening_child.MemoryFile(), hashlib.sha256()
    opened = [whole]
    try:
        copy_plaintext(path, whole, digest)
        size = whole.size
        parts = opening_child.split(whole)
        opened += [part for _, part in parts if part is not whole]
        for _, part in parts:
            part.seal()
        files += [MemoryFile(name, os.dup(part.fd), part.size) for name, part in parts]
    finally:
        for part in opened:
            os.close(part.fd)
    return Digest(digest.digest()), size


def safe_formats(seen: str) -> list[str]:
    """What to do to have the same model as plain data, among the formats that nodes of this version load."""
    names = next((names for pattern, names in _INSTEAD if pattern.search(seen)), ())
    return [_SAFE[name] for name in names if name in SUPPORTED_TEXT.lower()]


def _seen(err: DivaultError) -> str:
    return str(err.data.get("seen") or err.detail)


def _unsupported(path: Path, err: DivaultError) -> UnsupportedModel:
    seen = _seen(err)
    advice = "".join(f"; {way}" for way in safe_formats(seen))
    if _CODE.search(seen):
        advice += "; or publish it with --code-bearing for nodes that set DIVAULT_ALLOW_CODE_MODELS=1"
    return UnsupportedModel(
        f"{path.name}: {err.detail}{advice}; nothing was published",
        seen=seen,
        supported=err.data.get("supported"),
    )


def _failed(path: Path, err: ModelFailed) -> DivaultError:
    missing = _MISSING.search(err.detail)
    if missing is None:
        return ModelFailed(f"{path.name} can't be loaded, and no node would: {err.detail}", **err.data)
    extra = _EXTRAS.get(missing[1], missing[1])
    return SettingsInvalid(
        f"{path.name} can't be tried here, {missing[1]} is not installed: pip install 'divault[{extra}]', or publish "
        "it as it is with --unchecked"
    )
