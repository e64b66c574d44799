"""OpenAI's embeddings, completions and chat completions, for its own clients: what is translated, and how.

Supported: `input`, `prompt` and `messages` as texts; `max_tokens`, `max_completion_tokens`, `temperature`, `top_p`,
`stop`, `seed`, `stream`, `stream_options.include_usage`, `encoding_format`, `user`. Members with another meaning are
refused by name unless they have the value that changes nothing; nothing is silently left out. Without `seed` it is 0:
the same request has the same answer.

The receipt is the member `receipt` of the answer, or of the last chunk of a stream. Its input hash covers the whole
body of the request, its output hash the value of `data` or `choices` as it stands in the answer; of a stream, what
would have stood there (`covered_choices`).
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import msgspec
import orjson
from msgspec.structs import replace

from divault.errors import BadRequest, InputInvalid, ModelFailed, UnsupportedModel
from divault.messages import strict_object
from divault.models.base import Description
from divault.service import Dialect
from divault.values import ModelId, Output, SignedCall

Kind = Literal["embeddings", "completions", "chat"]
TASKS: Mapping[Kind, str] = {"embeddings": "embeddings", "completions": "text-generation", "chat": "text-generation"}
_PASSED = ("temperature", "top_p", "seed", "stop")
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "logprobs": (False,), "top_logprobs": (0,), "suffix": ("",),
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "tools": ([],),
    "tool_choice": ("none", "auto"), "response_format": ({"type": "text"},), "store": (False,), "dimensions": (),
    "functions": ([],), "modalities": (["text"],), "parallel_tool_calls": (True, False),
}  # fmt: skip
"""Members that are taken only with a value that changes nothing; null is one everywhere."""
_KNOWN: Mapping[Kind, frozenset[str]] = {
    "embeddings": frozenset({"model", "input", "encoding_format", "user"}),
    "completions": frozenset({"model", "prompt", "max_tokens", "stream", "stream_options", "user", *_PASSED}),
    "chat": frozenset(
        {"model", "messages", "max_tokens", "max_completion_tokens", "stream", "stream_options", "user", *_PASSED}
    ),
}
_NEUTRAL_IN_STREAM: Mapping[str, tuple[Any, ...]] = {"include_usage": (True, False), "include_obfuscation": (False,)}
_NEUTRAL_IN_MESSAGE: Mapping[str, tuple[Any, ...]] = {
    "name": ("",), "tool_calls": ([],), "refusal": ("",), "annotations": ([],)
}  # fmt: skip
"""What an answer brings beside role and content, and comes back with it."""
_MESSAGE = frozenset({"role", "content"})
_COMPLETION_TOKENS = 16
"""Default of `max_tokens` where the interface has always had it."""


class _Glance(msgspec.Struct, frozen=True):
    """What has to be known of a body before anybody is proved to have sent it."""

    model: str
    stream: bool | None = None


_Count = Annotated[int, msgspec.Meta(ge=0, le=2**32)]


class _Embeddings(msgspec.Struct):
    """The result of a model of the task `embeddings`."""

    embeddings: list[list[float]]
    tokens: list[_Count]


class _Text(msgspec.Struct):
    text: str
    finish_reason: str
    prompt_tokens: _Count
    completion_tokens: _Count


class _Texts(msgspec.Struct):
    """The result of a model of the task `text-generation`."""

    texts: list[_Text]


_glances = msgspec.json.Decoder(_Glance)


class Asked:
    """A request of one of the three kinds. Of its body model and stream are looked at; `read` takes it apart."""

    def __init__(self, kind: Kind, raw: bytes) -> None:
        """Raises BadRequest."""
        self.kind = kind
        self._raw = raw
        try:
            glance = _glances.decode(raw)
        except msgspec.ValidationError as err:
            field = "stream" if str(err).endswith("`$.stream`") else "model"
            raise BadRequest("the body is a JSON object with a model; stream is true or false", field=field) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise BadRequest("the body is no JSON that can be read") from None
        self.model = _model(glance.model)
        self.stream = bool(glance.stream)
        self.members: dict[str, Any] = {}
        self.usage_in_stream = self.base64 = False

    def read(self) -> None:
        """Take the body apart, once its sender is known: that costs. Raises BadRequest, InputInvalid."""
        self.members = {name: value for name, value in strict_object(self._raw).items() if value is not None}
        _require_neutral(self.members, _KNOWN[self.kind], _NEUTRAL)
        how = self._member("stream_options", dict, {})
        _require_neutral(how, frozenset(), _NEUTRAL_IN_STREAM, "stream_options.")
        self.usage_in_stream = how.get("include_usage") is True
        self.base64 = self._member("encoding_format", str, "float") == "base64"
        if self.members.get("encoding_format", "float") not in ("float", "base64"):
            raise InputInvalid("encoding_format is float or base64", field="encoding_format")

    def forget(self) -> None:
        """Let the body go, once the run has ended: the names of its members stay."""
        if self.members:  # else it is a kept answer, and this one is still to be read
            self.members = dict.fromkeys(self.members)
            self._raw = b""

    def input_data(self, description: Description) -> dict[str, Any]:
        """What the model is asked. Raises InputInvalid."""
        if self.kind == "embeddings":
            return {"text": self._texts("input")}
        if self.kind == "completions":
            return {"prompt": self._texts("prompt")}
        takes = description.input_schema.get("properties")
        if not isinstance(takes, Mapping) or "messages" not in takes:
            raise InputInvalid("this model has no chat template: use /v1/completions", field="messages")
        return {"messages": _messages(self.members.get("messages"))}

    def parameters(self) -> dict[str, Any]:
        """The parameters of the run."""
        if self.kind == "embeddings":
            return {}
        found = {name: self.members[name] for name in _PASSED if name in self.members}
        found.setdefault("temperature", 1.0)
        limit = self.members.get("max_completion_tokens", self.members.get("max_tokens"))
        if limit is not None:
            found["max_tokens"] = limit
        elif self.kind == "completions":
            found["max_tokens"] = _COMPLETION_TOKENS
        return found

    def name_of(self, field: str) -> str:
        """What the caller calls a field that an error names in this project's words."""
        if field == "parameters.max_tokens" and "max_completion_tokens" in self.members:
            return "max_completion_tokens"
        if self.kind == "embeddings" and (field == "text" or field.startswith("text[")):
            return "input" + field.removeprefix("text")
        return field.removeprefix("parameters.")

    def _texts(self, name: str) -> Any:
        value = self.members.get(name)
        texts = value if isinstance(value, list) else [value]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputInvalid(f"{name} is a text or a list of texts; token ids are not read here", field=name)
        return value

    def _member(self, name: str, kind: type[Any], default: Any) -> Any:
        value = self.members.get(name, default)
        if type(value) is not kind:
            raise BadRequest(f"{name} is not of the type that it must have", field=name)
        return value


class Translation:
    """One request in words that its model takes, and the answer in those of the interface."""

    def __init__(self, asked: Asked, request_id: str, created: int) -> None:
        self._asked = asked
        self._request_id = request_id
        self._created = created
        self._usage: dict[str, int] = {}

    def ask(self, call: SignedCall, description: Description) -> SignedCall:
        """The call as its model takes it. Raises BadRequest, InputInvalid; UnsupportedModel for one of another task."""
        self._asked.read()
        need = TASKS[self._asked.kind]
        if description.task != need:
            raise UnsupportedModel(
                f"this route is for models of the task {need}; this one does {description.task}",
                seen=f"a model for {description.task}",
                supported=need,
            )
        parameters = self._asked.parameters()
        data = orjson.dumps(self._asked.input_data(description))
        return replace(call, input_data=data, parameters=orjson.dumps(parameters) if parameters else None)

    def tell(self, output: Output) -> Output:
        """The output with `data` or `choices` as its result; counts the tokens. Raises ModelFailed."""
        try:
            return replace(output, result=self._told(output.result))
        # A worker whose model is a program says of itself what it likes: it may not be what its task gives.
        except (msgspec.DecodeError, OverflowError, RecursionError, orjson.JSONEncodeError):
            raise ModelFailed(f"the model's answer is none of {TASKS[self._asked.kind]}", kind="answer_shape") from None

    def _told(self, result: bytes) -> bytes:
        if self._asked.kind == "embeddings":
            found = msgspec.json.decode(result, type=_Embeddings)
            self._usage = _usage(sum(found.tokens), None)
            return orjson.dumps(_embedded(found.embeddings, as_base64=self._asked.base64))
        texts = msgspec.json.decode(result, type=_Texts).texts
        self._usage = _usage(sum(text.prompt_tokens for text in texts), sum(text.completion_tokens for text in texts))
        return covered_choices(self._asked.kind, [(text.text, text.finish_reason) for text in texts])

    def wording(self, model_id: str, result: bytes, envelope: dict[str, Any]) -> bytes:
        """The body of the answer, after `tell`."""
        if self._asked.kind == "embeddings":
            body: dict[str, Any] = {"object": "list", "data": msgspec.Raw(result)}
        else:
            body = _head(self._asked, self._request_id, self._created) | {"choices": msgspec.Raw(result)}
        return msgspec.json.encode(body | {"model": model_id, "usage": self._usage, "receipt": envelope})


def dialect(asked: Asked, request_id: str, created: int, on_piece: Callable[..., None] | None = None) -> Dialect:
    """How the request is put to a model, and its answer worded."""
    translation = Translation(asked, request_id, created)
    return Dialect(translation.ask, translation.tell, translation.wording, on_piece)


def covered_choices(kind: Kind, texts: list[tuple[str, str]]) -> bytes:
    """The bytes of `choices` of an answer with these texts and reasons for their end: what its receipt covers."""
    choices: list[dict[str, Any]] = []
    for index, (text, reason) in enumerate(texts):
        said = {"text": text} if kind == "completions" else {"message": {"role": "assistant", "content": text}}
        choices.append({"index": index, **said, "logprobs": None, "finish_reason": reason})
    return orjson.dumps(choices)


def chunk(asked: Asked, request_id: str, created: int, choices: list[dict[str, Any]], **more: Any) -> bytes:
    """One event of a stream."""
    head = _head(asked, request_id, created, stream=True) | {"model": asked.model.text}
    return b"data: " + orjson.dumps(head | {"choices": choices} | more) + b"\n\n"


def delta(asked: Asked, index: int, text: str, finish: str | None = None, *, first: bool = False) -> dict[str, Any]:
    """A choice of a chunk; the `first` of a chat's says who speaks."""
    part = {"content": text} if text or first else {}
    if first:
        part = {"role": "assistant"} | part
    said: dict[str, Any] = {"text": text} if asked.kind == "completions" else {"delta": part}
    return {"index": index, **said, "logprobs": None, "finish_reason": finish}


def _head(asked: Asked, request_id: str, created: int, *, stream: bool = False) -> dict[str, Any]:
    chat = asked.kind == "chat"
    kind = ("chat.completion.chunk" if stream else "chat.completion") if chat else "text_completion"
    return {"id": ("chatcmpl-" if chat else "cmpl-") + request_id, "object": kind, "created": created}


def _usage(prompt: int, completion: int | None) -> dict[str, int]:
    usage = {"prompt_tokens": prompt, "total_tokens": prompt + (completion or 0)}
    return usage if completion is None else usage | {"completion_tokens": completion}


def _embedded(rows: list[list[float]], *, as_base64: bool) -> list[dict[str, Any]]:
    return [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode() if as_base64 else row,
        }
        for index, row in enumerate(rows)
    ]


def _messages(told: Any) -> list[dict[str, str]]:
    if not isinstance(told, list) or not told or not all(isinstance(message, dict) for message in told):
        raise InputInvalid("messages is a list of objects with role and content", field="messages")
    return [_message(place, message) for place, message in enumerate(told)]


def _model(text: str) -> ModelId:
    try:
        return ModelId.parse(text)
    except BadRequest as err:
        raise BadRequest(err.detail, field="model") from None


def _require_neutral(
    told: Mapping[str, Any], known: frozenset[str], neutral: Mapping[str, tuple[Any, ...]], where: str = ""
) -> None:
    """Return only if all that is told beside what is known changes nothing, as null does everywhere.

    Raises BadRequest, InputInvalid.
    """
    for name, value in told.items():
        if name in known or value is None:
            continue
        field = where + name[:80]
        if name not in neutral:
            raise BadRequest(f"{field} is no member that this route knows", field=field)
        if not any(value == one and isinstance(value, bool) is isinstance(one, bool) for one in neutral[name]):
            raise InputInvalid(f"{field} is not supported here: leave it out", field=field)


def _message(place: int, told: dict[str, Any]) -> dict[str, str]:
    content = told.get("content")
    _require_neutral(told, _MESSAGE, _NEUTRAL_IN_MESSAGE, f"messages[{place}].")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        whole = len(parts) == len(content) and all(isinstance(part, str) for part in parts)
        content = "".join(map(str, parts)) if whole else None
    if not isinstance(content, str) or not isinstance(told.get("role"), str):
        raise InputInvalid(
            f"messages[{place}] has a role and a content of text; other parts are not supported here", field="messages"
        )
    return {"role": told["role"], "content": content}
