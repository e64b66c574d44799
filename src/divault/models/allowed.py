"""Which globals a pickled scikit-learn model may name: exact pairs and a few families, everything else is refused.

Rules:

1. No name with a dot in it, no function but those listed, no builtin that turns a number into memory.
2. An estimator is a `BaseEstimator` defined in the scikit-learn module that the pickle names; never in its tests,
   datasets, utilities or bundled libraries.
3. numpy's own reconstruction is replaced by stricter functions (`rebuilding`): called with chosen arguments,
   `numpy.ndarray` makes objects out of arbitrary memory.
4. `functools.partial` is that of scikit-learn's own histogram boosting, or refused.
5. Random generators are forgotten: prediction needs none, and their state is not checked by numpy.
"""

from __future__ import annotations

import importlib
import re
from types import ModuleType
from typing import Any, NoReturn

from divault.errors import UnsupportedModel
from divault.models import rebuilding

_SKLEARN = re.compile(r"sklearn(\.[a-z_][a-z0-9_]*){1,4}", re.ASCII)
_BARRED = frozenset({"tests", "conftest", "externals", "datasets", "utils", "experimental", "inspection"})

_UFUNCS = (
    "abs", "absolute", "arccos", "arccosh", "arcsin", "arcsinh", "arctan", "arctanh", "cbrt", "ceil", "clip", "cos",
    "cosh", "deg2rad", "degrees", "exp", "exp2", "expm1", "fabs", "floor", "log", "log10", "log1p", "log2", "maximum",
    "minimum", "negative", "positive", "rad2deg", "radians", "reciprocal", "rint", "sign", "sin", "sinh", "sqrt",
    "square", "tan", "tanh", "trunc",
)  # fmt: skip
_SCALARS = (
    "bool", "bool_", "float16", "float32", "float64", "int16", "int32", "int64", "int8", "number", "str_",
    "uint16", "uint32", "uint64", "uint8",
)  # fmt: skip
_METRICS = (
    "accuracy_score", "average_precision_score", "balanced_accuracy_score", "brier_score_loss", "cohen_kappa_score",
    "d2_brier_score", "d2_log_loss_score", "f1_score", "fbeta_score", "hamming_loss", "hinge_loss", "jaccard_score",
    "log_loss", "matthews_corrcoef", "precision_score", "recall_score", "roc_auc_score", "zero_one_loss",
)  # fmt: skip
_RANKINGS = (
    "average_precision_score", "coverage_error", "dcg_score", "label_ranking_average_precision_score",
    "label_ranking_loss", "ndcg_score", "roc_auc_score", "top_k_accuracy_score",
)  # fmt: skip
_ERRORS = (
    "d2_absolute_error_score", "d2_pinball_score", "d2_tweedie_score", "explained_variance_score", "max_error",
    "mean_absolute_error", "mean_absolute_percentage_error", "mean_gamma_deviance", "mean_pinball_loss",
    "mean_poisson_deviance", "mean_squared_error", "mean_squared_log_error", "mean_tweedie_deviance",
    "median_absolute_error", "r2_score", "root_mean_squared_error", "root_mean_squared_log_error",
)  # fmt: skip
_AGREEMENTS = (
    "adjusted_mutual_info_score", "adjusted_rand_score", "completeness_score", "fowlkes_mallows_score",
    "homogeneity_score", "mutual_info_score", "normalized_mutual_info_score", "rand_score", "v_measure_score",
)  # fmt: skip

EXACT: dict[str, tuple[str, ...]] = {
    "builtins": ("bool", "complex", "float", "frozenset", "int", "set", "slice", "str"),
    "collections": ("OrderedDict", "defaultdict"),
    "numpy": (*_UFUNCS, *_SCALARS, "mean", "median"),
    "scipy.interpolate._bsplines": ("BSpline",),
    "scipy.sparse._csr": ("csr_matrix", "csr_array"),
    "scipy.sparse._csc": ("csc_matrix", "csc_array"),
    "sklearn.calibration": ("_CalibratedClassifier",),
    "sklearn.cluster._bisect_k_means": ("_BisectingTree",),
    "sklearn.cluster._birch": ("_CFNode", "_CFSubcluster"),
    "sklearn.compose._column_transformer": ("make_column_selector", "_RemainderColsList"),
    "sklearn.ensemble._hist_gradient_boosting.predictor": ("TreePredictor",),
    "sklearn.feature_extraction.text": ("strip_accents_ascii", "strip_accents_unicode"),
    "sklearn.feature_selection._mutual_info": ("mutual_info_classif", "mutual_info_regression"),
    "sklearn.feature_selection._univariate_selection": ("chi2", "f_classif", "f_regression", "r_regression"),
    "sklearn.impute._iterative": ("_ImputerTriplet",),
    "sklearn.metrics._classification": _METRICS,
    "sklearn.metrics._dist_metrics": ("newObj",),
    "sklearn.metrics._ranking": _RANKINGS,
    "sklearn.metrics._regression": _ERRORS,
    "sklearn.metrics._scorer": ("negative_likelihood_ratio", "positive_likelihood_ratio"),
    "sklearn.metrics.cluster._supervised": _AGREEMENTS,
    "sklearn.neighbors._ball_tree": ("BallTree", "newObj"),
    "sklearn.neighbors._kd_tree": ("KDTree", "newObj"),
    "sklearn.tree._tree": ("Tree",),
    "sklearn.utils._bunch": ("Bunch",),
    "sklearn.utils._metadata_requests": ("MetadataRequest", "MethodMetadataRequest"),
}
"""Classes and functions by module, each defined there or re-exported by it."""

FAMILIES: dict[str, re.Pattern[str]] = {
    "sklearn._loss._loss": re.compile(r"Cy[A-Z]\w+|__pyx_unpickle_Cy\w+", re.ASCII),
    "sklearn._loss.link": re.compile(r"Interval|[A-Z]\w*(Link|Logit)", re.ASCII),
    "sklearn._loss.loss": re.compile(r"[A-Z]\w*(Loss|Error)\w*", re.ASCII),
    "sklearn.gaussian_process.kernels": re.compile(r"[A-Z]\w+", re.ASCII),
    "sklearn.linear_model._sgd_fast": re.compile(r"[A-Z]\w+", re.ASCII),
    "sklearn.metrics._dist_metrics": re.compile(r"(?!PyFunc)\w+Distance(32|64)?", re.ASCII),
    "sklearn.metrics._scorer": re.compile(r"_\w+Scorer|_Scorer", re.ASCII),
    "sklearn.model_selection._split": re.compile(r"[A-Z]\w+", re.ASCII),
    "sklearn.neural_network._stochastic_optimizers": re.compile(r"(SGD|Adam)Optimizer", re.ASCII),
}
"""Classes (and Cython's own reconstruction functions) defined in the module, by name."""

_REPLACED: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): rebuilding.latin1,
    ("builtins", "bytes"): rebuilding.no_bytes,
    # How it was fitted; calling it would only take time.
    ("sklearn.cluster._kmeans", "_kmeans_single_elkan"): rebuilding.Forgotten,
    ("sklearn.cluster._kmeans", "_kmeans_single_lloyd"): rebuilding.Forgotten,
    ("functools", "partial"): rebuilding.NumbersOnly,
    ("sklearn.utils.validation", "check_array"): rebuilding.CHECK_ARRAY,
    # A function that every spline holds; `native` gives it back.
    ("scipy._lib.array_api_compat.numpy._aliases", "asarray"): rebuilding.ASARRAY,
    ("numpy", "dtype"): rebuilding.dtype,
    ("numpy", "ndarray"): rebuilding.NDARRAY,
    ("numpy._core.multiarray", "_reconstruct"): rebuilding.reconstruct,
    ("numpy._core.multiarray", "scalar"): rebuilding.scalar,
    ("numpy._core.numeric", "_frombuffer"): rebuilding.from_buffer,
    ("numpy.ma", "MaskedArray"): rebuilding.MASKED,
    ("numpy.ma.core", "MaskedArray"): rebuilding.MASKED,
    ("numpy.ma.core", "_mareconstruct"): rebuilding.reconstruct_masked,
    ("joblib.numpy_pickle", "NumpyArrayWrapper"): rebuilding.StoredArray,
    ("joblib.numpy_pickle_utils", "NumpyArrayWrapper"): rebuilding.StoredArray,
}
_GENERATORS = re.compile(r"numpy\.random(\.[a-z_0-9]+)?", re.ASCII)
_GENERATOR_NAMES = re.compile(
    r"MT19937|PCG64|PCG64DXSM|Philox|SFC64|SeedSequence|__\w+_ctor|__pyx_unpickle_\w+", re.ASCII
)


def resolve(module: str, name: str) -> Any:
    """What a pickle gets for a global. Raises UnsupportedModel, with `module.name` in `seen`."""
    module = _modern(module)
    if (module, name) in _REPLACED:
        return _REPLACED[module, name]
    if _GENERATORS.fullmatch(module) and _GENERATOR_NAMES.fullmatch(name):
        return rebuilding.Forgotten
    if name in EXACT.get(module, ()):
        return getattr(imported(module, name), name, None) or refused(module, name)
    family = FAMILIES.get(module)
    if family is not None and family.fullmatch(name):
        return _member(module, name)
    if _SKLEARN.fullmatch(module) and not _BARRED & set(module.split(".")):
        return _estimator(module, name)
    return refused(module, name)


def _modern(module: str) -> str:
    """Names that older versions of numpy and scikit-learn, and Python 2, wrote."""
    if module == "__builtin__":
        return "builtins"
    if module == "_loss":
        return "sklearn._loss._loss"
    return "numpy._core" + module.removeprefix("numpy.core") if module.startswith("numpy.core.") else module


def imported(module: str, name: str) -> ModuleType:
    """The module of a global. Raises UnsupportedModel where it isn't there."""
    try:
        return importlib.import_module(module)
    except ImportError:
        refused(module, name)


def _member(module: str, name: str) -> Any:
    found = getattr(imported(module, name), name, None)
    if getattr(found, "__module__", None) != module:
        refused(module, name)
    return found


def _estimator(module: str, name: str) -> Any:
    from sklearn.base import BaseEstimator

    if not name.isidentifier():
        refused(module, name)
    found = _member(module, name)
    if not (isinstance(found, type) and issubclass(found, BaseEstimator)):
        refused(module, name)
    return found


def refused(module: str, name: str, what: str = "the pickle") -> NoReturn:
    """Raises UnsupportedModel, with `module.name` in `seen`."""
    seen = f"{module}.{name}".encode("ascii", "backslashreplace").decode()[:200]
    raise UnsupportedModel(
        f"{what} needs {seen}, which is not among the classes that this node loads; keep to estimators of"
        " scikit-learn itself, without functions of your own, or pickle search.best_estimator_",
        seen=f"{what.replace('the ', 'a ')} that needs {seen}",
    )
