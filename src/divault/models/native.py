"""Objects whose compiled code trusts the numbers in them: trees, splines, sparse matrices, checked when all is built.

An index that points outside would read foreign memory, and a tree that leads back to itself would never end. What was
checked is copied first, so that nothing else in the file can change it later: arrays may share their bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from divault.models import rebuilding

_TREES = {
    ("sklearn.tree._tree", "Tree"),
    ("sklearn.ensemble._hist_gradient_boosting.predictor", "TreePredictor"),
}
_SPLINE = ("scipy.interpolate._bsplines", "BSpline")
_SPLINE_STATE = frozenset({"_asarray", "_t", "_c", "t", "c", "k", "extrapolate", "axis"})
"""Attributes of a spline, without the underscore in older versions; any other could stand in the place of a method."""
_LEAF = -1
_MAX_OBJECTS = 2_000_000
"""Objects of one model; a forest of 10,000 trees has some 100,000."""


def is_native(value: Any) -> bool:
    """Whether `check` has something to say about this object."""
    from scipy import sparse

    kind = type(value)
    return (kind.__module__, kind.__name__) in {*_TREES, _SPLINE} or bool(sparse.issparse(value))


def check(value: Any) -> None:
    """Raises UnsupportedModel where a number points outside the object; ValueError for a broken matrix or spline."""
    from scipy import sparse

    if sparse.issparse(value):
        if not isinstance(value, sparse.csr_matrix | sparse.csc_matrix | sparse.csr_array | sparse.csc_array):
            rebuilding.damaged("a sparse matrix that is neither CSR nor CSC")
        value.data, value.indices, value.indptr = value.data.copy(), value.indices.copy(), value.indptr.copy()
        # By the class: an attribute of the instance could stand before its method.
        type(value).check_format(value, full_check=True)
    elif type(value).__name__ == "Tree":
        if value.capacity != value.node_count:
            rebuilding.damaged("a tree that has another number of nodes than it says")
        check_nodes(value.children_left, value.children_right, value.feature, value.n_features)
    elif type(value).__name__ == "BSpline":
        _check_spline(value)
    else:
        _check_histogram_tree(value)


def _check_spline(value: Any) -> None:
    """Its constructor looks at knots, coefficients and degree; what that makes of them takes the place of the state."""
    import numpy as np

    held = vars(value)
    knots, factors = (held.get(f"_{name}", held.get(name)) for name in ("t", "c"))
    if not held.keys() <= _SPLINE_STATE or held.get("axis") != 0 or type(held.get("k")) is not int:
        rebuilding.damaged("a spline with strange attributes")
    if any(type(part) is not np.ndarray or part.dtype != np.float64 for part in (knots, factors)):
        rebuilding.damaged("a spline without numbers")
    made = type(value)(knots.copy(), factors.copy(), held["k"], extrapolate=held.get("extrapolate"))
    held.clear()
    held.update(vars(made))


def check_nodes(left: Any, right: Any, feature: Any, features: int) -> None:
    """The nodes of a tree as arrays; a leaf has -1 on its left. Raises UnsupportedModel.

    A node may be its own ancestor: that tree never ends, which the deadline of its worker is for.
    """
    inner = left != _LEAF
    inside = all(((side >= 0) & (side < len(left)))[inner].all() for side in (left, right))
    if not inside or (right >= 0)[~inner].any() or (feature[inner] < 0).any() or (feature[inner] >= features).any():
        rebuilding.damaged("a tree whose nodes point outside it")


def _check_histogram_tree(value: Any) -> None:
    """The predictor of histogram boosting; how many features there are is not in it."""
    import numpy as np
    from sklearn.ensemble._hist_gradient_boosting.common import PREDICTOR_RECORD_DTYPE as NODE

    held = value.__dict__
    held |= {name: part.copy() for name, part in held.items() if type(part) is np.ndarray}
    nodes = held.get("nodes")
    bits = (held.get("binned_left_cat_bitsets"), held.get("raw_left_cat_bitsets"))
    if type(nodes) is not np.ndarray or nodes.dtype != NODE or nodes.ndim != 1 or not len(nodes):
        rebuilding.damaged("a tree without nodes")
    if any(type(side) is not np.ndarray or side.dtype != np.uint32 or side.shape[1:] != (8,) for side in bits):
        rebuilding.damaged("a tree without its categories")
    inner = nodes["is_leaf"] == 0
    for side in ("left", "right"):
        children = nodes[side].astype(np.int64)
        if not ((children >= 0) & (children < len(nodes)))[inner].all():
            rebuilding.damaged("a tree whose nodes point outside it")
    kinds = nodes[inner & (nodes["is_categorical"] != 0)]["bitset_idx"]
    if len(kinds) and int(kinds.max()) >= min(len(side) for side in bits):
        rebuilding.damaged("a tree whose categories point outside it")


def check_all(root: Any) -> None:
    """Every such object that can be reached from an estimator. Raises UnsupportedModel."""
    try:
        for value in reachable(root):
            _check_part(value)
    # What arrays of another kind than expected, and scipy's own check, raise.
    except (ValueError, TypeError, AttributeError, IndexError, KeyError) as err:
        rebuilding.damaged(f"a tree or matrix that is none: {type(err).__name__}")


def _check_part(value: Any) -> None:
    if is_native(value):
        check(value)
    elif "_predictors" in getattr(value, "__dict__", {}):
        _check_predictors(value)
    elif type(value).__name__ == "FunctionTransformer":
        _check_function(value)
    else:
        _check_width(value)


def may_never_end(value: Any) -> bool:
    """Whether this is a tree with a node that does not stand before its children: the library grows none."""
    import numpy as np

    kind = type(value)
    if (kind.__module__, kind.__name__) not in _TREES:
        return False
    if kind.__name__ == "Tree":
        sides, inner = (value.children_left, value.children_right), value.children_left != _LEAF
    else:
        sides, inner = (value.nodes["left"], value.nodes["right"]), value.nodes["is_leaf"] == 0
    return any(bool((side.astype(np.int64) <= np.arange(len(side)))[inner].any()) for side in sides)


def _check_function(part: Any) -> None:
    """Raises UnsupportedModel where the answer goes into an array of the model: it would remember callers."""
    held = vars(part)
    if any("out" in (held.get(name) or {}) for name in ("kw_args", "inv_kw_args")):
        rebuilding.damaged("a function that writes into the model (out)")


def _check_width(model: Any) -> None:
    """An estimator looks at how many features a row has, its tree doesn't; boosting runs the trees themselves."""
    import numpy as np

    held = getattr(model, "__dict__", {})
    stages = held.get("estimators_")
    members = stages.ravel().tolist() if isinstance(stages, np.ndarray) else []
    trees = [
        tree for tree in [held.get("tree_"), *(member.tree_ for member in members)] if type(tree).__name__ == "Tree"
    ]
    features = held.get("n_features_in_")
    if trees and not (isinstance(features, int) and max(tree.n_features for tree in trees) <= features):
        rebuilding.damaged("a tree that reads a feature which isn't there")


class FixedWidth:
    """The part of histogram boosting that makes its columns, held to as many as its trees may read."""

    def __init__(self, inner: Any, width: int) -> None:
        self.inner = inner
        self.width = width

    def transform(self, rows: Any) -> Any:
        """The columns. Raises ValueError where they are fewer or more."""
        found = self.inner.transform(rows)
        if found.shape[1:] != (self.width,):
            raise ValueError(f"{found.shape} where {self.width} columns are expected")
        return found


def _check_predictors(model: Any) -> None:
    features = int(getattr(model, "n_features_in_", 0))
    trees = list(_flat(vars(model)["_predictors"]))
    if any(_largest_feature(tree) >= features for tree in trees):
        rebuilding.damaged("a tree that reads a feature which isn't there")
    _check_categories(model, trees, features)
    # Compiled code looks at no width, and what made the columns is whatever the file says.
    first = vars(model).get("_preprocessor")
    if first is not None and not isinstance(first, FixedWidth):
        model._preprocessor = FixedWidth(first, features)  # noqa: SLF001 - the library has no other name for it


def _check_categories(model: Any, trees: list[Any], features: int) -> None:
    """Nodes of categories look those up that the model knows of their feature: it has to know some."""
    import numpy as np

    read = {int(one) for tree in trees for one in tree.nodes["feature_idx"][tree.nodes["is_categorical"] != 0]}
    if read:
        marks = vars(model)["_bin_mapper"].is_categorical_
        if type(marks) is not np.ndarray or marks.shape != (features,) or not marks[list(read)].all():
            rebuilding.damaged("a tree of categories that its model doesn't know")


def _flat(found: Any) -> Iterator[Any]:
    for part in found:
        if isinstance(part, list):
            yield from part


def _largest_feature(tree: Any) -> int:
    """Index of the last feature that a predictor of histogram boosting reads; -1 for none."""
    check(tree)
    features = tree.nodes["feature_idx"][tree.nodes["is_leaf"] == 0]
    if len(features) and int(features.min()) < 0:
        rebuilding.damaged("a tree that reads a feature which isn't there")
    return int(features.max()) if len(features) else -1


def reachable(root: Any) -> Iterator[Any]:
    """Everything that attributes and containers of an estimator lead to, and itself. Raises UnsupportedModel."""
    import numpy as np

    seen: dict[int, Any] = {}
    todo = [root]
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, str | bytes | int | float | bool | None):
            continue
        if len(seen) >= _MAX_OBJECTS:
            rebuilding.damaged(f"over {_MAX_OBJECTS} objects")
        seen[id(value)] = value
        yield value
        if isinstance(value, dict):
            todo.extend(value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            todo.extend(value)
        elif isinstance(value, np.ndarray):
            todo.extend(value.ravel().tolist() if value.dtype.hasobject else ())
        elif not isinstance(value, type):
            todo.extend(getattr(value, "__dict__", {}).values())
