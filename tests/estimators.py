"""Every estimator of scikit-learn that fits on the iris set, as a model with a `predict` method."""

from __future__ import annotations

import inspect
import warnings
from functools import cache
from typing import Any

import numpy as np
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils import all_estimators
from threadpoolctl import threadpool_limits

ALL, KINDS = load_iris(return_X_y=True)
ROWS: Any = ALL[::3]
TARGETS: Any = KINDS[::3]
_SMALL = {"n_estimators": 3, "n_components": 2}
_UNLIMITED = {"GaussianMixture", "BayesianGaussianMixture", "CCA", "PLSCanonical", "PLSSVD", "SpectralBiclustering"}


def _arguments(name: str, kind: Any) -> dict[str, Any]:
    """What the constructor needs, and what keeps it small."""
    known = inspect.signature(kind).parameters
    regresses = "egress" in name or name.startswith("TransformedTarget")
    inner: Any = Ridge() if regresses and "Classifier" not in name else LogisticRegression()
    needed = {
        "estimator": inner,
        "base_estimator": inner,
        "estimators": [("a", inner)],
        "transformers": [("a", StandardScaler(), [0, 1])],
        "transformer_list": [("a", StandardScaler())],
        "steps": [("a", inner)],
        "param_grid": {"C": [1, 2]},
        "param_distributions": {"C": [1, 2]},
        "dictionary": np.eye(4),
    }
    told = {word: value for word, value in needed.items() if word in known and known[word].default is inspect._empty}
    small = {word: value for word, value in _SMALL.items() if word in known and name not in _UNLIMITED}
    if name.startswith("Hist"):
        small["max_iter"] = 3
    if "random_state" in known:
        small["random_state"] = 0
    return {**told, **small, **({"n_iter": 2} if name.startswith("Randomized") else {})}


def _fitted(name: str, kind: Any) -> tuple[Any, Any]:
    """A fitted model that predicts, and rows for it; raises as the library does where the iris set is not for it."""
    estimator = kind(**_arguments(name, kind))
    rows, targets = ROWS, TARGETS
    tags = estimator.__sklearn_tags__()
    if tags.input_tags.one_d_array:
        rows = ROWS[:, :1]
    if name in {"GammaRegressor", "FixedThresholdClassifier", "TunedThresholdClassifierCV"}:
        targets = (TARGETS > 0) + (1 if name == "GammaRegressor" else 0)
    if tags.target_tags.multi_output and not tags.target_tags.single_output:
        targets = np.c_[TARGETS > 0, TARGETS > 1].astype(int)
    if not hasattr(estimator, "predict"):
        estimator = make_pipeline(estimator, DecisionTreeClassifier(max_depth=2))
    return estimator.fit(rows, targets), rows


@cache
def fitted_models() -> dict[str, tuple[Any, Any]]:
    """Each model with rows for it, by the estimator's name."""
    found: dict[str, tuple[Any, Any]] = {}
    # More threads than free cores make these small fits many times slower.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")
        for name, kind in all_estimators():
            try:
                found[name] = _fitted(name, kind)
            except (TypeError, ValueError, AttributeError):
                # Texts, dictionaries, images or target matrices: not for the iris set.
                continue
        found["a forest after scaling"] = (
            make_pipeline(StandardScaler(), RandomForestClassifier(3, random_state=0)).fit(ROWS, TARGETS),
            ROWS,
        )
    return found
