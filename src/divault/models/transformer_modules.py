"""Networks of transformers with exactly the weights of a file: nothing is made up, and nothing larger than they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from divault.errors import SealedFileDamaged, UnsupportedModel

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

_UNUSED = ("pooler.", "cls.", "lm_head.", "classifier.", "embeddings.position_ids")
"""Tensors that an encoder without a head does not use; checkpoints come with and without them."""
_COMPUTED = ("position_ids", "inv_freq", "masked_bias", "mask_token")
"""Ends of names that older checkpoints keep, and no answer needs: what networks count out, and masks of training."""
_MISFITS = (
    *(RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, AssertionError, ZeroDivisionError),
    OverflowError,
)
"""What constructors and loaders of the library raise for sizes and names that don't go together."""


def network(auto: str, config: PretrainedConfig, weights: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """The network of one of the library's `AutoModel...` classes.

    Raises SealedFileDamaged where a weight is missing or has another shape; UnsupportedModel where there are weights
    that it does not use.
    """
    import torch
    import transformers

    _silence()
    chosen: Any = getattr(transformers, auto)
    try:
        with torch.device("meta"):
            plan = chosen.from_config(config)
        _check_size(plan, weights)
        module, report = type(plan).from_pretrained(
            None,
            config=config,
            state_dict=dict(weights),
            dtype=torch.float32,
            attn_implementation="eager" if not plan._supports_sdpa else "sdpa",  # noqa: SLF001 - its only name
            local_files_only=True,
            output_loading_info=True,
        )
    except _MISFITS as err:
        raise SealedFileDamaged(f"config.json and weights don't fit: {str(err)[:200]}", stage="payload") from None
    _check_report(report, headless=auto == "AutoModel")
    _check_unused(module, report["unexpected_keys"], weights)
    module.requires_grad_(requires_grad=False)
    loaded: torch.nn.Module = module.eval()
    return loaded


def _silence() -> None:
    """No progress bars and no advice on stderr, which nobody reads here."""
    from transformers.utils import logging

    switches: Any = logging
    switches.disable_progress_bar()
    switches.set_verbosity_error()


def _check_size(plan: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """The network without memory may not be much larger than the weights; a pooler may be missing in them."""
    planned = sum(parameter.numel() for parameter in plan.parameters())
    stored = sum(tensor.numel() for tensor in weights.values())
    if planned > 2 * stored + (1 << 20):
        raise SealedFileDamaged(
            f"config.json describes {planned} parameters, the weights have {stored}", stage="payload"
        )


def _check_report(report: Mapping[str, Any], *, headless: bool) -> None:
    """No weight of an answer may be made up: a missing one would be random."""
    missing = sorted(name for name in report["missing_keys"] if not (headless and name.startswith(_UNUSED)))
    if missing or report["mismatched_keys"] or report["error_msgs"]:
        odd = [*missing, *(str(entry)[:80] for entry in report["mismatched_keys"])]
        raise SealedFileDamaged(f"the weights lack, or have in another shape: {', '.join(odd[:4])}", stage="payload")


def _check_unused(module: Any, names: Iterable[str], weights: Mapping[str, torch.Tensor]) -> None:
    """No learned part below the heads may go unused: the weights are those of another network then.

    Heads of other tasks may be there too.
    """
    base = module.base_model
    parts = {name for name, _ in base.named_children()}
    inside = [name for name in names if name.removeprefix(f"{module.base_model_prefix}.").partition(".")[0] in parts]
    learned = [name for name in inside if name not in weights or weights[name].is_floating_point()]
    odd = sorted(name for name in learned if not name.endswith(_COMPUTED))
    if odd:
        seen = f"weights that the network of config.json has no place for ({', '.join(odd[:4])[:300]})"
        raise UnsupportedModel(f"the file has {seen}", seen=seen, supported="the weights of one network as it is saved")
