"""What the allow-list loader refuses, by name, and what this node names and does not load."""

from __future__ import annotations

import bz2
import copy
import functools
import gzip
import io
import lzma
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import sklearn
import skops.io
from scipy import sparse
from scipy.interpolate import BSpline
from sklearn.cluster import DBSCAN
from sklearn.decomposition import PCA
from sklearn.ensemble import (
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, MaxAbsScaler, SplineTransformer, StandardScaler
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils import check_array

from divault import models
from divault.errors import DivaultError, UnsupportedModel
from divault.models import native
from divault.models.base import Inputs
from divault.models.sklearn import SklearnPickle
from tests.memory_models import load, memory_files

TREE = DecisionTreeClassifier(random_state=0).fit([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], [0, 1, 1])


def seen(data: bytes) -> str:
    """What the refusal says that the file is."""
    with memory_files({"model": data}) as files, pytest.raises(UnsupportedModel) as caught:
        models.load(files)
    found: str = caught.value.data["seen"]
    return found


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def own_function(rows: Any) -> Any:
    return rows


CALLS: dict[str, tuple[Any, str]] = {
    "a command": (Calls(os.system, "true"), "posix.system"),
    "eval": (Calls(eval, "1"), "builtins.eval"),
    "getattr": (Calls(getattr, "x", "upper"), "builtins.getattr"),
    "import": (Calls(__import__, "os"), "builtins.__import__"),
    "a file": (Calls(open, "/etc/passwd"), f"{open.__module__}.open"),
    "a process": (Calls(subprocess.Popen, "true"), "subprocess.Popen"),
    "much memory": (Calls(bytearray, 10 << 30), "builtins.bytearray"),
    "a long range": (Calls(range, 10 << 30), "builtins.range"),
    "a partial": (Calls(functools.partial, print), "builtins.print"),
    "numpy reading a file": (Calls(np.load, "/etc/passwd"), "numpy.load"),
    "memory by numpy": (Calls(np.zeros, 10 << 30), "numpy.zeros"),
    "a memory map": (Calls(np.memmap, "/etc/passwd"), "numpy.memmap"),
    "joblib reading a file": (Calls(joblib.load, "/etc/passwd"), "joblib.numpy_pickle.load"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("protocol", [3, 4])
def test_a_call_is_refused_by_the_name_of_what_it_calls(name: str, protocol: int) -> None:
    call, word = CALLS[name]

    found = seen(pickle.dumps(call, protocol=protocol))

    assert found == f"a pickle that needs {word}"


def test_the_first_refused_name_is_the_one_named() -> None:
    assert seen(pickle.dumps([Calls(os.system, "true"), Calls(eval, "1")])) == "a pickle that needs posix.system"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("sklearn.datasets", "load_files"), ("sklearn.datasets._base", "load_files"), ("sklearn.utils", "shuffle"),
        ("sklearn.externals._arff", "load"), ("sklearn.tests.test_base", "K"), ("sklearn.conftest", "fetch_fixture"),
        ("sklearn.linear_model._logistic", "np.load"), ("sklearn.pipeline", "joblib"), ("sklearn.base", "clone"),
        ("sklearn.metrics._dist_metrics", "PyFuncDistance"), ("sklearn..tree", "x"), ("sklearn.nosuch", "Thing"),
        ("sklearn.tree._classes", "DecisionTreeClassifier.fit"), ("sklearn.tree._classes", "__builtins__"),
        ("sklearn.model_selection._split", "np"), ("numpy.random", "seed"), ("builtins", "object"), ("os", "environ"),
        ("divault.values", "Secret"), ("torch.nn.modules.linear", "Linear"), ("torch.storage", "_load_from_bytes"),
    ],
)  # fmt: skip
def test_a_global_off_the_list_is_refused_by_name(module: str, name: str) -> None:
    assert seen(b"\x80\x02c" + f"{module}\n{name}\n".encode() + b".") == f"a pickle that needs {module}.{name}"


def test_a_function_of_ones_own_inside_a_pipeline_is_named() -> None:
    ours = make_pipeline(FunctionTransformer(own_function), DecisionTreeClassifier()).fit([[0.0], [1.0]], [0, 1])

    assert seen(pickle.dumps(ours)) == f"a pickle that needs {__name__}.own_function"


def with_attributes(made: Any, **told: Any) -> Any:
    vars(made).update(told)
    return made


PARTIALS: dict[str, Callable[[], Any]] = {
    "another function": lambda: functools.partial(np.clip, a_min=0, a_max=1),
    "a class": lambda: functools.partial(LogisticRegression),
    "more arguments": lambda: functools.partial(check_array, False, dtype=[np.float64], ensure_all_finite=False),
    "another dtype": lambda: functools.partial(check_array, dtype="U100000000", ensure_all_finite=False),
    "another word": lambda: functools.partial(check_array, dtype=[np.float64], ensure_all_finite=False, copy=True),
    "fewer words": lambda: functools.partial(check_array, dtype=[np.float64]),
    "no word": lambda: functools.partial(check_array),
    "the function itself": lambda: check_array,
    "attributes of its own": lambda: with_attributes(
        functools.partial(check_array, dtype=[np.float64], ensure_all_finite=False), note="x"
    ),
}


@pytest.mark.parametrize("name", PARTIALS)
@pytest.mark.parametrize("written", [pickle.dumps, skops.io.dumps], ids=["pickle", "skops"])
def test_a_partial_that_is_not_the_librarys_own_is_refused(name: str, written: Callable[[Any], bytes]) -> None:
    theirs = functools.partial(check_array, dtype=[np.float64], ensure_all_finite=False)
    ours = make_pipeline(FunctionTransformer(theirs), LogisticRegression()).fit([[0.0], [1.0]], [0, 1])
    assert models_load(written(ours))
    ours.steps[0][1].func = PARTIALS[name]()

    with memory_files({"model": written(ours)}) as files, pytest.raises(UnsupportedModel):
        models.load(files)


def test_empty_bytes_are_data_and_sized_bytes_are_not() -> None:
    """Protocol 2 writes b"" as a call of `bytes`; `bytes(n)` would make memory."""
    assert seen(pickle.dumps(b"", protocol=2)) == "a pickle of builtins.bytes"
    assert "damaged" in seen(b"\x80\x02c__builtin__\nbytes\nK\x05\x85R.")


CLASS = b"\x80\x02csklearn.tree._classes\nDecisionTreeClassifier\n"
RAW: dict[str, bytes] = {
    "a persistent reference": b"\x80\x02X\x01\x00\x00\x00aQ.",
    "an extension code": b"\x80\x02\x82\x01.",
    "a call of what was built": b"\x80\x02K\x01)R.",
    "an instance of what was built": b"\x80\x02K\x01)\x81.",
    "state for a class": CLASS + b"}X\x03\x00\x00\x00fitK\x01sb.",
    "a reserved name": CLASS + b")\x81}X\x09\x00\x00\x00__class__K\x01sb.",
    "items for an object": CLASS + b")\x81K\x01a.",
    "no end": b"\x80\x02K",
    "an unknown opcode": b"\x80\x02\xff.",
    "a frame over the end": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fK\x01.",
    "bytes over the end": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fx.",
    "an array of forged pointers": b"\x80\x02cnumpy\nndarray\n(K\x01\x85X\x01\x00\x00\x00OtR.",
}


@pytest.mark.parametrize("name", RAW)
def test_a_forged_stream_is_refused(name: str) -> None:
    assert "damaged" in seen(RAW[name])


@pytest.mark.parametrize(
    ("node", "side", "value"),
    [
        (0, "left_child", 999), (0, "right_child", -2), (0, "left_child", 2**40), (0, "feature", 7),
        (1, "left_child", -5),  # a leaf has -1 there, and nothing else
    ],
)  # fmt: skip
def test_a_tree_that_points_outside_itself_is_refused(node: int, side: str, value: int) -> None:
    """The library's compiled code would read there."""
    forged = pickle.loads(pickle.dumps(TREE))
    state = forged.tree_.__getstate__()
    state["nodes"][side][node] = value
    forged.tree_.__setstate__(state)

    assert "outside" in seen(pickle.dumps(forged))


WIDE: dict[str, Callable[[], Any]] = {
    "a tree": DecisionTreeClassifier,
    "a forest": lambda: RandomForestClassifier(2),
    "boosting": lambda: GradientBoostingClassifier(n_estimators=2),
    "boosting in a pipeline": lambda: make_pipeline(StandardScaler(), GradientBoostingClassifier(n_estimators=2)),
}


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("told", [2, None], ids=["fewer", "unsaid"])
def test_a_tree_that_reads_more_features_than_its_estimator_takes_is_refused(name: str, told: int | None) -> None:
    ours = WIDE[name]().fit(np.eye(8), [0, 1] * 4)
    assert load(SklearnPickle(), {"model": pickle.dumps(ours)})
    inner = ours[-1] if name.endswith("pipeline") else ours
    for part in [inner, *np.ravel(getattr(inner, "estimators_", []))]:
        if name == "a forest" or part is inner:
            del part.n_features_in_
            vars(part).update({} if told is None else {"n_features_in_": told})

    assert "a feature which isn't there" in seen(pickle.dumps(ours))


def categorical() -> Any:
    rows = np.c_[np.arange(40) % 4, np.arange(40) % 3, np.arange(40.0)]
    boosted = HistGradientBoostingClassifier(max_iter=2, min_samples_leaf=2, categorical_features=[0])
    return boosted.fit(rows, rows[:, 0] % 2)


FEWER: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no categories": (
        lambda ours: vars(ours._bin_mapper).update(is_categorical_=np.zeros(3, np.uint8)),
        "of categories",
    ),
    "fewer features": (
        lambda ours: vars(ours._bin_mapper).update(is_categorical_=np.ones(1, np.uint8)),
        "of categories",
    ),
    "fewer columns": (lambda ours: vars(ours).update(_preprocessor=PCA(1).fit(np.eye(3))), "does not run"),
}


@pytest.mark.parametrize("name", FEWER)
@pytest.mark.parametrize("written", [pickle.dumps, skops.io.dumps], ids=["pickle", "skops"])
def test_histogram_boosting_that_reads_columns_or_categories_which_nobody_made_is_refused(
    name: str, written: Callable[[Any], bytes]
) -> None:
    forge, words = FEWER[name]
    ours = categorical()
    assert models_load(written(ours))
    forge(ours)

    assert words in seen(written(ours))


def test_a_sparse_matrix_that_points_outside_itself_is_refused() -> None:
    ours = LogisticRegression().fit([[0.0, 1.0], [1.0, 0.0]], [0, 1]).sparsify()
    assert sparse.issparse(ours.coef_)
    assert load(SklearnPickle(), {"model": pickle.dumps(ours)})
    ours.coef_.indices[0] = 1000

    assert "damaged" in seen(pickle.dumps(ours))


def another_spline(**changed: Any) -> Any:
    ours = make_pipeline(SplineTransformer(n_knots=3, degree=2), Ridge()).fit([[0.0], [1.0], [2.0]], [0, 1, 2])
    vars(ours[0].bsplines_[0]).update(changed)
    return ours


SPLINES: dict[str, dict[str, Any]] = {
    "fewer coefficients than knots": {"_c": np.eye(2)},
    "no numbers": {"_c": np.zeros((4, 4), dtype=np.int64)},
    "a degree above its knots": {"k": 40},
    "a degree below zero": {"k": -1},
    "knots in disorder": {"_t": np.arange(7.0)[::-1].copy()},
    "another axis": {"axis": 1},
    "a method of its own": {"_ensure_c_contiguous": np.abs},
}


@pytest.mark.parametrize("name", SPLINES)
@pytest.mark.parametrize("written", [pickle.dumps, skops.io.dumps], ids=["pickle", "skops"])
def test_a_spline_that_contradicts_itself_is_refused(name: str, written: Callable[[Any], bytes]) -> None:
    assert models_load(written(another_spline())).description.task == "regression"

    assert "damaged" in seen(written(another_spline(**SPLINES[name])))


@pytest.mark.parametrize("cut", [20, 100, 0.5])
@pytest.mark.parametrize("compress", [0, 3], ids=["plain", "compressed"])
def test_a_cut_file_is_refused(cut: float, compress: int) -> None:
    out = io.BytesIO()
    joblib.dump(TREE, out, compress=compress)
    data = out.getvalue()

    assert "damaged" in seen(data[: int(len(data) * cut) if cut < 1 else len(data) - int(cut)])


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "zlib": zlib.compress, "gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress,
}  # fmt: skip


@pytest.mark.parametrize("packer", PACKERS)
def test_a_small_file_that_unfolds_without_end_is_refused(packer: str) -> None:
    bomb = PACKERS[packer](pickle.dumps(bytes(150_000_000)))

    assert "unfolds to more than 50 times its size" in seen(bomb)


def test_an_object_without_predict_is_named() -> None:
    scaler, clusters = StandardScaler().fit([[1.0]]), DBSCAN().fit([[1.0]])

    assert seen(pickle.dumps(scaler)) == "a pickle of sklearn.preprocessing._data.StandardScaler"
    assert seen(pickle.dumps(clusters)) == "a pickle of sklearn.cluster._dbscan.DBSCAN"
    assert seen(pickle.dumps({"model": TREE})) == "a pickle of builtins.dict"


@pytest.mark.parametrize("setting", ["filename", "file"])
def test_a_vectorizer_that_reads_files_is_refused(setting: str) -> None:
    """Its text would be a path of the node, chosen by a caller."""
    ours = make_pipeline(CountVectorizer(), DecisionTreeClassifier()).fit(["good", "bad"], [0, 1])
    ours.steps[0][1].input = setting

    assert seen(pickle.dumps(ours)) == "a vectorizer that reads files"


def test_a_vectorizer_opens_no_file_even_if_it_is_told_to_later(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("good good good")
    ours = make_pipeline(CountVectorizer(), DecisionTreeClassifier()).fit(["good", "bad"], [0, 1])
    load(SklearnPickle(), {"model": pickle.dumps(ours)})
    ours.steps[0][1].input = "filename"

    with pytest.raises(ValueError, match="no files"):
        ours.predict([str(secret)])


def test_a_model_of_more_columns_than_a_description_can_tell_of_is_refused() -> None:
    ours = LogisticRegression().fit(np.eye(2, 32_768), [0, 1])
    assert load(SklearnPickle(), {"model": pickle.dumps(ours)})
    ours.n_features_in_ = 32_769

    assert seen(pickle.dumps(ours)) == "a model of 32769 features"


def packed(estimator: Any) -> bytes:
    out = io.BytesIO()
    joblib.dump(estimator, out, compress=3)
    return out.getvalue()


OLD: dict[str, tuple[Any, str]] = {
    "no dtype of what is filled in": (SimpleImputer().fit([[0.0], [1.0]]), "_fill_dtype"),
    "no clipping": (MaxAbsScaler().fit([[0.0], [1.0]]), "clip"),
}


@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("written", [pickle.dumps, skops.io.dumps, packed], ids=["pickle", "skops", "compressed"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.InconsistentVersionWarning")
def test_a_model_that_another_version_wrote_and_this_one_does_not_run_is_refused_by_its_version(
    name: str, written: Callable[[Any], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    part, attribute = OLD[name]
    ours = make_pipeline(copy.deepcopy(part), LogisticRegression()).fit([[0.0], [1.0]], [0, 1])
    monkeypatch.setattr("sklearn.base.__version__", "1.6.1")
    assert models_load(written(ours)), "what runs is taken from any version"
    del vars(ours[0])[attribute]
    old = written(ours)
    monkeypatch.undo()

    assert seen(old) == f"a model of scikit-learn 1.6.1 that {sklearn.__version__} does not run"
    assert seen(written(ours)) == "a model that does not run (AttributeError)"


def models_load(data: bytes) -> Any:
    with memory_files({"model": data}) as files:
        return models.load(files)


def test_a_tree_of_an_older_layout_is_refused_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = copy.deepcopy(TREE)
    state = TREE.tree_.__getstate__()
    names = [name for name in state["nodes"].dtype.names if name != "missing_go_to_left"]
    nodes = np.array(state["nodes"][names].tolist(), dtype=[(name, state["nodes"].dtype[name]) for name in names])
    build, arguments, _ = TREE.tree_.__reduce__()
    ours.tree_ = Calls(build, *arguments)
    ours.tree_.call = (build, arguments, {**state, "nodes": nodes})
    monkeypatch.setattr("sklearn.base.__version__", "1.2.2")

    with memory_files({"model": pickle.dumps(ours)}) as files, pytest.raises(UnsupportedModel) as caught:
        models.load(files)

    assert "scikit-learn 1.2.2 wrote" in str(caught.value)


def test_losses_load_by_the_name_that_older_versions_gave_their_module() -> None:
    rows, targets = [[0.0], [1.0], [2.0]], [1.0, 2.0, 3.0]
    ours = GradientBoostingRegressor(n_estimators=2).fit(rows, targets)
    data = pickle.dumps(ours, protocol=2)
    old = data.replace(b"csklearn._loss._loss\n", b"c_loss\n")
    assert old != data

    model = load(SklearnPickle(), {"model": old})

    assert model.predict([Inputs({"features": rows}, {})])[0].result["predictions"] == ours.predict(rows).tolist()
    assert seen(b"\x80\x02c_loss\nnp\n.") == "a pickle that needs sklearn._loss._loss.np"


def zipped(*names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return out.getvalue()


KNOWN: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "empty"),
    "h5": (b"\x89HDF\r\n\x1a\n" + bytes(8), "HDF5"),
    "gguf": (b"GGUF" + bytes(8), "GGUF"),
    "npy": (b"\x93NUMPY" + bytes(8), "numpy"),
    "elf": (b"\x7fELF" + bytes(8), "executable"),
    "html": (b"<!DOCTYPE html><html>", "HTML"),
    "pdf": (b"%PDF-1.7", "PDF"),
    "lightgbm": (b"tree\nversion=v4\n", "LightGBM"),
    "old pickle": (pickle.dumps(TREE, protocol=0), "protocol 0 or 1"),
    "torchscript": (zipped("m/code/a.py", "m/constants.pkl", "m/data.pkl"), "TorchScript"),
    "pt2": (zipped("m/archive_format", "m/models/model.json"), "torch.export"),
    "keras": (zipped("config.json", "metadata.json", "model.weights.h5"), "Keras"),
    "skops": (zipped("schema.json"), "skops"),
    "npz": (zipped("a.npy"), "npz"),
    "zip": (zipped("a.txt"), "zip"),
    "onnx": (b"\x08\x08\x12\x07pytorch\x1a\x052.0.0", "ONNX"),
    "gzip": (gzip.compress(b"hello"), "gzip"),
    "bz2": (bz2.compress(b"hello"), "bzip2"),
    "json": (b'{"a": 1}', "JSON"),
    "text": (b"hello there", "text"),
    "noise": (bytes(range(200, 255)), "unknown"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_no_model_of_ours_is_named(name: str) -> None:
    data, word = KNOWN[name]

    assert word.lower() in seen(data).lower()


def test_a_changed_pickle_is_a_model_or_a_typed_error() -> None:
    """In a process of its own, as in a worker: 1500 changed files, the same ones at every run."""
    script = f"import sys; sys.path[:0] = {sys.path!r}; from {__name__} import change_and_load; change_and_load(1500)"

    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)

    assert (done.returncode, done.stdout) == (0, "done"), done.stderr[-2000:]


def change_and_load(count: int) -> None:
    """Load `count` changed files; anything but a model or a typed error ends the process with a traceback."""
    chance = random.Random(20)
    out = io.BytesIO()
    joblib.dump(TREE, out)
    sources = [pickle.dumps(TREE), pickle.dumps(TREE, protocol=2), out.getvalue(), pickle.dumps(LogisticRegression())]
    for _ in range(count):
        data = bytearray(chance.choice(sources))
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(data))
            data[place : place + chance.randint(0, 2)] = chance.randbytes(chance.randint(0, 3))
        assert loads_or_says_why(bytes(data))
    sys.stdout.write("done")


def loads_or_says_why(data: bytes) -> bool:
    with memory_files({"model": data}) as files:
        try:
            return models.load(files).description.format == "sklearn"
        except DivaultError as err:
            return isinstance(err, UnsupportedModel)


def test_the_tests_know_the_layout_of_a_tree() -> None:
    assert struct.calcsize("q") == TREE.tree_.__getstate__()["nodes"]["left_child"].dtype.itemsize


def test_a_function_that_writes_into_the_model_is_refused() -> None:
    kept = np.zeros((1, 4))
    for words in ("kw_args", "inv_kw_args"):
        ours = make_pipeline(FunctionTransformer(np.square), DecisionTreeClassifier()).fit(np.eye(4), [0, 1, 0, 1])
        ours[0].set_params(**{words: {"out": kept}})
        assert "writes into the model" in seen(pickle.dumps(ours))


@pytest.mark.parametrize("kind", ["histogram", "matrix", "spline"])
def test_what_was_checked_is_nobody_else_s(kind: str) -> None:
    """Arrays of a file may share their bytes: one that is written to later would change another that was checked."""
    value: Any
    if kind == "histogram":
        value = HistGradientBoostingClassifier(max_iter=1).fit(np.eye(4), [0, 1, 0, 1])._predictors[0][0]
        arrays = [value.nodes, value.raw_left_cat_bitsets, value.binned_left_cat_bitsets]
    elif kind == "matrix":
        value = sparse.csr_matrix(np.eye(3))
        arrays = [value.data, value.indices, value.indptr]
    else:
        value = BSpline(np.arange(8.0), np.ones(4), 3)
        arrays = [value.t, value.c]
    native.check(value)
    held = [part for part in vars(value).values() if isinstance(part, np.ndarray)]

    assert len(held) >= len(arrays)
    assert not any(np.shares_memory(ours, part) for ours in arrays for part in held)
