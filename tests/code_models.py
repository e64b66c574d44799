"""Models that are programs, for what one may try within its process: a pickled network and the file of its class."""

from __future__ import annotations

import io
import sys
import types

import torch

from divault.values import OpenedModel
from tests.memory_models import as_json
from tests.worker_models import opened

_CLASS = """
import sys
import torch

def frames():
    '''The variables of all callers: a model can walk through the program that runs it.'''
    found = sys._getframe()
    while found is not None:
        yield found.f_locals
        found = found.f_back

class Net(torch.nn.Module):
    def forward(self, x):
        return x
"""
_DESCRIBED = as_json({"input_shape": [2], "labels": ["no", "yes"], "task": "classification"})
INPUT = {"tensor": [1.0, 2.0]}


def code_model(source: str, name: str = "m") -> OpenedModel:
    """A network whose file goes on with `source`, which runs when it is loaded and may replace `Net.forward`."""
    made = types.ModuleType("net")
    sys.modules["net"] = made
    try:
        exec(_CLASS, made.__dict__)
        out = io.BytesIO()
        torch.save(made.Net(), out)
    finally:
        del sys.modules["net"]
    parts = {"model.pt": out.getvalue(), "net.py": (_CLASS + source).encode(), "divault.json": _DESCRIBED}
    return opened(parts, name)
