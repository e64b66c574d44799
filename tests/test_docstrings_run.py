"""Every example in a docstring does what it shows."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import divault

# `models` is for workers: its libraries are not loaded into a process of the gateway, nor into this one.
MODULES = sorted(
    found.name
    for found in pkgutil.walk_packages(divault.__path__, "divault.")
    if not found.name.startswith("divault.models") and not found.name.endswith(("__main__", "_child", ".child"))
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))

    assert results.failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    assert sum(len(test.examples) for test in finder.find(importlib.import_module("divault.values"))) >= 2
