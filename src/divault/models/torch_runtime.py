"""How torch runs here: pinned threads, deterministic algorithms, and the object that says so in receipts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from divault.errors import SettingsInvalid
from divault.models.base import Place
from divault.models.runtimes import runtime_object, seed, threads

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Hardware:
    """A place as torch has it."""

    device: torch.device
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """`cpu`, or the GPU's product name."""
        import torch

        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def dtype_name(self) -> str:
        """As settings and receipts have it: `float32`."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def tolerance(self) -> float:
        """Most that numbers of one input differ with what else is in its batch: sums are made in another order."""
        return _TOLERANCE[self.dtype_name]


# What has weights of doubles may still compute in float32 in between.
_TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
DTYPES = tuple(_TOLERANCE)
"""Of networks; programs alone have doubles."""


def prepare(place: Place) -> Hardware:
    """The device, with torch's process-wide switches set: threads as `OMP_NUM_THREADS` says, deterministic algorithms.

    Raises SettingsInvalid where the device isn't there.
    """
    import torch

    device = _best() if place.device == "auto" else place.device
    # cuBLAS reads it when the first product is made, and is not deterministic without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads())
    seed()
    torch.use_deterministic_algorithms(mode=True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return Hardware(_found(device), getattr(torch, place.dtype))


def require_device(device: str) -> None:
    """Return if torch has it; `auto` and `cpu` are everywhere, and torch stays out. Raises SettingsInvalid."""
    if device in ("auto", "cpu"):
        return
    try:
        _found(device)
    except ModuleNotFoundError as err:
        raise SettingsInvalid(
            "torch is not installed, and nothing else runs on a GPU: install it, or set DIVAULT_DEVICE=auto",
            setting="DIVAULT_DEVICE",
        ) from err


def _found(device: str) -> torch.device:
    import torch

    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    # torch reports a missing driver with a bare AssertionError, an unknown name with a RuntimeError.
    except (RuntimeError, AssertionError) as err:
        raise SettingsInvalid(
            f"the device {device[:40]!r} is not here (and confined workers see no GPU): set DIVAULT_DEVICE=cpu",
            setting="DIVAULT_DEVICE",
        ) from err
    return found


def placed(module: torch.nn.Module, hardware: Hardware) -> torch.nn.Module:
    """The module on the device, its weights in the dtype.

    What it computes for itself and saves nowhere stays exact: angles of positions, in half-size numbers, are wrong by
    half a turn after a thousand tokens.
    """
    kept = {
        (part, name): buffer
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name in part._non_persistent_buffers_set  # noqa: SLF001 - torch has no other name for it
    }
    module.to(hardware.device, hardware.dtype)
    for (part, name), buffer in kept.items():
        setattr(part, name, buffer.to(hardware.device))
    return module


def _best() -> str:
    """A GPU where torch sees one that works, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def runtime(adapter: str, hardware: Hardware, libraries: Sequence[str]) -> dict[str, Any]:
    """The runtime object of receipts: everything here that could change an answer."""
    import torch

    flags = {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "tf32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32,
        "torch_instructions": torch.backends.cpu.get_cpu_capability(),
    }
    told = runtime_object(adapter, hardware.name, hardware.dtype_name, ("torch", *libraries), flags)
    return told | {"threads": torch.get_num_threads()}
