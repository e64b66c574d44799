"""A skipped test fails the run in CI, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONFTEST = "from tests.no_skips import pytest_sessionfinish, pytest_terminal_summary\n"


def _run(folder: Path, body: str, *args: str, ci: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(body)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "CI": ci}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args, str(folder)]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=60, check=False)


SKIP = "import pytest\ndef test_a():\n    pytest.skip('no tool')\ndef test_b():\n    pass\n"
PASS = "def test_a():\n    pass\n"


@pytest.mark.parametrize("args", [(), ("-n", "1")])
def test_skip_fails_in_ci_and_names_the_test(tmp_path: Path, args: tuple[str, ...]) -> None:
    done = _run(tmp_path, SKIP, *args, ci="1")

    assert done.returncode == 1
    assert "1 passed, 1 skipped" in done.stdout
    assert "CI takes for a failure: test_it.py::test_a" in done.stdout


def test_skip_is_fine_elsewhere(tmp_path: Path) -> None:
    assert _run(tmp_path, SKIP, ci="").returncode == 0


def test_ci_passes_when_nothing_is_skipped(tmp_path: Path) -> None:
    assert _run(tmp_path, PASS, ci="1").returncode == 0
