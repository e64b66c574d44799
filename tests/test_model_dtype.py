"""Half-size numbers where the operator wants them: nearly the same answers, in less memory, and said so."""

from __future__ import annotations

import io
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch.export import Dim

from divault import models
from divault.errors import InputInvalid, ModelFailed, SettingsInvalid, UnsupportedModel
from divault.models.base import DTYPES, Inputs, LoadedModel, Place
from divault.receipts.fields import runtime_hash
from divault.settings import Settings
from divault.workers.pool import WorkerPool
from tests.memory_models import (
    as_json,
    memory_files,
    mini_lm,
    state_dict_file,
    tiny_classifier,
    tiny_language_model,
)
from tests.test_model_more_tasks import HOW, tiny_network
from tests.worker_models import answer, opened

HALF = ("bfloat16", "float16")


def loaded(content: dict[str, bytes], dtype: str) -> LoadedModel:
    with memory_files(content) as files:
        return models.load(files, Place(dtype=dtype))


def said(model: LoadedModel, data: Any, **parameters: Any) -> Any:
    return model.predict([Inputs(data, parameters)])[0].result


@pytest.mark.parametrize("dtype", HALF)
def test_embeddings_are_nearly_those_of_float32_and_not_the_same(dtype: str) -> None:
    text = {"text": ["the film was good", "a book"]}
    whole, half = (loaded(mini_lm(), each) for each in ("float32", dtype))
    exact, near = (np.array(said(model, text)["embeddings"]) for model in (whole, half))

    assert (exact * near).sum(axis=1) == pytest.approx([1, 1], abs=2e-3)
    assert not np.array_equal(exact, near)
    assert half.description.runtime["dtype"] == dtype
    assert half.description.tolerance > whole.description.tolerance
    assert runtime_hash(dict(half.description.runtime)) != runtime_hash(dict(whole.description.runtime))


def test_positions_far_into_a_text_are_as_exact_as_the_first(tmp_path: Path) -> None:
    """Their angles are computed, not stored: in half-size numbers they would be wrong by half a turn."""
    from transformers import LlamaConfig, LlamaForCausalLM

    files = tiny_language_model(tmp_path)
    told = json.loads(files["config.json"]) | {"max_position_embeddings": 4096, "hidden_size": 64}
    torch.manual_seed(0)
    kept = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    network = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **{name: told[name] for name in kept}))
    weights = {name: (v * 8 if v.ndim == 2 else v).contiguous() for name, v in network.state_dict().items()}
    told["head_dim"] = told["hidden_size"] // told["num_attention_heads"]
    files |= {"config.json": as_json(told), "model.safetensors": save(weights, {"format": "pt"})}
    ids = torch.randint(5, told["vocab_size"], (1, 2048))
    scores = []
    for dtype in ("float32", "bfloat16"):
        model: Any = loaded(files, dtype)
        assert model._module.model.rotary_emb.inv_freq.dtype == torch.float32
        with torch.inference_mode():
            scores.append(model._module(ids).logits[0, 1900:].float())

    assert float((scores[0] - scores[1]).norm() / scores[0].norm()) < 0.1


@pytest.mark.parametrize("dtype", HALF)
def test_every_task_answers_in_finite_numbers(dtype: str, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("text", "language", "image")]
    for folder in folders:
        folder.mkdir()
    asked: list[tuple[dict[str, bytes], Any]] = [
        (tiny_classifier(folders[0]), {"text": "the film was good"}),
        (tiny_language_model(folders[1]), {"prompt": "Once"}),
        (tiny_network(folders[2], "vit", HOW), None),
    ]
    for content, data in asked:
        model = loaded(content, dtype)
        told = said(model, data or dict(model.description.example))

        assert model.description.runtime["dtype"] == dtype
        assert all(math.isfinite(number) for number in _numbers(told))


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict | list):
        return [one for part in (value.values() if isinstance(value, dict) else value) for one in _numbers(part)]
    return [value] if isinstance(value, float) else []


STATE = {
    "weights.bin": state_dict_file({"weight": torch.tensor([[1.001, 1.0]]), "bias": torch.zeros(1)}),
    "divault.json": as_json({"architecture": {"type": "linear", "in": 2, "out": 1}}),
}


@pytest.mark.parametrize(("dtype", "expected"), [("float32", 1.001), ("bfloat16", 1.0), ("float16", 1.0009765625)])
async def test_a_worker_computes_in_what_it_is_told(dtype: str, expected: float) -> None:
    pool, model = WorkerPool(predict_timeout_s=10, load_timeout_s=60, place=Place(dtype=dtype)), opened(STATE)
    try:
        told = await pool.load(model)
        assert (await answer(pool, model, {"tensor": [1.0, 0.0]}))["predictions"][0][0] == pytest.approx(expected)
        assert told.description.runtime["dtype"] == dtype
    finally:
        await pool.close()


class Words(torch.nn.Module):
    """Numbers of words to two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(10, 4)
        self.end = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(self.words(x).mean(1))


def program(kind: str, module: torch.nn.Module, items: torch.Tensor, **told: Any) -> LoadedModel:
    """The module, saved as a program of this kind and loaded again, on a node that computes in bfloat16."""
    from tests.test_model_torch_module import saved

    out = io.BytesIO()
    if kind == "pt2":
        torch.export.save(torch.export.export(module, (items,), dynamic_shapes=({0: Dim("b")},)), out)
    elif kind == "script":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.save(torch.jit.script(module), out)
    content = {f"model.{'pt2' if kind == 'pt2' else 'pt'}": out.getvalue() or saved(module)}
    with memory_files(content | {"divault.json": as_json({"input_shape": list(items.shape[1:])} | told)}) as files:
        return models.load(files, Place(dtype="bfloat16"), allow_code=True)


KINDS = ("script", "pt2", "pickled")
LARGE: Any = {
    torch.float16: {65504.0: ModelFailed, 65536.0: InputInvalid},
    torch.bfloat16: {3.3e38: ModelFailed, 1e39: InputInvalid},
}
"""What an answer of this dtype can't hold, and what not even the input can."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_program_keeps_its_own_numbers(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    module, items = torch.nn.Sequential(torch.nn.Linear(3, 2)).to(dtype).eval(), torch.rand(2, 3, dtype=dtype)
    torch.nn.init.constant_(module[0].weight, 0.75)
    model = program(kind, module, items)

    assert said(model, {"tensor": items.tolist()})["predictions"] == module(items).tolist()
    assert model.description.runtime["dtype"] == str(dtype).removeprefix("torch.")
    for number, error in LARGE.get(dtype, {}).items():
        with pytest.raises(error):
            said(model, {"tensor": [number] * 3})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
@pytest.mark.parametrize("told", ["int64", "int32", None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_program_gets_the_numbers_that_it_takes(kind: str, told: str | None) -> None:
    torch.manual_seed(1)
    layers = (torch.nn.Embedding(10, 4), torch.nn.Flatten(), torch.nn.Linear(24, 2))
    module = (torch.nn.Sequential(*layers) if kind == "pickled" else Words()).eval()
    items = torch.randint(0, 10, (3, 6), dtype=getattr(torch, told or "int64"))
    if told is None and kind != "pt2":  # its graph says it, the others have nothing but their weights
        with pytest.raises(UnsupportedModel, match=r"as float32, the program fails: .*Long, Int.*input_dtype"):
            program(kind, module, items)
        return
    model = program(kind, module, items, **({"input_dtype": told} if told else {}))
    form = model.description.input_schema["properties"]["tensor"]["anyOf"][0]

    assert said(model, {"tensor": items.tolist()})["predictions"] == module(items).tolist()
    assert form["items"]["type"] == "integer"
    assert model.description.runtime["dtype"] == "float32"
    with pytest.raises(InputInvalid):
        said(model, {"tensor": [0.5] * 6})


@pytest.mark.parametrize("told", ["complex64", "float", 64, ["int64"]])
def test_an_input_dtype_that_nobody_can_send_is_refused(told: Any) -> None:
    with pytest.raises(UnsupportedModel, match="input_dtype is one of"):
        program("pickled", torch.nn.Linear(3, 2), torch.rand(2, 3), input_dtype=told)


class Shifted(torch.nn.Module):
    """Has doubles that are no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([1700000123.25, 16777217.0], dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double() + self.mean


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
@pytest.mark.parametrize("kind", KINDS)
def test_doubles_of_a_program_are_not_cut(kind: str) -> None:
    items = torch.tensor([[0.5, 2.0], [1.0, 4.0]])
    model = program(kind, Shifted().eval(), items)

    assert said(model, {"tensor": items.tolist()})["predictions"] == [
        [1700000123.75, 16777219.0],
        [1700000124.25, 16777221.0],
    ]


def test_what_can_be_set() -> None:
    for dtype in DTYPES:
        assert Settings.load({"DIVAULT_DTYPE": dtype}, env_file=None).divault_dtype == dtype
    for wrong in ("float64", "half", "int8", "BFLOAT16"):
        with pytest.raises(SettingsInvalid, match="DIVAULT_DTYPE"):
            Settings.load({"DIVAULT_DTYPE": wrong}, env_file=None)
