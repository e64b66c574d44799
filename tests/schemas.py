"""Whether a value is what a JSON Schema says, in the words that descriptions of models use; others are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,), "integer": (int,),
    "number": (int, float), "null": (type(None),),
}  # fmt: skip
_WORDS = {
    "type", "title", "const", "enum", "minimum", "maximum", "anyOf",
    "properties", "required", "items", "prefixItems", "minItems", "maxItems", "minLength", "maxLength",
}  # fmt: skip


def mismatch(value: Any, schema: Mapping[str, Any], where: str = "$") -> str:
    """The first place where they differ; empty where they don't. Raises ValueError for a word it doesn't know."""
    if odd := schema.keys() - _WORDS:
        raise ValueError(f"{where}: {sorted(odd)} are words that nobody checks")
    kinds = schema.get("type", list(_TYPES))
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if not any(type(value) in _TYPES[kind] for kind in kinds):
        return f"{where} is no {kinds}"
    if value not in schema.get("enum", [schema.get("const", value)]):
        return f"{where} is none of those that may be"
    if type(value) in (int, float) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        return f"{where} is too small or too large"
    if isinstance(value, str) and not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
        return f"{where} is too short or too long"
    forms = schema.get("anyOf", [])
    if forms and all(mismatch(value, form, where) for form in forms):
        return f"{where} is in no form: {[mismatch(value, form, where) for form in forms]}"
    return next(filter(None, _inside(value, schema, where)), "")


def _inside(value: Any, schema: Mapping[str, Any], where: str) -> list[str]:
    if isinstance(value, dict):
        missing = [f"{where} lacks {name}" for name in schema.get("required", []) if name not in value]
        inner = {name: part for name, part in schema.get("properties", {}).items() if name in value}
        return [*missing, *(mismatch(value[name], part, f"{where}.{name}") for name, part in inner.items())]
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            return [f"{where} has {len(value)} items"]
        first = schema.get("prefixItems", [])
        # As nodes mean it: `items` says what all have in common, `prefixItems` more of each.
        each = [[schema.get("items", {}), *first[place : place + 1]] for place in range(len(value))]
        return [mismatch(one, part, f"{where}[{place}]") for place, one in enumerate(value) for part in each[place]]
    return []
