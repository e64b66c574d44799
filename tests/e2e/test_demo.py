"""`divault demo`, as a newcomer meets it: the story, its report, and the lines it prints to go on with."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest

from divault.receipts import check, require_valid
from divault.values import Address

DEMO = [sys.executable, "-m", "divault", "demo"]
STEPS = [
    "chain", "store", "contracts", "node", "train", "seal", "register", "refuse", "grant", "pay", "answer", "verify",
    "score",
]  # fmt: skip


def environment(tmp_path: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "XDG_STATE_HOME": str(tmp_path), "COLUMNS": "300"}


def test_the_story_is_told_once_and_reported(tmp_path: Path) -> None:
    done = subprocess.run(
        [*DEMO, "--once", "--json", "report.json"],
        cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())

    assert [step["name"] for step in report["steps"]] == STEPS
    assert report["accuracy"] == report["accuracy_before_sealing"] > 0.95
    assert report["owner_received_atomic"] == report["price_atomic"] == "20000"
    refusal = next(step for step in report["steps"] if step["name"] == "refuse")["refusal"]
    assert (refusal["status"], refusal["have"], refusal["need"]) == (403, "0", str(100 * 10**18))
    assert report["request"]["payment"]["tx_hash"] == report["transactions"]["payment"]
    assert report["response"]["receipt"] == report["receipt"]
    require_valid(
        check(
            report["receipt"],
            chain_id=report["chain_id"],
            vault=Address.parse(report["addresses"]["vault"]),
            node=Address.parse(report["addresses"]["node"]),
        )
    )
    assert report["cid"] in done.stdout
    assert not list(tmp_path.glob("**/*.key")), "nothing of the demo's world stays behind"


def test_the_lines_it_prints_work_until_it_is_ended(tmp_path: Path) -> None:
    demo = subprocess.Popen(
        [*DEMO, "--port", "0"], cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        assert demo.stdout is not None
        printed = _until_invited(demo.stdout)
        curl = next(line for line in printed if line.strip().startswith("curl "))
        python = [line.strip() for line in printed if line.startswith("  ") and _is_python(line)]
        shown = subprocess.run(shlex.split(curl), capture_output=True, text=True, timeout=30, check=True)
        ran = subprocess.run(
            [sys.executable, "-c", "\n".join(python)],
            cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        demo.send_signal(signal.SIGINT)
        demo.communicate(timeout=30)

    assert json.loads(shown.stdout)["model_info"]["price_usdc"] == "0.02"
    assert len(python) == 3
    assert ran.returncode == 0, ran.stderr
    assert "predictions" in ran.stdout
    assert demo.returncode in (0, 130)


@pytest.mark.parametrize(("line", "status"), [("A node serves", 128 + signal.SIGTERM), ("keeps serving", 0)])
def test_nothing_stays_behind_when_it_is_ended(line: str, status: int, tmp_path: Path) -> None:
    """By SIGTERM, as `kill`, `timeout` and service managers end it, in the midst of the story and after it."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / "divault-demo-of-another").mkdir()
    demo = subprocess.Popen(
        [*DEMO, "--port", "0"], cwd=tmp_path, env=environment(tmp_path) | {"TMPDIR": str(tmp_path / "tmp")},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert demo.stdout is not None
        assert any(line in printed for printed in demo.stdout)
    finally:
        demo.send_signal(signal.SIGTERM)
        _, said = demo.communicate(timeout=30)

    assert (demo.returncode, said) == (status, "")
    assert [path.name for path in (tmp_path / "tmp").iterdir()] == ["divault-demo-of-another"]


def _until_invited(stream: IO[str]) -> list[str]:
    lines: list[str] = []
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        line = stream.readline()
        if not line:
            break
        lines.append(line.rstrip("\n"))
        if "client.run(" in line:
            return lines
    raise AssertionError("\n".join(lines))


def _is_python(line: str) -> bool:
    return any(word in line for word in ("from divault import", "client = ", "client.run("))


def test_a_demo_that_is_killed_leaves_no_node_behind(tmp_path: Path) -> None:
    demo = subprocess.Popen(
        [*DEMO, "--port", "0"], cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert demo.stdout is not None
    curl = shlex.split(next(line for line in _until_invited(demo.stdout) if line.strip().startswith("curl ")))
    subprocess.run(curl, capture_output=True, check=True, timeout=20)
    demo.kill()
    demo.communicate(timeout=30)

    deadline = time.monotonic() + 20
    while subprocess.run(curl, capture_output=True, check=False, timeout=20).returncode == 0:
        assert time.monotonic() < deadline, "the node still serves"
        time.sleep(0.2)
