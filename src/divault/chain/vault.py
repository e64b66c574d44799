"""What the ModelVault says about a model at one block: the published tuple, the payment token and the gate.

Rules:

1. All three are read at the same block hash, in one round trip.
2. The tuple is the published dynamic struct in its canonical encoding (every offset, length, padding byte and the end
   where Solidity puts them), not the six flat outputs that the published Python ABI declares. Text is bounded UTF-8.
3. A vault of the published shape has neither `paymentToken` nor `gate`: where these revert or answer nothing, the
   configured payment token and an ERC-20 gate hold. Any other odd answer is ChainUnavailable, never a default.
4. A zero owner, or a revert, is an unknown model.
"""

from __future__ import annotations

import contextlib

from msgspec.structs import replace

from divault.chain.answers import Reverted
from divault.chain.blockcache import Asked, BlockCache
from divault.chain.chain import Chain, ContractCall
from divault.chain.records import Malformed
from divault.errors import AccessDenied, ChainUnavailable, ModelUnknown
from divault.values import Address, BlockRef, GateType, ModelId, ModelInfo, Usdc

_GET_MODEL_INFO = bytes.fromhex("b005b08b")  # getModelInfo(bytes32)
_PAYMENT_TOKEN = bytes.fromhex("01d46ce2")  # paymentToken(bytes32)
_GATE = bytes.fromhex("5d818bd4")  # gate(bytes32)

_MAX_RETURNED = 64 * 1024  # an entry with every field at its bound takes half of it
_MAX_TEXT = 256  # bytes of a CID, a version or a tag; the longest CID in use has 108
_MAX_TAGS = 64
_FIELDS = 11
MOST_AHEAD = 64
"""Models, and as many wallets, that are read at a new head before anybody asks: those let in since the last one."""


class VaultReader:
    """Reads one vault through one chain, and remembers what it read by block hash."""

    def __init__(
        self, chain: Chain, vault: Address, default_payment_token: Address = Address.ZERO, *, cache_size: int = 4096
    ) -> None:
        """`default_payment_token` is for vaults that name none (rule 3); zero is a token that no node serves."""
        self.vault = vault
        self.chain = chain
        self._default_payment_token = default_payment_token
        self._models: BlockCache[tuple[str, bytes], ModelInfo] = BlockCache(cache_size)
        self._asked: Asked[str, ModelId] = Asked(MOST_AHEAD)

    async def model(self, model: ModelId, block: BlockRef) -> ModelInfo:
        """The model at exactly this block, active or not.

        Raises ModelUnknown, ChainUnavailable, AccessDenied (a gate of a kind that this version doesn't know).
        """
        key = (model.text, block.hash.raw)  # plain values: hashing dataclasses would be most of a warm check
        return await self._models.get(key, lambda: self._read(model, block))

    def note(self, model: ModelId) -> None:
        """It will be asked about again: read it ahead at the next head."""
        self._asked.note(model.text, model)

    async def read_ahead(self, block: BlockRef) -> None:
        """Read what was noted since the last time, in one batch, at a head that is not used yet.

        Raises ChainUnavailable.
        """
        asked = self._asked.take()
        found = await self.chain.calls([read for model in asked for read in self._reads(model)], block) if asked else []
        for place, model in enumerate(asked):
            with contextlib.suppress(ModelUnknown, AccessDenied, ChainUnavailable):  # who asks is told
                entry = self._entry(model, *found[3 * place : 3 * place + 3])
                self._models.put((model.text, block.hash.raw), entry)

    async def _read(self, model: ModelId, block: BlockRef) -> ModelInfo:
        return self._entry(model, *await self.chain.calls(self._reads(model), block))

    def _reads(self, model: ModelId) -> list[ContractCall]:
        selectors = (_GET_MODEL_INFO, _PAYMENT_TOKEN, _GATE)
        return [ContractCall(self.vault, selector + model.key.raw) for selector in selectors]

    def _entry(
        self, model: ModelId, info: bytes | Reverted, payment_token: bytes | Reverted, gate: bytes | Reverted
    ) -> ModelInfo:
        if isinstance(info, Reverted):
            raise _unknown(model)
        if not info:
            raise ChainUnavailable(f"no ModelVault answers at {self.vault}: the vault's address or the chain is wrong")
        try:
            entry = parse_model(model, info, _payment_token(payment_token) or self._default_payment_token)
            kind, hold_blocks = _gate(gate)
        except Malformed as err:
            raise ChainUnavailable(f"the vault at {self.vault} answers what no ModelVault does: {err}") from err
        except OverflowError as err:
            raise ModelUnknown(f"{model}: its entry in the vault is not served: {err}", model_id=model.text) from err
        if entry.owner == Address.ZERO:
            raise _unknown(model)
        if kind not in tuple(GateType):
            raise AccessDenied(f"the gate of {model} is of type {kind}, which this node does not know: it stays closed")
        return replace(entry, gate=GateType(kind), hold_blocks=hold_blocks)


def parse_model(model: ModelId, returned: bytes, payment_token: Address) -> ModelInfo:
    """The published tuple, with a token gate and this payment token.

    Raises Malformed for bytes that Solidity would not return, OverflowError for a field over its bound.
    """
    if len(returned) > _MAX_RETURNED:
        raise OverflowError(f"it has {len(returned)} bytes and {_MAX_RETURNED} are read")
    words = _Words(returned)
    if words.number() != 32:
        raise Malformed("not one dynamic tuple")
    words.begin_tuple(_FIELDS)
    cid_at, token, price, owner, active = words.number(), words.address(), words.number(), words.address(), words.bool()
    total, created, updated = words.number(), words.number(), words.number()
    tags_at, version_at, minimum = words.number(), words.number(), words.number()
    words.expect_tail(cid_at)
    cid = words.text()
    words.expect_tail(tags_at)
    tags = words.texts()
    words.expect_tail(version_at)
    version = words.text()
    words.expect_end()
    return ModelInfo(
        model=model,
        cid=cid,
        token=token,
        price=Usdc(price),
        owner=owner,
        active=active,
        total_inferences=total,
        created_at=created,
        updated_at=updated,
        tags=tags,
        version=version,
        min_balance=minimum,
        payment_token=payment_token,
        gate=GateType.TOKEN,
    )


class _Words:
    """A cursor over canonical ABI words; every method raises Malformed instead of guessing."""

    def __init__(self, data: bytes) -> None:
        if len(data) % 32:
            raise Malformed("not whole words")
        self._data = data
        self._at = 0
        self._base = 0

    def take(self, size: int) -> bytes:
        """The next bytes."""
        piece = self._data[self._at : self._at + size]
        if len(piece) != size:
            raise Malformed("cut short")
        self._at += size
        return piece

    def number(self) -> int:
        """A uint256."""
        return int.from_bytes(self.take(32), "big")

    def address(self) -> Address:
        """A word that is an address, zero included."""
        word = self.take(32)
        if any(word[:12]):
            raise Malformed("an address of more than 20 bytes")
        return Address(word[12:])

    def bool(self) -> bool:
        """A word that is 0 or 1."""
        value = self.number()
        if value > 1:
            raise Malformed("a truth value other than 0 and 1")
        return value == 1

    def text(self) -> str:
        """A text of at most `_MAX_TEXT` bytes. Raises OverflowError beyond that, or when it isn't UTF-8."""
        size = self.number()
        if size > _MAX_TEXT:
            raise OverflowError(f"a text of more than {_MAX_TEXT} bytes")
        padded = self.take(-(-size // 32) * 32)
        if any(padded[size:]):
            raise Malformed("padding that is not zero")
        try:
            return padded[:size].decode()
        except UnicodeDecodeError:
            raise OverflowError("a text that is not UTF-8") from None

    def texts(self) -> tuple[str, ...]:
        """At most `_MAX_TAGS` texts. Raises OverflowError beyond that."""
        count = self.number()
        if count > _MAX_TAGS:
            raise OverflowError(f"more than {_MAX_TAGS} tags")
        outer, self._base = self._base, self._at
        offsets = [self.number() for _ in range(count)]
        values = []
        for offset in offsets:
            self.expect_tail(offset)
            values.append(self.text())
        self._base = outer
        return tuple(values)

    def begin_tuple(self, fields: int) -> None:
        """From here on offsets count from this position; its head of `fields` words follows."""
        self._base = self._at
        if len(self._data) < self._at + 32 * fields:
            raise Malformed("cut short")

    def expect_tail(self, offset: int) -> None:
        """The next dynamic value starts here, as its offset in the head says."""
        if self._base + offset != self._at:
            raise Malformed("an offset that points elsewhere")

    def expect_end(self) -> None:
        if self._at != len(self._data):
            raise Malformed("bytes after the end")


def _payment_token(returned: bytes | Reverted) -> Address | None:
    """The token of the price; None where the vault names none."""
    if isinstance(returned, Reverted) or not returned:
        return None
    words = _Words(returned)
    token = words.address()
    words.expect_end()
    return None if token == Address.ZERO else token


def _gate(returned: bytes | Reverted) -> tuple[int, int]:
    """Type and hold blocks; a vault without gates has ERC-20 gates. The id belongs to types that have one."""
    if isinstance(returned, Reverted) or not returned:
        return GateType.TOKEN, 0
    words = _Words(returned)
    kind, _, hold_blocks = words.number(), words.number(), words.number()
    words.expect_end()
    return kind, hold_blocks


def _unknown(model: ModelId) -> ModelUnknown:
    return ModelUnknown(f"the vault has no model {model}: check its spelling and the vault", model_id=model.text)
