"""What an XGBoost file holds, JSON or UBJSON, checked to the last index before the library sees any of it.

Rules:

1. The library trusts the numbers in a model: a child, feature or class that points outside would read foreign memory.
2. It is handed a file written anew of what was checked here, never the file itself: two parsers can't disagree.
3. Every array is as long as the counts say, so memory goes with the size of the file.

Source: the JSON schema of XGBoost's model files (doc/model.schema) and the files that 1.0 to 3.2 write.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from divault.errors import SealedFileDamaged, UnsupportedModel
from divault.models import ubjson
from divault.models.boosters import MAX_OUTPUTS
from divault.models.files import head
from divault.models.rows import MAX_FEATURES
from divault.values import MemoryFile

SUPPORTED = "XGBoost 1.0 or later as .ubj or .json: trees with numeric splits, dart or gblinear"
MAX_LEVELS = 4096
"""Of a tree: the library goes down by calling itself, on a stack of few MiB."""
_JSON = re.compile(rb'\s*\{\s*("version"\s*:\s*\[[\d\s,]{1,40}\]\s*,\s*)?"learner"\s*:\s*\{')
_UBJSON = re.compile(rb"\{L\0{7}(\x07learner\{|\x07version\[.{1,60}?\x07learner\{)", re.DOTALL)
_WHOLE = re.compile(r"\d{1,9}")
_NUMBER = r"-?\d{1,40}(\.\d{1,40})?([eE][-+]?\d{1,3})?"
_BASE_SCORE = re.compile(rf"\[?{_NUMBER}(,{_NUMBER})*\]?", re.ASCII)
_PARAMETER = re.compile(r"[A-Za-z0-9_:.,+\-\[\] ]{0,65536}", re.ASCII)
_INT32 = 2**31 - 1
_NO_PARENT = 2**31 - 1
T = TypeVar("T")


class _Model(msgspec.Struct, Generic[T], forbid_unknown_fields=True):
    trees: list[T] = []
    tree_info: Any = ()
    iteration_indptr: Any = None
    gbtree_model_param: dict[str, str] = {}
    cats: dict[str, Any] = {}
    weight_drop: Any = None
    """Of dart's trees, where 3.4 and later have them."""
    weights: Any = None
    boosted_rounds: Any = None
    param: Any = None


class _Inner(msgspec.Struct, Generic[T]):
    model: _Model[T]


class _Booster(msgspec.Struct, Generic[T]):
    name: str
    model: _Model[T] | None = None
    gbtree: _Inner[T] | None = None
    weight_drop: Any = None


class _Learner(msgspec.Struct, Generic[T]):
    gradient_booster: _Booster[T]
    learner_model_param: dict[str, str]
    objective: dict[str, Any]
    """Its name, its parameters as objects, and what training kept for itself, which is left out."""
    attributes: dict[str, str] = {}
    feature_types: list[str] = []


class _Document(msgspec.Struct, Generic[T]):
    learner: _Learner[T]
    version: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class XgboostModel:
    """A model that was checked."""

    objective: str
    booster: str
    """`gbtree`, `dart` or `gblinear`."""
    version: tuple[int, int]
    """Of the library that wrote it."""
    features: int
    classes: int
    """0 for anything else than several classes."""
    targets: int
    iterations: int
    """How many the answer is made of; 0 for all."""
    content: bytearray
    """UBJSON of what was checked."""


def is_xgboost(file: MemoryFile) -> bool:
    """Whether the file starts as a model file of XGBoost does, JSON or UBJSON. Never raises."""
    start = head(file)
    return _UBJSON.match(start) is not None or _JSON.match(start) is not None


def read(file: MemoryFile) -> XgboostModel:
    """The model. Raises UnsupportedModel for what is not supported, SealedFileDamaged for broken content."""
    data = mmap.mmap(file.fd, 0, access=mmap.ACCESS_READ)
    try:
        return _checked(*_parsed(data))
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, AttributeError) as err:  # the last: of an array
        words = str(err).encode("ascii", "backslashreplace").decode()[:120]
        # What a later version brings may change answers: it is never left out without a word.
        if "unknown field" in words:
            _refused(f"an XGBoost model that is not known here: {words}")
        _damaged(words)


def _checked(version: tuple[int, int, int], learner: _Learner[Any]) -> XgboostModel:
    sizes = _sizes(learner.learner_model_param)
    objective, parameters = _objective(learner.objective, sizes)
    booster, iterations = _booster(learner, sizes)
    content = {
        "learner": {
            "attributes": {},
            "feature_names": [],
            "feature_types": [],
            "gradient_booster": booster,
            "learner_model_param": sizes.written(),
            "objective": {"name": objective, **parameters},
        },
        "version": list(version),
    }
    return XgboostModel(
        objective=objective,
        booster=str(booster["name"]),
        version=version[:2],
        features=sizes.features,
        classes=sizes.classes,
        targets=sizes.targets,
        iterations=iterations,
        content=ubjson.write(content),
    )


def _parsed(data: mmap.mmap) -> tuple[tuple[int, int, int], _Learner[Any]]:
    document: _Document[Any]
    if data[:2] == b"{L":
        document = msgspec.convert(ubjson.read(data), _Document[dict[str, Any]])
    else:
        document = msgspec.json.decode(data, type=_Document[msgspec.Raw])
    if not 1 <= document.version[0] <= 99 or not 0 <= min(document.version[1:]) <= max(document.version[1:]) <= 999:
        _refused(f"an XGBoost model of version {document.version}")
    if "c" in document.learner.feature_types:
        _categorical()
    return document.version, document.learner


@dataclass(frozen=True, slots=True)
class _Sizes:
    features: int
    classes: int
    targets: int
    base_score: str
    boost_from_average: str

    @property
    def groups(self) -> int:
        """Numbers that trees sum up for a row."""
        return max(self.classes, self.targets, 1)

    def written(self) -> dict[str, str]:
        """As the file has them."""
        return {
            "base_score": self.base_score,
            "boost_from_average": self.boost_from_average,
            "num_class": str(self.classes),
            "num_feature": str(self.features),
            "num_target": str(self.targets),
        }


def _sizes(told: Mapping[str, str]) -> _Sizes:
    sizes = _Sizes(
        features=_whole(told, "num_feature", 1),
        classes=_whole(told, "num_class", 0),
        targets=_whole(told, "num_target", 1, "1"),
        base_score=told.get("base_score", ""),
        boost_from_average=told.get("boost_from_average", "1"),
    )
    if sizes.features > MAX_FEATURES:
        _refused(f"an XGBoost model with {sizes.features} features, over {MAX_FEATURES}")
    if sizes.groups > MAX_OUTPUTS:
        _refused(f"an XGBoost model with {sizes.groups} classes or targets, over {MAX_OUTPUTS}")
    if sizes.classes and sizes.targets > 1:
        _refused("an XGBoost model with several targets of several classes")
    scores = sizes.base_score.count(",") + 1
    if not _BASE_SCORE.fullmatch(sizes.base_score) or scores not in {1, sizes.groups}:
        _damaged("base_score is not a number for each class or target")
    if sizes.boost_from_average not in {"0", "1"}:
        _damaged("boost_from_average is neither 0 nor 1")
    return sizes


def _whole(told: Mapping[str, str], name: str, least: int, default: str = "") -> int:
    text = told.get(name, default)
    if not _WHOLE.fullmatch(text) or int(text) < least:
        _damaged(f"{name} is no number from {least} on")
    return int(text)


def _objective(told: Mapping[str, Any], sizes: _Sizes) -> tuple[str, dict[str, dict[str, str]]]:
    name = told.get("name")
    if not isinstance(name, str):
        _damaged("an objective without a name")
    parameters = {key: value for key, value in told.items() if isinstance(value, dict)}
    if parameters.get("lambdarank_param", {}).get("lambdarank_unbiased") == "1":
        # It concerns training alone, and asks for the lists that training keeps.
        parameters["lambdarank_param"] = parameters["lambdarank_param"] | {"lambdarank_unbiased": "0"}
    texts = [text for value in parameters.values() for pair in value.items() for text in pair]
    if not all(isinstance(text, str) and _PARAMETER.fullmatch(text) for text in (name, *parameters, *texts)):
        _damaged("an objective with odd parameters")
    classes = parameters.get("softmax_multiclass_param", {}).get("num_class")
    if name.startswith("multi:") and (classes != str(sizes.classes) or sizes.classes < 2):
        _damaged("the objective has another number of classes than the model")
    if not name.startswith("multi:") and sizes.classes > 1:
        _damaged("several classes without an objective for them")
    return name, parameters


def _booster(learner: _Learner[Any], sizes: _Sizes) -> tuple[dict[str, Any], int]:
    """The booster as it is written, and how many iterations count."""
    found = learner.gradient_booster
    if found.name not in {"gbtree", "gblinear", "dart"}:
        _refused("an XGBoost model with another booster than gbtree, dart or gblinear")
    if found.name == "gblinear" and found.model is not None:
        return _linear(found.model, sizes), 0
    inner = found.gbtree.model if found.name == "dart" and found.gbtree is not None else found.model
    if inner is None or found.name == "gblinear":
        return _damaged("a booster without a model")
    model, rounds = _trees(inner, sizes)
    best = _best(learner.attributes, rounds)
    written = {"model": model, "name": "gbtree"}
    dropped = found.weight_drop if found.name == "dart" else inner.weight_drop
    if dropped is None and found.name == "gbtree":
        return written, best
    # The library reads this one list as values, never as an array. All versions take dart's trees in this form.
    weights = _floats(dropped, len(model["trees"]), "weight_drop").tolist()
    return {"gbtree": written, "name": "dart", "weight_drop": weights}, best


def _linear(model: _Model[Any], sizes: _Sizes) -> dict[str, Any]:
    weights = _floats(model.weights, (sizes.features + 1) * sizes.groups, "weights")
    return {"model": {"boosted_rounds": 1, "weights": weights}, "name": "gblinear"}


def _best(attributes: Mapping[str, str], rounds: int) -> int:
    """What XGBModel.predict does after early stopping, for a file that an XGBModel wrote; Booster.predict takes all."""
    if "scikit_learn" not in attributes or "best_iteration" not in attributes:
        return 0
    best = _whole(attributes, "best_iteration", 0)
    if best >= rounds:
        _damaged("best_iteration is after the last one")
    return best + 1


def _trees(model: _Model[Any], sizes: _Sizes) -> tuple[dict[str, Any], int]:
    """Trees as they are written, and the number of iterations."""
    count = len(model.trees)
    parallel = _whole(model.gbtree_model_param, "num_parallel_tree", 1, "1")
    if _whole(model.gbtree_model_param, "num_trees", 0) != count or parallel > max(count, 1):
        _damaged("another number of trees than it says")
    if len(_listed(model.cats.get("enc", ()))):
        _categorical()
    info = _integers(model.tree_info, count, "tree_info", (0, sizes.groups - 1))
    written = {
        "gbtree_model_param": {"num_parallel_tree": str(parallel), "num_trees": str(count)},
        "tree_info": info.tolist(),
        "trees": [_tree(tree, place, sizes.features) for place, tree in enumerate(model.trees)],
    }
    if model.iteration_indptr is None:
        return written, count // (parallel * sizes.groups)
    bounds = _integers(model.iteration_indptr, None, "iteration_indptr", (0, count))
    if not len(bounds) or bounds[0] != 0 or bounds[-1] != count or (np.diff(bounds) < 0).any():
        _damaged("iteration_indptr does not go from the first tree to the last")
    return written | {"iteration_indptr": bounds.tolist()}, len(bounds) - 1


def _tree(found: Any, place: int, features: int) -> dict[str, Any]:
    tree = msgspec.json.decode(found) if isinstance(found, msgspec.Raw) else found
    told = tree.get("tree_param") if isinstance(tree, dict) else None
    if not isinstance(told, dict) or tree.get("id", place) != place:
        _damaged("a tree that is none, or out of order")
    told = {str(name): str(text) for name, text in told.items()}
    nodes = _whole(told, "num_nodes", 1)
    if _whole(told, "size_leaf_vector", 0, "1") > 1:
        _refused("an XGBoost model with several numbers in a leaf (multi_strategy=multi_output_tree)")
    if tree.get("split_type") is not None and _integers(tree["split_type"], nodes, "split_type", (0, 1)).any():
        _categorical()
    if len(_listed(tree.get("categories_nodes", ()))):
        _categorical()
    param = {
        "num_deleted": "0",  # nodes that nothing leads to are leaves here
        "num_feature": str(features),
        "num_nodes": str(nodes),
        "size_leaf_vector": "1",
    }
    return {"id": place, "tree_param": param, **_no_categories(nodes), **_nodes(tree, nodes, features)}


def _no_categories(nodes: int) -> dict[str, NDArray[Any]]:
    return {
        "categories": np.empty(0, np.int32),
        "categories_nodes": np.empty(0, np.int32),
        "categories_segments": np.empty(0, np.int64),
        "categories_sizes": np.empty(0, np.int64),
        "split_type": np.zeros(nodes, np.uint8),
    }


def _nodes(tree: Mapping[str, Any], count: int, features: int) -> dict[str, NDArray[Any]]:
    """The arrays of a tree's nodes. Raises SealedFileDamaged where one points outside or the tree does not end."""
    left = _integers(tree.get("left_children"), count, "left_children", (-1, count - 1))
    right = _integers(tree.get("right_children"), count, "right_children", (-1, count - 1))
    feature = _integers(tree.get("split_indices"), count, "split_indices", (0, _INT32))
    inner = left >= 0
    # The library goes from a left child to the right one by adding 1.
    if (right != np.where(inner, left + 1, -1)).any() or (left[inner] == 0).any():
        _damaged("a tree whose children don't stand together")
    if (feature[inner] >= features).any():
        _damaged("a tree that reads a feature which isn't there")
    # Children that come later lead to an end, and a tree of few nodes has few levels: most need no walk.
    if (left[inner] <= np.flatnonzero(inner)).any() or count > 2 * MAX_LEVELS:
        _check_walk(left)
    stats = ("base_weights", "loss_changes", "split_conditions", "sum_hessian")
    indices: dict[str, NDArray[Any]] = {
        "left_children": left,
        "right_children": right,
        "split_indices": np.where(inner, feature, 0),
        "parents": _parents(left, inner),
        "default_left": _integers(tree.get("default_left"), count, "default_left", (0, 1)).astype(np.uint8),
    }
    return indices | {name: _floats(tree.get(name), count, name) for name in stats}


def _parents(left: NDArray[np.int32], inner: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Made here: the library follows them while it loads. Raises SealedFileDamaged for a child of two."""
    children = np.concatenate((left[inner], left[inner] + 1))
    if len(children) and np.bincount(children).max() > 1:
        _damaged("a tree with a child of two nodes")
    # Deleted nodes are nobody's children, and only the root may have no parent.
    parents = np.zeros(len(left), np.int32)
    parents[0] = _NO_PARENT
    parents[children] = np.tile(np.flatnonzero(inner), 2)
    return parents


def _check_walk(left: NDArray[np.int32]) -> None:
    """Raises SealedFileDamaged where a node is reached twice or never; UnsupportedModel for too many levels."""
    level, seen, levels = np.zeros(1, np.int32), 0, 0
    inner = np.count_nonzero(left >= 0)
    while len(level):
        children = left[level]
        children = children[children >= 0]
        seen += len(children)
        levels += 1
        if seen > inner:
            _damaged("a tree that leads back to itself")
        if levels > MAX_LEVELS:
            _refused(f"an XGBoost model with a tree of over {MAX_LEVELS} levels")
        level = np.concatenate((children, children + 1))
    if seen < inner:
        _damaged("a tree with nodes that nothing leads to")


def _listed(values: Any) -> Any:
    """A list of plain numbers, or an array. Raises SealedFileDamaged."""
    if isinstance(values, np.ndarray):
        return values
    if not isinstance(values, list | tuple) or not set(map(type, values)) <= {int, float, bool}:
        _damaged("something else than numbers")
    return values


def _integers(values: Any, count: int | None, name: str, bounds: tuple[int, int]) -> NDArray[np.int32]:
    found = _numbers(values, count, name, "iub")
    if len(found) and not bounds[0] <= int(found.min()) <= int(found.max()) <= bounds[1]:
        _damaged(f"{name} has a number outside {bounds[0]} to {bounds[1]}")
    return found.astype(np.int32)


def _floats(values: Any, count: int, name: str) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return _numbers(values, count, name, "iuf").astype(np.float32)


def _numbers(values: Any, count: int | None, name: str, kinds: str) -> NDArray[Any]:
    found = np.asarray(_listed(values))
    if count is not None and len(found) != count:
        _damaged(f"{name} has {len(found)} numbers where {count} are expected")
    if len(found) and found.dtype.kind not in kinds:
        _damaged(f"{name} has other numbers than expected")
    return found


def _damaged(what: str) -> NoReturn:
    raise SealedFileDamaged(f"the XGBoost file is broken: {what}", stage="payload")


def _refused(seen: str) -> NoReturn:
    raise UnsupportedModel(f"{seen}; this node loads {SUPPORTED}", seen=seen, supported=SUPPORTED)


def _categorical() -> NoReturn:
    _refused("an XGBoost model with categorical features (encode them as numbers before training)")
