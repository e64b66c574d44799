"""A publish in a process of its own, to be killed: `python -m tests.publish_child POINT`, with a JSON order on stdin.

It says `at POINT` and then stands still there, or `published CID TRANSACTION` at the end.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from divault.chain.chain import Chain
from divault.chain.rpc import Rpc
from divault.chain.wallet import Wallet
from divault.publishing import Listing, Publication, Publications, Publisher, SealedTo
from divault.storage.lighthouse import Lighthouse
from divault.values import Address, ModelId, Secret, Usdc
from divault.vault.age import Recipient

POINTS = (
    "before-record-sealed",
    "after-record-sealed",
    "mid-upload",
    "before-record-stored",
    "after-record-stored",
    "after-record-sent",
    "after-sending",
    "before-record-registered",
    "after-record-registered",
)
"""Where a publish can end: around each write of its record, inside the upload, and between sending and the answer."""


def stand_still(name: str, wanted: str) -> None:
    if name == wanted:
        print(f"at {name}", flush=True)  # noqa: T201 - what the parent waits for
        time.sleep(600)


class StoppingRecords(Publications):
    """Records that stop the process before or after a stage is written."""

    def __init__(self, folder: Path, point: str) -> None:
        super().__init__(folder)
        self._point = point

    def save(self, publication: Publication) -> None:
        stage = "sent" if publication.sent is not None and publication.transaction is None else publication.stage.value
        stage = "registered" if publication.stage.value == "registered" else stage
        stand_still(f"before-record-{stage}", self._point)
        super().save(publication)
        stand_still(f"after-record-{stage}", self._point)


class StoppingWallet(Wallet):
    """A wallet that stops the process once its transaction is out."""

    point = ""

    async def _submit(self, raw: bytes) -> Any:
        tx = await super()._submit(raw)
        stand_still("after-sending", self.point)
        return tx


async def publish(order: dict[str, Any], point: str) -> None:
    chain = Chain(Rpc.parse(Secret.of_text(order["rpc"]), None), head_ttl_s=0)
    await chain.connect()
    wallet = StoppingWallet(Secret(bytes.fromhex(order["key"])), chain, timeout_s=20)
    wallet.point = point
    lighthouse = Lighthouse(
        Secret.of_text(order["api_key"]), upload_url=order["upload"], gateway_urls=[order["gateway"]]
    )
    records = StoppingRecords(Path(order["folder"]), point)
    listing = Listing(
        ModelId.parse(order["model"]), Usdc.parse(order.get("price", "0.02")), Address.parse(order["token"]), 100
    )
    node = SealedTo("http://127.0.0.1:1", wallet.address, Recipient.parse(order["recipient"]))

    def advance(done: int, total: int | None) -> None:
        if total is not None and done > total // 2:
            stand_still("mid-upload", point)

    vault = Address.parse(order["vault"])
    publisher = Publisher(wallet, vault, lighthouse, records=records, progress=advance)
    try:
        done = await publisher.publish(Path(order["path"]), listing, [node])
        print(f"published {done.cid} {done.transaction}", flush=True)  # noqa: T201 - what the parent waits for
    finally:
        await lighthouse.close()
        await chain.close()


def main() -> None:
    asyncio.run(publish(json.loads(sys.stdin.readline()), sys.argv[1] if len(sys.argv) > 1 else ""))


if __name__ == "__main__":
    main()
