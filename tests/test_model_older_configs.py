"""Configurations as older libraries wrote them mean what they meant: nothing that counts is left to a default."""

from __future__ import annotations

import copy
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from divault.errors import SealedFileDamaged, UnsupportedModel
from divault.models import huggingface_files
from divault.models.files import Folder
from divault.models.huggingface import HuggingFace
from divault.models.huggingface_files import TYPES, config_of
from tests.memory_models import (
    answer,
    as_json,
    load,
    memory_files,
    scores_of_the_library,
    tiny_encoder,
    tiny_language_model,
)
from tests.test_model_text_generation import PROMPT, said

LLAMA_3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
OLDER: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 500000.0, "rope_scaling": LLAMA_3, "max_position_embeddings": 131072},
    "qwen2": {"rope_theta": 1000000.0},
    "qwen3": {"rope_theta": 1000000},
    "mistral": {"rope_theta": 1000000.0, "sliding_window": None},
    "gpt_neox": {"rotary_pct": 1.0, "rotary_emb_base": 10001},
    "phi": {"partial_rotary_factor": 0.4},
    "stablelm": {"partial_rotary_factor": 0.75, "rope_theta": 10001},
    "modernbert": {"global_rope_theta": 160001.0, "local_rope_theta": 10001.0, "global_attn_every_n_layers": 2},
    "bloom": {"hidden_size": 64, "num_attention_heads": 4},
    "falcon": {"rope_theta": 500.0},
    "smollm3": {"rope_theta": 5000000.0},
    "gemma2": {"rope_theta": 20000.0},
    "starcoder2": {"rope_theta": 999999.0},
    "beit": {"out_indices": [3, 5, 7, 11], "num_hidden_layers": 12},
    "resnet": {"depths": [3, 4, 6, 3], "hidden_sizes": [8, 8, 8, 8], "out_features": ["stage2", "stage3"]},
    "dinov2": {"num_hidden_layers": 3, "out_indices": [1, 2]},
    "roberta": {"num_labels": 3},
    "distilbert": {"num_labels": 3, "id2label": None},
    "gpt2": {"num_labels": 1, "n_ctx": 1024, "summary_type": "cls_index", "task_specific_params": {"a": {"b": 1.0}}},
    "opt": {"_remove_final_layer_norm": True, "word_embed_proj_dim": 768, "prefix": "</s>"},
    "bert": {"position_embedding_type": "absolute", "classifier_dropout": None, "gradient_checkpointing": False},
}


def read(told: dict[str, Any]) -> dict[str, Any]:
    with memory_files({"config.json": as_json(told)}) as files:
        return config_of(Folder(files), 1000).to_dict()


def theirs(told: dict[str, Any]) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    found: dict[str, Any] = CONFIG_MAPPING[told["model_type"]].from_dict(copy.deepcopy(told)).to_dict()
    return found


@pytest.mark.parametrize("kind", OLDER)
def test_older_members_count_as_they_do_in_transformers(kind: str) -> None:
    told = {"model_type": kind, "num_hidden_layers": 2} | OLDER[kind]
    if kind == "resnet":  # it has none
        del told["num_hidden_layers"]
    ours, expected = read(told), theirs(told)

    assert {name: expected[name] for name in ours} == ours
    shown = ours != theirs({"model_type": kind, "num_hidden_layers": 2})
    assert shown or kind in ("bert", "gpt2"), "the case shows something"


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_what_the_library_writes_now_is_read_as_it_is(kind: str) -> None:
    from transformers import CONFIG_MAPPING

    told = json.loads(CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
    told.pop("transformers_version", None)
    assert {**read(told), "transformers_version": None} == {**theirs(told), "transformers_version": None}


def test_a_member_that_would_be_lost_is_no_silent_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_files, "_SET_BY_PROPERTY", frozenset())
    with pytest.raises(SealedFileDamaged, match="rope_parameters in a form"):
        read({"model_type": "qwen2", "num_hidden_layers": 2, "rope_theta": 1000000.0})


@pytest.mark.parametrize(
    "name",
    [
        "to_dict", "__class__", "from_dict", "_attn_implementation", "a b", "name_or_path", "base_model_tp_plan",
        "extra_files", "use_kernels", "sub_configs_defaults",
    ],
)  # fmt: skip
def test_a_member_that_stands_for_something_the_class_does_is_left_out(name: str) -> None:
    told = {"model_type": "llama", "num_hidden_layers": 2, name: "x"}

    assert read(told) == read({"model_type": "llama", "num_hidden_layers": 2})


def test_a_model_of_an_older_folder_writes_what_transformers_writes(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    files = tiny_language_model(tmp_path)
    weights = {
        name: tensor * 12 if tensor.ndim == 2 and "layers" in name else tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    told = json.loads(files["config.json"])
    del told["rope_parameters"]
    files["config.json"] = as_json(told | {"rope_theta": 500000.0})
    files["model.safetensors"] = save(weights, {"format": "pt"})
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected = model.generate(ids, max_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(ids))
    whole = tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    found = said(load(HuggingFace(), files), {"prompt": PROMPT}, max_tokens=20)[0]["text"]
    other = said(load(HuggingFace(), files | {"config.json": as_json(told)}), {"prompt": PROMPT}, max_tokens=20)[0]

    assert found == whole.rstrip("\ufffd")
    assert found != other["text"], "the base of the angles shows"


# --- members that no class declares -----------------------------------------------------------------------------------

RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
V3 = {  # as microsoft/deberta-v3-base has them
    "relative_attention": True,
    "max_relative_positions": -1,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
UNDECLARED: dict[str, tuple[str, dict[str, Any]]] = {
    "DeBERTa v3": ("deberta-v2", V3),
    "buckets of positions": ("deberta-v2", RELATIVE | {"position_buckets": 8}),
    "normed positions": ("deberta-v2", RELATIVE | {"norm_rel_ebd": "layer_norm"}),
    "shared keys": ("deberta-v2", RELATIVE | {"share_att_key": True}),
    "a convolution": ("deberta-v2", {"conv_kernel_size": 3, "conv_act": "gelu"}),
    "a convolution in groups": ("deberta-v2", {"conv_kernel_size": 3, "conv_groups": 2}),
    "talking heads": ("deberta", {"talking_head": True}),
}
_WITHOUT_A_SAY = """
    classifier_dropout cls_dropout hidden_dropout summary_first_dropout summary_last_dropout
    summary_activation summary_proj_to_labels summary_type summary_use_proj
    attention_chunk_size json layer_types sliding_window
"""
WITHOUT_A_SAY = frozenset(_WITHOUT_A_SAY.split())
"""Dropouts are off, `summary_...` make the head of a multiple choice, masks of other types ask for the last."""
LOOKED_FOR = re.compile(r"(?:getattr|hasattr)\(\s*(?:self\.)?config,\s*[\"']([a-z]\w+)|\bconfig\.([a-z]\w+)")


@pytest.mark.parametrize("name", UNDECLARED)
def test_a_member_that_no_class_declares_counts_as_it_does_in_transformers(name: str, tmp_path: Path) -> None:
    kind, members = UNDECLARED[name]
    files = tiny_encoder(tmp_path, kind, **members)
    found = answer(load(HuggingFace(), files), {"text": "the book was very bad"})["predictions"][0]["scores"]

    assert list(found.values()) == pytest.approx(scores_of_the_library(tmp_path, "the book was very bad"), abs=1e-6)


def test_weights_that_the_network_has_no_place_for_are_refused(tmp_path: Path) -> None:
    files = tiny_encoder(tmp_path, "deberta-v2", conv_kernel_size=3)
    told = json.loads(files["config.json"])
    del told["conv_kernel_size"]
    with pytest.raises(UnsupportedModel, match=r"no place for \(deberta.encoder.conv"):
        load(HuggingFace(), files | {"config.json": as_json(told)})


@pytest.mark.parametrize("name", ["cls.seq_relationship.weight", "bert.embeddings.position_ids", "lm_head.bias"])
def test_weights_of_other_heads_and_what_is_counted_out_may_be_there(name: str, tmp_path: Path) -> None:
    files = tiny_encoder(tmp_path, "bert")
    more = load_file(tmp_path / "model.safetensors") | {name: torch.ones(4)}
    plain, other = (
        answer(load(HuggingFace(), content), {"text": "good"})["predictions"][0]["scores"]
        for content in (files, files | {"model.safetensors": save(more)})
    )

    assert other == pytest.approx(plain, abs=1e-6)


@pytest.mark.parametrize("members", [{"is_decoder": True}, {"per_layer_config": {"0": {"intermediate_size": 8}}}])
def test_a_configuration_of_another_network_is_refused_by_name(members: dict[str, Any], tmp_path: Path) -> None:
    files = tiny_encoder(tmp_path, "bert")
    told = json.loads(files["config.json"]) | members
    with pytest.raises(UnsupportedModel, match=min(members)):
        load(HuggingFace(), files | {"config.json": as_json(told)})
    plain = json.loads(files["config.json"]) | {"is_decoder": False, "per_layer_config": None}
    load(HuggingFace(), files | {"config.json": as_json(plain)})


def test_a_member_that_a_class_works_out_itself_is_left_out() -> None:
    assert read({"model_type": "falcon", "num_hidden_layers": 2, "head_dim": 7}) == read(
        {"model_type": "falcon", "num_hidden_layers": 2}
    )


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_every_member_that_a_network_looks_for_is_read(kind: str) -> None:
    """A newer library may look for more: this says so."""
    from transformers import AutoConfig, AutoModel, masking_utils

    config = AutoConfig.for_model(kind)
    model = AutoModel._model_mapping[type(config)]
    sources = [inspect.getsource(part) for part in (sys.modules[model.__module__], masking_utils)]
    names = {"".join(found) for source in sources for found in LOOKED_FOR.findall(source)}
    declared = {name for name in names if name in config.to_dict() or name in type(config).attribute_map}
    of_the_class = {name for name in names if inspect.getattr_static(type(config), name, None) is not None}

    read = huggingface_files._UNDECLARED | huggingface_files._SET_BY_PROPERTY
    assert names - declared - of_the_class <= read | WITHOUT_A_SAY
