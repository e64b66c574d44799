"""An HTTP server for JSON-RPC bytes, in a thread of its own with its own event loop.

One thread answers, one request after the other: what it serves needs no lock. Answers go out in one write (and aiohttp
sets TCP_NODELAY), because two small writes wait 40 ms for each other.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from aiohttp import web

from divault.errors import SettingsInvalid

MAX_BODY = 4 * 1024 * 1024
"""Bytes of one request: the largest contract is 48 KiB of creation code, twice that in hex, times a batch."""
_STOP_TIMEOUT_S = 5.0


class RpcServer:
    """Serves `answer` (request body in, response body out) over POST until `close`."""

    def __init__(self, answer: Callable[[bytes], bytes], *, host: str = "127.0.0.1", port: int = 0) -> None:
        """Returns when it listens; port 0 lets the system choose. Raises SettingsInvalid when it can't listen."""
        self._answer = answer
        self._host = host
        self._port = port
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._listening = threading.Event()
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._serve, name="devnet", daemon=True)
        self._thread.start()
        self._listening.wait()
        if self._failure is not None:
            self._thread.join()
            raise SettingsInvalid(
                f"the devnet can't listen on {host}:{port} ({self._failure.strerror}): choose another port, or 0",
                setting="port",
            )

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self._host}:{self._port}"

    def close(self) -> None:
        """Stop listening and end the thread; may be called twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._listen_until_stopped())
        finally:
            self._listening.set()
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    async def _listen_until_stopped(self) -> None:
        app = web.Application(client_max_size=MAX_BODY)
        app.router.add_post("/{anything:.*}", self._post)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=_STOP_TIMEOUT_S)
        await runner.setup()
        try:
            await web.TCPSite(runner, self._host, self._port).start()
            self._port = runner.addresses[0][1]
            self._listening.set()
            await self._stop.wait()
        except OSError as err:
            self._failure = err
        finally:
            await runner.cleanup()

    async def _post(self, request: web.Request) -> web.Response:
        return web.Response(body=self._answer(await request.read()), content_type="application/json")
