"""From a model on disk to a model for sale: seal it, store it by CID, register it in the vault.

Rules:

1. What leaves this machine is ciphertext.
2. The CID is computed here and compared with what the store answers; nothing is registered on a mismatch.
3. The seal names the model id, so that nodes open it under no other: whoever registers the same CID gets nothing.
4. Each step is in the record before the next one begins, and a step that the record shows is not done again: the same
   plaintext for the same recipients keeps its sealed file, its CID and its registration, whatever ended the process.
5. A model id of somebody else, one that is offered otherwise, or a gate that would let nobody in is refused before
   anything is sealed.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from divault.chain.wallet import Wallet
from divault.errors import BadRequest, TransactionFailed
from divault.publishing.records import Publication, Publications, SealedTo, Source, Stage
from divault.publishing.registration import Cost, Listing, Registry
from divault.publishing.sealing import is_complete, measure, seal_durably
from divault.storage.lighthouse import Lighthouse
from divault.storage.upload import Stored, UploadService, store_file
from divault.values import Address, Cid, Digest, ModelId, ModelInfo, Secret
from divault.vault.age import Recipient

Advance = Callable[[int, int | None], None]
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Published:
    """Where the model is now, and the transaction that says so (None: the vault said so already)."""

    cid: Cid
    size: int
    transaction: Digest | None
    info: ModelInfo


@dataclass(frozen=True, slots=True)
class _Order:
    """What to publish, how, and for whom."""

    path: Path
    listing: Listing
    nodes: tuple[SealedTo, ...]
    owner: Recipient | None

    @property
    def recipients(self) -> list[Recipient]:
        """Everybody who shall open it."""
        return [*(node.recipient for node in self.nodes), *((self.owner,) if self.owner else ())]


@dataclass(frozen=True, slots=True)
class Publisher:
    """A publisher's wallet, the vault he registers in, and the store (URL, or Lighthouse) that takes his ciphertext.

    Without `records` a publish that was interrupted begins anew. `tell` gets a line after each step, `progress` bytes
    of the upload.
    """

    wallet: Wallet
    vault: Address
    store: str | Lighthouse
    api_key: Secret | None = None
    records: Publications | None = None
    tell: Tell = lambda _line: None
    progress: Advance | None = None

    async def cost(self, listing: Listing) -> Cost:
        """What the registration would cost now.

        Raises TransactionFailed (someone else's id), BadRequest (the vault offers it otherwise), ChainUnavailable.
        """
        return await self._registry.cost(listing)

    async def require_gate(self, listing: Listing) -> None:
        """Return only if somebody could pass the listing's gate. Raises BadRequest naming it, ChainUnavailable."""
        await self._registry.require_gate(listing)

    def dropped(self, model: ModelId, nodes: Sequence[SealedTo]) -> list[SealedTo]:
        """Nodes that open what was registered from here, and would not open a seal for `nodes`."""
        if self.records is None:
            return []
        before = self.records.find(self.wallet.chain.chain_id, self.vault, model)
        kept = {node.recipient for node in nodes}
        return [node for node in (before.nodes if before else ()) if node.recipient not in kept]

    async def publish(
        self,
        path: Path,
        listing: Listing,
        nodes: Sequence[SealedTo],
        *,
        owner: Recipient | None = None,
        expected: Digest | None = None,
    ) -> Published:
        """Seal the model at `path` (a file or a folder) to the nodes and the owner, store it, register it.

        `expected` is what the plaintext must be, by its sha256 as `Source` has it. Raises BadRequest (nothing there,
        unsafe names, nobody to seal to, offered otherwise, a gate for nobody, other content than expected),
        StorageFailed (also: the store names another CID), TransactionFailed (someone else's id, no funds), NotReady
        (another publish of this model is at work), SettingsInvalid (the records), ChainUnavailable.
        """
        await self.require_gate(listing)
        await self._registry.require_offer(listing)
        chain_id = self.wallet.chain.chain_id
        with self._kept() as records, records.locked(chain_id, self.vault, listing.model):
            await self.settle(records, listing.model)
            await self._registry.require_offer(listing)  # again: what was settled may be offered otherwise
            order = _Order(path, listing, tuple(nodes), owner)
            publication = await self._kept_publication(records, order)
            if publication is None:
                publication = await asyncio.to_thread(self._sealed, records, order)
            if expected not in (None, publication.source.sha256):
                raise BadRequest(f"{path} changed while it was being published: run it again", field="path")
            return await self.finish(records, listing, publication)

    async def finish(self, records: Publications, listing: Listing, publication: Publication) -> Published:
        """Store and register a publication whose sealed file lies in its place; under the records' lock.

        Raises StorageFailed, TransactionFailed, ChainUnavailable.
        """
        if publication.stage is Stage.SEALED:
            stored = await self._stored(records.sealed_path(publication))
            publication = replace(
                publication, stage=Stage.STORED, cid=stored.cid, profile=stored.profile, store=self.store_name
            )
            records.save(publication)
            self.tell(f"stored as {stored.cid}")
        transaction = publication.transaction
        if publication.stage is Stage.STORED:
            transaction = await self._registry.register(listing, publication, records.save)
            self.tell("registered" if transaction is None else f"registered by {transaction}")
        return await self._confirmed(records, publication, transaction)

    async def _confirmed(
        self, records: Publications, publication: Publication, transaction: Digest | None
    ) -> Published:
        """What the vault says now, in the record too. Raises TransactionFailed when it says something else."""
        info, cid = await self._registry.known(publication.model), publication.cid
        if cid is None or info is None or info.cid != cid.text:
            raise TransactionFailed(f"the vault does not name {cid} for {publication.model} after its registration")
        if publication.stage is Stage.STORED:
            records.save(replace(publication, stage=Stage.REGISTERED, transaction=transaction))
        return Published(cid, publication.size, transaction, info)

    async def settle(self, records: Publications, model: ModelId) -> None:
        """Learn what became of a registration that was sent: another one must not race with it. Under the lock.

        Raises TransactionFailed while that is open.
        """
        pending = records.unfinished(self.wallet.chain.chain_id, self.vault, model)
        if pending is None or pending.sent is None:
            return
        transaction = await self._registry.settled(pending)
        info = await self._registry.known(model)
        if info is not None and pending.cid is not None and info.cid == pending.cid.text:
            records.save(replace(pending, stage=Stage.REGISTERED, transaction=transaction))

    async def _kept_publication(self, records: Publications, order: _Order) -> Publication | None:
        """A publication of the same plaintext, recipients and store that can be gone on with, or is there already."""
        where = (self.wallet.chain.chain_id, self.vault, order.listing.model)
        unfinished, registered = records.unfinished(*where), records.find(*where)
        if unfinished is None and registered is None:
            return None
        source, _ = await asyncio.to_thread(measure, order.path)
        recipients = order.recipients
        if unfinished is not None and unfinished.seals_the_same(source, recipients):
            resumable = await asyncio.to_thread(self.resumable, records, unfinished)
            if resumable is not None:
                return resumable
        info = await self._registry.known(order.listing.model)
        if registered is None or registered.cid is None or info is None or info.cid != registered.cid.text:
            return None
        same = registered.seals_the_same(source, recipients) and registered.store == self.store_name
        return replace(registered, transaction=None) if same else None

    def resumable(self, records: Publications, unfinished: Publication) -> Publication | None:
        """An unfinished publication as it can be gone on with: stored, or with its sealed file whole. Reads that."""
        if unfinished.stage is Stage.STORED and unfinished.store == self.store_name:
            return unfinished
        if is_complete(records.sealed_path(unfinished), unfinished.size, unfinished.sha256):
            return replace(unfinished, stage=Stage.SEALED, cid=None, sent=None)
        return None

    def _sealed(self, records: Publications, order: _Order) -> Publication:
        chain_id, model = self.wallet.chain.chain_id, order.listing.model
        place = records.sealed_file(chain_id, self.vault, model)
        sealed = seal_durably(order.path, place, order.recipients, model)
        publication = Publication(
            model=model,
            chain_id=chain_id,
            vault=self.vault,
            source=Source(str(order.path.absolute()), sealed.source_sha256),
            nodes=order.nodes,
            owner=order.owner,
            size=sealed.size,
            sha256=sealed.sha256,
        )
        records.save(publication)
        self.tell(f"sealed {sealed.size} bytes")
        return publication

    async def _stored(self, sealed: Path) -> Stored:
        if isinstance(self.store, Lighthouse):
            return await self.store.upload(sealed, progress=self.progress)
        return await store_file(sealed, UploadService(self.store, self.api_key), [self.store], progress=self.progress)

    @property
    def store_name(self) -> str:
        """How the records name the store."""
        return self.store if isinstance(self.store, str) else "lighthouse"

    @property
    def _registry(self) -> Registry:
        return Registry(self.wallet, self.vault)

    @contextmanager
    def _kept(self) -> Iterator[Publications]:
        if self.records is not None:
            yield self.records
            return
        with tempfile.TemporaryDirectory(prefix="divault-publish-") as folder:
            yield Publications(Path(folder))
