"""TorchScript carries code: refused by name, and loaded in a confined worker where the operator allows it."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from divault import models
from divault.errors import DeadlineExceeded, InputInvalid, ModelFailed, UnsupportedModel
from divault.models.base import Inputs
from tests.memory_models import as_json, memory_files
from tests.schemas import mismatch
from tests.test_model_torch_worker import opened
from tests.worker_calls import MakePool, confined_pool, run

__all__ = ["confined_pool"]  # a fixture
TOLD = {"input_shape": [3], "labels": ["no", "yes"], "task": "classification"}


class Scorer(torch.nn.Module):
    """Sums that take a branch, which only a program can."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = x.sum(dim=1, keepdim=True)
        if bool((total > 100).any()):
            total = total * 0
        return torch.cat([-total, total], dim=1)


class Slow(torch.nn.Module):
    """Never comes back, but for zeros."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while bool((x != 0).any()):
            x = x + 0
        return x


def script(module: torch.nn.Module) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch would rather have torch.export; files stay in use
        torch.jit.save(torch.jit.script(module), out)
    return out.getvalue()


@pytest.fixture(scope="module")
def scorer() -> bytes:
    return script(Scorer())


async def test_it_answers_where_code_is_allowed(confined_pool: MakePool, scorer: bytes) -> None:
    pool, model = confined_pool(True), opened("scorer", {"model.pt": scorer, "divault.json": as_json(TOLD)})
    assert await pool.prove_sandbox() == "standard"
    loaded = await pool.load(model)

    answer = await run(pool, model, {"tensor": [[1.0, 2.0, 3.0], [-4.0, 0.0, 1.0]]})

    assert [(row["label"], row["score"]) for row in answer["predictions"]] == [("yes", 6.0), ("no", 3.0)]
    assert loaded.description.code
    assert loaded.sandbox == "standard"
    assert loaded.description.task == "classification"
    assert answer == await run(pool, model, {"tensor": [[1.0, 2.0, 3.0], [-4.0, 0.0, 1.0]]})
    with pytest.raises(InputInvalid):
        await run(pool, model, {"tensor": [[1.0, 2.0]]})


@pytest.mark.parametrize("proven", [False, True])
async def test_it_is_refused_by_name_where_code_is_not_allowed(
    confined_pool: MakePool, scorer: bytes, proven: bool
) -> None:
    """Also where it is allowed and its process can't prove its confinement."""
    pool = confined_pool(not proven)
    if not proven:
        pool._confinement._canary = Path("/nowhere/at/all")
    with pytest.raises(UnsupportedModel, match="TorchScript"):
        await pool.load(opened("scorer", {"model.pt": scorer, "divault.json": as_json(TOLD)}))


class Unit(torch.nn.Module):
    """Has no answer for zeros, which is what it is tried with while it is loaded."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x * x).sum(dim=1, keepdim=True).sqrt()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, as above
def test_a_program_without_an_answer_for_zeros_loads() -> None:
    files = {"model.pt": script(Unit()), "divault.json": as_json({"input_shape": [2]})}
    with memory_files(files) as found:
        model = models.load(found, allow_code=True)

    assert model.predict([Inputs({"tensor": [3.0, 4.0]}, {})])[0].result["predictions"][0] == pytest.approx([0.6, 0.8])
    with pytest.raises(ModelFailed):
        model.predict([Inputs({"tensor": [0.0, 0.0]}, {})])


class In(torch.nn.Module):
    """Computes in numbers of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2).to(dtype)
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.to(self.dtype))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_numbers_of_any_length_are_written_out_exactly(dtype: torch.dtype) -> None:
    module, row = In(dtype).eval(), [0.1, 0.2, 0.3]
    with memory_files({"model.pt": script(module), "divault.json": as_json({"input_shape": [3]})}) as found:
        model = models.load(found, allow_code=True)

    expected = module(torch.tensor([row], dtype=dtype)).tolist()
    assert model.predict([Inputs({"tensor": row}, {})])[0].result["predictions"] == expected


class Above(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x > 0


class Rounded(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.long()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "told", "row"), [(Above, "boolean", [True, False]), (Rounded, "integer", [1, -1]), (Unit, "number", None)]
)
def test_the_schema_says_what_comes_out(kind: type[torch.nn.Module], told: str, row: Any) -> None:
    files = {"model.pt": script(kind()), "divault.json": as_json({"input_shape": [2]})}
    with memory_files(files) as found:
        model = models.load(found, allow_code=True)
    result = model.predict([Inputs({"tensor": [1.0, -1.0]}, {})])[0].result

    assert row in (None, result["predictions"][0])
    assert not mismatch(result, model.description.output_schema)
    assert model.description.output_schema["properties"]["predictions"]["items"]["items"] == {"type": told}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_labels_are_for_numbers() -> None:
    told = {"input_shape": [2], "labels": ["no", "yes"]}
    with (
        memory_files({"model.pt": script(Above()), "divault.json": as_json(told)}) as found,
        pytest.raises(UnsupportedModel, match="a row of output is bool"),
    ):
        models.load(found, allow_code=True)


class Pair(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


class Named(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x": x}


class Whole(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum()


class Complex(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.complex64)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", [Pair, Named, Whole, Complex])
def test_what_is_no_row_of_numbers_for_each_item_is_refused_when_it_is_loaded(kind: type[torch.nn.Module]) -> None:
    with (
        memory_files({"model.pt": script(kind()), "divault.json": as_json({"input_shape": [3]})}) as found,
        pytest.raises(UnsupportedModel, match="one row of numbers for each item"),
    ):
        models.load(found, allow_code=True)


async def test_it_needs_to_be_told_what_goes_in(confined_pool: MakePool, scorer: bytes) -> None:
    pool = confined_pool(True)
    await pool.prove_sandbox()
    with pytest.raises(UnsupportedModel, match="input_shape"):
        await pool.load(opened("scorer", {"model.pt": scorer}))
    with pytest.raises(UnsupportedModel, match="damaged zip"):
        await pool.load(opened("broken", {"model.pt": scorer[:-400] + bytes(400), "divault.json": as_json(TOLD)}))


async def test_a_program_that_never_ends_is_stopped(confined_pool: MakePool) -> None:
    pool = confined_pool(True)
    await pool.prove_sandbox()
    model = opened("slow", {"model.pt": script(Slow()), "divault.json": as_json({"input_shape": [2]})})
    await pool.load(model)
    pool._entries[model.model.key].worker._deadlines = type(pool._deadlines)(load_s=60, predict_s=1)

    with pytest.raises(DeadlineExceeded):
        await run(pool, model, {"tensor": [[1.0, 1.0]]})
