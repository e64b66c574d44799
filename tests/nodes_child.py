"""A change of who serves in a process of its own, to be killed: `python -m tests.nodes_child POINT`, order on stdin.

It says `at POINT` and then stands still there, or `changed CID TRANSACTION` at the end. POINTs are those of a publish.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from divault.chain.chain import Chain
from divault.chain.rpc import Rpc
from divault.publishing import Access, Publisher, SealedTo
from divault.storage.cache import CiphertextCache
from divault.storage.fetcher import Fetcher
from divault.storage.gateway import GatewayStorage
from divault.values import Address, ModelId, Secret
from divault.vault.age import Identity, Recipient
from tests.publish_child import StoppingRecords, StoppingWallet, stand_still


async def change(order: dict[str, Any], point: str) -> None:
    chain = Chain(Rpc.parse(Secret.of_text(order["rpc"]), None), head_ttl_s=0)
    await chain.connect()
    wallet = StoppingWallet(Secret(bytes.fromhex(order["key"])), chain, timeout_s=20)
    wallet.point = point
    records = StoppingRecords(Path(order["folder"]), point)
    gateway = GatewayStorage(order["store"])

    def advance(done: int, total: int | None) -> None:
        if total is not None and done > total // 2:
            stand_still("mid-upload", point)

    publisher = Publisher(wallet, Address.parse(order["vault"]), order["store"], records=records, progress=advance)
    fetcher = Fetcher([gateway], CiphertextCache(Path(order["cache"]), 1 << 28), max_model_bytes=1 << 26)
    access = Access(publisher, records, fetcher, Identity.parse(order["identity"]))
    node = SealedTo(order["url"], wallet.address, Recipient.parse(order["recipient"]))
    change = access.allow if order["do"] == "allow" else access.revoke
    try:
        done = await change(ModelId.parse(order["model"]), [node])
        print(f"changed {done.cid} {done.published and done.published.transaction}", flush=True)  # noqa: T201 - what the parent waits for
    finally:
        gateway.close()
        await chain.close()


if __name__ == "__main__":
    asyncio.run(change(json.loads(sys.stdin.readline()), sys.argv[1] if len(sys.argv) > 1 else ""))
