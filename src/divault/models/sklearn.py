"""scikit-learn estimators and pipelines out of pickle or joblib files, through the allow-list loader of `pickles`.

`{"features"}` takes a row or a list of rows as the estimator was fitted on, `{"text"}` a text or a list of texts where
the first step is a text vectorizer, `{"inputs"}` either. The answer has `predictions`, one for each row, also for a
single one; classifiers add `probabilities` and `classes`. Numbers equal those of the library's own methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from divault.errors import UnsupportedModel
from divault.models import native, pickles
from divault.models.base import Answer, Description, Inputs, LoadedModel, Place
from divault.models.files import only_file, the_file
from divault.models.rows import MAX_ROWS, RowSpec, TextSpec
from divault.models.runtimes import runtime_object, seed
from divault.values import MemoryFile

_NOT_ROWWISE = frozenset(
    {
        *("DummyClassifier", "FunctionTransformer", "IterativeImputer", "MiniBatchNMF", "NMF"),
        *("MiniBatchSparsePCA", "SparsePCA"),  # these take no single row
    }
)
"""Their answer for a row may depend on the rows beside it, or on chance: callers never share a pass."""
_TOGETHER = 64
"""Callers of one pass."""
_TOLERANCE = 1e-9
"""Products of matrices of other sizes add in another order."""
_LIBRARIES = ("scipy", "scikit-learn")


class SklearnPickle:
    """The format: one pickled or joblib file."""

    template = ""

    def recognises(self, files: Sequence[MemoryFile]) -> bool:
        """Whether the model is one file and that is a pickle, plain or compressed."""
        file = only_file(files)
        return file is not None and pickles.looks_pickled(file)

    def load(self, files: Sequence[MemoryFile], place: Place) -> LoadedModel:  # noqa: ARG002 - it runs on the CPU alone
        """The estimator. Raises UnsupportedModel naming the first global that is not allowed."""
        file = the_file(files, "a scikit-learn model")
        configure()
        return Estimator(fitted(pickles.load(file)))


class Estimator:
    """One fitted estimator."""

    def __init__(self, estimator: Any, adapter: str = "sklearn") -> None:
        self._estimator = estimator
        self._adapter = adapter
        self._proba = hasattr(estimator, "predict_proba")
        self._classes = _listed(getattr(estimator, "classes_", None))
        self._spec = _spec(estimator)
        self._rowwise = not any(type(part).__name__ in _NOT_ROWWISE for part in native.reachable(estimator))
        self._description = self._described()

    @property
    def description(self) -> Description:
        """What it is and takes."""
        return self._description

    def _described(self) -> Description:
        libraries = (*_LIBRARIES, "skops") if self._adapter == "skops" else _LIBRARIES
        return Description(
            format="sklearn",
            task=self._task(),
            device="cpu",
            input_schema=self._spec.schema(),
            output_schema=self._output_schema(),
            example=self._spec.example(),
            runtime=runtime_object(self._adapter, "cpu", "float64", libraries, {}),
            together=_TOGETHER if self._rowwise else 1,
            tolerance=_TOLERANCE,
        )

    def predict(self, batch: Sequence[Inputs]) -> list[Answer]:
        """One answer per caller, in order; rows of all callers go in one pass where none looks at the others.

        Raises InputInvalid.
        """
        rows = [self._spec.parse(inputs) for inputs in batch]
        total = sum(map(len, rows))
        if len(rows) > 1 and self._rowwise and total <= MAX_ROWS and _fit_together(rows):
            found = self._run(_joined(rows))
            ends = list(accumulate(map(len, rows)))
            parts = [_cut(found, end - len(part), end) for part, end in zip(rows, ends, strict=True)]
        else:
            parts = [self._run(part) for part in rows]
        return [self._answer(found, len(part)) for found, part in zip(parts, rows, strict=True)]

    def _run(self, rows: Any) -> dict[str, Any]:
        if not self._rowwise:
            seed()
        found = {"predictions": self._estimator.predict(rows)}
        if self._proba:
            found["probabilities"] = self._estimator.predict_proba(rows)
        return found

    def _answer(self, found: dict[str, Any], rows: int) -> Answer:
        result = {name: _listed(values) for name, values in found.items()}
        if self._classes is not None:
            result["classes"] = self._classes
        return Answer(result, rows)

    def _task(self) -> str:
        from sklearn.base import is_classifier, is_clusterer, is_outlier_detector, is_regressor

        kinds = {
            "text-classification" if isinstance(self._spec, TextSpec) else "classification": is_classifier,
            "regression": is_regressor,
            "clustering": is_clusterer,
            "outlier-detection": is_outlier_detector,
        }
        return next((task for task, holds in kinds.items() if holds(self._estimator)), "prediction")

    def _output_schema(self) -> dict[str, Any]:
        properties: dict[str, Any] = {"predictions": {"type": "array"}}
        if self._proba:
            properties["probabilities"] = {"type": "array"}
        if self._classes is not None:
            properties["classes"] = {"type": "array", "const": self._classes}
        return {"type": "object", "properties": properties, "required": list(properties)}


def _fit_together(rows: list[Any]) -> bool:
    return isinstance(rows[0], list) or len({part.shape[1] for part in rows}) == 1


def _joined(rows: list[Any]) -> Any:
    import numpy as np

    return [text for part in rows for text in part] if isinstance(rows[0], list) else np.concatenate(rows)


def _cut(found: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    """The answers of one caller; models with several outputs give a list of arrays."""
    return {
        name: [part[start:end] for part in values] if isinstance(values, list) else values[start:end]
        for name, values in found.items()
    }


def configure() -> None:
    """Set the library up for models of strangers, and its generators to a known start."""
    import sklearn
    from sklearn.feature_extraction.text import CountVectorizer

    # Parameters were checked when the model was fitted, and don't change any more.
    sklearn.set_config(skip_parameter_validation=True)
    seed()
    # A vectorizer with input="filename" would open whatever path a caller sends as text.
    CountVectorizer.__mro__[1].decode = _text_alone


def _text_alone(vectorizer: Any, document: Any) -> str:
    if vectorizer.input != "content" or not isinstance(document, str):
        raise ValueError("only text itself is analysed, no files")
    return document


def fitted(found: Any) -> Any:
    """The estimator that a file holds, with its trees checked. Raises UnsupportedModel for anything else."""
    from sklearn.base import BaseEstimator

    kind = f"{type(found).__module__}.{type(found).__qualname__}"
    if not isinstance(found, BaseEstimator) or not hasattr(found, "predict"):
        raise UnsupportedModel(
            f"the pickle holds {kind}: pickle a fitted scikit-learn estimator or pipeline with a predict method itself",
            seen=f"a pickle of {kind}",
            supported="an estimator or pipeline of scikit-learn with a predict method",
        )
    native.check_all(found)
    return found


def _spec(estimator: Any) -> RowSpec | TextSpec:
    from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer

    parts = _parts(estimator)
    if any(isinstance(part, CountVectorizer | HashingVectorizer) for part in parts[:1]):
        return TextSpec()
    count = getattr(estimator, "n_features_in_", None)
    mixed = any(_has_text_categories(part) for part in parts)
    width = count if isinstance(count, int) and count > 0 else None
    return RowSpec(width, mixed=mixed, missing=_takes_nan(estimator, parts))


def _parts(estimator: Any, levels: int = 8) -> list[Any]:
    """What sees the input first: the estimator itself, or the first steps inside pipelines, searches and unions."""
    from sklearn.compose import ColumnTransformer
    from sklearn.pipeline import FeatureUnion, Pipeline

    if levels == 0:
        return []
    if isinstance(estimator, Pipeline):
        inner = [step for _, step in estimator.steps][:1]
    elif isinstance(estimator, FeatureUnion):
        inner = [step for _, step in estimator.transformer_list]
    elif isinstance(estimator, ColumnTransformer):
        inner = [step for _, step, _ in getattr(estimator, "transformers_", [])]
    elif hasattr(estimator, "best_estimator_"):
        inner = [estimator.best_estimator_]
    else:
        return [estimator]
    return [part for step in inner for part in _parts(step, levels - 1)]


def _has_text_categories(part: Any) -> bool:
    kinds = (getattr(getattr(column, "dtype", None), "kind", "f") for column in getattr(part, "categories_", []))
    return any(kind in "OUS" for kind in kinds)


def _takes_nan(estimator: Any, parts: list[Any]) -> bool:
    """Whether null may stand for a missing value: by the model's own word, or since an imputer comes first."""
    from sklearn.impute import KNNImputer, SimpleImputer
    from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder
    from sklearn.utils import get_tags

    if any(isinstance(part, SimpleImputer | KNNImputer) for part in parts):
        return all(isinstance(part, SimpleImputer | KNNImputer | OneHotEncoder | OrdinalEncoder) for part in parts)
    return bool(get_tags(estimator).input_tags.allow_nan)


def _listed(found: Any) -> Any:
    """Arrays, sparse matrices and lists of them as lists of plain values."""
    if isinstance(found, list | tuple):
        return [_listed(part) for part in found]
    if hasattr(found, "toarray"):
        found = found.toarray()
    plain = found.tolist() if hasattr(found, "tolist") else found
    # An array of objects may hold scalars of numpy.
    return _listed(plain) if getattr(getattr(found, "dtype", None), "kind", "") == "O" else plain
