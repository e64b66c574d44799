"""ONNX models for tests, built node by node around numbers that were trained here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

FLOAT, DOUBLE, INT64, BOOL, TEXT = (
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    TensorProto.INT64,
    TensorProto.BOOL,
    TensorProto.STRING,
)


def model_file(nodes: Sequence[Any], ports: tuple[Sequence[Any], Sequence[Any]], data: dict[str, Any]) -> bytes:
    """A whole model: `ports` are (name, type, shape) of inputs and of outputs."""
    inputs, outputs = ([helper.make_tensor_value_info(*port) for port in side] for side in ports)
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in data.items()]
    graph = helper.make_graph(list(nodes), "g", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


@cache
def iris() -> tuple[LogisticRegression, Any]:
    """A classifier of scikit-learn and its rows."""
    rows, kinds = load_iris(return_X_y=True)
    return LogisticRegression(max_iter=500).fit(rows, kinds), rows.astype(np.float32)


@cache
def classifier() -> bytes:
    """The same classifier: label and probabilities of [n, 4] float rows."""
    trained, _ = iris()
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["logits"], ["label"], axis=1, keepdims=0),
    ]
    ports = (
        [("x", FLOAT, ["n", 4])],
        [("label", INT64, ["n"]), ("probabilities", FLOAT, ["n", 3])],
    )
    data = {"w": trained.coef_.T.astype(np.float32), "b": trained.intercept_.astype(np.float32)}
    return model_file(nodes, ports, data)


@cache
def of_every_kind() -> bytes:
    """Texts, whole numbers, truth values and doubles in, the same kinds out."""
    nodes = [
        helper.make_node(
            "LabelEncoder",
            ["colour"],
            ["code"],
            domain="ai.onnx.ml",
            keys_strings=["red", "blue"],
            values_int64s=[1, 2],
        ),
        helper.make_node("Add", ["code", "count"], ["sum"]),
        helper.make_node("Not", ["flag"], ["not"]),
        helper.make_node("Mul", ["real", "two"], ["double"]),
        helper.make_node("Identity", ["colour"], ["name"]),
    ]
    sides = [("colour", TEXT), ("count", INT64), ("flag", BOOL), ("real", DOUBLE)]
    ends = [("sum", INT64), ("not", BOOL), ("double", DOUBLE), ("name", TEXT)]
    ports = [(name, kind, ["n", 1]) for name, kind in sides], [(name, kind, ["n", 1]) for name, kind in ends]
    return model_file(nodes, ports, {"two": np.array(2.0)})
