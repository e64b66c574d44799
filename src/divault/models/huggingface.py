"""Hugging Face folders, from memory files, without a folder on disk: which task a folder is for.

| folder with | task | module |
|---|---|---|
| `modules.json` of sentence-transformers | embeddings | `text_heads` |
| `...ForSequenceClassification` | text-classification | `text_heads` |
| `...ForTokenClassification` | token-classification | `text_heads` |
| `...ForMaskedLM` | fill-mask | `text_heads` |
| `...ForCausalLM`, `...LMHeadModel` | text-generation | `text_generation` |
| `...ForImageClassification` | image-classification | `images` |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from divault.errors import UnsupportedModel
from divault.models.base import LoadedModel, Place
from divault.models.chat_template import ChatTemplate
from divault.models.classifiers import Classifier
from divault.models.files import Folder
from divault.models.huggingface_files import (
    SUPPORTED,
    TYPES_BY_HEAD,
    config_of,
    is_one,
    model_type_of,
    padding_of,
    raw_config,
    weights_of,
)
from divault.models.huggingface_tokenizer import max_tokens, special_tokens, tokenizer_of
from divault.models.images import LoadedImages, Preparation
from divault.models.pooling import Pooling, pooling_of
from divault.models.score_rules import GENERATION_CONFIG, ScoreRules
from divault.models.text_encoder import TextEncoder
from divault.models.text_generation import Language, LoadedGenerator
from divault.models.text_heads import (
    Head,
    LoadedText,
    classifier_head,
    embedding_head,
    mask_head,
    token_head,
)
from divault.models.torch_runtime import placed, prepare
from divault.models.transformer_modules import network
from divault.models.weights import read_weights
from divault.values import MemoryFile

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_CLASSES = {
    "": "AutoModel",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForCausalLM": "AutoModelForCausalLM",
    "ForImageClassification": "AutoModelForImageClassification",
}
"""The library's class for each end of an architecture's name; without one it is an encoder for embeddings."""


class HuggingFace:
    """The format: a folder with config.json, tokenizer.json and weights."""

    template = "transformers"

    def recognises(self, files: Sequence[MemoryFile]) -> bool:
        """Whether a configuration with a model type is among the files."""
        return is_one(Folder(files))

    def load(self, files: Sequence[MemoryFile], place: Place) -> LoadedModel:
        """The model in memory. Raises UnsupportedModel, SealedFileDamaged; SettingsInvalid for the device."""
        folder = Folder(files)
        pooling = pooling_of(folder)
        head = "" if pooling is not None else _head_of(folder)
        model_type_of(folder, TYPES_BY_HEAD[head])
        hardware = prepare(place)
        weights = read_weights(weights_of(folder))
        config = config_of(folder, len(weights))
        module = placed(network(_CLASSES[head], config, weights), hardware)
        if head == "ForCausalLM":
            return LoadedGenerator(module, _language(folder, config), hardware)
        if head == "ForImageClassification":
            preparation = Preparation.of(folder, config.model_type)
            return LoadedImages(module, preparation, Classifier.of(config), hardware)
        scores = config.vocab_size if head == "ForMaskedLM" else 1
        encoder = TextEncoder(module, tokenizer_of(folder, config), padding_of(config), hardware.device, scores)
        return LoadedText(encoder, _text_head(head, pooling, folder, config, encoder), hardware)


def _text_head(
    head: str, pooling: Pooling | None, folder: Folder, config: PretrainedConfig, encoder: TextEncoder
) -> Head:
    if pooling is not None:
        return embedding_head(pooling)
    if head == "ForMaskedLM":
        return mask_head(encoder.tokenizer, _mask_token(folder, encoder))
    return token_head(config) if head == "ForTokenClassification" else classifier_head(config)


def _mask_token(folder: Folder, encoder: TextEncoder) -> str:
    told = special_tokens(folder).get("mask_token")
    if told is not None:
        return told
    return next((name for name in ("[MASK]", "<mask>") if encoder.tokenizer.token_to_id(name) is not None), "[MASK]")


def _language(folder: Folder, config: PretrainedConfig) -> Language:
    tokenizer = tokenizer_of(folder, config)
    tokenizer.no_truncation()
    told = folder.json_object(GENERATION_CONFIG).get("eos_token_id", config.eos_token_id)
    ends = frozenset(one for one in (told if isinstance(told, list) else [told]) if type(one) is int)
    rules = ScoreRules.of(folder, raw_config(folder), ends, config.vocab_size)
    return Language(tokenizer, ChatTemplate.of(folder), ends, max_tokens(folder, config), rules, _turn_of(config))


def _turn_of(config: PretrainedConfig) -> int | None:
    """Up to how many tokens a network turns positions by its short factors; None for one that has no others."""
    told = getattr(config, "rope_parameters", None)
    if config.model_type != "phi3" or not isinstance(told, dict) or told.get("rope_type") != "longrope":
        return None
    return int(config.original_max_position_embeddings)


def _architectures(folder: Folder) -> list[str]:
    told = raw_config(folder).get("architectures")
    names = [str(name)[:80] for name in told[:4]] if isinstance(told, list) else []
    return [name.encode("ascii", "backslashreplace").decode() for name in names if name.isprintable()]


def _head_of(folder: Folder) -> str:
    """The end of the architecture's name. Raises UnsupportedModel for a task that is not run here."""
    for name in _architectures(folder):
        for head in _CLASSES:
            if head and (name.endswith(head) or (head == "ForCausalLM" and name.endswith("LMHeadModel"))):
                return head
    seen = f"a Hugging Face folder of {', '.join(_architectures(folder)) or 'no stated architecture'}"
    raise UnsupportedModel(
        f"{seen}: this node runs {SUPPORTED}. Embeddings need modules.json and 1_Pooling/config.json as "
        f"sentence-transformers writes them; the others an architecture ending in {', '.join(filter(None, _CLASSES))}",
        seen=seen,
        supported=SUPPORTED,
    )
