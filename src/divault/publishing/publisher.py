"""From a model on disk to a model for sale: seal it, store it by CID, register it in the vault.

Rules:

1. What leaves this machine is ciphertext; the plaintext is read once and copied nowhere.
2. The CID is computed here and compared with what the store answers; nothing is registered on a mismatch.
3. A folder is sealed as one tar with plain, sorted names and no owner, time or mode in it.
4. The seal names the model id, so that nodes open it under no other: whoever registers the same CID gets nothing.
5. A model id that is registered already with other content is never overwritten silently: it is the owner's
   `updateModelMetadata`, and other people's ids are refused before anything is uploaded.
"""

from __future__ import annotations

import asyncio
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from divault.chain import contracts
from divault.chain.vault import VaultReader
from divault.chain.wallet import Wallet
from divault.errors import BadRequest, ModelUnknown, TransactionFailed
from divault.storage.lighthouse import Lighthouse
from divault.storage.upload import publish_file
from divault.values import Address, Cid, Digest, ModelId, ModelInfo, Secret, Usdc
from divault.vault.age import Passphrase, Recipient
from divault.vault.sealed import seal_stream

Advance = Callable[[int, int | None], None]
OTHER = 6
"""Category `other` of the vault's list."""


@dataclass(frozen=True, slots=True)
class Listing:
    """How a model is offered. `token` None: open to every wallet; otherwise `min_balance` raw units open the gate."""

    model: ModelId
    price: Usdc
    token: Address | None = None
    min_balance: int = 0
    category: int = OTHER
    tags: tuple[str, ...] = field(default=())
    version: str = "1"


@dataclass(frozen=True, slots=True)
class Published:
    """Where the model is now, and the transaction that says so (None: the vault said so already)."""

    cid: Cid
    size: int
    transaction: Digest | None
    info: ModelInfo


@dataclass(frozen=True, slots=True)
class Publisher:
    """A publisher's wallet, the vault he registers in, and the store (URL, or Lighthouse) that takes his ciphertext."""

    wallet: Wallet
    vault: Address
    store: str | Lighthouse
    api_key: Secret | None = None

    async def publish(
        self,
        path: Path,
        listing: Listing,
        recipients: Sequence[Recipient],
        *,
        progress: Advance | None = None,
    ) -> Published:
        """Seal the model at `path` (a file or a folder) to `recipients`, store it, register it.

        Raises BadRequest (nothing there, unsafe names, no recipient), StorageFailed (also: the store names another
        CID), TransactionFailed (someone else's id, no funds), ChainUnavailable.
        """
        await self._require_mine(listing.model)
        with tempfile.TemporaryDirectory(prefix="divault-publish-") as folder:
            sealed = Path(folder, "model.age")
            size = await asyncio.to_thread(seal_path, path, sealed, recipients, listing.model)
            cid = await self._store(sealed, progress)
        transaction = await self.register(listing, cid)
        info = await self._known(listing.model)
        if info is None or info.cid != cid.text:
            raise TransactionFailed(f"the vault does not name {cid} for {listing.model} after its registration")
        return Published(cid, size, transaction, info)

    async def _store(self, sealed: Path, progress: Advance | None) -> Cid:
        if isinstance(self.store, Lighthouse):
            return (await self.store.upload(sealed, progress=progress)).cid
        return await publish_file(sealed, self.store, api_key=self.api_key, progress=progress)

    async def register(self, listing: Listing, cid: Cid) -> Digest | None:
        """Make the vault name `cid` for the model: register it, or change its content. None: it named it already."""
        contract = contracts.load("ModelVault")
        key = listing.model.key
        known = await self._known(listing.model)
        if known is not None and known.cid == cid.text:
            return None
        rest = (listing.category, list(listing.tags), listing.version)
        arguments: tuple[Any, ...]
        if known is not None:
            function, arguments = "updateModelMetadata", (key, cid.text, *rest[1:])
        elif listing.token is None:
            function, arguments = "registerOpenModel", (key, cid.text, listing.price.atomic, *rest)
        else:
            gated = (listing.token, listing.price.atomic, *rest, listing.min_balance)
            function, arguments = "registerModel", (key, cid.text, *gated)
        return (await self.wallet.invoke(contract, self.vault, function, *arguments)).transaction_hash

    async def _known(self, model: ModelId) -> ModelInfo | None:
        chain = self.wallet.chain
        try:
            return await VaultReader(chain, self.vault).model(model, await chain.head(fresh=True))
        except ModelUnknown:
            return None

    async def _require_mine(self, model: ModelId) -> None:
        info = await self._known(model)
        if info is not None and info.owner != self.wallet.address:
            raise TransactionFailed(
                f"the model id {model} belongs to {info.owner}; choose another name, or publish from that wallet",
                reason="model_exists",
            )


def seal_path(
    path: Path, sealed: Path, recipients: Sequence[Recipient | Passphrase], model: ModelId | None = None
) -> int:
    """Seal a file, or a folder as one tar, into a new file; gives its size in bytes. Raises BadRequest.

    Nodes open it for `model` alone, where that is given.
    """
    if path.is_dir():
        with tempfile.TemporaryFile() as packed, sealed.open("xb") as sink:
            pack_folder(path, packed)
            packed.seek(0)
            seal_stream(packed, sink, recipients, model)
    elif path.is_file():
        with path.open("rb") as source, sealed.open("xb") as sink:
            seal_stream(source, sink, recipients, model)
    else:
        raise BadRequest(f"{path} is neither a file nor a folder", field="path")
    return sealed.stat().st_size


def pack_folder(folder: Path, sink: BinaryIO) -> None:
    """Write the folder's files as a tar. Raises BadRequest for links and special files, and for an empty folder."""
    names = sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    if not names:
        raise BadRequest(f"{folder} is empty", field="path")
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in names:
            if path.is_symlink() or not path.is_file():
                raise BadRequest(f"{path} is a link or a special file; a model folder holds files only", field="path")
            entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
            entry.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(entry, file)
