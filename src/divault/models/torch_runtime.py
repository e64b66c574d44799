"""How torch runs here: pinned threads, deterministic algorithms, and the object that says so in receipts."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from divault.errors import SettingsInvalid

if TYPE_CHECKING:
    import torch


def prepare(device: str) -> torch.device:
    """The device, with torch's process-wide switches set: threads as `OMP_NUM_THREADS` says, deterministic algorithms.

    Raises SettingsInvalid where the device isn't there.
    """
    import torch

    # cuBLAS reads it when the first product is made, and is not deterministic without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(_threads())
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


def _threads() -> int:
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdecimal() and 1 <= int(told) <= 1024 else 1


def runtime(adapter: str, device: torch.device, libraries: Sequence[str]) -> dict[str, Any]:
    """The runtime object of receipts: everything here that could change an answer."""
    import torch

    names = ("divault", "torch", "numpy", *libraries)
    return {
        "adapter": adapter,
        "arch": platform.machine(),
        "determinism": {
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        },
        "device": device_name(device),
        "dtype": "float32",
        "libraries": {"python": platform.python_version()} | {name: version(name) for name in names},
        "threads": torch.get_num_threads(),
    }


def device_name(device: torch.device) -> str:
    """`cpu`, or the GPU's product name."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
