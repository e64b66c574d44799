"""Columns of scikit-learn models: texts, numbers and missing values go where the model was fitted on them."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import skops.io
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor, make_column_selector
from sklearn.ensemble import (
    BaggingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    StackingClassifier,
    VotingClassifier,
)
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.frozen import FrozenEstimator
from sklearn.impute import KNNImputer, MissingIndicator, SimpleImputer
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, TunedThresholdClassifierCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, OrdinalEncoder, StandardScaler, TargetEncoder
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier

from divault.errors import InputInvalid, UnsupportedModel
from divault.models.base import Inputs, LoadedModel
from divault.models.sklearn import SklearnPickle
from divault.models.skops import SkopsFile
from tests.memory_models import answer, load

NAN = float("nan")
ROWS = np.array([["red", 1.0, 3.0], ["blue", 2.0, 1.0], ["red", 3.0, 2.0], ["blue", 4.0, 2.0]] * 6, dtype=object)
KINDS = np.array(["x", "y", "z", "y"] * 6)
YES = np.array([0, 1, 0, 1] * 6)
REVIEWS = np.array([["good film", 4.0], ["bad film", 1.0], ["good book", 5.0], ["very bad", 2.0]] * 6, dtype=object)
TEXTS = REVIEWS[:, 0].tolist()
NUMBERS = np.random.default_rng(3).normal(size=(60, 3))
SIGNS = (NUMBERS[:, 0] > 0).astype(int)
GAPS = NUMBERS.copy()
GAPS[::5, 1] = np.nan


def loaded(estimator: Any) -> LoadedModel:
    return load(SklearnPickle(), {"model": pickle.dumps(estimator)})


def near(one: Any, other: Any) -> None:
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


def with_null(row: list[Any]) -> list[Any]:
    """A row as callers send it."""
    return [None if isinstance(value, float) and math.isnan(value) else value for value in row]


def same_as_the_library(estimator: Any, rows: Any, told: Any = None, model: LoadedModel | None = None) -> None:
    """The answer to rows with null for what is missing is the library's to the rows as it was fitted on them."""
    sent = [with_null(row) for row in np.asarray(rows).tolist()]
    found = answer(model or loaded(estimator), {"features": told or sent})

    if not isinstance(found["predictions"][0], float):
        assert estimator.predict(rows).tolist() == found["predictions"]
    else:
        near(estimator.predict(rows), found["predictions"])
    if "probabilities" in found:
        near(estimator.predict_proba(rows), found["probabilities"])


def refused(model: LoadedModel, data: Any) -> Any:
    """Where and what the refusal says."""
    with pytest.raises(InputInvalid) as caught:
        model.predict([Inputs(data, {})])
    assert answer(model, caught.value.data["example"])["predictions"]
    return caught.value.data["field"], str(caught.value)


def one_hot(**how: Any) -> OneHotEncoder:
    return OneHotEncoder(handle_unknown="ignore", **how)


def columns(first: Any = None, second: Any = None) -> ColumnTransformer:
    """The colour for one, both numbers for the other."""
    return ColumnTransformer([("c", first or one_hot(), [0]), ("n", second or StandardScaler(), [1, 2])])


def mixed() -> Any:
    return make_pipeline(columns(), LogisticRegression())


# --- null ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [None, NAN], ids=["None", "NaN"])
@pytest.mark.parametrize("encoder", [one_hot(), OneHotEncoder(), TargetEncoder()], ids=repr)
def test_null_is_what_the_encoder_learned_for_a_missing_value(gap: Any, encoder: Any) -> None:
    rows = np.array([["red", 1.0], ["blue", 1.0], [gap, 1.0]] * 10, dtype=object)
    both = ColumnTransformer([("c", encoder, [0]), ("n", SimpleImputer(), [1])])
    ours = make_pipeline(both, DecisionTreeClassifier(random_state=0)).fit(rows, ["x", "y", "none"] * 10)

    same_as_the_library(ours, rows[:3])


def test_null_where_the_encoder_learned_none_is_as_unknown_as_the_encoder_was_told() -> None:
    same_as_the_library(mixed().fit(ROWS, YES), np.array([[None, 1.0, 2.0]], dtype=object))

    strict = loaded(make_pipeline(columns(OneHotEncoder()), LogisticRegression()).fit(ROWS, YES))
    assert refused(strict, {"features": [None, 1, 2]})[0] == "features[0]"


NULLABLE: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "trees": (lambda: RandomForestClassifier(3, random_state=0), (0, 1, 2)),
    "scaled trees": (lambda: make_pipeline(StandardScaler(), HistGradientBoostingClassifier(max_iter=3)), (0, 1, 2)),
    "scaled, then filled": (lambda: make_pipeline(StandardScaler(), KNNImputer(), LogisticRegression()), (0, 1, 2)),
    "an indicator": (
        lambda: make_pipeline(
            FeatureUnion([("i", SimpleImputer()), ("m", MissingIndicator())]), DecisionTreeClassifier(random_state=0)
        ),
        (1,),  # the indicator refuses gaps where it was fitted on none
    ),
    "some columns filled": (
        lambda: make_pipeline(
            ColumnTransformer([("i", SimpleImputer(), [1]), ("s", StandardScaler(), [0, 2])]), LogisticRegression()
        ),
        (1,),
    ),
    "trees behind columns": (
        lambda: make_pipeline(
            ColumnTransformer([("s", StandardScaler(), [0])], remainder="passthrough"),
            HistGradientBoostingClassifier(max_iter=3),
        ),
        (0, 1, 2),
    ),
    "an unused column": (
        lambda: make_pipeline(ColumnTransformer([("i", KNNImputer(), [1])]), LogisticRegression()),
        (0, 1, 2),
    ),
    "filled twice": (
        lambda: make_pipeline(SimpleImputer(add_indicator=True), SimpleImputer(), LogisticRegression()),
        (0, 1, 2),
    ),
    "kept, then filled": (lambda: make_pipeline("passthrough", SimpleImputer(), LogisticRegression()), (0, 1, 2)),
    "made columns, then filled": (
        lambda: make_pipeline(
            ColumnTransformer([("k", "passthrough", [0]), ("s", StandardScaler(), [1, 2])]),
            SimpleImputer(),
            LogisticRegression(),
        ),
        (0, 1, 2),
    ),
    "made columns, then bags": (
        lambda: make_pipeline(
            ColumnTransformer([("k", "passthrough", [0]), ("s", StandardScaler(), [1, 2])]),
            BaggingClassifier(make_pipeline(SimpleImputer(), DecisionTreeClassifier()), 3, random_state=0),
        ),
        (0, 1, 2),
    ),
    "bags": (lambda: BaggingClassifier(DecisionTreeClassifier(), 3, random_state=0), (0, 1, 2)),
}


@pytest.mark.parametrize("name", NULLABLE)
def test_null_is_taken_where_the_model_runs_with_a_gap_and_nowhere_else(name: str) -> None:
    made, takes = NULLABLE[name]
    ours = made().fit(GAPS, SIGNS)
    model = loaded(ours)

    for place in range(3):
        row = [0.1, 0.2, 0.3]
        row[place] = NAN
        if place in takes:
            same_as_the_library(ours, np.array([row]), model=model)
        else:
            field, words = refused(model, {"features": with_null(row)})
            assert (field, "null where a number" in words) == (f"features[{place}]", True)


@pytest.mark.parametrize("value", [-1, 0.0])
def test_an_imputer_of_another_value_takes_no_null(value: float) -> None:
    rows = np.where(np.isnan(GAPS), value, GAPS)
    ours = make_pipeline(SimpleImputer(missing_values=value), LogisticRegression()).fit(rows, SIGNS)
    model = loaded(ours)

    same_as_the_library(ours, rows[:6], model=model)
    assert refused(model, {"features": [None, 1, 2]})[0] == "features[0]"


# --- columns by name ----------------------------------------------------------------------------------------------


def as_of_a_frame(part: ColumnTransformer, names: list[str]) -> None:
    """The transformer as it is when it was fitted on a frame with these columns."""
    part.feature_names_in_ = np.array(names, dtype=object)
    part.transformers_ = [
        (name, inner, names[where] if isinstance(where, int) else [names[place] for place in where])
        for name, inner, where in part.transformers_
    ]


LAYOUTS: dict[str, Callable[[], ColumnTransformer]] = {
    "in order": columns,
    "in another order": lambda: ColumnTransformer([("n", StandardScaler(), [2, 1]), ("c", one_hot(), [0])]),
    "the rest as it is": lambda: ColumnTransformer([("c", OrdinalEncoder(), [0])], remainder="passthrough"),
    "the rest through a step": lambda: ColumnTransformer([("c", one_hot(), [0])], remainder=StandardScaler()),
    "the rest dropped": lambda: ColumnTransformer([("n", StandardScaler(), [2])]),
    "one step for no column": lambda: ColumnTransformer([("c", one_hot(), [0]), ("e", OrdinalEncoder(), [])]),
    "one dropped by name": lambda: ColumnTransformer([("c", one_hot(), [0]), ("d", "drop", [1, 2])]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrapped", [False, True], ids=["pipeline", "search"])
def test_a_model_that_was_fitted_on_names_takes_rows_in_their_order(layout: str, *, wrapped: bool) -> None:
    inner = make_pipeline(LAYOUTS[layout](), LogisticRegression())
    ours = (GridSearchCV(inner, {"logisticregression__C": [1]}, cv=2) if wrapped else inner).fit(ROWS, KINDS)
    expected = ours.predict_proba(ROWS[:4])
    as_of_a_frame((ours.best_estimator_ if wrapped else ours)[0], ["colour", "width", "height"])
    model = loaded(ours)

    near(expected, answer(model, {"features": ROWS[:4].tolist()})["probabilities"])
    row = model.description.input_schema["properties"]["features"]["anyOf"][0]
    assert [column["title"] for column in row["prefixItems"]] == ["colour", "width", "height"]
    assert refused(model, {"features": ["red", 1.0]})[0] == "features"
    assert "colour" in refused(model, {"features": [[]]})[1]


def test_a_skops_file_of_such_a_model_is_the_same_model() -> None:
    ours = mixed().fit(ROWS, KINDS)
    as_of_a_frame(ours[0], ["colour", "width", "height"])
    files = [load(SkopsFile(), {"model": skops.io.dumps(ours)}), loaded(ours)]

    one, other = (model.description for model in files)
    assert (one.input_schema, one.example) == (other.input_schema, other.example)
    sent = {"features": ROWS[:4].tolist()}
    assert answer(files[0], sent) == answer(files[1], sent)


def test_names_inside_and_frames_between_the_steps_need_no_frame() -> None:
    ours = make_pipeline(
        ColumnTransformer([("o", OrdinalEncoder(), [0])], remainder="passthrough"),
        ColumnTransformer([("s", StandardScaler(), [1, 2])], remainder="passthrough"),
        LogisticRegression(),
    ).fit(ROWS, KINDS)
    expected = ours.predict_proba(ROWS[:4])
    as_of_a_frame(ours[0], ["colour", "width", "height"])
    as_of_a_frame(ours[1], ["o__colour", "remainder__width", "remainder__height"])
    ours.set_output(transform="pandas")

    near(expected, answer(loaded(ours), {"features": ROWS[:4].tolist()})["probabilities"])


def test_hostile_names_are_told_in_ascii_and_cut() -> None:
    ours = mixed().fit(ROWS, YES)
    ours[0].feature_names_in_ = np.array(["\x1b[2J\ud800", "w" * 5000, "h"], dtype=object)
    model = loaded(ours)

    row = model.description.input_schema["properties"]["features"]["anyOf"][0]
    assert [column["title"] for column in row["prefixItems"]] == ["\\x1b[2J\\ud800", "w" * 80, "h"]


# --- texts --------------------------------------------------------------------------------------------------------


def filled() -> Any:
    return make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder())


MIXED: dict[str, Callable[[], Any]] = {
    "an encoder behind an imputer": lambda: make_pipeline(columns(filled()), LogisticRegression()),
    "an imputer for all": lambda: make_pipeline(
        SimpleImputer(strategy="most_frequent"), FunctionTransformer(), columns(), LogisticRegression()
    ),
    "columns in columns": lambda: make_pipeline(
        ColumnTransformer([("a", columns(), [0, 1, 2])], remainder="drop"), LogisticRegression()
    ),
    "a union": lambda: make_pipeline(FeatureUnion([("a", columns()), ("b", columns())]), LogisticRegression()),
    "calibrated": lambda: CalibratedClassifierCV(make_pipeline(columns(), LinearSVC()), cv=2),
    "calibrated when fitted": lambda: CalibratedClassifierCV(FrozenEstimator(mixed().fit(ROWS, YES))),
    "voting": lambda: VotingClassifier([("a", mixed()), ("b", mixed())], voting="soft"),
    "stacking": lambda: StackingClassifier([("a", mixed())], cv=2),
    "one of two": lambda: OneVsRestClassifier(mixed()),
    "a threshold": lambda: TunedThresholdClassifierCV(mixed(), cv=2),
    "a search of votes": lambda: GridSearchCV(VotingClassifier([("a", mixed())]), {"a__memory": [None]}, cv=2),
    "a transformed target": lambda: TransformedTargetRegressor(
        make_pipeline(columns(), Ridge()), func=np.log1p, inverse_func=np.expm1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_texts_are_taken_wherever_a_part_reads_them(name: str) -> None:
    ours = MIXED[name]().fit(ROWS, YES)
    model = loaded(ours)

    same_as_the_library(ours, ROWS[:4], model=model)
    assert answer(model, model.description.example)["predictions"]
    assert refused(model, {"features": ["red", "wide", 1]})[0] == "features[1]"
    assert refused(model, {"features": [[1, 2, 3]]})[0] == "features[0][0]"


WORDS: dict[str, Callable[[], Any]] = {
    "calibrated": lambda: CalibratedClassifierCV(make_pipeline(TfidfVectorizer(), LinearSVC()), cv=2),
    "voting": lambda: VotingClassifier([("a", make_pipeline(TfidfVectorizer(), LogisticRegression()))], voting="soft"),
    "one against the rest": lambda: OneVsRestClassifier(make_pipeline(TfidfVectorizer(), LogisticRegression())),
    "behind a step that does nothing": lambda: make_pipeline("passthrough", TfidfVectorizer(), LogisticRegression()),
}


@pytest.mark.parametrize("name", WORDS)
def test_an_estimator_of_text_pipelines_takes_texts(name: str) -> None:
    ours = WORDS[name]().fit(TEXTS, YES)
    model = loaded(ours)

    near(ours.predict_proba(["a good one", "bad"]), answer(model, {"text": ["a good one", "bad"]})["probabilities"])
    assert model.description.task == "text-classification"
    assert refused(model, {"features": [1.0]})[0] == "text"


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("named", [False, True], ids=["positions", "names"])
def test_a_text_column_stands_beside_numbers(order: int, *, named: bool) -> None:
    parts: list[Any] = [("t", TfidfVectorizer(), 0), ("n", StandardScaler(), [1])]
    ours = make_pipeline(ColumnTransformer(parts[::order]), LogisticRegression()).fit(REVIEWS, YES)
    expected = ours.predict_proba(REVIEWS[:4])
    if named:
        as_of_a_frame(ours[0], ["review", "stars"])
    model = loaded(ours)

    near(expected, answer(model, {"features": REVIEWS[:4].tolist()})["probabilities"])
    assert model.description.task == "classification"
    assert refused(model, {"features": [3, 1.0]})[0] == "features[0]"
    assert refused(model, {"features": ["x" * 100_001, 1.0]})[0] == "features[0]"
    assert refused(model, {"text": "good film"})[0] == "features"


# --- what callers get wrong ---------------------------------------------------------------------------------------


def test_a_value_that_the_encoder_refuses_is_told_to_the_caller() -> None:
    model = loaded(make_pipeline(columns(OneHotEncoder()), LogisticRegression()).fit(ROWS, YES))

    field, words = refused(model, {"features": [["red", 1, 2], ["green", 1, 2]]})
    assert (field, "one of 'blue', 'red' is expected" in words) == ("features[1][0]", True)
    assert refused(model, {"features": ["", 1, 2]})[0] == "features[0]"
    assert refused(model, {"features": ["red", True, 2]})[0] == "features[1]"
    assert refused(model, {"features": ["red", "1", 2]})[0] == "features[1]"
    column = model.description.input_schema["properties"]["features"]["anyOf"][0]["prefixItems"][0]
    assert column == {"type": "string", "enum": ["blue", "red"]}


@pytest.mark.parametrize("handled", ["ignore", "infrequent_if_exist"])
def test_an_unknown_text_is_answered_where_the_encoder_takes_it(handled: str) -> None:
    ours = make_pipeline(columns(OneHotEncoder(handle_unknown=handled)), LogisticRegression()).fit(ROWS, YES)

    same_as_the_library(ours, np.array([["green", 1.0, 2.0]], dtype=object))


def test_a_column_that_is_encoded_and_computed_with_holds_the_numbers_that_are_known() -> None:
    both = ColumnTransformer([("c", OneHotEncoder(), [0]), ("n", StandardScaler(), [0, 1])])
    rows = np.array([[3, 0.5], [5, 1.5], [7, 2.5], [5, 0.1]] * 5)
    ours = make_pipeline(both, LogisticRegression()).fit(rows, [0, 1, 2, 1] * 5)
    model = loaded(ours)

    same_as_the_library(ours, rows[:4], model=model)
    assert refused(model, {"features": [4, 0.5]})[0] == "features[0]"


def test_categories_that_are_numbers_and_truth_values() -> None:
    rows = np.array([[3, True], [5, False], [3, False], [5, True]] * 5, dtype=object)
    ours = make_pipeline(OrdinalEncoder(), DecisionTreeClassifier(random_state=0)).fit(rows, [0, 1, 2, 3] * 5)
    model = loaded(ours)

    same_as_the_library(ours, rows[:4], model=model)
    same_as_the_library(ours, rows[:4], told=[[3.0, 1], [5.0, 0], [3, 0.0], [5, 1.0]], model=model)
    assert refused(model, {"features": [4, True]})[0] == "features[0]"
    assert refused(model, {"features": [True, True]})[0] == "features[0]"
    assert refused(model, {"features": ["3", True]})[0] == "features[0]"


def test_what_an_imputer_takes_for_missing_may_be_sent_to_a_strict_encoder() -> None:
    rows = ROWS.copy()
    rows[::6, 0] = "?"
    imputer = SimpleImputer(missing_values="?", strategy="most_frequent")
    ours = make_pipeline(columns(make_pipeline(imputer, OneHotEncoder())), LogisticRegression()).fit(rows, YES)
    model = loaded(ours)

    same_as_the_library(ours, rows[:8], model=model)
    assert refused(model, {"features": ["!", 1, 2]})[0] == "features[0]"


def test_a_dropped_column_holds_whatever_it_likes() -> None:
    ours = make_pipeline(ColumnTransformer([("n", StandardScaler(), [1, 2])]), LogisticRegression()).fit(ROWS, YES)
    model = loaded(ours)

    for value in ("any", 7, False, None):
        near(ours.predict_proba(ROWS[:1]), answer(model, {"features": [value, 1.0, 3.0]})["probabilities"])
    assert refused(model, {"features": [[1], 1.0, 3.0]})[0] == "features[0]"


def test_many_columns_are_told_by_their_kind_alone() -> None:
    wide = np.array([[f"{place}{row % 2}{'x' * 200}" for place in range(400)] for row in range(6)], dtype=object)
    model = loaded(make_pipeline(OneHotEncoder(), LogisticRegression()).fit(wide, [0, 1] * 3))

    row = model.description.input_schema["properties"]["features"]["anyOf"][0]
    text = {"type": "string", "maxLength": 100_000}
    assert row == {"type": "array", "items": text, "minItems": 400, "maxItems": 400}
    assert answer(model, model.description.example)["predictions"]


def test_mixed_rows_get_the_same_alone_and_together_and_a_wrong_one_spoils_no_other() -> None:
    rows = [["red", 1.0, 2], ["green", 2, None], [None, 4.0, 1.0], ["blue", None, 1e30]]
    ours = make_pipeline(columns(filled_or_unknown(), SimpleImputer()), LogisticRegression()).fit(ROWS, YES)
    model = loaded(ours)
    callers = [Inputs({"features": row}, {}) for row in rows]
    alone = [model.predict([caller])[0].result for caller in callers]

    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 3, 0, 2, 2]):
        together = model.predict([callers[place] for place in order])
        for place, found in zip(order, together, strict=True):
            near(alone[place]["probabilities"], found.result["probabilities"])
    with pytest.raises(InputInvalid):
        model.predict([callers[0], Inputs({"features": ["red", "x", 1]}, {})])
    assert model.predict([callers[0]])[0].result == alone[0]


def filled_or_unknown() -> Any:
    return make_pipeline(SimpleImputer(strategy="constant", fill_value="none"), one_hot())


# --- answers and refusals -----------------------------------------------------------------------------------------


def test_what_takes_no_rows_is_refused_when_it_is_loaded() -> None:
    made = make_pipeline(DictVectorizer(), LogisticRegression()).fit([{"a": 1}, {"a": 2}], [0, 1])

    with pytest.raises(UnsupportedModel, match="does not run on its own kind of input: AttributeError"):
        loaded(made)
    with pytest.raises(UnsupportedModel, match="not fitted"):
        loaded(LogisticRegression())


def test_an_answer_that_json_does_not_have_is_refused_when_the_model_is_loaded() -> None:
    ours = LogisticRegression().fit(NUMBERS, SIGNS)
    ours.classes_ = np.array([b"a", b"b"])

    with pytest.raises(UnsupportedModel, match="bytes is not JSON"):
        loaded(ours)


def test_isotonic_regression_takes_one_number() -> None:
    ours = IsotonicRegression(out_of_bounds="clip").fit(NUMBERS[:, 0], NUMBERS[:, 1])
    model = loaded(ours)

    same_as_the_library(ours, NUMBERS[:5, :1], model=model)
    assert answer(model, model.description.example)["predictions"]
    assert refused(model, {"features": [1.0, 2.0]})[0] == "features"


def test_columns_that_were_chosen_by_their_kind_load() -> None:
    chosen = make_column_selector(dtype_include=np.number), make_column_selector(dtype_exclude=np.number)
    columns_of_kinds = columns()
    ours = make_pipeline(columns_of_kinds, LogisticRegression()).fit(ROWS, KINDS)
    columns_of_kinds.transformers = [("c", one_hot(), chosen[1]), ("n", StandardScaler(), chosen[0])]
    as_of_a_frame(columns_of_kinds, ["colour", "width", "height"])

    assert answer(loaded(ours), {"features": ROWS[:4].tolist()})["predictions"] == KINDS[:4].tolist()


def test_an_example_is_found_where_zeros_are_none() -> None:
    ours = make_pipeline(FunctionTransformer(np.log), LogisticRegression()).fit(np.exp(NUMBERS), SIGNS)
    model = loaded(ours)

    assert model.description.example == {"features": [1.0, 1.0, 1.0]}
    assert answer(model, model.description.example)["predictions"] == ours.predict([[1.0, 1.0, 1.0]]).tolist()


@pytest.mark.parametrize("unknown", ["error", "ignore"])
def test_a_column_that_is_text_and_category_at_once_has_an_example_that_works(unknown: str) -> None:
    rows = np.array([["good film"], ["bad film"], ["good book"], ["bad book"]], dtype=object)
    encoder = OneHotEncoder(handle_unknown=unknown)
    parts = ColumnTransformer([("t", TfidfVectorizer(), 0), ("c", encoder, [0])])
    ours = make_pipeline(parts, LogisticRegression()).fit(rows, [1, 0, 1, 0])
    model = loaded(ours)

    assert answer(model, model.description.example)["predictions"]
    assert answer(model, {"features": rows.tolist()})["predictions"] == ours.predict(rows).tolist()
    new = {"features": ["a new film"]}
    if unknown == "ignore":
        assert answer(model, new)["predictions"]
    else:
        assert refused(model, new)[0] == "features[0]"
