"""Helia's verified-fetch as a gateway in a process of its own, and the reference importer: both written by others."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

from divault.ipfs.cid import parse_cid
from divault.values import Cid

FOLDER = Path(__file__).parent / "js-gateway"
NODE = Path(__file__).parent.parent / ".venv" / "tools" / "bin" / "node24"


class HeliaGateway:
    """Serves the blocks in a folder while it is open."""

    def __init__(self, blocks: Path) -> None:
        self.blocks = blocks
        self.url = ""

    @property
    def name(self) -> str:
        """As errors call it."""
        return self.url.removeprefix("http://")

    async def __aenter__(self) -> Self:
        assert (FOLDER / "node_modules").is_dir(), "the gateway is not installed: make setup"
        self.process = await asyncio.create_subprocess_exec(
            *(str(NODE), "gateway.mjs", str(self.blocks)),
            cwd=FOLDER,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            self.url = f"http://127.0.0.1:{int(await self.process.stdout.readline())}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.communicate()


def add(blocks: Path, profile: str, *files: Path) -> list[Cid]:
    """Put files into a folder of blocks with the reference importer."""
    done = subprocess.run(
        [str(NODE), "add.mjs", str(blocks), profile, *map(str, files)],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [parse_cid(line) for line in done.stdout.split()]


def block_files(blocks: Path) -> list[Path]:
    """Every block in the folder, the largest first."""
    return sorted((path for path in blocks.rglob("*") if path.is_file()), key=lambda path: -path.stat().st_size)
