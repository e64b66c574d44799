"""Each proof type of the pipeline is constructed in exactly one module: the one that did the work it proves."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "divault"
PROOFS = ("SignedCall", "Principal", "Grant", "Hold", "VerifiedBlob", "OpenedModel", "Output", "Receipt")
PARTS = {
    "SignedCall": "api",
    "Principal": "auth",
    "Grant": "chain",
    "Hold": "payments",
    "VerifiedBlob": "storage",
    "OpenedModel": "workers",
    "Output": "workers",
    "Receipt": "receipts",
}


def constructions(tree: ast.AST) -> set[str]:
    """Names that are called, plainly or through a module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            found.add(name)
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
    assert "Grant" in constructions(ast.parse("x = values.Grant(a, b)"))
    assert "Hold" in constructions(ast.parse("def f():\n    return Hold(1)"))
