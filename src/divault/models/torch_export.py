"""torch.export archives (.pt2): a graph with its weights. Reading one runs code: it loads only where that is allowed.

A graph that was exported for one size of batch alone gets its items one by one.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from divault.models.containers import Container
from divault.models.files import Folder, path_of
from divault.models.torch_programs import Program, broken
from divault.values import MemoryFile

if TYPE_CHECKING:
    import torch

_WORDS = "a torch.export archive (.pt2)"
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, EOFError, OSError, ImportError, NotImplementedError),
    *(RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, ArithmeticError),
)
"""What zipfile, json, the unpickler and the readers of graphs raise for altered content."""


def _graph(file: MemoryFile, device: torch.device, _: Folder) -> torch.nn.Module:
    import torch
    from torch._export.verifier import SpecViolationError

    try:
        with Path(path_of(file)).open("rb") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: torch.nn.Module = torch.export.load(archive).module()
    except (*_DAMAGE, SpecViolationError) as err:
        raise broken(_WORDS, err) from None
    return found.to(device)


def _any_batch(graph: torch.nn.Module, shape: tuple[int | None, ...], device: torch.device) -> torch.nn.Module:
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


TORCH_EXPORT = Program("torch-export", Container.TORCH_EXPORT, _WORDS, _graph, _any_batch)
"""The format: one archive, and `divault.json`."""
