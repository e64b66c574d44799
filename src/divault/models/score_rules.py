"""What a folder's `generation_config.json` says of the scores of the next token, by the library's own processors.

Heeded, in every call: `repetition_penalty`, `no_repeat_ngram_size`, `bad_words_ids`, `sequence_bias`, `min_length`,
`min_new_tokens`, `suppress_tokens`, `begin_suppress_tokens`. How a token is drawn (`do_sample`, `temperature`, `top_p`,
`top_k`, ...) and how many are, is the caller's to say. What else would give another text is refused by name. Folders
without the file may have the same members in `config.json`.

Source: https://huggingface.co/docs/transformers/main_classes/text_generation
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from divault.errors import SealedFileDamaged, UnsupportedModel
from divault.models.files import Folder

if TYPE_CHECKING:
    import torch

    Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

GENERATION_CONFIG = "generation_config.json"
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "sequence_bias": ([], {}),
    "repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
}
"""Members that are heeded, in the library's order, and their values that change nothing, besides null."""
_OF_ENDS = frozenset({"min_length", "min_new_tokens"})
"""Of no meaning to a model whose texts end nowhere."""
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "stop_strings": ([],),
    "token_healing": (False,),
    "watermarking_config": (),
}
"""Members that are not heeded, and their values that change nothing."""
_LISTS = frozenset({"bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens"})
_MOST_TOKENS = 1 << 17
"""In such a list: vocabularies have up to 500,000 words, and few of them are named."""


@dataclass(frozen=True, slots=True)
class ScoreRules:
    """Members of one folder, checked."""

    told: Mapping[str, Any]
    ends: tuple[int, ...]

    @staticmethod
    def of(folder: Folder, config: Mapping[str, Any], ends: frozenset[int], words: int) -> ScoreRules:
        """The rules of a folder, whose configuration has `config` and whose model scores so many `words`.

        Raises UnsupportedModel, SealedFileDamaged.
        """
        said = folder.json_object(GENERATION_CONFIG) if GENERATION_CONFIG in folder.names else config
        for name, neutral in _REFUSED.items():
            if said.get(name) is not None and said[name] not in neutral:
                _refuse(name)
        told = {n: said[n] for n, neutral in _NEUTRAL.items() if said.get(n) is not None and said[n] not in neutral}
        for name, value in told.items():
            _check(name, value, words)
        rules = ScoreRules(told, tuple(sorted(ends)))
        for name in told:
            try:
                rules._processor(name, 1, "cpu")
            except (ValueError, TypeError, OverflowError) as err:  # each checks what it takes by itself
                _damaged(name, f"doesn't hold: {str(err)[:160]}")
        return rules

    def processors(self, prompt: int, device: str | torch.device) -> list[Processor]:
        """What changes the scores of one text, in the library's order; `prompt`: the number of its tokens."""
        return [self._processor(name, prompt, str(device)) for name in self.told if self.ends or name not in _OF_ENDS]

    def _processor(self, name: str, prompt: int, device: str) -> Processor:
        from transformers.generation import logits_process as library

        value, ends = self.told[name], list(self.ends)
        made: Processor
        match name:
            case "sequence_bias":
                made = library.SequenceBiasLogitsProcessor([[list(group), float(bias)] for group, bias in value])
            case "repetition_penalty":
                made = library.RepetitionPenaltyLogitsProcessor(float(value))
            case "no_repeat_ngram_size":
                made = library.NoRepeatNGramLogitsProcessor(value)
            case "bad_words_ids":
                made = library.NoBadWordsLogitsProcessor(value, ends or None)
            case "min_length":
                made = library.MinLengthLogitsProcessor(value, ends, device)
            case "min_new_tokens":
                made = library.MinNewTokensLengthLogitsProcessor(prompt, value, ends, device)
            case "suppress_tokens":
                made = library.SuppressTokensLogitsProcessor(value, device)
            case _:
                made = library.SuppressTokensAtBeginLogitsProcessor(value, prompt, device)
        return made


def _refuse(name: str) -> NoReturn:
    raise UnsupportedModel(
        f"{GENERATION_CONFIG} has {name}, which gives another text and is not heeded here: take it out, or serve "
        "another model",
        seen=f"a language model with {name}",
        supported=", ".join(_NEUTRAL),
    )


def _check(name: str, value: Any, words: int) -> None:
    """Raises SealedFileDamaged for tokens that there aren't, and very many of them."""
    if name not in _LISTS:
        return  # a number, which the library checks
    if not isinstance(value, list):
        _damaged(name, "is no list")
    listed = value if name != "sequence_bias" else [pair[0] for pair in value if isinstance(pair, list) and pair]
    tokens = _flat(listed)
    if len(tokens) > _MOST_TOKENS or [] in listed or not all(type(one) is int and 0 <= one < words for one in tokens):
        _damaged(name, f"has over {_MOST_TOKENS} tokens, groups of none, or tokens that the model doesn't have")


def _flat(value: Any) -> list[Any]:
    return [one for inner in value for one in _flat(inner)] if isinstance(value, list) else [value]


def _damaged(name: str, what: str) -> NoReturn:
    raise SealedFileDamaged(f"{GENERATION_CONFIG}: {name} {what}", stage="payload")
