"""Whether a value is what a JSON Schema says: the words that descriptions of models use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,), "integer": (int,), "number": (int, float)
}  # fmt: skip


def mismatch(value: Any, schema: Mapping[str, Any], where: str = "$") -> str:
    """The first place where they differ; empty where they don't."""
    kind = schema.get("type")
    if kind is not None and type(value) not in _TYPES[kind]:
        return f"{where} is no {kind}"
    if "const" in schema and value != schema["const"]:
        return f"{where} is not {schema['const']}"
    if isinstance(value, dict):
        missing = [name for name in schema.get("required", []) if name not in value]
        inner = {name: part for name, part in schema.get("properties", {}).items() if name in value}
        found = [f"{where} lacks {name}" for name in missing]
        found += [mismatch(value[name], part, f"{where}.{name}") for name, part in inner.items()]
        return next(filter(None, found), "")
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            return f"{where} has {len(value)} items"
        found = [mismatch(one, schema.get("items", {}), f"{where}[{place}]") for place, one in enumerate(value)]
        return next(filter(None, found), "")
    return ""
