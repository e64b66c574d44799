"""Half-size numbers where the operator wants them: nearly the same answers, in less memory, and said so."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from divault import models
from divault.errors import SettingsInvalid
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


def test_a_program_keeps_its_own_numbers() -> None:
    from tests.test_model_torch_module import saved, sequential

    files = {"model.pt": saved(sequential()), "divault.json": as_json({"input_shape": [2]})}
    with memory_files(files) as found:
        model = models.load(found, Place(dtype="bfloat16"), allow_code=True)
    assert model.description.runtime["dtype"] == "float32"


def test_what_can_be_set() -> None:
    for dtype in DTYPES:
        assert Settings.load({"DIVAULT_DTYPE": dtype}, env_file=None).divault_dtype == dtype
    for wrong in ("float64", "half", "int8", "BFLOAT16"):
        with pytest.raises(SettingsInvalid, match="DIVAULT_DTYPE"):
            Settings.load({"DIVAULT_DTYPE": wrong}, env_file=None)
