"""The Dockerfile's steps, carried out in an empty folder and a fresh virtual environment, give a node that serves.

No container engine is needed: `tests/dockerfile.py` says what stands in for it. The published quick start
(`cd src && python main.py`, `tail -f logs/div-backend.log`) is run with what the image installed.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from divault.devnet.content import ContentStore
from divault.testing import TestChain
from divault.testing.node import node_environment
from tests.dockerfile import Image, parse

ROOT = Path(__file__).parent.parent
_START_S = 60.0


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """All steps carried out; packages come out of pip's cache where it has them."""
    environ = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")}
    environ |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    built = Image(tmp_path_factory.mktemp("image"), ROOT, environ | {"PIP_NO_COMPILE": "1"})
    built.build(parse((ROOT / "Dockerfile").read_text()))
    return built


@asynccontextmanager
async def surroundings(folder: Path) -> AsyncIterator[tuple[TestChain, dict[str, str]]]:
    """A chain, a store, and the settings that name them."""
    async with TestChain.start() as chain, ContentStore(folder / "blocks") as store:
        yield chain, node_environment(chain.devnet.url, chain.vault, chain.usdc, store.url)


@contextmanager
def served(command: list[str], folder: Path, environ: dict[str, str], log: Path) -> Iterator[int]:
    """The port on which the command serves; it is stopped afterwards and must end by itself then."""
    with log.open("wb") as sink:
        process = subprocess.Popen(command, cwd=folder, env=environ, stdout=sink, stderr=subprocess.STDOUT)
    try:
        yield _port(process, log)
        process.terminate()

        assert process.wait(timeout=20) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    until = time.monotonic() + _START_S
    while time.monotonic() < until and process.poll() is None:
        line = next((line for line in log.read_text().splitlines() if _event(line) == "serving"), None)
        if line is not None:
            return int(json.loads(line)["url"].rpartition(":")[2])
        time.sleep(0.05)
    raise AssertionError(f"it does not serve: {log.read_text()}")


def _event(line: str) -> Any:
    try:
        return json.loads(line).get("event")
    except ValueError:  # half a line, or what an interpreter says about itself
        return None


def _healthy(image: Image, port: int) -> bool:
    environ = image.environ | {"PORT": str(port)}
    return (
        subprocess.run(["/bin/sh", "-c", image.health], env=environ, check=False, stderr=subprocess.DEVNULL).returncode
        == 0
    )


def _becomes_unhealthy(image: Image, port: int) -> bool:
    until = time.monotonic() + 30  # what was probed just now counts for some seconds
    while time.monotonic() < until:
        if not _healthy(image, port):
            return True
        time.sleep(0.5)
    return False


@pytest.mark.timeout(180)
async def test_image_serves_and_its_health_check_tells_the_truth(image: Image, tmp_path: Path) -> None:
    async with surroundings(tmp_path) as (chain, settings):
        with served(image.command, image.folder, image.environ | settings, tmp_path / "log") as port:
            assert await asyncio.to_thread(_healthy, image, port)
            assert (image.folder / "logs/div-backend.log").stat().st_size > 0

            chain.devnet.close()  # a node that sees no chain can't serve

            assert await asyncio.to_thread(_becomes_unhealthy, image, port)


@pytest.mark.timeout(180)
async def test_published_quick_start_serves(image: Image, tmp_path: Path) -> None:
    """`cd src && python main.py`: the same node, with logs and state in the folder above, where .env lies."""
    checkout = image.root / "build"
    python = str(image.root / "opt/divault/bin/python")
    async with surroundings(tmp_path) as (_, settings):
        (checkout / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        environ = {"PATH": image.environ["PATH"]}
        with served([python, "main.py"], checkout / "src", environ, tmp_path / "log") as port:
            assert await asyncio.to_thread(_healthy, image, port)

    lines = (checkout / "logs/div-backend.log").read_text().splitlines()
    assert any(_event(line) == "serving" for line in lines)
    assert (checkout / "state").is_dir()
    assert not (checkout / "src/logs").exists()


def test_image_does_not_run_as_root_and_carries_no_tools(image: Image) -> None:
    assert image.user == "divault"
    assert "useradd --uid 10001" in image.noted()
    assert "chown divault:divault cache logs state" in image.noted()
    assert image.volumes == ["/app/cache", "/app/logs", "/app/state"]
    assert image.environ["EXPOSED"] == "8000"
    assert (image.folder / "state").stat().st_mode & 0o077 == 0
    assert not {"torch", "pytest", "mypy"} & {path.name for path in (image.root / "opt/divault/lib").glob("*/*/*")}


def test_step_that_fails_stops_the_build(tmp_path: Path) -> None:
    """The stand-in for the engine does not pass over a failing step."""
    built = Image(tmp_path / "image", ROOT, {"PATH": os.environ["PATH"]})

    with pytest.raises(subprocess.CalledProcessError):
        built.build(parse("FROM nothing\nWORKDIR /app\nRUN false\nRUN touch reached\n"))
    with pytest.raises(ValueError, match="no such instruction"):
        built.build(parse("ADD a b\n"))
    assert not (tmp_path / "image/app/reached").exists()
