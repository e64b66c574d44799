"""What the formats of PyTorch that are programs have in common: they load only where the operator allows code.

What goes in doesn't stand in such a file: `divault.json` beside it in a tar says `input_shape` of one item, perhaps
`labels` and `task`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from divault.errors import SealedFileDamaged, UnsupportedModel
from divault.models.architecture import Network, input_shape_of
from divault.models.base import Place
from divault.models.containers import Container, container_of
from divault.models.files import Folder
from divault.models.labels import labels_of
from divault.models.torch_runtime import prepare
from divault.models.torch_state import LoadedNetwork
from divault.values import MemoryFile

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Program:
    """A format whose files are programs. `read` is what one has of its own."""

    adapter: str
    """Its name in the runtime object of receipts."""
    kind: Container
    words: str
    """What the file is, for people."""
    read: Callable[[MemoryFile, torch.device, Folder], torch.nn.Module]
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
        hardware = prepare(replace(place, dtype="float32"))  # a program computes in the numbers that it was made for
        shape = input_shape_of(told["input_shape"])
        module = self.read(programs[0], hardware.device, folder)
        network = Network(module, shape, adapter=self.adapter, code=True)
        return LoadedNetwork(network, labels_of(told), hardware, str(told.get("task") or "prediction"))


def broken(words: str, err: Exception) -> SealedFileDamaged:
    """What is raised for a file that its library does not read."""
    return SealedFileDamaged(f"{words} is broken: {str(err)[:200]}", stage="payload")
