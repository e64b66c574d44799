"""What the devnet refuses, as JSON-RPC error objects, and how parameters are read from JSON. Pure."""

from __future__ import annotations

import re
from typing import Any

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL = -32603
SERVER_ERROR = -32000
EXECUTION_REVERTED = 3
"""Code of a revert; its return data travels in `data` (practice of the large nodes)."""

_QUANTITY = re.compile(r"0x(0|[1-9a-fA-F][0-9a-fA-F]{0,63})", re.ASCII)
_DATA = re.compile(r"0x([0-9a-fA-F]{2})*", re.ASCII)


class RpcRefused(Exception):
    """An answer with an `error` member. It never leaves the devnet's server as an exception."""

    def __init__(self, code: int, message: str, data: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data

    def to_json(self) -> dict[str, Any]:
        """The error object."""
        error: dict[str, Any] = {"code": self.code, "message": self.message}
        return error if self.data is None else {**error, "data": self.data}


def invalid(message: str) -> RpcRefused:
    """The refusal of a parameter."""
    return RpcRefused(INVALID_PARAMS, f"invalid params: {message}")


def quantity(value: Any) -> int:
    """A whole number: `0x` and hex digits without leading zeros, or a JSON integer as the control methods take."""
    if type(value) is int and value >= 0:
        return value
    if not isinstance(value, str) or not _QUANTITY.fullmatch(value):
        raise invalid(f"expected a quantity, got {str(value)[:80]!r}")
    return int(value, 16)


def data(value: Any, size: int | None = None) -> bytes:
    """Bytes: `0x` and an even number of hex digits; exactly `size` bytes where given."""
    if not isinstance(value, str) or not _DATA.fullmatch(value):
        raise invalid(f"expected 0x and whole bytes in hex, got {str(value)[:80]!r}")
    raw = bytes.fromhex(value[2:])
    if size is not None and len(raw) != size:
        raise invalid(f"expected {size} bytes, got {len(raw)}")
    return raw


def mapping(value: Any) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise invalid("expected an object")
    return value


def show(value: bytes) -> str:
    """Bytes as JSON-RPC writes them."""
    return "0x" + value.hex()
