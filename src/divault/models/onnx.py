"""ONNX models under onnxruntime, on the CPU: alone, or in a folder with a `divault.json` (`labels`, `task`).

An input is an object with the model's own input names; a model with one input takes `tensor` or `inputs` as its name
too. The answer is `{"outputs": {name: values}}`, with `predictions` beside it where `labels` name the one output's
columns. The parameter `outputs`, a list of names, leaves the other outputs out.

Callers never share a pass: what a graph does with its first axis is its own affair.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from divault.errors import InputInvalid, ModelFailed, SealedFileDamaged, UnsupportedModel
from divault.models import onnx_file
from divault.models.base import Answer, Description, Inputs, Place, words_of
from divault.models.files import Folder, path_of
from divault.models.labels import labelled, labelled_schema, labels_of
from divault.models.runtimes import runtime_object, seed, threads
from divault.models.tensors import (
    MOST_TRIED,
    SIZES,
    TensorSpec,
    answered,
    leaf_schema,
    nested_schema,
    written,
    zeros,
)
from divault.values import MemoryFile

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

SUPPORTED = "ONNX with tensors of numbers, truth values or texts, its data inside the file"
_DTYPES = {
    "float16": "float16",
    "float": "float32",
    "double": "float64",
    "bool": "bool",
    "string": "str",
} | {f"{sign}int{width}": f"{sign}int{width}" for sign in ("", "u") for width in (8, 16, 32, 64)}
_TENSOR = re.compile(r"tensor\((\w+)\)")
_NO_NAMES = frozenset({"?", "None", "-1"})
"""What exporters write for every axis that may have any size."""
_TOO_NEW = re.compile(r"Opset (\d+) is under development.* support for domain (\S+) is till opset (\d+)")
_MAX_PORTS = 256
_TAKES_NOTHING_TEXT = """
    Abs Add And ArgMax ArgMin Cast Ceil Clip Concat Constant ConstantOfShape Cos CumSum Div Equal Erf Exp Expand
    Flatten Floor Gather GatherElements Gemm Greater GreaterOrEqual Identity IsNaN LayerNormalization LeakyRelu Less
    LessOrEqual Log LogSoftmax MatMul Max Min Mul Neg Not Or Pow Range Reciprocal ReduceMax ReduceMean ReduceMin
    ReduceSum Relu Reshape Shape Sigmoid Sign Sin Size Slice Softmax Softplus Split Sqrt Squeeze Sub Tanh Tile
    Transpose Trilu Unsqueeze Where Xor
"""
_TAKES_NOTHING = frozenset(_TAKES_NOTHING_TEXT.split())
"""Operators that were seen to take tensors without members; others (LSTM, Unique) end the process in onnxruntime."""
_TOLERANCE = 1e-5
"""Rows of one call share a pass; kernels for one row and for many add in another order."""


class Onnx:
    """The format: one ONNX file."""

    template = "onnx"

    def recognises(self, files: Sequence[MemoryFile]) -> bool:
        """Whether exactly one of the files is an ONNX model."""
        return len(_models(files)) == 1

    def load(self, files: Sequence[MemoryFile], place: Place) -> LoadedOnnx:  # noqa: ARG002 - it runs on the CPU alone
        """The session. Raises UnsupportedModel (external data, an operator or type it lacks), SealedFileDamaged."""
        file = _models(files)[0]
        onnx_file.check(file)
        told = Folder(files).json_object("divault.json")
        seed()
        task = str(told.get("task") or "prediction")[:80]
        empty = onnx_file.operators(file) <= _TAKES_NOTHING
        return LoadedOnnx(_session(file), onnx_file.shapeless(file), labels_of(told), task, empty=empty)


def _models(files: Sequence[MemoryFile]) -> list[MemoryFile]:
    return [file for file in files if onnx_file.is_onnx(file)]


def _session(file: MemoryFile) -> InferenceSession:
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as problems

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads()
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = 4
    # Spinning threads would burn the core that the next model needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    broken = (problems.InvalidProtobuf, problems.InvalidGraph, problems.InvalidArgument, problems.EPFail)
    try:
        return ort.InferenceSession(path_of(file), options, providers=["CPUExecutionProvider"])
    except (problems.NotImplemented, problems.NoSuchFile, problems.NoModel) as err:
        raise _refused(f"an ONNX model that needs what this node lacks ({words_of(err)})") from None
    except (*broken, problems.Fail, problems.RuntimeException, ValueError) as err:
        newer = _TOO_NEW.search(str(err))
        if newer is not None:
            opset, domain, newest = newer.groups()
            raise UnsupportedModel(
                f"the ONNX model is of opset {opset} of {domain}, and onnxruntime {ort.__version__} takes up to opset "
                f"{newest}: export it with that or an older one",
                seen=f"an ONNX model of opset {opset} of {domain}",
                supported=f"{domain} up to opset {newest}",
            ) from None
        raise SealedFileDamaged(f"onnxruntime does not take the ONNX file: {words_of(err)}", stage="payload") from None


def _refused(seen: str) -> UnsupportedModel:
    return UnsupportedModel(f"{seen}; this node loads {SUPPORTED}", seen=seen, supported=SUPPORTED)


@dataclass(frozen=True, slots=True)
class _Port:
    """An input or output: its name and, for a tensor, dtype and shape."""

    name: str
    dtype: str | None
    shape: tuple[int | None, ...]
    axes: tuple[str | None, ...] = ()
    """What the model calls its axes, where they may have any size: those of one name have one size."""
    form: str = ""
    """What it is, in onnxruntime's words: `seq(map(string,tensor(float)))`."""

    @property
    def batched(self) -> bool:
        """Whether the first axis may have any size."""
        return bool(self.shape) and self.shape[0] is None


def _port(node: Any) -> _Port:
    try:
        return _told(node)
    except UnicodeDecodeError:
        raise SealedFileDamaged("a name in the ONNX file is no text", stage="payload") from None


def _output(node: Any) -> _Port:
    """Raises UnsupportedModel for numbers that no answer could hold, also within sequences and maps."""
    port = _port(node)
    odd = [kind for kind in _TENSOR.findall(node.type) if kind not in _DTYPES]
    if odd:
        raise _refused(f"an ONNX model whose output {port.name[:80]!a} is made of {odd[0]} (cast it to float)")
    return port


def _told(node: Any) -> _Port:
    dtype = _DTYPES.get(node.type.removeprefix("tensor(").removesuffix(")")) if "tensor(" in node.type else None
    if not node.type.startswith("tensor("):
        dtype = None
    shape = tuple(size if isinstance(size, int) and size >= 0 else None for size in node.shape or ())
    axes = tuple(size if isinstance(size, str) and size not in _NO_NAMES else None for size in node.shape or ())
    return _Port(node.name, dtype, shape, axes, node.type)


class LoadedOnnx:
    """A session, ready to run."""

    def __init__(
        self, session: InferenceSession, shapeless: Container[str], labels: tuple[str, ...], task: str, *, empty: bool
    ) -> None:
        """`shapeless`: inputs and outputs whose number of axes the model does not say.

        `empty`: whether axes of any size, but for that of the batch, may have no members.
        """
        self._session = session
        self._shapeless = shapeless
        self._labels = labels
        self._task = task
        self._empty = empty
        self._outputs = [_output(node) for node in session.get_outputs()]
        inputs = [_port(node) for node in session.get_inputs()]
        self._axes = {port.name: port.axes for port in inputs}
        self._specs = self._input_specs(inputs)
        if labels and not self._has_columns(len(labels)):
            raise UnsupportedModel(
                f"divault.json has {len(labels)} labels, the model no single output with as many columns of numbers",
                seen="labels that don't fit the output",
                supported="one label for each column of the one output",
            )
        self._description = self._described()

    def _has_columns(self, count: int) -> bool:
        first = self._outputs[0]
        numbers = first.dtype is not None and leaf_schema(first.dtype)["type"] in {"number", "integer"}
        return len(self._outputs) == 1 and numbers and first.shape[1:] in {(None,), (count,)}

    def _input_specs(self, ports: list[_Port]) -> dict[str, TensorSpec]:
        if not 1 <= len(ports) <= _MAX_PORTS or not 1 <= len(self._outputs) <= _MAX_PORTS:
            raise _refused(f"an ONNX model with {len(ports)} inputs and {len(self._outputs)} outputs")
        for port in ports:
            if port.dtype is None:
                raise _refused("an ONNX model whose input is no tensor of a plain type")
            if port.name in self._shapeless:
                raise _refused(
                    f"an ONNX model that does not say how many axes its input {port.name[:80]!r} has (export it with "
                    "the shape of each input; sizes may stay open)"
                )
        example = {name: written(array) for name, array in self._tried(ports).items()}
        return {port.name: _spec(port, example, empty=self._empty) for port in ports}

    def _tried(self, ports: Sequence[_Port]) -> dict[str, NDArray[Any]]:
        """An input of zeros that runs, of a few sizes where any may be; that of the first where none runs."""
        alone = {axis for port in ports if port.batched and (axis := port.axes[0]) is not None}
        first, second = ({port.name: _zeros(port, size, alone) for port in ports} for size in SIZES[:2])
        if all(array.shape == second[name].shape for name, array in first.items()):
            return first
        for size in SIZES:
            tried = {port.name: _zeros(port, size, alone) for port in ports}
            if sum(array.size for array in tried.values()) <= MOST_TRIED:
                with contextlib.suppress(ModelFailed):
                    self._ran([port.name for port in self._outputs], tried)
                    return tried
        return first

    @property
    def description(self) -> Description:
        """What it is and takes."""
        return self._description

    def _described(self) -> Description:
        properties = {name: spec.schema() for name, spec in self._specs.items()}
        output = {port.name: self._output_schema(port) for port in self._outputs}
        result: dict[str, Any] = {"outputs": {"type": "object", "properties": output}}
        if self._labels:
            result["predictions"] = {"type": "array", "items": labelled_schema(self._labels)}
        return Description(
            format="onnx",
            task=self._task,
            device="cpu",
            input_schema={"type": "object", "required": list(properties), "properties": properties},
            output_schema={"type": "object", "required": list(result), "properties": result},
            example=self._example,
            runtime=runtime_object("onnx", "cpu", "as the model says", ("onnxruntime",), {"provider": "CPU"}),
            tolerance=_TOLERANCE,
        )

    def _output_schema(self, port: _Port) -> dict[str, Any]:
        # An inferred shape is told as any other; none at all is no scalar.
        return {} if port.name in self._shapeless and not port.shape else _output_schema(port)

    @property
    def _example(self) -> Mapping[str, Any]:
        return next(iter(self._specs.values())).example

    def predict(self, batch: Sequence[Inputs]) -> list[Answer]:
        """One answer per caller; callers never share a pass. Raises InputInvalid, ModelFailed."""
        return [self._answer(*checked) for checked in [self._checked(inputs) for inputs in batch]]

    def _checked(self, inputs: Inputs) -> tuple[dict[str, NDArray[Any]], list[str]]:
        names = self._wanted(inputs.parameters)
        data = inputs.data
        if not isinstance(data, dict):
            self._refuse("input_data", "no object")
        if len(self._specs) == 1 and len(data) == 1 and data.keys() <= {"tensor", "inputs"}:
            data = dict(zip(self._specs, data.values(), strict=True))
        if data.keys() != self._specs.keys():
            odd = min(data.keys() ^ self._specs.keys())
            self._refuse(odd[:80], "this model has no such input" if odd in data else "missing")
        arrays = {name: spec.parse(data[name], name) for name, spec in self._specs.items()}
        found: dict[str, set[int]] = {}
        for name, array in arrays.items():
            for axis, size in zip(self._axes[name], array.shape, strict=True):
                if axis is not None:
                    found.setdefault(axis, set()).add(size)
        for axis, sizes in found.items():
            if len(sizes) > 1:
                field = next(name for name, axes in self._axes.items() if axis in axes)
                self._refuse(field, f"the axis {axis[:80]!a} has the sizes {sorted(sizes)[:4]} in one call")
        return arrays, names

    def _wanted(self, parameters: Mapping[str, Any]) -> list[str]:
        known = [port.name for port in self._outputs]
        names: Any = parameters.get("outputs", known)
        if parameters.keys() - {"outputs"} or not isinstance(names, list) or not names:
            self._refuse("parameters", "the only parameter is outputs, a list of names of outputs")
        if any(name not in known for name in names) or len(names) > len(known):
            self._refuse("parameters.outputs", f"this model has the outputs {', '.join(known)[:200]}")
        return list(names)

    def _refuse(self, field: str, problem: str) -> NoReturn:
        expected = "; ".join(f"{name}: {spec.expected}" for name, spec in self._specs.items())[:1000]
        raise InputInvalid(
            f"{field}: {problem}; this model takes {expected}",
            field=field,
            expected=expected,
            example=dict(self._example),
        )

    def _ran(self, names: list[str], arrays: dict[str, NDArray[Any]]) -> Sequence[Any]:
        """These outputs, as onnxruntime gives them. Raises ModelFailed."""
        from onnxruntime.capi import onnxruntime_pybind11_state as problems

        try:
            found: Sequence[Any] = self._session.run(names, arrays)
        except (problems.InvalidArgument, problems.Fail, problems.RuntimeException) as err:
            raise ModelFailed(f"onnxruntime: {words_of(err)}", kind="raised") from None
        return found

    def _answer(self, arrays: dict[str, NDArray[Any]], names: list[str]) -> Answer:
        found = self._ran(names, arrays)
        outputs = {name: _plain(value) for name, value in zip(names, found, strict=True)}
        result: dict[str, Any] = {"outputs": outputs}
        if self._labels:
            result["predictions"] = [labelled(self._labels, row) for row in outputs[names[0]]]
        batched = [len(array) for name, array in arrays.items() if self._specs[name].batched]
        return Answer(result, batched[0] if batched else 1)


def _zeros(port: _Port, size: int, alone: Container[str]) -> NDArray[Any]:
    """One item of a batch, or a whole tensor; axes of one name have one size, and that of a batch is 1."""
    known = (1, *port.shape[1:]) if port.batched else port.shape
    shape = [
        1 if axis in alone else size if have is None else have for axis, have in zip(port.axes, known, strict=True)
    ]
    return zeros(shape, str(port.dtype))


def _spec(port: _Port, example: Mapping[str, Any], *, empty: bool) -> TensorSpec:
    shape = port.shape[1:] if port.batched else port.shape
    return TensorSpec(shape, None, example, str(port.dtype), port.batched, empty)


def _output_schema(port: _Port) -> dict[str, Any]:
    if port.dtype is not None:
        return nested_schema(leaf_schema(port.dtype), port.shape)
    if port.form.startswith("seq("):
        return {"type": "array"}
    return {}  # an optional one may be null, a map is an object


def _plain(value: Any) -> Any:
    """Tensors as lists; lists of dictionaries, as classifiers give them, with texts as keys."""
    if isinstance(value, np.ndarray):
        return answered(value)
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    return answered(np.asarray(value))
