"""What `tokenizer_config.json` says otherwise than `tokenizer.json`: the tokens of the library's own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from divault.errors import SealedFileDamaged
from divault.models.base import Inputs
from divault.models.chat_template import ChatTemplate
from divault.models.files import Folder
from divault.models.huggingface import HuggingFace
from divault.models.huggingface_tokenizer import tokenizer_of
from tests.memory_models import folder_content, load, memory_files, tiny_classifier, tiny_language_model

ROOM = 264
"""Rows of the table of embeddings; the vocabulary has 257."""


def token(content: str, *, special: bool = True, **flags: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"content": content, "special": special} | plain | flags


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_language_model(path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(7)
    config = AutoConfig.for_model("llama", vocab_size=ROOM, **sizes, bos_token_id=None, eos_token_id=0, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def ids(folder: Path, text: str, config: dict[str, Any], words: int = ROOM) -> tuple[list[int], list[int]]:
    """Of the node, and of the library."""
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    with memory_files(folder_content(folder)) as files:
        ours = tokenizer_of(Folder(files), AutoConfig.for_model("llama", vocab_size=words))
    return ours.encode(text).ids, list(AutoTokenizer.from_pretrained(folder)(text).input_ids)


TOLD: dict[str, tuple[dict[str, Any], str]] = {
    "a token of its own": ({"added_tokens_decoder": {"257": token("<|im_start|>")}}, "<|im_start|>a"),
    "one that is no special": ({"added_tokens_decoder": {"257": token("<b>", special=False)}}, "<b>a"),
    "several, by their numbers": ({"added_tokens_decoder": {"258": token("<c>"), "257": token("<b>")}}, "<b>a<c>"),
    "other flags": ({"added_tokens_decoder": {"0": token("<end>", rstrip=True)}}, "<end>  a"),
    "a list": ({"extra_special_tokens": ["<|im_start|>"]}, "<|im_start|>a"),
    "named ones": ({"extra_special_tokens": {"image_token": "<img>"}}, "<img>a"),
    "a list of old": ({"additional_special_tokens": ["<x>", "<y>"]}, "<y>a<x>"),
    "padding": ({"pad_token": "<pad>"}, "<pad>a"),
    "special tokens split": ({"split_special_tokens": True}, "<end>a"),
}


@pytest.mark.parametrize("kind", TOLD)
def test_a_text_has_the_tokens_of_the_library(folder: Path, kind: str) -> None:
    config, text = TOLD[kind]
    plain, _ = ids(folder, text, {})
    ours, theirs = ids(folder, text, config)

    assert ours == theirs != plain


def test_a_token_that_the_model_has_no_number_for_stays_text(folder: Path) -> None:
    ours, _ = ids(folder, "<pad>a", {"pad_token": "<pad>"}, words=257)

    assert ours == ids(folder, "<pad>a", {})[0]


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": {"257": {"special": True}}},
        {"added_tokens_decoder": {"one": token("<b>")}},
        {"added_tokens_decoder": {"257": token("<b>", lstrip=7)}},  # type: ignore[arg-type]
        {"extra_special_tokens": [f"<{number}>" for number in range(5000)]},
        {"added_tokens_decoder": {"257": token("b" * 513)}},
    ],
)
def test_tokens_that_are_none_are_damage(folder: Path, config: dict[str, Any]) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(SealedFileDamaged, match="tokenizer"):
        load(HuggingFace(), folder_content(folder))


CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "asked for": ({"tokenizer_class": "BertTokenizer", "do_lower_case": True}, False),
    "not asked for": ({"tokenizer_class": "BertTokenizer", "do_lower_case": False}, True),
    "by the class": ({"tokenizer_class": "BertTokenizerFast"}, False),
    "asked for, of no class": ({"do_lower_case": True}, False),
    "another class of the kind": ({"tokenizer_class": "LxmertTokenizer", "do_lower_case": False}, True),
    "a class that takes the file as it is": (
        {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False}, True
    ),
    "one that does not heed it": ({"tokenizer_class": "ConvBertTokenizer", "do_lower_case": False}, True),
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_lower_case_is_what_the_class_makes_of_it(tmp_path: Path, kind: str) -> None:
    config, lower_in_file = CASES[kind]
    tiny_classifier(tmp_path)
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    file["normalizer"] |= {"lowercase": lower_in_file}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    text = "The FILM was Good"
    with memory_files(folder_content(tmp_path)) as files:
        ours = tokenizer_of(Folder(files), AutoConfig.from_pretrained(tmp_path)).encode(text).ids

    assert ours == AutoTokenizer.from_pretrained(tmp_path)(text).input_ids
    load(HuggingFace(), folder_content(tmp_path)).predict([Inputs({"text": text}, {})])


def test_where_no_class_is_named_the_file_counts(tmp_path: Path) -> None:
    tiny_classifier(tmp_path)
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    file["normalizer"] |= {"lowercase": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    (tmp_path / "tokenizer_config.json").unlink(missing_ok=True)
    with memory_files(folder_content(tmp_path)) as files:
        tokenizer = tokenizer_of(Folder(files), AutoConfig.from_pretrained(tmp_path))

    assert tokenizer.encode("the FILM").ids != tokenizer.encode("the film").ids


@pytest.mark.parametrize("prefix", [True, False, None])
def test_a_blank_before_the_first_word_is_what_the_class_is_told(folder: Path, prefix: bool | None) -> None:
    told = {} if prefix is None else {"add_prefix_space": prefix}
    ours, theirs = ids(folder, "ab c", {"tokenizer_class": "GPT2Tokenizer"} | told)

    assert ours == theirs
    assert (len(ours) == 5) is (prefix is True)


def test_very_many_tokens_are_added_at_once(folder: Path) -> None:
    """Each time they are added takes as long as all of them: one by one they would take half a minute."""
    many = {str(257 + number): token(f"<|reserved_{number}|>") for number in range(4000)}
    ours, theirs = ids(folder, "<|reserved_5|>a<|reserved_3999|>", {"added_tokens_decoder": many}, words=257 + 4000)

    assert ours == theirs == [262, 65, 4256]


@pytest.mark.parametrize(
    "kind",
    [
        "GPT2Tokenizer",
        "Qwen2TokenizerFast",
        "GPTNeoXTokenizerFast",
        "CohereTokenizer",
        "GemmaTokenizerFast",
        "BloomTokenizerFast",
        "LlamaTokenizer",
        "PreTrainedTokenizerFast",
    ],
)
@pytest.mark.parametrize("told", [{}, {"eos_token": "<end>"}])
def test_a_template_has_the_special_tokens_that_the_class_names(folder: Path, kind: str, told: dict[str, str]) -> None:
    template = "{% for m in messages %}{{ bos_token }}{{ m.content }}{{ eos_token }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": kind, "chat_template": template} | told)
    )
    messages = [{"role": "user", "content": "hi"}]
    with memory_files(folder_content(folder)) as files:
        found = ChatTemplate.of(Folder(files))

    assert found is not None
    assert found.rendered(messages) == AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, tokenize=False
    )
