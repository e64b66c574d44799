"""ONNX: the same answers as the model it was made of; types, shapes, names checked; nothing outside the file read."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import helper

from divault import models
from divault.errors import InputInvalid, ModelFailed, SealedFileDamaged, UnsupportedModel
from divault.models import onnx_file
from divault.models.base import Inputs, LoadedModel, words_of
from divault.models.onnx import _TAKES_NOTHING, Onnx
from tests.memory_models import answer, as_json, load, memory_files
from tests.onnx_models import BOOL, FLOAT, INT64, TEXT, classifier, iris, model_file, of_every_kind
from tests.onnx_nothing import WITHOUT_TENSORS
from tests.schemas import mismatch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def flowers() -> LoadedModel:
    return load(Onnx(), {"model.onnx": classifier()})


@pytest.fixture(scope="module")
def kinds() -> LoadedModel:
    return load(Onnx(), {"model": of_every_kind()})


def test_a_classifier_answers_as_the_model_it_was_made_of(flowers: LoadedModel) -> None:
    trained, rows = iris()

    outputs = answer(flowers, {"x": rows.tolist()})["outputs"]

    assert outputs["label"] == trained.predict(rows).tolist()
    assert np.allclose(outputs["probabilities"], trained.predict_proba(rows), atol=1e-5)


def test_its_schema_has_names_types_and_sizes(flowers: LoadedModel) -> None:
    told = flowers.description
    row = told.input_schema["properties"]["x"]["anyOf"][0]

    assert told.input_schema["required"] == ["x"]
    assert row == {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4}
    assert told.output_schema["properties"]["outputs"]["properties"]["label"]["items"] == {"type": "integer"}
    assert told.example == {"x": [[0.0, 0.0, 0.0, 0.0]]}
    assert told.runtime["libraries"].keys() >= {"onnxruntime", "numpy", "divault", "python"}
    assert not told.code


@pytest.mark.parametrize("name", ["x", "tensor", "inputs"])
def test_the_one_input_goes_by_its_name_or_by_the_usual_ones(flowers: LoadedModel, name: str) -> None:
    assert answer(flowers, {name: [5.0, 3.4, 1.5, 0.2]})["outputs"]["label"] == [0]


def test_a_folder_with_labels_names_the_columns() -> None:
    nodes = [helper.make_node("Softmax", ["x"], ["y"], axis=1)]
    data = model_file(nodes, ([("x", FLOAT, [None, 2])], [("y", FLOAT, [None, 2])]), {})
    told = {"labels": ["cat", "dog"], "task": "classification"}

    model = load(Onnx(), {"m/model.onnx": data, "m/divault.json": as_json(told), "m/README.md": b"hello"})

    assert answer(model, {"x": [0.0, 1.0]})["predictions"][0]["label"] == "dog"
    assert model.description.task == "classification"
    with pytest.raises(UnsupportedModel, match="labels"):
        load(Onnx(), {"m/model.onnx": data, "m/divault.json": as_json({"labels": ["cat"]})})


def test_texts_whole_numbers_and_truth_values_go_in_and_out_by_name(kinds: LoadedModel) -> None:
    data = {"colour": [["red"], ["blue"]], "count": [[1], [2]], "flag": [[True], [False]], "real": [[0.5], [1]]}

    outputs = answer(kinds, data)["outputs"]

    assert outputs == {
        "sum": [[2], [4]],
        "not": [[False], [True]],
        "double": [[1.0], [2.0]],
        "name": [["red"], ["blue"]],
    }
    assert kinds.predict([Inputs(kinds.description.example, {})])[0].rows == 1


def test_outputs_by_name(kinds: LoadedModel) -> None:
    inputs = Inputs(kinds.description.example, {"outputs": ["name", "sum"]})

    assert list(kinds.predict([inputs])[0].result["outputs"]) == ["name", "sum"]
    for wrong in (["nothing"], [], "name", [1]):
        with pytest.raises(InputInvalid):
            kinds.predict([Inputs(kinds.description.example, {"outputs": wrong})])


WRONG: dict[str, Any] = {
    "no object": [1, 2, 3, 4],
    "empty": {},
    "another name": {"y": [0, 0, 0, 0]},
    "a name more": {"x": [0, 0, 0, 0], "y": 1},
    "short": {"x": [0, 0, 0]},
    "long": {"x": [0, 0, 0, 0, 0]},
    "ragged": {"x": [[0, 0, 0, 0], [0, 0, 0]]},
    "deep": {"x": [[[0, 0, 0, 0]]]},
    "text": {"x": ["a", "b", "c", "d"]},
    "truth": {"x": [True, False, True, True]},
    "null": {"x": [None, 0, 0, 0]},
    "not finite as float32": {"x": [1e39, 0, 0, 0]},
    "empty batch": {"x": []},
    "empty row": {"x": [[]]},
    "bytes of another size": {"x": {"dtype": "float32", "shape": [1, 4], "data": "AAAA"}},
    "bytes with NaN": {"x": {"dtype": "float32", "shape": [1, 4], "data": "AADAfwAAwH8AAMB/AADAfw=="}},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_input_that_does_not_fit_is_told_with_one_that_does(flowers: LoadedModel, wrong: str) -> None:
    with pytest.raises(InputInvalid) as caught:
        flowers.predict([Inputs(WRONG[wrong], {})])

    assert flowers.predict([Inputs(caught.value.data["example"], {})])[0].rows == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("colour", [[1]]),
        ("count", [[1.5]]),
        ("count", [[2**63]]),
        ("flag", [[1]]),
        ("real", [["1"]]),
        ("count", [[1], [2]]),
    ],
)
def test_each_type_takes_its_own_values_alone(kinds: LoadedModel, name: str, value: Any) -> None:
    with pytest.raises(InputInvalid):
        kinds.predict([Inputs({**kinds.description.example, name: value}, {})])


def test_an_answer_that_is_not_finite_is_the_models_failure() -> None:
    nodes = [helper.make_node("Log", ["x"], ["y"])]
    model = load(Onnx(), {"m": model_file(nodes, ([("x", FLOAT, ["n", 1])], [("y", FLOAT, ["n", 1])]), {})})

    with pytest.raises(ModelFailed):
        model.predict([Inputs({"x": [[-1.0]]}, {})])


def external(where: str) -> bytes:
    """A model whose weight lies at a location of the file's choice: in the graph, or inside a node's attribute."""
    tensor = onnx.TensorProto(name="w", data_type=FLOAT, dims=[2], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../etc/passwd")
    ports = [helper.make_tensor_value_info("x", FLOAT, [2])], [helper.make_tensor_value_info("y", FLOAT, [2])]
    if where == "graph":
        graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", *ports, [tensor])
    else:
        constant = helper.make_node("Constant", [], ["w"], value=tensor)
        graph = helper.make_graph([constant, helper.make_node("Add", ["x", "w"], ["y"])], "g", *ports)
    return bytes(helper.make_model(graph).SerializeToString())


@pytest.mark.parametrize("where", ["graph", "attribute"])
def test_data_outside_the_file_are_refused_before_any_library_sees_them(where: str) -> None:
    with pytest.raises(UnsupportedModel, match="other files"):
        load(Onnx(), {"m": external(where)})


def varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


def test_a_field_number_of_more_than_32_bits_hides_nothing() -> None:
    """protobuf reads the lower half of such a number, and with it the tensor that lies elsewhere."""
    x = helper.make_tensor_value_info("x", FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [x])
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=1)
    tensor.external_data.add(key="location", value="secret.bin")
    inside = tensor.SerializeToString()

    def model(tag: int) -> bytes:
        whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        body = graph.SerializeToString() + varint(tag) + varint(len(inside)) + inside
        whole.ClearField("graph")
        return bytes(whole.SerializeToString()) + varint(7 << 3 | 2) + varint(len(body)) + body

    for tag, error in ((5 << 3 | 2, UnsupportedModel), ((5 << 3 | 2) | 1 << 32, SealedFileDamaged)):
        with memory_files({"model.onnx": model(tag)}) as (file,), pytest.raises(error):
            onnx_file.check(file)


def test_inputs_with_axes_of_other_names_may_differ_in_size() -> None:
    inputs, outputs = [("x", FLOAT, ["N", 2]), ("i", INT64, ["E"])], [("y", FLOAT, ["E", 2])]
    nodes = [helper.make_node("Gather", ["x", "i"], ["y"])]
    model = load(Onnx(), {"model.onnx": model_file(nodes, (inputs, outputs), {})})

    found = answer(model, {"x": [[1, 2], [3, 4]], "i": [1, 0, 1]})
    assert found["outputs"]["y"] == [[3, 4], [1, 2], [3, 4]]


def of_two(node: str, first: list[Any], second: list[Any]) -> bytes:
    """One operator over `a` and `b`."""
    ports = ([("a", FLOAT, first), ("b", FLOAT, second)], [("y", FLOAT, None)])
    return model_file([helper.make_node(node, ["a", "b"], ["y"])], ports, {})


@pytest.mark.parametrize("nobody", [None, "?", "None"])
def test_inputs_whose_axes_have_no_name_may_differ_in_size(nobody: str | None) -> None:
    data = of_two("MatMul", [nobody, 3], [nobody, 2])
    a, b = np.ones((2, 3), np.float32), np.ones((3, 2), np.float32)
    found = answer(load(Onnx(), {"m": data}), {"a": a.tolist(), "b": b.tolist()})["outputs"]["y"]

    assert found == ort.InferenceSession(data).run(None, {"a": a, "b": b})[0].tolist()


@pytest.mark.parametrize("other", [[[1, 2, 3]], [[1]], [[1, 2], [3, 4]]])
def test_axes_of_one_name_have_one_size(other: list[list[int]]) -> None:
    model = load(Onnx(), {"m": of_two("Add", ["n", "s"], ["n", "s"])})
    with pytest.raises(InputInvalid, match=r"the axis '[ns]' has the sizes"):
        answer(model, {"a": [[1, 2]], "b": other})

    assert answer(model, {"a": [[1, 2]], "b": [[3, 4]]})["outputs"]["y"] == [[4, 6]]


def test_axes_of_one_name_have_one_size_in_the_example_too() -> None:
    model = load(Onnx(), {"m": of_two("MatMul", ["n", "s"], ["s", "n"])})

    assert answer(model, model.description.example)["outputs"]["y"] == [[0.0]]
    assert answer(model, {"a": [[1, 2], [3, 4], [5, 6]], "b": [[1, 0, 0], [0, 1, 0]]})["outputs"]["y"][2] == [5, 6, 0]


@pytest.mark.parametrize("kind", ["BFLOAT16", "FLOAT8E4M3FN"])
def test_an_output_that_no_answer_could_hold_is_refused_when_the_model_is_loaded(kind: str) -> None:
    to = getattr(onnx.TensorProto, kind)
    graph = helper.make_graph(
        [helper.make_node("Cast", ["x"], ["y"], to=to)],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", to, ["n", 2])],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9).SerializeToString()
    with pytest.raises(UnsupportedModel, match=f"output 'y' is made of {kind.lower()}"):
        load(Onnx(), {"m": bytes(made)})


def test_a_sequence_of_maps_is_answered() -> None:
    nodes = [helper.make_node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[0, 1])]
    value = helper.make_sequence_type_proto(helper.make_map_type_proto(INT64, helper.make_tensor_type_proto(FLOAT, [])))
    data = onnx.load_from_string(model_file(nodes, ([("x", FLOAT, ["n", 2])], []), {}))
    data.graph.output.append(helper.make_value_info("y", value))

    assert answer(load(Onnx(), {"m": bytes(data.SerializeToString())}), {"x": [[0.25, 0.75]]})["outputs"] == {
        "y": [{"0": 0.25, "1": 0.75}]
    }


def test_labels_of_one_name_are_no_labels() -> None:
    with pytest.raises(UnsupportedModel, match="different"):
        load(Onnx(), {"model.onnx": classifier(), "divault.json": as_json({"labels": ["a", "a", "b"]})})


def test_an_operator_that_is_not_there_is_refused() -> None:
    node = helper.make_node("ReadFile", ["x"], ["y"], domain="stranger")
    data = model_file([node], ([("x", FLOAT, [1])], [("y", FLOAT, [1])]), {})

    with pytest.raises((UnsupportedModel, SealedFileDamaged), match="stranger"):
        load(Onnx(), {"m": data})


def test_a_static_shape_takes_exactly_that() -> None:
    nodes = [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)]
    model = load(Onnx(), {"m": model_file(nodes, ([("x", INT64, [2, 2])], [("y", INT64, [])]), {})})

    assert answer(model, {"x": [[1, 2], [3, 4]]}) == {"outputs": {"y": 10}}
    with pytest.raises(InputInvalid):
        model.predict([Inputs({"x": [[1, 2]]}, {})])


def test_an_input_without_a_shape_is_refused_by_name_and_no_scalar() -> None:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]

    with pytest.raises(UnsupportedModel, match="how many axes its input 'x' has"):
        load(Onnx(), {"m": model_file(nodes, ([("x", FLOAT, None)], [("y", FLOAT, None)]), {})})
    assert answer(load(Onnx(), {"m": model_file(nodes, ([("x", FLOAT, [])], [("y", FLOAT, [])]), {})}), {"x": 2.5}) == {
        "outputs": {"y": 2.5}
    }


def test_an_output_without_a_shape_is_promised_nothing() -> None:
    nodes = [helper.make_node("Reshape", ["x", "to"], ["y"])]
    ports = ([("x", FLOAT, [4]), ("to", INT64, ["axes"])], [("y", FLOAT, None)])
    model = load(Onnx(), {"m": model_file(nodes, ports, {})})

    assert model.description.output_schema["properties"]["outputs"]["properties"]["y"] == {}
    assert answer(model, {"x": [1, 2, 3, 4], "to": [2, 2]}) == {"outputs": {"y": [[1, 2], [3, 4]]}}


def decoder() -> bytes:
    """What a decoder does with its past: the new words come after it."""
    inputs = [("x", FLOAT, ["batch", 2, "new", 4]), ("past", FLOAT, ["batch", 2, "old", 4])]
    outputs = [("y", FLOAT, ["batch", 2, "all", 4])]
    return model_file([helper.make_node("Concat", ["past", "x"], ["y"], axis=2)], (inputs, outputs), {})


@pytest.mark.parametrize("past", [[[[], []]], [[], []], {"dtype": "float32", "shape": [1, 2, 0, 4], "data": ""}])
def test_axes_of_any_size_may_be_empty(past: Any) -> None:
    model, x = load(Onnx(), {"m": decoder()}), np.ones((1, 2, 3, 4), np.float32)
    forms = model.description.input_schema["properties"]["past"]["anyOf"][:2]

    assert answer(model, {"x": x.tolist(), "past": past})["outputs"]["y"] == x.tolist()
    assert isinstance(past, dict) or not mismatch(past, {"anyOf": forms})


@pytest.mark.parametrize("past", [[], [[]], [[[]]], {"dtype": "float32", "shape": [0, 2, 0, 4], "data": ""}])
def test_batches_and_axes_of_one_size_may_not(past: Any) -> None:
    model = load(Onnx(), {"m": decoder()})
    with pytest.raises(InputInvalid):
        answer(model, {"x": np.ones((1, 2, 3, 4)).tolist(), "past": past})


@pytest.mark.parametrize("name", ["n" * 10**6, "/onnxruntime/" * 10**5, "/onnxruntime/a.h:1 " + "f(" * 10**6])
def test_names_that_a_file_chooses_take_no_time_in_an_error(name: str) -> None:
    """Node names stand in what onnxruntime says; reading a long one letter by letter anew took minutes."""
    assert len(words_of(RuntimeError(f"Name:'{name}' failed:/onnxruntime/b.h:2 f() no"))) <= 200


def test_operators_that_may_be_given_nothing_take_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.onnx_nothing"], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )

    assert done.returncode == 0, f"it ended in what comes after {done.stdout.split()[-1:]}: {done.stderr}"
    assert set(done.stdout.split()) | WITHOUT_TENSORS == _TAKES_NOTHING


@pytest.mark.parametrize(
    ("node", "axes"),
    [
        (helper.make_node("Unique", ["x"], ["y"], axis=1), 3),
        (helper.make_node("Inverse", ["x"], ["y"], domain="com.microsoft"), 3),
    ],
    ids=["Unique", "Inverse"],
)
def test_what_may_end_the_process_on_nothing_is_given_something(node: Any, axes: int) -> None:
    ports = ([("x", FLOAT, ["n", *"abc"[: axes - 1]])], [("y", FLOAT, None)])
    model = load(Onnx(), {"m": model_file([node], ports, {})})

    assert answer(model, {"x": np.eye(2).reshape(1, 2, 2).tolist()})["outputs"]["y"]
    with pytest.raises(InputInvalid):
        answer(model, {"x": {"dtype": "float32", "shape": [1, 1, 0], "data": ""}})


def test_an_operator_that_ends_the_process_on_nothing_gets_something() -> None:
    """A batch of none would end the worker for everybody; it may stand in the second axis."""
    weights = {"w": np.ones((1, 8, 4), np.float32), "r": np.ones((1, 8, 2), np.float32)}
    node = helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=2)
    ports = ([("x", FLOAT, ["words", "batch", 4])], [("y", FLOAT, None)])
    model = load(Onnx(), {"m": model_file([node], ports, weights)})

    assert np.shape(answer(model, {"x": np.ones((3, 2, 4)).tolist()})["outputs"]["y"]) == (3, 1, 2, 2)
    for empty in ([[]], {"dtype": "float32", "shape": [1, 0, 4], "data": ""}):
        with pytest.raises(InputInvalid):
            answer(model, {"x": empty})
        assert isinstance(empty, dict) or mismatch(empty, model.description.input_schema["properties"]["x"]["anyOf"][0])


@pytest.mark.parametrize(("kernel", "size"), [(3, 8), (11, 32), (300, 8)])
def test_the_example_has_a_size_that_runs_if_any_of_a_few_does(kernel: int, size: int) -> None:
    ports = ([("x", FLOAT, ["n", 1, "h", "w"])], [("y", FLOAT, ["n", 1, "a", "b"])])
    weight = np.ones((1, 1, kernel, 1), np.float32)
    model = load(Onnx(), {"m": model_file([helper.make_node("Conv", ["x", "k"], ["y"])], ports, {"k": weight})})
    told: Any = model.description.example["x"]

    assert (told["shape"] if isinstance(told, dict) else list(np.shape(told))) == [1, 1, size, size]
    assert answer(model, {"x": np.ones((1, kernel, 1)).tolist()})["outputs"]["y"] == [[[[float(kernel)]]]]
    with contextlib.nullcontext() if size > kernel else pytest.raises(ModelFailed):
        answer(model, dict(model.description.example))


def test_an_optional_output_may_be_null() -> None:
    tensor = helper.make_tensor_type_proto(FLOAT, ["n", 2])
    nodes = [helper.make_node("Optional", [], ["y"], type=tensor), helper.make_node("Neg", ["x"], ["z"])]
    data = onnx.load_from_string(model_file(nodes, ([("x", FLOAT, ["n", 2])], [("z", FLOAT, ["n", 2])]), {}))
    data.graph.output.append(helper.make_value_info("y", helper.make_optional_type_proto(tensor)))
    model = load(Onnx(), {"m": bytes(data.SerializeToString())})
    result = answer(model, {"x": [[1, 2]]})

    assert result == {"outputs": {"z": [[-1, -2]], "y": None}}
    assert not mismatch(result, model.description.output_schema)


def test_a_scalar_comes_as_bytes_too() -> None:
    nodes = [helper.make_node("Neg", ["x"], ["y"])]
    model = load(Onnx(), {"m": model_file(nodes, ([("x", FLOAT, [])], [("y", FLOAT, [])]), {})})
    encoded = {"dtype": "float32", "shape": [], "data": "AACAPw=="}

    assert answer(model, {"x": encoded}) == {"outputs": {"y": -1.0}}
    with pytest.raises(InputInvalid):
        answer(model, {"x": encoded | {"shape": [1]}})


@pytest.mark.parametrize("kind", [TEXT, BOOL])
def test_labels_are_for_numbers(kind: int) -> None:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    data = model_file(nodes, ([("x", kind, ["n", 2])], [("y", kind, ["n", 2])]), {})
    with pytest.raises(UnsupportedModel, match="columns of numbers"):
        load(Onnx(), {"m": data, "divault.json": as_json({"labels": ["a", "b"]})})


@pytest.mark.parametrize("domain", ["ai.onnx", "ai.onnx.ml"])
def test_an_opset_that_is_too_new_is_named_with_the_newest_that_is_taken(domain: str) -> None:
    data = onnx.load_from_string(classifier())
    next(opset for opset in data.opset_import if (opset.domain or "ai.onnx") == domain).version = 90
    with pytest.raises(UnsupportedModel, match=rf"opset 90 of {domain}, and onnxruntime [\d.]+ takes up to opset \d+"):
        load(Onnx(), {"m": bytes(data.SerializeToString())})


def test_what_onnxruntime_says_is_the_reason_and_no_place_in_its_source() -> None:
    nodes = [helper.make_node("Reshape", ["x", "to"], ["y"])]
    ports = ([("x", FLOAT, [4]), ("to", INT64, ["axes"])], [("y", FLOAT, None)])
    model = load(Onnx(), {"m": model_file(nodes, ports, {})})
    with pytest.raises(ModelFailed, match=r"cannot be reshaped to the requested shape\. Input shape:\{4\}") as caught:
        answer(model, {"x": [1, 2, 3, 4], "to": [3]})
    assert "/" not in caught.value.detail


@given(st.integers(0, 10_000), st.integers(0, 255), st.booleans())
@example(place=classifier().index(b"\x01n") + 1, byte=0x80, cut=False)  # the name of an axis, which is no UTF-8 then
@settings(max_examples=150, deadline=None)
def test_altered_bytes_give_a_model_or_a_typed_error(place: int, byte: int, cut: bool) -> None:
    data = bytearray(classifier())
    place %= len(data)
    data[place] = byte
    content = bytes(data[:place] if cut else data)
    with (
        memory_files({"m": content or b"x"}) as files,
        contextlib.suppress(UnsupportedModel, SealedFileDamaged),
    ):
        models.load(files)
