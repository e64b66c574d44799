"""EIP-712 for the few flat structs of this project: hand-written, with cached type hash and domain separator.

A struct's fields are `address`, `bytes32`, `string` and `uintN`; their values are `Address`, `Digest`, `str` and `int`.
In JSON an address is text in one accepted spelling, bytes32 is `0x` and 64 lower-case hex digits, and every number is a
decimal string, because JSON readers round what goes beyond 2^53.

>>> vault = Address.parse("0x0aA7a61e1df6DF72766a156A6eeF331dB8586B53")
>>> str(Domain("DIV Inference", "1", 31337, vault).separator)
'0x68ec463dd1a5450e0427f642d2eed6e058ad064bdf6c1cb8399f20aa5a6d7421'
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from divault.errors import BadRequest
from divault.keccak import keccak256
from divault.messages.reasons import refusal
from divault.values import UINT256_MAX, Address, Digest

_NUMBER = re.compile(r"0|[1-9][0-9]{0,77}", re.ASCII)
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}", re.ASCII)
_DOMAIN_FIELDS = (("name", "string"), ("version", "string"), ("chainId", "uint256"), ("verifyingContract", "address"))
_DOMAIN_TYPE = keccak256(b"EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)")
Value = Address | Digest | str | int


@dataclass(frozen=True, slots=True)
class Domain:
    """Where a signature counts: an application's name and version, on one chain, with one contract (EIP-712)."""

    name: str
    version: str
    chain_id: int
    contract: Address

    @classmethod
    def parse(cls, value: Any) -> Domain:
        """From its JSON form, with exactly the four members; `chainId` may be a number or a decimal string.

        Raises BadRequest that names the member.
        """
        members = _members("domain", value, tuple(name for name, _ in _DOMAIN_FIELDS))
        chain_id = members["chainId"]
        number = str(chain_id) if type(chain_id) is int and 0 <= chain_id <= UINT256_MAX else chain_id
        parsed: list[Any] = [
            _from_json(f"domain.{n}", t, number if n == "chainId" else members[n]) for n, t in _DOMAIN_FIELDS
        ]
        return cls(*parsed)

    @property
    def separator(self) -> Digest:
        """The domain separator; computed once per domain."""
        return _separator(self)

    def to_json(self) -> dict[str, Any]:
        """Give the form that wallets take."""
        return {
            "name": self.name,
            "version": self.version,
            "chainId": self.chain_id,
            "verifyingContract": str(self.contract),
        }

    def require(self, have: Domain) -> None:
        """Return only if `have`, the domain that was signed, is this one.

        Raises WrongChain, reason `wrong_chain` for another chain id and `wrong_domain` for the rest.
        """
        need = {"chain_id": self.chain_id, "vault": str(self.contract)}
        if have.chain_id != self.chain_id:
            raise refusal("wrong_chain", f"signed for chain {have.chain_id}; this is chain {self.chain_id}", **need)
        if have != self:
            raise refusal("wrong_domain", f"signed for another application or vault than {self.contract}", **need)

    def digest(self, struct_hash: bytes) -> Digest:
        """What is signed: keccak256 of 0x1901, the separator and the struct's hash."""
        return Digest.keccak(b"\x19\x01" + self.separator.raw + struct_hash)


@lru_cache(maxsize=256)  # a node has one or two domains; a checker of receipts sees a few more
def _separator(domain: Domain) -> Digest:
    parts = (
        _DOMAIN_TYPE,
        keccak256(domain.name.encode()),
        keccak256(domain.version.encode()),
        domain.chain_id.to_bytes(32, "big"),
        bytes(12) + domain.contract.raw,
    )
    return Digest.keccak(b"".join(parts))


class Struct:
    """A flat EIP-712 struct: its name, its fields in order, and its type hash."""

    def __init__(self, name: str, fields: str) -> None:
        """`fields` as in the type string: `"address user,uint64 issuedAt"`."""
        self.name = name
        self.fields = tuple((n, t) for t, n in (part.split(" ") for part in fields.split(",")))
        self.type_hash = Digest.keccak(f"{name}({fields})".encode())
        self._encoders = tuple((n, _encoder(n, t)) for n, t in self.fields)

    def hash(self, values: Mapping[str, Value]) -> bytes:
        """The EIP-712 hashStruct of the values. Raises ValueError for a number that its type can't hold."""
        return keccak256(self.type_hash.raw + b"".join([encode(values[name]) for name, encode in self._encoders]))

    def to_json(self, values: Mapping[str, Value]) -> dict[str, str]:
        """Give the values in their JSON form, in the struct's order."""
        return {name: str(values[name]) for name, _ in self.fields}

    def parse(self, value: Any) -> dict[str, Any]:
        """The values from their JSON form, with exactly the struct's members. Raises BadRequest that names one."""
        members = _members(self.name, value, tuple(name for name, _ in self.fields))
        return {name: _from_json(name, kind, members[name]) for name, kind in self.fields}

    def typed_data(self, domain: Domain, values: Mapping[str, Value]) -> dict[str, Any]:
        """Give what `eth_signTypedData_v4` of a wallet takes."""
        types = {"EIP712Domain": _DOMAIN_FIELDS, self.name: self.fields}
        return {
            "domain": domain.to_json(),
            "types": {name: [{"name": n, "type": t} for n, t in fields] for name, fields in types.items()},
            "primaryType": self.name,
            "message": self.to_json(values),
        }


def _encoder(name: str, kind: str) -> Callable[[Any], bytes]:
    if kind == "address":
        return lambda value: bytes(12) + value.raw
    if kind == "bytes32":
        return lambda value: value.raw
    if kind == "string":
        return _text_hash
    bits = int(kind.removeprefix("uint"))

    def number(value: int) -> bytes:
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name} does not fit into {kind}")
        return value.to_bytes(32, "big")

    return number


@lru_cache(maxsize=1024)  # a node's paths, and a few methods
def _text_hash(text: str) -> bytes:
    return keccak256(text.encode())


def _members(what: str, value: Any, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRequest(f"{what} is a JSON object", field=what)
    for name in names:
        if name not in value:
            raise BadRequest(f"{what} lacks {name}", field=name)
    for name in value:
        if name not in names:
            raise BadRequest(f"{what} has no member of this name", field=str(name)[:64])
    return value


def _from_json(name: str, kind: str, value: Any) -> Value:
    if not isinstance(value, str):
        raise BadRequest(f"{name} is a string", field=name)
    if kind == "address":
        return _address(name, value)
    if kind == "string":
        return _text(name, value)
    if kind == "bytes32":
        try:
            return Digest.parse(value)
        except BadRequest as err:
            raise BadRequest(f"{name} is 0x and 64 lower-case hex digits", field=name) from err
    if not _NUMBER.fullmatch(value) or int(value) >= 1 << int(kind.removeprefix("uint")):
        raise BadRequest(f"{name} is a decimal string that fits into {kind}", field=name)
    return int(value)


def _text(name: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as err:
        raise BadRequest(f"{name} is valid Unicode", field=name) from err
    return value


def _address(name: str, text: str) -> Address:
    """Zero is a value here (nobody's token, no payer); who may not be zero says so himself."""
    if _ADDRESS.fullmatch(text):
        value = Address(bytes.fromhex(text[2:]))
        if text[2:] in (text[2:].lower(), text[2:].upper()) or str(value) == text:
            return value
    raise BadRequest(f"{name} is 0x and 40 hex digits, all lower, all upper or with an exact checksum", field=name)
