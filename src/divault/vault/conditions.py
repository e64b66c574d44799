"""Kavach's access conditions: who gets a file's key from the nodes, checked before anything is sent.

Rules:

1. The schema is kavach 0.2.1's: unknown members are refused at every level, and so is what its client would refuse.
2. Two things that its client lets pass are refused by `AccessConditions.parse`: an aggregator that is no expression
   (unbalanced brackets, `and and`, an id that no condition has), and a condition that the aggregator leaves out.
3. What the gate of a model says is written as one condition in raw token units (`gate_conditions`).

>>> parse_aggregator("([1] and ![2])", ["1", "2"])
('and', ('id', '1'), ('not', ('id', '2')))
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from divault.errors import BadRequest
from divault.values import Address

CHAINS = {
    1: "Ethereum",
    10: "Optimism",
    56: "BSC",
    97: "BSCTest",
    137: "Polygon",
    250: "Fantom",
    314: "Filecoin",
    480: "World_Chain",
    4002: "FantomTest",
    8453: "Base",
    43113: "Fuji",
    43114: "AVAX",
    84532: "Base_Testnet",
    314159: "Calibration",
    534351: "Scroll_Testnet",
}
"""Kavach's names of chains, by chain id; it documents no others that are alive."""

MAX_CONDITIONS = 100
_MAX_AGGREGATOR = 10_000  # characters; a hundred ids with words between them take a tenth
_MAX_DEPTH = 50
_TOKEN = re.compile(r"\s*(?:\[\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*\]|([()!])|(and|or)\b)", re.ASCII | re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?[0-9]{1,15}(?:\.[0-9]{1,15})?", re.ASCII)
_COMPARATORS = ("==", ">=", "<=", "!=", ">", "<")
_SIZES = (8, 16, 24, 32, 40, 48, 64, 128, 192, 256)
_BASE_TYPES = (
    "address",
    "bool",
    *(f"bytes{n}" for n in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)),
    *(f"{sign}int{n}" for sign in ("u", "") for n in _SIZES),
)
OUTPUT_TYPES = frozenset(_BASE_TYPES) | {f"{name}[]" for name in _BASE_TYPES}
"""What a Custom contract call may return: 64 names."""

Expression = tuple[Any, ...]
"""("id", text), ("not", Expression), or ("and" | "or", Expression, Expression, ...)."""


# --- one rule for one value ---------------------------------------------------------------------------------------

Check = Callable[[Any, str], None]
"""Returns when the value may stand at that place, else raises BadRequest."""


def _no(where: str, what: str) -> BadRequest:
    return BadRequest(f"access conditions: {where} {what}", field=where)


def _text(value: Any, where: str) -> None:
    if not isinstance(value, str) or not value:
        raise _no(where, "is a text that is not empty")


def _any_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise _no(where, "is a text")


def _list(value: Any, where: str) -> None:
    if not isinstance(value, list):
        raise _no(where, "is a list")


def _one_of(*allowed: str, any_case: bool = False) -> Check:
    folded = {word.lower() for word in allowed}

    def check(value: Any, where: str) -> None:
        if not isinstance(value, str) or not (value.lower() in folded if any_case else value in allowed):
            raise _no(where, f"is one of {', '.join(word or 'the empty text' for word in allowed)}")

    return check


def _at_least(least: int) -> Check:
    def check(value: Any, where: str) -> None:
        number = _number(value)
        if number is None or number < least:
            raise _no(where, f"is a number of at least {least}")

    return check


def _number(value: Any) -> float | None:
    """A JSON number, or a text that is one; both within what a double holds exactly."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**53:
        return None
    return float(value)


def _output_type(value: Any, where: str) -> None:
    if not isinstance(value, str) or value not in OUTPUT_TYPES:
        raise _no(where, "is a static solidity type or a list of one")


def _type_names(value: Any, where: str) -> None:
    _list(value, where)
    for item in value:
        _text(item, where)


def _return_test(value: Any, where: str) -> None:
    _members(value, where, {"comparator": _one_of(*_COMPARATORS), "value": _test_value}, {})


def _test_value(value: Any, where: str) -> None:
    if isinstance(value, str | list):
        if value == "":
            raise _no(where, "is not empty")
    elif isinstance(value, bool) or _number(value) is None:
        raise _no(where, "is a number, a text or a list")


def _pda(value: Any, where: str) -> None:
    _members(value, where, {"offset": _at_least(0), "selector": _any_text}, {})


def _members(value: Any, where: str, required: dict[str, Check], optional: dict[str, Check]) -> None:
    """An object with all of `required`, some of `optional` and nothing else."""
    if not isinstance(value, dict):
        raise _no(where or "the body", "is an object")
    prefix = f"{where}." if where else ""
    for name in required:
        if name not in value:
            raise _no(prefix + name, "is required")
    for name, item in value.items():
        check = required.get(name) or optional.get(name)
        if check is None:
            raise _no(f"{prefix}{str(name)[:40]}", "is not a member that is known")
        check(item, prefix + name)


# --- conditions of each family of chains --------------------------------------------------------------------------

_STANDARDS = ("ERC20", "ERC721", "ERC1155", "Custom", "")


def _evm(value: Any, where: str) -> None:
    kind = value.get("standardContractType") if isinstance(value, dict) else None
    required: dict[str, Check] = {
        "id": _at_least(1),
        "standardContractType": _one_of(*_STANDARDS, any_case=True),
        "chain": _text,
        "method": _text,
        "returnValueTest": _return_test,
    }
    optional: dict[str, Check] = {"inputArrayType": _type_names, "outputType": _output_type}
    if kind == "":
        required["method"] = _one_of("getBalance", "getBlockNumber")
        optional |= {"contractAddress": _any_text, "parameters": _list}
    else:
        required |= {"contractAddress": _text, "parameters": _list}
    if isinstance(kind, str) and kind.lower() == "custom":
        required |= {"inputArrayType": _type_names, "outputType": _output_type}
    _members(value, where, required, optional)


def _solana(value: Any, where: str) -> None:
    kind = value.get("standardContractType") if isinstance(value, dict) else None
    methods = ("getBalance", "getLastBlockTime", "getBlockHeight") if kind == "" else ("getTokenAccountsByOwner",)
    required: dict[str, Check] = {
        "id": _at_least(1),
        "standardContractType": _one_of("spl-token", ""),
        "chain": _one_of("DEVNET", "TESTNET", "MAINNET"),
        "method": _one_of(*methods),
        "pdaInterface": _pda,
        "returnValueTest": _return_test,
    }
    optional: dict[str, Check] = {"contractAddress": _any_text, "parameters": _list}
    if kind != "":
        required |= {"contractAddress": _text, "parameters": _list}
        optional = {}
    _members(value, where, required, optional)


def _coreum(value: Any, where: str) -> None:
    required: dict[str, Check] = {
        "id": _at_least(1),
        "chain": _one_of("Coreum_Devnet", "Coreum_Testnet", "Coreum_Mainnet"),
        "method": _text,
        "returnValueTest": _return_test,
    }
    optional: dict[str, Check] = {
        "standardContractType": _any_text,
        "contractAddress": _any_text,
        "parameters": _list,
        "denom": _text,
        "classid": _text,
    }
    _members(value, where, required, optional)


def _radix(value: Any, where: str) -> None:
    required: dict[str, Check] = {
        "id": _at_least(1),
        "chain": _one_of("Radix_Mainnet"),
        "method": _text,
        "resourceAddress": _text,
        "returnValueTest": _return_test,
    }
    _members(value, where, required, {"standardContractType": _any_text, "parameters": _list})


_FAMILIES: dict[str, Check] = {"EVM": _evm, "SOLANA": _solana, "COREUM": _coreum, "RADIX": _radix}


def _chain_type(value: Any, where: str) -> None:
    if value is not None and value != "":
        _one_of(*_FAMILIES, any_case=True)(value, where)


def _decryption_type(value: Any, where: str) -> None:
    if value is not None and value != "":
        _one_of("ADDRESS", "ACCESS_CONDITIONS")(value, where)


def _shards(value: Any, where: str) -> None:
    if not isinstance(value, list) or len(value) != 5:
        raise _no(where, "has exactly five shards")


_TOP_REQUIRED: dict[str, Check] = {"address": _text, "cid": _text, "conditions": _list}
_TOP_OPTIONAL: dict[str, Check] = {
    "aggregator": _any_text,
    "chainType": _chain_type,
    "decryptionType": _decryption_type,
    "keyShards": _shards,
}


def check_schema(body: Any) -> None:
    """Return only if kavach 0.2.1 would take the body of an access-conditions call. Raises BadRequest naming the place.

    Its rules are weaker than `AccessConditions.parse`: any aggregator with an `and` or `or` in it passes.
    """
    _members(body, "", _TOP_REQUIRED, _TOP_OPTIONAL)
    family = _FAMILIES[(body.get("chainType") or "EVM").upper()]
    conditions = body["conditions"]
    if len(conditions) > MAX_CONDITIONS:
        raise _no("conditions", f"has at most {MAX_CONDITIONS} entries here")
    seen: set[float | None] = set()
    for position, condition in enumerate(conditions):
        where = f"conditions[{position}]"
        family(condition, where)
        number = _number(condition["id"])
        if number in seen:
            raise _no(where, "repeats an id")
        seen.add(number)
    if len(conditions) > 1:
        aggregator = body.get("aggregator")
        if not aggregator or not re.search(r" (and|or) ", aggregator, re.IGNORECASE):
            raise _no("aggregator", "joins several conditions by and, or")


# --- the aggregator -----------------------------------------------------------------------------------------------


def parse_aggregator(text: str, ids: Collection[str]) -> Expression:
    """The expression that joins conditions: `[id]`, `and`, `or`, `!`, brackets; `and` binds tighter than `or`.

    Raises BadRequest for anything else, an id that is not in `ids`, and one of `ids` that it does not mention.
    """
    if len(text) > _MAX_AGGREGATOR:
        raise _no("aggregator", f"has at most {_MAX_AGGREGATOR} characters here")
    tokens = _tokens(text)
    expression, at = _joined(tokens, 0, 0)
    if at != len(tokens):
        raise _no("aggregator", f"has no place for {tokens[at]}")
    named = {token[1:-1] for token in tokens if token.startswith("[")}
    for unknown in sorted(named - set(ids)):
        raise _no("aggregator", f"names [{unknown}], and no condition has that id")
    for unused in sorted(set(ids) - named):
        raise _no("aggregator", f"leaves out [{unused}], which would then mean nothing")
    return expression


def _tokens(text: str) -> list[str]:
    tokens, at, end = [], 0, len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None:
            raise _no("aggregator", f"is not understood from character {at + 1} on")
        identifier, bracket, word = match.groups()
        tokens.append(f"[{identifier}]" if identifier else bracket or word.lower())
        at = match.end()
    return tokens


def _joined(tokens: Sequence[str], at: int, depth: int, word: str = "or") -> tuple[Expression, int]:
    """Terms joined by one word; those of `or` are joined by `and`."""
    parts: list[Expression] = []
    while True:
        part, at = _joined(tokens, at, depth, "and") if word == "or" else _term(tokens, at, depth)
        parts.append(part)
        if at == len(tokens) or tokens[at] != word:
            return (parts[0] if len(parts) == 1 else (word, *parts)), at
        at += 1


def _term(tokens: Sequence[str], at: int, depth: int) -> tuple[Expression, int]:
    if depth > _MAX_DEPTH:
        raise _no("aggregator", f"has brackets more than {_MAX_DEPTH} deep")
    head = tokens[at] if at < len(tokens) else "the end"
    if head.startswith("["):
        return ("id", head[1:-1]), at + 1
    if head == "!":
        inner, at = _term(tokens, at + 1, depth + 1)
        return ("not", inner), at
    if head != "(":
        raise _no("aggregator", f"needs a condition where {head} stands")
    inner, at = _joined(tokens, at + 1, depth + 1)
    if at == len(tokens) or tokens[at] != ")":
        raise _no("aggregator", "has a bracket that is never closed")
    return inner, at + 1


# --- what divault sends -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AccessConditions:
    """Conditions of one file that were checked by this module's rules."""

    conditions: tuple[dict[str, Any], ...]
    aggregator: str
    chain_type: str

    @classmethod
    def parse(cls, body: Any) -> Self:
        """From the body of an access-conditions call (address, cid, conditions, ...). Raises BadRequest."""
        check_schema(body)
        conditions = tuple(body["conditions"])
        ids = [_id_text(condition["id"]) for condition in conditions]
        aggregator = body.get("aggregator") or "".join(f"([{name}])" for name in ids[:1])
        if conditions:
            parse_aggregator(aggregator, ids)
        return cls(conditions, aggregator if conditions else "", (body.get("chainType") or "EVM").upper())

    def met(self, results: Sequence[bool]) -> bool:
        """Whether the whole holds when each condition, in order, does or does not; without conditions it never does.

        Raises ValueError for another number of results than there are conditions.
        """
        ids = [_id_text(condition["id"]) for condition in self.conditions]
        values = dict(zip(ids, results, strict=True))
        return bool(ids) and _holds(parse_aggregator(self.aggregator, ids), values)


def gate_conditions(token: Address, minimum: int, chain_id: int) -> AccessConditions:
    """The token gate of a model as Kavach's nodes check it: `balanceOf` at least the minimum, in raw units.

    Raises BadRequest for no minimum (an open gate is nothing that they could check) and a chain that they do not know.
    """
    if minimum < 1 or token == Address.ZERO:
        raise BadRequest("an open gate is no condition that Kavach could check: share the file instead", field="gate")
    if chain_id not in CHAINS:
        raise BadRequest(f"Kavach checks no balances on chain {chain_id}: share the file instead", field="chain_id")
    condition = {
        "id": 1,
        "chain": CHAINS[chain_id],
        "method": "balanceOf",
        "standardContractType": "ERC20",
        "contractAddress": str(token),
        "returnValueTest": {"comparator": ">=", "value": str(minimum)},
        "parameters": [":userAddress"],
    }
    return AccessConditions((condition,), "([1])", "EVM")


def _holds(expression: Expression, values: Mapping[str, bool]) -> bool:
    word, *parts = expression
    if word == "id":
        return values[parts[0]]
    if word == "not":
        return not _holds(parts[0], values)
    return (all if word == "and" else any)(_holds(part, values) for part in parts)


def _id_text(value: Any) -> str:
    number = _number(value)
    return str(int(number)) if number is not None and number.is_integer() else str(number)
