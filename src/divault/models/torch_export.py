"""torch.export archives (.pt2): a graph with its weights. Reading one runs code: it loads only where that is allowed.

What goes in stands in `divault.json` beside it in a tar: `input_shape` of one item, perhaps `labels`, `task`. A graph
that was exported for one size of batch alone gets its items one by one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from divault.errors import SealedFileDamaged, UnsupportedModel
from divault.models.architecture import Network, input_shape_of
from divault.models.containers import Container, container_of
from divault.models.files import Folder, path_of
from divault.models.labels import labels_of
from divault.models.torch_runtime import prepare
from divault.models.torch_state import LoadedNetwork
from divault.values import MemoryFile

if TYPE_CHECKING:
    import torch


class TorchExport:
    """The format: one archive, and `divault.json`."""

    template = ""

    def recognises(self, files: Sequence[MemoryFile]) -> bool:
        """Whether a torch.export archive is among the files."""
        return any(container_of(file) is Container.TORCH_EXPORT for file in files)

    def load(self, files: Sequence[MemoryFile], device: str) -> LoadedNetwork:
        """The graph in memory. Raises UnsupportedModel, SealedFileDamaged; SettingsInvalid for the device."""
        folder = Folder(files)
        archives = [file for file in folder.files if container_of(file) is Container.TORCH_EXPORT]
        told = folder.json_object("divault.json")
        if len(archives) != 1 or told.get("input_shape") is None:
            lacks = "a .pt2 archive without input_shape"
            raise UnsupportedModel(
                "a torch.export model is one archive and a divault.json that says what goes in, in a tar: for example "
                '{"input_shape": [3, 32, 32]}',
                seen=lacks if len(archives) == 1 else f"{len(archives)} archives of torch.export",
                supported="one .pt2 archive in a tar with divault.json",
            )
        place = prepare(device)
        shape = input_shape_of(told["input_shape"])
        network = Network(_module(_graph(archives[0]).to(place), shape, place), shape)
        return LoadedNetwork(network, labels_of(told), place, str(told.get("task") or "prediction"), code=True)


def _graph(file: MemoryFile) -> torch.nn.Module:
    import torch

    try:
        with Path(path_of(file)).open("rb") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: torch.nn.Module = torch.export.load(archive).module()
    except Exception as err:  # noqa: BLE001 - whatever a library makes of somebody's file: its readers raise all kinds
        raise SealedFileDamaged(f"the torch.export archive is broken: {str(err)[:200]}", stage="payload") from None
    return found


def _module(graph: torch.nn.Module, shape: tuple[int | None, ...], device: torch.device) -> torch.nn.Module:
    """The graph itself where it takes two items at once, else one that gives it each alone."""
    import torch

    two = torch.zeros((2, *(size or 1 for size in shape)), device=device)
    try:
        with torch.inference_mode():
            graph(two)
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError):
        return _one_by_one(graph)
    return graph


def _one_by_one(graph: torch.nn.Module) -> torch.nn.Module:
    import torch

    class OneByOne(torch.nn.Module):
        """Items one after the other."""

        def forward(self, items: Any) -> torch.Tensor:
            """One row for each item."""
            return torch.cat([graph(item[None]) for item in items])

    return OneByOne()
