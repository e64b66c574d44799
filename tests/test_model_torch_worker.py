"""PyTorch and Hugging Face models in their worker process: the same answers through frames, under its limits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import save

from divault.errors import InputInvalid, UnsupportedModel
from divault.models.huggingface import HuggingFace
from divault.values import (
    BodySignature,
    Cid,
    Digest,
    Hold,
    ModelId,
    Nonce,
    OpenedModel,
    SignedCall,
    Usdc,
)
from divault.workers.pool import WorkerPool
from tests.memory_models import answer, as_json, load, memory_file, mini_lm, state_dict_file, tiny_classifier
from tests.sealed_models import SOMEBODY, grant

MLP = {"type": "mlp", "sizes": [2, 3, 1], "activation": "tanh"}


@pytest.fixture
async def pool() -> AsyncIterator[WorkerPool]:
    pool = WorkerPool(predict_timeout_s=30, load_timeout_s=90)
    yield pool
    await pool.close()


def opened(name: str, content: Mapping[str, bytes]) -> OpenedModel:
    digest = hashlib.sha256(name.encode()).digest()
    files = tuple(memory_file(path, data) for path, data in content.items())
    size = sum(file.size for file in files)
    return OpenedModel(ModelId.parse(name), Cid(f"bafk{name}", 1, 0x55, 0x12, digest), Digest(digest), size, files)


async def run(pool: WorkerPool, model: OpenedModel, data: Any) -> Any:
    proven = grant()
    proven = replace(proven, model=replace(proven.model, model=model.model, cid=model.cid.text))
    hold = Hold(proven, Usdc(0), SOMEBODY, None, 0)
    proof = BodySignature("", Nonce(bytes(32)), 0, 0, Digest.ZERO)
    call = SignedCall(SOMEBODY, "POST", "/", b"", proof, model.model, Usdc(0), input_data=as_json(data))
    output = await pool.run(model, hold, call)
    return json.loads(output.result)


async def test_a_state_dict_answers_from_its_process_as_it_does_here(pool: WorkerPool) -> None:
    torch.manual_seed(20)
    ours = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    model = opened(
        "mlp", {"m/w.safetensors": save(ours.state_dict()), "m/divault.json": as_json({"architecture": MLP})}
    )
    loaded = await pool.load(model)

    result = await run(pool, model, {"tensor": [[1.0, 2.0], [3.0, 4.0]]})

    with torch.no_grad():
        assert result["predictions"] == ours(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist()
    assert loaded.description.format == "torch"
    assert loaded.description.runtime["threads"] >= 1
    with pytest.raises(InputInvalid):
        await run(pool, model, {"tensor": [1.0, 2.0, 3.0]})


async def test_a_pickled_module_is_refused_by_its_name_through_the_pool(pool: WorkerPool) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        await pool.load(opened("module", {"model": state_dict_file(torch.nn.Linear(1, 1))}))

    assert "torch.nn.modules.linear.Linear" in caught.value.data["seen"]


async def test_mini_lm_and_a_classifier_answer_from_their_processes(pool: WorkerPool, tmp_path: Path) -> None:
    labels = tiny_classifier(tmp_path)
    sentences, classes = opened("lm", mini_lm()), opened("classes", labels)
    await pool.load(sentences)
    loaded = await pool.load(classes)

    near = await run(pool, sentences, {"text": ["A man is eating food.", "A person eats a meal."]})
    result = await run(pool, classes, {"text": ["the film was good"]})

    vectors = np.array(near["embeddings"])
    assert vectors[0] @ vectors[1] > 0.6
    here = answer(load(HuggingFace(), labels), {"text": ["the film was good"]})
    assert result["predictions"][0]["scores"] == pytest.approx(here["predictions"][0]["scores"], abs=1e-5)
    assert loaded.description.task == "text-classification"
