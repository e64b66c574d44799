"""The code in README and tutorial does what the text around it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.markdown_blocks import blocks, run_script, script

ROOT = Path(__file__).parent.parent
DEMO = "divault demo --port 0 --json demo.json > demo.log &\nuntil [ -s demo.json ]; do sleep 0.5; done\n"


@pytest.mark.timeout(180)
def test_tutorial_sells_a_model(tmp_path: Path) -> None:
    done = run_script(script(ROOT / "docs/tutorial/sell-a-model.md"), tmp_path, timeout_s=170)
    output = done.stdout

    assert done.returncode == 0, output
    assert output.count("as it should be") == 2
    assert "code: access_denied" in output
    assert re.search(r"code: receipt_invalid.*field=receipt_hash|code: receipt_invalid.*field=price", output)
    assert "charged 0.02 USDC" in output
    assert "you have 0.02 USDC" in output
    assert json.loads((tmp_path / "answer.json").read_text())["receipt"]["receipt"]["price"] == "20000"
    assert (tmp_path / "look.age").read_bytes().startswith(b"age-encryption.org/v1\n")
    assert b"LogisticRegression" not in (tmp_path / "look.age").read_bytes()


@pytest.mark.timeout(120)
def test_example_of_the_readme_works_against_the_demo(tmp_path: Path) -> None:
    (example,) = [block.code for block in blocks(ROOT / "README.md") if block.language == "python"]
    before = "set -eu\ntrap 'kill $(jobs -p) 2>/dev/null; wait' EXIT\n" + DEMO
    done = run_script(f"{before}python - <<'END'\n{example}END\n", tmp_path, timeout_s=110)

    assert done.returncode == 0, done.stdout
    assert len(example.strip().splitlines()) <= 12
    assert re.search(r"for 0\.02 USDC, receipt 0x[0-9a-f]{64}", done.stdout)


@pytest.mark.timeout(60)
def test_page_of_ones_own_gateway_fetches_and_refuses(tmp_path: Path) -> None:
    done = run_script(script(ROOT / "docs/how-to/run-against-your-own-gateway.md"), tmp_path, timeout_s=55)

    assert done.returncode == 0, done.stdout
    assert "200 0\n" in done.stdout
    assert "5000000 bytes, verified" in done.stdout
    assert "300000 bytes, verified" in done.stdout
    assert "storage_failed HashMismatch" in done.stdout
    assert list((tmp_path / "cache").iterdir()) == []


_COPY = "cp -p state-before/age.key state/\n"


@pytest.mark.parametrize("copied", [True, False])
def test_page_of_keys_gives_a_node_another_key_that_opens_what_the_old_one_did(copied: bool, tmp_path: Path) -> None:
    """And without the step that the page insists on it opens nothing, as the page says."""
    (tmp_path / "model.bin").write_bytes(b"weights")
    before = "divault keys node > before.json\n"
    steps = script(ROOT / "docs/how-to/rotate-keys.md")
    assert _COPY in steps
    after = "divault keys node > after.json; stat -c %a state state/*.key\n"
    done = run_script(before + (steps if copied else steps.replace(_COPY, "")) + after, tmp_path, timeout_s=55)
    old, new = (json.loads((tmp_path / name).read_text()) for name in ("before.json", "after.json"))

    assert done.returncode == 0, done.stdout
    assert old["address"] != new["address"]
    assert (old["age_recipient"] == new["age_recipient"]) is copied
    assert done.stdout.splitlines()[-3:] == ["700", "600", "600"]
    seal = f"divault seal model.bin -o model.age -r {old['age_recipient']}\n"
    opened = run_script(seal + "divault open model.age -o again.bin -i state/age.key\n", tmp_path, timeout_s=55)
    assert (opened.returncode == 0, "wrong_key" in opened.stdout) == (copied, not copied), opened.stdout
