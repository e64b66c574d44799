"""The committed artifacts belong to the committed sources, and the compile recipe names no machine and no host."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "contracts"
ARTIFACTS = sorted([*(ROOT / "src/divault/chain/abi").glob("*.json"), *(ROOT / "tests/abi").glob("*.json")])


def artifact(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.mark.parametrize("path", ARTIFACTS, ids=lambda path: path.stem)
def test_artifact_was_made_from_the_sources_that_are_here(path: Path) -> None:
    """A changed source without `python contracts/compile.py` fails here, without a compiler at hand."""
    entry = artifact(path)
    own = {name: digest for name, digest in entry["sources"].items() if not name.startswith("@")}

    assert own
    assert own == {name: hashlib.sha256((SOURCES / name).read_bytes()).hexdigest() for name in own}
    assert entry["name"] == path.stem
    assert entry["compiler"].startswith("0.8.37+")
    assert entry["settings"]["evmVersion"] == "cancun"
    assert len(entry["deployedBytecode"]) // 2 - 1 <= 24_576  # EIP-170


def test_every_source_is_compiled_into_something() -> None:
    sources = {str(path.relative_to(SOURCES)) for path in SOURCES.rglob("*.sol") if "node_modules" not in path.parts}

    assert sources == {name for path in ARTIFACTS for name in artifact(path)["sources"] if not name.startswith("@")}


def test_test_contracts_are_not_shipped() -> None:
    shipped = [path for path in ARTIFACTS if path.parent.name == "abi" and path.parent.parent.name == "chain"]

    assert {path.stem for path in shipped} == {
        "ModelAccessToken",
        "ModelVault",
        "Multicall",
        "TestUSDC",
        "WalletSignature",
    }


def test_lock_file_pins_versions_and_hashes_and_names_no_registry() -> None:
    lock = json.loads((SOURCES / "package-lock.json").read_text())["packages"]
    own = lock.pop("")

    assert own["dependencies"] == {"@openzeppelin/contracts": "5.7.0", "solc": "0.8.37"}
    assert all(entry["integrity"].startswith("sha512-") for entry in lock.values())
    assert not [name for name, entry in lock.items() if "resolved" in entry]
    assert not re.search(r"registry|/root|/home|/work", (SOURCES / "compile.py").read_text())
