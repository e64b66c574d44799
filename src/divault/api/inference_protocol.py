"""The Open Inference Protocol, version 2 (REST, with its model repository and binary tensors), for its own clients.

| protocol | here |
|---|---|
| `POST /v2/models/{m}/infer` | a signed, gated, paid call; the receipt is `parameters.receipt` of the answer |
| input tensors | the members of `input_data`; a single tensor is the model's one input, whatever its name |
| `parameters` of a request | `parameters` of the call, without the protocol's own |
| output tensors | the members of `result`; what is no tensor, or may hold objects, becomes texts of JSON |
| `binary_data_output`, an output's `binary_data` | these outputs come as bytes behind the JSON, in its order |
| repository `load`, `unload` | the node's load and unload, signed |

Every call is signed in its headers (ERC-8128), over the raw body. The receipt's input hash covers that whole body, its
output hash the value of `outputs` as it stands in the answer, and right after it whatever bytes follow the JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import orjson
from msgspec.structs import replace

from divault.api.tensors import bytes_of, read_tensor, texts_of, written_tensor
from divault.errors import BadRequest, InputInvalid
from divault.models.base import Description
from divault.service import Dialect
from divault.values import Output, SignedCall

BINARY_HEADER = "inference-header-content-length"
EXTENSIONS = ("model_repository", "binary_tensor_data")
_OWN_PARAMETERS = frozenset(
    {"binary_data_output", "binary_data_size", "sequence_id", "sequence_start", "sequence_end", "priority", "timeout"}
)
VERSION = "1"
"""The only version of a model that a node has: what the vault names now."""
_MAX_INPUTS = 256


@dataclass(frozen=True, slots=True)
class Asked:
    """An inference request, taken apart."""

    id: str | None
    inputs: tuple[tuple[str, bytes], ...]
    """Name and values of each tensor, these as JSON."""
    parameters: bytes | None
    """As JSON, without the protocol's own; None where there is none."""
    outputs: Mapping[str, bool]
    """Names of the outputs that are wanted, and whether as bytes; none: all."""
    as_bytes: bool = False
    """Whether outputs come as bytes that are not named."""

    @property
    def wants_bytes(self) -> bool:
        """Whether bytes follow the JSON of the answer."""
        return any(self.outputs.values()) if self.outputs else self.as_bytes


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
    parameters = object_in(told, "parameters")
    as_bytes = truth_in(parameters, "binary_data_output", default=False)
    return Asked(
        _text(told, "id"),
        tuple(_tensors(inputs, raw[size:])),
        _passed_on(parameters),
        _wanted(told.get("outputs") or [], as_bytes=as_bytes),
        as_bytes,
    )


class Translation:
    """One request of this protocol in words that its model takes, and the answer in those of the protocol."""

    def __init__(self, raw: bytes, header_length: str) -> None:
        self._raw = raw
        self._header_length = header_length
        self._told: Asked | None = None
        self._gives: Mapping[str, Mapping[str, Any]] = {}
        """Schemas of the model's outputs, after `ask`."""
        self._json_size = 0
        """Bytes of `outputs` in the result of `tell`; tensors follow them."""
        self._header_size: int | None = None
        """Bytes of JSON in the body of `wording`."""

    @property
    def _asked(self) -> Asked:
        if self._told is None:
            self._told = read_request(self._raw, self._header_length)
        return self._told

    @property
    def dialect(self) -> Dialect:
        """For `Service.infer`."""
        return Dialect(self.ask, self.tell, self.wording)

    def ask(self, call: SignedCall, description: Description) -> SignedCall:
        """The call as its model takes it. Raises BadRequest, InputInvalid: also for an output that the model lacks."""
        self._gives = _given(description)
        if self._gives:
            self._require(self._gives)
        data = _input_data(self._asked, description)
        return replace(call, input_data=data, parameters=self._asked.parameters)

    def tell(self, output: Output) -> Output:
        """The output with `outputs` as its result, and behind it the tensors that are wanted as bytes."""
        members = _outputs(orjson.loads(output.result))
        self._require(members)  # a parameter of the model may have left one out
        wanted = self._asked.outputs or dict.fromkeys(members, self._asked.as_bytes)
        tensors = [_written(name, members[name], self._gives.get(name)) for name in wanted]
        tail = [bytes_of(tensor) for tensor, as_bytes in zip(tensors, wanted.values(), strict=True) if as_bytes]
        told = orjson.dumps(tensors)
        self._json_size = len(told)
        return replace(output, result=b"".join((told, *tail)))

    def wording(self, model_id: str, result: bytes, envelope: dict[str, Any]) -> bytes:
        """The body of the answer, after `tell`."""
        body: dict[str, Any] = {"model_name": model_id, "model_version": VERSION}
        if self._asked.id is not None:
            body["id"] = self._asked.id
        body |= {"outputs": msgspec.Raw(result[: self._json_size]), "parameters": {"receipt": envelope}}
        told = msgspec.json.encode(body)
        self._header_size = len(told)
        return told + result[self._json_size :]

    def header_size(self, body: bytes) -> int | None:
        """How many bytes of an answer to this request, just made or kept, are JSON; None where all of them are."""
        if not self._asked.wants_bytes:
            return None
        if self._header_size is not None:
            return self._header_size
        return json.JSONDecoder().raw_decode(body.decode("latin-1"))[1]  # a kept answer

    def _require(self, gives: Mapping[str, Any]) -> None:
        for name in self._asked.outputs:
            if name not in gives:
                raise InputInvalid(
                    f"this model gives no output {name[:80]}: it gives {', '.join(gives)[:200]}", field="outputs"
                )


def _outputs(result: Any) -> dict[str, Any]:
    """The members of a result; a graph's named outputs each by its own name."""
    if not isinstance(result, dict):
        return {"output": result}
    named = result.get("outputs")
    return {**named, **{k: v for k, v in result.items() if k != "outputs"}} if isinstance(named, dict) else result


def index(states: Iterable[tuple[str, str]], *, only_ready: bool) -> list[dict[str, str]]:
    """What the protocol calls repository index, of models by their names and states."""
    return [
        {
            "name": name,
            "version": VERSION,
            "state": "READY" if state == "ready" else "UNAVAILABLE",
            "reason": "" if state == "ready" else state,
        }
        for name, state in states
        if state == "ready" or not only_ready
    ]


def metadata(model_id: str, description: Description) -> dict[str, Any]:
    """What the protocol calls model metadata. Shapes that the model leaves open are -1."""
    fields = _properties(description.input_schema)
    gives = _given(description)
    return {
        "name": model_id,
        "versions": [VERSION],
        "platform": description.format,
        "inputs": [_described(name, schema) for name, schema in fields.items() if _forms(schema)],
        "outputs": [_described(name, schema) for name, schema in gives.items()],
        "parameters": {"task": description.task, "example": dict(description.example)},
    }


def _given(description: Description) -> dict[str, Mapping[str, Any]]:
    """The schemas of what `_outputs` finds in a result."""
    gives = _properties(description.output_schema)
    named = _properties(gives.get("outputs", {}))
    return {**named, **{name: schema for name, schema in gives.items() if name != "outputs"}} if named else gives


def _properties(schema: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What a schema says of each member; nothing that is no schema, whoever wrote it."""
    found = schema.get("properties")
    pairs = found.items() if isinstance(found, Mapping) else ()
    return {str(name): inner for name, inner in pairs if isinstance(inner, Mapping)}


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


def _passed_on(parameters: Mapping[str, Any]) -> bytes | None:
    """What of the parameters is the model's, as JSON; None where there is nothing. Raises BadRequest."""
    found = {name: value for name, value in parameters.items() if name not in _OWN_PARAMETERS}
    try:
        return orjson.dumps(found) if found else None
    except orjson.JSONEncodeError:  # it reads more levels than it writes
        raise BadRequest("parameters nest too deep", field="parameters") from None


def object_in(told: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An optional member that is an object: null is as good as none."""
    found = told.get(name)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise BadRequest(f"{name} is an object", field=name)
    return found


def _wanted(outputs: Any, *, as_bytes: bool) -> dict[str, bool]:
    if not isinstance(outputs, list) or len(outputs) > _MAX_INPUTS or not all(map(_is_named, outputs)):
        raise BadRequest("outputs is a list of objects with a name", field="outputs")
    wanted = {}
    for told in outputs:
        how = object_in(told, "parameters")
        if how.keys() - {"binary_data"}:
            raise BadRequest("the only parameter of an output is binary_data", field="outputs")
        wanted[told["name"]] = truth_in(how, "binary_data", default=as_bytes)
    return wanted


def truth_in(told: Mapping[str, Any], name: str, *, default: bool) -> bool:
    """A member that is true or false, where there is one. Raises BadRequest."""
    value = told.get(name, default)
    if type(value) is not bool:
        raise BadRequest(f"{name} is true or false", field=name)
    return value


def _text(told: dict[str, Any], name: str) -> str | None:
    value = told.get(name)
    if value is None or (isinstance(value, str) and len(value) <= 256):
        return value
    raise BadRequest(f"{name} is a text of at most 256 characters", field=name)


def _input_data(asked: Asked, description: Description) -> bytes:
    """The tensors as the members of `input_data`. A single one goes by whatever name the model has for its input."""
    known = _properties(description.input_schema)
    inputs = dict(asked.inputs)
    if len(known) == len(inputs) == 1:
        inputs = dict(zip(known, inputs.values(), strict=True))
    told = (
        b"%b:%b" % (orjson.dumps(name), values if name not in known or _axes_of(known[name]) else _scalar(values))
        for name, values in inputs.items()
    )
    return b"{%b}" % b",".join(told)


def _scalar(values: bytes) -> bytes:
    """The one value of a tensor, for an input without axes; a tensor here has one at least."""
    found = orjson.loads(values)
    return orjson.dumps(found[0]) if len(found) == 1 else values


def _written(name: str, value: Any, schema: Mapping[str, Any] | None) -> dict[str, Any]:
    """The tensor of an output: its datatype is that of `metadata` also where the value shows none, or another."""
    if schema is None:
        return written_tensor(name, value)
    return written_tensor(name, value, _datatype(schema)) if _forms(schema) else texts_of(name, value)


def _described(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name, "datatype": _datatype(schema), "shape": _shape(schema)}


def _shape(schema: Mapping[str, Any]) -> list[int]:
    """The shape of a tensor; of objects there is a text for each element of the outermost list."""
    axes = _axes_of(schema) if _forms(schema) else max(map(_axes, _alternatives(schema)), key=len)[:1]
    return axes or [1]


def _alternatives(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    told = schema.get("anyOf")
    forms = [form for form in told if isinstance(form, Mapping)] if isinstance(told, list) else []
    return forms or [schema]


def _forms(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The forms that a schema allows a tensor to have, the one with the most axes last; none for what is objects."""
    tensors = [form for form in _alternatives(schema) if _element(form).get("type") != "object"]
    return sorted(tensors, key=lambda form: len(_axes(form)))


def _element(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """What lists within lists hold in the end."""
    while schema.get("type") == "array" and isinstance(schema.get("items"), Mapping):
        schema = schema["items"]
    return schema


def _axes_of(schema: Mapping[str, Any]) -> list[int]:
    """The axes of a tensor of this schema, in its largest form."""
    forms = _forms(schema)
    return _axes(forms[-1]) if forms else []


def _axes(schema: Mapping[str, Any]) -> list[int]:
    axes = []
    while schema.get("type") == "array":
        least, most = schema.get("minItems"), schema.get("maxItems")
        axes.append(most if type(most) is int and least == most else -1)
        inner = schema.get("items", {})
        schema = inner if isinstance(inner, Mapping) else {}
    return axes


def _datatype(schema: Mapping[str, Any]) -> str:
    forms = _forms(schema)
    if not forms:  # objects: texts of JSON
        return "BYTES"
    kinds = _element(forms[-1]).get("type", "number")
    first = kinds[0] if isinstance(kinds, list) and kinds else kinds
    return {"integer": "INT64", "boolean": "BOOL", "number": "FP64"}.get(str(first), "BYTES")
