"""TorchScript (torch.jit.save): a program with its weights. It carries code, so it loads only where code is allowed.

What goes in doesn't stand in the file: `divault.json` beside it in a tar says `input_shape`, perhaps `labels`, `task`.
"""

from __future__ import annotations

from collections.abc import Sequence

from divault.errors import SealedFileDamaged, UnsupportedModel
from divault.models.architecture import Network, input_shape_of
from divault.models.containers import Container, container_of
from divault.models.files import Folder, path_of
from divault.models.labels import labels_of
from divault.models.torch_runtime import prepare
from divault.models.torch_state import LoadedNetwork
from divault.values import MemoryFile


class TorchScript:
    """The format: one program, and `divault.json`."""

    template = ""

    def recognises(self, files: Sequence[MemoryFile]) -> bool:
        """Whether a TorchScript archive is among the files."""
        return any(container_of(file) is Container.TORCH_SCRIPT for file in files)

    def load(self, files: Sequence[MemoryFile], device: str) -> LoadedNetwork:
        """The program in memory. Raises UnsupportedModel, SealedFileDamaged; SettingsInvalid for the device."""
        import torch

        folder = Folder(files)
        programs = [file for file in folder.files if container_of(file) is Container.TORCH_SCRIPT]
        told = folder.json_object("divault.json")
        if len(programs) != 1 or told.get("input_shape") is None:
            lacks = "TorchScript without input_shape"
            raise UnsupportedModel(
                "a TorchScript model is one program and a divault.json that says what goes in, in a tar: for example "
                '{"input_shape": [3, 32, 32]}',
                seen=lacks if len(programs) == 1 else f"{len(programs)} TorchScript programs",
                supported="one TorchScript program in a tar with divault.json",
            )
        place = prepare(device)
        try:
            module = torch.jit.load(path_of(programs[0]), map_location=place)  # type: ignore[no-untyped-call]  # torch's own
        except (RuntimeError, ValueError, KeyError) as err:
            raise SealedFileDamaged(f"the TorchScript archive is broken: {str(err)[:200]}", stage="payload") from None
        network = Network(module.eval(), input_shape_of(told["input_shape"]))
        return LoadedNetwork(network, labels_of(told), place, str(told.get("task") or "prediction"), code=True)
