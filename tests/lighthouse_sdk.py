"""Lighthouse's npm SDK in a Node process of its own, and calls to it."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
from pathlib import Path
from typing import Any, Self

from divault.testing import LighthouseDouble
from divault.values import Secret

FOLDER = Path(__file__).parent / "js"


class SdkThrew(Exception):
    """What the SDK threw, as text."""


def hexed(key: Secret) -> str:
    return f"0x{key.reveal().hex()}"


def sign(key: Secret) -> dict[str, str]:
    """As an argument: this wallet's signature over a fresh message."""
    return {"sign": hexed(key)}


def jwt(key: Secret) -> dict[str, str]:
    """As an argument: a token of this wallet."""
    return {"jwt": hexed(key)}


def account_sign(key: Secret) -> dict[str, str]:
    """As an argument: this wallet's signature over the API host's message."""
    return {"accountSign": hexed(key)}


class Sdk:
    """One process that serves any number of calls at once; the SDK sleeps most of the time."""

    def __init__(self, double: LighthouseDouble) -> None:
        self._double = double
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def __aenter__(self) -> Self:
        hosts = {name: getattr(self._double, name).url for name in ("api", "upload", "gateway", "encryption")}
        assert (FOLDER / "node_modules").is_dir(), "the SDK is not installed: make setup"
        self._process = await asyncio.create_subprocess_exec(
            *("node", "sdk.mjs", json.dumps(hosts)),
            cwd=FOLDER,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 24,
        )
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        await self._reading

    async def __call__(self, name: str, *args: Any, of: str = "sdk") -> Any:
        """What the SDK returns; bytes are bytes. Raises SdkThrew."""
        number = next(self._numbers)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        line = json.dumps({"id": number, "of": of, "name": name, "args": args})
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        reply = await self._waiting[number]
        if "thrown" in reply:
            raise SdkThrew(reply["thrown"])
        value = reply.get("value")
        return base64.b64decode(value["base64"]) if isinstance(value, dict) and set(value) == {"base64"} else value

    async def kavach(self, name: str, *args: Any) -> Any:
        """The same for the kavach that the SDK brings."""
        return await self(name, *args, of="kavach")

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            reply = json.loads(line)
            self._waiting.pop(reply["id"]).set_result(reply)
        for call in self._waiting.values():
            call.set_exception(AssertionError("node ended"))
