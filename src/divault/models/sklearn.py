"""scikit-learn estimators and pipelines out of pickle or joblib files, through the allow-list loader of `pickles`.

`{"features"}` takes a row or a list of rows as the estimator was fitted on, `{"text"}` a text or a list of texts where
the first step is a text vectorizer, `{"inputs"}` either. The answer has `predictions`, one for each row, also for a
single one; classifiers add `probabilities` and `classes`. Numbers equal those of the library's own methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from divault.errors import UnsupportedModel
from divault.models import pickles
from divault.models.base import Answer, Description, Inputs, LoadedModel
from divault.models.files import only_file
from divault.models.rows import RowSpec, TextSpec
from divault.models.runtimes import runtime_object
from divault.values import MemoryFile

_LIBRARIES = ("scipy", "scikit-learn")


class SklearnPickle:
    """The format: one pickled or joblib file."""

    def recognises(self, files: Sequence[MemoryFile]) -> bool:
        """Whether the model is one file and that is a pickle, plain or compressed."""
        file = only_file(files)
        return file is not None and pickles.looks_pickled(file)

    def load(self, files: Sequence[MemoryFile], device: str) -> LoadedModel:  # noqa: ARG002 - it runs on the CPU alone
        """The estimator. Raises UnsupportedModel naming the first global that is not allowed."""
        file = only_file(files)
        if file is None:
            raise UnsupportedModel("a scikit-learn model is one file", seen="several files")
        _configure()
        return Estimator(_checked(pickles.load(file)))


class Estimator:
    """One fitted estimator."""

    def __init__(self, estimator: Any) -> None:
        self._estimator = estimator
        self._proba = hasattr(estimator, "predict_proba")
        self._classes = _listed(getattr(estimator, "classes_", None))
        self._spec = _spec(estimator)

    @property
    def description(self) -> Description:
        """What it is and takes."""
        return Description(
            format="sklearn",
            task=self._task(),
            device="cpu",
            input_schema=self._spec.schema(),
            output_schema=self._output_schema(),
            example=self._spec.example(),
            runtime=runtime_object("sklearn", "cpu", "float64", _LIBRARIES, {}),
        )

    def predict(self, batch: Sequence[Inputs]) -> list[Answer]:
        """One answer per caller, in order. Raises InputInvalid."""
        return [self._answer(inputs) for inputs in batch]

    def _answer(self, inputs: Inputs) -> Answer:
        rows = self._spec.parse(inputs)
        result: dict[str, Any] = {"predictions": _listed(self._estimator.predict(rows))}
        if self._proba:
            result["probabilities"] = _listed(self._estimator.predict_proba(rows))
        if self._classes is not None:
            result["classes"] = self._classes
        return Answer(result, len(rows))

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


def _configure() -> None:
    import sklearn
    from sklearn.feature_extraction.text import CountVectorizer

    # Parameters were checked when the model was fitted, and don't change any more.
    sklearn.set_config(skip_parameter_validation=True)
    # A vectorizer with input="filename" would open whatever path a caller sends as text.
    CountVectorizer.__mro__[1].decode = _text_alone


def _text_alone(vectorizer: Any, document: Any) -> str:
    if vectorizer.input != "content" or not isinstance(document, str):
        raise ValueError("only text itself is analysed, no files")
    return document


def _checked(found: Any) -> Any:
    from sklearn.base import BaseEstimator

    kind = f"{type(found).__module__}.{type(found).__qualname__}"
    if not isinstance(found, BaseEstimator) or not hasattr(found, "predict"):
        raise UnsupportedModel(
            f"the pickle holds {kind}: pickle a fitted scikit-learn estimator or pipeline with a predict method itself",
            seen=f"a pickle of {kind}",
            supported="an estimator or pipeline of scikit-learn with a predict method",
        )
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
    return found.tolist() if hasattr(found, "tolist") else found
