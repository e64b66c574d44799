"""A real chain for tests of `divault.chain`: anvil in a process of its own, on a port that the system chose."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

CHAIN_ID = 77001
ANVIL = Path(__file__).resolve().parents[1] / ".venv" / "tools" / "bin" / "anvil"


@contextlib.contextmanager
def anvil(*arguments: str) -> Iterator[str]:
    """URL of a fresh node that is ours: it named its port itself."""
    command = [
        ANVIL,
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--chain-id",
        str(CHAIN_ID),
        "--timestamp",
        str(int(time.time())),
    ]
    with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                found = re.search(r"Listening on (127\.0\.0\.1:\d+)", line)
                if found:
                    break
            else:
                raise RuntimeError("anvil ended before it listened")
            yield f"http://{found[1]}"
        finally:
            process.kill()
