"""`Service.infer` with one step left out does not type-check, whichever step it is.

Each mutant hands on the proof that was there before the step, as somebody would who forgot or removed it, or deletes
the statement. mypy has to refuse every one of them, and accept the original.
"""

from __future__ import annotations

import ast
import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SERVICE = ROOT / "src" / "divault" / "service.py"
FUNCTIONS = ("infer", "_charged", "_open", "_load")


def test_every_step_is_needed(tmp_path: Path) -> None:
    tree = ast.parse(SERVICE.read_text(encoding="utf-8"))
    versions = {"original": tree, **dict(_mutants(tree))}
    for name, version in versions.items():
        (tmp_path / f"{name}.py").write_text(ast.unparse(version), encoding="utf-8")

    accepted = set(versions) - _refused_by_mypy(tmp_path)

    steps = {name.split("_")[2] for name in versions if name != "original"}
    assert steps >= {"authenticate", "answered", "check", "hold", "open", "run", "charge", "arriving"}
    assert accepted == {"original"}


def _refused_by_mypy(folder: Path) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *sorted(folder.glob("*.py"))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return {Path(line.partition(":")[0]).stem for line in done.stdout.splitlines() if ": error: " in line}


def _mutants(tree: ast.Module) -> Iterator[tuple[str, ast.Module]]:
    for function in FUNCTIONS:
        count = len(list(_steps(_function(tree, function))))
        for index in range(count):
            for kind in ("skip", "delete"):
                mutant = copy.deepcopy(tree)
                step = list(_steps(_function(mutant, function)))[index]
                name = _step_name(step)
                _apply(kind, step, _function(mutant, function))
                yield f"{function.strip('_')}{index}_{kind}_{name}", ast.fix_missing_locations(mutant)


def _function(tree: ast.Module, name: str) -> ast.AsyncFunctionDef:
    return next(n for n in ast.walk(tree) if isinstance(n, ast.AsyncFunctionDef) and n.name == name)


def _steps(function: ast.AsyncFunctionDef) -> Iterator[ast.stmt]:
    """Statements that bind or return what an awaited step gives."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.Return) and isinstance(node.value, ast.Await):
            yield node
        if isinstance(node, ast.AsyncWith) and node.items[-1].optional_vars is not None:
            yield node


def _call(step: ast.stmt) -> ast.Call:
    value = step.items[-1].context_expr if isinstance(step, ast.AsyncWith) else step.value  # type: ignore[attr-defined]
    call = value.value if isinstance(value, ast.Await) else value
    assert isinstance(call, ast.Call)
    return call


def _step_name(step: ast.stmt) -> str:
    function = _call(step).func
    return function.attr.lstrip("_") if isinstance(function, ast.Attribute) else "call"


def _apply(kind: str, step: ast.stmt, function: ast.AsyncFunctionDef) -> None:
    evidence = _call(step).args[0] if not isinstance(step, ast.Return) else _call(step).args[-1]
    if isinstance(step, ast.AsyncWith):
        bind = ast.Assign([step.items[-1].optional_vars], evidence)  # type: ignore[list-item]
        _replace(function, step, [*([bind] if kind == "skip" else []), *step.body])
    elif kind == "skip":
        step.value = evidence  # type: ignore[attr-defined]
    else:
        _replace(function, step, [ast.Pass()])


def _replace(function: ast.AsyncFunctionDef, old: ast.stmt, new: list[ast.stmt]) -> None:
    for node in ast.walk(function):
        body = getattr(node, "body", None)
        if isinstance(body, list) and old in body:
            at = body.index(old)
            body[at : at + 1] = new
            return
    raise AssertionError("the step is not in the function")
