"""XGBoost and LightGBM files: the library's own answers, alone or in a batch; what points outside never reaches it."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import lightgbm
import numpy as np
import pytest
import xgboost
from hypothesis import given, settings
from hypothesis import strategies as st

from divault import models
from divault.errors import InputInvalid, ModelFailed, SealedFileDamaged, UnsupportedModel
from divault.models import ubjson
from divault.models.base import Inputs, LoadedModel
from divault.publishing.recognition import safe_formats
from divault.workers.confinement import Confinement
from divault.workers.pool import WorkerPool
from tests import worker_models
from tests.memory_models import answer, as_json, memory_files
from tests.schemas import mismatch

RANDOM = np.random.default_rng(20)
X = RANDOM.normal(size=(120, 4))
X[::7, 1] = np.nan
SCORE = X[:, 0] + np.nan_to_num(X[:, 1]) * X[:, 2]
TWO, THREE, REAL = (SCORE > 0).astype(int), np.digitize(SCORE, [-0.5, 0.5]), np.exp(SCORE)
ROWS = [[None if np.isnan(value) else value for value in row] for row in X.tolist()]


def xgb(target: Any = TWO, rounds: int = 6, **params: Any) -> xgboost.Booster:
    matrix = xgboost.DMatrix(X, target)
    if str(params.get("objective", "")).startswith("rank:"):
        matrix.set_group([60, 60])
    chosen = {"max_depth": 4, "nthread": 2, **params}
    return xgboost.train({name: value for name, value in chosen.items() if value is not None}, matrix, rounds)


def lgb(target: Any = TWO, rounds: int = 6, **params: Any) -> lightgbm.Booster:
    data = lightgbm.Dataset(X, target)
    if params.get("objective") in {"lambdarank", "rank_xendcg"}:
        data.set_group([60, 60])
    return lightgbm.train({"num_leaves": 8, "min_data_in_leaf": 3, "verbose": -1, **params}, data, rounds)


def ubj(booster: xgboost.Booster) -> bytes:
    return bytes(booster.save_raw("ubj"))


def text(booster: lightgbm.Booster) -> bytes:
    return booster.model_to_string().encode()


def loaded(data: bytes, **told: Any) -> LoadedModel:
    """The model, recognised among all formats."""
    content = {"m/model": data, "m/README.md": b"hello"} | ({"m/divault.json": as_json(told)} if told else {})
    with memory_files(content) as files:
        return models.load(files)


@pytest.fixture(scope="module")
def flowers() -> LoadedModel:
    return loaded(ubj(xgb(THREE, objective="multi:softprob", num_class=3)))


def given_by(model: LoadedModel, rows: Any = ROWS) -> Any:
    """The numbers of an answer as the library gives them."""
    result = answer(model, {"features": rows})
    if "probabilities" in result:
        probabilities = np.array(result["probabilities"])
        assert result["predictions"] == [result["classes"][place] for place in probabilities.argmax(axis=1)]
        return probabilities[:, 1] if result["classes"] == [0, 1] else probabilities
    return np.array(result["predictions"])


XGBOOST: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "two classes": ("classification", TWO, {"objective": "binary:logistic"}),
    "hinge": ("classification", TWO, {"objective": "binary:hinge"}),
    "three classes": ("classification", THREE, {"objective": "multi:softprob", "num_class": 3}),
    "the class alone": ("classification", THREE, {"objective": "multi:softmax", "num_class": 3}),
    "raw margins": ("prediction", TWO, {"objective": "binary:logitraw"}),
    "regression": ("regression", REAL, {}),
    "gamma": ("regression", REAL, {"objective": "reg:gamma"}),
    "counts": ("regression", TWO, {"objective": "count:poisson"}),
    "survival": ("regression", REAL, {"objective": "survival:cox"}),
    "quantiles": ("regression", REAL, {"objective": "reg:quantileerror", "quantile_alpha": [0.1, 0.9]}),
    "several targets": ("regression", np.stack([SCORE, REAL], axis=1), {}),
    "ranking": ("ranking", TWO, {"objective": "rank:ndcg"}),
    "dart": ("regression", REAL, {"booster": "dart", "rate_drop": 0.5}),
    "linear": ("regression", REAL, {"booster": "gblinear", "max_depth": None}),
    "forest": ("regression", REAL, {"num_parallel_tree": 3, "subsample": 0.5}),
    "pruned": ("regression", REAL, {"tree_method": "exact", "gamma": 9.0}),
}


@pytest.mark.parametrize("form", ["ubj", "json"])
@pytest.mark.parametrize("kind", XGBOOST)
def test_xgboost_answers_as_the_library(kind: str, form: str) -> None:
    task, target, params = XGBOOST[kind]
    booster = xgb(target, **params)

    model = loaded(bytes(booster.save_raw(form)))

    assert (model.description.format, model.description.task) == ("xgboost", task)
    assert np.array_equal(given_by(model), booster.predict(xgboost.DMatrix(X)))


LIGHTGBM: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "two classes": ("classification", TWO, {"objective": "binary"}),
    "three classes": ("classification", THREE, {"objective": "multiclass", "num_class": 3}),
    "one against all": ("classification", THREE, {"objective": "multiclassova", "num_class": 3}),
    "regression": ("regression", REAL, {"objective": "regression"}),
    "square root": ("regression", REAL, {"objective": "regression", "reg_sqrt": True}),
    "quantile": ("regression", REAL, {"objective": "quantile", "alpha": 0.9}),
    "zero is missing": ("regression", REAL, {"objective": "tweedie", "zero_as_missing": True}),
    "no missing": ("regression", REAL, {"objective": "huber", "use_missing": False}),
    "ranking": ("ranking", TWO, {"objective": "lambdarank"}),
    "dart": ("regression", REAL, {"boosting": "dart"}),
    "forest": (
        "classification",
        TWO,
        {"boosting": "rf", "bagging_freq": 1, "bagging_fraction": 0.5} | {"objective": "binary"},
    ),
    "an objective of one's own": ("prediction", TWO, {"objective": lambda found, _: (found - TWO, np.ones(len(TWO)))}),
}


@pytest.mark.parametrize("kind", LIGHTGBM)
def test_lightgbm_answers_as_the_library(kind: str) -> None:
    task, target, params = LIGHTGBM[kind]
    booster = lgb(target, **params)

    model = loaded(text(booster))

    assert (model.description.format, model.description.task) == ("lightgbm", task)
    assert np.array_equal(given_by(model), booster.predict(X))


@pytest.mark.parametrize("form", ["ubj", "json"])
def test_what_training_keeps_for_itself_is_left_out(form: str) -> None:
    """Ranking without bias keeps lists beside its parameters; the answer doesn't need them."""
    data = xgboost.DMatrix(ROWS, np.arange(len(ROWS)) % 3)
    data.set_group([len(ROWS)])
    told = {"objective": "rank:ndcg", "lambdarank_unbiased": True, "max_depth": 3}
    booster = xgboost.train(told, data, 4)
    found = given_by(loaded(bytes(booster.save_raw(form))))

    assert np.allclose(found, booster.predict(xgboost.DMatrix(ROWS)), atol=1e-5)


def test_models_without_a_split_answer_too() -> None:
    constant = np.full(len(X), 2.0)

    assert set(given_by(loaded(text(lgb(constant, rounds=1, objective="regression"))))) == {2.0}
    assert set(given_by(loaded(ubj(xgb(constant, rounds=1))))) == {2.0}
    assert given_by(loaded(ubj(xgb(constant, rounds=0)))).shape == (len(X),)


def test_names_of_features_and_line_ends_of_windows_change_nothing() -> None:
    frame = xgboost.DMatrix(X, REAL, feature_names=["width", "ä", "c", "d"], feature_types=["float", "q", "int", "i"])
    booster = xgboost.train({}, frame, 2)
    light = lightgbm.train({"verbose": -1}, lightgbm.Dataset(X, REAL, feature_name=["ä", "b", "c", "d"]), 2)

    assert np.array_equal(given_by(loaded(ubj(booster))), booster.predict(frame))
    assert np.array_equal(given_by(loaded(text(light).replace(b"\n", b"\r\n"))), light.predict(X))


@pytest.mark.parametrize("kept", [True, False])
def test_after_early_stopping_the_file_answers_as_what_wrote_it(kept: bool, tmp_path: Any) -> None:
    """XGBModel stops at its best iteration, Booster takes all."""
    noise = RANDOM.permutation(TWO)
    model = xgboost.XGBClassifier(n_estimators=9, max_depth=3, early_stopping_rounds=5)
    model.fit(X, TWO, eval_set=[(X, noise)], verbose=False)
    assert model.best_iteration + 1 < model.get_booster().num_boosted_rounds()
    (model if kept else model.get_booster()).save_model(tmp_path / "m.ubj")

    found = given_by(loaded((tmp_path / "m.ubj").read_bytes()))

    whole = model.get_booster().predict(xgboost.DMatrix(X))
    assert np.array_equal(found, model.predict_proba(X)[:, 1] if kept else whole)
    assert not np.array_equal(model.predict_proba(X)[:, 1], whole)


def test_labels_name_the_classes() -> None:
    data = text(lgb(objective="binary"))
    model = loaded(data, labels=["no", "yes"])

    result = answer(model, {"features": ROWS[:5]})

    assert result["classes"] == ["no", "yes"] == model.description.output_schema["properties"]["classes"]["const"]
    assert result["predictions"] == [["no", "yes"][p > 0.5] for _, p in result["probabilities"]]
    for wrong in (["no"], ["a", "b", "c"]):
        with pytest.raises(UnsupportedModel, match="labels"):
            loaded(data, labels=wrong)
    with pytest.raises(UnsupportedModel, match="labels"):
        loaded(text(lgb(REAL)), labels=["no", "yes"])


def test_what_it_says_of_itself_is_true(flowers: LoadedModel) -> None:
    told = flowers.description
    row = told.input_schema["properties"]["features"]["anyOf"][0]

    assert (row["items"]["type"], row["minItems"], row["maxItems"]) == (["number", "null"], 4, 4)
    assert mismatch(answer(flowers, told.example), told.output_schema) == ""
    assert told.runtime["libraries"].keys() == {"python", "divault", "numpy", "scipy", "xgboost-cpu"}
    assert (told.runtime["adapter"], told.runtime["dtype"], told.runtime["threads"]) == ("xgboost", "float32", 1)
    assert (told.code, told.tolerance, told.together) == (False, 0.0, 64)
    assert answer(flowers, {"inputs": ROWS[0]}) == answer(flowers, {"features": [ROWS[0]]})


MIXED: dict[str, Callable[[], bytes]] = {
    "xgboost": lambda: ubj(xgb(THREE, rounds=40, objective="multi:softprob", num_class=3)),
    "dart": lambda: ubj(xgb(REAL, rounds=40, booster="dart", rate_drop=0.5)),
    "gblinear": lambda: ubj(xgboost.train({"booster": "gblinear"}, xgboost.DMatrix(X, REAL), 9)),
    "lightgbm": lambda: text(lgb(THREE, rounds=40, objective="multiclass", num_class=3)),
}


@pytest.mark.parametrize("kind", MIXED)
def test_a_row_answers_the_same_alone_and_among_any_others(kind: str) -> None:
    model = loaded(MIXED[kind]())
    alone = [model.predict([Inputs({"features": row}, {})])[0] for row in ROWS]

    together = model.predict([Inputs({"features": row}, {}) for row in ROWS])
    cuts = [0, 1, 70, 72, len(ROWS)]
    parts = [ROWS[start:end] for start, end in pairwise(cuts)]
    groups = model.predict([Inputs({"features": part}, {}) for part in parts])

    assert together == alone
    assert [group.rows for group in groups] == [1, 69, 2, 48]
    flat = [number for group in groups for number in group.result["predictions"]]
    assert flat == [one.result["predictions"][0] for one in alone] == given_by_list(model)
    if "probabilities" in alone[0].result:
        rows = [row for group in groups for row in group.result["probabilities"]]
        assert rows == [one.result["probabilities"][0] for one in alone]


def given_by_list(model: LoadedModel) -> Any:
    return answer(model, {"features": ROWS})["predictions"]


WRONG: dict[str, Any] = {
    "no object": [1, 2, 3, 4],
    "empty": {},
    "another name": {"tensor": [0, 0, 0, 0]},
    "a name more": {"features": [0, 0, 0, 0], "y": 1},
    "both names": {"features": [0, 0, 0, 0], "inputs": [0, 0, 0, 0]},
    "short": {"features": [0, 0, 0]},
    "long": {"features": [0, 0, 0, 0, 0]},
    "ragged": {"features": [[0, 0, 0, 0], [0, 0, 0]]},
    "deep": {"features": [[[0, 0, 0, 0]]]},
    "text": {"features": ["a", 0, 0, 0]},
    "truth": {"features": [True, 0, 0, 0]},
    "no number": {"features": [float("nan"), 0, 0, 0]},
    "infinite": {"features": [float("-inf"), 0, 0, 0]},
    "not finite as float32": {"features": [1e39, 0, 0, 0]},
    "a very large whole number": {"features": [10**400, 0, 0, 0]},
    "empty batch": {"features": []},
    "empty row": {"features": [[]]},
    "too many rows": {"features": [[0, 0, 0, 0]] * 65_537},
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", ["xgboost", "lightgbm"])
def test_an_input_that_does_not_fit_is_told_with_one_that_does(kind: str, wrong: str, pair: dict[str, Any]) -> None:
    model = pair[kind]
    with pytest.raises(InputInvalid) as caught:
        model.predict([Inputs(model.description.example, {}), Inputs(WRONG[wrong], {})])

    assert model.predict([Inputs(caught.value.data["example"], {})])[0].rows == 1
    with pytest.raises(InputInvalid, match="parameters"):
        model.predict([Inputs(model.description.example, {"a": 1})])


@pytest.fixture(scope="module")
def pair() -> dict[str, LoadedModel]:
    return {"xgboost": loaded(ubj(xgb(REAL))), "lightgbm": loaded(text(lgb(REAL)))}


# --- what is not supported ------------------------------------------------------------------------------------------


def categories() -> Any:
    codes = np.column_stack([RANDOM.integers(0, 4, len(X)), X[:, 0]])
    return codes, (codes[:, 0] > 1).astype(float)


def xgb_categories() -> bytes:
    codes, target = categories()
    matrix = xgboost.DMatrix(codes, target, feature_types=["c", "float"], enable_categorical=True)
    return ubj(xgboost.train({"max_cat_to_onehot": 1}, matrix, 1))


def lgb_categories() -> bytes:
    codes, target = categories()
    data = lightgbm.Dataset(codes, target, categorical_feature=[0])
    return text(lightgbm.train({"verbose": -1, "min_data_per_group": 1, "cat_smooth": 1}, data, 1))


def altered(change: Callable[[Any, Any], None], booster: xgboost.Booster | None = None) -> bytes:
    """A JSON file with something else in the learner or its first tree."""
    document = json.loads(bytes((booster or xgb()).save_raw("json")))
    change(document["learner"], document["learner"]["gradient_booster"]["model"]["trees"][0])
    return as_json(document)


def with_objective(name: str) -> bytes:
    return altered(lambda learner, _: learner["objective"].update(name=name))


def old_binary(booster: bytes) -> bytes:
    """How files of `save_model` began before UBJSON: parameters, then two names after their lengths."""
    names = [len(name).to_bytes(8, "little") + name for name in (b"binary:logistic", booster)]
    return bytes(136) + b"".join(names) + bytes(160)


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "categories of XGBoost": (xgb_categories, "XGBoost model with categorical features"),
    "categories of LightGBM": (lgb_categories, "LightGBM model with categorical features"),
    "several numbers in a leaf": (
        lambda: ubj(xgb(np.stack([SCORE, REAL], axis=1), multi_strategy="multi_output_tree")),
        "multi_output_tree",
    ),
    "several labels": (
        lambda: ubj(xgb(np.stack([TWO, 1 - TWO], axis=1), objective="binary:logistic")),
        "2 targets of the objective binary:logistic",
    ),
    "linear trees": (lambda: text(lgb(REAL, linear_tree=True)), "linear trees"),
    "an unknown objective of XGBoost": (lambda: with_objective("mine:best"), "objective mine:best"),
    "an unknown objective of LightGBM": (
        lambda: text(lgb()).replace(b"objective=regression\n", b"objective=mine\n", 1),
        "objective mine",
    ),
    "a newer XGBoost": (lambda: bytes(xgb().save_raw("json")).replace(b'"version":[3,', b'"version":[9,'), "newer"),
    "a newer LightGBM": (lambda: text(lgb()).replace(b"version=v4", b"version=v9"), "version 9"),
    "what a later XGBoost brings": (
        lambda: altered(lambda learner, _: learner["gradient_booster"]["model"].update(tree_scales=[1, 2])),
        "unknown field `tree_scales`",
    ),
    "too many features of XGBoost": (
        lambda: altered(lambda learner, _: learner["learner_model_param"].update(num_feature="999999999")),
        "999999999 features",
    ),
    "too many features of LightGBM": (
        lambda: text(lgb()).replace(b"max_feature_idx=3", b"max_feature_idx=999999998"),
        "999999999 features",
    ),
    "too many classes": (
        lambda: text(lgb()).replace(b"num_class=1", b"num_class=999999999"),
        "999999999 classes",
    ),
    "the old binary form": (lambda: old_binary(b"gbtree"), "old binary form"),
    "the old binary form in memory": (lambda: b"binf" + old_binary(b"dart"), "save_model it as .ubj or .json"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_supported_is_named(kind: str) -> None:
    made, named = REFUSED[kind]
    with pytest.raises(UnsupportedModel) as caught:
        loaded(made())

    assert named in caught.value.data["seen"]
    assert caught.value.data["supported"]


def test_a_pickle_of_theirs_is_refused_and_their_own_file_advised() -> None:
    with pytest.raises(UnsupportedModel) as caught:
        loaded(pickle.dumps(xgb()))

    assert safe_formats(caught.value.data["seen"]) == ["save it with its own save_model"]


# --- broken and hostile files ---------------------------------------------------------------------------------------


def put(name: str, value: Any, place: int = 0) -> Callable[[Any, Any], None]:
    """Another number in one of a tree's arrays."""

    def change(_: Any, tree: Any) -> None:
        tree[name][place] = value

    return change


def back(_: Any, tree: Any) -> None:
    """The root's left child has the root's own children."""
    first = tree["left_children"][0]
    assert tree["left_children"][first] > 0
    tree["left_children"][first], tree["right_children"][first] = first, first + 1


def shared(_: Any, tree: Any) -> None:
    """The root's children have the same children."""
    first = tree["left_children"][0]
    assert tree["left_children"][first] > first + 1
    for name in ("left_children", "right_children"):
        tree[name][first + 1] = tree[name][first]


def apart(_: Any, tree: Any) -> None:
    """Two more nodes than the tree, each the child of the other."""
    count = len(tree["left_children"])
    for values in (value for value in tree.values() if isinstance(value, list) and len(value) == count):
        values.extend([0, 0, 0, 0])
    tree["left_children"][count:] = [count + 2, -1, count, -1]
    tree["right_children"][count:] = [count + 3, -1, count + 1, -1]
    tree["tree_param"]["num_nodes"] = str(count + 4)


def told(where: str, **values: Any) -> Callable[[Any, Any], None]:
    """Other members in a part of the learner."""

    def change(learner: Any, _: Any) -> None:
        part = learner
        for name in where.split("."):
            part = part[name]
        part.update(values)

    return change


BROKEN: dict[str, Callable[[Any, Any], None]] = {
    "a child far outside": put("left_children", 9_999),
    "a child before the first": put("left_children", -7),
    "the root as a child": lambda _, tree: tree.update(
        left_children=[0, *tree["left_children"][1:]], right_children=[1, *tree["right_children"][1:]]
    ),
    "children apart": put("right_children", 4),
    "a circle": back,
    "a child of two": shared,
    "a circle that nothing leads to": apart,
    "a feature that is not there": put("split_indices", 4),
    "a feature below zero": put("split_indices", -1),
    "a fraction of a feature": put("split_indices", 0.5),
    "a text for a number": put("split_conditions", "0.5"),
    "a list for a number": put("split_conditions", [0.5]),
    "a huge number": put("split_indices", 10**30),
    "an array too short": lambda _, tree: tree["default_left"].pop(),
    "an array that is missing": lambda _, tree: tree.pop("split_conditions"),
    "another number of nodes": lambda _, tree: tree["tree_param"].update(num_nodes="999999999"),
    "no tree": lambda learner, _: learner["gradient_booster"]["model"]["trees"].__setitem__(0, 7),
    "another number of trees": told("gradient_booster.model.gbtree_model_param", num_trees="999999999"),
    "very parallel trees": told("gradient_booster.model.gbtree_model_param", num_parallel_tree="999999999"),
    "a class that is not there": told("gradient_booster.model", tree_info=[1, 0, 0, 0, 0, 0]),
    "iterations that go back": told("gradient_booster.model", iteration_indptr=[0, 3, 2, 6]),
    "no model": told("gradient_booster", model=None),
    "classes without an objective": told("learner_model_param", num_class="3"),
    "no features": told("learner_model_param", num_feature="0"),
    "features below zero": told("learner_model_param", num_feature="-4"),
    "a base score that is none": told("learner_model_param", base_score="[much]"),
    "too many base scores": told("learner_model_param", base_score="[1E0,1E0]"),
    "an odd objective": told("objective", name="\u2028"),
    "no objective": told("objective", name=None),
    "a best iteration that is not there": told("attributes", scikit_learn="{}", best_iteration="6"),
    "a best iteration that is none": told("attributes", scikit_learn="{}", best_iteration="x"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_xgboost_file_whose_parts_do_not_fit_is_damaged(kind: str) -> None:
    with pytest.raises(SealedFileDamaged, match="XGBoost"):
        loaded(altered(BROKEN[kind]))


def test_what_a_file_says_of_parents_and_deleted_nodes_is_not_believed() -> None:
    """The library follows parents while it loads, wherever they lead."""

    def change(_: Any, tree: Any) -> None:
        tree["parents"] = [1 << 30] * len(tree["parents"])
        tree["tree_param"]["num_deleted"] = "99"

    booster = xgb()

    assert np.array_equal(given_by(loaded(altered(change, booster))), booster.predict(xgboost.DMatrix(X)))


def chain(levels: int) -> bytes:
    """A model whose one tree has a leaf and a further node on each level."""
    inner = np.arange(0, 2 * levels, 2)

    def change(_: Any, tree: Any) -> None:
        for name in ("base_weights", "loss_changes", "split_conditions", "sum_hessian", "parents", "default_left"):
            tree[name] = [0] * (2 * levels + 1)
        left = np.full(2 * levels + 1, -1)
        left[inner] = inner + 1
        tree["split_indices"] = tree["split_type"] = tree["default_left"]
        tree["left_children"], tree["right_children"] = left.tolist(), np.where(left < 0, -1, left + 1).tolist()
        tree["tree_param"]["num_nodes"] = str(2 * levels + 1)

    return altered(change, xgb(rounds=1))


def test_a_tree_of_very_many_levels_is_refused() -> None:
    """The library goes down by calling itself: its stack would end at some hundred thousands."""
    assert given_by(loaded(chain(4095))).shape == (len(X),)
    with pytest.raises(UnsupportedModel, match="over 4096 levels"):
        loaded(chain(400_000))


def test_a_number_of_classes_that_the_objective_does_not_share_is_damaged() -> None:
    booster = xgb(THREE, objective="multi:softprob", num_class=3)
    change = told("objective", softmax_multiclass_param={"num_class": "999999"})

    with pytest.raises(SealedFileDamaged, match="classes"):
        loaded(altered(change, booster))


BROKEN_TEXT: dict[str, tuple[bytes, bytes]] = {
    "a child far outside": (rb"left_child=\S+", b"left_child=99"),
    "a leaf far outside": (rb"right_child=\S+", b"right_child=-99"),
    "a circle": (rb"left_child=\S+", b"left_child=0"),
    "a child of two": (rb"left_child=.*\nright_child=(.*)\n", rb"left_child=\1\nright_child=\1\n"),
    "a feature that is not there": (rb"split_feature=\d+", b"split_feature=4"),
    "a feature below zero": (rb"split_feature=\d+", b"split_feature=-1"),
    "a fraction of a feature": (rb"split_feature=\d+", b"split_feature=0.5"),
    "an unknown question": (rb"decision_type=\d+", b"decision_type=12"),
    "a list too short": (rb"threshold=\S+ ", b"threshold="),
    "a text for a number": (rb"threshold=\S+ ", b"threshold=much "),
    "a list that is missing": (rb"leaf_value=.*\n", b""),
    "a list that stands twice": (rb"(leaf_value=.*\n)", rb"\1\1"),
    "another number of leaves": (rb"num_leaves=\d+", b"num_leaves=999999999"),
    "no leaves": (rb"num_leaves=\d+", b"num_leaves=0"),
    "another number of classes": (rb"num_class=1", b"num_class=2"),
    "no classes": (rb"num_class=1", b"num_class=0"),
    "an odd objective": (rb"objective=.*\n", b"objective=regression \xff\n"),
    "classes for an objective without": (rb"objective=.*\n", b"objective=multiclass num_class:3\n"),
    "no end": (rb"end of trees", b"end of"),
}


@pytest.mark.parametrize("kind", BROKEN_TEXT)
def test_a_lightgbm_file_whose_parts_do_not_fit_is_damaged(kind: str) -> None:
    pattern, other = BROKEN_TEXT[kind]
    data, changed = re.subn(pattern, other, text(lgb()), count=1)
    assert changed == 1

    with pytest.raises(SealedFileDamaged, match="LightGBM"):
        loaded(data)


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_an_answer_that_is_not_finite_is_the_models_failure(value: str) -> None:
    data = re.sub(
        rb"leaf_value=\S+ \S+", b"leaf_value=%s %s" % ((value.encode(),) * 2), text(lgb(rounds=1, num_leaves=2))
    )

    with pytest.raises(ModelFailed) as caught:
        loaded(data).predict([Inputs({"features": ROWS}, {})])

    assert caught.value.data["kind"] == "not_finite"


def test_a_tree_too_few_for_the_classes_is_damaged() -> None:
    data = text(lgb(THREE, rounds=2, objective="multiclass", num_class=3))
    cut = re.sub(rb"Tree=5\n.*?end of trees", b"end of trees", data, flags=re.DOTALL)

    with pytest.raises(SealedFileDamaged, match="number of trees"):
        loaded(cut)


FILES: dict[str, Callable[[], bytes]] = {
    "ubj": lambda: ubj(xgb(rounds=2, max_depth=2)),
    "json": lambda: bytes(xgb(rounds=2, max_depth=2).save_raw("json")),
    "text": lambda: text(lgb(rounds=2, num_leaves=4)).partition(b"end of trees")[0] + b"end of trees\n",
}


@pytest.mark.parametrize("form", FILES)
def test_a_file_that_was_cut_is_damaged_wherever(form: str) -> None:
    data = FILES[form]()
    start = 60 if form != "json" else 20

    for end in range(start, len(data) - 1, max(1, len(data) // 60)):
        with pytest.raises(SealedFileDamaged):
            loaded(data[:end])


@given(st.sampled_from(sorted(FILES)), st.integers(0, 10**6), st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_altered_bytes_give_a_model_that_answers_or_a_typed_error(form: str, place: int, byte: int) -> None:
    data = bytearray(CACHED[form])
    data[place % len(data)] = byte
    with contextlib.suppress(UnsupportedModel, SealedFileDamaged, InputInvalid, ModelFailed):
        model = loaded(bytes(data))
        model.predict([Inputs(model.description.example, {}), Inputs({"features": ROWS[:3]}, {})])


CACHED = {form: made() for form, made in FILES.items()}
LEARNER = b'{"learner":{"attributes":{},"x":'
BINARY = b"{L" + bytes(7) + b"\x07learner{L" + bytes(7) + b"\x01x"
HOSTILE: dict[str, bytes] = {
    "deep JSON": LEARNER + b"[" * 300_000,
    "deep objects": LEARNER + b'{"a":' * 300_000,
    "a deep tree": CACHED["json"].replace(b'"trees":[', b'"trees":[' + b"[" * 300_000 + b"]" * 300_000 + b",", 1),
    "deep UBJSON": BINARY + (b"[#L" + bytes(7) + b"\x01") * 100_000,
    "an array that claims exabytes": BINARY + b"[$L#L\x0f" + bytes(7),
    "an array of a negative length": BINARY + b"[$d#L\xff" + bytes(7),
    "a list that claims exabytes": BINARY + b"[#L\x0f" + bytes(7),
    "a text that claims exabytes": BINARY + b"SL\x0f" + bytes(7),
    "an array of nothing": BINARY + b"[$Z#L\x0f" + bytes(7),
    "a list without a count": BINARY + b"[Z]}}",
    "a million empty objects": BINARY + b"[#L" + (1_000_000).to_bytes(8, "big") + b"{}" * 1_000_000,
    "a name that stands twice": BINARY + b"ZL" + bytes(7) + b"\x01xZ}}",
    "a text that is not UTF-8": BINARY + b"SL" + bytes(7) + b"\x01\xff}}",
    "more after its end": CACHED["ubj"] + b"{}",
    "many lines": CACHED["text"].replace(b"Tree=0", b"\n" * 4_000_000 + b"Tree=0", 1).replace(b"end of trees", b""),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_wants_more_than_it_brings_is_damaged_within_bounds(kind: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(SealedFileDamaged):
            loaded(HOSTILE[kind])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 48 << 20


VALUES = st.recursive(
    st.text(max_size=9) | st.integers(-(2**62), 2**62) | st.floats(width=32, allow_nan=False),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=9), inner, max_size=5),
    max_leaves=20,
)


@given(VALUES, st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9))
@settings(max_examples=150, deadline=None)
def test_ubjson_comes_back_as_it_was_written(value: Any, numbers: list[int]) -> None:
    array = np.array(numbers, dtype=np.int32)

    assert ubjson.read(ubjson.write([value, "x"])) == [value, "x"]
    assert ubjson.read(ubjson.write({"a": array}))["a"].tolist() == numbers


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_bytes_as_ubjson_are_a_value_or_damaged(data: bytes) -> None:
    with contextlib.suppress(SealedFileDamaged):
        ubjson.read(data)


# --- in a worker ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["standard", "auto"])
async def test_they_load_and_answer_in_a_confined_worker(level: Any) -> None:
    """`auto` is strict, with namespaces, where this machine allows it."""
    booster, light = xgb(objective="binary:logistic"), lgb(objective="binary")
    wanted = {
        ubj(booster): booster.predict(xgboost.DMatrix(X)),
        bytes(booster.save_raw("json")): booster.predict(xgboost.DMatrix(X)),
        text(light): light.predict(X),
    }
    pool = WorkerPool(predict_timeout_s=20, load_timeout_s=60, confinement=Confinement(level))
    try:
        proven = await pool.prove_sandbox()
        for data, probabilities in wanted.items():
            model = worker_models.opened(data)
            found = await pool.load(model)
            result = await worker_models.answer(pool, model, {"features": ROWS})
            assert found.sandbox == proven
            assert found.description.runtime["threads"] >= 1
            assert np.array_equal([row[1] for row in result["probabilities"]], probabilities)
            with pytest.raises(InputInvalid):
                await worker_models.output(pool, model, {"features": [1, 2]})
            await pool.unload(model.model.key)
        with pytest.raises(SealedFileDamaged):
            await pool.load(worker_models.opened(CACHED["ubj"][:-9]))
    finally:
        await pool.close()
