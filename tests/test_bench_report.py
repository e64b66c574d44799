"""Benchmark rows are checked, collected from processes of their own, and shown; a broken benchmark fails the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as bench
from bench.report import FIELDS, check_row, machine, markdown, save, table, verdict

ROW: dict[str, Any] = {
    "name": "fetch a | b", "figure": 0.91234, "unit": "GiB/s", "yardstick": "sha256 alone", "ratio": 0.6,
    "target": ">= 0.85 GiB/s", "holds": True,
}  # fmt: skip


def _row(**changes: Any) -> dict[str, Any]:
    return {**ROW, **changes}


def test_row_with_every_field_is_taken() -> None:
    assert check_row(_row()) == ROW
    assert check_row(_row(ratio=None, target=None, holds=None, yardstick=None))


@pytest.mark.parametrize(
    "changes",
    [
        {"figure": "fast"}, {"figure": float("nan")}, {"figure": True}, {"ratio": "half"}, {"holds": "yes"},
        {"unit": None}, {"name": 3}, {"surplus": 1},
    ],
)  # fmt: skip
def test_row_that_says_nothing_clear_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="row"):
        check_row(_row(**changes))


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "machine"])
def test_row_without_a_field_is_refused(name: str) -> None:
    row = _row()
    del row[name]

    with pytest.raises(ValueError, match=name):
        check_row(row)


def test_missed_targets_are_said_everywhere() -> None:
    rows = [_row(machine=machine()), _row(name="late", holds=False, machine=machine())]

    assert "MISSED" in table(rows)
    assert verdict(rows) == "1 of 2 targets met; missed: late"
    assert "**no**" in markdown(rows)
    assert "fetch a \\| b" in markdown(rows)


def test_words_pick_benchmarks_by_name(tmp_path: Path) -> None:
    for name in ("bench_fetch.py", "bench_open.py", "report.py"):
        (tmp_path / name).touch()

    assert bench.names([], tmp_path) == ["bench_fetch", "bench_open"]
    assert bench.names(["fet", "xyz"], tmp_path) == ["bench_fetch"]
    assert bench.names(["bench"], tmp_path) == []


def test_results_are_written_as_a_list_with_the_machine(tmp_path: Path) -> None:
    save([_row(machine=machine())], tmp_path / "results/latest.json")
    (row,) = json.loads((tmp_path / "results/latest.json").read_text())

    assert set(FIELDS) == set(row)
    assert {"cpu", "cores", "python", "kernel"} <= set(row["machine"])
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["latest.json"]


def _bench_folder(tmp_path: Path, **modules: str) -> Path:
    folder = tmp_path / "bench"
    folder.mkdir()
    for name in ("__init__.py", "__main__.py", "report.py"):
        (folder / name).write_text((Path(bench.__file__).parent / name).read_text())
    for name, body in modules.items():
        (folder / f"bench_{name}.py").write_text(body)
    return folder


def _run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *words]
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder.parent, env=environ, capture_output=True, text=True, check=False)


def test_each_benchmark_runs_alone_and_a_missed_target_is_no_failure(tmp_path: Path) -> None:
    alone = "import sys\ndef run():\n    assert 'bench.bench_good' not in sys.modules\n"
    late = f"{alone}    return [{_row(holds=False)!r}]\n"
    folder = _bench_folder(tmp_path, good=f"def run():\n    return [{ROW!r}]\n", late=late)
    done = _run(folder)

    assert done.returncode == 0, done.stderr
    assert len(json.loads((folder / "results/latest.json").read_text())) == 2
    assert "1 of 2 targets met" in done.stdout


def test_broken_benchmark_fails_the_run_and_keeps_the_others(tmp_path: Path) -> None:
    folder = _bench_folder(tmp_path, bad="def run():\n    raise OSError\n", good=f"def run():\n    return [{ROW!r}]\n")
    done = _run(folder)

    assert done.returncode == 1
    assert "BROKEN bench_bad" in done.stderr
    assert len(json.loads((folder / "results/latest.json").read_text())) == 1
    assert _run(folder, "nothing-like-this").returncode == 2
