"""Models that tell something about texts, by what their last layer gives.

| task | `result` for each text |
|---|---|
| embeddings | `embeddings`: a list of numbers |
| text-classification | `predictions`: `{"label", "score", "scores"}` |
| token-classification | `entities`: a list of `{"label", "score", "start", "end", "text"}`, by characters of the text |
| fill-mask | `fills`: a list of `{"token", "score", "text"}`, the likeliest first; parameter `top_k` |

Beside it `tokens`, how many each text had. Scores are a softmax over the labels; `classifiers` says what else text
classifiers give. Labels with `B-` and `I-` are joined: a new entity begins with `B-`, or where the label changes; its
score is the mean of its tokens'. Within a word nothing begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unicodedata import east_asian_width

from divault.errors import InputInvalid, UnsupportedModel
from divault.models.base import Answer, Description, Inputs
from divault.models.classifiers import Classifier, labels_of
from divault.models.pooling import Pooling
from divault.models.rows import MAX_TEXTS
from divault.models.text_encoder import INPUT, TOGETHER, Scores, TextEncoder
from divault.models.torch_runtime import Hardware, runtime

if TYPE_CHECKING:
    import torch
    from tokenizers import Encoding, Tokenizer
    from transformers import PretrainedConfig

MAX_FILLS = 100
_FILLS = 5
_TOKENS = {"type": "array", "items": {"type": "integer"}}
"""How many the tokenizer made of each text, its special ones included."""


@dataclass(frozen=True, slots=True)
class Head:
    """What becomes of the network's output."""

    task: str
    name: str
    """Of the member of `result`."""
    scores: Scores
    part: Callable[[str, Encoding, Any, Mapping[str, Any]], Any]
    """What stands there for a text: its tokens, its row of scores, and the caller's parameters."""
    item: Mapping[str, Any]
    """JSON Schema of that."""
    parameters: frozenset[str] = frozenset()
    example: str = ""
    prompt: str = ""
    lower_case: bool = False


class LoadedText:
    """A text model in memory."""

    def __init__(self, encoder: TextEncoder, head: Head, hardware: Hardware) -> None:
        self._encoder = encoder
        self._head = head
        example = {"text": head.example} if head.example else INPUT.example()
        result = {head.name: {"type": "array", "items": dict(head.item)}, "tokens": _TOKENS}
        self._description = Description(
            format="huggingface",
            task=head.task,
            device=hardware.name,
            input_schema=INPUT.schema(),
            output_schema={"type": "object", "required": list(result), "properties": result},
            example=example,
            runtime=runtime("huggingface", hardware, ("transformers", "tokenizers", "safetensors")),
            together=TOGETHER,
            tolerance=hardware.tolerance,
        )
        self.predict([Inputs(example, {})])

    @property
    def description(self) -> Description:
        """What it is and takes."""
        return self._description

    def predict(self, batch: Sequence[Inputs]) -> list[Answer]:
        """One answer per caller; texts of all callers share passes. Raises InputInvalid, ModelFailed."""
        callers = [self._texts(inputs) for inputs in batch]
        told = iter([inputs.parameters for inputs, texts in zip(batch, callers, strict=True) for _ in texts])
        # A text is read with the parameters of its caller; passes take the texts in another order.
        prepared = [self._prepared(text) for texts in callers for text in texts]
        found = self._encoder.read(prepared, self._head.scores, lambda text, tokens, row: (text, tokens, row))
        parts = iter([(self._head.part(*one, next(told)), count) for one, count in found])
        answers = []
        for texts in callers:
            mine = [next(parts) for _ in texts]
            result = {self._head.name: [part for part, _ in mine], "tokens": [count for _, count in mine]}
            answers.append(Answer(result, len(texts)))
        return answers

    def _prepared(self, text: str) -> str:
        text = self._head.prompt + text
        return text.lower() if self._head.lower_case else text

    def _texts(self, inputs: Inputs) -> list[str]:
        """The texts of one caller, who may send a list of inputs too. Raises InputInvalid."""
        others = {name: value for name, value in inputs.parameters.items() if name not in self._head.parameters}
        if not isinstance(inputs.data, list) or not 1 <= len(inputs.data) <= MAX_TEXTS:
            return INPUT.parse(Inputs(inputs.data, others))
        texts = [text for one in inputs.data for text in INPUT.parse(Inputs(one, others))]
        return INPUT.parse(Inputs({"text": texts}, others))


def embedding_head(pooling: Pooling) -> Head:
    """Sentence embeddings."""
    return Head(
        task="embeddings",
        name="embeddings",
        scores=lambda output, mask, _: pooling.apply(output.last_hidden_state.float(), mask),
        part=lambda _text, _tokens, row, _told: row,
        item={"type": "array", "items": {"type": "number"}},
        prompt=pooling.prompt,
        lower_case=pooling.lower_case,
    )


def classifier_head(config: PretrainedConfig) -> Head:
    """A label for each text. Raises SealedFileDamaged."""
    classifier = Classifier.of(config)
    return Head(
        task="text-classification",
        name="predictions",
        scores=lambda output, _mask, _ids: classifier.scores(output.logits),
        part=lambda _text, _tokens, row, _told: classifier.prediction(row),
        item=classifier.schema(),
    )


def token_head(config: PretrainedConfig) -> Head:
    """A label for each token, joined to entities. Raises SealedFileDamaged."""
    labels = labels_of(config)
    number, whole = {"type": "number", "minimum": 0, "maximum": 1}, {"type": "integer", "minimum": 0}
    properties = {
        "label": {"type": "string"},
        "score": number,
        "start": whole,
        "end": whole,
        "text": {"type": "string"},
    }
    return Head(
        task="token-classification",
        name="entities",
        scores=lambda output, _mask, _ids: output.logits.float().softmax(dim=-1),
        part=lambda text, tokens, rows, _told: _entities(labels, text, tokens, rows),
        item={"type": "array", "items": {"type": "object", "required": list(properties), "properties": properties}},
    )


def mask_head(tokenizer: Tokenizer, mask: str) -> Head:
    """The likeliest tokens in place of the mask token. Raises UnsupportedModel where the tokenizer has none."""
    number = tokenizer.token_to_id(mask)
    if number is None:
        raise UnsupportedModel(
            "a model that fills masks needs the mask token in its tokenizer",
            seen="a masked language model without a mask token",
            supported="mask_token in tokenizer_config.json, or [MASK] or <mask> in the vocabulary",
        )

    def scores(output: Any, _mask: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        import torch

        place = (ids == number).int().argmax(dim=1)
        shares = output.logits[torch.arange(len(ids)), place].float().softmax(dim=-1)
        best = shares.topk(min(MAX_FILLS, shares.shape[-1]))
        return torch.stack([best.values, best.indices.to(best.values.dtype)], dim=1)

    text = {"type": "string"}
    properties = {"token": text, "score": {"type": "number"}, "text": text}
    return Head(
        task="fill-mask",
        name="fills",
        scores=scores,
        part=lambda text, tokens, row, told: _fills(tokenizer, (mask, number), text, tokens, row, told),
        item={"type": "array", "items": {"type": "object", "required": list(properties), "properties": properties}},
        parameters=frozenset({"top_k"}),
        example=f"The film was {mask}.",
    )


def _entities(labels: Sequence[str], text: str, tokens: Encoding, rows: list[list[float]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    scores: list[float] = []
    open_label, last_word = "", None
    tagged = zip(tokens.offsets, tokens.special_tokens_mask, tokens.word_ids, rows, strict=False)
    for (begin, end), special, word, row in tagged:
        # Some tokenizers count the blank before a word as its own.
        start = begin + len(text[begin:end]) - len(text[begin:end].lstrip())
        if begin < end == start and not special:  # a blank alone, before a word of several tokens
            continue
        best = max(range(len(row)), key=row.__getitem__)
        begins, label = labels[best].startswith("B-"), labels[best].removeprefix("B-").removeprefix("I-")
        within = not special and bool(found) and start < found[-1]["end"]  # another piece of its last character
        if within and label != open_label:
            continue
        if special or label == "O" or start == end:
            open_label = ""
            continue
        # The rest of a word goes on with it. Chinese has no blanks, and many words in what a tokenizer takes for one.
        follows = bool(found) and word == last_word and start == found[-1]["end"] and not _is_wide(text[start])
        if begins and open_label and (within or follows):
            begins = False
        if label == open_label and not begins:
            scores.append(row[best])
            found[-1] |= {"end": end, "score": sum(scores) / len(scores), "text": text[found[-1]["start"] : end]}
        else:
            scores = [row[best]]
            found.append({"label": label, "score": row[best], "start": start, "end": end, "text": text[start:end]})
        open_label, last_word = label, word
    return found


def _is_wide(character: str) -> bool:
    return east_asian_width(character) in ("W", "F")


def _fills(
    tokenizer: Tokenizer, mask: tuple[str, int], text: str, tokens: Encoding, row: Any, told: Mapping[str, Any]
) -> list[dict[str, Any]]:
    most = told.get("top_k", _FILLS)
    if type(most) is not int or not 1 <= most <= MAX_FILLS:
        raise InputInvalid(
            f"the parameter top_k is a whole number from 1 to {MAX_FILLS}",
            field="parameters.top_k",
            expected="1 to 100",
        )
    if tokens.ids.count(mask[1]) != 1 or text.count(mask[0]) != 1:
        raise InputInvalid(
            f"text: {tokens.ids.count(mask[1])} times {mask[0]}; each text has it exactly once",
            field="text",
            expected=f"a text with {mask[0]} in it once",
            example={"text": f"The film was {mask[0]}."},
        )
    found = []
    for score, index in list(zip(*row, strict=True))[:most]:
        token = tokenizer.decode([int(index)], skip_special_tokens=False).strip()
        found.append({"token": token, "score": score, "text": text.replace(mask[0], token)})
    return found
