"""Each proof type of the pipeline is constructed in exactly one module: the one that did the work it proves."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "divault"
PROOFS = (
    "SignedCall",
    "Principal",
    "Grant",
    "Hold",
    "VerifiedBlob",
    "VerifiedFolder",
    "OpenedModel",
    "Output",
    "Receipt",
)
PARTS = {
    "SignedCall": "api",
    "Principal": "auth",
    "Grant": "chain",
    "Hold": "payments",
    "VerifiedBlob": "storage",
    "VerifiedFolder": "storage",
    "OpenedModel": "workers",
    "Output": "workers",
    "Receipt": "receipts",
}


def constructions(tree: ast.AST) -> set[str]:
    """Proof types of `divault.values` that a module calls, under their own name or another, or through the module."""
    local = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "divault.values":
            local |= {alias.asname or alias.name: alias.name for alias in node.names}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
                found.add(function.attr if function.value.id == "values" else "")
            found.add(local.get(getattr(function, "id", ""), ""))
    return found


def makers() -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for path in SOURCE.rglob("*.py"):
        for name in constructions(ast.parse(path.read_text(encoding="utf-8"))) & set(PROOFS):
            found[name].add(path.relative_to(SOURCE).as_posix())
    return found


@pytest.mark.parametrize("proof", PROOFS)
def test_one_module_makes_it(proof: str) -> None:
    made_in = makers()[proof]

    assert len(made_in) == 1, f"{proof} is made in {sorted(made_in)}"
    assert next(iter(made_in)).split("/")[0].removesuffix(".py") == PARTS[proof]


def test_a_second_maker_would_be_seen() -> None:
    assert "Grant" in constructions(ast.parse("from divault import values\nx = values.Grant(a, b)"))
    assert "Hold" in constructions(ast.parse("from divault.values import Hold as H\ndef f():\n    return H(1)"))
    assert "Receipt" not in constructions(ast.parse("from elsewhere import Receipt\nReceipt()"))
