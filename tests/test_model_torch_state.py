"""PyTorch state dicts: what loads gives torch's own answers, what does not is refused by name and says what to do."""

from __future__ import annotations

import base64
import contextlib
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from divault.errors import DivaultError, InputInvalid, SealedFileDamaged, UnsupportedModel
from divault.models.base import CPU, Inputs, LoadedModel
from divault.models.torch_state import TorchState
from tests.memory_models import answer, as_json, load, memory_files, state_dict_file
from tests.schemas import mismatch

MLP = {"type": "mlp", "sizes": [4, 8, 3], "activation": "relu"}
CONV = [
    {"layer": "Conv2d", "kwargs": {"in_channels": 1, "out_channels": 2, "kernel_size": [3, 3]}, "name": "conv"},
    {"layer": "BatchNorm2d", "kwargs": {"num_features": 2}, "name": "norm"},
    {"layer": "ReLU"},
    {"layer": "AdaptiveAvgPool2d", "kwargs": {"output_size": 2}},
    {"layer": "Flatten"},
    {"layer": "Dropout", "kwargs": {"p": 0.5}},
    {"layer": "Linear", "kwargs": {"in_features": 8, "out_features": 2}, "name": "head"},
]


def mlp(activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(20)
    return nn.Sequential(nn.Linear(4, 8), activation(), nn.Linear(8, 3)).eval()


def model(weights: bytes, architecture: Any, **told: Any) -> LoadedModel:
    return load(TorchState(), {"weights": weights, "divault.json": as_json({"architecture": architecture} | told)})


def refusal(content: dict[str, bytes]) -> UnsupportedModel:
    with pytest.raises(UnsupportedModel) as caught:
        load(TorchState(), content)
    return caught.value


@pytest.mark.parametrize("written", ["torch", "safetensors"])
def test_an_mlp_gives_the_answers_of_torch_to_the_bit(written: str) -> None:
    ours = mlp()
    weights = state_dict_file(ours.state_dict()) if written == "torch" else save(ours.state_dict())
    rows = np.random.default_rng(20).normal(size=(5, 4)).astype(np.float32)

    result = answer(model(weights, MLP), {"tensor": rows.tolist()})

    assert ours(torch.from_numpy(rows)).tolist() == result["predictions"]


@pytest.mark.parametrize(
    ("activation", "name"), [(nn.GELU, "gelu"), (nn.Tanh, "tanh"), (nn.Sigmoid, "sigmoid"), (nn.SiLU, "silu")]
)
def test_every_activation_is_the_one_that_was_named(activation: type[nn.Module], name: str) -> None:
    ours = mlp(activation)

    result = answer(model(save(ours.state_dict()), MLP | {"activation": name}), {"tensor": [1, -2, 3, 0.5]})

    assert [ours(torch.tensor([1, -2, 3, 0.5])).tolist()] == result["predictions"]


def test_a_linear_layer_takes_one_row_or_several() -> None:
    layer = nn.Linear(2, 1)
    loaded = model(save(layer.state_dict()), {"type": "linear", "in": 2, "out": 1})

    one, two = answer(loaded, {"tensor": [1.0, 2.0]}), answer(loaded, {"tensor": [[1.0, 2.0], [3.0, 4.0]]})

    assert one["predictions"] == two["predictions"][:1]
    assert two == answer(loaded, [{"tensor": [1.0, 2.0]}, {"tensor": [3.0, 4.0]}])
    assert two == answer(loaded, {"inputs": [[1, 2], [3, 4]]})


def test_a_list_of_layers_with_names_runs_a_convolution_in_eval_mode() -> None:
    torch.manual_seed(20)
    parts = {
        "conv": nn.Conv2d(1, 2, 3),
        "norm": nn.BatchNorm2d(2),
        "2": nn.ReLU(),
        "3": nn.AdaptiveAvgPool2d(2),
        "4": nn.Flatten(),
        "5": nn.Dropout(0.5),
        "head": nn.Linear(8, 2),
    }
    ours = nn.Sequential()
    for name, part in parts.items():
        ours.add_module(name, part)
    ours(torch.randn(8, 1, 6, 6))  # running statistics that are not the initial ones
    ours.eval()
    loaded = model(state_dict_file({"state_dict": ours.state_dict(), "epoch": 3}), CONV, input_shape=[1, 6, 6])
    image = torch.randn(1, 6, 6)

    first, again = (answer(loaded, {"tensor": image.tolist()}) for _ in range(2))

    assert ours(image[None]).tolist() == first["predictions"]
    assert first == again


def test_an_embedding_takes_whole_numbers_below_its_size() -> None:
    torch.manual_seed(20)
    ours = nn.Sequential(nn.Embedding(10, 3), nn.Flatten(), nn.Linear(6, 2))
    layers = [
        {"layer": "Embedding", "kwargs": {"num_embeddings": 10, "embedding_dim": 3}},
        {"layer": "Flatten"},
        {"layer": "Linear", "kwargs": {"in_features": 6, "out_features": 2}},
    ]
    loaded = model(save(ours.state_dict()), layers, input_shape=[2])

    for right in ([1, 9], [1.0, 9]):
        assert ours(torch.tensor([[1, 9]])).tolist() == answer(loaded, {"tensor": right})["predictions"]
    item = loaded.description.input_schema["properties"]["tensor"]["anyOf"][0]
    assert not mismatch([1, 9], item)
    for wrong in ([1, 10], [-1, 0], [0.5, 1], [True, 1], [2**70, 1]):
        assert mismatch(wrong, item)
        with pytest.raises(InputInvalid):
            answer(loaded, {"tensor": wrong})


def test_bytes_give_the_answer_of_the_same_numbers_as_lists() -> None:
    loaded = model(save(mlp().state_dict()), MLP)
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)

    encoded = {"dtype": "float32", "shape": [2, 4], "data": base64.b64encode(rows.tobytes()).decode()}

    assert answer(loaded, {"tensor": rows.tolist()}) == answer(loaded, {"tensor": encoded})


def test_a_prefix_that_all_names_share_is_dropped_and_half_weights_run_as_float32() -> None:
    ours = mlp().half()
    weights = {f"module.{name}": tensor for name, tensor in ours.state_dict().items()}

    result = answer(model(save(weights), MLP), {"tensor": [1, 2, 3, 4]})

    assert ours.float()(torch.tensor([1.0, 2, 3, 4])).tolist() == result["predictions"][0]


def test_labels_name_the_highest_output_without_changing_a_number() -> None:
    ours = mlp()
    plain = ours(torch.tensor([1.0, 2, 3, 4])).tolist()

    result = answer(model(save(ours.state_dict()), MLP, labels=["a", "b", "c"]), {"tensor": [1, 2, 3, 4]})

    best = max(range(3), key=plain.__getitem__)
    scores = dict(zip("abc", plain, strict=True))
    assert result == {"predictions": [{"label": "abc"[best], "score": plain[best], "scores": scores}]}


def test_callers_of_one_batch_get_the_answers_that_they_get_alone() -> None:
    loaded = model(save(mlp().state_dict()), MLP)
    callers = [Inputs({"tensor": [[float(i), 2, 3, 4]] * (i + 1)}, {}) for i in range(3)]

    together = loaded.predict(callers)

    assert [one.rows for one in together] == [1, 2, 3]
    assert [loaded.predict([caller])[0] for caller in callers] == together


def test_the_description_says_what_is_taken_and_its_example_runs() -> None:
    loaded = model(save(mlp().state_dict()), MLP, task="regression")
    about = loaded.description

    assert (about.format, about.task, about.device) == ("torch", "regression", "cpu")
    assert len(answer(loaded, dict(about.example))["predictions"]) == 1
    assert {"adapter", "arch", "determinism", "device", "dtype", "libraries", "threads"} == about.runtime.keys()
    assert {"divault", "python", "torch", "numpy", "safetensors"} == about.runtime["libraries"].keys()
    assert torch.__version__ == about.runtime["libraries"]["torch"]
    json.dumps([about.input_schema, about.output_schema, about.runtime, about.example])


BAD_INPUTS = {
    "a list in place of the object": [1, 2, 3, 4],
    "nothing": {},
    "an unknown member": {"features": [1, 2, 3, 4]},
    "one member too many": {"tensor": [1, 2, 3, 4], "x": 1},
    "a short row": {"tensor": [1, 2, 3]},
    "a ragged batch": {"tensor": [[1, 2, 3, 4], [1, 2, 3]]},
    "a number among rows": {"tensor": [[1, 2, 3, 4], 5]},
    "one level too many": {"tensor": [[[1, 2, 3, 4]]]},
    "twenty levels": {"tensor": json.loads("[" * 20 + "]" * 20)},
    "an empty batch": {"tensor": []},
    "an empty row": {"tensor": [[]]},
    "a bare number": {"tensor": 1},
    "text": {"tensor": ["1", "2", "3", "4"]},
    "true": {"tensor": [True, 2, 3, 4]},
    "null": {"tensor": [None, 2, 3, 4]},
    "a number that float32 can't hold": {"tensor": [1e39, 2, 3, 4]},
    "a whole number that float64 can't hold": {"tensor": [10**400, 2, 3, 4]},
    "an unknown dtype": {"tensor": {"dtype": "object", "shape": [4], "data": ""}},
    "bytes that are too few": {"tensor": {"dtype": "float32", "shape": [4], "data": "AAAA"}},
    "bytes that are no base64": {"tensor": {"dtype": "float32", "shape": [4], "data": "?"}},
    "a shape of gigabytes": {"tensor": {"dtype": "float32", "shape": [1 << 20] * 8, "data": "AAAA"}},
    "a negative size": {"tensor": {"dtype": "float32", "shape": [-4], "data": "AAAA"}},
    "NaN in bytes": {"tensor": {"dtype": "float32", "shape": [4], "data": base64.b64encode(b"\xff" * 16).decode()}},
    "items of different kind": [{"tensor": [1, 2, 3, 4]}, {"text": "a"}],
}


@pytest.fixture(scope="module")
def small() -> LoadedModel:
    return model(save(mlp().state_dict()), MLP)


@pytest.mark.parametrize("data", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_an_input_that_does_not_fit_says_what_fits(small: LoadedModel, data: Any) -> None:
    with pytest.raises(InputInvalid) as caught:
        small.predict([Inputs(data, {})])

    assert {"field", "expected", "example"} == caught.value.data.keys()
    assert small.predict([Inputs(caught.value.data["example"], {})])[0].rows == 1


_ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@given(_ANY_JSON | st.fixed_dictionaries({"tensor": _ANY_JSON}))
@settings(max_examples=200, deadline=None)
def test_no_json_value_raises_anything_untyped(small: LoadedModel, data: Any) -> None:
    with contextlib.suppress(InputInvalid):
        small.predict([Inputs(data, {})])


def test_a_state_dict_alone_says_what_to_add() -> None:
    error = refusal({"model": state_dict_file(mlp().state_dict())})

    assert "divault.json" in error.detail
    assert '{"type": "mlp", "sizes": [4, 8, 3], "activation": "relu"}' in error.detail
    assert error.data["seen"] == "a PyTorch state dict without an architecture"


class Scripted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.mark.filterwarnings("ignore")  # torch.jit.script is deprecated, and files of it exist
def test_formats_that_carry_code_are_refused_by_name() -> None:
    script, export = io.BytesIO(), io.BytesIO()
    torch.jit.save(torch.jit.script(Scripted()), script)
    torch.export.save(torch.export.export(Scripted(), (torch.zeros(1),)), export)

    assert "TorchScript" in refusal({"model": script.getvalue()}).data["seen"]
    assert ".pt2" in refusal({"model": export.getvalue()}).data["seen"]
    assert "torch.nn.modules.container.Sequential" in refusal({"model": state_dict_file(mlp())}).data["seen"]
    old = state_dict_file(mlp().state_dict(), _use_new_zipfile_serialization=False)
    assert "before PyTorch 1.6" in refusal({"model": old}).data["seen"]


def test_an_optimizer_in_place_of_a_state_dict_is_refused() -> None:
    error = refusal({"model": state_dict_file([1, 2]), "divault.json": as_json({"architecture": MLP})})

    assert "no state dict" in error.detail


BAD_ARCHITECTURES = {
    "no object": 3,
    "an unknown type": {"type": "transformer"},
    "other sizes": MLP | {"sizes": [4, 9, 3]},
    "more layers": MLP | {"sizes": [4, 8, 3, 3]},
    "fewer layers": MLP | {"sizes": [4, 3]},
    "a size of nothing": MLP | {"sizes": [4, 0, 3]},
    "a size that is no number": MLP | {"sizes": [4, "8", 3]},
    "true as a size": MLP | {"sizes": [True, 8, 3]},
    "a width of terabytes": MLP | {"sizes": [4, 1 << 40, 3]},
    "a wide one within the bound": MLP | {"sizes": [1 << 24, 1 << 24, 3]},
    "an unknown activation": MLP | {"activation": "exec"},
    "an empty list": [],
    "a layer that is not listed": [{"layer": "LSTM", "kwargs": {"input_size": 4, "hidden_size": 3}}],
    "a name that leads out of torch.nn": [{"layer": "Module.__subclasses__"}],
    "a private name": [{"layer": "_reduction"}],
    "an argument that runs on a device": [{"layer": "Linear", "kwargs": {"in_features": 4, "device": "cuda"}}],
    "an unknown argument": [{"layer": "ReLU", "kwargs": {"x": 1}}],
    "a missing argument": [{"layer": "Linear", "kwargs": {"in_features": 4}}],
    "an argument of a wrong type": [{"layer": "Linear", "kwargs": {"in_features": 4, "out_features": {}}}],
    "nested lists": [{"layer": "Conv2d", "kwargs": {"in_channels": 4, "out_channels": 3, "kernel_size": [[3]]}}],
    "a padding of gigabytes": [
        {"layer": "Conv1d", "kwargs": {"in_channels": 4, "out_channels": 3, "kernel_size": 1, "padding": 1 << 30}}
    ],
    "two layers of a name": [{"layer": "ReLU", "name": "a"}, {"layer": "ReLU", "name": "a"}],
    "the name of a method": [{"layer": "ReLU", "name": "forward"}],
    "a member too many": [{"layer": "ReLU", "code": "import os"}],
    "a thousand layers": [{"layer": "ReLU"}] * 1000,
}


@pytest.mark.parametrize("architecture", BAD_ARCHITECTURES.values(), ids=BAD_ARCHITECTURES)
def test_an_architecture_that_does_not_hold_is_refused_with_an_example(architecture: Any) -> None:
    error = refusal({"w": save(mlp().state_dict()), "divault.json": as_json({"architecture": architecture})})

    assert '"type": "mlp"' in error.detail


def test_layers_that_do_not_fit_together_are_refused_at_load() -> None:
    layers = [
        {"layer": "Linear", "kwargs": {"in_features": 4, "out_features": 8}},
        {"layer": "Linear", "kwargs": {"in_features": 9, "out_features": 3}},
    ]
    weights = save(nn.Sequential(nn.Linear(4, 8), nn.Linear(9, 3)).state_dict())

    error = refusal({"w": weights, "divault.json": as_json({"architecture": layers})})

    assert "don't fit together" in error.detail


@pytest.mark.parametrize(
    ("layer", "kwargs", "shape"),
    [
        ("Softmax", {"dim": 0}, [3]),
        ("LogSoftmax", {"dim": -3}, [2, 3]),
        ("Softmax", {}, [2, 3]),  # torch takes the first axis of three
        ("BatchNorm1d", {"num_features": 2, "track_running_stats": False, "affine": False}, [2, 3]),
        ("BatchNorm2d", {"num_features": 2, "track_running_stats": False, "affine": False}, [2, 3, 3]),
    ],
)
def test_a_layer_that_looks_at_the_items_beside_is_refused_by_its_name(layer: str, kwargs: Any, shape: Any) -> None:
    layers = [{"layer": layer, "kwargs": kwargs}, {"layer": "Linear", "kwargs": {"in_features": 3, "out_features": 1}}]
    weights = save({"1.weight": torch.ones(1, 3), "1.bias": torch.ones(1)})
    error = refusal({"w": weights, "divault.json": as_json({"architecture": layers, "input_shape": shape})})

    assert layer in error.detail
    assert "would depend on the others" in error.detail


@pytest.mark.parametrize(
    ("kwargs", "shape"), [({"dim": -1}, [2, 3]), ({"dim": 1}, [2, 3]), ({"dim": 1}, [3]), ({}, [3]), ({}, [2, 2, 3])]
)
@pytest.mark.filterwarnings("ignore:Implicit dimension")
def test_a_softmax_within_an_item_gives_it_the_same_in_any_company(kwargs: Any, shape: Any) -> None:
    layers = [
        {"layer": "Softmax", "kwargs": kwargs},
        {"layer": "Linear", "kwargs": {"in_features": 3, "out_features": 1}},
    ]
    loaded = model(save({"1.weight": torch.ones(1, 3), "1.bias": torch.ones(1)}), layers, input_shape=shape)
    rows = torch.randn(3, *shape).tolist()

    assert loaded.description.tolerance > 0
    among, alone = (answer(loaded, {"tensor": data})["predictions"] for data in (rows, rows[1]))
    assert np.array(among[1]) == pytest.approx(np.array(alone[0]), rel=loaded.description.tolerance)


TELLINGS = ({"labels": ["a"]}, {"labels": "abc"}, {"labels": [1, 2, 3]}, {"input_shape": [5]}, {"input_shape": []})


def test_labels_and_shapes_of_divault_json_are_checked() -> None:
    weights = save(mlp().state_dict())
    for told in TELLINGS:
        refusal({"w": weights, "divault.json": as_json({"architecture": MLP} | told)})
    refusal({"w": save(nn.Conv1d(1, 1, 1).state_dict()), "divault.json": as_json({"architecture": CONV})})


def test_sparse_and_complex_tensors_are_refused() -> None:
    for odd in (torch.eye(3).to_sparse(), torch.zeros(3, dtype=torch.complex64)):
        refusal({"w": state_dict_file({"weight": odd}), "divault.json": as_json({"architecture": MLP})})


def _header(text: str, body: bytes = bytes(8)) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + body


BROKEN = {
    "overlapping tensors": _header(
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    ),
    "a shape over the file": _header('{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'),
    "a header that is no JSON": _header("{" * 40),
    "a dtype that nobody knows": _header('{"a":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}'),
    "a cut torch.save file": state_dict_file({"a": torch.zeros(100)})[:-300],
    "divault.json that is no JSON": b"",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_files_are_damaged_or_unknown_and_nothing_untyped(content: bytes) -> None:
    told = as_json({"architecture": MLP}) if content else b"{"
    with memory_files({"w": content or save(mlp().state_dict()), "divault.json": told}) as files:
        if TorchState().recognises(files):
            with pytest.raises(SealedFileDamaged):
                TorchState().load(files, CPU)
        else:
            assert content.startswith(b"PK"), "only a cut zip is nothing that can be named"


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_changed_byte_never_raises_anything_untyped(data: st.DataObject) -> None:
    source = data.draw(st.sampled_from(_WHOLE))
    where = data.draw(st.integers(0, len(source) - 1))
    changed = source[:where] + bytes([data.draw(st.integers(0, 255))]) + source[where + 1 :]
    with memory_files({"w": changed, "divault.json": as_json({"architecture": MLP})}) as files:
        if TorchState().recognises(files):
            with contextlib.suppress(DivaultError):
                TorchState().load(files, CPU)


_WHOLE = (state_dict_file(mlp().state_dict()), save(mlp().state_dict()))
