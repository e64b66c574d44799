"""skops files: the same model as its pickle; types of strangers refused by name; forged trees and bombs refused."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import skops.io
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import BaseEstimator
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils import check_array

from divault import models
from divault.errors import InputInvalid, UnsupportedModel
from divault.models.base import Inputs, LoadedModel
from divault.models.sklearn import SklearnPickle
from divault.models.skops import SkopsFile
from tests.memory_models import answer, load, memory_files

RANDOM = np.random.default_rng(20)
X = RANDOM.normal(size=(60, 3))
Y = np.where(X[:, 0] > 0, "up", "down")


class Stranger(BaseEstimator):
    """An estimator that is not scikit-learn's own."""

    def predict(self, rows: Any) -> Any:
        return rows


def stranger(rows: Any) -> Any:
    return rows


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load(SkopsFile(), {"model.skops": skops.io.dumps(pipeline())})


def pipeline() -> Any:
    return make_pipeline(StandardScaler(), RandomForestClassifier(3, random_state=0)).fit(X, Y)


def test_it_answers_as_the_library_and_as_its_pickle(model: LoadedModel) -> None:
    rows = {"features": X[:9].tolist()}

    result = answer(model, rows)

    assert result["predictions"] == pipeline().predict(X[:9]).tolist()
    assert result == answer(load(SklearnPickle(), {"m": pickle.dumps(pipeline())}), rows)
    assert model.description.runtime["adapter"] == "skops"
    assert "skops" in model.description.runtime["libraries"]
    assert answer(model, model.description.example)["classes"] == ["down", "up"]


def test_it_is_recognised_among_all_formats_beside_a_text_for_people() -> None:
    with memory_files({"a/m": skops.io.dumps(pipeline()), "a/README.md": b"hello"}) as files:
        assert models.load(files).description.format == "sklearn"


def test_texts_and_compressed_files_load() -> None:
    texts = ["good film", "bad film"] * 5
    words = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts, ["+", "-"] * 5)

    loaded = load(SkopsFile(), {"m": skops.io.dumps(words, compression=zipfile.ZIP_DEFLATED)})

    assert answer(loaded, {"text": "a good one"})["predictions"] == ["+"]


@pytest.mark.parametrize(
    "wrong",
    [[1, 2, 3], {"features": []}, {"features": [1, 2]}, {"features": ["a", 1, 2]}, {"features": [[1e39, 0, 0]]}],
)
def test_an_input_that_does_not_fit_is_told(model: LoadedModel, wrong: Any) -> None:
    with pytest.raises(InputInvalid):
        model.predict([Inputs(wrong, {})])


HOSTILE: dict[str, Callable[[], Any]] = {
    "tests.test_model_skops.Stranger": Stranger,
    "tests.test_model_skops.stranger": lambda: make_pipeline(FunctionTransformer(stranger), LogisticRegression()),
    "builtins.eval": lambda: make_pipeline(FunctionTransformer(eval), LogisticRegression()),
    "posix.system": lambda: make_pipeline(FunctionTransformer(__import__("posix").system), LogisticRegression()),
    "functools.partial": lambda: FunctionTransformer(functools.partial(print, 1)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_type_that_is_not_on_the_list_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        load(SkopsFile(), {"m": skops.io.dumps(HOSTILE[name]())})

    assert "the skops file needs" in str(caught.value)
    assert name.rpartition(".")[2] in caught.value.data["seen"] or "print" in caught.value.data["seen"]


def altered(data: bytes, change: Callable[[str], str]) -> bytes:
    """The file with another schema."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.namelist():
            content = old.read(entry)
            new.writestr(entry, change(content.decode()) if entry == "schema.json" else content)
    return out.getvalue()


@pytest.mark.parametrize("loader", ["MethodNode", "PartialNode", "NoNode", "OperatorFuncNode"])
def test_a_forged_schema_is_refused(loader: str) -> None:
    data = skops.io.dumps(LogisticRegression().fit(X, Y))

    with pytest.raises(UnsupportedModel):
        load(SkopsFile(), {"m": altered(data, lambda text: text.replace('"ObjectNode"', f'"{loader}"', 1))})


def test_a_function_that_a_partial_names_can_not_be_had_elsewhere_in_the_file() -> None:
    partial = functools.partial(check_array, dtype=[np.float64], ensure_all_finite=False)
    steps = [FunctionTransformer(partial), FunctionTransformer(np.exp)]
    ours = make_pipeline(*steps, LogisticRegression()).fit(X, Y)
    assert load(SkopsFile(), {"m": skops.io.dumps(ours)})

    def change(text: str) -> str:
        """The second step's function is a reference to the one within the first step's partial."""
        schema = json.loads(text)
        first, second = (state for state in states(schema) if state.get("__class__") == "FunctionTransformer")
        named = first["content"]["content"]["func"]["content"]["func"]
        second["content"]["content"]["func"] = {**named, "__loader__": "CachedNode"}
        return json.dumps(schema)

    with pytest.raises(UnsupportedModel, match="unknown object id"):
        load(SkopsFile(), {"m": altered(skops.io.dumps(ours), change)})


def states(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a schema, in order."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from states(inner)


@pytest.mark.parametrize(
    ("module", "name"), [("os", "system"), ("sklearn.datasets", "fetch_openml"), ("joblib", "load")]
)
def test_another_class_in_the_schema_is_refused(module: str, name: str) -> None:
    def change(text: str) -> str:
        schema = json.loads(text)
        schema["__module__"], schema["__class__"] = module, name
        return json.dumps(schema)

    with pytest.raises(UnsupportedModel, match=name):
        load(SkopsFile(), {"m": altered(skops.io.dumps(LogisticRegression().fit(X, Y)), change)})


@pytest.mark.parametrize(("field", "value"), [("left_child", 99_999), ("right_child", 99_999), ("feature", 77)])
@pytest.mark.parametrize("written", [skops.io.dumps, pickle.dumps])
def test_a_tree_that_points_outside_is_refused(field: str, value: int, written: Callable[[Any], bytes]) -> None:
    forest = DecisionTreeClassifier(max_depth=2).fit(X, Y)
    state = forest.tree_.__getstate__()
    nodes = state["nodes"].copy()
    nodes[field][0] = value
    forest.tree_.__setstate__({**state, "nodes": nodes})

    with memory_files({"m": written(forest)}) as files, pytest.raises(UnsupportedModel, match="tree"):
        models.load(files)


@pytest.mark.parametrize(("field", "value"), [("left", 99_999), ("right", 99_999), ("feature_idx", 77)])
@pytest.mark.parametrize("written", [skops.io.dumps, pickle.dumps])
def test_a_tree_of_histogram_boosting_that_points_outside_is_refused(
    field: str, value: int, written: Callable[[Any], bytes]
) -> None:
    boosted = HistGradientBoostingClassifier(max_iter=2, min_samples_leaf=2).fit(X, Y)
    boosted._predictors[0][0].nodes[field][0] = value

    with memory_files({"m": written(boosted)}) as files, pytest.raises(UnsupportedModel, match="tree"):
        models.load(files)


def test_a_file_that_unfolds_to_more_than_its_bound_is_refused() -> None:
    out = io.BytesIO(skops.io.dumps(LogisticRegression().fit(X, Y)))
    with zipfile.ZipFile(out, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.npy", bytes(40 << 20))

    with pytest.raises(UnsupportedModel, match="unfolds"):
        load(SkopsFile(), {"m": out.getvalue()})


@given(st.integers(0, 10**6), st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_altered_bytes_give_a_model_or_a_typed_error(place: int, byte: int) -> None:
    data = bytearray(skops.io.dumps(LogisticRegression().fit(X, Y)))
    data[place % len(data)] = byte
    with memory_files({"m": bytes(data)}) as files, contextlib.suppress(UnsupportedModel):
        models.load(files)
