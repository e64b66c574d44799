"""Fixtures that every test may use."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
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


@pytest.fixture
def logs_as_before() -> Iterator[None]:
    """What a test does to the log ends with it, and with the stream that it wrote to."""
    names = ("divault", "asyncio", "opentelemetry", "uvicorn")
    before = {name: (logging.getLogger(name).handlers[:], logging.getLogger(name).propagate) for name in names}
    yield
    for name, (handlers, propagate) in before.items():
        logging.getLogger(name).handlers[:], logging.getLogger(name).propagate = handlers, propagate
