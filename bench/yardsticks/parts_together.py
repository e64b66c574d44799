"""The parts of `bench_parts` put together, and nothing between them: no limits, no gate, no check, no receipt's fields.

Each request is read strictly, its model runs in a process of its own with all who came meanwhile, its rows are on disk
before it is answered, and something is signed for it. What a node costs beside this is what it checks and tells.

python -m bench.yardsticks.parts_together PORT FOLDER signed|session
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import sqlite3
import sys
from pathlib import Path
from typing import Any

import msgspec
import orjson
import uvicorn

from bench.parts import DIGEST, ROW, SIGNATURE, SIGNER, model_pass, rows_of_call
from divault.api.connection import Connection
from divault.messages import body_hash, recover, strict_object
from divault.state import State

_HEAD, _MOST = 4, 64
_RECEIPT = b',"receipt":"' + b"x" * 2600 + b'"}'


class _Line(asyncio.Protocol):
    """To the process with the model: one pass at a time, with all who wait."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._got = b""
        self._waiting: list[tuple[bytes, asyncio.Future[bytes]]] = []
        self._under_way: list[tuple[bytes, asyncio.Future[bytes]]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Both ends are here."""
        self._transport = transport

    def ask(self, given: bytes) -> asyncio.Future[bytes]:
        """The model's answer."""
        loop = asyncio.get_running_loop()
        if not self._waiting and not self._under_way:
            loop.call_soon(self._send)
        self._waiting.append((given, loop.create_future()))
        return self._waiting[-1][1]

    def data_received(self, data: bytes) -> None:
        """Give out a whole frame's answers."""
        self._got += data
        if len(self._got) < _HEAD or len(self._got) < _HEAD + int.from_bytes(self._got[:_HEAD], "big"):
            return
        for (_, answer), found in zip(self._under_way, msgspec.msgpack.decode(self._got[_HEAD:]), strict=True):
            answer.set_result(found)
        self._got, self._under_way = b"", []
        if self._waiting:
            self._send()

    def _send(self) -> None:
        self._under_way, self._waiting = self._waiting[:_MOST], self._waiting[_MOST:]
        body = msgspec.msgpack.encode([given for given, _ in self._under_way])
        self._transport.write(len(body).to_bytes(_HEAD, "big") + body)


def _work(end: socket.socket) -> None:
    """The process with the model, until the other end is closed."""
    answers, file = model_pass(), end.makefile("rwb")
    while head := file.read(_HEAD):
        body = msgspec.msgpack.encode(answers(msgspec.msgpack.decode(file.read(int.from_bytes(head, "big")))))
        file.write(len(body).to_bytes(_HEAD, "big") + body)
        file.flush()


class _App:
    """The application."""

    def __init__(self, line: _Line, state: State, *, signed: bool) -> None:
        self._line, self._state, self._signed = line, state, signed
        self._number = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        body = b""
        if scope["method"] == "POST":
            body = await self._answer((await receive())["body"])
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, raw: bytes) -> bytes:
        members = strict_object(raw)
        if self._signed:
            body_hash(members)
            recover(DIGEST, SIGNATURE)
        result = await self._line.ask(orjson.dumps(members["input_data"]))
        self._number += 1
        rows = rows_of_call(self._number, signed=self._signed)

        def work(db: sqlite3.Connection) -> str:
            rows(db)
            return SIGNER.text(DIGEST)

        signature = await self._state.write(work, guarded=False)
        return b'{"result":' + result + b',"signature":"' + signature.encode() + b'"' + _RECEIPT


async def _serve(ours: socket.socket, port: int, folder: Path, *, signed: bool) -> None:
    _, line = await asyncio.get_running_loop().create_connection(_Line, sock=ours)
    await line.ask(orjson.dumps({"features": ROW}))  # the model is there
    async with State(folder / f"state-{port}") as state:
        app = _App(line, state, signed=signed)
        told: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False, "lifespan": "off"}
        config = uvicorn.Config(app, host="127.0.0.1", port=port, http=Connection, **told)
        gc.freeze()  # as a node does when it has started
        await uvicorn.Server(config).serve()


if __name__ == "__main__":
    ours, theirs = socket.socketpair()
    if not os.fork():
        ours.close()
        _work(theirs)
        sys.exit()
    theirs.close()
    with asyncio.Runner(loop_factory=uvicorn.config.Config(None).get_loop_factory()) as runner:
        runner.run(_serve(ours, int(sys.argv[1]), Path(sys.argv[2]), signed=sys.argv[3] == "signed"))
