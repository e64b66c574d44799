"""scikit-learn models with a part that needs care: they answer as the library does, or say at once why they don't."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from divault.models.base import LoadedModel
from divault.models.sklearn import SklearnPickle
from tests.memory_models import load

X = np.random.default_rng(7).random((60, 3))
Y = (X[:, 0] > 0.5).astype(int)


def loaded(estimator: Any) -> LoadedModel:
    return load(SklearnPickle(), {"model": pickle.dumps(estimator)})


# --- who shares a pass --------------------------------------------------------------------------------------------

SHARING: dict[str, tuple[Callable[[], Any], bool]] = {
    "the rest as it is": (lambda: ColumnTransformer([("s", StandardScaler(), [0])], remainder="passthrough"), True),
    "a function": (
        lambda: ColumnTransformer([("s", StandardScaler(), [0])], remainder=FunctionTransformer(np.exp)),
        False,
    ),
}


@pytest.mark.parametrize("name", SHARING)
def test_columns_that_are_handed_on_keep_no_callers_apart_and_functions_do(name: str) -> None:
    made, shares = SHARING[name]
    model = loaded(make_pipeline(made(), LogisticRegression()).fit(X, Y))

    assert (model.description.together > 1) == shares


def test_a_function_that_is_only_applied_backwards_keeps_callers_apart() -> None:
    backwards = FunctionTransformer(inverse_func=np.exp, check_inverse=False)
    ours = TransformedTargetRegressor(Ridge(), transformer=backwards, check_inverse=False).fit(X, X[:, 0])

    assert loaded(ours).description.together == 1
