"""The code blocks of a Markdown page, and a shell script that does what its reader would do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE)
_SAVED = re.compile(r"[Ss]ave this as `([\w.]+)`[^`]*$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """One block: its language, its text, and the file that the page says to save it as."""

    language: str
    code: str
    file: str | None


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of the page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        saved = _SAVED.search(text[: match.start()])
        found.append(Block(match["language"], textwrap.dedent(match["code"]), saved[1] if saved else None))
    return found


def script(page: Path) -> str:
    """A bash script: `sh` blocks as they stand, `python` blocks saved where the page says so, else run."""
    lines = ["set -eu", "trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT"]
    for block in blocks(page):
        if block.language == "sh":
            lines.append(block.code)
        elif block.language == "python":
            target = f"cat > {block.file}" if block.file else "python -"
            lines.append(f"{target} <<'END_OF_BLOCK'\n{block.code}END_OF_BLOCK")
    return "\n".join(lines) + "\n"


def run_script(text: str, folder: Path, *, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run it in the folder, with this Python's programs first on the path and no setting of this machine."""
    environ = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),
        "LANG": "C.UTF-8",
    }
    process = subprocess.Popen(
        ["bash", "-c", text],
        cwd=folder,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"not done after {timeout_s:.0f} s; so far:\n{output}") from None
    return subprocess.CompletedProcess(["bash"], process.returncode, output, "")
