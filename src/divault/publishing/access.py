"""Who opens a published model, changed by its owner: nodes let in by a new header, nodes shut out by a new key.

Rules:

1. What is changed is the file that the vault names: fetched by its CID, verified, opened by the owner's own identity.
2. No plaintext on a disk: to let a node in, nothing is opened; to shut one out, a quarter of a MiB is, at a time.
3. Lock, record and steps are those of a publish: killed at any moment and run again, one CID and one registration.
4. A record about another CID than the vault's is none. Without one the owner names the nodes, and when one is let in,
   the header has to have as many recipients as he named: who is left out of a record could not be shut out later.
5. A header names nobody, so nobody is told apart by it. And nobody can be shut out of a file that he once could open.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial

from divault.errors import BadRequest, ModelUnknown, NotAFile, TransactionFailed, WrongKey
from divault.ipfs.cid import parse_cid
from divault.publishing.publisher import Published, Publisher
from divault.publishing.records import Publication, Publications, SealedTo, Source, Stage
from divault.publishing.registration import Listing, Registry
from divault.publishing.sealing import HashedSink, durable_file, measure
from divault.storage.arrival import Progress
from divault.storage.fetcher import Fetcher
from divault.values import Address, Cid, Digest, GateType, ModelId, ModelInfo, VerifiedBlob
from divault.vault.age import Identity, Recipient
from divault.vault.keys import NodeIdentity
from divault.vault.rewrap import recipient_count, reseal, rewrap
from divault.vault.sealed import open_stream
from divault.vault.streams import Reader, Writer

_Make = Callable[[Reader, Writer], int]


@dataclass(frozen=True, slots=True)
class Standing:
    """What the vault says of a model, and this machine's record of who opens that. None: there is no such record."""

    info: ModelInfo
    record: Publication | None

    @property
    def cid(self) -> Cid:
        """The CID in the vault. Raises InvalidCID."""
        return parse_cid(self.info.cid)

    @property
    def nodes(self) -> tuple[SealedTo, ...]:
        """The nodes of the record."""
        return () if self.record is None else self.record.nodes

    @property
    def listing(self) -> Listing:
        """The offer as it stands, for a registration that changes the content alone."""
        info = self.info
        return Listing(info.model, info.price, None if info.gate is GateType.OPEN else info.token, info.min_balance)

    def missing(self, nodes: Iterable[SealedTo]) -> list[SealedTo]:
        """Those of the nodes that the record does not have, by their recipients; each once."""
        have = {node.recipient for node in self.nodes}
        return list({node.recipient: node for node in nodes if node.recipient not in have}.values())


@dataclass(frozen=True, slots=True)
class Changed:
    """What became of a change. `published` None: everything was so already, and nothing was done."""

    before: Cid
    nodes: tuple[SealedTo, ...]
    published: Published | None

    @property
    def cid(self) -> Cid:
        """The CID in the vault now."""
        return self.before if self.published is None else self.published.cid


@dataclass(frozen=True, slots=True)
class Access:
    """An owner with what he published, his records of it, a way to fetch it, and the identity that opens it."""

    publisher: Publisher
    records: Publications
    fetcher: Fetcher
    identity: Identity
    fetching: Progress | None = None

    async def standing(self, model: ModelId) -> Standing:
        """How the model stands now. Raises ModelUnknown, TransactionFailed (somebody else's), ChainUnavailable."""
        info = await self._registry.known(model)
        if info is None:
            raise ModelUnknown(f"the vault {self.publisher.vault} has no model {model}", model_id=model.text)
        if info.owner != self.publisher.wallet.address:
            raise TransactionFailed(
                f"{model} belongs to {info.owner}, and only its owner changes who serves it: use that wallet's key",
                reason="not_owner",
            )
        record = self.records.find(*self._where(model))
        current = record is not None and record.cid is not None and record.cid.text == info.cid
        return Standing(info, record if current else None)

    async def allow(self, model: ModelId, nodes: Sequence[SealedTo], present: Sequence[SealedTo] = ()) -> Changed:
        """Let nodes in: a file with a new header and the old payload, stored and registered.

        `present` are the nodes that open it now, for where no record says so. Raises BadRequest (no record and not
        everybody named; a passphrase, Lighthouse or folder model), WrongKey, SealedFileDamaged, UnsupportedModel,
        StorageFailed, TransactionFailed, NotReady (another change is at work), SettingsInvalid, ChainUnavailable.
        """
        async with self._settled(model) as found:
            record = found.record or await self._adopted(found, present)
            standing = replace(found, record=record)
            new = standing.missing(nodes)
            if not new:
                return Changed(standing.cid, standing.nodes, None)
            add = [node.recipient for node in new]
            make = partial(_rewrapped, NodeIdentity(self.identity), add, model)
            return await self._changed(standing, replace(record, nodes=(*record.nodes, *new)), make)

    async def revoke(self, model: ModelId, gone: Sequence[SealedTo], keep: Sequence[SealedTo] | None = None) -> Changed:
        """Shut nodes out of what comes: everything sealed anew, stored and registered. What they had, they have.

        `keep` names all nodes that stay; without it they are those of the record but `gone`. Raises as `allow`, and
        BadRequest when nobody would stay, and when who goes has the same key as somebody who stays.
        """
        async with self._settled(model) as standing:
            nodes = self.remaining(standing, gone, keep)
            record, owner = standing.record, self.identity.recipient
            if record is not None and frozenset(record.recipients) == {owner, *(node.recipient for node in nodes)}:
                return Changed(standing.cid, record.nodes, None)
            recipients = [*(node.recipient for node in nodes), owner]
            make = partial(_resealed, NodeIdentity(self.identity), recipients, model)
            if record is None:
                blob = await self._blob(standing)
                record = await asyncio.to_thread(self._record_of, standing, blob)
            return await self._changed(standing, replace(record, nodes=nodes, owner=owner), make)

    def remaining(
        self, standing: Standing, gone: Sequence[SealedTo], keep: Sequence[SealedTo] | None
    ) -> tuple[SealedTo, ...]:
        """The nodes that a revocation leaves. Raises BadRequest."""
        if keep is None and standing.record is None:
            raise BadRequest(
                f"this machine has no record of who opens {standing.info.cid}: name the nodes that stay with --keep, "
                "or --all to shut every node out",
                field="keep",
            )
        out = {node.recipient for node in gone}
        stays = keep if keep is not None else [node for node in standing.nodes if node.recipient not in out]
        if keep is None and not stays:
            raise BadRequest(
                "nobody would be left to serve it: name a node with --keep, or give --all if that is what you want",
                field="node",
            )
        if out & {self.identity.recipient, *(node.recipient for node in stays)}:
            raise BadRequest(
                "who goes has the same age identity as who stays, so the new file would open for both: give the one "
                "that stays another identity first, or open the file with another one of yours",
                field="node",
            )
        return tuple({node.recipient: node for node in stays}.values())

    # --- steps --------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _settled(self, model: ModelId) -> AsyncIterator[Standing]:
        """How it stands once a registration that was sent before is through; nobody else changes it meanwhile."""
        with self.records.locked(*self._where(model)):
            await self.publisher.settle(self.records, model)
            yield await self.standing(model)

    async def _changed(self, standing: Standing, target: Publication, make: _Make) -> Changed:
        publication = await asyncio.to_thread(self._kept, standing, target)
        if publication is None:
            blob = await self._blob(standing)
            publication = await asyncio.to_thread(self._made, blob, target, make)
        info = (await self.standing(target.model)).info
        if info.cid not in (standing.info.cid, publication.cid and publication.cid.text):
            raise TransactionFailed(
                f"the vault names {info.cid} for {info.model} now, and no longer {standing.info.cid}: run it again",
                reason="changed",
            )
        published = await self.publisher.finish(self.records, standing.listing, publication)
        return Changed(standing.cid, target.nodes, published)

    def _kept(self, standing: Standing, target: Publication) -> Publication | None:
        """The same change, begun before and interrupted; only on top of a record that still holds."""
        unfinished = self.records.unfinished(*self._where(target.model))
        if standing.record is None or unfinished is None:
            return None
        if not unfinished.seals_the_same(standing.record.source.sha256, target.recipients):
            return None
        return self.publisher.resumable(self.records, unfinished)

    async def _blob(self, standing: Standing) -> VerifiedBlob:
        try:
            return await self.fetcher.fetch(standing.cid, progress=self.fetching)
        except NotAFile as err:
            raise BadRequest(
                f"{standing.cid} is a folder on IPFS, whose files are sealed one by one: seal each to the nodes that "
                "shall have it, put the folder on IPFS again, and register its CID with updateModelMetadata",
                field="model_id",
            ) from err

    def _made(self, blob: VerifiedBlob, target: Publication, make: _Make) -> Publication:
        """The changed file in its place, and in the record."""
        place = self.records.sealed_file(*self._where(target.model))
        with _opened_by_owner(blob), durable_file(place) as sink, blob.path.open("rb", buffering=0) as source:
            make(source, sink)
        publication = replace(
            _unstored(target), stage=Stage.SEALED, size=sink.size, sha256=Digest(sink.sha256.digest())
        )
        self.records.save(publication)
        self.publisher.tell(f"sealed {sink.size} bytes")
        return publication

    async def _adopted(self, standing: Standing, present: Sequence[SealedTo]) -> Publication:
        """A record made of what the owner knows. Raises BadRequest when that can't be all."""
        if not present:
            raise BadRequest(
                f"this machine has no record of who opens {standing.info.cid}: name every node that opens it now with "
                "--keep, so that none of them is forgotten",
                field="keep",
            )
        blob = await self._blob(standing)
        record = await asyncio.to_thread(self._record_of, standing, blob)
        record = replace(record, nodes=tuple({node.recipient: node for node in present}.values()))
        with blob.path.open("rb", buffering=0) as file:
            count = recipient_count(file)
        if count != len(frozenset(record.recipients)):
            raise BadRequest(
                f"{standing.info.cid} is sealed to {count} recipients, and your own identity and the nodes that you "
                f"named are {len(frozenset(record.recipients))}: name them all with --keep, or seal it anew to those "
                "that shall have it with `divault nodes revoke --keep`",
                field="keep",
            )
        self.records.save(record)
        return record

    def _record_of(self, standing: Standing, blob: VerifiedBlob) -> Publication:
        """What a record of the vault's file would say, without its nodes; all of it is opened for its sha256."""
        plaintext, key = HashedSink(), NodeIdentity(self.identity)
        with _opened_by_owner(blob), blob.path.open("rb", buffering=0) as file:
            recipient_count(file)  # first, for what it refuses
            file.seek(0)
            open_stream(file, plaintext, [key])
        chain_id, vault, model = self._where(standing.info.model)
        return Publication(
            model=model,
            chain_id=chain_id,
            vault=vault,
            source=Source("", Digest(plaintext.sha256.digest())),
            nodes=(),
            owner=self.identity.recipient,
            size=blob.size,
            sha256=measure(blob.path)[0],
            stage=Stage.REGISTERED,
            cid=standing.cid,
        )

    def _where(self, model: ModelId) -> tuple[int, Address, ModelId]:
        return self.publisher.wallet.chain.chain_id, self.publisher.vault, model

    @property
    def _registry(self) -> Registry:
        return Registry(self.publisher.wallet, self.publisher.vault)


def _rewrapped(key: NodeIdentity, add: Sequence[Recipient], model: ModelId, source: Reader, sink: Writer) -> int:
    return rewrap(source, sink, key, add, model)


def _resealed(key: NodeIdentity, to: Sequence[Recipient], model: ModelId, source: Reader, sink: Writer) -> int:
    return reseal(source, sink, key, to, model)


def _unstored(publication: Publication) -> Publication:
    return replace(publication, cid=None, profile=None, store=None, sent=None, transaction=None)


@contextmanager
def _opened_by_owner(blob: VerifiedBlob) -> Iterator[None]:
    """Tell an owner whose identity does not fit what to do."""
    try:
        yield
    except WrongKey as err:
        raise WrongKey(
            f"your age identity does not open {blob.cid}: use the one that it was sealed to (--identity), or publish "
            "the model again without --no-owner-copy, which seals it to your own as well",
            cid=blob.cid.text,
        ) from err
