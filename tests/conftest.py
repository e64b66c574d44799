"""Fixtures that every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vectors_root import vectors_root


@pytest.fixture(scope="session")
def vectors_dir() -> Path:
    """Root of the test vectors."""
    return vectors_root()
