"""A node in a process of its own: `divault serve`, as an operator would start it, on a port that the system chooses.

```python
async with serving_node(node_environment(chain, store_url), folder) as node:
    async with AsyncClient(node.url, key) as client:
        ...
```
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from divault.errors import NotReady
from divault.values import Address

_START_S = 60.0  # until it serves; a cold machine imports for some seconds


@dataclass(frozen=True, slots=True)
class NodeProcess:
    """A node that serves."""

    url: str
    process: asyncio.subprocess.Process
    folder: Path
    """State, cache and logs."""


def node_environment(rpc: str, vault: Address, usdc: Address, store: str) -> dict[str, str]:
    """Settings of a node on a development chain; add to them or replace some."""
    return {
        "WEB3_PROVIDER_URL": rpc,
        "VAULT_CONTRACT_ADDRESS": str(vault),
        "USDC_CONTRACT_ADDRESS": str(usdc),
        "DIVAULT_GATEWAY_URLS": store,
        "DIVAULT_HEAD_MAX_AGE_SECONDS": "0",  # nobody mines on such a chain while nothing happens
        "HOST": "127.0.0.1",
        "PORT": "0",
    }


@asynccontextmanager
async def serving_node(environment: Mapping[str, str], folder: Path) -> AsyncIterator[NodeProcess]:
    """A node while the context lasts, and no longer than this process. `folder` exists and takes its files.

    Raises NotReady with what it said instead.
    """
    own = {
        "PATH": os.defpath,
        "DIVAULT_STATE_DIR": str(folder / "state"),
        "MODEL_CACHE_DIR": str(folder / "cache"),
        "DIVAULT_LOG_DIR": str(folder / "logs"),
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "divault", "serve", "--until-eof"),
        env=own | dict(environment),
        cwd=folder,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # an interrupt from the terminal reaches the starter first, which then ends the node
    )
    draining: list[asyncio.Task[None]] = []
    try:
        url = await _serving_url(process)
        # What it says is in its log file too; its pipes must never fill.
        draining = [asyncio.create_task(_drain(pipe)) for pipe in (process.stdout, process.stderr) if pipe]
        yield NodeProcess(url, process, folder)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()
        await asyncio.gather(*draining)


async def _serving_url(process: asyncio.subprocess.Process) -> str:
    if process.stdout is None or process.stderr is None:
        raise TypeError("the node's output has to be piped")
    try:
        async with asyncio.timeout(_START_S):
            async for line in process.stdout:
                if (event := _event(line)).get("event") == "serving":
                    return str(event["url"])
            why = (await process.stderr.read()).decode(errors="replace").strip()
    except TimeoutError:
        why = f"it does not serve after {_START_S:.0f} s"
    raise NotReady(f"the node did not start: {why or 'no reason given'}")


def _event(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


async def _drain(pipe: asyncio.StreamReader) -> None:
    while await pipe.read(1 << 16):
        pass
