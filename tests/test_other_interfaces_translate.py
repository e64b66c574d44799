"""What the other interfaces make of a model's answer: typed errors whatever a worker says, and bytes that are exact."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from divault.api.inference_protocol import Translation, index, metadata
from divault.api.openai import Asked, dialect
from divault.errors import BadRequest, DivaultError, InputInvalid, ModelFailed
from divault.models.base import Description
from divault.values import Digest, Output
from tests.worker_models import call, opened

ROWS = {"type": "array", "items": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}}
GIVES = {"type": "object", "properties": {"predictions": {"type": "array"}, "probabilities": ROWS}}
RESULT = {"predictions": [1, 0], "probabilities": [[0.25, 0.75], [1, 0.0]]}
MODEL = opened({})
"""Without files: a descriptor that is held from the import on would look like a leak to other tests."""


def description(task: str = "classification", gives: Any = GIVES, takes: Any = None) -> Description:
    fields = {"properties": {"features": ROWS}} if takes is None else takes
    return Description("sklearn", task, "cpu", fields, gives, {}, {})


def output(result: Any) -> Output:
    return Output(json.dumps(result).encode(), {}, Digest.ZERO, 1)


def asked(**more: Any) -> bytes:
    tensor = {"name": "features", "datatype": "FP64", "shape": [1, 2], "data": [1, 2]}
    return json.dumps({"inputs": [tensor]} | more).encode()


def answered(raw: bytes, result: Any = RESULT) -> tuple[dict[str, Any], bytes, bytes]:
    """The JSON of the answer, the bytes behind it, and what the receipt covers."""
    translation = Translation(raw, "")
    translation.ask(call(MODEL, None), description())
    told = translation.tell(output(result))
    body = translation.wording("m", told.result, {"receipt": "世界 }"})
    size = translation.header_size(body)
    assert Translation(raw, "").header_size(body) == size, "a kept answer is taken apart alike"
    end = len(body) if size is None else size
    return json.loads(body[:end]), body[end:], told.result


def schema_of(*path: str) -> dict[str, Any]:
    """Lists within lists of this."""
    schema: dict[str, Any] = {"type": path[-1]}
    for kind in reversed(path[:-1]):
        schema = {"type": kind, "items": schema}
    return schema


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ([[{"label": "PER"}], []], ['[{"label":"PER"}]', "[]"]),
        ([[], []], ["[]", "[]"]),
        ([[]], ["[]"]),
        ([], []),
    ],
)
def test_outputs_that_hold_objects_are_texts_of_json_whatever_is_in_them(value: Any, texts: list[str]) -> None:
    """A client reads one text per input; that nothing was found in any of them is no other kind of tensor."""
    gives = {"properties": {"entities": schema_of("array", "array", "object")}}
    translation = Translation(asked(), "")
    translation.ask(call(MODEL, None), description(gives=gives))
    told = json.loads(translation.tell(output({"entities": value})).result)

    assert told == [{"name": "entities", "datatype": "BYTES", "shape": [len(texts)], "data": texts}]


@pytest.mark.parametrize(
    ("kind", "datatype"), [("integer", "INT64"), ("boolean", "BOOL"), ("string", "BYTES"), ("number", "FP64")]
)
def test_outputs_without_elements_have_the_datatype_of_the_description(kind: str, datatype: str) -> None:
    told = description(gives={"properties": {"found": schema_of("array", kind)}})
    for how in ({}, {"parameters": {"binary_data_output": True}}):
        translation = Translation(asked(**how), "")
        translation.ask(call(MODEL, None), told)
        (tensor,) = json.loads(translation.tell(output({"found": []})).result)
        assert (tensor["datatype"], tensor["shape"]) == (datatype, [0])
    assert metadata("m", told)["outputs"][0]["datatype"] == datatype


@pytest.mark.parametrize(
    ("schema", "shape"),
    [
        (schema_of("array", "object"), [-1]),
        (schema_of("array", "array", "object"), [-1]),
        ({"anyOf": [schema_of("array", "object"), schema_of("object")]}, [-1]),
        (schema_of("array", "object") | {"minItems": 3, "maxItems": 3}, [3]),
        (schema_of("object"), [1]),
        (schema_of("array", "number"), [-1]),
        (schema_of("number"), [1]),
    ],
)
def test_the_shape_of_an_output_leaves_open_how_many_texts_it_has(schema: dict[str, Any], shape: list[int]) -> None:
    told = metadata("m", description(gives={"properties": {"found": schema}}))["outputs"]

    assert [one["shape"] for one in told] == [shape]


def test_an_output_that_the_model_lacks_is_told_before_it_runs() -> None:
    translation = Translation(asked(outputs=[{"name": "logits"}]), "")
    with pytest.raises(InputInvalid, match="no output logits: it gives predictions, probabilities"):
        translation.ask(call(MODEL, None), description())
    right = Translation(asked(outputs=[{"name": "probabilities"}]), "")

    assert right.ask(call(MODEL, None), description()).input_data == b'{"features":[[1,2]]}'


def test_named_outputs_of_a_graph_are_known_before_it_runs_too() -> None:
    gives = {"properties": {"outputs": {"properties": {"logits": ROWS}}}}
    Translation(asked(outputs=[{"name": "logits"}]), "").ask(call(MODEL, None), description(gives=gives))
    with pytest.raises(InputInvalid, match="no output outputs"):
        Translation(asked(outputs=[{"name": "outputs"}]), "").ask(call(MODEL, None), description(gives=gives))


@pytest.mark.parametrize("how", [{"parameters": {"binary_data_output": True}}, {"outputs": [
    {"name": name, "parameters": {"binary_data": True}} for name in RESULT]}], ids=["all", "each"])  # fmt: skip
def test_outputs_come_as_bytes_where_they_are_asked_for(how: dict[str, Any]) -> None:
    told, tail, covered = answered(asked(**how))
    first, second = told["outputs"]

    assert first == {"name": "predictions", "datatype": "INT64", "shape": [2], "parameters": {"binary_data_size": 16}}
    assert second["parameters"] == {"binary_data_size": 32}
    assert np.frombuffer(tail[:16], "<i8").tolist() == [1, 0]
    assert np.frombuffer(tail[16:], "<f8").tolist() == [0.25, 0.75, 1.0, 0.0]
    assert covered == json.dumps(told["outputs"], separators=(",", ":")).encode() + tail


def test_one_output_as_bytes_and_one_as_json() -> None:
    wanted = [{"name": "probabilities"}, {"name": "predictions", "parameters": {"binary_data": False}}]
    told, tail, _ = answered(asked(outputs=wanted, parameters={"binary_data_output": True}))

    assert [tensor["name"] for tensor in told["outputs"]] == ["probabilities", "predictions"]
    assert told["outputs"][1]["data"] == [1, 0]
    assert len(tail) == 32
    assert answered(asked())[1] == b""


def test_texts_truth_values_and_large_numbers_as_bytes() -> None:
    result = {"t": ["a", "世界", ""], "b": [True, False], "u": [2**63, 1], "odd": [2**63, -1], "none": []}
    translation = Translation(asked(parameters={"binary_data_output": True}), "")
    told = translation.tell(output(result)).result
    tensors, end = json.JSONDecoder().raw_decode(told.decode("latin-1"))

    assert [one["datatype"] for one in tensors] == ["BYTES", "BOOL", "UINT64", "BYTES", "FP64"]
    assert told[end:] == (
        b"\1\0\0\0a\6\0\0\0" + "世界".encode() + b"\0\0\0\0" + b"\1\0" + (2**63).to_bytes(8, "little")
        + (1).to_bytes(8, "little") + b"\x13\0\0\0009223372036854775808\2\0\0\0-1"
    )  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"parameters": {"binary_data_output": 1}},
        {"outputs": [{"name": "predictions", "parameters": {"binary_data": "yes"}}]},
        {"outputs": [{"name": "predictions", "parameters": {"classification": 2}}]},
        {"outputs": [{"name": "predictions", "parameters": []}]},
    ],
)
def test_other_ways_to_give_an_output_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        Translation(asked(**wrong), "").ask(call(MODEL, None), description())


@pytest.mark.parametrize(("only_ready", "names"), [(False, ["a", "b", "c"]), (True, ["a"])])
def test_the_index_names_what_answers_or_all(only_ready: bool, names: list[str]) -> None:
    rows = index([("a", "ready"), ("b", "restarting"), ("c", "failed")], only_ready=only_ready)

    assert [row["name"] for row in rows] == names
    assert [(row["state"], row["reason"]) for row in rows] == [
        ("READY", ""), ("UNAVAILABLE", "restarting"), ("UNAVAILABLE", "failed")
    ][: len(names)]  # fmt: skip


def test_an_input_without_axes_takes_a_tensor_of_one() -> None:
    takes = {"properties": {"scale": {"anyOf": [{"type": "number"}, {"type": "object", "properties": {}}]}}}
    single = {"name": "scale", "datatype": "FP64", "shape": [1], "data": [3.5]}
    assert metadata("m", description(takes=takes))["inputs"] == [{"name": "scale", "datatype": "FP64", "shape": [1]}]

    def asks(tensor: dict[str, Any]) -> bytes | None:
        return (
            Translation(json.dumps({"inputs": [tensor]}).encode(), "")
            .ask(call(MODEL, None), description(takes=takes))
            .input_data
        )

    assert asks(single) == b'{"scale":3.5}'
    assert asks(single | {"shape": [2], "data": [3.5, 1]}) == b'{"scale":[3.5,1]}', "its model refuses it"


def test_inputs_that_are_no_tensors_are_not_shown_as_such() -> None:
    messages = {"type": "array", "items": {"type": "object", "properties": {"role": {"type": "string"}}}}
    takes = {"properties": {"prompt": {"type": "string"}, "messages": messages}}
    shown = metadata("m", description(takes=takes))["inputs"]
    assert shown == [{"name": "prompt", "datatype": "BYTES", "shape": [1]}]


ODD_SCHEMAS: list[Any] = [
    {"properties": []}, {"properties": {"x": 3}}, {"properties": {"outputs": {"properties": 3}}}, {"properties": None},
    {"properties": {"x": {"anyOf": [3, None]}}}, {"properties": {"x": {"anyOf": 3, "type": []}}},
    {"properties": {"x": {"type": "array", "minItems": "x", "maxItems": "x", "items": [1]}}},
    {"properties": {"x": {"type": {"a": 1}}}}, {"properties": {"x": {"type": [[1]]}}},
]  # fmt: skip


@pytest.mark.parametrize("schema", ODD_SCHEMAS)
def test_whatever_a_program_says_of_itself_is_shown_or_told(schema: Any) -> None:
    odd = description(gives=schema, takes=schema)
    json.dumps(metadata("m", odd))
    with contextlib.suppress(DivaultError):
        Translation(asked(outputs=[{"name": "x"}]), "").ask(call(MODEL, None), odd)


@pytest.mark.parametrize("result", [3, {}, {"embeddings": 1, "tokens": [1]}, {"embeddings": [["a"]], "tokens": [1]},
    {"embeddings": [[1.0]], "tokens": [2**63]}, {"embeddings": [[1e300]], "tokens": [1]}])  # fmt: skip
def test_an_answer_that_is_no_embedding_is_the_models_failure(result: Any) -> None:
    raw = b'{"model": "m", "input": "x", "encoding_format": "base64"}'
    how = dialect(Asked("embeddings", raw), "q", 0)
    how.ask(call(MODEL, None), description("embeddings"))
    with pytest.raises(ModelFailed):
        how.tell(output(result))


@pytest.mark.parametrize("result", [3, {}, {"texts": [{"text": 1}]}, {"texts": [{"text": "a", "finish_reason": "stop",
    "prompt_tokens": -1, "completion_tokens": 1}]}])  # fmt: skip
def test_an_answer_that_is_no_text_is_the_models_failure(result: Any) -> None:
    how = dialect(Asked("completions", b'{"model": "m", "prompt": "x"}'), "q", 0)
    how.ask(call(MODEL, None), replace(description("text-generation")))
    with pytest.raises(ModelFailed):
        how.tell(output(result))


# --- OpenAI: what is taken --------------------------------------------------------------------------------------------


def read(kind: Any, **members: Any) -> Asked:
    told = Asked(kind, json.dumps({"model": "m", **members}).encode())
    told.read()
    return told


CHAT = {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("kind", "members", "field"),
    [
        ("completions", {"prompt": "x", "logprobs": 0}, "logprobs"),
        ("chat", CHAT | {"logprobs": True}, "logprobs"), ("chat", CHAT | {"n": True}, "n"),
        ("chat", CHAT | {"stream_options": {"include_usage": "false"}}, "stream_options.include_usage"),
        ("chat", CHAT | {"stream_options": {"nonsense": 1}}, "stream_options.nonsense"),
        ("chat", CHAT | {"nonsense": None}, None), ("chat", CHAT | {"nonsense": 1}, "nonsense"),
        ("chat", CHAT | {"n": 1, "logprobs": False, "presence_penalty": 0.0, "tools": None}, None),
        ("chat", CHAT | {"stream_options": {"include_usage": True, "include_obfuscation": False}}, None),
    ],
)  # fmt: skip
def test_a_member_with_another_meaning_is_refused_by_its_name(kind: Any, members: Any, field: str | None) -> None:
    if field is None:
        read(kind, **members)
        return
    with pytest.raises((BadRequest, InputInvalid)) as caught:
        read(kind, **members)
    assert caught.value.data["field"] == field


@pytest.mark.parametrize("include", [True, False])
def test_usage_in_a_stream_is_told_to_who_asks(include: bool) -> None:
    assert read("chat", **CHAT, stream_options={"include_usage": include}).usage_in_stream is include


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"tool_calls": [{"id": "1"}]}, "messages[0].tool_calls"), ({"name": "bob"}, "messages[0].name"),
        ({"nonsense": 1}, "messages[0].nonsense"),
        ({"refusal": None, "tool_calls": [], "annotations": [], "audio": None, "function_call": None}, None),
    ],
)  # fmt: skip
def test_a_message_loses_nothing_that_was_said(more: dict[str, Any], field: str | None) -> None:
    asked = read("chat", messages=[{"role": "assistant", "content": "x", **more}])
    chat = description("text-generation", takes={"properties": {"messages": {}}})
    if field is None:
        assert asked.input_data(chat) == {"messages": [{"role": "assistant", "content": "x"}]}
        return
    with pytest.raises((BadRequest, InputInvalid)) as caught:
        asked.input_data(chat)
    assert caught.value.data["field"] == field


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        (b'{"model": 3}', "model"), (b'{"model": ""}', "model"), (b"{}", "model"),
        (b'{"model": "m", "stream": 1}', "stream"),
        (b"[]", "model"), (b'{"model": "m", ', None), (b'{"model": "\xff"}', None),
    ],
)  # fmt: skip
def test_who_is_asked_and_how_is_told_first(raw: bytes, field: str | None) -> None:
    with pytest.raises(BadRequest) as caught:
        Asked("completions", raw)
    assert caught.value.data.get("field") == field


def test_errors_name_what_the_caller_sent() -> None:
    chat = read("chat", **CHAT, max_completion_tokens=4)
    assert [chat.name_of(name) for name in ("parameters.max_tokens", "parameters.top_p", "messages")] == [
        "max_completion_tokens", "top_p", "messages"
    ]  # fmt: skip
    assert read("completions", prompt="x", max_tokens=4).name_of("parameters.max_tokens") == "max_tokens"
    embeddings = read("embeddings", input=["", "x"])
    assert [embeddings.name_of(name) for name in ("text", "text[0]", "texts", "parameters.text")] == [
        "input", "input[0]", "texts", "text"
    ]  # fmt: skip
    assert read("completions", prompt="x").name_of("text[0]") == "text[0]"
