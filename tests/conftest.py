"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.no_skips import pytest_sessionfinish, pytest_terminal_summary
from tests.vectors_root import vectors_root

__all__ = ["pytest_sessionfinish", "pytest_terminal_summary", "vectors_dir"]

# Where `make setup` puts anvil and friends; so plain `pytest` finds them too.
os.environ["PATH"] = f"{Path(__file__).parent.parent / '.venv/tools/bin'}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(scope="session")
def vectors_dir() -> Path:
    """Root of the test vectors."""
    return vectors_root()
