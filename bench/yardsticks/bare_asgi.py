"""What the server alone costs: an answer as long as a receipt's, by an application that does nothing."""

from __future__ import annotations

import sys
from typing import Any

import uvicorn

from divault.api.connection import Connection

_BODY = b'"' + b"x" * 4200 + b'"'
_HEADERS = [(b"content-type", b"application/json"), (b"content-length", str(len(_BODY)).encode())]


async def app(_: Any, receive: Any, send: Any) -> None:
    """Read the request, and answer."""
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    await send({"type": "http.response.body", "body": _BODY})


if __name__ == "__main__":
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        http=Connection,
        log_level="warning",
        access_log=False,
        server_header=False,
    )
