"""Texts through an encoder of transformers: tokens, passes of bounded size, and what is read out of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from divault.errors import InputInvalid, ModelFailed
from divault.models.rows import TextSpec

if TYPE_CHECKING:
    import torch
    from tokenizers import Encoding, Tokenizer

T = TypeVar("T")
Scores = Callable[[Any, "torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""From the network's output, the attention mask and the token ids to a tensor with a row for each text."""
TOKENS_PER_PASS = 16_384
"""Padding included; bounds working memory whatever a caller sends."""
SCORES_PER_PASS = 64_000_000
"""Of heads that score every word for every token: 256 MB as float32, or what one text takes if that is more."""
TOGETHER = 32
"""Callers of one pass; their texts are sorted by length and run in parts of so many tokens."""
INPUT = TextSpec()


class TextEncoder:
    """Texts to what a head gives for them, in passes of bounded size."""

    def __init__(
        self,
        module: torch.nn.Module,
        tokenizer: Tokenizer,
        padding: int | None,
        device: torch.device,
        scores: int = 1,
    ) -> None:
        """`padding`: the token that fills up shorter texts; None where only texts of one length share a pass.

        `scores`: how many the network gives for each token.
        """
        self.tokenizer = tokenizer
        self._tokens_per_pass = min(TOKENS_PER_PASS, SCORES_PER_PASS // scores)
        self._module = module
        self._padding = padding
        self._device = device

    def read(
        self, texts: Sequence[str], scores: Scores, part: Callable[[str, Encoding, Any], T]
    ) -> list[tuple[T, int]]:
        """What `part` makes of each text, its tokens and its row of scores as nested lists; and its number of tokens.

        In the order of the texts. Raises InputInvalid, ModelFailed, and what `part` raises.
        """
        encodings = self.tokenizer.encode_batch(list(texts))
        if not all(encoding.ids for encoding in encodings):
            raise InputInvalid(
                "text: nothing is left of a text after tokenizing",
                field="text",
                expected=INPUT.expected,
                example=INPUT.example(),
            )
        order = sorted(range(len(texts)), key=lambda index: len(encodings[index].ids))
        found: dict[int, tuple[T, int]] = {}
        for indexes in self._passes(order, encodings):
            rows = self._pass([encodings[index].ids for index in indexes], scores)
            for index, row in zip(indexes, rows, strict=True):
                found[index] = part(texts[index], encodings[index], row), len(encodings[index].ids)
        return [found[index] for index in range(len(texts))]

    def _pass(self, ids: list[list[int]], scores: Scores) -> list[Any]:
        import torch

        longest = max(map(len, ids))
        padded = torch.tensor([row + [self._padding or 0] * (longest - len(row)) for row in ids], device=self._device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=self._device)
        with torch.inference_mode():
            output = scores(self._module(input_ids=padded, attention_mask=mask), mask, padded)
        if not torch.isfinite(output).all():
            raise ModelFailed("the model gave a number that is not finite", kind="not_finite")
        rows: list[Any] = output.cpu().tolist()
        return rows

    def _passes(self, order: Sequence[int], encodings: Sequence[Encoding]) -> Iterator[list[int]]:
        """Texts of similar length together, so many tokens at most with their padding, and at least one text."""
        part: list[int] = []
        for index in order:
            length = len(encodings[index].ids)
            # Sorted by length: the newest is the longest.
            full = (len(part) + 1) * length > self._tokens_per_pass
            if part and (full or (self._padding is None and len(encodings[part[0]].ids) < length)):
                yield part
                part = []
            part.append(index)
        yield part
