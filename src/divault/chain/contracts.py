"""The project's compiled contracts: calldata, deployment data, results, events and errors by their ABI. Pure but slow.

This is the cold path (publisher, client, tests); what the pipeline asks on every request is packed by hand in `vault`
and `erc20`. Arguments and results are this project's values: `Address`, `Digest`, `ModelId` and `Usdc` where the ABI
says address, bytes32 and uint256; whole numbers, text, bytes, booleans, lists and tuples elsewhere.

>>> vault = load("ModelVault")
>>> vault.encode("totalModels").hex()
'017d7196'
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

from divault.chain.answers import Reverted
from divault.chain.records import Log
from divault.errors import ChainUnavailable
from divault.keccak import keccak256
from divault.values import Address, Digest, ModelId, Usdc


@dataclass(frozen=True, slots=True)
class Event:
    """One decoded event: its name and its arguments by name, and the log it came from."""

    name: str
    args: Mapping[str, Any]
    log: Log


@dataclass(frozen=True, slots=True)
class Contract:
    """One compiled contract. `load` reads it from the package."""

    name: str
    abi: tuple[Mapping[str, Any], ...]
    bytecode: bytes
    deployed_bytecode: bytes

    def encode(self, function: str, *args: Any) -> bytes:
        """Calldata. `function` is a name, or the full signature of an overloaded one.

        Raises ValueError for an unknown function or arguments that its types refuse.
        """
        entry = self._entry("function", function)
        return keccak256(_signature(entry).encode())[:4] + _encode(entry["inputs"], args)

    def deployment(self, *args: Any) -> bytes:
        """Creation code with the constructor's arguments. Raises ValueError."""
        inputs: list[Mapping[str, Any]] = []
        for entry in self.abi:
            if entry["type"] == "constructor":
                inputs = entry["inputs"]
        return self.bytecode + _encode(inputs, args)

    def decode(self, function: str, returned: bytes) -> Any:
        """What the function returned: one value, or a tuple of several.

        Raises ChainUnavailable when the bytes aren't what the ABI says: another contract answered.
        """
        values = _decode(self._entry("function", function)["outputs"], returned, f"{self.name}.{function}")
        return values[0] if len(values) == 1 else values

    def events(self, logs: Iterable[Log], name: str, *, emitter: Address | None = None) -> list[Event]:
        """The events of this name among the logs, of `emitter` where given. Raises ValueError, ChainUnavailable."""
        entry = self._entry("event", name)
        topic0 = Digest.keccak(_signature(entry).encode())
        return [
            Event(name, _event_args(entry, log), log)
            for log in logs
            if log.topics and log.topics[0] == topic0 and emitter in (None, log.address)
        ]

    def explain(self, failure: Reverted) -> str:
        """Why a call failed, in the contract's own terms: its custom error with arguments, or the plain reason."""
        for entry in self.abi:
            if entry["type"] == "error" and failure.data[:4] == keccak256(_signature(entry).encode())[:4]:
                args = _decode(entry["inputs"], failure.data[4:], entry["name"])
                return f"{entry['name']}({', '.join(str(arg) for arg in args)})"
        return failure.reason

    def _entry(self, kind: str, name: str) -> Mapping[str, Any]:
        found = [e for e in self.abi if e["type"] == kind and name in (e.get("name"), _signature(e))]
        if len(found) != 1:
            raise ValueError(f"{self.name} has {len(found)} {kind}s named {name}")
        return found[0]


@lru_cache(maxsize=32)
def load(name: str) -> Contract:
    """The artifact `abi/<name>.json` of this package. Raises ValueError if there is none."""
    file = resources.files("divault.chain") / "abi" / f"{name}.json"
    if not name.isidentifier() or not file.is_file():
        raise ValueError(f"no compiled contract named {name!r}")
    return of_artifact(name, json.loads(file.read_text(encoding="utf-8")))


def of_artifact(name: str, artifact: Mapping[str, Any]) -> Contract:
    """From `{abi, bytecode, deployedBytecode}`, as the compiler writes it."""
    code = [bytes.fromhex(artifact[key].removeprefix("0x")) for key in ("bytecode", "deployedBytecode")]
    return Contract(name, tuple(artifact["abi"]), *code)


def _signature(entry: Mapping[str, Any]) -> str:
    return f"{entry.get('name', '')}({','.join(_type(item) for item in entry.get('inputs', ()))})"


def _type(item: Mapping[str, Any]) -> str:
    """Canonical type of an ABI item: tuples spelled out."""
    kind = str(item["type"])
    if not kind.startswith("tuple"):
        return kind
    return f"({','.join(_type(part) for part in item['components'])}){kind.removeprefix('tuple')}"


def _encode(inputs: list[Mapping[str, Any]], args: tuple[Any, ...]) -> bytes:
    from eth_abi.abi import encode
    from eth_abi.exceptions import EncodingError

    if len(args) != len(inputs):
        raise ValueError(f"{len(inputs)} arguments expected: {', '.join(item['name'] for item in inputs)}")
    try:
        return encode([_type(item) for item in inputs], [_plain(arg) for arg in args])
    except EncodingError as err:
        raise ValueError(f"arguments do not fit the ABI: {err}") from err


def _plain(value: Any) -> Any:
    """A value of this project as eth_abi takes it."""
    if isinstance(value, Address | Digest):
        return value.raw
    if isinstance(value, ModelId):
        return value.key.raw
    if isinstance(value, Usdc):
        return value.atomic
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _decode(outputs: list[Mapping[str, Any]], data: bytes, what: str) -> tuple[Any, ...]:
    from eth_abi.abi import decode
    from eth_abi.exceptions import DecodingError

    try:
        values = decode([_type(item) for item in outputs], data)
    except (DecodingError, OverflowError, UnicodeDecodeError) as err:
        raise ChainUnavailable(f"{what} answered with something else than its ABI says") from err
    return tuple(_value(item, value) for item, value in zip(outputs, values, strict=True))


def _value(item: Mapping[str, Any], value: Any) -> Any:
    """A decoded value as this project's own."""
    kind = str(item["type"])
    if kind.endswith("]"):
        inner = {**item, "type": kind[: kind.rindex("[")]}
        return tuple(_value(inner, part) for part in value)
    if kind == "tuple":
        return tuple(_value(part, inside) for part, inside in zip(item["components"], value, strict=True))
    if kind == "address":
        return Address(bytes.fromhex(value[2:]))
    return Digest(value) if kind == "bytes32" else value


def _event_args(entry: Mapping[str, Any], log: Log) -> dict[str, Any]:
    indexed = [item for item in entry["inputs"] if item["indexed"]]
    plain = [item for item in entry["inputs"] if not item["indexed"]]
    if len(indexed) != len(log.topics) - 1:
        raise ChainUnavailable(f"a log of {entry['name']} has {len(log.topics)} topics instead of {len(indexed) + 1}")
    args = dict(zip((item["name"] for item in plain), _decode(plain, log.data, entry["name"]), strict=True))
    for item, topic in zip(indexed, log.topics[1:], strict=True):
        args[item["name"]] = _decode([item], topic.raw, entry["name"])[0] if _is_word(item) else topic
    return {item["name"]: args[item["name"]] for item in entry["inputs"]}


def _is_word(item: Mapping[str, Any]) -> bool:
    """False for indexed values of dynamic size, of which a log holds only the hash."""
    kind = str(item["type"])
    return not (kind in ("string", "bytes") or kind.endswith("]") or kind == "tuple")
