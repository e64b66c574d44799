"""What could change an answer, pinned and told: threads, seeds, versions. The object that receipts hash."""

from __future__ import annotations

import os
import platform
import random
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from typing import Any

SEED = 0
"""Of every generator in the process when a model is loaded; who draws while answering seeds anew for each caller."""


def threads() -> int:
    """Threads of this process' libraries, as `OMP_NUM_THREADS` says; 1 without it."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdecimal() and 1 <= int(told) <= 1024 else 1


def pin_threads(count: int) -> None:
    """Have the libraries of this process, those that it was forked with too, use so many threads."""
    if count == threads():
        return
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(count)
    # torch, onnxruntime and the boosters are told when they load a model; scikit-learn's libraries are not its own.
    if "sklearn" in sys.modules:
        from threadpoolctl import threadpool_limits

        threadpool_limits(count)


def seed() -> None:
    """Give the generators of Python and numpy, and of torch where it is in use, the same start each time."""
    import numpy as np

    random.seed(SEED)
    np.random.seed(SEED)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)


@cache
def version(name: str) -> str:
    """Version of a distribution that is installed here; read once, since its whole metadata is parsed for it."""
    return metadata.version(name)


@cache
def instructions() -> list[str]:
    """What this processor has for numbers, as numpy sees it: libraries choose by it how they compute."""
    from numpy._core import _multiarray_umath  # type: ignore[attr-defined]  # what `numpy.show_runtime` shows

    return sorted(name for name, has in _multiarray_umath.__cpu_features__.items() if has)


def blas() -> list[str]:
    """The processors that the BLAS libraries of this process compute as for; scikit-learn's own tool tells."""
    from threadpoolctl import threadpool_info

    return sorted({str(one["architecture"]) for one in threadpool_info() if "architecture" in one})


def runtime_object(
    adapter: str, device: str, dtype: str, libraries: Sequence[str], determinism: Mapping[str, Any]
) -> dict[str, Any]:
    """The runtime object; `libraries` are distributions beside divault and numpy that touch numbers."""
    names = ("divault", "numpy", *libraries)
    return {
        "adapter": adapter,
        "arch": platform.machine(),
        "determinism": {"seed": SEED, "instructions": instructions(), **determinism},
        "device": device,
        "dtype": dtype,
        "libraries": {"python": platform.python_version()} | {name: version(name) for name in names},
        "threads": threads(),
    }
