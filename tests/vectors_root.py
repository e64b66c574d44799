"""Where test vectors are read from: `VECTORS_DIR` names another root of the same layout."""

from __future__ import annotations

import os
from pathlib import Path


def vectors_root() -> Path:
    """The folder that holds auth/, ipfs/, lighthouse/, age/, payments/ and sandbox/."""
    return Path(os.environ.get("VECTORS_DIR") or Path(__file__).parent.parent / "vectors").resolve()
