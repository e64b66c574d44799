"""PyTorch: a state dict (torch.save or safetensors) whose architecture stands in `divault.json`. Data only, no code.

Code-bearing formats of PyTorch (TorchScript, torch.export, pickled modules) and its old file format are recognised here
so that they are refused by their name.

Members of `divault.json` that count here: `architecture`, `input_shape`, `labels`, `task`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from divault.errors import InputInvalid, ModelFailed, UnsupportedModel
from divault.models import huggingface_files
from divault.models.architecture import EXAMPLE, Network, build
from divault.models.base import Answer, Description, Inputs, Place
from divault.models.files import Folder
from divault.models.labels import labelled, labelled_schema, labels_of
from divault.models.tensors import (
    MAX_ANSWER_NUMBERS,
    MOST_TRIED,
    SIZES,
    TensorSpec,
    leaf_schema,
    nested_schema,
    shapes,
    written,
    zeros,
)
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
_OTHER_SIZES = (64, 256, 16, 4, 2)
"""What a network that takes any size is tried with once more. 64 before 16: a network for images halves its input up to
five times, so that less changes nothing in what comes out."""


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
        whole = None if network.vocabulary is None else "int64"
        self._dtype = network.input_dtype or whole or hardware.dtype_name
        read = network.input_dtype or whole or "float32"
        # numpy knows no bfloat16.
        self._spec = TensorSpec(network.item_shape, network.vocabulary, {}, "float32" if read == "bfloat16" else read)
        tried, row = self._probed()
        self._spec = replace(self._spec, example={"tensor": written(tried)})
        self._row_schema = self._row_schema_of(tried, row)
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
            item = torch.from_numpy(array).to(self._hardware.device, getattr(torch, self._dtype))
            output = self._network.module(item)
        if not isinstance(output, torch.Tensor) or output.shape[:1] != (len(array),) or output.is_complex():
            raise ModelFailed("the network didn't give one row of numbers for each item", kind="output_shape")
        if output.numel() > MAX_ANSWER_NUMBERS:
            raise ModelFailed(f"the answer has {output.numel()} numbers: send fewer items", kind="output_size")
        if not probing and not torch.isfinite(output).all():  # of zeros a network may make anything
            raise ModelFailed("the network gave a number that is not finite", kind="not_finite")
        short = output.is_floating_point() and output.dtype != torch.float64  # halves have no exact words of their own
        return (output.float() if short else output).cpu()

    def _zeros(self, sizes: Sequence[int]) -> Iterator[NDArray[Any]]:
        """One item for each of the sizes, as a batch."""
        for shape in shapes(self._spec.item_shape, sizes, self._network.bounds):
            yield zeros((1, *shape), self._spec.dtype)

    def _probed(self) -> tuple[NDArray[Any], torch.Tensor]:
        """An item of zeros that runs, and its row of output. Raises UnsupportedModel where none does."""
        failed: Exception | None = None
        for tried in self._zeros(SIZES):
            try:
                return tried, self._fitting(self._run(tried, probing=True)[0])
            except ModelFailed as err:
                raise UnsupportedModel(
                    f"given one item of the stated shape, {err.detail}",
                    seen="a network whose output is no tensor with a row for each item",
                    supported="one tensor of numbers, with a row for each item",
                ) from None
            except _MISFITS as err:
                failed = failed or err
        raise self._misfit(failed) from None

    def _misfit(self, err: Exception | None) -> UnsupportedModel:
        reason = _words(err)
        if not self._network.code:
            return UnsupportedModel(
                f"the layers don't fit together: {reason}",
                seen="layers that don't run on an input of the stated shape",
                supported="layers whose sizes fit, and input_shape where the first layer doesn't tell",
            )
        return UnsupportedModel(
            f"given one item of the stated shape, as {self._dtype}, the program fails: {reason}. In divault.json "
            'input_shape says the shape and input_dtype the numbers, for example "input_dtype": "int64"',
            seen="a program that doesn't run on an input of the stated shape and dtype",
            supported="a program with its input_shape, and with input_dtype where that is not the dtype of its weights",
        )

    def _fitting(self, row: torch.Tensor) -> torch.Tensor:
        """The same row. Raises UnsupportedModel where the labels aren't its numbers' names."""
        if self._labels and (tuple(row.shape) != (len(self._labels),) or _dtype_of(row) == "bool"):
            raise UnsupportedModel(
                f"divault.json has {len(self._labels)} labels, a row of output is {_dtype_of(row)} of the shape "
                f"{list(row.shape)}",
                seen="labels that don't fit the output",
                supported="one label for each output",
            )
        return row

    def _row_schema_of(self, tried: NDArray[Any], row: torch.Tensor) -> dict[str, Any]:
        """JSON Schema of a row of output: what another size of input changes in it is left open."""
        if self._labels:
            return labelled_schema(self._labels)
        if None not in self._spec.item_shape:
            return nested_schema(leaf_schema(_dtype_of(row)), row.shape)
        other = self._other_row(tried)
        if other is None:
            return nested_schema(leaf_schema(_dtype_of(row)), [None] * row.ndim)
        if other.ndim != row.ndim:
            return {}
        sizes = zip(row.shape, other.shape, strict=True)
        return nested_schema(leaf_schema(_dtype_of(row)), [size if size == again else None for size, again in sizes])

    def _other_row(self, tried: NDArray[Any]) -> torch.Tensor | None:
        """A row of output for another size of input, if the network takes one."""
        if self._hardware.device.type != "cpu":
            return None  # on a GPU a size over what there are positions for breaks every run that follows
        for again in self._zeros(_OTHER_SIZES):
            if again.shape != tried.shape and again.size <= MOST_TRIED:
                with suppress(ModelFailed, *_MISFITS):
                    return self._run(again, probing=True)[0]
        return None

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
                "properties": {"predictions": {"type": "array", "items": self._row_schema}},
            },
            example=self._spec.example,
            runtime=runtime(self._network.adapter, self._hardware, ("safetensors",)),
            code=self._network.code,
            tolerance=self._hardware.tolerance,
        )


def _dtype_of(row: torch.Tensor) -> str:
    return str(row.dtype).removeprefix("torch.")


def _words(err: Exception | None) -> str:
    """What torch says: in TorchScript the last line has it, after the lines of the program."""
    text = str(err).strip()
    return (text.splitlines()[-1] if "TorchScript" in text.partition("\n")[0] else text)[:200]
