"""torch.export archives: refused by name, and loaded in a confined worker where the operator allows code."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from divault import models
from divault.errors import InputInvalid, SealedFileDamaged, UnsupportedModel
from divault.models import torch_export
from divault.models.base import Inputs
from divault.models.files import path_of
from divault.models.torch_export import TORCH_EXPORT
from tests.memory_models import answer, as_json, load, memory_files
from tests.test_model_torch_worker import opened
from tests.worker_calls import MakePool, confined_pool, run

__all__ = ["confined_pool"]  # a fixture
Content = dict[str, bytes]
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


class Both(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x, x


def exported_for(module: torch.nn.Module, items: int, dim: Any) -> Content:
    """Of three numbers an item: so many at once, unless `dim` says otherwise."""
    shapes = None if dim is None else {"x": {0: dim}}
    out = io.BytesIO()
    torch.export.save(torch.export.export(module.eval(), (torch.zeros(items, 3),), dynamic_shapes=shapes), out)
    return {"model.pt2": out.getvalue(), "divault.json": as_json({"input_shape": [3]})}


Dim = torch.export.Dim
ROWS = torch.arange(21.0).reshape(7, 3)


@pytest.mark.parametrize(
    ("items", "dim"),
    [(1, None), (3, Dim("b", max=4)), (3, Dim("b", min=2, max=5)), (3, Dim("b")), (3, Dim.AUTO), (4, 2 * Dim("b"))],
)
@pytest.mark.parametrize("count", [1, 4, 5, 7])
def test_items_beyond_the_graph_s_bound_go_in_parts(items: int, dim: Any, count: int) -> None:
    module = Sums()
    model = load(TORCH_EXPORT, exported_for(module, items, dim))

    assert answer(model, {"tensor": ROWS[:count].tolist()})["predictions"] == module(ROWS[:count]).tolist()


@pytest.mark.parametrize(("most", "items", "parts"), [(None, 7, [7]), (4, 7, [4, 3]), (4, 4, [4]), (1, 3, [1, 1, 1])])
def test_a_graph_gets_as_many_at_once_as_it_takes(most: int | None, items: int, parts: list[int]) -> None:
    seen: list[int] = []

    def graph(some: torch.Tensor) -> torch.Tensor:
        seen.append(len(some))
        return some

    assert torch.equal(torch_export._in_parts(graph, most)(ROWS[:items]), ROWS[:items])
    assert seen == parts


@pytest.mark.parametrize(("dim", "most"), [(Dim("b", max=4), 4), (Dim("b"), None), (None, 1)])
def test_how_many_that_are_is_read_from_the_graph(dim: Any, most: int | None) -> None:
    with memory_files(exported_for(Sums(), 1 if dim is None else 3, dim)) as files:
        archive = next(file for file in files if file.name.endswith(".pt2"))
        assert torch_export._most_items(torch.export.load(path_of(archive))) == most


@pytest.mark.parametrize(
    ("module", "items", "dim", "words"),
    [
        (Sums(), 4, None, "exactly 4 items"),
        (Sums(), 5, Dim("b", min=3), "size that the graph does not take"),
        (Both(), 1, None, "one row of numbers for each item"),
    ],
)
def test_a_graph_that_takes_no_single_item_or_gives_no_rows_is_refused(
    module: torch.nn.Module, items: int, dim: Any, words: str
) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        load(TORCH_EXPORT, exported_for(module, items, dim))


def test_a_size_that_the_graph_does_not_take_is_the_caller_s_to_mend() -> None:
    out = io.BytesIO()
    shapes = {"x": {0: Dim("b"), 1: Dim("n", max=9)}}
    torch.export.save(torch.export.export(Totals().eval(), (torch.zeros(3, 4),), dynamic_shapes=shapes), out)
    model = load(TORCH_EXPORT, {"model.pt2": out.getvalue(), "divault.json": as_json({"input_shape": [None]})})

    assert answer(model, {"tensor": [[1.0] * 9]})["predictions"] == [9.0]
    with pytest.raises(InputInvalid, match="a size that the graph does not take"):
        answer(model, {"tensor": [[1.0] * 10]})


class Totals(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(1)


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
