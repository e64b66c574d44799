"""Request and answer bodies as OpenAPI shows them. Only shown: requests are parsed by `envelope`, from raw bytes."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

_ADDRESS = "0xB2A1c543Abe6C496Fe658f34dda1e023885D293E"
_SIGNATURE = "0x" + "ab" * 64 + "1b"
_NONCE = "0x" + "5a" * 32


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class Payment(_Body):
    """A plain USDC transfer to the model's owner, claimed by its transaction."""

    tx_hash: str = Field(description="0x and 64 lower-case hex digits", examples=["0x" + "7c" * 32])


class SignedBody(_Body):
    """What every signed body holds. The signature is EIP-712 `InferenceRequest`; see docs/reference/api.md."""

    model_id: str = Field(examples=["breast-cancer"], description="name, or 0x and 64 hex digits")
    user_address: str = Field(examples=[_ADDRESS], description="the wallet that signs")
    user_signature: str = Field(examples=[_SIGNATURE])
    nonce: str = Field(examples=[_NONCE], description="32 random bytes, used once")
    issued_at: int = Field(examples=[1790000000], description="unix seconds")
    expires_at: int = Field(examples=[1790000060], description="unix seconds, at most 300 after issued_at")
    chain_id: int | None = Field(None, description="to choose among several vaults")
    vault: str | None = Field(None, description="to choose among several vaults")
    decryption_key: str | None = Field(
        None, description="age identity, passphrase or Kavach key, if the node's own does not open it"
    )
    lighthouse_authorization: str | None = Field(
        None, description="instead of a key: Kavach signature or jwt: token, with which the node fetches it for you"
    )


class LoadBody(SignedBody):
    """Load a model."""

    cid: str | None = Field(None, description="must equal the vault's; default: the vault's")


class InferenceBody(SignedBody):
    """Run a model."""

    input_data: dict[str, Any] = Field(
        examples=[{"features": [5.1, 3.5, 1.4, 0.2]}], description="what the model takes"
    )
    parameters: dict[str, Any] | None = None
    max_price: str = Field(
        "0", description="most that may be charged, atomic units of the payment token", examples=["20000"]
    )
    payment: Payment | None = None
    cid: str | None = None


class Spend(_Body):
    """What a session may spend of a token, in all."""

    token: str = Field(examples=[_ADDRESS])
    amount: str = Field(description="atomic units", examples=["500000"])


class NonceBody(_Body):
    """Ask for a nonce; with an address, for the whole text to sign."""

    user_address: str | None = Field(None, examples=[_ADDRESS], description="the wallet that will sign")
    spend: list[Spend] = []


class LoginBody(_Body):
    """Open a session."""

    message: str = Field(description="the EIP-4361 text, exactly as it was signed")
    signature: str = Field(examples=[_SIGNATURE], description="EIP-191 (personal_sign)")


class LogoutBody(_Body):
    """End a session."""

    everywhere: bool = Field(default=False, description="end all sessions of the wallet")


class Answer(_Body):
    """Every success."""

    status: str = "success"
    message: str


class NonceAnswer(_Body):
    """What stands in the text to sign (EIP-4361)."""

    status: str = "success"
    nonce: str
    domain: str
    uri: str
    version: str = "1"
    chain_id: int
    issued_at: str
    resources: list[str] = Field(description="this node, its vault, and what the session may spend: all are required")
    expires_in: int = Field(description="seconds in which the nonce has to come back")
    message: str | None = Field(None, description="the whole text, where the wallet's address was given")


class LoginAnswer(Answer):
    """An open session."""

    token: str = Field(description="send it as `Authorization: Bearer`; keep it secret")
    token_type: str = Field(examples=["Bearer"])
    user_address: str
    origin: str
    expires_at: int = Field(description="unix seconds")
    idle_seconds: int = Field(description="a session ends after so long without a call")
    spend: list[Spend]


class LogoutAnswer(Answer):
    """How many sessions were ended."""

    ended: int


class InferenceAnswer(Answer):
    """The result and its receipt."""

    model_id: str
    result: Any
    receipt: dict[str, Any] = Field(description="signed InferenceReceipt; check it with `divault verify`")


class ModelInfoOut(_Body):
    """What the vault says."""

    cid: str
    token_contract: str
    price_per_inference: int = Field(
        description="atomic units of the payment token; `price` repeats it as decimal text"
    )
    owner: str
    active: bool
    total_inferences: int = Field(description="receipts of status 1 that this node issued for the model")


class LoadResultOut(_Body):
    """What the worker says."""

    status: str
    message: str
    model_type: str
    device: str
    bytes: int
    sandbox: str
    seconds: float


class LoadAnswer(Answer):
    """A loaded model."""

    model_id: str
    model_info: dict[str, Any]
    load_result: LoadResultOut


class ModelsAnswer(_Body):
    """What is loaded."""

    status: str = "success"
    loaded_models: list[str]
    count: int
    models: list[dict[str, Any]]


class ModelAnswer(_Body):
    """One model."""

    status: str = "success"
    model_info: dict[str, Any]


class _Problem(_Body):
    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    actor: str = Field(description="who can mend it")


class Problem(_Problem):
    """RFC 9457 problem details."""

    error: str = Field(description="the code again; under /v2 a sentence, which is all that its clients show")


class OpenAiError(_Body):
    """What clients of OpenAI's interface read."""

    message: str
    type: str
    code: str
    param: str | None = Field(description="the field that is wrong, if it is one")


class OpenAiProblem(_Problem):
    """RFC 9457 problem details, with the error as OpenAI's interface has it."""

    error: OpenAiError


class Status(_Body):
    """One word on how the node is."""

    status: str


class Live(_Body):
    """That the process serves."""

    live: bool


class Ready(_Body):
    """Whether calls are served."""

    ready: bool


class ModelState(_Body):
    """A row of the index of loaded models."""

    name: str
    version: str
    state: str
    reason: str


class ModelReady(Ready):
    """Whether calls of a model are served."""

    name: str


class ServerOut(_Body):
    """Name and version of the server."""

    name: str
    version: str
    extensions: list[str]


class ModelTensors(_Body):
    """What the Open Inference Protocol, version 2, says of a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[dict[str, Any]] = Field(description="tensors: name, datatype, shape")
    outputs: list[dict[str, Any]] = Field(description="tensors: name, datatype, shape")
    parameters: dict[str, Any]


class Nothing(_Body):
    """Done."""


class Tensors(_Body):
    """A model's answer in the Open Inference Protocol, version 2."""

    outputs: list[dict[str, Any]] = Field(description="tensors: name, datatype, shape, data")


TENSORS_IN: dict[str, Any] = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "inputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "datatype", "shape"],
                "properties": {
                    "name": {"type": "string"},
                    "datatype": {"type": "string"},
                    "shape": {"type": "array", "items": {"type": "integer"}},
                    "data": {},
                },
            },
        },
        "outputs": {"type": "array", "items": {"type": "object"}},
        "parameters": {"type": "object"},
    },
    "example": {"inputs": [{"name": "features", "datatype": "FP64", "shape": [1, 4], "data": [5.1, 3.5, 1.4, 0.2]}]},
}
"""An inference request of that protocol."""


class OpenAiModel(_Body):
    """A loaded model."""

    id: str
    object: str
    created: int
    owned_by: str
    task: str


class OpenAiModels(_Body):
    """What is loaded."""

    object: str
    data: list[OpenAiModel]


class OpenAiAnswer(_Body):
    """As OpenAI's interface has it, with the receipt beside it."""

    object: str
    model: str
    usage: dict[str, int]
    receipt: dict[str, Any] = Field(description="signed InferenceReceipt; check it with `divault verify`")


_TEXTS: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_SAMPLING: dict[str, Any] = {
    "max_tokens": {"type": "integer", "minimum": 1},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number"},
    "stop": _TEXTS,
    "seed": {"type": "integer", "description": "without it 0: the same request has the same answer"},
    "stream": {"type": "boolean"},
}


def _asked(name: str, schema: dict[str, Any], more: dict[str, Any], example: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["model", name],
        "properties": {"model": {"type": "string"}, name: schema, **more},
        "example": {"model": "my-model", name: example},
    }


_MESSAGES: dict[str, Any] = {"type": "array", "items": {"type": "object", "required": ["role", "content"]}}
OPENAI: dict[str, dict[str, Any]] = {
    "embeddings": _asked("input", _TEXTS, {"encoding_format": {"enum": ["float", "base64"]}}, "A text."),
    "completions": _asked("prompt", _TEXTS, _SAMPLING, "Once upon a time"),
    "chat": _asked("messages", _MESSAGES, _SAMPLING, [{"role": "user", "content": "Good morning"}]),
}
"""Requests of that interface, by kind."""


class NodeOut(_Body):
    """Who a node is."""

    address: str
    age_recipient: str
    chain_id: int
    vault: str
    payment_token: str
    rails: list[str]
    authority: str
    version: str
    limits: dict[str, int | float]
    sandbox: dict[str, Any]
    descriptor: dict[str, Any] = Field(description="the EIP-712 NodeDescriptor, signed by the node's key")


class HealthOut(_Body):
    """What was tested just now."""

    status: str
    message: str
    services: dict[str, str]
