"""TorchScript (torch.jit.save): a program with its weights. It carries code, so it loads only where code is allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from divault.models.containers import Container
from divault.models.files import Folder, path_of
from divault.models.torch_programs import Found, Program, broken
from divault.values import MemoryFile

if TYPE_CHECKING:
    import torch

_WORDS = "TorchScript"


def _script(file: MemoryFile, device: torch.device, _: Folder) -> Found:
    import torch

    try:
        found: torch.nn.Module = torch.jit.load(path_of(file), map_location=device)  # type: ignore[no-untyped-call]  # torch's own
    except (RuntimeError, ValueError, KeyError) as err:
        raise broken(_WORDS, err) from None
    return Found(found.eval())


TORCH_SCRIPT = Program("torch-script", Container.TORCH_SCRIPT, _WORDS, _script)
"""The format: one program, and `divault.json`."""
