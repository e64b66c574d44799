"""Pickles of strangers: ordinary estimators load and answer as before, everything else is refused by its name."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import skops.io
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import KMeans
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.ensemble import (
    AdaBoostClassifier,
    BaggingClassifier,
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
    StackingClassifier,
    VotingClassifier,
)
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer, TfidfTransformer, TfidfVectorizer
from sklearn.feature_selection import SelectKBest, f_classif
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge, SGDClassifier
from sklearn.metrics import (
    cohen_kappa_score,
    fbeta_score,
    get_scorer,
    get_scorer_names,
    make_scorer,
    pairwise_distances,
)
from sklearn.model_selection import GridSearchCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.naive_bayes import GaussianNB, MultinomialNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from sklearn.svm import SVC, SVR
from sklearn.tree import DecisionTreeClassifier

from divault.errors import UnsupportedModel
from divault.models import pickles
from divault.models.skops import check_name
from divault.values import MemoryFile

RANDOM = np.random.RandomState(0)
ROWS = RANDOM.rand(60, 4)
LABELS = (ROWS[:, 0] + ROWS[:, 1] > 1).astype(int)
THREE = np.arange(60) % 3
NUMBERS = ROWS @ np.array([1.0, -2.0, 3.0, 0.5])
TEXTS = ["a good film", "a bad film", "good and funny", "bad and dull"] * 5
WORDS = np.array(["good", "bad"] * 10)
MIXED = np.array([["red", 1.0], ["blue", 2.0], ["red", 3.0], ["green", 0.5]] * 5, dtype=object)

ORDINARY: dict[str, tuple[Any, Any, Any]] = {
    "logistic": (LogisticRegression(), ROWS, LABELS),
    "text labels": (LogisticRegression(), ROWS, np.array(["benign", "malignant"])[LABELS]),
    "labels as objects": (LogisticRegression(), ROWS, np.array(["no", "yes"], dtype=object)[LABELS]),
    "scaled": (make_pipeline(StandardScaler(), LogisticRegression()), ROWS, LABELS),
    "imputed": (make_pipeline(SimpleImputer(), PCA(2), LogisticRegression()), ROWS, LABELS),
    "selected": (make_pipeline(SelectKBest(f_classif, k=2), GaussianNB()), ROWS, LABELS),
    "logarithm": (make_pipeline(FunctionTransformer(np.log1p), Ridge()), ROWS, NUMBERS),
    "hyperbola": (make_pipeline(FunctionTransformer(np.sinh), Ridge()), ROWS, NUMBERS),
    "sgd": (SGDClassifier(loss="log_loss"), ROWS, LABELS),
    "hinge": (SGDClassifier(), ROWS, LABELS),
    "svc": (SVC(), ROWS, THREE),
    "svr": (SVR(), ROWS, NUMBERS),
    "nearest": (KNeighborsClassifier(algorithm="kd_tree"), ROWS, LABELS),
    "nearest in a ball": (KNeighborsClassifier(algorithm="ball_tree", metric="manhattan"), ROWS, LABELS),
    "tree": (DecisionTreeClassifier(max_depth=3), ROWS, THREE),
    "forest": (RandomForestClassifier(5), ROWS, LABELS),
    "extra trees": (ExtraTreesClassifier(5), ROWS, LABELS),
    "isolation": (IsolationForest(n_estimators=5), ROWS, None),
    "bagging": (BaggingClassifier(n_estimators=3), ROWS, LABELS),
    "ada": (AdaBoostClassifier(n_estimators=3), ROWS, LABELS),
    "boosting": (GradientBoostingClassifier(n_estimators=3), ROWS, THREE),
    "boosted numbers": (GradientBoostingRegressor(n_estimators=3, loss="huber"), ROWS, NUMBERS),
    "histogram boosting": (HistGradientBoostingClassifier(max_iter=3), ROWS, THREE),
    "histogram numbers": (HistGradientBoostingRegressor(max_iter=3, loss="absolute_error"), ROWS, NUMBERS),
    "perceptron": (MLPClassifier((4,), solver="lbfgs", max_iter=500), ROWS, LABELS),
    "adam": (MLPClassifier((2,), max_iter=3000, tol=0.1), ROWS, LABELS),
    "gaussian process": (
        GaussianProcessRegressor(ConstantKernel() * RBF() + WhiteKernel(), optimizer=None),
        ROWS,
        NUMBERS,
    ),
    "voting": (VotingClassifier([("a", LogisticRegression()), ("b", GaussianNB())]), ROWS, LABELS),
    "stacking": (StackingClassifier([("a", GaussianNB())], cv=2), ROWS, LABELS),
    "calibrated": (CalibratedClassifierCV(GaussianNB(), cv=2), ROWS, LABELS),
    "one against all": (OneVsRestClassifier(LogisticRegression()), ROWS, THREE),
    "searched": (GridSearchCV(LogisticRegression(), {"C": [1, 2]}, cv=2, scoring="f1"), ROWS, LABELS),
    "clusters": (KMeans(2, n_init=1), ROWS, None),
    "words": (make_pipeline(TfidfVectorizer(), LogisticRegression()), TEXTS, WORDS),
    "counts": (make_pipeline(CountVectorizer(ngram_range=(1, 2)), TfidfTransformer(), MultinomialNB()), TEXTS, WORDS),
    "hashed words": (make_pipeline(HashingVectorizer(n_features=64), LogisticRegression()), TEXTS, WORDS),
    "columns": (
        make_pipeline(
            ColumnTransformer([("colour", OneHotEncoder(), [0]), ("size", StandardScaler(), [1])], remainder="drop"),
            LogisticRegression(),
        ),
        MIXED,
        WORDS,
    ),
}


@contextlib.contextmanager
def memory_file(content: bytes) -> Iterator[MemoryFile]:
    fd = os.memfd_create("model")
    try:
        os.write(fd, content)
        yield MemoryFile("model", fd, len(content))
    finally:
        os.close(fd)


def loaded(content: bytes) -> Any:
    with memory_file(content) as file:
        return pickles.load(file)


def joblib_bytes(model: Any, compress: Any = 0) -> bytes:
    out = io.BytesIO()
    joblib.dump(model, out, compress=compress)
    return out.getvalue()


@pytest.mark.parametrize("kind", ORDINARY)
def test_an_ordinary_estimator_answers_as_the_library_does(kind: str) -> None:
    estimator, rows, labels = ORDINARY[kind]
    estimator.fit(rows, labels)
    expected = estimator.predict(rows)

    for content in (pickle.dumps(estimator), pickle.dumps(estimator, protocol=5), joblib_bytes(estimator)):
        assert np.array_equal(expected, loaded(content).predict(rows)), kind


@pytest.mark.parametrize("compress", [3, ("zlib", 9), ("gzip", 3), ("bz2", 3), ("xz", 3), ("lzma", 3)])
def test_joblib_opens_under_each_compression(compress: Any) -> None:
    model = RandomForestClassifier(5, random_state=0).fit(ROWS, LABELS)
    content = joblib_bytes(model, compress)

    with memory_file(content) as file:
        assert pickles.looks_pickled(file)
        assert np.array_equal(model.predict_proba(ROWS), pickles.load(file).predict_proba(ROWS))


def test_protocol_2_of_old_files_opens() -> None:
    model = LogisticRegression().fit(ROWS, LABELS)

    assert np.array_equal(model.coef_, loaded(pickle.dumps(model, protocol=2)).coef_)


def test_random_state_is_left_behind() -> None:
    model = DecisionTreeClassifier(random_state=np.random.RandomState(1)).fit(ROWS, LABELS)

    assert not isinstance(loaded(pickle.dumps(model)).random_state, np.random.RandomState)


# --- names ---------------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def call(module: str, name: str, arguments: bytes = b")") -> bytes:
    return b"\x80\x04" + named(module, name) + arguments + b"R."


REFUSED_NAMES = [
    ("builtins", "eval"), ("builtins", "exec"), ("builtins", "getattr"), ("builtins", "__import__"),
    ("builtins", "bytearray"), ("builtins", "range"), ("builtins", "open"),
    ("__builtin__", "eval"),
    ("os", "system"), ("posix", "system"), ("subprocess", "Popen"), ("nt", "system"), ("operator", "attrgetter"),
    ("functools", "partial"), ("importlib", "import_module"), ("pickle", "loads"), ("joblib", "load"),
    ("joblib.numpy_pickle", "load"), ("cloudpickle.cloudpickle", "_make_function"), ("__main__", "Model"),
    ("numpy", "load"), ("numpy", "memmap"), ("numpy", "fromfile"), ("numpy", "frompyfunc"), ("numpy", "vectorize"),
    ("numpy._core", "_ufunc_reconstruct"), ("numpy.core", "_ufunc_reconstruct"), ("numpy.testing", "measure"),
    ("numpy.random", "default_rng"), ("numpy.ctypeslib", "load_library"), ("torch", "load"),
    ("torch.nn.modules.linear", "Linear"), ("scipy.io", "loadmat"), ("sklearn.datasets", "load_svmlight_file"),
    ("sklearn.utils._testing", "MinimalClassifier"), ("sklearn.utils.fixes", "sp_version"), ("sklearn", "pipeline"),
    ("sklearn.pipeline", "defaultdict"), ("sklearn.pipeline", "os.system"), ("sklearn.base", "BaseEstimator.__init__"),
    ("sklearn.externals._packaging.version", "parse"), ("sklearn.metrics._dist_metrics", "PyFuncDistance64"),
    ("sklearn.metrics._scorer", "get_scorer"), ("sklearn.metrics.pairwise", "pairwise_kernels"),
    ("sklearn.no_such_module", "Model"), ("sklearn.linear_model._logistic", "NoSuchModel"),
    ("sklearn.linear_model._logistic", "LogisticRegression.fit"), ("sklearn\n.svm", "SVC"), ("", ""),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name"), REFUSED_NAMES)
def test_another_name_is_refused_and_named(module: str, name: str) -> None:
    with pytest.raises(UnsupportedModel) as refused:
        loaded(call(module, name))

    shown = (
        name if module in ("__builtin__", "sklearn\n.svm") or module.startswith("numpy.core") else f"{module}.{name}"
    )
    assert shown in refused.value.data["seen"]


class Payload:
    """Makes a folder where it is unpickled without rules."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("wrap", [pickle.dumps, lambda p: pickle.dumps(p, protocol=2), joblib_bytes])
def test_a_payload_is_refused_before_it_runs(wrap: Callable[[Any], bytes], tmp_path: Path) -> None:
    payload = Payload(tmp_path / "mark")
    hidden = LogisticRegression().fit(ROWS, LABELS)
    hidden.extra = [payload, np.array([payload], dtype=object)]

    for model in (payload, hidden):
        with pytest.raises(UnsupportedModel) as refused:
            loaded(wrap(model))
        assert "posix.mkdir" in refused.value.data["seen"]
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("form", ["pickle", "skops"])
def test_a_search_loads_with_each_of_the_librarys_own_scores(form: str) -> None:
    scorers = [*map(get_scorer, get_scorer_names()), make_scorer(fbeta_score, beta=2), make_scorer(cohen_kappa_score)]
    for scorer in scorers:
        if form == "pickle":
            assert loaded(pickle.dumps(scorer))._score_func is scorer._score_func
        else:
            for name in skops.io.get_untrusted_types(data=skops.io.dumps(scorer)):
                check_name(*name.rpartition(".")[::2])


def test_what_is_beside_the_scores_is_refused_and_the_refusal_says_what_to_pickle_instead() -> None:
    search = GridSearchCV(LogisticRegression(), {"C": [1]}, scoring=make_scorer(pairwise_distances))

    with pytest.raises(UnsupportedModel, match=r"pairwise_distances.*pickle search\.best_estimator_"):
        loaded(pickle.dumps(search))


# --- what allowed names could be made to do ------------------------------------------------------------------------

OBJECTS = named("numpy", "dtype") + text("O8") + b"\x89\x88\x87R"
POINTER = b"B" + struct.pack("<I", 8) + b"\x41" * 8
ONE = b"K\x01\x85"  # the shape (1,)
NDARRAY = named("numpy", "ndarray")
EMPTY = named("numpy._core.multiarray", "_reconstruct") + NDARRAY + b"K\x00\x85" + b"C\x01b" + b"\x87R"
FLOATS = named("numpy", "dtype") + text("f8") + b"\x89\x88\x87R"
LYING = b"(K\x03" + text("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
"""State of a dtype whose flags say that it holds no objects."""
HIDDEN = (
    named("numpy", "dtype") + text("V8") + b"\x89\x88\x87R"
    + b"(K\x03" + text("|") + b"N(" + text("f") + b"t}" + text("f") + OBJECTS + b"K\x00\x86sK\x08K\x01K\x10tb"
)  # fmt: skip
"""A structured dtype with an object in it."""


def from_buffer(dtype: bytes, data: bytes, shape: bytes = ONE) -> bytes:
    return named("numpy._core.numeric", "_frombuffer") + b"(" + data + dtype + shape + text("C") + b"tR"


def array_state(shape: bytes, dtype: bytes, raw: bytes) -> bytes:
    return b"(K\x01" + shape + dtype + b"\x89" + raw + b"tb"


ESTIMATOR = named("sklearn.linear_model._logistic", "LogisticRegression")
FORGED = {
    "an array of forged pointers": NDARRAY + b"(" + ONE + OBJECTS + POINTER + b"tR",
    "the same by its constructor": NDARRAY + b"(" + ONE + OBJECTS + POINTER + b"t\x81",
    "the same from a buffer": from_buffer(OBJECTS, POINTER),
    "a dtype that lies about objects": from_buffer(OBJECTS + LYING, POINTER),
    "a structured dtype with objects": from_buffer(HIDDEN, POINTER),
    "a number that is an object": named("numpy._core.multiarray", "scalar") + OBJECTS + POINTER + b"\x86R",
    "objects from bytes": EMPTY + array_state(ONE, OBJECTS, POINTER),
    "a shape of negative sizes": EMPTY + array_state(b"J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86", FLOATS, POINTER),
    "more elements than bytes": from_buffer(FLOATS, POINTER, b"M\xff\xff\x85"),
    "an array that does not start empty": named("numpy._core.multiarray", "_reconstruct")
    + NDARRAY + ONE + b"C\x01O\x87R",
    "an array filled twice": EMPTY + array_state(ONE, FLOATS, POINTER) + array_state(ONE, FLOATS, POINTER),
    "items set in an array": from_buffer(FLOATS, POINTER) + b"K\x00K\x00s",
    "items for an estimator": ESTIMATOR + b")R(K\x00e",
    "state for a class": ESTIMATOR + b"}" + text("predict") + b"K\x00sb",
    "state with a reserved name": ESTIMATOR + b")\x81}" + text("__class__") + b"K\x00sb",
    "a call of what was built": ESTIMATOR + b")R)R",
    "a call of a function that partial alone may take": named("sklearn.utils.validation", "check_array") + b")R",
    "an instance of a function": named("numpy._core.multiarray", "scalar") + b")\x81",
    "a reference outside": b"K\x01Q",
    "an extension code": b"\x82\x01",
    "a text in a strange encoding": named("_codecs", "encode") + text("a") + text("rot13") + b"\x86R",
    "a dtype of dates": named("numpy", "dtype") + text("M8[ns]") + b"\x89\x88\x87R",
}  # fmt: skip


@pytest.mark.parametrize("how", FORGED)
def test_allowed_names_can_not_be_turned_into_more(how: str) -> None:
    # The words of a rule, not of an error that some library happened to raise.
    with pytest.raises(UnsupportedModel, match="damaged or forged: it holds"):
        loaded(b"\x80\x04" + FORGED[how] + b".")


def matrix_with(indices: list[int]) -> sparse.csr_matrix:
    matrix = sparse.csr_matrix(np.eye(3))
    matrix.indices = np.array(indices, dtype=np.int32)
    return matrix


class ByConstructor:
    """A sparse matrix that is built by a call instead of by its state."""

    def __reduce__(self) -> tuple[Any, ...]:
        matrix = matrix_with([0, 1, 1 << 20])
        return sparse.csr_matrix, ((matrix.data, matrix.indices, matrix.indptr), (3, 3))


def test_a_sparse_matrix_whose_indices_point_outside_is_refused() -> None:
    sound = loaded(pickle.dumps(matrix_with([0, 1, 2])))

    assert (sound.toarray() == np.eye(3)).all()
    for wrong in (matrix_with([0, 1, 1 << 20]), [ByConstructor()], np.array([ByConstructor()], dtype=object)):
        for content in (pickle.dumps(wrong), joblib_bytes(wrong)):
            with pytest.raises(UnsupportedModel):
                loaded(content)


def test_a_matrix_can_not_bring_its_own_check() -> None:
    matrix = matrix_with([0, 1, 1 << 20])
    matrix.check_format = np.abs

    with pytest.raises(UnsupportedModel, match="strange attributes"):
        loaded(pickle.dumps(matrix))


@pytest.mark.parametrize(("field", "value"), [("left_child", 10_000), ("right_child", -7), ("feature", 4)])
def test_a_tree_that_points_outside_itself_is_refused(field: str, value: int) -> None:
    model = DecisionTreeClassifier(max_depth=2).fit(ROWS, LABELS)
    state = model.tree_.__getstate__()
    state["nodes"] = state["nodes"].copy()
    state["nodes"][field][0] = value
    model.tree_.__setstate__(state)

    with pytest.raises(UnsupportedModel, match="nodes point outside"):
        loaded(pickle.dumps(model))


# --- streams -------------------------------------------------------------------------------------------------------


def test_a_bomb_is_refused_by_its_ratio_and_an_ordinary_ratio_is_not() -> None:
    bomb = joblib_bytes(np.zeros(150_000_000, dtype=np.uint8), 9)

    with pytest.raises(UnsupportedModel) as refused:
        loaded(bomb)
    assert "50 times" in refused.value.data["seen"]
    assert loaded(joblib_bytes(np.zeros(10_000_000, dtype=np.uint8), 9)).size == 10_000_000


def test_a_length_in_the_stream_makes_no_memory() -> None:
    for opcode in (b"\x8e" + struct.pack("<Q", 1 << 62), b"\x95" + struct.pack("<Q", 1 << 40), b"\x96" + b"\xff" * 8):
        with pytest.raises(UnsupportedModel, match="damaged"):
            loaded(b"\x80\x05" + opcode)


def test_every_cut_of_a_model_is_refused() -> None:
    content = pickle.dumps(make_pipeline(StandardScaler(), LogisticRegression()).fit(ROWS, LABELS))

    for end in range(2, len(content), 7):
        with pytest.raises(UnsupportedModel, match="damaged"):
            loaded(content[:end])


def test_a_cut_compressed_model_is_refused() -> None:
    content = joblib_bytes(LogisticRegression().fit(ROWS, LABELS), 3)

    with pytest.raises(UnsupportedModel, match="damaged"):
        loaded(content[:-40])
    with pytest.raises(UnsupportedModel, match="damaged"):
        loaded(zlib.compress(b"\x80\x04"))


def test_a_byte_array_longer_than_the_stream_takes_no_memory() -> None:
    """The interpreter takes the memory first and reads then; here a few bytes can't ask for terabytes."""
    size = 2**45
    with pytest.raises(UnsupportedModel, match="damaged"):
        loaded(b"\x80\x05" + pickle.BYTEARRAY8 + size.to_bytes(8, "little") + b"abc" + pickle.STOP)

    assert loaded(pickle.dumps(bytearray(b"abc"), 5)) == bytearray(b"abc")


SMALL = pickle.dumps(DecisionTreeClassifier(max_depth=1).fit(ROWS, LABELS))


# A changed version number makes scikit-learn warn; a worker does not mind.
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(2, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_give_a_model_or_a_refusal(changes: list[tuple[int, int]]) -> None:
    content = bytearray(SMALL)
    for place, value in changes:
        content[place] = value

    with contextlib.suppress(UnsupportedModel):
        loaded(bytes(content))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_plain_data(data: bytes) -> None:
    for head in (b"\x80\x04", b"\x80\x05", b""):
        with contextlib.suppress(UnsupportedModel):
            loaded(head + data)
