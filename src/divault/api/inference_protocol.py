"""The Open Inference Protocol, version 2 (REST, with its model repository and binary tensors), for its own clients.

| protocol | here |
|---|---|
| `POST /v2/models/{m}/infer` | a signed, gated, paid call; the receipt is `parameters.receipt` of the answer |
| input tensors | the members of `input_data`; a single tensor is the model's one input, whatever its name |
| `parameters` of a request | `parameters` of the call, without the protocol's own |
| output tensors | the members of `result`; what is no tensor becomes texts of JSON |
| repository `load`, `unload` | the node's load and unload, signed |

Every call is signed in its headers (ERC-8128), over the raw body. The receipt's input hash covers that whole body, its
output hash the value of `outputs` as it stands in the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import orjson

from divault.api.tensors import read_tensor, written_tensor
from divault.errors import BadRequest, InputInvalid
from divault.models.base import Description
from divault.service import Dialect
from divault.values import Output, SignedCall

BINARY_HEADER = "inference-header-content-length"
EXTENSIONS = ("model_repository", "binary_tensor_data")
_OWN_PARAMETERS = frozenset(
    {"binary_data_output", "binary_data_size", "sequence_id", "sequence_start", "sequence_end", "priority", "timeout"}
)
_MAX_INPUTS = 256


@dataclass(frozen=True, slots=True)
class Asked:
    """An inference request, taken apart."""

    id: str | None
    inputs: tuple[tuple[str, Any], ...]
    """Name and nested values of each tensor."""
    parameters: Mapping[str, Any]
    outputs: tuple[str, ...]
    """Names of the outputs that are wanted; none: all."""


def read_request(raw: bytes, header_length: str) -> Asked:
    """The request in a body. `header_length`: how many bytes of it are JSON, where tensors follow as bytes.

    Raises BadRequest, InputInvalid.
    """
    size = _json_size(raw, header_length)
    try:
        told = orjson.loads(raw[:size])
    except orjson.JSONDecodeError as err:
        raise BadRequest(f"the body is not JSON: {err.msg}") from None
    inputs = told.get("inputs") if isinstance(told, dict) else None
    if not isinstance(inputs, list) or not 0 < len(inputs) <= _MAX_INPUTS or not all(map(_is_named, inputs)):
        raise BadRequest("inputs is a list of tensors: name, datatype, shape, data", field="inputs")
    parameters = told.get("parameters", {})
    if not isinstance(parameters, dict):
        raise BadRequest("parameters is an object", field="parameters")
    return Asked(
        _text(told, "id"),
        tuple(_tensors(inputs, raw[size:])),
        {name: value for name, value in parameters.items() if name not in _OWN_PARAMETERS},
        _wanted(told.get("outputs", [])),
    )


def dialect(raw: bytes, header_length: str) -> Dialect:
    """How a request of this protocol is put to a model, and its answer worded. `ask` tells what is wrong with it."""
    asked: list[Asked] = []

    def ask(call: SignedCall, description: Description) -> SignedCall:
        asked.append(read_request(raw, header_length))
        data = _input_data(asked[0], description)
        parameters = orjson.dumps(asked[0].parameters) if asked[0].parameters else None
        return replace(call, input_data=orjson.dumps(data), parameters=parameters)

    def tell(output: Output) -> Output:
        result = orjson.loads(output.result)
        members = _outputs(result)
        chosen = asked[0].outputs or tuple(members)
        for name in chosen:
            if name not in members:
                raise InputInvalid(
                    f"this model gives no output {name[:80]}: it gives {', '.join(members)[:200]}", field="outputs"
                )
        return replace(output, result=orjson.dumps([written_tensor(name, members[name]) for name in chosen]))

    def wording(model_id: str, result: bytes, envelope: dict[str, Any]) -> bytes:
        body: dict[str, Any] = {"model_name": model_id, "model_version": "1"}
        if asked[0].id is not None:
            body["id"] = asked[0].id
        body |= {"outputs": msgspec.Raw(result), "parameters": {"receipt": envelope}}
        return msgspec.json.encode(body)

    return Dialect(ask, tell, wording)


def _outputs(result: Any) -> dict[str, Any]:
    """The members of a result; a graph's named outputs each by its own name."""
    if not isinstance(result, dict):
        return {"output": result}
    named = result.get("outputs")
    return {**named, **{k: v for k, v in result.items() if k != "outputs"}} if isinstance(named, dict) else result


def metadata(model_id: str, description: Description) -> dict[str, Any]:
    """What the protocol calls model metadata. Shapes that the model leaves open are -1."""
    fields = description.input_schema.get("properties", {})
    gives = dict(description.output_schema.get("properties", {}))
    gives |= gives.pop("outputs", {}).get("properties", {})
    return {
        "name": model_id,
        "versions": ["1"],
        "platform": description.format,
        "inputs": [_described(name, schema) for name, schema in fields.items()],
        "outputs": [_described(name, schema) for name, schema in gives.items()],
        "parameters": {"task": description.task, "example": dict(description.example)},
    }


def _json_size(raw: bytes, header_length: str) -> int:
    if not header_length:
        return len(raw)
    if not header_length.isdecimal() or len(header_length) > 10 or int(header_length) > len(raw):
        raise BadRequest(f"{BINARY_HEADER} is the length of the JSON in the body", field=BINARY_HEADER)
    return int(header_length)


def _is_named(told: Any) -> bool:
    return isinstance(told, dict) and isinstance(told.get("name"), str)


def _tensors(inputs: list[dict[str, Any]], tail: bytes) -> list[tuple[str, Any]]:
    found, at = [], 0
    for told in inputs:
        parameters = told.get("parameters")
        size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
        raw = None
        if size is not None:
            if type(size) is not int or not 0 <= size <= len(tail) - at:
                raise BadRequest("binary_data_size is the number of bytes of this tensor in the body", field="inputs")
            raw, at = tail[at : at + size], at + size
        found.append((told["name"], read_tensor(told, raw)))
    if at != len(tail):
        raise BadRequest(f"{len(tail) - at} bytes of the body belong to no tensor", field="inputs")
    if len({name for name, _ in found}) != len(found):
        raise BadRequest("two inputs have one name", field="inputs")
    return found


def _wanted(outputs: Any) -> tuple[str, ...]:
    if not isinstance(outputs, list) or len(outputs) > _MAX_INPUTS or not all(map(_is_named, outputs)):
        raise BadRequest("outputs is a list of objects with a name", field="outputs")
    return tuple(dict.fromkeys(told["name"] for told in outputs))


def _text(told: dict[str, Any], name: str) -> str | None:
    value = told.get(name)
    if value is None or (isinstance(value, str) and len(value) <= 256):
        return value
    raise BadRequest(f"{name} is a text of at most 256 characters", field=name)


def _input_data(asked: Asked, description: Description) -> dict[str, Any]:
    """The tensors as the members of `input_data`. A single one goes by whatever name the model has for its input."""
    known = list(description.input_schema.get("properties", {}))
    if len(asked.inputs) == 1 and len(known) == 1:
        return {known[0]: asked.inputs[0][1]}
    return dict(asked.inputs)


def _described(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name, "datatype": _datatype(schema), "shape": _shape(schema)}


def _forms(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The forms that a schema allows, the one with the most axes last."""
    return sorted(schema.get("anyOf", [schema]), key=lambda form: len(_axes(form)))


def _axes(schema: Mapping[str, Any]) -> list[int]:
    axes = []
    while schema.get("type") == "array":
        least, most = schema.get("minItems"), schema.get("maxItems")
        axes.append(int(most) if most is not None and least == most else -1)
        inner = schema.get("items", {})
        schema = inner if isinstance(inner, Mapping) else {}
    return axes


def _shape(schema: Mapping[str, Any]) -> list[int]:
    return _axes(_forms(schema)[-1]) or [1]


def _datatype(schema: Mapping[str, Any]) -> str:
    form: Mapping[str, Any] = _forms(schema)[-1]
    while form.get("type") == "array" and isinstance(form.get("items"), Mapping):
        form = form["items"]
    kinds = form.get("type", "number")
    names = {"integer": "INT64", "boolean": "BOOL", "number": "FP64"}
    return names.get(kinds if isinstance(kinds, str) else kinds[0], "BYTES") if kinds else "FP64"
