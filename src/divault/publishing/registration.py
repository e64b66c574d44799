"""A model's entry in the vault: what it says, which call changes it, what that costs, and that call made once.

Rules:

1. A registration is signed, kept in the record, and only then sent; run again, the same bytes are sent again.
2. Only when it can't be mined any more, or nobody knows it and it is refused, another one is signed: in the second
   case with the same nonce, so that one of the two at most is ever mined.
3. An entry that names the CID already is left alone. One of another owner, or with another price or gate than asked
   for, is refused before anything leaves this machine.
4. So is a gate that tells no balance: nodes would let nobody in. An entry that has such a gate already may be sealed to
   other nodes, since a token may be at rest for a while.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from divault.chain import contracts
from divault.chain.gates import told_balance
from divault.chain.records import TransactionReceipt
from divault.chain.vault import VaultReader
from divault.chain.wallet import Wallet
from divault.errors import BadRequest, ModelUnknown, TransactionFailed
from divault.publishing.records import Publication
from divault.values import Address, Cid, Digest, GateType, ModelId, ModelInfo, Usdc

OTHER = 6
"""Category `other` of the vault's list."""
_UNCERTAIN = ("unknown", "not_mined")
"""Reasons of a failure after which the transaction may be mined yet."""
_ANY_CID = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"
"""For estimates: as long as every CID that a store gives us."""


@dataclass(frozen=True, slots=True)
class Listing:
    """How a model is offered. `token` None: open to every wallet; otherwise `min_balance` raw units open the gate.

    Without tags or version an entry keeps those that it has.
    """

    model: ModelId
    price: Usdc
    token: Address | None = None
    min_balance: int = 0
    category: int = OTHER
    tags: tuple[str, ...] = field(default=())
    version: str = ""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a registration costs at most, and what the wallet has: gas, wei per gas, wei."""

    gas: int
    gas_price: int
    balance: int

    @property
    def wei(self) -> int:
        """All of it, in wei."""
        return self.gas * self.gas_price


@dataclass(frozen=True, slots=True)
class Registry:
    """One vault, and the wallet that registers in it."""

    wallet: Wallet
    vault: Address

    async def known(self, model: ModelId) -> ModelInfo | None:
        """The entry at the newest block; None for an unknown model. Raises ChainUnavailable."""
        chain = self.wallet.chain
        try:
            return await VaultReader(chain, self.vault).model(model, await chain.head(fresh=True))
        except ModelUnknown:
            return None

    async def require_offer(self, listing: Listing) -> ModelInfo | None:
        """The entry that a publish would change, if there is one.

        Raises TransactionFailed for somebody else's id, BadRequest where price or gate differ from the listing's.
        """
        info = await self.known(listing.model)
        if info is None:
            return None
        if info.owner != self.wallet.address:
            raise TransactionFailed(
                f"the model id {listing.model} belongs to {info.owner}: choose another one, or use that wallet",
                reason="model_exists",
            )
        token = None if info.gate is GateType.OPEN else info.token
        if (info.price, token, info.min_balance) != (listing.price, listing.token, listing.min_balance):
            gate = "open" if token is None else f"{token}:{info.min_balance}"
            raise BadRequest(
                f"the vault offers {listing.model} at {info.price} USDC with the gate {gate}; publishing changes its "
                "content alone: ask for that price and gate, or change them with updatePrice and setGate first",
                field="price" if info.price != listing.price else "gate",
            )
        return info

    async def require_gate(self, listing: Listing) -> None:
        """Return only if the gate's token tells the owner's balance, as nodes read callers'. An open gate has none.

        Raises BadRequest, ChainUnavailable.
        """
        if listing.token is None:
            return
        chain = self.wallet.chain
        head = await chain.head(fresh=True)
        told = await told_balance(chain, listing.token, self.wallet.address, head)
        if isinstance(told, str):
            there = bool(await chain.code(listing.token, head))
            why = f"answers balanceOf with nothing that counts: {told}" if there else "is no contract"
            raise BadRequest(
                f"the gate would let nobody in: on chain {chain.chain_id} {listing.token} {why}. Name the token that "
                "callers have to hold, or say open",
                field="gate",
            )

    async def cost(self, listing: Listing) -> Cost:
        """What the registration would cost now. Raises as `require_offer`, and TransactionFailed, ChainUnavailable."""
        function, arguments = _call(listing, _ANY_CID, await self.require_offer(listing))
        contract = contracts.load("ModelVault")
        gas, price = await self.wallet.cost(contract, self.vault, function, *arguments)
        return Cost(gas, price, await self.wallet.chain.balance(self.wallet.address))

    async def register(
        self, listing: Listing, publication: Publication, save: Callable[[Publication], None]
    ) -> Digest | None:
        """The transaction that made the vault name the publication's CID. None: it named it without one of ours.

        `save` is called with the signed registration before that is sent. Raises TransactionFailed, ChainUnavailable.
        """
        receipt, nonce = await self._delivered_before(publication)
        known = await self.known(listing.model)
        if known is not None and known.cid == _text(publication.cid):
            return None if receipt is None else receipt.transaction_hash
        function, arguments = _call(listing, _text(publication.cid), known)
        signed = await self.wallet.sign(contracts.load("ModelVault"), self.vault, function, *arguments, nonce=nonce)
        save(replace(publication, sent=signed))
        return (await self.wallet.deliver(signed)).transaction_hash

    async def settled(self, publication: Publication) -> Digest | None:
        """The registration of the publication, if it was mined and succeeded; it is sent again where that is open.

        Raises TransactionFailed when it may be mined yet, ChainUnavailable.
        """
        receipt, _ = await self._delivered_before(publication)
        return None if receipt is None else receipt.transaction_hash

    async def _delivered_before(self, publication: Publication) -> tuple[TransactionReceipt | None, int | None]:
        """The receipt of the registration that was sent; else the nonce for another one. Raises TransactionFailed."""
        sent = publication.sent
        if sent is None:
            return None, None
        try:
            return await self.wallet.deliver(sent), None
        except TransactionFailed as err:
            if err.data.get("reason") in _UNCERTAIN:
                raise
        used = await self.wallet.chain.nonce(self.wallet.address, mined=True) > sent.nonce
        return None, None if used else sent.nonce


def _call(listing: Listing, cid: str, known: ModelInfo | None) -> tuple[str, tuple[Any, ...]]:
    """Which function of the vault to call, and with what."""
    key = listing.model.key
    if known is not None:
        return "updateModelMetadata", (key, cid, list(listing.tags or known.tags), listing.version or known.version)
    rest = (listing.category, list(listing.tags), listing.version or "1")
    if listing.token is None:
        return "registerOpenModel", (key, cid, listing.price.atomic, *rest)
    return "registerModel", (key, cid, listing.token, listing.price.atomic, *rest, listing.min_balance)


def _text(cid: Cid | None) -> str:
    if cid is None:
        raise ValueError("only what is stored can be registered")
    return cid.text
