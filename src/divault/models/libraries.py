"""Libraries that a process imports ahead, so that workers are forked from it: its name is the format's `template`.

A format without one has a process of its own, started clean. Those are the formats whose files are programs, or
pickles: forks of one process share the layout of its memory, which is worth something to who can run what he likes.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping

_TORCH = (
    "torch",
    "torch._dynamo",  # what asking for deterministic algorithms imports
    "torch._inductor.config",
    "safetensors.torch",
    "divault.models.architecture",
    "divault.models.torch_state",
)
_SKLEARN = (
    "cluster", "compose", "decomposition", "discriminant_analysis", "ensemble", "feature_extraction.text",
    "feature_selection", "gaussian_process", "impute", "kernel_approximation", "linear_model", "mixture", "naive_bayes",
    "neighbors", "neural_network", "pipeline", "preprocessing", "svm", "tree",
)  # fmt: skip
LIBRARIES: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "sklearn": ("numpy", "scipy.sparse", *(f"sklearn.{name}" for name in _SKLEARN), "skops.io", "divault.models.skops"),
    "torch": _TORCH,
    "transformers": (
        *_TORCH,
        "tokenizers",
        "transformers.models.auto.modeling_auto",
        "transformers.generation.utils",
        "transformers.masking_utils",
        "transformers.modeling_layers",
        "transformers.modeling_utils",
        "transformers.processing_utils",
        "divault.models.huggingface",
    ),
    "onnx": ("numpy", "onnxruntime"),
    "xgboost": ("numpy", "xgboost"),
    "lightgbm": ("numpy", "lightgbm"),
}
"""Modules by the name of a template. `none`: nothing but this package, enough to recognise a format."""


def import_libraries(name: str) -> None:
    """Import what is installed of it. What is missing is said by the format itself, when it loads."""
    from divault.models import code_formats, formats

    code_formats(), formats()
    for module in LIBRARIES[name]:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(module)
