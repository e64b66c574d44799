"""torch.export archives: refused by name, and loaded in a confined worker where the operator allows code."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from divault import models
from divault.errors import InputInvalid, SealedFileDamaged, UnsupportedModel
from divault.models.base import Inputs
from divault.models.torch_export import TORCH_EXPORT
from tests.memory_models import as_json, load, memory_files
from tests.test_model_torch_worker import opened
from tests.worker_calls import MakePool, confined_pool, run

__all__ = ["confined_pool"]  # a fixture
TOLD = as_json({"input_shape": [3], "labels": ["no", "yes"], "task": "classification"})


class Sums(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, -self.weight)


def exported(*, any_batch: bool) -> bytes:
    shapes: Any = {"x": {0: torch.export.Dim("batch", min=1)}} if any_batch else None
    program = torch.export.export(Sums().eval(), (torch.zeros(2 if any_batch else 1, 3),), dynamic_shapes=shapes)
    out = io.BytesIO()
    torch.export.save(program, out)
    return out.getvalue()


@pytest.fixture(scope="module", params=[True, False], ids=["any batch", "one item"])
def archive(request: pytest.FixtureRequest) -> bytes:
    return exported(any_batch=request.param)


async def test_it_answers_in_a_confined_worker(confined_pool: MakePool, archive: bytes) -> None:
    pool, model = confined_pool(True), opened("sums", {"model.pt2": archive, "divault.json": TOLD})
    assert await pool.prove_sandbox() == "standard"
    loaded = await pool.load(model)
    answer = await run(pool, model, {"tensor": [[1.0, 2.0, 3.0], [-4.0, 0.0, 1.0]]})

    assert [(row["label"], row["score"]) for row in answer["predictions"]] == [("yes", 6.0), ("no", 3.0)]
    assert loaded.description.code
    assert loaded.description.runtime["adapter"] == "torch-export"
    with pytest.raises(InputInvalid):
        await run(pool, model, {"tensor": [[1.0, 2.0]]})


def test_where_code_is_not_allowed_it_is_refused_by_name(archive: bytes) -> None:
    with memory_files({"model.pt2": archive, "divault.json": TOLD}) as files:
        with pytest.raises(UnsupportedModel, match=r"\.pt2"):
            models.load(files)
        assert models.load(files, allow_code=True).predict([Inputs({"tensor": [1.0, 0.0, 0.0]}, {})])


def test_it_needs_to_be_told_what_goes_in(archive: bytes) -> None:
    with pytest.raises(UnsupportedModel, match="input_shape"):
        load(TORCH_EXPORT, {"model.pt2": archive})


def test_a_damaged_archive_is_told(archive: bytes) -> None:
    place = archive.index(b'"graph_module"') if b'"graph_module"' in archive else len(archive) // 2
    broken = archive[:place] + b"\0" * 40 + archive[place + 40 :]
    with pytest.raises((SealedFileDamaged, UnsupportedModel)):
        load(TORCH_EXPORT, {"model.pt2": broken, "divault.json": TOLD})
