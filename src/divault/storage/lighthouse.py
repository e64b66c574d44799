"""Lighthouse as a place to publish to: uploads that are checked by CID, and facts about files; nothing on trust.

Each host is named by whoever makes the object; no request goes anywhere else. What nodes fetch from Lighthouse comes
through `GatewayStorage` like everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from divault.errors import InvalidCID, StorageFailed
from divault.ipfs.cid import multihash, parse_cid
from divault.ipfs.importer import PROFILES
from divault.storage._api import ApiHost, Reply
from divault.storage.arrival import Progress
from divault.storage.kavach import Authorisation, Kavach
from divault.storage.upload import Stored, UploadService, store_file
from divault.values import Address, Cid, Secret
from divault.vault.conditions import AccessConditions
from divault.vault.kavach import KeyShard

API_URL = "https://api.lighthouse.storage"
UPLOAD_URL = "https://upload.lighthouse.storage"
GATEWAY_URL = "https://gateway.lighthouse.storage"


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What Lighthouse says of a file; only the CID was compared with what was asked for."""

    cid: Cid
    size: int
    name: str
    encrypted: bool
    mime_type: str


class Lighthouse:
    """One account at one set of hosts. Use it from one event loop; close it."""

    def __init__(
        self,
        api_key: Secret | None,
        *,
        upload_url: str = UPLOAD_URL,
        api_url: str = API_URL,
        gateway_urls: Sequence[str] = (GATEWAY_URL,),
    ) -> None:
        """`gateway_urls` are asked in order for the sample after an upload. Raises SettingsInvalid."""
        self._api = ApiHost(api_url, "DIVAULT_LIGHTHOUSE_API_URL")
        self._upload_url, self._api_key = upload_url, api_key
        self._gateways = tuple(gateway_urls) or (GATEWAY_URL,)

    async def close(self) -> None:
        """Close all connections."""
        await self._api.close()

    async def upload(self, path: Path, *, encrypted: bool = False, progress: Progress | None = None) -> Stored:
        """Store a file, in constant memory; its CID is one that was computed here, and a sample of it came back.

        `encrypted`: the file is in Lighthouse's own format, and its SDK shall know. Raises as `store_file`.
        """
        headers = {"Encryption": "true"} if encrypted else {}
        service = UploadService(self._upload_url, self._api_key, PROFILES, headers)
        return await store_file(path, service, self._gateways, progress=progress)

    async def file_info(self, cid: Cid) -> FileInfo:
        """Raises StorageFailed: `not_found` for a file that Lighthouse does not have, `malformed`."""
        reply = await self._api.ask("GET", f"/api/lighthouse/file_info?cid={cid}")
        if reply.status in (400, 404):
            raise reply.failed(f"has no file {cid}", reason="not_found")
        if reply.status != 200:
            raise reply.failed(f"answered HTTP {reply.status}: {reply.words()}")
        return _file_info(reply, cid)


async def give_key(
    kavach: Kavach,
    who: Authorisation,
    cid: Cid,
    shards: Sequence[KeyShard],
    *,
    share_with: Sequence[Address] = (),
    conditions: AccessConditions | None = None,
) -> None:
    """Leave the key of a file that was just stored with Kavach's nodes, for these wallets and under these conditions.

    May be repeated as it is. Raises StorageFailed, AccessDenied, BadRequest.
    """
    await kavach.save(who, cid, shards, share_with)
    if conditions is not None:
        await kavach.set_conditions(who, cid, conditions)


def _file_info(reply: Reply, cid: Cid) -> FileInfo:
    told = reply.json()
    try:
        info = FileInfo(
            parse_cid(told["cid"]),
            int(told["fileSizeInBytes"]),
            str(told.get("fileName") or "")[:255],
            told.get("encryption") is True,
            str(told.get("mimeType") or "")[:255],
        )
    except (InvalidCID, KeyError, TypeError, ValueError, AttributeError) as err:
        raise reply.failed(f"answered no file info for {cid}", reason="malformed") from err
    if multihash(info.cid) != multihash(cid) or info.size < 0:
        raise StorageFailed(
            f"{reply.host}: answered about {info.cid} when asked about {cid}",
            cid=str(cid),
            gateway=reply.host,
            reason="malformed",
        )
    return info
