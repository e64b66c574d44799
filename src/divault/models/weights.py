"""Tensors out of memory files: safetensors, or what `torch.save(model.state_dict())` wrote. Nothing else, and no code.

Files are mapped, not copied, so weights in memory cost what the memory file costs.
"""

from __future__ import annotations

import re
import struct
import warnings
from collections.abc import Iterable
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, NoReturn

from divault.errors import SealedFileDamaged, UnsupportedModel
from divault.models.containers import Container, check_safetensors, check_torch_zip, container_of
from divault.models.files import path_of
from divault.values import MemoryFile

if TYPE_CHECKING:
    from torch import Tensor

SUPPORTED = "safetensors, or torch.save(model.state_dict())"
MAX_TENSORS = 100_000
_WRAPPED = ("state_dict", "model_state_dict")
"""Members under which training scripts keep the weights beside epoch and optimizer."""
_BROKEN_PICKLE = (
    *(RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError),
    *(EOFError, OverflowError, struct.error),
)
"""What the unpickler, tensors and zip reader of torch raise for altered content."""
_REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def read_weights(files: Iterable[MemoryFile]) -> dict[str, Tensor]:
    """All tensors of the files by name, floating ones as float32.

    Raises UnsupportedModel (a format that carries code, by its name), SealedFileDamaged (broken content).
    """
    found: dict[str, Tensor] = {}
    for file in files:
        tensors = _read_file(file)
        if found.keys() & tensors.keys():
            raise SealedFileDamaged("two files of weights hold a tensor of the same name", stage="payload")
        found |= tensors
    if not found or len(found) > MAX_TENSORS:
        raise SealedFileDamaged(f"{len(found)} tensors; at least one and at most {MAX_TENSORS}", stage="payload")
    return {name: _plain(name, tensor) for name, tensor in found.items()}


def _read_file(file: MemoryFile) -> dict[str, Tensor]:
    kind = container_of(file)
    if kind is Container.SAFETENSORS:
        return _read_safetensors(file)
    if kind in (Container.TORCH_ZIP, Container.TORCH_MODULE):  # the latter is refused by its first class
        return _read_torch_zip(file, kind)
    raise UnsupportedModel(
        f"the model is {kind.value}; this node loads {SUPPORTED}", seen=kind.value, supported=SUPPORTED
    )


def _read_safetensors(file: MemoryFile) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_safetensors(file)
    try:
        return load_file(path_of(file))
    # Besides its own error the library lets through what an unknown dtype or a shape over the file gives.
    except (SafetensorError, KeyError, ValueError, RuntimeError, OverflowError) as err:
        raise SealedFileDamaged(f"the safetensors file is broken: {str(err)[:200]}", stage="payload") from None


def _read_torch_zip(file: MemoryFile, kind: Container) -> dict[str, Tensor]:
    import torch

    check_torch_zip(file)
    try:
        with warnings.catch_warnings():
            # Advice on odd pickles; they load as tensors or not at all.
            warnings.simplefilter("ignore")
            content = torch.load(path_of(file), map_location="cpu", mmap=True, weights_only=True)
    except UnpicklingError as err:
        _refuse_pickle(str(err), "model" if kind is Container.TORCH_MODULE else "object")
    except _BROKEN_PICKLE as err:
        raise SealedFileDamaged(f"the torch.save file is broken: {type(err).__name__}", stage="payload") from None
    return _state_dict(content)


def _refuse_pickle(message: str, what: str) -> NoReturn:
    refused = _REFUSED_GLOBAL.search(message)
    seen = f"a pickled {what} ({refused[1]})" if refused else "a pickle that asks for more than tensors"
    raise UnsupportedModel(
        f"the torch.save file holds {seen}, not only tensors; save model.state_dict() instead of the model",
        seen=seen,
        supported=SUPPORTED,
    ) from None


def _state_dict(content: Any) -> dict[str, Tensor]:
    import torch

    if isinstance(content, dict):
        inner = [content[name] for name in _WRAPPED if isinstance(content.get(name), dict)]
        content = inner[0] if inner else content
    if isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        return dict(content)
    raise UnsupportedModel(
        "the torch.save file holds no state dict (names with tensors); save model.state_dict()",
        seen=f"a torch.save file with a {type(content).__name__}",
        supported=SUPPORTED,
    )


def _plain(name: str, tensor: Tensor) -> Tensor:
    import torch

    kind = type(tensor)
    odd = (
        tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.device.type != "cpu"
    )
    if kind not in {torch.Tensor, torch.nn.Parameter} or odd:
        raise UnsupportedModel(
            f"tensor {name[:100]!a} is sparse, quantized, complex or without data; save dense real tensors",
            seen="a tensor that is not dense and real",
            supported=SUPPORTED,
        )
    return tensor.detach().to(torch.float32) if tensor.is_floating_point() else tensor.detach()


def weight_files(files: Iterable[MemoryFile]) -> list[MemoryFile]:
    """Those of the files that hold weights in any container of torch, safe or not; safetensors alone where both."""
    kinds = [(file, container_of(file)) for file in files]
    safe = [file for file, kind in kinds if kind is Container.SAFETENSORS]
    return safe or [file for file, kind in kinds if kind is not Container.OTHER]
