"""All of scikit-learn that fits on one data set: loads as pickle and as skops, and answers each row by itself."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import skops.io

from divault.errors import UnsupportedModel
from divault.models.base import Inputs, LoadedModel, ModelFormat
from divault.models.sklearn import SklearnPickle
from divault.models.skops import SkopsFile
from tests.estimators import fitted_models
from tests.memory_models import load

WAYS: dict[str, tuple[ModelFormat, Callable[[Any], bytes], set[str]]] = {
    "pickle": (SklearnPickle(), pickle.dumps, set()),
    "skops": (SkopsFile(), skops.io.dumps, {"Birch"}),  # which skops itself can't write
}
NO_SINGLE_ROW = {"SparsePCA", "MiniBatchSparsePCA"}
"""scikit-learn's own transform of these fails for one row."""


@pytest.fixture(scope="module", params=WAYS)
def loaded(request: pytest.FixtureRequest) -> tuple[dict[str, LoadedModel], dict[str, UnsupportedModel]]:
    """What loads, and why the rest does not."""
    form, written, unwritten = WAYS[request.param]
    models: dict[str, LoadedModel] = {}
    refused: dict[str, UnsupportedModel] = {}
    for name, (estimator, _) in fitted_models().items():
        if name in unwritten:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                models[name] = load(form, {"model": written(estimator)})
            except UnsupportedModel as err:
                refused[name] = err
    return models, refused


def test_at_least_95_of_100_ordinary_estimators_load_and_each_refusal_has_a_name(
    loaded: tuple[dict[str, LoadedModel], dict[str, UnsupportedModel]],
) -> None:
    models, refused = loaded

    assert len(models) + len(refused) >= 160
    assert len(models) >= 0.95 * (len(models) + len(refused))
    assert {name: err.data["seen"] for name, err in refused.items() if " that needs " not in err.data["seen"]} == {}


def test_each_answers_as_the_library_and_a_row_alone_as_in_a_batch_in_any_order(
    loaded: tuple[dict[str, LoadedModel], dict[str, UnsupportedModel]],
) -> None:
    wrong = []
    for name, model in loaded[0].items():
        estimator, rows = fitted_models()[name]
        some = rows[::12]
        callers = [Inputs({"features": row.tolist()}, {}) for row in some]
        if name in NO_SINGLE_ROW:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            alone = [model.predict([caller])[0].result for caller in callers]
            batch = [answer.result for answer in model.predict(callers)]
            back = [answer.result for answer in model.predict(callers[::-1])][::-1]
            library = np.asarray(estimator.predict(some))
        if "Dummy" not in name and not near([one["predictions"][0] for one in alone], library.tolist(), model):
            wrong.append(f"{name} answers otherwise than the library")
        if not (near(alone, batch, model) and near(alone, back, model)):
            wrong.append(f"{name} answers otherwise in a batch")

    assert wrong == []


def near(one: Any, other: Any, model: LoadedModel) -> bool:
    """Whether two JSON values differ by no more than the model says."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(near(one[name], other[name], model) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(near(*pair, model) for pair in zip(one, other, strict=True))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= model.description.tolerance * max(1.0, abs(one))
    return bool(one == other)
