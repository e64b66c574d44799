"""Over all formats: an input gives the same alone, in any company and in any worker; the runtime says what ran."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pytest
import skops.io
import torch
import xgboost
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsRegressor
from threadpoolctl import threadpool_info

from divault import models
from divault.errors import InputInvalid
from divault.models.base import CPU, Inputs, LoadedModel, Place
from divault.models.huggingface_files import ENCODERS
from divault.models.runtimes import instructions
from divault.models.torch_runtime import prepare, runtime
from divault.workers.pool import WorkerPool
from tests import onnx_models
from tests.memory_models import (
    as_json,
    memory_files,
    mini_lm,
    scores_of_the_library,
    state_dict_file,
    tiny_classifier,
    tiny_encoder,
    tiny_language_model,
)
from tests.worker_models import call, dumped, hold, opened

RANDOM = np.random.default_rng(7)
ROWS = RANDOM.normal(size=(200, 4))
TARGET = (ROWS[:, 0] > 0).astype(int)
TEXTS = ["the film was good", "the book was very very bad a bad book it is not good", "a", "not good", "the book"]
Content = dict[str, bytes]


def features() -> list[Any]:
    return [{"features": row.tolist()} for row in ROWS[:9]] + [{"features": ROWS[9:14].tolist()}]


def skops_file() -> bytes:
    return bytes(skops.io.dumps(LogisticRegression().fit(ROWS, TARGET)))


def network() -> Content:
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    told = {"architecture": {"type": "mlp", "sizes": [4, 8, 3], "activation": "relu"}}
    return {"weights.bin": state_dict_file(module.state_dict()), "divault.json": as_json(told)}


def boosted() -> bytes:
    return bytes(xgboost.train({"objective": "binary:logistic"}, xgboost.DMatrix(ROWS, TARGET), 5).save_raw("ubj"))


def leaves() -> bytes:
    data = lightgbm.Dataset(ROWS, TARGET)
    return lightgbm.train({"verbose": -1, "objective": "binary"}, data, 5).model_to_string().encode()


def one(content: bytes) -> Content:
    return {"model": content}


FORMATS: dict[str, tuple[Callable[[Path], Content], Callable[[], list[Any]], dict[str, Any]]] = {
    "scikit-learn, linear": (lambda _: one(dumped(LogisticRegression().fit(ROWS, TARGET))), features, {}),
    "scikit-learn, trees": (lambda _: one(dumped(RandomForestClassifier(9).fit(ROWS, TARGET))), features, {}),
    "scikit-learn, neighbours": (lambda _: one(dumped(KNeighborsRegressor().fit(ROWS, TARGET))), features, {}),
    "skops": (lambda _: one(skops_file()), features, {}),
    "ONNX": (
        lambda _: one(onnx_models.classifier()),
        lambda: [{"inputs": ROWS[n : n + 1].tolist()} for n in range(6)],
        {},
    ),
    "PyTorch": (lambda _: network(), lambda: [{"tensor": row.tolist()} for row in ROWS[:8]], {}),
    "XGBoost": (lambda _: one(boosted()), features, {}),
    "LightGBM": (lambda _: one(leaves()), features, {}),
    "text classification": (tiny_classifier, lambda: [{"text": text} for text in TEXTS], {}),
    "embeddings": (lambda _: mini_lm(), lambda: [{"text": text} for text in TEXTS], {}),
    "embeddings in bfloat16": (lambda _: mini_lm(), lambda: [{"text": text} for text in TEXTS], {}),
    "text generation": (
        tiny_language_model,
        lambda: [{"prompt": text} for text in TEXTS[:3]],
        {"max_tokens": 6, "temperature": 1.0, "seed": 3},
    ),
}


@pytest.fixture(scope="module", params=sorted(FORMATS))
def content(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Content]:
    return request.param, FORMATS[request.param][0](tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def loaded(content: tuple[str, Content]) -> LoadedModel:
    dtype = content[0].partition(" in ")[2] or "float32"
    with memory_files(content[1]) as files:
        return models.load(files, Place(dtype=dtype))


@pytest.mark.parametrize("kind", [*sorted(ENCODERS), "deberta-v2 with a convolution"])
def test_a_text_gives_what_the_library_gives_whoever_shares_its_pass(kind: str, tmp_path: Path) -> None:
    name, _, odd = kind.partition(" with ")
    with memory_files(tiny_encoder(tmp_path, name, **({"conv_kernel_size": 3} if odd else {}))) as files:
        model = models.load(files)
    expected = [scores_of_the_library(tmp_path, text) for text in TEXTS]
    asked = [Inputs({"text": text}, {}) for text in TEXTS]
    alone = [model.predict([one])[0] for one in asked]

    assert model.description.together > 1
    for answers in (alone, model.predict(asked)):
        scores = [list(answer.result["predictions"][0]["scores"].values()) for answer in answers]
        assert np.array(scores) == pytest.approx(np.array(expected), abs=1e-5)


def close(one: Any, other: Any, tolerance: float) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= tolerance * max(1.0, abs(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[name], other[name], tolerance) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(close(a, b, tolerance) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def test_an_input_gives_the_same_alone_and_in_any_company(content: tuple[str, Content], loaded: LoadedModel) -> None:
    _, inputs, parameters = FORMATS[content[0]]
    asked = [Inputs(data, parameters) for data in inputs()]
    alone = [loaded.predict([one])[0].result for one in asked]
    draw = random.Random(5)
    for _ in range(6):
        company = draw.choices(range(len(asked)), k=draw.randint(2, 12))
        together = loaded.predict([asked[place] for place in company])
        for place, answer in zip(company, together, strict=True):
            assert close(answer.result, alone[place], loaded.description.tolerance), place


def test_an_input_that_is_wrong_spoils_nobody_elses(content: tuple[str, Content], loaded: LoadedModel) -> None:
    _, inputs, parameters = FORMATS[content[0]]
    right = Inputs(inputs()[0], parameters)
    expected = loaded.predict([right])[0].result
    with pytest.raises(InputInvalid):
        loaded.predict([right, Inputs({"nonsense": 1}, parameters), right])

    assert close(loaded.predict([right])[0].result, expected, loaded.description.tolerance)


@pytest.mark.parametrize("name", ["scikit-learn, trees", "XGBoost", "text generation", "PyTorch"])
async def test_two_workers_give_the_same_bytes_and_name_the_same_runtime(name: str, tmp_path: Path) -> None:
    make, inputs, parameters = FORMATS[name]
    made = make(tmp_path)
    pools = [WorkerPool(predict_timeout_s=30, load_timeout_s=60) for _ in range(2)]
    held = [opened(made) for _ in pools]
    try:
        told = await asyncio.gather(*(pool.load(model) for pool, model in zip(pools, held, strict=True)))
        results = [
            [(await pool.run(model, hold(model), call(model, data, parameters or None))).result for data in inputs()]
            for pool, model in zip(pools, held, strict=True)
        ]
    finally:
        for pool in pools:
            await pool.close()

    assert results[0] == results[1]
    runtime = dict(told[0].description.runtime)
    assert runtime == told[1].description.runtime
    assert {"adapter", "arch", "determinism", "device", "dtype", "libraries", "threads"} <= runtime.keys()
    assert runtime["determinism"]["seed"] == 0
    assert {"divault", "python", "numpy"} <= runtime["libraries"].keys()
    json.dumps(runtime)


OF_SKLEARN = "import sklearn.linear_model; from divault.models.runtimes import blas; print(blas())"
OF_TORCH = """
from divault.models.base import CPU
from divault.models.torch_runtime import prepare, runtime
print(runtime("x", prepare(CPU), ())["determinism"])
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variables name processors of this kind")
@pytest.mark.parametrize(
    ("program", "variable", "value"),
    [(OF_SKLEARN, "OPENBLAS_CORETYPE", "Nehalem"), (OF_TORCH, "ATEN_CPU_CAPABILITY", "default")],
    ids=["scikit-learn", "torch"],
)
def test_a_library_that_computes_as_on_another_processor_is_another_runtime(
    program: str, variable: str, value: str
) -> None:
    def told(**more: str) -> str:
        environment = {"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(sys.path)} | more
        command = (sys.executable, "-c", program)
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    assert told() != told(**{variable: value})


def test_what_a_model_computes_with_is_told(tmp_path: Path) -> None:
    make, _, _ = FORMATS["scikit-learn, trees"]
    with memory_files(make(tmp_path)) as files:
        told = models.load(files, CPU).description.runtime["determinism"]

    known = {str(one["architecture"]) for one in threadpool_info() if "architecture" in one}
    assert told == {"seed": 0, "instructions": instructions(), "blas": sorted(known)}
    assert known
    assert "SSE2" in instructions() or platform.machine() != "x86_64"


def test_switches_that_let_numbers_be_rounded_are_off() -> None:
    torch.backends.cudnn.allow_tf32 = True
    told = runtime("x", prepare(CPU), ())["determinism"]

    assert told["tf32"] is torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is False


def test_the_formats_of_this_page_are_all_there_are() -> None:
    assert {type(one).__name__ for one in models.formats()} == {
        "HuggingFace", "Onnx", "TorchState", "SkopsFile", "SklearnPickle", "XgboostModelFile", "LightgbmModelFile"
    }  # fmt: skip
