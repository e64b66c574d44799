"""Boosted trees of any library, once loaded: rows in, numbers out, in the shape that scikit-learn's classifiers have.

`{"features"}` takes a row or a list of rows, null for a missing value. The answer has `predictions`, one for each row;
classifiers add `classes` and, where the objective gives them, `probabilities`. Classes are numbers from 0 on, as the
library has them, or the `labels` of a `divault.json` beside the file.

A row is computed by itself, tree after tree: callers share a pass, and no number depends on who else is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from divault.errors import ModelFailed, UnsupportedModel
from divault.models.base import Answer, Description, Inputs
from divault.models.rows import MAX_ROWS, Column, RowSpec, rows_of, schema_of
from divault.models.runtimes import runtime_object
from divault.models.tensors import MAX_ANSWER_NUMBERS, answered

MAX_OUTPUTS = 10_000
"""Numbers for a row: classes or targets."""
_TOGETHER = 64
"""Callers of one pass."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What the numbers of a model are."""

    task: str
    """`classification`, `regression`, `ranking`, or `prediction` where the file does not say what its sums mean."""
    classes: int = 0
    """Of a classification; 0 for the rest."""
    probabilities: bool = False
    """Whether the library gives a number for each class (for the second one of two), not the class itself."""


@dataclass(frozen=True, slots=True)
class Boosting:
    """A model as its format loaded it."""

    format: str
    """`xgboost` or `lightgbm`."""
    library: str
    """Its distribution."""
    dtype: str
    """What it computes in."""
    features: int
    outputs: int
    """Numbers for a row that the library makes."""
    kind: Kind
    run: Callable[[NDArray[Any]], NDArray[Any]]
    """float64 [rows, features], NaN for a missing value, to [rows] or [rows, numbers]. Raises ModelFailed."""


class Boosted:
    """A model of boosted trees, ready to run."""

    def __init__(self, model: Boosting, labels: tuple[str, ...]) -> None:
        if labels and len(labels) != model.kind.classes:
            raise UnsupportedModel(
                f"divault.json has {len(labels)} labels, the model {model.kind.classes} classes",
                seen="labels that don't fit the model",
                supported="one label for each class of a classification",
            )
        self._model = model
        self._classes: list[Any] = list(labels) or list(range(model.kind.classes))
        self._spec = RowSpec(model.features, each=Column(null=True))
        self._description = self._described()

    @property
    def description(self) -> Description:
        """What it is and takes."""
        return self._description

    def _described(self) -> Description:
        model = self._model
        return Description(
            format=model.format,
            task=model.kind.task,
            device="cpu",
            input_schema=self._spec.schema(),
            output_schema=self._output_schema(),
            example=self._spec.example(),
            runtime=runtime_object(model.format, "cpu", model.dtype, (model.library, "scipy"), {}),
            together=_TOGETHER,
        )

    def _output_schema(self) -> dict[str, Any]:
        classes, outputs = self._classes, self._model.outputs
        single = classes[0] if classes else 0.0 if outputs == 1 else [0.0] * outputs
        properties: dict[str, Any] = {"predictions": rows_of(single)}
        if self._model.kind.probabilities:
            properties["probabilities"] = rows_of([0.0] * len(classes))
        if classes:
            properties["classes"] = schema_of(classes) | {"const": classes}
        return {"type": "object", "properties": properties, "required": list(properties)}

    def predict(self, batch: Sequence[Inputs]) -> list[Answer]:
        """One answer per caller, in order; the rows of all callers go in one pass.

        Raises InputInvalid, ModelFailed.
        """
        rows = [self._spec.parse(inputs) for inputs in batch]
        total = sum(map(len, rows))
        if total > MAX_ROWS or total * self._model.outputs > MAX_ANSWER_NUMBERS:
            return [self._answer(self._run(part)) for part in rows]
        found = self._run(np.concatenate(rows))
        ends = accumulate(map(len, rows))
        return [self._answer(found[end - len(part) : end]) for part, end in zip(rows, ends, strict=True)]

    def _run(self, rows: NDArray[Any]) -> NDArray[Any]:
        if len(rows) * self._model.outputs > MAX_ANSWER_NUMBERS:
            raise ModelFailed(f"{len(rows)} rows of {self._model.outputs} numbers: send fewer rows", kind="output_size")
        found = self._model.run(rows)
        if len(found) != len(rows):
            raise ModelFailed(f"{len(found)} numbers for {len(rows)} rows", kind="answer_count")
        return found

    def _answer(self, found: NDArray[Any]) -> Answer:
        kind = self._model.kind
        if not kind.classes:
            return Answer({"predictions": answered(found)}, len(found))
        result: dict[str, Any] = {}
        if kind.probabilities:
            found = _for_each_class(found)
            result["probabilities"] = answered(found)
            chosen = found.argmax(axis=1)
        else:
            chosen = found.astype(np.int64)
        names = [self._classes[place] for place in chosen.tolist()]
        return Answer({"predictions": names, **result, "classes": self._classes}, len(found))


def _for_each_class(found: NDArray[Any]) -> NDArray[Any]:
    """A column for each class: of two, the library gives the second alone."""
    return np.stack((1 - found, found), axis=1) if found.ndim == 1 else found
