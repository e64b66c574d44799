"""Names of a model's outputs, as `labels` of `divault.json` gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from divault.errors import UnsupportedModel

_MAX_LABELS = 100_000


def labels_of(told: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels in what `divault.json` says; empty without any. Raises UnsupportedModel."""
    labels = told.get("labels")
    if labels is None:
        return ()
    if isinstance(labels, list) and 1 <= len(labels) <= _MAX_LABELS and all(isinstance(name, str) for name in labels):
        found = tuple(name[:200] for name in labels)
        if len(set(found)) == len(found):  # each has its score, by its name
            return found
    raise UnsupportedModel(
        'labels in divault.json is a list of different texts, one for each output: "labels": ["cat", "dog"]',
        seen="labels that are not a list of different texts",
        supported="a list of different texts",
    )


def labelled(labels: Sequence[str], row: Sequence[float]) -> dict[str, Any]:
    """The label of the highest output; scores are the outputs as the model gives them."""
    best = max(range(len(row)), key=row.__getitem__)
    return {"label": labels[best], "score": row[best], "scores": dict(zip(labels, row, strict=True))}


def labelled_schema(labels: Sequence[str]) -> dict[str, Any]:
    """JSON Schema of one such row."""
    return {
        "type": "object",
        "required": ["label", "score", "scores"],
        "properties": {
            "label": {"enum": list(labels)} if labels else {"type": "string"},
            "score": {"type": "number"},
            "scores": {"type": "object", "additionalProperties": {"type": "number"}},
        },
    }
