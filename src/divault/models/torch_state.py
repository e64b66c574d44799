"""PyTorch: a state dict (torch.save or safetensors) whose architecture stands in `divault.json`. Data only, no code.

Code-bearing formats of PyTorch (TorchScript, torch.export, pickled modules) and its old file format are recognised here
so that they are refused by their name.

Members of `divault.json` that count here: `architecture`, `input_shape`, `labels`, `task`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from divault.errors import InputInvalid, ModelFailed, UnsupportedModel
from divault.models import huggingface_files
from divault.models.architecture import EXAMPLE, Network, build
from divault.models.base import Answer, Description, Inputs, Place
from divault.models.files import Folder
from divault.models.labels import labelled, labelled_schema, labels_of
from divault.models.tensors import MAX_ANSWER_NUMBERS, TensorSpec, nested_schema, shapes, written, zeros
from divault.models.torch_runtime import Hardware, prepare, runtime
from divault.models.weights import SUPPORTED, read_weights, weight_files
from divault.values import MemoryFile

if TYPE_CHECKING:
    import torch

_MISFITS = (
    *(RuntimeError, ValueError, IndexError, TypeError, KeyError, AttributeError, AssertionError),
    InputInvalid,
)
"""What networks and programs raise for an input of a shape that isn't theirs."""


class TorchState:
    """The format: weights with an architecture by name."""

    template = "torch"

    def recognises(self, files: Sequence[MemoryFile]) -> bool:
        """Whether weights of PyTorch are among the files, and they are no Hugging Face folder."""
        return not huggingface_files.is_one(Folder(files)) and bool(weight_files(files))

    def load(self, files: Sequence[MemoryFile], place: Place) -> LoadedNetwork:
        """The network in memory. Raises UnsupportedModel, SealedFileDamaged; SettingsInvalid for the device."""
        folder = Folder(files)
        weights = read_weights(weight_files(folder.files))
        told = folder.json_object("divault.json")
        if told.get("architecture") is None:
            raise _without_architecture(folder)
        hardware = prepare(place)
        network = build(told["architecture"], told.get("input_shape"), weights)
        network.module.to(hardware.device, hardware.dtype)
        return LoadedNetwork(network, labels_of(told), hardware, str(told.get("task") or "prediction"))


def _without_architecture(folder: Folder) -> UnsupportedModel:
    where = "divault.json has no architecture" if folder.find("divault.json") else "there is no divault.json"
    return UnsupportedModel(
        f"a state dict says nothing about its layers, and {where}: seal a tar with the weights and a divault.json, "
        f"for example {EXAMPLE}",
        seen="a PyTorch state dict without an architecture",
        supported=f"{SUPPORTED} in a tar with divault.json",
    )


class LoadedNetwork:
    """A network with its weights, ready to run."""

    def __init__(self, network: Network, labels: tuple[str, ...], hardware: Hardware, task: str) -> None:
        self._network = network
        self._labels = labels
        self._hardware = hardware
        dtype = "float32" if network.vocabulary is None else "int64"
        tried = zeros((1, *next(shapes(network.item_shape))), dtype)
        self._spec = TensorSpec(network.item_shape, network.vocabulary, {"tensor": written(tried)}, dtype)
        self._output_shape = self._probed(tried)
        self._description = self._described(task)

    @property
    def description(self) -> Description:
        """What it is and takes."""
        return self._description

    def predict(self, batch: Sequence[Inputs]) -> list[Answer]:
        """One answer per caller; callers never share a pass, so nobody's answer depends on who else asked.

        Raises InputInvalid; ModelFailed where the network fails on a valid input or gives numbers that aren't finite.
        """
        parsed = [self._checked(inputs) for inputs in batch]
        return [self._answer(self._run(array)) for array in parsed]

    def _checked(self, inputs: Inputs) -> NDArray[Any]:
        if inputs.parameters:
            self._spec.refuse("parameters", "this model has no parameters")
        return self._parsed(inputs.data)

    def _parsed(self, data: Any) -> NDArray[Any]:
        if isinstance(data, list) and data and all(isinstance(one, dict) for one in data):
            arrays = [self._parsed(one) for one in data]
            if len({array.shape[1:] for array in arrays}) > 1:
                self._spec.refuse("tensor", "items of one call differ in shape")
            return np.concatenate(arrays)
        fields = [name for name in ("tensor", "inputs") if isinstance(data, dict) and name in data]
        if len(fields) != 1 or len(data) != 1:
            raise InputInvalid(
                f'this model takes {{"tensor": ...}}: {self._spec.expected}',
                field="input_data",
                expected=f'{{"tensor": ...}} with {self._spec.expected}',
                example=dict(self._spec.example),
            )
        return self._spec.parse(data[fields[0]], fields[0])

    def _run(self, array: NDArray[Any], *, probing: bool = False) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            item = torch.from_numpy(array).to(self._hardware.device)
            output = self._network.module(item.to(self._hardware.dtype) if item.is_floating_point() else item)
        if not isinstance(output, torch.Tensor) or output.shape[:1] != (len(array),) or output.is_complex():
            raise ModelFailed("the network didn't give one row of numbers for each item", kind="output_shape")
        if output.numel() > MAX_ANSWER_NUMBERS:
            raise ModelFailed(f"the answer has {output.numel()} numbers: send fewer items", kind="output_size")
        if not probing and not torch.isfinite(output).all():  # of zeros a network may make anything
            raise ModelFailed("the network gave a number that is not finite", kind="not_finite")
        short = output.is_floating_point() and output.dtype != torch.float64  # halves have no exact words of their own
        return (output.float() if short else output).cpu()

    def _probed(self, tried: NDArray[Any]) -> tuple[int, ...]:
        """Shape of one row of output, seen by running zeros. Raises UnsupportedModel where they don't run."""
        try:
            output = self._run(tried, probing=True)
        except ModelFailed as err:
            raise UnsupportedModel(
                f"given one item of the stated shape, {err.detail}",
                seen="a network whose output is no tensor with a row for each item",
                supported="one tensor of numbers, with a row for each item",
            ) from None
        except _MISFITS as err:
            raise UnsupportedModel(
                f"the layers don't fit together: {str(err)[:200]}",
                seen="layers that don't run on an input of the stated shape",
                supported="layers whose sizes fit, and input_shape where the first layer doesn't tell",
            ) from None
        if self._labels and tuple(output.shape[1:]) != (len(self._labels),):
            raise UnsupportedModel(
                f"divault.json has {len(self._labels)} labels, a row of output has the shape {list(output.shape[1:])}",
                seen="labels that don't fit the output",
                supported="one label for each output",
            )
        return tuple(output.shape[1:])

    def _answer(self, output: torch.Tensor) -> Answer:
        rows: list[Any] = output.tolist()
        if not self._labels:
            return Answer({"predictions": rows}, len(rows))
        return Answer({"predictions": [labelled(self._labels, row) for row in rows]}, len(rows))

    def _described(self, task: str) -> Description:
        return Description(
            format="torch",
            task=task,
            device=self._hardware.name,
            input_schema={"type": "object", "required": ["tensor"], "properties": {"tensor": self._spec.schema()}},
            output_schema={
                "type": "object",
                "required": ["predictions"],
                "properties": {"predictions": {"type": "array", "items": self._row_schema()}},
            },
            example=self._spec.example,
            runtime=runtime(self._network.adapter, self._hardware, ("safetensors",)),
            code=self._network.code,
        )

    def _row_schema(self) -> dict[str, Any]:
        if not self._labels:
            return nested_schema({"type": "number"}, self._output_shape)
        return labelled_schema(self._labels)
