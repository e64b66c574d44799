"""anvil as the devnet's chain: found, started on a port of its own choice, proved to be ours, stopped.

Rules (a taken port is answered by whoever holds it, and JSON-RPC can't tell a wrong chain from the right one):

1. The port comes from the line that our process printed; no port is fixed.
2. Before the first write the chain id is the one we asked for and the process we started is alive.
3. The chain's clock starts at this machine's time.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from divault.errors import ChainUnavailable, SettingsInvalid

SETTING = "DIVAULT_ANVIL"
_LISTENING = re.compile(r"Listening on 127\.0\.0\.1:(\d+)")
_START_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 5.0
_CHECKOUT = Path(__file__).resolve().parents[3]


def find_anvil(environ: Mapping[str, str]) -> Path | None:
    """The anvil to use: `DIVAULT_ANVIL` of the environment given, else from its PATH, else `.venv/tools/bin/anvil`.

    Raises SettingsInvalid when `DIVAULT_ANVIL` names no file.
    """
    named = environ.get(SETTING)
    if named:
        if not Path(named).is_file():
            raise SettingsInvalid(f"{SETTING} names no file: give the path of the anvil executable", setting=SETTING)
        return Path(named)
    found = shutil.which("anvil", path=environ.get("PATH", ""))
    if found:
        return Path(found)
    tool = _CHECKOUT / ".venv" / "tools" / "bin" / "anvil"
    return tool if tool.is_file() else None


class AnvilProcess:
    """A running anvil with an empty chain; its url is known when the constructor returns."""

    def __init__(self, executable: Path, chain_id: int) -> None:
        """Raises SettingsInvalid when it can't be started, ChainUnavailable when it does not come up."""
        command = [str(executable), "--host", "127.0.0.1", "--port", "0", "--chain-id", str(chain_id)]
        command += ["--timestamp", str(int(time.time())), "--accounts", "1"]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={}
            )
        except OSError as err:
            raise SettingsInvalid(f"{executable} can't be started: {err.strerror}", setting=SETTING) from err
        self._lines: deque[str] = deque(maxlen=50)
        self._port = 0
        self._told = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()
        self._await_port()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def alive(self) -> bool:
        """True while the process that was started here runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """Stop it and wait for its end; may be called twice."""
        if self.alive():
            self._process.terminate()
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        self._reader.join()

    def _await_port(self) -> None:
        if not self._told.wait(_START_TIMEOUT_S) or not self._port:
            self.close()
            raise ChainUnavailable(f"anvil did not start: {' '.join(self._lines)[-500:] or 'it printed nothing'}")

    def _read(self, stream: IO[str]) -> None:
        """To the end, always: a full pipe would stop the process."""
        with stream:
            for line in stream:
                self._lines.append(line.strip())
                found = _LISTENING.search(line)
                if found:
                    self._port = int(found.group(1))
                    self._told.set()
        self._told.set()
