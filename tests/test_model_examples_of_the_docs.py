"""Every `divault.json` that the reference shows loads with weights that fit it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save
from torch import nn

from divault import models
from divault.models.architecture import LAYERS
from divault.models.base import Inputs
from divault.models.huggingface_files import TYPES
from tests.markdown_blocks import blocks
from tests.memory_models import memory_files, tiny_classifier

PAGE = Path(__file__).parent.parent / "docs/reference/models.md"
EXAMPLES = [block.code for block in blocks(PAGE) if block.language == "json"]


def weights_for(architecture: Any, folder: Path) -> dict[str, bytes]:
    """What a publisher would have beside it."""
    if isinstance(architecture, list):
        ours = nn.Sequential()
        for index, part in enumerate(architecture):
            ours.add_module(part.get("name", str(index)), getattr(nn, part["layer"])(**part.get("kwargs", {})))
    elif architecture["type"] == "linear":
        ours = nn.Linear(architecture["in"], architecture["out"])
    elif architecture["type"] == "mlp":
        ours = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    else:
        files = tiny_classifier(folder)
        return {name: files[name] for name in ("model.safetensors", "tokenizer.json")}
    return {"weights.safetensors": save(ours.state_dict())}


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_loads_and_its_own_input_runs(example: str, tmp_path: Path) -> None:
    content = weights_for(json.loads(example)["architecture"], tmp_path)
    with memory_files(content | {"divault.json": example.encode()}) as files:
        model = models.load(files)

    assert model.predict([Inputs(model.description.example, {})])[0].rows == 1


def test_the_page_lists_exactly_the_layers_and_types_that_load() -> None:
    text = PAGE.read_text()

    assert [name for name in sorted(LAYERS | TYPES) if f"`{name}`" not in text] == []
    assert len(EXAMPLES) == 5
