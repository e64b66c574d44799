"""JSON-RPC 2.0 answers, told apart strictly: a value, a failed execution, a refusal, or garbage. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import orjson

from divault.chain.records import Malformed, data

T_co = TypeVar("T_co", covariant=True)

# Halts of the EVM that nodes report as bare text (geth, reth/anvil, besu, nethermind, hardhat), lower case.
_HALTS = (
    "revert",
    "out of gas",
    "outofgas",
    "invalid opcode",
    "opcode not defined",
    "stack underflow",
    "stack overflow",
    "stack limit reached",
    "invalid jump",
    "evm error",
    "vm exception",
    "vm execution error",
    "bad instruction",
    "write protection",
)
_ERROR_STRING = bytes.fromhex("08c379a0")  # Error(string)
_PANIC = bytes.fromhex("4e487b71")  # Panic(uint256)
_MESSAGE_LIMIT = 200  # characters of a stranger's text that may reach a log line


class Reverted(Exception):
    """The EVM ran the call and it failed. `data` is what the contract returned; stays inside `divault.chain`."""

    def __init__(self, data: bytes = b"", message: str = "") -> None:
        super().__init__(message)
        self.data = data
        self.message = message

    @property
    def reason(self) -> str:
        """One line for people: the contract's own words, its panic code, its error's selector, or the node's words."""
        head, body = self.data[:4], self.data[4:]
        if head == _ERROR_STRING and len(body) >= 64:
            return printable(
                body[64 : 64 + min(int.from_bytes(body[32:64], "big"), _MESSAGE_LIMIT)].decode("utf-8", "replace")
            )
        if head == _PANIC and len(body) == 32:
            return f"panic {int.from_bytes(body, 'big'):#x}"
        return f"error {head.hex()}" if len(head) == 4 else self.message or "no reason given"


class Refused(Exception):
    """The endpoint answered with an error object that is not about the EVM. Stays inside `divault.chain`."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class Request(Generic[T_co]):
    """One call: method, parameters (JSON), and the parser of its result, which raises Malformed."""

    method: str
    params: tuple[Any, ...]
    parse: Callable[[Any], T_co]


def parse_answers(body: bytes, requests: Sequence[Request[Any]], first_id: int) -> list[Any]:
    """One entry per request, in their order: the parsed result, Reverted or Refused.

    A single request is answered by an object, several by a list in any order; ids are `first_id`, `first_id + 1`, ...
    Raises Malformed for anything else.
    """
    try:
        decoded = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise Malformed("not JSON") from None
    items = decoded if len(requests) > 1 else [decoded]
    if not isinstance(items, list) or len(items) != len(requests):
        raise Malformed(_why_not_a_batch(decoded))
    answers = dict(_identified(item) for item in items)
    wanted = range(first_id, first_id + len(requests))
    if set(answers) != set(wanted):
        raise Malformed("answers to other requests")
    return [_outcome(answers[number], request) for number, request in zip(wanted, requests, strict=True)]


def printable(text: str) -> str:
    """A stranger's text cut to 200 characters, control characters replaced."""
    return "".join(c if c.isprintable() else "?" for c in text[:_MESSAGE_LIMIT])


def _why_not_a_batch(decoded: Any) -> str:
    error = decoded.get("error") if isinstance(decoded, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return f"no batch: {printable(message)}" if isinstance(message, str) else "not the number of answers asked for"


def _identified(item: Any) -> tuple[int, dict[str, Any]]:
    if not isinstance(item, dict) or item.get("jsonrpc") != "2.0" or type(item.get("id")) is not int:
        raise Malformed("not a JSON-RPC 2.0 answer")
    return item["id"], item


def _outcome(item: dict[str, Any], request: Request[Any]) -> Any:
    if ("result" in item) == ("error" in item):
        raise Malformed("neither result nor error, or both")
    return request.parse(item["result"]) if "result" in item else _failure(item["error"])


def _failure(error: Any) -> Reverted | Refused:
    if not isinstance(error, dict) or type(error.get("code")) is not int or not isinstance(error.get("message"), str):
        raise Malformed("not an error object")
    message = printable(error["message"])
    if error["code"] == 3 or any(halt in message.lower() for halt in _HALTS):  # 3: execution error (EIP-1474 practice)
        return Reverted(_error_data(error.get("data")), message)
    return Refused(error["code"], message)


def _error_data(value: Any) -> bytes:
    """Return data of a revert; hardhat nests it one level deeper. Unreadable data is no data."""
    inner = value.get("data") if isinstance(value, dict) else value
    try:
        return data(inner)
    except Malformed:
        return b""
