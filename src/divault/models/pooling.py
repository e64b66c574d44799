"""The layout of sentence-transformers: which modules follow the transformer, read from JSON alone.

Supported: Transformer, Pooling (cls, mean, max), Normalize. Others bring weights or code of their own: refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NoReturn

from divault.errors import UnsupportedModel
from divault.models.files import Folder
from divault.models.huggingface_tokenizer import sentence_config

if TYPE_CHECKING:
    from torch import Tensor

SUPPORTED = "Transformer, Pooling (cls, mean or max), Normalize"
_LEGACY = "pooling_mode_"
_LEGACY_NAMES = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max"}


class Mode(StrEnum):
    """How the vectors of the tokens become one."""

    CLS = "cls"
    MEAN = "mean"
    MAX = "max"


@dataclass(frozen=True, slots=True)
class Pooling:
    """From token vectors to one vector for a text."""

    mode: Mode
    normalise: bool
    lower_case: bool
    prompt: str
    """Put before every text."""
    width: int | None = None
    """How many of a vector's numbers are told; without it all."""

    def apply(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """float32 [n, width] of `hidden` [n, tokens, width]; tokens count where `mask` [n, tokens] is 1."""
        import torch

        weight = mask.unsqueeze(-1).to(hidden.dtype)
        if self.mode is Mode.CLS:
            pooled = hidden[:, 0]
        elif self.mode is Mode.MAX:
            pooled = hidden.masked_fill(weight == 0, -torch.inf).amax(dim=1)
        else:
            pooled = (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1e-9)
        return (torch.nn.functional.normalize(pooled, dim=1) if self.normalise else pooled)[:, : self.width]


def pooling_of(folder: Folder) -> Pooling | None:
    """The pooling of a folder in sentence-transformers' layout; None without modules.json. Raises UnsupportedModel."""
    modules = folder.json("modules.json")
    if modules is None:
        return None
    kinds = [_kind(module) for module in modules] if isinstance(modules, list) else []
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]) or modules[0].get("path"):
        _refuse(f"modules {' + '.join(kinds)[:100] or 'that are no list'}")
    library = folder.json_object("config_sentence_transformers.json")
    return Pooling(
        mode=_mode(folder.json_object(f"{modules[1].get('path')}/config.json")),
        normalise=len(kinds) == 3,
        lower_case=sentence_config(folder).get("do_lower_case") is True,
        prompt=_prompt(library),
        width=_width(library),
    )


def _kind(module: Any) -> str:
    name = module.get("type") if isinstance(module, dict) else None
    if not isinstance(name, str) or not name.startswith("sentence_transformers."):
        _refuse(f"a module of its own, {str(name)[:80]}")
    return name.rpartition(".")[2]


def _mode(config: dict[str, Any]) -> Mode:
    told = config.get("pooling_mode")
    modes = [told] if isinstance(told, str) else told
    if modes is None:
        on = [
            name.removeprefix(_LEGACY) for name, value in config.items() if name.startswith(_LEGACY) and value is True
        ]
        modes = [_LEGACY_NAMES.get(name, name) for name in on]
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in set(Mode):
        _refuse(f"the pooling {str(modes)[:80]}")
    if config.get("include_prompt", True) is not True:
        _refuse("a pooling that leaves the prompt out")
    return Mode(modes[0])


def _width(config: dict[str, Any]) -> int | None:
    told = config.get("truncate_dim")
    if told is not None and (type(told) is not int or told < 1):
        _refuse(f"vectors of {str(told)[:80]} numbers (truncate_dim)")
    return told


def _prompt(config: dict[str, Any]) -> str:
    name = config.get("default_prompt_name")
    if name is None:
        return ""
    prompt = config.get("prompts", {}).get(name) if isinstance(config.get("prompts"), dict) else None
    if not isinstance(prompt, str) or len(prompt) > 1000:
        _refuse("a default prompt that isn't there")
    return prompt


def _refuse(seen: str) -> NoReturn:
    raise UnsupportedModel(
        f"the sentence-transformers folder has {seen}; this node runs {SUPPORTED}",
        seen=f"a sentence-transformers folder with {seen}",
        supported=SUPPORTED,
    )
