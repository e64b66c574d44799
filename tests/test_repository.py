"""The repository around the code: documents exist, lead somewhere, and say what the code does."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest

from divault.api.metrics_route import add_metrics
from divault.api.routes import routes
from divault.errors import error_classes
from divault.metrics import Metrics
from divault.settings import Settings

ROOT = Path(__file__).parent.parent
DOCUMENTS = (
    "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", ".env.example", "Dockerfile", "docker-compose.yml",
    "docs/tutorial/sell-a-model.md", "docs/how-to/add-a-format.md", "docs/how-to/run-a-node.md",
    "docs/how-to/rotate-keys.md", "docs/reference/api.md", "docs/reference/cli.md", "docs/reference/settings.md",
    "docs/reference/errors.md", "docs/reference/signatures.md", "docs/reference/vault-format.md",
    "docs/reference/ipfs.md", "docs/reference/chain.md", "docs/reference/contracts.md", "docs/reference/payments.md",
    "docs/reference/receipts.md", "docs/reference/benchmarks.md", "docs/explanation/threat-model.md",
    "docs/explanation/trust-model.md", "docs/explanation/payments.md", "docs/explanation/why-no-pickle.md",
)  # fmt: skip
# Written in two parts so that this file does not hold what it forbids.
FORBIDDEN = [
    "".join(parts)
    for parts in (
        ("pypi", ".org"), ("pythonhosted", ".org"), ("npmjs", ".org"), ("npmjs", ".com"), ("deb.debian", ".org"),
        ("index", "-url"), ("/ro", "ot/"), ("/wo", "rk/"), ("/ho", "me/"), ("/tmp/bash", "_"),
    )
]  # fmt: skip
LINK = re.compile(r"\[[^\]]+\]\((?P<target>[^)\s]+)\)")
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_NESTING = 700, 70, 4


def tracked() -> list[Path]:
    """The files of the repository: what git tracks, or everything below when this is no checkout."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    names = done.stdout.decode().split("\0") if done.returncode == 0 else _walk()
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def _walk() -> Iterator[str]:
    left_out = {".venv", "node_modules", "__pycache__", ".git"}
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in left_out and not name.endswith("_cache")]
        yield from (str(Path(folder, name).relative_to(ROOT)) for name in files)


def text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def markdown() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".md"]


def sources() -> list[Path]:
    return [
        path
        for path in tracked()
        if path.suffix == ".py" and path.parts[len(ROOT.parts)] in ("src", "tests", "bench", "tools")
    ]


def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_reference", ROOT / "tools/write_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- documents ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCUMENTS)
def test_document_is_there_and_says_something(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8")) > 400


def test_every_link_leads_somewhere() -> None:
    broken = [f"{page.relative_to(ROOT)}: {target}" for page in markdown() for target in _broken_links(page)]

    assert broken == []


def _broken_links(page: Path) -> Iterator[str]:
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for found in LINK.finditer(prose):
        target = found["target"]
        name, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            yield target


def _anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_generated_pages_are_fresh() -> None:
    """`make docs` writes them again."""
    stale = [name for name, page in writer().PAGES.items() if (ROOT / name).read_text(encoding="utf-8") != page()]

    assert stale == []


def test_every_setting_is_in_the_example_and_nothing_else() -> None:
    names = re.findall(r"^(?:# )?([A-Z][A-Z0-9_]+)=", (ROOT / ".env.example").read_text(), flags=re.MULTILINE)

    assert sorted(name.upper() for name in Settings.model_fields) == sorted(names)


def test_the_example_is_a_valid_env_file(tmp_path: Path) -> None:
    example = tmp_path / ".env"
    example.write_text((ROOT / ".env.example").read_text())
    uncommented = re.sub(r"^# ([A-Z][A-Z0-9_]+=)", r"\1", example.read_text(), flags=re.MULTILINE)

    assert Settings.load({}, env_file=None) == Settings.load({}, env_file=example)
    example.write_text(uncommented)
    assert Settings.load({}, env_file=None) == Settings.load({}, env_file=example)


def test_every_code_is_in_the_error_table() -> None:
    page = (ROOT / "docs/reference/errors.md").read_text()

    assert [cls.code for cls in error_classes() if f"`{cls.code}`" not in page] == []


def test_every_reason_that_the_code_gives_is_explained() -> None:
    page = (ROOT / "docs/reference/errors.md").read_text()
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "src/divault").rglob("*.py")]
    words = {word for text in texts for word in re.findall(r"\breason=\"([a-z_]+)\"", text)}

    assert [word for word in sorted(words - {"unknown"}) if f"`{word}`" not in page] == []


def test_every_route_is_documented_and_no_other() -> None:
    served = {f"{method} {route.path}" for route in _router().routes for method in getattr(route, "methods", ())}
    page = (ROOT / "docs/reference/api.md").read_text()

    assert served == set(re.findall(r"^## `([A-Z]+ /\S+)`$", page, flags=re.MULTILINE))


def _router() -> Any:
    router = routes(cast("Any", None))
    add_metrics(router, Metrics(), "on")
    return router


def test_unreleased_changes_stand_in_the_changelog() -> None:
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


# --- what must not be there ---------------------------------------------------------------------------------------


def test_no_registry_and_no_place_of_one_machine_is_named() -> None:
    named = []
    for path in tracked():
        text = text_of(path) or ""
        named += [f"{path.relative_to(ROOT)}: {word}" for word in FORBIDDEN if word in text and _counts(path, word)]

    assert named == []


def _counts(path: Path, word: str) -> bool:
    """The Makefile tells the locking tool to leave the index's address out, by an option of that name."""
    return not (path.name == "Makefile" and word.endswith("-url"))


def test_no_key_and_no_env_file_is_tracked() -> None:
    names = [path.name for path in tracked()]

    assert not [name for name in names if name == ".env" or name.endswith((".key", ".pem", ".sqlite", ".db"))]


# --- the house ----------------------------------------------------------------------------------------------------


def test_files_and_functions_stay_readable() -> None:
    too_long = [f"{path.relative_to(ROOT)}: {what}" for path in sources() for what in _oversized(path)]

    assert too_long == []


def _oversized(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    if text.count("\n") > MAX_FILE_LINES:
        yield f"{text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
        lines = (body[-1].end_lineno or 0) - body[0].lineno + 1
        if lines > MAX_FUNCTION_LINES:
            yield f"{node.name} has {lines} lines"
        if _depth(node) > MAX_NESTING:
            yield f"{node.name} nests {_depth(node)} deep"


_BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)


def _depth(node: ast.AST, level: int = 0) -> int:
    inner = level + isinstance(node, _BLOCKS)
    scopes = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    depths = []
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, scopes):
                # `elif` is a nested If in the tree and none to the reader
                is_elif = (
                    name == "orelse" and isinstance(node, ast.If) and isinstance(child, ast.If) and len(value) == 1
                )
                depths.append(_depth(child, level if is_elif else inner))
    return max([inner, *depths])


def test_divault_names_few_things_and_loads_no_model_library() -> None:
    program = (
        "import sys, divault\n"
        "heavy = {'torch', 'sklearn', 'transformers', 'joblib', 'numpy', 'eth_account', 'aiohttp', 'fastapi'}\n"
        "print(sorted(heavy & set(sys.modules)), len(divault.__all__) <= 15)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[] True"


# --- dependencies -------------------------------------------------------------------------------------------------

LOCKS = ("requirements.txt", "requirements/dev.txt", "requirements/build.txt", "requirements/node.txt")


@pytest.mark.parametrize("name", LOCKS)
def test_lock_file_pins_everything_by_hash(name: str) -> None:
    text = (ROOT / name).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip()]

    assert lines
    assert [line[:60] for line in lines if "==" not in line or "--hash=sha256:" not in line] == []


def test_no_lock_file_brings_torch() -> None:
    """A requirement for torch that pip resolves brings gigabytes of GPU libraries; its wheel is installed by name."""
    assert not [name for name in LOCKS if re.search(r"^(torch|nvidia)", (ROOT / name).read_text(), re.MULTILINE)]


def test_locks_hold_what_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    run_time = _names(project["project"]["dependencies"] + extras["sklearn"] + extras["devnet"])
    everything = run_time | _names(extras["hf"] + extras["torch"] + project["dependency-groups"]["dev"]) - {"torch"}

    assert run_time - _locked("requirements.txt") == set()
    assert everything - _locked("requirements/dev.txt") == set()
    assert _locked_lines("requirements.txt") <= _locked_lines("requirements/dev.txt")


def _names(requirements: list[str | dict[str, str]]) -> set[str]:
    plain = [text for text in requirements if isinstance(text, str)]
    return {re.split(r"[^A-Za-z0-9_.-]", text)[0].lower().replace("_", "-") for text in plain}


def _locked(name: str) -> set[str]:
    return set(re.findall(r"^([a-z0-9.-]+)==", (ROOT / name).read_text(), re.MULTILINE))


def _locked_lines(name: str) -> set[str]:
    return set(re.findall(r"^([a-z0-9.-]+==\S+)", (ROOT / name).read_text(), re.MULTILINE))


# --- the commands -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["help", "setup", "demo", "test", "check", "bench", "soak", "lock", "clean"])
def test_make_knows_its_targets(target: str) -> None:
    assert re.search(rf"^{target}:.*## .", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_make_says_what_is_missing_without_a_suitable_python(tmp_path: Path) -> None:
    """No Python of the right version: one sentence that says what to install, before anything is touched."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for name in ("requirements.txt", "requirements/build.txt", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    command = ["make", "demo", "PYTHON=/nowhere/python3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.returncode != 0
    assert "needs Python 3.11 or 3.12" in done.stderr
    assert "/nowhere/python3" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_ci_runs_the_same_checks() -> None:
    script = ROOT / ".ci/run"

    assert os.access(script, os.X_OK)
    assert "make check" in script.read_text()
