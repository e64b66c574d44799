"""Hugging Face folders, from memory files, without a folder on disk: which task, and those that give numbers of texts.

| folder with | task | `result` |
|---|---|---|
| `...ForSequenceClassification` | text-classification | `{"predictions": [{"label", "score", "scores"}], "tokens"}` |
| `modules.json` of sentence-transformers | embeddings | `{"embeddings": [[...]], "tokens"}` |
| `...ForCausalLM`, `...LMHeadModel` | text-generation | see `text_generation` |

One entry per text, in order. Scores are a softmax over the labels, or a sigmoid of each where the model has one label
or is a multi-label one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from divault.errors import InputInvalid, ModelFailed, SealedFileDamaged, UnsupportedModel
from divault.models.base import Answer, Description, Inputs, LoadedModel
from divault.models.chat_template import ChatTemplate
from divault.models.files import Folder
from divault.models.huggingface_files import (
    SUPPORTED,
    TYPES_BY_HEAD,
    config_of,
    is_one,
    max_tokens,
    model_type_of,
    raw_config,
    tokenizer_of,
    weights_of,
)
from divault.models.pooling import Pooling, pooling_of
from divault.models.rows import MAX_TEXTS, TextSpec
from divault.models.text_generation import Language, LoadedGenerator
from divault.models.torch_runtime import device_name, prepare, runtime
from divault.models.transformer_modules import network
from divault.models.weights import read_weights
from divault.values import MemoryFile

if TYPE_CHECKING:
    import torch
    from tokenizers import Encoding, Tokenizer
    from transformers import PretrainedConfig

TOKENS_PER_PASS = 16_384
"""Padding included; bounds working memory whatever a caller sends."""
_TOGETHER = 32
"""Callers of one pass; their texts are sorted by length and run in parts of so many tokens."""
_TOLERANCE = 1e-4
"""Padding and other sizes of products: float32 adds in another order."""
_TOKENS = {"type": "array", "items": {"type": "integer"}}
"""How many the tokenizer made of each text, its special ones included."""
_INPUT = TextSpec()
_CLASSES = {
    "": "AutoModel",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForCausalLM": "AutoModelForCausalLM",
}
"""The library's class for each end of an architecture's name; without one it is an encoder for embeddings."""


class HuggingFace:
    """The format: a folder with config.json, tokenizer.json and weights."""

    def recognises(self, files: Sequence[MemoryFile]) -> bool:
        """Whether a configuration with a model type is among the files."""
        return is_one(Folder(files))

    def load(self, files: Sequence[MemoryFile], device: str) -> LoadedModel:
        """The model in memory. Raises UnsupportedModel, SealedFileDamaged; SettingsInvalid for the device."""
        folder = Folder(files)
        pooling = pooling_of(folder)
        head = "" if pooling is not None else _head_of(folder)
        model_type_of(folder, TYPES_BY_HEAD[head])
        place = prepare(device)
        weights = read_weights(weights_of(folder))
        config = config_of(folder, len(weights))
        module = network(_CLASSES[head], config, weights).to(place)
        if head == "ForCausalLM":
            return LoadedGenerator(module, _language(folder, config), place)
        encoder = _Encoder(module, tokenizer_of(folder, config), config.pad_token_id or 0, place)
        return LoadedText(encoder, _embedding_head(pooling) if pooling else _classifier_head(config), place)


def _language(folder: Folder, config: PretrainedConfig) -> Language:
    tokenizer = tokenizer_of(folder, config)
    tokenizer.no_truncation()
    told = folder.json_object("generation_config.json").get("eos_token_id", config.eos_token_id)
    ends = [one for one in (told if isinstance(told, list) else [told]) if type(one) is int]
    return Language(tokenizer, ChatTemplate.of(folder), frozenset(ends), max_tokens(folder, config))


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


@dataclass(frozen=True, slots=True)
class _Head:
    """What becomes of the network's output."""

    task: str
    rows: Callable[[Any, torch.Tensor], torch.Tensor]
    """float32 [n, width] of the network's output and the attention mask."""
    result: Callable[[list[list[float]]], dict[str, Any]]
    output_schema: Mapping[str, Any]
    prompt: str = ""
    lower_case: bool = False


class _Encoder:
    """Texts to rows of numbers, in passes of bounded size."""

    def __init__(self, module: torch.nn.Module, tokenizer: Tokenizer, padding: int, device: torch.device) -> None:
        self._module = module
        self._tokenizer = tokenizer
        self._padding = padding
        self._device = device

    def rows(self, texts: Sequence[str], head: _Head) -> tuple[list[list[float]], list[int]]:
        """One row for each text, in order, and its number of tokens. Raises InputInvalid, ModelFailed."""
        encodings = self._tokenizer.encode_batch(list(texts))
        if not all(encoding.ids for encoding in encodings):
            raise InputInvalid(
                "text: nothing is left of a text after tokenizing",
                field="text",
                expected=_INPUT.expected,
                example=_INPUT.example(),
            )
        order = sorted(range(len(texts)), key=lambda index: len(encodings[index].ids))
        rows: list[list[float]] = [[] for _ in texts]
        for part in _passes(order, encodings):
            for index, row in zip(part, self._pass([encodings[index].ids for index in part], head), strict=True):
                rows[index] = row
        return rows, [len(encoding.ids) for encoding in encodings]

    def _pass(self, ids: list[list[int]], head: _Head) -> list[list[float]]:
        import torch

        longest = max(map(len, ids))
        padded = torch.tensor([row + [self._padding] * (longest - len(row)) for row in ids], device=self._device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=self._device)
        with torch.inference_mode():
            output = head.rows(self._module(input_ids=padded, attention_mask=mask), mask)
        if not torch.isfinite(output).all():
            raise ModelFailed("the model gave a number that is not finite", kind="not_finite")
        rows: list[list[float]] = output.cpu().tolist()
        return rows


def _passes(order: Sequence[int], encodings: Sequence[Encoding]) -> Iterator[list[int]]:
    """Texts of similar length together, at most TOKENS_PER_PASS in a pass with its padding."""
    part: list[int] = []
    for index in order:
        # Sorted by length: the newest is the longest.
        if part and (len(part) + 1) * len(encodings[index].ids) > TOKENS_PER_PASS:
            yield part
            part = []
        part.append(index)
    yield part


class LoadedText:
    """A text model in memory."""

    def __init__(self, encoder: _Encoder, head: _Head, device: torch.device) -> None:
        self._encoder = encoder
        self._head = head
        self._description = Description(
            format="huggingface",
            task=head.task,
            device=device_name(device),
            input_schema=_INPUT.schema(),
            output_schema=head.output_schema,
            example=_INPUT.example(),
            runtime=runtime("huggingface", device, ("transformers", "tokenizers", "safetensors")),
            together=_TOGETHER,
            tolerance=_TOLERANCE,
        )
        self.predict([Inputs(_INPUT.example(), {})])

    @property
    def description(self) -> Description:
        """What it is and takes."""
        return self._description

    def predict(self, batch: Sequence[Inputs]) -> list[Answer]:
        """One answer per caller; texts of all callers share passes. Raises InputInvalid, ModelFailed."""
        callers = [_texts(inputs) for inputs in batch]
        prepared = [self._prepared(text) for texts in callers for text in texts]
        found = iter(zip(*self._encoder.rows(prepared, self._head), strict=True))
        answers = []
        for texts in callers:
            rows, tokens = zip(*(next(found) for _ in texts), strict=True)
            answers.append(Answer(self._head.result(list(rows)) | {"tokens": list(tokens)}, len(texts)))
        return answers

    def _prepared(self, text: str) -> str:
        text = self._head.prompt + text
        return text.lower() if self._head.lower_case else text


def _texts(inputs: Inputs) -> list[str]:
    """The texts of one caller, who may send a list of inputs too. Raises InputInvalid."""
    if not isinstance(inputs.data, list) or not 1 <= len(inputs.data) <= MAX_TEXTS:
        return _INPUT.parse(inputs)
    texts = [text for one in inputs.data for text in _INPUT.parse(Inputs(one, inputs.parameters))]
    return _INPUT.parse(Inputs({"text": texts}, inputs.parameters))


def _embedding_head(pooling: Pooling) -> _Head:
    return _Head(
        task="embeddings",
        rows=lambda output, mask: pooling.apply(output.last_hidden_state, mask),
        result=lambda rows: {"embeddings": rows},
        output_schema={
            "type": "object",
            "required": ["embeddings", "tokens"],
            "properties": {
                "embeddings": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
                "tokens": _TOKENS,
            },
        },
        prompt=pooling.prompt,
        lower_case=pooling.lower_case,
    )


def _classifier_head(config: PretrainedConfig) -> _Head:
    names: Any = config.id2label
    labels = tuple(str(names[index])[:200] for index in sorted(names))
    if len(set(labels)) != len(labels):
        raise SealedFileDamaged("two labels in config.json have the same name", stage="payload")
    each = len(labels) == 1 or config.problem_type == "multi_label_classification"
    return _Head(
        task="text-classification",
        rows=lambda output, mask: output.logits.sigmoid() if each else output.logits.softmax(dim=-1),  # noqa: ARG005
        result=lambda rows: {"predictions": [_prediction(labels, row) for row in rows]},
        output_schema={
            "type": "object",
            "required": ["predictions", "tokens"],
            "properties": {
                "predictions": {"type": "array", "items": _prediction_schema(labels)},
                "tokens": _TOKENS,
            },
        },
    )


def _prediction(labels: Sequence[str], row: list[float]) -> dict[str, Any]:
    best = max(range(len(row)), key=row.__getitem__)
    return {"label": labels[best], "score": row[best], "scores": dict(zip(labels, row, strict=True))}


def _prediction_schema(labels: Sequence[str]) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["label", "score", "scores"],
        "properties": {
            "label": {"enum": list(labels)},
            "score": {"type": "number", "minimum": 0, "maximum": 1},
            "scores": {"type": "object", "additionalProperties": {"type": "number"}},
        },
    }
