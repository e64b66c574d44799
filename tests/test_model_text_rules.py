"""What a folder says of the texts that its model writes: the same as `generate` of transformers makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from divault.errors import SealedFileDamaged, UnsupportedModel
from divault.models.base import Inputs, Piece
from divault.models.files import Folder
from divault.models.huggingface import HuggingFace
from divault.models.score_rules import ScoreRules
from divault.models.text_generation import _Writer
from tests.memory_models import as_json, folder_content, json_of, load, memory_files, tiny_language_model

Content = dict[str, bytes]
PROMPT = "Once upon a time"
LENGTH = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_language_model(path)
    return path


def said(content: Content, data: Any = None, **parameters: Any) -> dict[str, Any]:
    asked = Inputs({"prompt": PROMPT} if data is None else data, {"max_tokens": LENGTH} | parameters)
    text: dict[str, Any] = load(HuggingFace(), content).predict([asked])[0].result["texts"][0]
    return text


def with_rules(folder: Path, file: str = "generation_config.json", **told: Any) -> Content:
    content = folder_content(folder)
    content["generation_config.json"] = as_json({"eos_token_id": 0, "pad_token_id": 0})
    return content | {file: as_json(json_of(content[file]) | told)}


def generated(folder: Path, length: int = LENGTH, **told: Any) -> list[int]:
    """The tokens that transformers writes."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    mask = torch.ones_like(ids)
    made = theirs.generate(ids, max_new_tokens=length, do_sample=False, attention_mask=mask, **told)
    tokens: list[int] = made[0, ids.shape[1] :].tolist()
    return tokens


def text_of(folder: Path, tokens: list[int]) -> str:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return str(tokenizer.decode(tokens)).rstrip("\ufffd")


RULES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.3},
    "no group of two again": {"no_repeat_ngram_size": 2},
    "forbidden": {"suppress_tokens": list(range(60, 140))},
    "forbidden at first": {"begin_suppress_tokens": list(range(1, 140))},
    "together": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": [1, 2, 3]},
}


@pytest.mark.parametrize("kind", RULES)
def test_a_rule_of_the_folder_counts(folder: Path, kind: str) -> None:
    plain = generated(folder)
    expected = generated(folder, **RULES[kind])

    assert expected != plain
    assert said(with_rules(folder, **RULES[kind]))["text"] == text_of(folder, expected)


@pytest.mark.parametrize("rule", ["bad_words_ids", "sequence_bias"])
def test_groups_of_tokens_can_be_forbidden(folder: Path, rule: str) -> None:
    plain = generated(folder)
    group = plain[3:5]
    value: Any = [group] if rule == "bad_words_ids" else [[group, -50]]
    expected = generated(folder, **{rule: value if rule == "bad_words_ids" else [[group, -50.0]]})

    assert expected != plain
    assert said(with_rules(folder, **{rule: value}))["text"] == text_of(folder, expected)


@pytest.mark.parametrize(("rule", "least"), [("min_new_tokens", 9), ("min_length", len(PROMPT) + 9)])
def test_a_text_may_have_a_least_length(folder: Path, rule: str, least: int) -> None:
    often = generated(folder)[2]
    ending = {"eos_token_id": [0, often], "pad_token_id": 0}
    expected = generated(folder, **ending, **{rule: least})

    assert said(with_rules(folder, **ending))["completion_tokens"] == 3
    found = said(with_rules(folder, **ending, **{rule: least}))
    assert found["completion_tokens"] == len(expected) >= 9


def test_older_folders_have_the_rules_in_their_configuration(folder: Path) -> None:
    content = with_rules(folder, "config.json", repetition_penalty=1.3)
    older = {name: data for name, data in content.items() if name != "generation_config.json"}

    assert said(older)["text"] == text_of(folder, generated(folder, repetition_penalty=1.3))
    assert said(content)["text"] == text_of(folder, generated(folder)), "a file of its own counts alone"


def test_rules_are_applied_in_the_order_of_the_library(folder: Path) -> None:
    """Whatever the order of the file: a forbidden token stays so, whatever else raises its score."""
    told: dict[str, Any] = {"begin_suppress_tokens": [5], "suppress_tokens": [6], "min_new_tokens": 2, "min_length": 3}
    told |= {
        "bad_words_ids": [[7]],
        "no_repeat_ngram_size": 2,
        "repetition_penalty": 1.3,
        "sequence_bias": [[[8], 1.0]],
    }
    asked = GenerationConfig(**told, eos_token_id=0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model._prepare_special_tokens(asked, device="cpu")
    theirs = model._get_logits_processor(asked, input_ids_seq_length=4, device="cpu")
    with memory_files({"generation_config.json": as_json(told)}) as files:
        ours = ScoreRules.of(Folder(files), {}, frozenset({0}), 257).processors(4, "cpu")

    assert [type(one) for one in ours] == [type(one) for one in theirs]
    assert len(ours) == len(told)


def test_how_a_token_is_drawn_is_the_callers_to_say(folder: Path) -> None:
    drawn = {"do_sample": True, "temperature": 1.7, "top_k": 3, "top_p": 0.5, "max_new_tokens": 2}

    assert said(with_rules(folder, **drawn)) == said(with_rules(folder))


@pytest.mark.parametrize(
    ("member", "value", "neutral"),
    [
        ("num_beams", 4, 1),
        ("guidance_scale", 1.5, 1.0),
        ("forced_eos_token_id", 0, None),
        ("exponential_decay_length_penalty", [1, 1.1], None),
        ("penalty_alpha", 0.6, None),
        ("stop_strings", ["a"], []),
        ("token_healing", True, False),
        ("encoder_no_repeat_ngram_size", 2, 0),
        ("encoder_repetition_penalty", 1.5, 1.0),
        ("forced_bos_token_id", 5, None),
        ("watermarking_config", {"greenlist_ratio": 0.25}, None),
    ],
)
def test_what_is_not_heeded_is_refused_by_name(folder: Path, member: str, value: Any, neutral: Any) -> None:
    with pytest.raises(UnsupportedModel, match=member):
        load(HuggingFace(), with_rules(folder, **{member: value}))
    assert said(with_rules(folder, **{member: neutral})) == said(with_rules(folder))


@pytest.mark.parametrize(
    "told",
    [
        {"repetition_penalty": -1},
        {"repetition_penalty": "much"},
        {"no_repeat_ngram_size": 1.5},
        {"suppress_tokens": 7},
        {"suppress_tokens": [257]},
        {"begin_suppress_tokens": [-1]},
        {"bad_words_ids": [["a"]]},
        {"bad_words_ids": [[]]},
        {"sequence_bias": [[[70]]]},
        {"sequence_bias": [[[1 << 40], 1.0]]},
        {"min_new_tokens": "few"},
        {"suppress_tokens": [1] * (1 << 18)},
    ],
)
def test_rules_that_do_not_hold_are_damage(folder: Path, told: dict[str, Any]) -> None:
    with pytest.raises(SealedFileDamaged, match=next(iter(told)).partition("_")[0]):
        load(HuggingFace(), with_rules(folder, **told))


def test_long_texts_of_phi3_are_seen_anew_where_its_factors_change(tmp_path: Path) -> None:
    tiny_language_model(tmp_path)
    rope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    positions = {"max_position_embeddings": 128, "original_max_position_embeddings": 24, "rope_scaling": rope}
    ids = {"vocab_size": 257, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi3", **sizes, **positions, **ids))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path)

    found = said(folder_content(tmp_path), max_tokens=40)

    assert found["text"] == text_of(tmp_path, generated(tmp_path, 40))
    assert len(PROMPT) < 24 < found["prompt_tokens"] + found["completion_tokens"]


def words_in_turn(folder: Path) -> Content:
    """A model over sentencepiece's words: after "hello" comes " world", after "hi" a word and then </s>."""
    words = ["<unk>", "<s>", "</s>", "▁", *"helowrdi"]
    merges = []
    for word in ("▁hello", "▁world", "▁hi"):
        made = word[0]
        for letter in word[1:]:
            merges.append((made, letter))
            made += letter
            words.append(made)
    words, merges = list(dict.fromkeys(words)), list(dict.fromkeys(merges))
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes, max_position_embeddings=64, eos_token_id=0))
    follows = {"▁hello": "▁world", "▁world": "</s>", "</s>": "▁hi", "▁hi": "▁hello"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1 if "norm" in name else 0)
        for place, (word, then) in enumerate(follows.items()):
            model.model.embed_tokens.weight[words.index(word), place] = 1
            model.lm_head.weight[words.index(then), place] = 1
    model.save_pretrained(folder)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder_content(folder)


def test_a_prompt_and_what_follows_are_one_text(tmp_path: Path) -> None:
    content = words_in_turn(tmp_path)

    assert said(content, {"prompt": "hello"}, max_tokens=1)["text"] == " world"
    assert said(content, {"messages": [{"role": "user", "content": "hello"}]}, max_tokens=1)["text"] == "world"
    parts = list(load(HuggingFace(), content).stream(Inputs({"prompt": "hi"}, {"max_tokens": 2})))  # type: ignore[attr-defined]
    assert [part.text for part in parts if isinstance(part, Piece)] == [" hello", " world"]


def test_half_a_character_leaves_the_prompt_s_own_alone() -> None:
    """A run of bytes that is broken is no character any more, also those of it that stood before."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "o", "k"]
    tokenizer = Tokenizer(
        models.BPE({word: n for n, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    prompt = tokenizer.encode("日").ids
    lone, letters = words.index("<0xE6>"), [words.index("o"), words.index("k")]
    writer = _Writer(tokenizer, (), prompt)

    assert len(prompt) == 3
    assert [writer.add(token) for token in [lone, *letters]] == ["", "\ufffdo", "k"]


@pytest.mark.parametrize("stop", ["</s>", ["never", "</s>"]])
def test_a_stop_text_may_be_a_token_that_no_text_shows(tmp_path: Path, stop: Any) -> None:
    content = words_in_turn(tmp_path)

    assert said(content, {"prompt": "hello"}, max_tokens=5)["text"] == " world hi hello world"
    found = said(content, {"prompt": "hello"}, max_tokens=5, stop=stop)
    assert (found["text"], found["finish_reason"], found["completion_tokens"]) == (" world", "stop", 2)
