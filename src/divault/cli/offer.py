"""What a publisher is told before he is asked, and what he passes on to his consumers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from divault.errors import BadRequest
from divault.publishing import Cost, Listing, Recognised, SealedTo
from divault.values import Address, ModelId, Usdc

_WEI = 10**18
_MICRO = 10**12
_LONGEST_LINE = 160
_DEAR = Usdc.parse("10000")
"""Above it a price is nearly always a number in another unit."""


def model_id(given: str | None, path: Path) -> ModelId:
    """The id that was given, or one made of the file's name. Raises BadRequest."""
    if given is not None:
        return ModelId.parse(given)
    name = path.absolute().name if path.is_dir() else path.stem
    made = re.sub(r"[^A-Za-z0-9._:-]+", "-", name, flags=re.ASCII).strip("-._:")[:128]
    if not made:
        raise BadRequest(f"no model id can be made of the name {path.name}: give one with --id", field="id")
    return ModelId.parse(made)


def price(text: str) -> Usdc:
    """A price in USDC. Raises BadRequest."""
    try:
        return Usdc.parse(text)
    except ValueError as err:
        raise BadRequest(f"{err}", field="price") from err


def gate(text: str) -> tuple[Address | None, int]:
    """Token and minimum; no token for an open gate. Raises BadRequest, SignatureInvalid (not an address)."""
    if text == "open":
        return None, 0
    token, _, minimum = text.partition(":")
    if not re.fullmatch(r"[1-9][0-9]{0,77}", minimum, re.ASCII) or int(minimum) >= 2**256:
        raise BadRequest("a gate is 0xTOKEN:MINIMUM with at least 1 raw unit, or open", field="gate")
    return Address.parse(token), int(minimum)


def recognised_lines(found: Recognised) -> list[str]:
    """What the model is, what it takes, and what to think of."""
    about = found.description
    if about is None:
        return [
            f"recognised: {found.seen}",
            "warning: it was not run here; only nodes that set DIVAULT_ALLOW_CODE_MODELS=1 load it",
        ]
    return [
        f"recognised: {about.format}, {about.task}; loaded and run as a node does",
        f"takes: {schema_words(about.input_schema)}",
        f"for example: {_short(json.dumps(dict(about.example), ensure_ascii=False))}",
        *(f"warning: {warning}" for warning in found.warnings),
    ]


def offer_lines(listing: Listing, nodes: Sequence[SealedTo], vault: Address) -> list[str]:
    """To whom it is offered, at what price, and by whom it is opened."""
    who = (
        "every wallet" if listing.token is None else f"wallets with {listing.min_balance} raw units of {listing.token}"
    )
    lines = [f"{listing.model} at {listing.price} USDC per call, for {who}, in the vault {vault}"]
    if listing.price > _DEAR:
        lines.append(f"warning: {listing.price} USDC for one call? prices are in USDC, not in its atomic units or wei")
    return [*lines, *(f"opened by: {node.url} ({node.address})" for node in nodes)]


def cost_line(cost: Cost, sealed_bytes: int, store: str, nodes: int) -> str:
    """What it costs, at most."""
    return (
        f"cost: {registration_words(cost)}; {sealed_bytes} sealed bytes for {nodes} node{'s' * (nodes != 1)} go to "
        f"{store_words(store)}"
    )


def registration_words(cost: Cost) -> str:
    """What one registration costs, at most."""
    gwei = f"{cost.gas_price / 10**9:.3f}".rstrip("0").rstrip(".")
    whole = -(-cost.wei // _MICRO) * _MICRO  # rounded up: it is a bound
    return f"up to {eth(whole)} ETH for the registration ({cost.gas} gas at {gwei} gwei)"


def store_words(store: str) -> str:
    """The store, and what it counts against."""
    return "Lighthouse (counts against your plan there)" if store == "lighthouse" else store


def eth(wei: int) -> str:
    """An amount of native coin, exactly."""
    return f"{wei // _WEI}.{wei % _WEI:018d}".rstrip("0").rstrip(".")


def consumer_lines(listing: Listing, node: SealedTo, found: Recognised | None) -> str:
    """Three lines of Python with which a consumer calls the model."""
    about = None if found is None else found.description
    example = {"your": "input"} if about is None else dict(about.example)
    return (
        "import os, divault\n"
        f"with divault.Client({node.url!r}, os.environ['WALLET_KEY'], node='{node.address}') as client:\n"
        f"    print(client.run({listing.model.text!r}, {example!r}, max_price='{listing.price}').output)"
    )


def schema_words(schema: Mapping[str, Any]) -> str:
    """A JSON Schema of an input in a line of words."""
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):
        return _short(json.dumps(schema))
    told = schema.get("required")
    required = told if isinstance(told, list) else []
    parts = [f"{name}{'' if name in required else ' (optional)'}: {_kind(of)}" for name, of in properties.items()]
    return _printable("; ".join(parts)) or "an object"


_ONE = {"string": "a text", "integer": "a whole number", "number": "a number", "boolean": "true or false"}
_MANY = {"a text": "texts", "a whole number": "whole numbers", "a number": "numbers"}


def _kind(schema: Any) -> str:
    if not isinstance(schema, Mapping):
        return "anything"
    choices = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(choices, list):
        return ", or ".join(dict.fromkeys(_kind(choice) for choice in choices))
    if "const" in schema or "enum" in schema:
        return _short(json.dumps(schema.get("enum", schema.get("const"))))
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"a list of {_count(schema)}{_many(schema.get('items', {}))}"
    names = [str(name) for name in (kind if isinstance(kind, list) else [kind])]
    return " or ".join(_ONE.get(name, name) for name in names)


def _many(schema: Any) -> str:
    kind = _kind(schema)
    if kind.startswith("a list of "):
        return f"lists, each {kind.removeprefix('a list ')}"
    return _MANY.get(kind, kind)


def _count(schema: Mapping[str, Any]) -> str:
    least, most = schema.get("minItems"), schema.get("maxItems")
    if least is not None and least == most:
        return f"{least} "
    if most is None:
        return f"{least} or more " if least else ""
    return f"{least or 0} to {most} "


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def _short(text: str) -> str:
    text = _printable(text)
    return text if len(text) <= _LONGEST_LINE else text[: _LONGEST_LINE - 4] + " ..."
