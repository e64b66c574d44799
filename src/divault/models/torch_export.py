"""torch.export archives (.pt2): a graph with its weights. Reading one runs code: it loads only where that is allowed.

A graph that was exported for one item, or for so many at most, gets no more at once.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from divault.errors import InputInvalid, UnsupportedModel
from divault.models.architecture import MAX_SIZE
from divault.models.containers import Container
from divault.models.files import Folder, path_of
from divault.models.torch_programs import Found, Program, broken
from divault.values import MemoryFile

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

_WORDS = "a torch.export archive (.pt2)"
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, EOFError, OSError, ImportError, NotImplementedError),
    *(RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, ArithmeticError),
)
"""What zipfile, json, the unpickler and the readers of graphs raise for altered content."""


def _graph(file: MemoryFile, device: torch.device, _: Folder) -> Found:
    import torch
    from torch._export.verifier import SpecViolationError

    try:
        with Path(path_of(file)).open("rb") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(archive)
            graph, most, taken = program.module(), _most_items(program), _taken(program)
    except (*_DAMAGE, SpecViolationError) as err:
        raise broken(_WORDS, err) from None
    bounds = tuple(_bounds(program, size) for size in taken.shape[1:])
    return Found(_in_parts(graph.to(device), most), str(taken.dtype).removeprefix("torch."), bounds)


def _taken(program: ExportedProgram) -> Any:
    """The tensor that the graph was exported with, without its numbers; None where it takes no tensor."""
    inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    found = inputs[0].meta.get("val") if inputs else None
    return found if hasattr(found, "shape") else None


def _bounds(program: ExportedProgram, size: Any) -> tuple[int, int]:
    """Least and most size that an axis may have; what has no bound has one beyond every tensor."""
    from torch.utils._sympy.numbers import int_oo

    if isinstance(size, int):
        return size, size
    found = program.range_constraints.get(size.node.expr)
    if found is None:
        return 1, MAX_SIZE
    return max(1, int(found.lower)), MAX_SIZE if found.upper == int_oo else max(1, int(found.upper))


def _most_items(program: ExportedProgram) -> int | None:
    """How many items the graph takes at once, None without a bound. Raises UnsupportedModel where it needs several."""
    shape = getattr(_taken(program), "shape", ())
    if not shape or (isinstance(shape[0], int) and shape[0] != 1):
        takes = f"exactly {shape[0]} items at once" if shape else "no tensor of items"
        raise UnsupportedModel(
            f"{_WORDS} that takes {takes}: export it with a dynamic batch, or for one item",
            seen=f"{_WORDS} that takes {takes}",
            supported="torch.export with dynamic_shapes={...: {0: Dim(...)}}, or of one item",
        )
    _, most = _bounds(program, shape[0])
    return None if most == MAX_SIZE else most


def _in_parts(graph: Any, most: int | None) -> torch.nn.Module:
    import torch

    class InParts(torch.nn.Module):
        """As many items at once as the graph takes."""

        def __init__(self) -> None:
            super().__init__()
            self.graph = graph  # so that its weights are found

        def forward(self, items: torch.Tensor) -> Any:
            """One row for each item. Raises InputInvalid for sizes that the graph was not exported for."""
            try:
                if most is None or len(items) <= most:
                    return graph(items)
                return torch.cat([graph(part) for part in torch.split(items, most)])
            except AssertionError as err:
                told = str(err)[:200]
                raise InputInvalid(f"tensor: a size that the graph does not take ({told})", field="tensor") from None

    return InParts()


TORCH_EXPORT = Program("torch-export", Container.TORCH_EXPORT, _WORDS, _graph)
"""The format: one archive, and `divault.json`."""
