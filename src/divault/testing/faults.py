"""What goes wrong with hosts that nobody has to trust, one function for each; for `Host.faults` of a double.

```python
double.gateway.faults.append(first(1, cut_after(1000)))  # the first download breaks off, the next one is whole
double.encryption.faults.append(at_node(3, silent()))  # Kavach's third node takes requests and says nothing
```
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from typing import Any

from aiohttp import web

from divault.testing.hosts import Answer, Fault, Honest
from divault.vault.kavach import KeyShard

# --- when -----------------------------------------------------------------------------------------------------------


def first(times: int, fault: Fault) -> Fault:
    """The fault for so many of the requests that it concerns; later ones get the truth."""
    left = times

    async def twist(request: web.Request, honest: Honest) -> web.StreamResponse | None:
        nonlocal left
        if left <= 0:
            return None
        left -= 1
        response = await fault(request, honest)
        left += response is None  # it was not concerned
        return response

    return twist


def at(pattern: str, fault: Fault) -> Fault:
    """The fault for requests in whose path and query the regular expression is found."""
    found = re.compile(pattern)

    async def twist(request: web.Request, honest: Honest) -> web.StreamResponse | None:
        return await fault(request, honest) if found.search(request.path_qs) else None

    return twist


def at_node(number: int, fault: Fault) -> Fault:
    """The fault for one of Kavach's five nodes (1 to 5)."""
    return at(rf"^/api/\w+/{number}$", fault)


# --- answers of its own ---------------------------------------------------------------------------------------------


def silent() -> Fault:
    """Takes the request and never answers."""

    async def twist(_request: web.Request, _honest: Honest) -> web.StreamResponse | None:
        await asyncio.Event().wait()
        return None

    return twist


def dead() -> Fault:
    """Drops the connection without a word."""

    async def twist(request: web.Request, _honest: Honest) -> web.StreamResponse | None:
        if request.transport is not None:
            request.transport.abort()
        return web.Response()  # goes nowhere

    return twist


def answering(value: Any, status: int = 200) -> Fault:
    """Says this, as JSON."""

    async def twist(_request: web.Request, _honest: Honest) -> web.StreamResponse | None:
        return web.json_response(value, status=status)

    return twist


def missing() -> Fault:
    """404: with `first`, content that appears late."""
    return answering({"error": "not found"}, 404)


def busy(retry_after: str = "1") -> Fault:
    """429 with `Retry-After`."""

    async def twist(_request: web.Request, _honest: Honest) -> web.StreamResponse | None:
        return web.json_response({"error": "slow down"}, status=429, headers={"Retry-After": retry_after})

    return twist


def web_page(status: int = 200) -> Fault:
    """HTML, whatever was asked for, as proxies and parked domains say it."""

    async def twist(_request: web.Request, _honest: Honest) -> web.StreamResponse | None:
        page = "<!doctype html><html><body><h1>Something about this service</h1></body></html>"
        return web.Response(text=page, status=status, content_type="text/html")

    return twist


def redirect(location: str, status: int = 307) -> Fault:
    """Sends the client elsewhere; `{path}` in the location stands for the path and query that were asked for."""

    async def twist(request: web.Request, _honest: Honest) -> web.StreamResponse | None:
        return web.Response(status=status, headers={"Location": location.replace("{path}", request.path_qs)})

    return twist


# --- bodies ---------------------------------------------------------------------------------------------------------


def cut_after(count: int) -> Fault:
    """The head of the honest answer with its true length, so many bytes of the body, and then the connection ends."""

    async def twist(request: web.Request, honest: Honest) -> web.StreamResponse | None:
        answer = await honest()
        response = await _head(request, answer, len(answer.body))
        await response.write(answer.body[:count])
        return _hang_up(request, response)

    return twist


def wrong_length(by: int) -> Fault:
    """The honest body under a `Content-Length` that is off: too little is cut off cleanly, too much never comes."""

    async def twist(request: web.Request, honest: Honest) -> web.StreamResponse | None:
        answer = await honest()
        claimed = max(0, len(answer.body) + by)
        response = await _head(request, answer, claimed)
        await response.write(answer.body[:claimed])
        return _hang_up(request, response) if claimed > len(answer.body) else response

    return twist


def wrong_bytes(offset: int = 0, count: int = 1) -> Fault:
    """The honest answer with some bytes of its body flipped: other content under a CID."""

    async def twist(_request: web.Request, honest: Honest) -> web.StreamResponse | None:
        answer = await honest()
        body = bytearray(answer.body)
        for position in range(offset, min(offset + count, len(body))):
            body[position] ^= 0xFF
        return _whole(replace(answer, body=bytes(body)))

    return twist


def drip(count: int, pause_s: float) -> Fault:
    """The honest answer, so many bytes at a time, with a pause (seconds) before each piece."""

    async def twist(request: web.Request, honest: Honest) -> web.StreamResponse | None:
        answer = await honest()
        response = await _head(request, answer, len(answer.body))
        for start in range(0, len(answer.body), count):
            await asyncio.sleep(pause_s)
            await response.write(answer.body[start : start + count])
        return response

    return twist


def no_range() -> Fault:
    """Ignores Range: the whole file with status 200."""

    async def twist(_request: web.Request, honest: Honest) -> web.StreamResponse | None:
        answer = await honest(without=["Range"])
        headers = {name: value for name, value in answer.headers.items() if name != "Accept-Ranges"}
        return _whole(replace(answer, headers=headers))

    return twist


# --- key shards -----------------------------------------------------------------------------------------------------


def corrupt_shard() -> Fault:
    """A key shard whose last digit is another; everything else stays as it is."""

    async def twist(_request: web.Request, honest: Honest) -> web.StreamResponse | None:
        answer = await honest()
        if answer.status != 200 or "payload" not in (told := answer.json()):
            return _whole(answer)
        key = told["payload"]["key"]
        told["payload"]["key"] = key[:-1] + ("0" if key[-1] != "0" else "1")
        return web.json_response(told)

    return twist


def other_shard(shard: KeyShard) -> Fault:
    """A shard that is well-formed and of another file."""
    return answering({"payload": {"key": shard.key, "index": shard.index}})


def null_payload() -> Fault:
    """A success that carries nothing."""
    return answering({"payload": None})


def _whole(answer: Answer) -> web.Response:
    return web.Response(status=answer.status, headers=answer.headers, body=answer.body)


async def _head(request: web.Request, answer: Answer, length: int) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status, headers=answer.headers | {"Content-Length": str(length)})
    await response.prepare(request)
    return response


def _hang_up(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.close()  # what was written still goes out
    return response
