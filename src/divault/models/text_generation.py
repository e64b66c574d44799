"""Text generation with causal language models of Hugging Face folders, token by token, so that it can be streamed.

`{"prompt"}` takes a text or a list of texts, `{"messages"}` a conversation where the folder has a chat template. The
result is `{"texts": [{"text", "finish_reason", "prompt_tokens", "completion_tokens"}]}`; `finish_reason` is `stop` or
`length`. Parameters: `max_tokens`, `temperature` (0, the default: always the likeliest token), `top_p`, `stop` (a text
or up to four), `seed`. The same seed gives the same text: every text of a call draws from a generator of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from divault.errors import InputInvalid, ModelFailed
from divault.models.base import Answer, Description, Inputs, Piece
from divault.models.chat_template import ChatTemplate
from divault.models.rows import MAX_TEXT_CHARS
from divault.models.score_rules import ScoreRules
from divault.models.torch_runtime import Hardware, runtime

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

MAX_PROMPTS = 64
MAX_NEW_TOKENS = 4096
"""Of one text, whatever a caller asks and the model has room for."""
_DEFAULT_NEW_TOKENS = 64
_MAX_STOPS, _MAX_STOP_CHARS = 4, 100
_HALF_CHARACTER = "\ufffd"
_LIBRARIES = ("transformers", "tokenizers", "safetensors")
_EXAMPLE = {"prompt": "Once upon a time"}
_NO_RULES = ScoreRules({}, ())


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, and when it is enough."""

    max_tokens: int = _DEFAULT_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Language:
    """What a folder says of its language beside the weights."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    ends: frozenset[int]
    """Tokens that end a text."""
    room: int
    """Most tokens of prompt and text together."""
    rules: ScoreRules = _NO_RULES
    turn: int | None = None
    """Of so many tokens, one more makes the model see all of them in another way: what it kept of them is void."""


class LoadedGenerator:
    """A causal language model in memory."""

    def __init__(self, module: torch.nn.Module, language: Language, hardware: Hardware) -> None:
        self._module = module
        # The library renamed it.
        self._cache_name = "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"
        self._language = language
        self._device = hardware.device
        self._description = Description(
            format="huggingface",
            task="text-generation",
            device=hardware.name,
            input_schema=_input_schema(chat=language.template is not None),
            output_schema=_OUTPUT_SCHEMA,
            example=_EXAMPLE,
            runtime=runtime("huggingface", hardware, (*_LIBRARIES, *(["jinja2"] if language.template else []))),
        )
        self.predict([Inputs(_EXAMPLE, {"max_tokens": 1})])

    @property
    def description(self) -> Description:
        """What it is and takes."""
        return self._description

    def predict(self, batch: Sequence[Inputs]) -> list[Answer]:
        """One answer per caller; callers never share a pass. Raises InputInvalid, ModelFailed."""
        return [next(part for part in self.stream(inputs) if isinstance(part, Answer)) for inputs in batch]

    def stream(self, inputs: Inputs) -> Iterator[Piece | Answer]:
        """The pieces of each text in turn, then the answer. Raises InputInvalid, ModelFailed."""
        sampling = _sampling(inputs.parameters)
        prompts = self._prompts(inputs.data)
        goes_on = "messages" not in inputs.data
        texts = []
        for index, ids in enumerate(prompts):
            writer = _Writer(self._language.tokenizer, sampling.stop, ids if goes_on else ())
            texts.append((yield from self._write(index, ids, sampling, writer)))
        yield Answer({"texts": texts}, len(texts))

    def _write(
        self, index: int, ids: list[int], sampling: Sampling, writer: _Writer
    ) -> Generator[Piece, None, dict[str, Any]]:
        made, reason, said = 0, "length", []
        ends = self._language.ends | writer.ends
        for token in self._tokens(ids, sampling, index):
            made += 1
            if token in ends:
                reason = "stop"
                break
            if text := writer.add(token):
                said.append(text)
                yield Piece(text, index)
            if writer.stopped:
                reason = "stop"
                break
        if text := writer.finish():
            said.append(text)
            yield Piece(text, index)
        if writer.stopped:
            reason = "stop"
        return {
            "text": "".join(said),
            "finish_reason": reason,
            "prompt_tokens": len(ids),
            "completion_tokens": made,
        }

    def _tokens(self, ids: list[int], sampling: Sampling, index: int) -> Iterator[int]:
        """The tokens that follow, at most as many as are asked for and have room."""
        import torch
        from transformers import DynamicCache

        generator = torch.Generator(self._device).manual_seed((sampling.seed + index) % 2**63)
        rules = self._language.rules.processors(len(ids), self._device)
        cache = {self._cache_name: DynamicCache()}
        so_far = torch.tensor([ids], device=self._device)
        step = so_far
        for _ in range(min(sampling.max_tokens, self._language.room - len(ids))):
            with torch.inference_mode():
                # Scores of the last token alone: those of a whole prompt would take gigabytes.
                output: Any = self._module(input_ids=step, use_cache=True, logits_to_keep=1, **cache)
                scores = output.logits[:, -1].float()
                for rule in rules:
                    scores = rule(so_far, scores)
                if not torch.isfinite(scores).any() or torch.isnan(scores).any():
                    raise ModelFailed("the model gave a number that is not finite", kind="not_finite")
                token = _chosen(scores[0], sampling, generator)
                step = torch.tensor([[token]], device=self._device)
                so_far = torch.cat([so_far, step], dim=1)
            if so_far.shape[1] - 1 == self._language.turn:
                cache, step = {self._cache_name: DynamicCache()}, so_far
            yield token

    def _prompts(self, data: Any) -> list[list[int]]:
        if not isinstance(data, dict) or len(data) != 1:
            self._refuse("input_data", "an object with exactly one member is taken")
        name, value = next(iter(data.items()))
        if name == "messages" and self._language.template is not None:
            text = self._language.template.rendered(value)
            prompts = [self._language.tokenizer.encode(text, add_special_tokens=False).ids]
        elif name in ("prompt", "text", "inputs"):
            prompts = [self._language.tokenizer.encode(text).ids for text in self._texts(name, value)]
        else:
            self._refuse(str(name)[:80], "this model has no such input")
        for ids in prompts:
            self._check_room(name, ids)
        return prompts

    def _texts(self, name: str, value: Any) -> list[str]:
        texts = value if isinstance(value, list) else [value]
        if not 1 <= len(texts) <= MAX_PROMPTS:
            self._refuse(name, f"{len(texts)} texts where 1 to {MAX_PROMPTS} are taken")
        for text in texts:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_TEXT_CHARS:
                self._refuse(name, f"each is a text of 1 to {MAX_TEXT_CHARS} characters")
        return texts

    def _check_room(self, name: str, ids: list[int]) -> None:
        room = self._language.room
        if not ids or len(ids) >= room:
            raise InputInvalid(
                f"{name}: {len(ids)} tokens; this model takes 1 to {room - 1}, so that room for an answer is left",
                field=name,
                expected=f"1 to {room - 1} tokens",
                example=_EXAMPLE,
            )

    def _refuse(self, field: str, what: str) -> NoReturn:
        chat = ', or {"messages": [{"role", "content"}, ...]}' if self._language.template is not None else ""
        expected = f'{{"prompt": ...}} with a text or a list of 1 to {MAX_PROMPTS} of them{chat}'
        raise InputInvalid(
            f"{field}: {what}; this model takes {expected}", field=field, expected=expected, example=_EXAMPLE
        )


class _Writer:
    """Tokens to text as it can be shown: never half a character, nothing of a stop text."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], before: Sequence[int] = ()) -> None:
        """`before`: tokens that the text goes on from; without them it begins anew, without a blank before its word."""
        self._tokenizer = tokenizer
        self._stop = stop
        numbers = [tokenizer.token_to_id(text) for text in stop]
        self.ends = {number for number in numbers if number is not None and not tokenizer.decode([number])}
        """Stop texts that are tokens which no text shows."""
        self._ids = list(before)
        self._from, self._read = 0, len(self._ids)
        """Tokens before `from` play no part any more; those before `read` are written."""
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that can be shown now."""
        self._ids.append(token)
        fresh = self._fresh()
        if fresh.endswith(_HALF_CHARACTER):
            return ""
        if fresh:
            self._from, self._read = self._read, len(self._ids)
        return self._shown(self._held + fresh)

    def finish(self) -> str:
        """What was held back, when nothing follows."""
        if self.stopped:
            return ""
        # A stop text may have been completed by the token whose last character is not.
        return self._shown(self._held + self._fresh().rstrip(_HALF_CHARACTER)) + self._held

    def _fresh(self) -> str:
        # A token's text may depend on those before it: decoded together, the difference is what it adds.
        before = self._tokenizer.decode(self._ids[self._from : self._read])
        both = self._tokenizer.decode(self._ids[self._from :])
        # Half a character of bytes takes those before it along, which are written already.
        return both[len(before) :] if both.startswith(before) else self._tokenizer.decode(self._ids[self._read :])

    def _shown(self, text: str) -> str:
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_begun(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _begun(text: str, stop: str) -> int:
    """Length of the longest end of the text with which the stop text begins."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


_COLDEST = 1e-5
"""A temperature below it leaves the likeliest token alone, and numbers that no float32 has."""


def _chosen(scores: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    import torch

    if sampling.temperature < _COLDEST:
        return int(scores.argmax())
    shares, order = (scores / sampling.temperature).softmax(-1).sort(descending=True, stable=True)
    # As many of the likeliest as make up top_p, the first one always.
    kept = shares * ((shares.cumsum(-1) - shares) < sampling.top_p)
    return int(order[torch.multinomial(kept, 1, generator=generator)])


def _sampling(told: Mapping[str, Any]) -> Sampling:
    for name, value in told.items():
        if name not in _CHECKS:
            _refuse_parameter(name, f"it is none; there are {', '.join(_CHECKS)}")
        expected, holds = _CHECKS[name]
        if not holds(value):
            _refuse_parameter(name, expected)
    stop = told.get("stop", ())
    return Sampling(
        told.get("max_tokens", _DEFAULT_NEW_TOKENS),
        float(told.get("temperature", 0)),
        float(told.get("top_p", 1)),
        (stop,) if isinstance(stop, str) else tuple(stop),
        told.get("seed", 0),
    )


def _refuse_parameter(name: str, expected: str) -> NoReturn:
    raise InputInvalid(
        f"the parameter {name[:80]}: {expected}", field=f"parameters.{name[:80]}", expected=expected, example=_EXAMPLE
    )


def _whole(least: int, most: int) -> Any:
    return lambda value: type(value) is int and least <= value <= most


def _number(least: float, most: float) -> Any:
    return lambda value: type(value) in (int, float) and least <= value <= most


def _is_stop(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return (
        isinstance(texts, list)
        and len(texts) <= _MAX_STOPS
        and all(isinstance(text, str) and 1 <= len(text) <= _MAX_STOP_CHARS for text in texts)
    )


_CHECKS: Mapping[str, tuple[str, Any]] = {
    "max_tokens": (f"a whole number from 1 to {MAX_NEW_TOKENS}", _whole(1, MAX_NEW_TOKENS)),
    "temperature": ("a number from 0 (always the likeliest) to 2", _number(0, 2)),
    "top_p": ("a number above 0, at most 1", _number(1e-6, 1)),
    "stop": (f"a text of 1 to {_MAX_STOP_CHARS} characters, or up to {_MAX_STOPS} of them", _is_stop),
    "seed": ("a whole number from 0 to 2^63 - 1", _whole(0, 2**63 - 1)),
}


def _input_schema(*, chat: bool) -> dict[str, Any]:
    text = {"type": "string", "minLength": 1, "maxLength": MAX_TEXT_CHARS}
    many = {"type": "array", "items": text, "minItems": 1, "maxItems": MAX_PROMPTS}
    properties: dict[str, Any] = {"prompt": {"anyOf": [text, many]}}
    if chat:
        message = {
            "type": "object",
            "required": ["role", "content"],
            "properties": {"role": {"type": "string"}, "content": {"type": "string"}},
        }
        properties["messages"] = {"type": "array", "items": message, "minItems": 1}
    return {"type": "object", "properties": properties, "minProperties": 1, "maxProperties": 1}


_OUTPUT_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "required": ["texts"],
    "properties": {
        "texts": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["text", "finish_reason", "prompt_tokens", "completion_tokens"],
                "properties": {
                    "text": {"type": "string"},
                    "finish_reason": {"enum": ["stop", "length"]},
                    "prompt_tokens": {"type": "integer"},
                    "completion_tokens": {"type": "integer"},
                },
            },
        }
    },
}
