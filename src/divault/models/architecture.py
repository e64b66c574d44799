"""`architecture` of `divault.json`: layers by name out of a list, with bounded arguments, and no code.

Forms, with their state dict's names:

- `{"type": "linear", "in": 4, "out": 3}`: `weight`, `bias` (left out with `"bias": false`);
- `{"type": "mlp", "sizes": [4, 8, 3], "activation": "relu"}`: `0.weight`, `2.weight`, ... as in
  `Sequential(Linear, ReLU, Linear)`;
- `[{"layer": "Linear", "kwargs": {...}, "name": "fc1"}, ...]`: `fc1.weight`, or the layer's index without `name`.

One prefix that all names of the state dict share (`module.`, `net.`) is dropped when that makes them fit.

Layers are made without memory and take the tensors of the file as they are, so no architecture can claim more memory
than its file of weights has.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from divault.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor, nn

MAX_LAYERS = 512
MAX_SIZE = 1 << 24
"""Units of one layer or rows of one embedding; the weights' own shapes bound them further."""
MAX_WINDOW = 4096
"""Kernel, stride, padding, pooled size: they shape what lies between layers, which no weight bounds."""
ACTIVATIONS = {"relu": "ReLU", "gelu": "GELU", "tanh": "Tanh", "sigmoid": "Sigmoid", "silu": "SiLU"}
_LAYER_NAMES = """
    Linear Conv1d Conv2d Embedding BatchNorm1d BatchNorm2d LayerNorm GroupNorm RMSNorm
    ReLU ReLU6 LeakyReLU PReLU ELU SELU GELU SiLU Mish Tanh Sigmoid Softplus Hardswish Hardsigmoid Hardtanh LogSigmoid
    Softmax LogSoftmax Identity Dropout Dropout1d Dropout2d Flatten
    MaxPool1d MaxPool2d AvgPool1d AvgPool2d AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveMaxPool1d AdaptiveMaxPool2d
"""
LAYERS = frozenset(_LAYER_NAMES.split())
"""torch.nn names that map one tensor to one tensor, keep nothing between calls and run no code of the model."""

EXAMPLE = '{"architecture": {"type": "mlp", "sizes": [4, 8, 3], "activation": "relu"}}'
_SIZE_NAMES = """
    in_features out_features in_channels out_channels num_features num_channels normalized_shape
    num_embeddings embedding_dim num_parameters
"""
_SIZES = frozenset(_SIZE_NAMES.split())
_KEPT_BACK = frozenset({"device", "dtype", "max_norm", "return_indices"})
"""Where tensors lie is the node's affair; max_norm changes weights while running; return_indices gives two tensors."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}", re.ASCII)
_MAX_RANK = 8


@dataclass(frozen=True, slots=True)
class Network:
    """A module with its weights in eval mode, and what it takes."""

    module: nn.Module
    item_shape: tuple[int | None, ...]
    """Shape of one item without the batch; None is any size."""
    vocabulary: int | None = None
    """Inputs are whole numbers below this, for an embedding."""
    adapter: str = "torch-state"
    """How it came, for the runtime object of receipts."""
    code: bool = False
    """Whether it came as a program."""
    input_dtype: str | None = None
    """What goes in, by torch's name; None: float32, or whole numbers with a vocabulary."""
    bounds: tuple[tuple[int, int], ...] = ()
    """Least and most size of each axis of an item, where the network says so."""


def build(architecture: Any, input_shape: Any, weights: Mapping[str, Tensor]) -> Network:
    """The network that the architecture describes, with these weights.

    `input_shape` of `divault.json`: sizes of one item, null for any; needed where the first layer doesn't tell.
    Raises UnsupportedModel: what is wrong with the architecture, or which tensor doesn't fit it.
    """
    import torch

    layers = _layers(architecture)
    with torch.device("meta"):
        module = _assembled(layers, single=_is_single(architecture))
    _take_weights(module, weights)
    module.eval().requires_grad_(requires_grad=False)
    shape, vocabulary = _input_of(layers[0])
    if input_shape is not None:
        shape = input_shape_of(input_shape)
    if shape is None:
        raise _refused(
            f'the first layer, {layers[0].kind}, doesn\'t tell what comes in: add "input_shape": [3, 32, 32]'
        )
    return Network(module, shape, vocabulary)


@dataclass(frozen=True, slots=True)
class _Layer:
    kind: str
    kwargs: Mapping[str, Any]
    name: str


def _is_single(architecture: Any) -> bool:
    return isinstance(architecture, dict) and architecture.get("type") == "linear"


def _layers(architecture: Any) -> list[_Layer]:
    if isinstance(architecture, list):
        if not 1 <= len(architecture) <= MAX_LAYERS:
            raise _refused(f"a list of 1 to {MAX_LAYERS} layers is needed")
        return [_listed(index, entry) for index, entry in enumerate(architecture)]
    kind = architecture.get("type") if isinstance(architecture, dict) else None
    if kind == "linear":
        return [_linear(0, architecture.get("in"), architecture.get("out"), bias=architecture.get("bias", True))]
    if kind == "mlp":
        return _mlp(architecture)
    raise _refused(f"architecture has the type {str(kind)[:40]!a}, not linear, mlp, huggingface or a list of layers")


def _linear(index: int, inputs: Any, outputs: Any, *, bias: Any = True) -> _Layer:
    kwargs = {"in_features": inputs, "out_features": outputs, "bias": bias}
    return _Layer("Linear", _checked_kwargs("Linear", kwargs), str(index))


def _mlp(architecture: Mapping[str, Any]) -> list[_Layer]:
    sizes = architecture.get("sizes")
    activation = ACTIVATIONS.get(str(architecture.get("activation", "relu")))
    if not isinstance(sizes, list) or not 2 <= len(sizes) <= MAX_LAYERS // 2:
        raise _refused('an mlp needs "sizes": the width of the input, of each hidden layer and of the output')
    if activation is None:
        raise _refused(f"the activation of an mlp is one of {', '.join(ACTIVATIONS)}")
    layers: list[_Layer] = []
    for inputs, outputs in pairwise(sizes):
        layers.append(_linear(len(layers), inputs, outputs))
        layers.append(_Layer(activation, {}, str(len(layers))))
    return layers[:-1]


def _listed(index: int, entry: Any) -> _Layer:
    if not isinstance(entry, dict) or not entry.keys() <= {"layer", "kwargs", "name"}:
        raise _refused(
            f'layer {index} is not {{"layer": ..., "kwargs": {{...}}}}, with "name" where the weights have names'
        )
    kind, kwargs, name = entry.get("layer"), entry.get("kwargs", {}), entry.get("name", str(index))
    if kind not in LAYERS:
        raise _refused(f"layer {index}, {str(kind)[:60]!a}, is not one of {', '.join(sorted(LAYERS))}")
    if not isinstance(kwargs, dict):
        raise _refused(f"kwargs of layer {index} is not an object")
    if not isinstance(name, str) or not (_NAME.fullmatch(name) or name == str(index)):
        raise _refused(f"the name of layer {index} is not letters, digits and _")
    return _Layer(kind, _checked_kwargs(kind, kwargs), name)


def _checked_kwargs(kind: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    from torch import nn

    known = inspect.signature(getattr(nn, kind).__init__).parameters.keys() - {"self"} - _KEPT_BACK
    for name in kwargs:
        if name not in known or name.startswith("_"):
            raise _refused(f"{kind} takes no {name[:60]!a} here")
    return {name: _checked_value(f"{name} of {kind}", name, value) for name, value in kwargs.items()}


def _checked_value(where: str, name: str, value: Any) -> Any:
    if isinstance(value, list) and 1 <= len(value) <= 4 and not any(isinstance(item, list) for item in value):
        return tuple(_checked_value(where, name, item) for item in value)
    limit = MAX_SIZE if name in _SIZES else MAX_WINDOW
    least = 1 if name in _SIZES else -limit
    if type(value) is int and least <= value <= limit:
        return value
    if type(value) is bool and name not in _SIZES:
        return value
    if type(value) is float and math.isfinite(value) and name not in _SIZES:
        return value
    if type(value) is str and len(value) <= 40 and name not in _SIZES:
        return value
    raise _refused(
        f"{where} is not a number from {least} to {limit}, true, false, a short text or a list of up to 4 numbers"
    )


def _assembled(layers: Sequence[_Layer], *, single: bool) -> nn.Module:
    from torch import nn

    try:
        modules = [(layer.name, _within_items(getattr(nn, layer.kind)(**layer.kwargs))) for layer in layers]
        return modules[0][1] if single else nn.Sequential(OrderedDict(_unique(modules)))
    # What constructors of torch.nn raise for arguments that don't go together, and for names that a module has already.
    except (TypeError, ValueError, KeyError, RuntimeError, AssertionError, ZeroDivisionError) as err:
        raise _refused(f"the layers can't be made: {str(err)[:150]}") from None


def _within_items(layer: nn.Module) -> nn.Module:
    """The layer. Raises UnsupportedModel where an answer would depend on the items beside it; a softmax as it runs."""
    from torch import nn

    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and not layer.track_running_stats:
        raise _refused(
            f"{type(layer).__name__} with track_running_stats=false takes its mean from all items of a call, so that "
            "the answer for one would depend on the others"
        )
    if isinstance(layer, nn.Softmax | nn.LogSoftmax):
        layer.register_forward_pre_hook(_softmax_within_items)
    return layer


def _softmax_within_items(layer: Any, inputs: tuple[Tensor, ...]) -> None:
    rank = inputs[0].ndim
    dim = layer.dim if layer.dim is not None else 0 if rank in {1, 3} else 1  # as torch takes it where none is named
    if dim in {0, -rank}:
        raise _refused(
            f"{type(layer).__name__} over dim {dim} goes over all items of a call, so that the answer for one would "
            "depend on the others; dim -1 is the last axis of an item"
        )


def _unique(modules: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    if len(dict(modules)) != len(modules):
        raise ValueError("two layers have the same name")
    return modules


def _take_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    expected = module.state_dict()
    weights = _without_prefix(weights, expected)
    missing = [name for name in expected if name not in weights and not name.endswith("num_batches_tracked")]
    unknown = [name for name in weights if name not in expected]
    if missing or unknown:
        raise _refused(
            f"the weights {_named('lack', missing)}{' and ' if missing and unknown else ''}{_named('have', unknown)}"
        )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            needed = list(expected[name].shape)
            raise _refused(f"{name!a} has the shape {list(tensor.shape)}, the architecture {needed}")
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise _refused(f"{name!a} is {tensor.dtype}, the architecture has {expected[name].dtype}")
    module.load_state_dict(dict(weights), strict=False, assign=True)


def _named(verb: str, names: Sequence[str]) -> str:
    shown = ", ".join(ascii(name[:60]) for name in names[:4])
    return f"{verb} {shown}{' ...' if len(names) > 4 else ''}" if names else ""


def _without_prefix(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if weights.keys() <= expected.keys():
        return weights
    first = next(iter(weights))
    for prefix in {first.removesuffix(name) for name in expected if first.endswith(f".{name}")}:
        shorter = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        if len(shorter) == len(weights) and shorter.keys() <= expected.keys():
            return shorter
    return weights


def _input_of(layer: _Layer) -> tuple[tuple[int | None, ...] | None, int | None]:
    """Shape of one item and vocabulary, as far as the first layer tells."""
    kwargs = layer.kwargs
    if layer.kind == "Linear":
        return (kwargs.get("in_features"),), None
    if layer.kind == "BatchNorm1d":
        return (kwargs.get("num_features"),), None
    if layer.kind == "LayerNorm":
        shape = kwargs.get("normalized_shape")
        return shape if isinstance(shape, tuple) else (shape,), None
    if layer.kind == "Embedding":
        return (None,), kwargs.get("num_embeddings")
    return None, None


def input_shape_of(value: Any) -> tuple[int | None, ...]:
    """Sizes of one item, None for any, as `input_shape` of `divault.json` says them. Raises UnsupportedModel."""
    if isinstance(value, list) and 1 <= len(value) < _MAX_RANK:
        sizes = [size for size in value if size is None or (type(size) is int and 1 <= size <= MAX_SIZE)]
        known = math.prod(size for size in sizes if size)
        if len(sizes) == len(value) and known <= MAX_SIZE:
            return tuple(sizes)
    raise _refused("input_shape is a list of 1 to 7 sizes of one item, without the batch; null means any size")


def _refused(problem: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{problem}. In divault.json beside the weights, for example: {EXAMPLE}",
        seen="a state dict whose architecture in divault.json doesn't hold",
        supported="architecture: linear, mlp, a list of layers, huggingface",
    )
