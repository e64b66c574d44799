"""scikit-learn models with a part that needs care: they answer as the library does, or say at once why they don't."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import skops.io
from sklearn.cluster import BisectingKMeans, KMeans, MiniBatchKMeans
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.decomposition import NMF, SparsePCA
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import HistGradientBoostingClassifier, StackingClassifier
from sklearn.experimental import enable_iterative_imputer  # noqa: F401 - the import is the permission
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import IterativeImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multioutput import ClassifierChain
from sklearn.neighbors import KNeighborsClassifier, RadiusNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler, SplineTransformer, StandardScaler

from divault.errors import InputInvalid, UnsupportedModel
from divault.models.base import LoadedModel, ModelFormat
from divault.models.sklearn import SklearnPickle
from divault.models.skops import SkopsFile
from tests.memory_models import answer, load
from tests.schemas import mismatch

X = np.random.default_rng(7).random((60, 3))
Y = (X[:, 0] > 0.5).astype(int)


WRITTEN: dict[str, tuple[ModelFormat, Callable[[Any], bytes]]] = {
    "pickle": (SklearnPickle(), pickle.dumps),
    "skops": (SkopsFile(), skops.io.dumps),
}


def loaded(estimator: Any, form: str = "pickle") -> LoadedModel:
    kind, written = WRITTEN[form]
    return load(kind, {"model": written(estimator)})


def near(one: Any, other: Any) -> None:
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


# --- what a model runs on -----------------------------------------------------------------------------------------

SINGLE: dict[str, Callable[[], Any]] = {
    "clusters": lambda: KMeans(3, n_init=1, random_state=0),
    "clusters of some": lambda: MiniBatchKMeans(3, n_init=1, random_state=0),
    "clusters in halves": lambda: BisectingKMeans(3, random_state=0),
    "factors": lambda: make_pipeline(NMF(2, max_iter=500, random_state=0), LogisticRegression()),
}


@pytest.mark.parametrize("name", SINGLE)
def test_a_model_that_was_fitted_on_float32_and_runs_on_nothing_else_gets_float32(name: str) -> None:
    rows = X.astype(np.float32)
    single, double = (loaded(SINGLE[name]().fit(some, Y)) for some in (rows, X))
    ours = SINGLE[name]().fit(rows, Y)

    assert answer(single, {"features": rows[:9].tolist()})["predictions"] == ours.predict(rows[:9]).tolist()
    assert answer(single, single.description.example)["predictions"]
    assert (single.description.runtime["dtype"], double.description.runtime["dtype"]) == ("float32", "float64")
    assert answer(double, {"features": X[:9].tolist()})["predictions"]


CHAINS: dict[str, tuple[Any, bool]] = {
    "two classes": (np.c_[Y, 1 - Y], True),
    "several classes": (np.c_[np.arange(60) % 3, Y], False),
}


@pytest.mark.parametrize("texts", [False, True], ids=["rows", "texts"])
@pytest.mark.parametrize("name", CHAINS)
def test_a_model_that_has_no_probabilities_whatever_it_says_answers_predictions_alone(
    name: str, *, texts: bool
) -> None:
    targets, shares = CHAINS[name]
    chain = ClassifierChain(LogisticRegression())
    rows: Any = [f"word{place % 5} more" for place in range(60)] if texts else X
    ours = (make_pipeline(TfidfVectorizer(), chain) if texts else chain).fit(rows, targets)
    model = loaded(ours)

    result = answer(model, {"text": rows[:5]} if texts else {"features": rows[:5].tolist()})

    assert result["predictions"] == ours.predict(rows[:5]).tolist()
    assert ("probabilities" in result) == shares
    assert mismatch(result, model.description.output_schema) == ""
    assert answer(model, model.description.example)["predictions"]


FAR = X + 1000
ELSEWHERE: dict[str, Callable[[], Any]] = {
    "neighbours": lambda: RadiusNeighborsClassifier(1.0),
    "logarithms": lambda: make_pipeline(MinMaxScaler((1, 2)), FunctionTransformer(np.log), LogisticRegression()),
    "splines": lambda: make_pipeline(SplineTransformer(extrapolation="error"), LogisticRegression()),
    "rows that come together": lambda: make_pipeline(SparsePCA(2, max_iter=2), LogisticRegression()),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_model_that_answers_other_rows_than_those_that_were_tried_loads(name: str) -> None:
    ours = ELSEWHERE[name]().fit(FAR, Y)

    assert answer(loaded(ours), {"features": FAR[:5].tolist()})["predictions"] == ours.predict(FAR[:5]).tolist()


NEVER: dict[str, tuple[Callable[[], Any], str]] = {
    "parts of other widths": (lambda: make_pipeline(fitted_of(3), fitted_of(2)), "is expecting 2 features"),
    "fewer rows than neighbours": (lambda: KNeighborsClassifier(9).fit(X[:3], Y[:3]), "n_neighbors"),
}


def fitted_of(width: int) -> Any:
    return (StandardScaler() if width == 3 else LogisticRegression()).fit(X[:, :width], Y)


@pytest.mark.parametrize("name", NEVER)
def test_a_model_that_answers_no_row_whatever_is_in_it_is_refused(name: str) -> None:
    made, words = NEVER[name]

    with pytest.raises(UnsupportedModel, match=rf"does not run on its own kind of input: ValueError.*{words}"):
        loaded(made())


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


# --- records of parts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", WRITTEN)
def test_gaps_are_filled_by_the_estimators_that_an_iterative_imputer_keeps(form: str) -> None:
    gaps = X.copy()
    gaps[::5, 1] = np.nan
    ours = make_pipeline(IterativeImputer(max_iter=2), LogisticRegression()).fit(gaps, Y)
    model = loaded(ours, form)

    result = answer(model, {"features": [[0.2, None, 0.9], [None, 0.5, 0.1]]})

    near(ours.predict_proba([[0.2, np.nan, 0.9], [np.nan, 0.5, 0.1]]), result["probabilities"])
    assert model.description.together == 1


@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize("beyond", ["constant", "linear", "periodic"])
def test_splines_answer_as_the_library_does(form: str, beyond: str) -> None:
    ours = make_pipeline(SplineTransformer(extrapolation=beyond), Ridge()).fit(X, X[:, 0] ** 2)
    rows = [[0.2, 0.5, 0.9], [-2.0, 3.0, 0.1]]
    expected = ours.predict(rows)

    near(expected, answer(loaded(ours, form), {"features": rows})["predictions"])
    for spline in ours[0].bsplines_:  # as older versions of scipy wrote them
        held = vars(spline)
        held["t"], held["c"] = held.pop("_t"), held.pop("_c")
        del held["_asarray"]
    near(expected, answer(loaded(ours, form), {"features": rows})["predictions"])


CATEGORIES: dict[str, tuple[Callable[[], Any], Any]] = {
    "numbers": (HistGradientBoostingClassifier, 3.0),
    "texts": (HistGradientBoostingClassifier, "c"),
    "texts, stacked": (lambda **how: StackingClassifier([("h", HistGradientBoostingClassifier(**how))], cv=2), "c"),
}


@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize("name", CATEGORIES)
def test_histogram_boosting_takes_categories_as_it_was_fitted_on_them(name: str, form: str) -> None:
    made, first = CATEGORIES[name]
    rows = X.astype(object) if isinstance(first, str) else X.copy()
    rows[:, 1] = np.array(["c", "d", "e"] if isinstance(first, str) else [3.0, 5.0, 9.0])[np.arange(60) % 3]
    ours = made(max_iter=3, min_samples_leaf=4, categorical_features=[1]).fit(rows, Y ^ (np.arange(60) % 3 == 1))
    model = loaded(ours, form)

    result = answer(model, {"features": [*rows[:6].tolist(), [None, first, 0.5]]})

    near(ours.predict_proba([*rows[:6].tolist(), [np.nan, first, 0.5]]), result["probabilities"])
    columns = model.description.input_schema["properties"]["features"]["anyOf"][0]["prefixItems"]
    kinds = ["number", "string" if isinstance(first, str) else "number", "number"]
    assert [column["type"][0] for column in columns] == kinds
    assert model.description.example["features"][1] == first
    assert model.description.together > 1
    for wrong in ([0.5, "c", "c"], [0.5, 3.0 if isinstance(first, str) else "c", 0.5]):
        with pytest.raises(InputInvalid):
            answer(model, {"features": wrong})


# --- generators ---------------------------------------------------------------------------------------------------

DRAWING: dict[str, Callable[..., Any]] = {
    "factors": lambda **how: make_pipeline(NMF(2, max_iter=500, **how), LogisticRegression()),
    "gaps drawn": lambda **how: make_pipeline(
        IterativeImputer(sample_posterior=True, max_iter=2, **how), LogisticRegression()
    ),
    "answers drawn": lambda **how: DummyClassifier(strategy="stratified", **how),
}


@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize("name", DRAWING)
def test_a_model_with_a_generator_gives_the_same_answer_each_time_and_draws_as_from_the_nodes_seed(
    name: str, form: str
) -> None:
    rows = X.copy()
    rows[::5, 1] = np.nan if name == "gaps drawn" else 0.5
    sent = [[0.1, None if name == "gaps drawn" else 0.5, 0.3]] * 9
    model = loaded(DRAWING[name](random_state=np.random.RandomState(5)).fit(rows, Y), form)

    first = answer(model, {"features": sent})

    assert answer(model, {"features": sent}) == first
    if name == "answers drawn":
        seeds = {seed: DummyClassifier(strategy="stratified", random_state=seed).fit(rows, Y) for seed in (0, 5)}
        drawn = {seed: ours.predict(np.zeros((9, 3))).tolist() for seed, ours in seeds.items()}
        assert (first["predictions"] == drawn[0], drawn[0] == drawn[5]) == (True, False)
        assert answer(loaded(seeds[5], form), {"features": sent})["predictions"] == drawn[5], "a number is kept"
