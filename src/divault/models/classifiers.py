"""Classifiers of Hugging Face folders: their labels, and what becomes of the outputs, as the library's pipelines say.

| `problem_type`, labels | scores |
|---|---|
| `regression` | the outputs as they are |
| `multi_label_classification`, or one label | a sigmoid of each |
| others | a softmax over the labels |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from divault.errors import SealedFileDamaged

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


class Activation(Enum):
    """What is done with the outputs of a network."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Classifier:
    """Labels, and the scores that each gets."""

    labels: tuple[str, ...]
    activation: Activation

    @classmethod
    def of(cls, config: PretrainedConfig) -> Classifier:
        """As `config.json` says. Raises SealedFileDamaged."""
        labels = labels_of(config)
        if config.problem_type == "regression":
            return cls(labels, Activation.NONE)
        each = len(labels) == 1 or config.problem_type == "multi_label_classification"
        return cls(labels, Activation.SIGMOID if each else Activation.SOFTMAX)

    def scores(self, outputs: torch.Tensor) -> torch.Tensor:
        """float32 [n, labels] of outputs of the same shape."""
        if self.activation is Activation.NONE:
            return outputs.float()
        return outputs.float().sigmoid() if self.activation is Activation.SIGMOID else outputs.float().softmax(dim=-1)

    def prediction(self, row: Sequence[float]) -> dict[str, Any]:
        """The best label and the scores of all."""
        best = max(range(len(row)), key=row.__getitem__)
        return {"label": self.labels[best], "score": row[best], "scores": dict(zip(self.labels, row, strict=True))}

    def schema(self) -> dict[str, Any]:
        """JSON Schema of a prediction."""
        bounds = {} if self.activation is Activation.NONE else {"minimum": 0, "maximum": 1}
        return {
            "type": "object",
            "required": ["label", "score", "scores"],
            "properties": {
                "label": {"enum": list(self.labels)},
                "score": {"type": "number"} | bounds,
                "scores": {"type": "object", "additionalProperties": {"type": "number"}},
            },
        }


def labels_of(config: PretrainedConfig) -> tuple[str, ...]:
    """The labels in their order. Raises SealedFileDamaged where two have one name."""
    names: Any = config.id2label
    labels = tuple(str(names[index])[:200] for index in sorted(names))
    if len(set(labels)) != len(labels):
        raise SealedFileDamaged("two labels in config.json have the same name", stage="payload")
    return labels
