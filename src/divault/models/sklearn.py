"""scikit-learn estimators and pipelines out of pickle or joblib files, through the allow-list loader of `pickles`.

`{"features"}` takes a row or a list of rows as the estimator was fitted on, `{"text"}` a text or a list of texts where
a text vectorizer sees the input first, `{"inputs"}` either. The answer has `predictions`, one for each row, also for a
single one; classifiers add `probabilities` and `classes`. Numbers equal those of the library's own methods.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, product
from typing import Any

from divault.errors import UnsupportedModel
from divault.models import native, pickles, rebuilding
from divault.models.base import Answer, Description, Inputs, LoadedModel, Place, words_of
from divault.models.files import only_file, the_file
from divault.models.rows import MAX_ROWS, RowSpec, TextSpec, rows_of, schema_of
from divault.models.runtimes import SEED, blas, runtime_object, seed, version
from divault.models.sklearn_columns import by_position, specification
from divault.values import MemoryFile

_NOT_ROWWISE = frozenset(
    {
        *("DummyClassifier", "IterativeImputer", "MiniBatchNMF", "NMF"),
        *("MiniBatchSparsePCA", "SparsePCA"),  # these take no single row
    }
)
"""Their answer for a row may depend on the rows beside it, or on chance: callers never share a pass."""
_TOGETHER = 64
"""Callers of one pass."""
_TOLERANCES = {"float64": 1e-9, "float32": 1e-5}
"""Products of matrices of other sizes add in another order."""
_OF_VALUES = re.compile(
    r"\b(nans?|infs?|infinity|finite|values?(?! to unpack| of an array)|neighbors|negative|positive|smaller|larger"
    r"|below|above|range|bounds?|limits?|domain|outside|categor\w+|singular|converge|empty|zero|0 sample)\b",
    re.IGNORECASE,
)
"""What the library's errors say of inputs that it would answer with other numbers in them."""
_LIBRARIES = ("scipy", "scikit-learn")
_MOST_GROUPS = 32
"""Most tries of where null may stand, a run each."""
_RAISED = (*pickles.DAMAGE, RuntimeError)
"""What a model raises that was not fitted here, or not fitted at all."""


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
        return tried(fitted(pickles.load(file)), "sklearn", lambda: pickles.version_of(file))


def tried(found: Any, adapter: str, writer: Callable[[], str]) -> Estimator:
    """The estimator, after a run; `writer` gives the version of the library that wrote it. Raises UnsupportedModel."""
    try:
        return Estimator(found, adapter)
    except _RAISED as err:  # also what is read off its state, which whoever wrote the file has made
        raise _not_run(err, writer()) from err


def _not_run(err: Exception, writer: str) -> UnsupportedModel:
    """Why a model does not run that this version of the library wrote (empty: nobody knows)."""
    installed = version("scikit-learn")
    what = f"{type(err).__name__}: {words_of(err)}"
    if writer in ("", installed):
        seen = f"a model that does not run ({type(err).__name__})"
        return UnsupportedModel(f"the model does not run on its own kind of input: {what}", seen=seen)
    return UnsupportedModel(
        f"scikit-learn {writer} wrote the model, and {installed}, which this node has, does not run it ({what}): "
        f"fit it with {installed}",
        seen=f"a model of scikit-learn {writer} that {installed} does not run",
        supported=f"models that scikit-learn {installed} runs",
    )


class Estimator:
    """One fitted estimator."""

    def __init__(self, estimator: Any, adapter: str) -> None:
        from sklearn.base import BaseEstimator

        self._estimator = estimator
        self._adapter = adapter
        self._proba = hasattr(estimator, "predict_proba")
        self._classes = _listed(getattr(estimator, "classes_", None))
        reached = list(native.reachable(estimator))
        _seed_all(reached)
        parts = [part for part in reached if isinstance(part, BaseEstimator)]
        self._rowwise = all(map(_is_rowwise, parts))
        self._sample: dict[str, Any] = {}
        """What it answered to the first row that it took."""
        self._spec, groups = specification(estimator)
        by_position(parts)
        if not any(map(native.may_never_end, reached)):  # the deadline of its runs is for those
            self._spec = self._tried(groups)
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
            runtime=runtime_object(self._adapter, "cpu", self._spec.dtype, libraries, {"blas": blas()}),
            together=_TOGETHER if self._rowwise else 1,
            tolerance=_TOLERANCES[self._spec.dtype],
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

    def _tried(self, groups: Sequence[Sequence[int]]) -> RowSpec | TextSpec:
        """What it takes, seen by running it: a row for the example, and where null may stand.

        Raises what the library raises for a model that runs on nothing.
        """
        data, spec = self._taken(), self._spec
        if data is None or isinstance(spec, TextSpec):
            return spec
        spec = replace(spec, sample=data["features"])
        everywhere = range(len(spec.sample))
        if self._takes_null(spec, everywhere):
            return spec.with_null(everywhere)
        for places in groups if 1 < len(groups) <= _MOST_GROUPS else ():
            if self._takes_null(spec, places):
                spec = spec.with_null(places)
        return spec

    def _taken(self) -> dict[str, Any] | None:
        """An input that gets an answer; None where the model may answer others, or several rows at once.

        Where it answers none, its numbers may have to be float32, as it was fitted on them, or it has no probabilities
        though it says so: what it then runs with is kept. Raises what the library raises for a model that never runs.
        """
        data, errors = self._outcome(self._spec.examples())
        if data is not None or _lies_in_values(errors):
            return data
        specs = [self._spec]
        if isinstance(self._spec, RowSpec):
            several = [one["features"] for one in self._spec.examples()]
            if self._outcome([{"features": several}])[0] is not None:
                return None
            specs.append(replace(self._spec, dtype="float32"))
        for proba, spec in product((True, False) if self._proba else (False,), specs):
            self._proba, self._spec = proba, spec
            data, _ = self._outcome(spec.examples())
            if data is not None:
                return data
        raise errors[0]

    def _outcome(self, told: Sequence[dict[str, Any]]) -> tuple[dict[str, Any] | None, list[Exception]]:
        """The first of these inputs that gets an answer, or why none does. Raises what no input is the reason for."""
        errors: list[Exception] = []
        for data in told:
            try:
                self._try(self._spec, data)
            # The library's word for what was never fitted is a ValueError, too.
            except AttributeError:
                raise
            except TypeError as err:
                return None, [err]
            except (ValueError, ArithmeticError) as err:
                errors.append(err)
            else:
                return data, []
        return None, errors

    def _takes_null(self, spec: RowSpec, places: Sequence[int]) -> bool:
        """Whether the sample gets an answer with null in these places."""
        gaps = set(places)
        row = [None if place in gaps else value for place, value in enumerate(spec.sample)]
        try:
            self._try(spec.with_null(places), {"features": row})
        except _RAISED:
            return False
        return True

    def _try(self, spec: RowSpec | TextSpec, data: Any) -> None:
        """Raises what the library raises, and ValueError or TypeError for an answer that JSON doesn't have."""
        rows = spec.parse(Inputs(data, {}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = self._run(rows)
        json.dumps(_listed(list(found.values())), allow_nan=False)
        # A list has the answers of each output, with a row in each.
        told = {name: _listed(values)[0] for name, values in found.items() if not isinstance(values, list)}
        self._sample = self._sample or told

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
        names = ["predictions", *(["probabilities"] if self._proba else [])]
        told = dict(self._sample)
        if self._task() == "regression" and "predictions" in told:  # whole by chance, or for want of neighbours
            told["predictions"] = _as_floats(told["predictions"])
        properties: dict[str, Any] = {
            name: rows_of(told[name]) if name in told else {"type": "array"} for name in names
        }
        if self._classes is not None:
            properties["classes"] = schema_of(self._classes) | {"const": self._classes}
            if properties["classes"].get("items") is None:  # labels of several kinds: another row may have another
                properties["predictions"] = {"type": "array"}
        return {"type": "object", "properties": properties, "required": list(properties)}


def _lies_in_values(errors: Sequence[Exception]) -> bool:
    """Whether a model that raised these, one for each input, might answer others: they differ, or speak of values."""
    one, *others = errors
    same = all((type(other), str(other)) == (type(one), str(one)) for other in others)
    if isinstance(one, TypeError | ArithmeticError):
        return isinstance(one, ArithmeticError)
    return not same or bool(_OF_VALUES.search(str(one)))


def _seed_all(parts: Sequence[Any]) -> None:
    """Have parts that hold a generator draw the same for each call: its state is not loaded, or would move on."""
    import numpy as np

    kinds = (rebuilding.Forgotten, np.random.RandomState, np.random.Generator)
    for part in parts:
        held = {} if isinstance(part, type) else getattr(part, "__dict__", {})
        for name in ("random_state", "random_state_"):
            if isinstance(held.get(name), kinds):
                held[name] = SEED


def _is_rowwise(part: Any) -> bool:
    """Whether a part's answer for a row is the same whatever stands beside it."""
    from sklearn.preprocessing import FunctionTransformer

    if isinstance(part, FunctionTransformer):  # one without functions is what "passthrough" is once it is fitted
        plain = part.func is None or isinstance(part.func, rebuilding.NumbersOnly)
        return plain and part.inverse_func is None
    return type(part).__name__ not in _NOT_ROWWISE


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


def _as_floats(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_floats(part) for part in value]
    return float(value) if isinstance(value, int) else value


def _listed(found: Any) -> Any:
    """Arrays, sparse matrices and lists of them as lists of plain values."""
    if isinstance(found, list | tuple):
        return [_listed(part) for part in found]
    if hasattr(found, "toarray"):
        found = found.toarray()
    plain = found.tolist() if hasattr(found, "tolist") else found
    # An array of objects may hold scalars of numpy.
    return _listed(plain) if getattr(getattr(found, "dtype", None), "kind", "") == "O" else plain
