"""Tensors of the Open Inference Protocol: read exactly, written exactly, and never more than a typed refusal."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from divault.api.inference_protocol import read_request
from divault.api.tensors import DATATYPES, read_tensor, written_tensor
from divault.errors import BadRequest, DivaultError, InputInvalid

NUMPY = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "BOOL": "?"} | {
    f"{kind}INT{8 * size}": f"<{code}{size}" for kind, code in (("", "i"), ("U", "u")) for size in (1, 2, 4, 8)
}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def values_of(told: dict[str, Any], raw: bytes | None = None) -> Any:
    return json.loads(read_tensor(told, raw))


@pytest.mark.parametrize("datatype", [name for name in DATATYPES if name != "BYTES"])
def test_numbers_come_as_bytes_and_as_json_alike(datatype: str) -> None:
    values = np.arange(12).reshape(3, 4).astype(NUMPY[datatype])
    told: dict[str, Any] = {"name": "x", "datatype": datatype, "shape": [3, 4]}

    assert values_of(told, values.tobytes()) == values.tolist()
    assert values_of(told | {"data": values.ravel().tolist()}) == values.tolist()
    assert values_of(told | {"data": values.tolist()}) == values.tolist(), "nested as well"


def test_texts_are_bytes_with_their_lengths() -> None:
    raw = b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in ("a", "", "世界"))
    told = {"name": "x", "datatype": "BYTES", "shape": [3]}

    assert values_of(told, raw) == ["a", "", "世界"]
    for broken in (raw[:-1], raw + b"\1", b"\xff\xff\xff\xffx", struct.pack("<I", 1) + b"\xff"):
        with pytest.raises(InputInvalid):
            read_tensor(told, broken)


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": [4]}, {"shape": []}, {"shape": [-1, 3]}, {"shape": [1.0]}, {"shape": "3"}, {"datatype": "FP80"},
        {"data": [1, 2, "3"]}, {"data": [True, 1, 2]}, {"data": [1, None, 2]}, {"data": 3}, {"shape": [2**30, 2**30]},
        {"shape": [1] * 17}, {"data": [[1, 2], 3, 4]}, {"data": [[1, 2, 3]]}, {"data": [2**31, 0, 0]},
        {"datatype": "INT8", "data": [1, 2, 128]}, {"datatype": "UINT8", "data": [1, -1, 2]},
        {"datatype": "UINT64", "data": [1, 2**64, 2]}, {"datatype": "BOOL", "data": [1, 2, 0]},
        {"datatype": "FP16", "data": [1, 70000, 0]}, {"datatype": "FP32", "data": [1, 1e39, 0]},
        {"shape": [3, 1], "data": [[1], [2, 3]]}, {"shape": [1, 3], "data": [[1], [2], [3]]},
        {"shape": [3, 0], "data": []}, {"shape": [2**31 - 1, 0], "data": []},
        {"shape": [1, 3, 0], "data": [[[], [], []]]},
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(wrong: dict[str, Any]) -> None:
    right = {"name": "rows", "datatype": "INT32", "shape": [3], "data": [1, 2, 3]}
    assert values_of(right) == [1, 2, 3]
    with pytest.raises(InputInvalid) as caught:
        read_tensor(right | wrong, None)
    assert caught.value.data["field"] == "rows"


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
def test_a_missing_number_is_null_and_an_infinite_one_is_refused(datatype: str) -> None:
    told = {"name": "x", "datatype": datatype, "shape": [3]}
    assert values_of(told, np.array([1, np.nan, 2], NUMPY[datatype]).tobytes()) == [1, None, 2]
    for odd in (np.inf, -np.inf):
        with pytest.raises(InputInvalid, match="infinity") as caught:
            read_tensor(told, np.array([1, odd, 2], NUMPY[datatype]).tobytes())
        assert caught.value.data["field"] == "x"


@pytest.mark.parametrize(
    "shape", [[50_000], [3, 20_000], [20_000, 3], [5, 4, 3, 1_000], [2, 2, 20_000], [1, 1, 40_000, 1]]
)
def test_large_tensors_are_made_in_portions_and_come_out_alike(shape: list[int]) -> None:
    values = np.arange(np.prod(shape), dtype="<f4").reshape(shape) / 8
    told = {"name": "x", "datatype": "FP32", "shape": shape}
    assert values_of(told, values.tobytes()) == values.tolist()
    assert values_of(told | {"data": values.tolist()}) == values.tolist()


@pytest.mark.parametrize("shape", [[0], [0, 30], [0, 2**31 - 1]])
def test_an_empty_batch_is_one_for_the_model_to_refuse(shape: list[int]) -> None:
    assert values_of({"name": "x", "datatype": "FP32", "shape": shape, "data": []}) == []
    assert values_of({"name": "x", "datatype": "FP32", "shape": shape}, b"") == []


def test_one_tensor_has_one_set_of_values() -> None:
    with pytest.raises(InputInvalid, match="not both"):
        read_tensor({"name": "x", "datatype": "INT8", "shape": [1], "data": [1]}, b"\2")


@pytest.mark.parametrize("depth", [10, 900])
def test_parameters_that_nest_too_deep_are_refused(depth: int) -> None:
    tensor = {"name": "x", "datatype": "INT8", "shape": [1], "data": [1]}
    body = json.dumps({"inputs": [tensor], "parameters": {"deep": 0}}).replace("0}", "[" * depth + "]" * depth + "}")
    if depth < 100:
        assert read_request(body.encode(), "").parameters == b'{"deep":' + b"[" * depth + b"]" * depth + b"}"
        return
    with pytest.raises(BadRequest) as caught:
        read_request(body.encode(), "")
    assert caught.value.data["field"] == "parameters"


def test_optional_members_may_be_null() -> None:
    tensor = {"name": "x", "datatype": "INT8", "shape": [1], "data": [1], "parameters": None}
    none = {"id": None, "parameters": None, "outputs": None}
    asked = read_request(json.dumps({"inputs": [tensor], **none}).encode(), "")
    assert (asked.id, asked.parameters, dict(asked.outputs)) == (None, None, {})
    named = json.dumps({"inputs": [tensor], "outputs": [{"name": "y", "parameters": None}]}).encode()
    assert dict(read_request(named, "").outputs) == {"y": False}


@given(st.dictionaries(st.sampled_from(["name", "datatype", "shape", "data"]), json_values), st.none() | st.binary())
@settings(max_examples=200, deadline=None)
def test_any_tensor_is_read_or_refused(told: dict[str, Any], raw: bytes | None) -> None:
    try:
        read_tensor(told, raw)
    except InputInvalid:
        return


@given(json_values, st.binary(max_size=20), st.text("0123456789-x", max_size=4))
@settings(max_examples=200, deadline=None)
def test_any_body_is_a_request_or_refused(value: Any, tail: bytes, length: str) -> None:
    for body in (value, {"inputs": value}, {"inputs": [{"name": "x"}], "parameters": value, "outputs": value}):
        try:
            read_request(json.dumps(body).encode() + tail, length)
        except DivaultError:
            continue


@given(st.lists(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=2), min_size=1))
@settings(max_examples=50, deadline=None)
def test_what_is_written_is_read_again(rows: list[list[float]]) -> None:
    assert values_of(written_tensor("y", rows)) == rows


def test_what_is_no_tensor_becomes_texts() -> None:
    assert written_tensor("y", [{"label": "a"}, {"label": "b"}])["data"] == ['{"label":"a"}', '{"label":"b"}']
    assert written_tensor("y", [[1, 2], [3]]) == {
        "name": "y", "datatype": "BYTES", "shape": [2], "data": ["[1,2]", "[3]"]
    }  # fmt: skip
    assert written_tensor("y", ["a", "b"])["datatype"] == "BYTES"
    assert written_tensor("y", 3) == {"name": "y", "datatype": "INT64", "shape": [1], "data": [3]}
    assert written_tensor("y", [True])["datatype"] == "BOOL"
    assert written_tensor("y", [])["shape"] == [0]


def test_what_has_no_elements_has_the_datatype_that_it_is_said_to_have() -> None:
    assert written_tensor("y", [[]]) == {"name": "y", "datatype": "FP64", "shape": [1, 0], "data": []}
    assert written_tensor("y", [], "INT64") == {"name": "y", "datatype": "INT64", "shape": [0], "data": []}
    assert written_tensor("y", [0.5], "INT64")["datatype"] == "FP64", "what has elements shows it"


def test_bytes_that_belong_to_nobody_are_refused() -> None:
    tensor = {"name": "x", "datatype": "INT8", "shape": [2], "parameters": {"binary_data_size": 2}}
    head = json.dumps({"inputs": [tensor]}).encode()

    assert read_request(head + b"\1\2", str(len(head))).inputs == (("x", b"[1,2]"),)
    for body, size in ((head + b"\1\2\3", len(head)), (head + b"\1", len(head)), (head, len(head) + 1)):
        with pytest.raises(DivaultError):
            read_request(body, str(size))
