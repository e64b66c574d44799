"""Which address each node URL had at first use, kept in one small JSON file.

Trust on first use: it does not stop a node that lies from the start, it stops one that changes behind a URL.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from divault.errors import NodeUntrusted
from divault.values import Address


def default_path() -> Path:
    """`$XDG_STATE_HOME/divault/known_nodes.json`, usually under `~/.local/state`."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "divault" / "known_nodes.json"


class KnownNodes:
    """The remembered addresses. Written atomically, so that clients side by side never read half a file."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or default_path()

    def check(self, url: str, address: Address) -> None:
        """Accept the address if it is the remembered one, or remember it. Raises NodeUntrusted when it changed."""
        known = self._read()
        before = known.get(url)
        if before is None:
            self._write(known | {url: str(address)})
        elif before != str(address):
            raise NodeUntrusted(
                f"the node at {url} had the address {before} and now shows {address}: if its operator confirms the "
                f"change, pass node={str(address)!r} (on the command line --node {url}#{address}) or remove the line "
                f"from {self._path}",
                have=str(address),
                need=before,
            )

    def _read(self) -> dict[str, str]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as err:
            raise NodeUntrusted(f"{self._path} can't be read: mend or remove it") from err
        if not isinstance(found, dict):
            raise NodeUntrusted(f"{self._path} is not a list of nodes: mend or remove it")
        return {str(url): str(address) for url, address in found.items()}

    def _write(self, known: dict[str, str]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(f".{os.getpid()}.new")
        draft.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        draft.replace(self._path)
