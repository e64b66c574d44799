"""How torch runs here: pinned threads, deterministic algorithms, and the object that says so in receipts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from divault.errors import SettingsInvalid
from divault.models.runtimes import runtime_object, seed, threads

if TYPE_CHECKING:
    import torch


def prepare(device: str) -> torch.device:
    """The device, with torch's process-wide switches set: threads as `OMP_NUM_THREADS` says, deterministic algorithms.

    Raises SettingsInvalid where the device isn't there.
    """
    import torch

    device = _best() if device == "auto" else device
    # cuBLAS reads it when the first product is made, and is not deterministic without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads())
    seed()
    torch.use_deterministic_algorithms(mode=True)
    torch.backends.cudnn.benchmark = False
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    # torch reports a missing driver with a bare AssertionError, an unknown name with a RuntimeError.
    except (RuntimeError, AssertionError) as err:
        raise SettingsInvalid(
            f"the device {device[:40]!r} is not here: set DIVAULT_DEVICE=cpu", setting="DIVAULT_DEVICE"
        ) from err
    return found


def _best() -> str:
    """A GPU where torch sees one that works, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def runtime(adapter: str, device: torch.device, libraries: Sequence[str]) -> dict[str, Any]:
    """The runtime object of receipts: everything here that could change an answer."""
    import torch

    flags = {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }
    told = runtime_object(adapter, device_name(device), "float32", ("torch", *libraries), flags)
    return told | {"threads": torch.get_num_threads()}


def device_name(device: torch.device) -> str:
    """`cpu`, or the GPU's product name."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
