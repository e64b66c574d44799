"""Run benchmarks: `python -m bench [word ...] [--write-docs]`.

Every `bench_<name>.py` whose name contains one of the words (all, without words) runs in a process of its own, so that
the memory and the caches of one don't show in the next. All rows go to `bench/results/latest.json`; with `--write-docs`
also to `docs/reference/benchmarks.md`. A missed target is said and is no failure; a benchmark that breaks is one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.report import Row, check_row, machine, markdown, save, table, verdict, warn

HERE = Path(__file__).parent
LATEST = HERE / "results/latest.json"
PAGE = HERE.parent / "docs/reference/benchmarks.md"
_ONE = """
import importlib, json, pathlib, sys
rows = importlib.import_module("bench." + sys.argv[1]).run()
pathlib.Path(sys.argv[2]).write_text(json.dumps(list(rows)))
"""


def names(words: list[str], folder: Path = HERE) -> list[str]:
    """Modules whose name contains one of the words, sorted; all of them when there are no words."""
    found = sorted(path.stem for path in folder.glob("bench_*.py"))
    return [name for name in found if not words or any(word in name.removeprefix("bench_") for word in words)]


def run_one(name: str) -> list[Row]:
    """Rows of one module, run in a fresh interpreter. Raises RuntimeError or ValueError when it breaks."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "rows.json"
        done = subprocess.run([sys.executable, "-c", _ONE, name, str(answer)], cwd=HERE.parent, check=False)
        if done.returncode != 0 or not answer.is_file():
            raise RuntimeError(f"{name} ended with status {done.returncode}")
        rows: list[Row] = json.loads(answer.read_text())
    return [check_row(row) for row in rows]


def main(argv: list[str] | None = None) -> int:
    """Run, print and write; the exit status says whether every benchmark ran, not whether targets hold."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("words", nargs="*", help="run only benchmarks whose names contain one of these words")
    parser.add_argument("--write-docs", action="store_true", help="write docs/reference/benchmarks.md as well")
    options = parser.parse_args(argv)
    chosen = names(options.words)
    if not chosen:
        warn(f"no benchmark is called like {options.words}; there are: {', '.join(names([]))}")
        return 2
    box, rows, broken = machine(), [], []
    for name in chosen:
        warn(f"{name} ...")
        try:
            rows += [{**row, "machine": box} for row in run_one(name)]
        except (RuntimeError, ValueError) as err:
            broken.append(f"{name}: {err}")
    save(rows, LATEST)
    if options.write_docs:
        PAGE.write_text(markdown(rows), encoding="utf-8")
    print(table(rows), "", verdict(rows), sep="\n")
    for line in broken:
        warn(f"BROKEN {line}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
