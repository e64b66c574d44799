"""Formats of models and their runtimes: the only place for model libraries, and it runs only in a worker process.

`load` recognises files by their bytes, lets the first format that knows them load them, and names what none knows.
Nothing falls back: a format that recognises the files loads them or says why not. Importing this package imports none
of the libraries; each format does so when it loads.

To add a format: a module with a class of `base.ModelFormat`, one line in `formats`, and a real model in a test.
"""

from __future__ import annotations

from collections.abc import Sequence

from divault.errors import UnsupportedModel
from divault.models.base import CPU, LoadedModel, ModelFormat, Place
from divault.values import MemoryFile


def formats() -> list[ModelFormat]:
    """All formats, the most specific first."""
    from divault.models.huggingface import HuggingFace
    from divault.models.lightgbm import LightgbmModelFile
    from divault.models.onnx import Onnx
    from divault.models.sklearn import SklearnPickle
    from divault.models.skops import SkopsFile
    from divault.models.torch_state import TorchState
    from divault.models.xgboost import XgboostModelFile

    boosters: list[ModelFormat] = [XgboostModelFile(), LightgbmModelFile()]
    return [HuggingFace(), Onnx(), TorchState(), SkopsFile(), *boosters, SklearnPickle()]


def code_formats() -> list[ModelFormat]:
    """Formats whose files bring code that runs while they load or answer."""
    from divault.models.torch_export import TORCH_EXPORT
    from divault.models.torch_module import TORCH_MODULE
    from divault.models.torch_script import TORCH_SCRIPT

    return [TORCH_SCRIPT, TORCH_EXPORT, TORCH_MODULE]


def recognise(files: Sequence[MemoryFile], *, allow_code: bool = False) -> ModelFormat:
    """The format of these files. `allow_code`: code-bearing formats count too, which only a confined process may load.

    Raises UnsupportedModel (`seen` says what they are).
    """
    known = code_formats() + formats() if allow_code else formats()
    for model_format in known:
        if model_format.recognises(files):
            return model_format
    from divault.models import unsupported

    seen = unsupported.name(files)
    raise UnsupportedModel(
        f"this node does not load {seen}; it loads: {unsupported.SUPPORTED_TEXT}",
        seen=seen,
        supported=unsupported.SUPPORTED_TEXT,
    )


def load(files: Sequence[MemoryFile], place: Place = CPU, *, allow_code: bool = False) -> LoadedModel:
    """The model in these files. Raises UnsupportedModel, SealedFileDamaged."""
    return recognise(files, allow_code=allow_code).load(files, place)
