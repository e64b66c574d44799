"""What the formats of PyTorch that are programs have in common: they load only where the operator allows code.

What goes in doesn't stand in such a file: `divault.json` beside it in a tar says `input_shape` of one item, perhaps
`input_dtype`, `labels` and `task`. Without `input_dtype`, and where the graph of a `.pt2` doesn't say it, a program
gets numbers of the dtype of its first weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from divault.errors import SealedFileDamaged, UnsupportedModel
from divault.models.architecture import Network, input_shape_of
from divault.models.base import Place
from divault.models.containers import Container, container_of
from divault.models.files import Folder
from divault.models.labels import labels_of
from divault.models.torch_runtime import DTYPES, Hardware, prepare
from divault.models.torch_state import LoadedNetwork
from divault.values import MemoryFile

if TYPE_CHECKING:
    import torch

INPUT_DTYPES = (*DTYPES, "int64", "int32", "int16", "int8", "uint8", "bool")


@dataclass(frozen=True, slots=True)
class Found:
    """What was read out of a program's file."""

    module: torch.nn.Module
    input_dtype: str | None = None
    """By torch's name, where the file says it."""
    bounds: tuple[tuple[int, int], ...] = ()
    """Least and most size of each axis of an item, where the file says them."""


@dataclass(frozen=True, slots=True)
class Program:
    """A format whose files are programs. `read` is what one has of its own."""

    adapter: str
    """Its name in the runtime object of receipts."""
    kind: Container
    words: str
    """What the file is, for people."""
    read: Callable[[MemoryFile, torch.device, Folder], Found]
    """The program on the device, out of its file among others. Raises SealedFileDamaged, UnsupportedModel."""
    template: str = ""

    def recognises(self, files: Sequence[MemoryFile]) -> bool:
        """Whether such a program is among the files."""
        return any(container_of(file) is self.kind for file in files)

    def load(self, files: Sequence[MemoryFile], place: Place) -> LoadedNetwork:
        """The program in memory. Raises UnsupportedModel, SealedFileDamaged; SettingsInvalid for the device."""
        folder = Folder(files)
        programs = [file for file in folder.files if container_of(file) is self.kind]
        told = folder.json_object("divault.json")
        if len(programs) != 1 or told.get("input_shape") is None:
            raise UnsupportedModel(
                f"{self.words} is loaded from a tar with it and a divault.json that says what goes in: for example "
                '{"input_shape": [3, 32, 32]}',
                seen=f"{self.words} without input_shape"
                if len(programs) == 1
                else f"{len(programs)} times {self.words}",
                supported=f"{self.words} in a tar with divault.json",
            )
        hardware = prepare(replace(place, dtype="float32"))
        shape, named = input_shape_of(told["input_shape"]), _input_dtype_of(told.get("input_dtype"))
        found = self.read(programs[0], hardware.device, folder)
        hardware = _as_made(hardware, found.module)
        network = Network(
            found.module,
            _narrowed(shape, found.bounds),
            adapter=self.adapter,
            code=True,
            input_dtype=named or _input_dtype_of(found.input_dtype) or hardware.dtype_name,
            bounds=found.bounds,
        )
        return LoadedNetwork(network, labels_of(told), hardware, str(told.get("task") or "prediction"))


def _as_made(hardware: Hardware, module: torch.nn.Module) -> Hardware:
    """A program computes in the numbers that it was made with: those of its first weight that has any of `DTYPES`."""
    import torch

    known = [getattr(torch, name) for name in DTYPES]
    found = (weight.dtype for weight in module.parameters() if weight.dtype in known)
    return replace(hardware, dtype=next(found, hardware.dtype))


def _narrowed(shape: tuple[int | None, ...], bounds: Sequence[tuple[int, int]]) -> tuple[int | None, ...]:
    """The shape, with sizes where any was said to go and the graph takes one."""
    if len(bounds) != len(shape):
        return shape
    return tuple(
        least if size is None and least == most else size for size, (least, most) in zip(shape, bounds, strict=True)
    )


def _input_dtype_of(value: Any) -> str | None:
    """As `input_dtype` of `divault.json`, or a graph, says it. Raises UnsupportedModel."""
    if value is None or value in INPUT_DTYPES:
        return value if value is None else str(value)
    raise UnsupportedModel(
        f"input_dtype is one of {', '.join(INPUT_DTYPES)}, not {str(value)[:40]!a}",
        seen="a program whose input_dtype is none that can be sent",
        supported=", ".join(INPUT_DTYPES),
    )


def broken(words: str, err: Exception) -> SealedFileDamaged:
    """What is raised for a file that its library does not read."""
    return SealedFileDamaged(f"{words} is broken: {str(err)[:200]}", stage="payload")
