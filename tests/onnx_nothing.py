"""Runs operators that may be given tensors without members on such; in a process of its own, which one might end."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as problems

_REFUSALS = (problems.InvalidArgument, problems.Fail, problems.RuntimeException, RuntimeError, ValueError)
FLOAT, BOOL, INT64 = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64
_DTYPES = {FLOAT: np.float32, BOOL: np.bool_, INT64: np.int64}
_PLAIN = (
    *(
        "Abs",
        "Ceil",
        "Cos",
        "Erf",
        "Exp",
        "Floor",
        "Identity",
        "IsNaN",
        "LeakyRelu",
        "Log",
        "Neg",
        "Reciprocal",
        "Relu",
    ),
    *("Shape", "Sigmoid", "Sign", "Sin", "Size", "Softplus", "Sqrt", "Tanh", "Transpose", "Trilu"),
)
_OF_TWO = (
    *("Add", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mul", "Pow", "Sub"),
    *("Where",),
)
_ONE = np.ones(1, np.float32)


def _whole(*numbers: int) -> Any:
    return np.array(numbers, np.int64)


def nodes() -> Iterator[tuple[str, int, int, list[Any], dict[str, Any]]]:
    """Operators with the dtype and axes of their input, what else they get, and their attributes."""
    yield from ((name, FLOAT, 3, [], {}) for name in _PLAIN)
    yield from ((name, FLOAT, 3, [_ONE], {}) for name in _OF_TWO if name != "Where")
    yield from ((name, BOOL, 3, [np.ones(1, np.bool_)], {}) for name in ("And", "Or", "Xor"))
    yield "Not", BOOL, 3, [], {}
    yield "Where", BOOL, 3, [_ONE, _ONE], {}
    for axis in (0, 1, -1):
        yield from ((name, FLOAT, 3, [], {"axis": axis}) for name in ("Softmax", "LogSoftmax", "ArgMax", "ArgMin"))
        for name in ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"):
            yield name, FLOAT, 3, [_whole(axis)], {}
        yield "CumSum", FLOAT, 3, [np.array(axis, np.int64)], {}
        yield "Split", FLOAT, 3, [], {"axis": axis, "num_outputs": 1}
        yield "Gather", FLOAT, 3, [_whole(0)], {"axis": axis}
        yield "GatherElements", FLOAT, 3, [np.zeros((1, 1, 1), np.int64)], {"axis": axis}
        yield "LayerNormalization", FLOAT, 3, [np.ones(3, np.float32)], {"axis": axis}
    yield "Cast", FLOAT, 3, [], {"to": INT64}
    yield "Clip", FLOAT, 3, [np.array(0, np.float32), np.array(1, np.float32)], {}
    yield "Concat", FLOAT, 3, [np.ones((1, 1, 3), np.float32)], {"axis": 1}
    yield "Expand", FLOAT, 3, [_whole(1, 1, 1)], {}
    yield "Flatten", FLOAT, 3, [], {}
    yield "Gemm", FLOAT, 2, [np.ones((3, 2), np.float32)], {}
    yield "MatMul", FLOAT, 3, [np.ones((3, 2), np.float32)], {}
    for shape in ((0, -1), (-1, 3), (1, -1, 3)):
        yield "Reshape", FLOAT, 3, [_whole(*shape)], {}
    yield "Slice", FLOAT, 3, [_whole(0), _whole(1), _whole(1)], {}
    yield "Squeeze", FLOAT, 3, [_whole(1)], {}
    yield "Tile", FLOAT, 3, [_whole(1, 2, 2)], {}
    yield "Unsqueeze", FLOAT, 3, [_whole(1)], {}


WITHOUT_TENSORS = frozenset({"Constant", "ConstantOfShape", "Range"})
"""They get sizes and single numbers only."""


def model(name: str, dtype: int, axes: int, more: list[Any], attributes: dict[str, Any]) -> ModelProto:
    """A graph of this operator alone."""
    names = [f"i{place}" for place in range(len(more))]
    node = helper.make_node(name, ["x", *names], ["y"], **attributes)
    inputs = [helper.make_tensor_value_info("x", dtype, [None] * axes)]
    known = [numpy_helper.from_array(np.array(value), name) for name, value in zip(names, more, strict=True)]
    graph = helper.make_graph([node], "g", inputs, [ValueInfoProto(name="y")], known)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def main() -> None:
    """Print the name of each operator that went through all of them."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    for name, dtype, axes, more, attributes in nodes():
        session = ort.InferenceSession(
            model(name, dtype, axes, more, attributes).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        for sizes in itertools.product((0, 1, 3), repeat=axes - 1):
            if 0 in sizes:
                given = np.zeros((1, *sizes), _DTYPES[dtype])
                with contextlib.suppress(*_REFUSALS):
                    session.run(None, {"x": given})
        sys.stdout.write(f"{name}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
