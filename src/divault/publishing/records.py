"""What a publisher's machine remembers of each model that it published, so that a publish can be killed at any moment.

Rules:

1. One private JSON file (0600) for each chain, vault and model; replaced whole, and durable before `save` returns.
2. It holds two things at most: the publication that was registered last, and one that is not finished yet.
3. Sealing is random, so the sealed file is kept beside it until the vault names it: who runs the same publish again
   stores and registers the same bytes, under the same CID.
4. A registration is written down, signed, before it is sent: it is sent again as it is, never made anew while it may
   still be mined.
5. Whoever changes anything holds the model's lock, which ends with his process.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Self

import msgspec

from divault.chain.wallet import SignedTransaction
from divault.client.asynchronous import NodeInfo
from divault.errors import DivaultError, NotReady, SettingsInvalid
from divault.ipfs.cid import parse_cid
from divault.values import Address, Cid, Digest, ModelId
from divault.vault.age import Recipient

_MAX_BYTES = 1 << 20
"""A thousand nodes take a quarter of it, and a signed registration some kilobytes."""


class Stage(StrEnum):
    """How far a publication is."""

    SEALED = "sealed"
    """The sealed file lies beside the record."""
    STORED = "stored"
    """The store has it under `cid`."""
    REGISTERED = "registered"
    """The vault names it; the sealed file is gone."""


@dataclass(frozen=True, slots=True)
class SealedTo:
    """A node that opens the model."""

    url: str
    address: Address
    recipient: Recipient

    @classmethod
    def of(cls, node: NodeInfo) -> Self:
        """A node that proved who it is. Raises BadRequest when its recipient is none."""
        return cls(node.url, node.address, Recipient.parse(node.age_recipient))


@dataclass(frozen=True, slots=True)
class Source:
    """What was sealed: where it lay, and the sha256 of the file, or of the tar that the folder became."""

    path: str
    sha256: Digest


@dataclass(frozen=True, slots=True)
class Publication:
    """One sealing of a model, and what became of it."""

    model: ModelId
    chain_id: int
    vault: Address
    source: Source
    nodes: tuple[SealedTo, ...]
    owner: Recipient | None
    """The owner's own recipient: with its identity he seals to other nodes later, without the plaintext."""
    size: int
    """Bytes of the sealed file."""
    sha256: Digest
    """Of the sealed file."""
    stage: Stage = Stage.SEALED
    cid: Cid | None = None
    """Set from `stored` on."""
    profile: str | None = None
    """How the store cut the file into blocks."""
    store: str | None = None
    """The store: its URL, or `lighthouse`."""
    sent: SignedTransaction | None = None
    """The registration, from the moment before it was sent."""
    transaction: Digest | None = None
    """The registration that was mined; None while it was not, and where the vault named the CID already."""

    @property
    def recipients(self) -> tuple[Recipient, ...]:
        """Everybody who opens the sealed file: the nodes, then the owner."""
        return (*(node.recipient for node in self.nodes), *((self.owner,) if self.owner else ()))

    def seals_the_same(self, source: Digest, recipients: Iterable[Recipient]) -> bool:
        """True when a new seal would hold the same plaintext for the same recipients."""
        return self.source.sha256 == source and frozenset(self.recipients) == frozenset(recipients)


class Publications:
    """The records of one folder. Safe to use from several processes; `locked` keeps two apart at one model."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made, private, when it is first written to."""
        self._folder = folder

    def find(self, chain_id: int, vault: Address, model: ModelId) -> Publication | None:
        """What was registered last from here; None when nothing was. Raises SettingsInvalid for a damaged record."""
        return self._read(chain_id, vault, model)[0]

    def unfinished(self, chain_id: int, vault: Address, model: ModelId) -> Publication | None:
        """A publication whose registration nobody has seen yet. Raises SettingsInvalid for a damaged record."""
        return self._read(chain_id, vault, model)[1]

    def vaults(self, chain_id: int, model: ModelId) -> list[Address]:
        """Vaults of this chain in which the model was published from here, or begun to be."""
        names = sorted(path.name.split("-") for path in self._folder.glob(f"{chain_id}-0x*-{model.key}.json"))
        return [Address.parse(name[1]) for name in names]

    def save(self, publication: Publication) -> None:
        """Durable when this returns. A registered one ends the unfinished one, and its sealed file is removed.

        Call it under `locked`. Raises SettingsInvalid when the folder can't be written.
        """
        registered, _ = self._read(publication.chain_id, publication.vault, publication.model)
        finished = publication.stage is Stage.REGISTERED
        if finished:
            publication = replace(publication, sent=None)
        pair = (publication, None) if finished else (registered, publication)
        file = _File(
            registered=None if pair[0] is None else _Row.of(pair[0]),
            unfinished=None if pair[1] is None else _Row.of(pair[1]),
        )
        with _written_to(self._folder):
            _replace(self._path(publication, "json"), msgspec.json.format(msgspec.json.encode(file)))
            if finished:
                self.sealed_path(publication).unlink(missing_ok=True)

    def sealed_path(self, publication: Publication) -> Path:
        """Where the sealed file of an unfinished publication lies, complete."""
        return self._path(publication, "age")

    def sealed_file(self, chain_id: int, vault: Address, model: ModelId) -> Path:
        """The same place, before there is a publication. The folder exists. Raises SettingsInvalid."""
        with _written_to(self._folder):
            return self._folder / f"{_stem(chain_id, vault, model)}.age"

    @contextmanager
    def locked(self, chain_id: int, vault: Address, model: ModelId) -> Iterator[None]:
        """Nobody else publishes this model from this folder meanwhile. Raises NotReady when somebody does already."""
        with _written_to(self._folder):
            path = self._folder / f"{_stem(chain_id, vault, model)}.lock"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise NotReady(
                f"{model} is being published from {self._folder} already: wait for it", retry_after=5
            ) from None
        try:
            yield
        finally:
            os.close(fd)  # never removed: another process may hold the same file open and wait for its lock

    def _path(self, publication: Publication, suffix: str) -> Path:
        return self._folder / f"{_stem(publication.chain_id, publication.vault, publication.model)}.{suffix}"

    def _read(self, chain_id: int, vault: Address, model: ModelId) -> tuple[Publication | None, Publication | None]:
        path = self._folder / f"{_stem(chain_id, vault, model)}.json"
        try:
            with path.open("rb") as file:
                raw = file.read(_MAX_BYTES)
        except FileNotFoundError:
            return None, None
        except OSError as err:
            raise SettingsInvalid(f"{path} can't be read: {err.strerror}") from err
        try:
            told = msgspec.json.decode(raw, type=_File)
            pair = tuple(None if row is None else row.publication() for row in (told.registered, told.unfinished))
        except (msgspec.MsgspecError, DivaultError, ValueError) as err:
            raise SettingsInvalid(
                f"{path} is damaged, or of a newer version: move it away, then the model is sealed and stored anew"
            ) from err
        mine = (chain_id, vault, model.key)
        if any(entry and (entry.chain_id, entry.vault, entry.model.key) != mine for entry in pair):
            raise SettingsInvalid(f"{path} is about another model: move it away")
        return pair[0], pair[1]


# --- on disk --------------------------------------------------------------------------------------------------------


class _Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    url: str
    address: str
    age_recipient: str


class _Sent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    transaction: str
    nonce: int
    raw: bytes


class _Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model_id: str
    chain_id: int
    vault: str
    source: str
    source_sha256: str
    nodes: tuple[_Node, ...]
    owner_recipient: str | None
    size: int
    sha256: str
    stage: Stage
    cid: str | None
    profile: str | None
    store: str | None
    sent: _Sent | None
    transaction: str | None

    @classmethod
    def of(cls, it: Publication) -> Self:
        return cls(
            model_id=it.model.text,
            chain_id=it.chain_id,
            vault=str(it.vault),
            source=it.source.path,
            source_sha256=str(it.source.sha256),
            nodes=tuple(_Node(node.url, str(node.address), str(node.recipient)) for node in it.nodes),
            owner_recipient=_text(it.owner),
            size=it.size,
            sha256=str(it.sha256),
            stage=it.stage,
            cid=_text(it.cid),
            profile=it.profile,
            store=it.store,
            sent=None if it.sent is None else _Sent(str(it.sent.hash), it.sent.nonce, it.sent.raw),
            transaction=_text(it.transaction),
        )

    def publication(self) -> Publication:
        """Raises DivaultError for a value that is none."""
        if self.stage is not Stage.SEALED and self.cid is None:
            raise ValueError("what is stored has a CID")
        sent = self.sent
        return Publication(
            model=ModelId.parse(self.model_id),
            chain_id=self.chain_id,
            vault=Address.parse(self.vault),
            source=Source(self.source, Digest.parse(self.source_sha256)),
            nodes=tuple(
                SealedTo(node.url, Address.parse(node.address), Recipient.parse(node.age_recipient))
                for node in self.nodes
            ),
            owner=None if self.owner_recipient is None else Recipient.parse(self.owner_recipient),
            size=self.size,
            sha256=Digest.parse(self.sha256),
            stage=self.stage,
            cid=None if self.cid is None else parse_cid(self.cid),
            profile=self.profile,
            store=self.store,
            sent=None if sent is None else SignedTransaction(Digest.parse(sent.transaction), sent.nonce, sent.raw),
            transaction=None if self.transaction is None else Digest.parse(self.transaction),
        )


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    registered: _Row | None
    unfinished: _Row | None
    version: Literal[1] = 1


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _stem(chain_id: int, vault: Address, model: ModelId) -> str:
    return f"{chain_id}-{str(vault).lower()}-{model.key}"


@contextmanager
def _written_to(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield
    except OSError as err:
        raise SettingsInvalid(f"{folder} can't be written: {err.strerror}", setting="DIVAULT_STATE_DIR") from err


def _replace(path: Path, content: bytes) -> None:
    """Replace a file whole: whoever reads it, after a crash too, finds the old content or the new."""
    draft = path.with_suffix(".draft")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside the folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
