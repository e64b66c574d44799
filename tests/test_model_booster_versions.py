"""XGBoost files of other versions than the node's: members that came or went answer as the library."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xgboost

from tests.memory_models import as_json
from tests.test_model_boosters import REAL, X, given_by, loaded, xgb


@pytest.mark.parametrize("version", [[1, 0, 0], [1, 7, 6], [2, 1, 0], [3, 0, 0]])
def test_files_of_older_versions_load(version: list[int]) -> None:
    """They lack members that came later, have one base score, and truth values where numbers are now."""
    booster = xgb(objective="binary:logistic")
    document = json.loads(bytes(booster.save_raw("json")))
    learner, document["version"] = document["learner"], version
    learner["learner_model_param"]["base_score"] = learner["learner_model_param"]["base_score"].strip("[]")
    model = learner["gradient_booster"]["model"]
    del model["cats"]
    if version < [2]:
        del learner["learner_model_param"]["num_target"], learner["learner_model_param"]["boost_from_average"]
        del model["iteration_indptr"], model["gbtree_model_param"]["num_parallel_tree"]
        for tree in model["trees"]:
            tree["default_left"] = [bool(side) for side in tree["default_left"]]
            del tree["split_type"], tree["categories"], tree["categories_nodes"]

    assert np.array_equal(given_by(loaded(as_json(document))), booster.predict(xgboost.DMatrix(X)))


def test_dart_loads_in_the_form_of_later_versions() -> None:
    """Since 3.4 its trees are those of gbtree, with their weights beside them."""
    booster = xgb(REAL, booster="dart", rate_drop=0.5)
    document = json.loads(bytes(booster.save_raw("json")))
    told = document["learner"]["gradient_booster"]
    if "gbtree" in told:
        model = told["gbtree"]["model"] | {"weight_drop": told["weight_drop"]}
        document["learner"]["gradient_booster"] = {"model": model, "name": "gbtree"}

    assert np.array_equal(given_by(loaded(as_json(document))), booster.predict(xgboost.DMatrix(X)))
