"""Requests to the Lighthouse double as its clients make them."""

from __future__ import annotations

import json
from typing import Any

import aiohttp

from divault.ipfs.cid import parse_cid
from divault.storage.kavach import Kavach
from divault.testing import LighthouseDouble
from divault.values import Address, Cid, Secret
from divault.vault.kavach import generate, recover_key

OWNER, FRIEND, STRANGER = (Secret(bytes([n]) * 32) for n in (1, 2, 3))
UNKNOWN = "bafkreibwimyyrqiqhl7difiu3gl6a5znf2ml7tgrh3uekfsitvrqczkzr4"
DATA = bytes(range(256)) * 2000  # two chunks of the double's default profile
TOKEN = Address(b"\x11" * 20)
SHARDS = [{"key": f"{n + 100:064x}", "index": f"{n:064x}"} for n in range(1, 6)]


async def answer(http: aiohttp.ClientSession, method: str, url: str, **how: Any) -> tuple[int, Any]:
    async with http.request(method, url, allow_redirects=False, **how) as reply:
        body = await reply.read()
        is_json = reply.content_type == "application/json"
        return reply.status, json.loads(body) if is_json else body


def form(*files: tuple[str, bytes], name: str = "file") -> aiohttp.FormData:
    data = aiohttp.FormData(quote_fields=False)  # as the SDK writes names of files in folders
    for filename, content in files:
        data.add_field(name, content, filename=filename, content_type="application/octet-stream")
    return data


async def add(
    http: aiohttp.ClientSession, double: LighthouseDouble, *files: tuple[str, bytes], query: str = "", **headers: str
) -> tuple[int, Any]:
    key = {"Authorization": f"Bearer {double.api_key.reveal().decode()}"} | headers
    return await answer(http, "POST", f"{double.upload.url}/api/v0/add{query}", data=form(*files), headers=key)


async def saved(kavach: Kavach, *share_with: Address) -> tuple[Cid, str]:
    key, shards = generate()
    cid = parse_cid(UNKNOWN)
    async with kavach.as_wallet(OWNER) as who:
        await kavach.save(who, cid, shards, share_with)
    return cid, key.reveal().decode()


async def recovered(kavach: Kavach, key: Secret, owner: Address | None = None) -> str:
    async with kavach.as_wallet(key) as who:
        return recover_key([shard async for shard in kavach.shards(who, parse_cid(UNKNOWN), owner)])
