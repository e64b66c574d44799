"""scikit-learn models: ordinary ones load from every container and answer exactly as the library does."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from functools import cache
from typing import Any

import joblib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import BaseEstimator
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import KMeans
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.ensemble import (
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
    StackingClassifier,
    VotingClassifier,
)
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer, TfidfVectorizer
from sklearn.feature_selection import SelectKBest, f_classif
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, WhiteKernel
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression, SGDClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.multioutput import MultiOutputClassifier
from sklearn.naive_bayes import GaussianNB, MultinomialNB
from sklearn.neighbors import KNeighborsClassifier, RadiusNeighborsRegressor
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.tree import DecisionTreeClassifier

from divault.errors import InputInvalid
from divault.models.base import Answer, Inputs, LoadedModel
from divault.models.sklearn import SklearnPickle
from tests.memory_models import answer, as_json, load
from tests.schemas import mismatch

RANDOM = np.random.default_rng(20)
X = RANDOM.normal(size=(80, 4))
Y = (X[:, 0] + X[:, 1] > 0).astype(int)
NAMES = np.where(Y, "good", "bad")
NUMBERS = X[:, 0] * 2 + X[:, 1]
TEXTS = ["a good film", "a bad film", "good book", "very bad book", "not good", "the bad one"] * 4
MOODS = ["good" if "good" in text else "bad" for text in TEXTS]

NUMERIC: dict[str, Callable[[], BaseEstimator]] = {
    "logistic": lambda: LogisticRegression().fit(X, Y),
    "logistic of names": lambda: LogisticRegression().fit(X, NAMES),
    "logistic of objects": lambda: LogisticRegression().fit(X, NAMES.astype(object)),
    "linear": lambda: LinearRegression().fit(X, NUMBERS),
    "linear of two": lambda: LinearRegression().fit(X, np.c_[NUMBERS, NUMBERS]),
    "sgd": lambda: SGDClassifier(random_state=0).fit(X, Y),
    "tree": lambda: DecisionTreeClassifier(random_state=0).fit(X, Y),
    "forest": lambda: RandomForestClassifier(4, random_state=0).fit(X, NAMES),
    "forest of numbers": lambda: RandomForestRegressor(4, random_state=0).fit(X, NUMBERS),
    "boosting": lambda: GradientBoostingClassifier(n_estimators=4, random_state=0).fit(X, Y),
    "histogram boosting": lambda: HistGradientBoostingClassifier(max_iter=4).fit(X, Y),
    "svc": lambda: SVC().fit(X, Y),
    "linear svc": lambda: make_pipeline(StandardScaler(), LinearSVC()).fit(X, Y),
    "neighbours": lambda: KNeighborsClassifier(3).fit(X, Y),
    "bayes": lambda: GaussianNB().fit(X, Y),
    "network": lambda: MLPClassifier((4,), max_iter=50, tol=1e9, random_state=0).fit(X, Y),
    "process": lambda: GaussianProcessRegressor(RBF() + WhiteKernel(), optimizer=None).fit(X, NUMBERS),
    "k-means": lambda: KMeans(3, n_init=1, random_state=0).fit(X),
    "outliers": lambda: IsolationForest(n_estimators=4, random_state=0).fit(X),
    "pipeline": lambda: make_pipeline(StandardScaler(), PCA(2), LogisticRegression()).fit(X, Y),
    "selection": lambda: make_pipeline(SelectKBest(f_classif, k=2), GaussianNB()).fit(X, Y),
    "a function of numpy": lambda: make_pipeline(FunctionTransformer(np.square), GaussianNB()).fit(X, Y),
    "search": lambda: GridSearchCV(LogisticRegression(), {"C": [0.1, 1]}, cv=2, scoring="accuracy").fit(X, Y),
    "calibrated": lambda: CalibratedClassifierCV(GaussianNB(), cv=2).fit(X, Y),
    "voting": lambda: VotingClassifier([("a", GaussianNB()), ("b", LogisticRegression())], voting="soft").fit(X, Y),
    "stacking": lambda: StackingClassifier([("a", GaussianNB())], LogisticRegression(), cv=2).fit(X, Y),
    "outputs of two and three classes": lambda: RandomForestClassifier(4, random_state=0).fit(
        X, np.c_[Y, np.arange(len(Y)) % 3]
    ),
    "several outputs": lambda: MultiOutputClassifier(GaussianNB()).fit(X, np.c_[Y, 1 - Y]),
}  # fmt: skip
TEXTUAL: dict[str, Callable[[], BaseEstimator]] = {
    "tf-idf": lambda: make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(TEXTS, MOODS),
    "n-grams": lambda: make_pipeline(CountVectorizer(ngram_range=(1, 2), stop_words="english"), MultinomialNB()).fit(
        TEXTS, MOODS
    ),
    "hashing": lambda: make_pipeline(HashingVectorizer(n_features=64), SGDClassifier(random_state=0)).fit(TEXTS, MOODS),
    "union": lambda: make_pipeline(
        FeatureUnion([("word", TfidfVectorizer()), ("char", TfidfVectorizer(analyzer="char", ngram_range=(2, 3)))]),
        LogisticRegression(),
    ).fit(TEXTS, MOODS),
}


@cache
def fitted(name: str) -> Any:
    return (NUMERIC | TEXTUAL)[name]()


def joblib_file(estimator: Any, compress: Any = 0) -> bytes:
    out = io.BytesIO()
    joblib.dump(estimator, out, compress=compress)
    return out.getvalue()


def loaded(data: bytes) -> LoadedModel:
    return load(SklearnPickle(), {"model": data})


def expected(estimator: Any, rows: Any) -> dict[str, Any]:
    """What the library itself says, as lists."""
    found = {"predictions": estimator.predict(rows).tolist()}
    if hasattr(estimator, "predict_proba"):
        shares = estimator.predict_proba(rows)
        found["probabilities"] = [s.tolist() for s in shares] if isinstance(shares, list) else shares.tolist()
    return found


@pytest.mark.parametrize("name", NUMERIC)
def test_answers_equal_the_library(name: str) -> None:
    model = loaded(joblib_file(fitted(name)))
    rows = X[:5].tolist()

    result = answer(model, {"features": rows})

    assert expected(fitted(name), X[:5]) == {key: value for key, value in result.items() if key != "classes"}
    assert answer(model, {"inputs": rows}) == result
    assert answer(model, model.description.example)["predictions"]


@pytest.mark.parametrize("name", TEXTUAL)
def test_text_pipelines_take_texts(name: str) -> None:
    model = loaded(joblib_file(fitted(name)))

    result = answer(model, {"text": ["a good one", "bad book"]})
    single = answer(model, {"text": "a good one"})

    assert expected(fitted(name), ["a good one", "bad book"])["predictions"] == result["predictions"]
    assert single["predictions"] == result["predictions"][:1], "one text has a list of one prediction too"
    assert result["classes"] == ["bad", "good"]
    assert model.description.task == "text-classification"
    assert answer(model, model.description.example)["predictions"]


@pytest.mark.parametrize("compress", [0, 1, ("zlib", 9), ("gzip", 3), ("bz2", 3), ("xz", 3), ("lzma", 3)], ids=str)
@pytest.mark.parametrize("name", ["forest", "tf-idf", "histogram boosting"])
def test_joblib_files_load_in_every_compression(name: str, compress: Any) -> None:
    model = loaded(joblib_file(fitted(name), compress))

    rows = TEXTS[:3] if name in TEXTUAL else X[:3].tolist()
    key = "text" if name in TEXTUAL else "features"
    assert answer(model, {key: rows})["predictions"] == fitted(name).predict(rows).tolist()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["forest", "svc", "histogram boosting", "logistic of objects", "n-grams"])
def test_pickles_load_in_every_protocol(name: str, protocol: int) -> None:
    model = loaded(pickle.dumps(fitted(name), protocol=protocol))

    rows = TEXTS[:3] if name in TEXTUAL else X[:3].tolist()
    key = "text" if name in TEXTUAL else "features"
    assert answer(model, {key: rows})["predictions"] == fitted(name).predict(rows).tolist()


def with_colours() -> Any:
    rows = np.array([["red", 1.0], ["blue", 2.0], ["red", 3.0], ["blue", 4.0]], dtype=object)
    columns = ColumnTransformer([("c", OneHotEncoder(handle_unknown="ignore"), [0]), ("n", StandardScaler(), [1])])
    return make_pipeline(columns, LogisticRegression()).fit(rows, [0, 1, 0, 1])


def test_columns_of_texts_and_numbers() -> None:
    """A ColumnTransformer by position: texts beside numbers, unknown texts as the encoder was told."""
    ours = with_colours()
    model = loaded(joblib_file(ours))

    result = answer(model, {"features": [["red", 2.5], ["green", 1]]})

    assert result["predictions"] == ours.predict(np.array([["red", 2.5], ["green", 1]], dtype=object)).tolist()
    with pytest.raises(InputInvalid):
        answer(loaded(joblib_file(fitted("logistic"))), {"features": [["red", 1, 2, 3]]})


def test_null_is_a_missing_value_where_the_model_takes_them() -> None:
    ours = make_pipeline(SimpleImputer(), LogisticRegression()).fit(X, Y)
    model = loaded(joblib_file(ours))

    result = answer(model, {"features": [None, 1.0, 2.0, 3.0]})

    assert result["predictions"] == ours.predict([[np.nan, 1.0, 2.0, 3.0]]).tolist()
    with pytest.raises(InputInvalid, match="null where a number"):
        answer(loaded(joblib_file(fitted("logistic"))), {"features": [None, 1.0, 2.0, 3.0]})


@pytest.mark.parametrize(("scalar", "plain"), [(np.float64(2.5), 2.5), (np.bool_(True), True), (np.int64(3), 3)])
def test_classes_that_are_scalars_of_numpy_are_answered_as_plain_values(scalar: Any, plain: Any) -> None:
    """Lists of `np.str_`, as the names of a data set are, become arrays of objects with those in them."""
    ours = LogisticRegression().fit(X, Y)
    ours.classes_ = np.array([np.str_("a"), scalar], dtype=object)
    model = loaded(joblib_file(ours))

    result = answer(model, {"features": X[:9].tolist()})

    assert result["classes"] == ["a", plain]
    assert ours.predict(X[:9]).tolist() == result["predictions"]
    assert {type(value) for value in [*result["classes"], *result["predictions"]]} == {str, type(plain)}


def test_a_description_says_what_goes_in_and_comes_out() -> None:
    found = loaded(joblib_file(fitted("logistic of names"))).description

    assert (found.format, found.task, found.device) == ("sklearn", "classification", "cpu")
    row = found.input_schema["properties"]["features"]["anyOf"][0]
    assert (row["minItems"], row["maxItems"]) == (4, 4)
    assert found.output_schema["properties"]["classes"]["const"] == ["bad", "good"]
    assert set(found.runtime) == {"adapter", "arch", "determinism", "device", "dtype", "libraries", "threads"}
    assert set(found.runtime["libraries"]) == {"divault", "python", "numpy", "scipy", "scikit-learn"}


@pytest.mark.parametrize("name", NUMERIC | TEXTUAL)
def test_an_answer_is_what_the_description_says(name: str) -> None:
    model = loaded(joblib_file(fitted(name)))
    data = {"features": X[:7].tolist()} if name in NUMERIC else {"text": TEXTS}

    assert mismatch(answer(model, data), model.description.output_schema) == ""
    assert mismatch(model.description.example, model.description.input_schema) == ""
    assert answer(model, model.description.example)["predictions"]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("logistic", {"predictions": "integer", "probabilities": "array", "classes": "integer"}),
        ("logistic of names", {"predictions": "string", "probabilities": "array", "classes": "string"}),
        ("linear", {"predictions": "number"}),
        ("linear of two", {"predictions": "array"}),
    ],
)
def test_a_description_says_of_what_kind_the_answers_are(name: str, kinds: dict[str, str]) -> None:
    told = loaded(joblib_file(fitted(name))).description.output_schema["properties"]

    assert {part: schema["items"]["type"] for part, schema in told.items()} == kinds


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_an_answer_that_was_whole_for_the_example_is_promised_as_a_number() -> None:
    """Far from all rows, which the example is, this one answers the least of all whole numbers."""
    rows = np.arange(100.0, 120.0)[:, None]
    model = loaded(joblib_file(RadiusNeighborsRegressor(1.5).fit(rows, np.arange(20))))

    result = answer(model, {"features": [[100.0], [101.2]]})

    assert result["predictions"] == [0.5, 1.0]
    assert model.description.output_schema["properties"]["predictions"]["items"] == {"type": "number"}


BOUNDED: dict[str, tuple[bool, list[Any]]] = {
    "the largest numbers": (False, [3.4e38, -3.4e38, 0, 0]),
    "too large a number": (False, [1e39, 0, 0, 0]),
    "too small a number": (False, [[0, 0, 0, -1e39]]),
    "the most rows": (False, [[0, 0, 0, 0]] * 65_536),
    "too many rows": (False, [[0, 0, 0, 0]] * 65_537),
    "the longest text": (True, ["x" * 100_000, 1e38]),
    "too long a text": (True, ["x" * 100_001, 1.0]),
    "too large a number beside a text": (True, ["x", 1e39]),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_the_schema_of_an_input_has_the_bounds_that_are_kept(name: str) -> None:
    texts, features = BOUNDED[name]
    model = loaded(joblib_file(with_colours() if texts else fitted("logistic")))

    differs = mismatch({"features": features}, model.description.input_schema)

    assert isinstance(outcome(model, {"features": features}), InputInvalid) == name.startswith("too") == (differs != "")
    if texts:
        columns = model.description.input_schema["properties"]["features"]["anyOf"][0]["prefixItems"]
        assert (columns[0]["maxLength"], columns[1]["maximum"]) == (100_000, 3.4e38)


def test_labels_of_several_kinds_are_promised_nothing() -> None:
    ours = LogisticRegression().fit(X, Y)
    ours.classes_ = np.array(["a", 3], dtype=object)
    model = loaded(joblib_file(ours))

    assert model.description.output_schema["properties"]["predictions"] == {"type": "array"}
    assert mismatch(answer(model, {"features": X[:9].tolist()}), model.description.output_schema) == ""


def test_a_manifest_and_a_readme_may_lie_beside_the_model() -> None:
    files = {
        "m/model.joblib": joblib_file(fitted("tree")),
        "m/divault.json": as_json({"name": "x"}),
        "m/README.md": b"#",
    }

    assert answer(load(SklearnPickle(), files), {"features": X[0].tolist()})["predictions"] == [int(Y[0])]


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({}, "features"),
        ([1, 2], "input_data"),
        ("text", "input_data"),
        ({"text": "x"}, "features"),
        ({"tensor": [1, 2, 3, 4]}, "features"),
        ({"features": [1, 2, 3, 4], "inputs": [1, 2, 3, 4]}, "features"),
        ({"features": [1, 2, 3, 4], "more": 1}, "more"),
        ({"features": []}, "features"),
        ({"features": [[]]}, "features[0]"),
        ({"features": 1}, "features"),
        ({"features": {"a": 1}}, "features"),
        ({"features": [1, 2, 3]}, "features"),
        ({"features": [1, 2, 3, 4, 5]}, "features"),
        ({"features": [[1, 2, 3, 4], [1, 2, 3]]}, "features[1]"),
        ({"features": [[1, 2, 3, 4], 5]}, "features[1]"),
        ({"features": [1, 2, 3, "4"]}, "features[3]"),
        ({"features": [1, 2, 3, True]}, "features[3]"),
        ({"features": [1, 2, 3, [4]]}, "features[3]"),
        ({"features": [[1, 2, 3, 1e39]]}, "features[0][3]"),
        ({"features": [1, 2, 3, 10**400]}, "features[3]"),
    ],
)
def test_an_input_that_the_model_does_not_take_is_named(data: Any, field: str) -> None:
    model = loaded(joblib_file(fitted("tree")))

    with pytest.raises(InputInvalid) as caught:
        model.predict([Inputs(data, {})])

    assert caught.value.data["field"] == field
    assert "4 finite numbers" in caught.value.data["expected"]
    assert answer(model, caught.value.data["example"])["predictions"]


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"text": ""}, "text"),
        ({"text": []}, "text"),
        ({"text": 1}, "text"),
        ({"text": ["a", None]}, "text[1]"),
        ({"text": "x" * 100_001}, "text"),
        ({"text": ["x"] * 1025}, "text"),
        ({"features": [1]}, "text"),
    ],
)
def test_a_text_that_the_model_does_not_take_is_named(data: Any, field: str) -> None:
    model = loaded(joblib_file(fitted("tf-idf")))

    with pytest.raises(InputInvalid) as caught:
        model.predict([Inputs(data, {})])

    assert caught.value.data["field"] == field


def test_parameters_are_refused() -> None:
    with pytest.raises(InputInvalid) as caught:
        loaded(joblib_file(fitted("tree"))).predict([Inputs({"features": [1, 2, 3, 4]}, {"top": 1})])

    assert caught.value.data["field"] == "parameters"


leaves = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3)
)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4), max_leaves=8)
members = st.sampled_from(["features", "text", "inputs", "x"])


@given(values | st.dictionaries(members, values, max_size=2))
@settings(max_examples=200, deadline=None)
def test_any_json_is_an_answer_or_input_invalid(data: Any) -> None:
    for model in fuzzed():
        found = outcome(model, data)
        if isinstance(found, InputInvalid):
            assert set(found.data) == {"field", "expected", "example"}
        else:
            assert len(found.result["predictions"]) == found.rows >= 1


def outcome(model: LoadedModel, data: Any) -> Answer | InputInvalid:
    try:
        return model.predict([Inputs(data, {})])[0]
    except InputInvalid as err:
        return err


@cache
def fuzzed() -> tuple[LoadedModel, ...]:
    return tuple(loaded(joblib_file(fitted(name))) for name in ("logistic", "tree", "tf-idf"))


@given(st.lists(st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_any_rows_are_answered_as_the_library_answers(rows: list[list[float]]) -> None:
    result = fuzzed()[0].predict([Inputs({"features": rows}, {})])[0].result

    assert expected(fitted("logistic"), rows) == {key: value for key, value in result.items() if key != "classes"}
