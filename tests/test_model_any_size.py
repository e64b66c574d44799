"""Networks that take any size: one that runs is found when they are loaded, and the schema says what stays the same."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

from divault.errors import InputInvalid, UnsupportedModel
from divault.models.base import LoadedModel
from divault.models.tensors import SIZES
from divault.models.torch_export import TORCH_EXPORT
from divault.models.torch_state import TorchState
from tests.memory_models import answer, as_json, load, state_dict_file
from tests.schemas import mismatch

Layers = list[tuple[str, dict[str, Any]]]
LINEAR: Layers = [("Linear", {"in_features": 4, "out_features": 3})]
STRIDED = {"kernel_size": 3, "stride": 2, "padding": 1}


def network(layers: Layers, shape: list[int | None]) -> tuple[nn.Sequential, LoadedModel]:
    """The same twice: as torch has it, and as it is loaded out of its weights."""
    torch.manual_seed(20)
    made = nn.Sequential(*(getattr(nn, kind)(**kwargs) for kind, kwargs in layers)).eval()
    told = {"architecture": [{"layer": kind, "kwargs": kwargs} for kind, kwargs in layers], "input_shape": shape}
    return made, load(TorchState(), {"w.pt": state_dict_file(made.state_dict()), "divault.json": as_json(told)})


def halved(times: int) -> Layers:
    """What networks for images begin with."""
    one = {"in_channels": 1, "out_channels": 1}
    return [("Conv2d", one | {"kernel_size": 1}), *[("Conv2d", one | STRIDED)] * times]


def pooled(kernel: int) -> Layers:
    """Needs as many pixels each way."""
    pool: tuple[str, dict[str, Any]] = ("AvgPool2d", {"kernel_size": kernel})
    return [*halved(0), pool, ("AdaptiveAvgPool2d", {"output_size": 1}), ("Flatten", {})]


@pytest.mark.parametrize(
    ("layers", "shape", "sizes"),
    [
        (LINEAR, [None, 4], [(5, 4), (1, 4), (100, 4)]),
        (halved(5), [1, None, None], [(1, 64, 96), (1, 8, 200)]),
        (pooled(12), [1, None, None], [(1, 12, 40)]),
        (pooled(200), [1, None, None], [(1, 224, 300)]),
    ],
)
def test_answers_to_items_of_any_size_fit_the_schema(
    layers: Layers, shape: list[int | None], sizes: list[tuple[int, ...]]
) -> None:
    made, model = network(layers, shape)
    for item in sizes:
        rows = torch.randn(2, *item)
        result = answer(model, {"tensor": rows.tolist()})

        assert result["predictions"] == made(rows).tolist()
        assert not mismatch(result, model.description.output_schema), item
    form = model.description.input_schema["properties"]["tensor"]["anyOf"][0]
    with pytest.raises(InputInvalid):
        answer(model, {"tensor": np.zeros([0 if size is None else size for size in shape]).tolist()})
    assert mismatch([] if shape[0] is None else [[]], form)


def test_what_no_size_changes_is_told() -> None:
    _, model = network(LINEAR, [None, 4])

    assert mismatch({"predictions": [[[1.0, 2.0, 3.0, 4.0]]]}, model.description.output_schema)


@pytest.mark.parametrize(("kernel", "size"), [(8, 8), (9, 32), (65, 224)])
def test_the_example_has_the_first_size_that_runs(kernel: int, size: int) -> None:
    _, model = network(pooled(kernel), [1, None, size])
    told: Any = model.description.example["tensor"]

    assert (told["shape"] if isinstance(told, dict) else list(np.shape(told))) == [1, 1, size, size]


@pytest.mark.parametrize(
    ("layers", "shape"), [(pooled(max(SIZES) + 1), [1, None, None]), (LINEAR, [None, 5]), (pooled(9), [1, None, 8])]
)
def test_where_none_of_a_few_sizes_runs_it_is_refused(layers: Layers, shape: list[int | None]) -> None:
    with pytest.raises(UnsupportedModel, match="don't fit together"):
        network(layers, shape)


class Sums(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(2)


def sums(words: Any, told: list[int | None]) -> LoadedModel:
    """A graph of items of so many words, each of four numbers."""
    program = torch.export.export(Sums(), (torch.zeros(3, 6, 4),), dynamic_shapes=({0: Dim("b"), 1: words},))
    out = io.BytesIO()
    torch.export.save(program, out)
    return load(TORCH_EXPORT, {"m.pt2": out.getvalue(), "divault.json": as_json({"input_shape": told})})


@pytest.mark.parametrize(
    ("words", "right", "wrong"), [(Dim("s", max=7), 7, 8), (Dim("s", min=5), 90, 4), (2 * Dim("s", max=3), 4, 8)]
)
def test_a_graph_is_tried_within_its_bounds(words: Any, right: int, wrong: int) -> None:
    model = sums(words, [None, 4])
    result = answer(model, {"tensor": [[1.0] * 4] * right})

    assert result == {"predictions": [[4.0] * right]}
    assert not mismatch(result, model.description.output_schema)
    assert answer(model, dict(model.description.example))
    with pytest.raises(InputInvalid):
        answer(model, {"tensor": [[1.0] * 4] * wrong})


def test_a_size_that_the_graph_has_once_and_for_all_is_told() -> None:
    model = sums(None, [None, 4])
    form = model.description.input_schema["properties"]["tensor"]["anyOf"][0]

    assert (form["minItems"], form["maxItems"]) == (6, 6)
    with pytest.raises(InputInvalid):
        answer(model, {"tensor": [[1.0] * 4] * 5})
