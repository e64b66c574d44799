"""Gates: does this wallet get in, at this block? The only maker of `Grant`.

Rules:

1. A grant names its block, and everything it rests on (model, balance) was read at that block's hash.
2. Raw integers only. A balance is exactly 32 returned bytes; a call that fails or returns anything else denies: it is
   never 0 and never enough.
3. A denial at a cached head is checked again at a fresh one before it stands, so that tokens that came in just now
   count. A grant at a cached head stands: a transfer away closes the gate within `head_ttl_s`, at the next head.
4. The chain out of reach is ChainUnavailable, never access.
5. An inactive model, a token gate without token or minimum, a gate of an unknown type, a price in a token that this
   node doesn't serve: refused.

A check at a head that was seen before costs no RPC call. For who was let in at the last head the same is read at the
next one before it is used, as far as there is time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Mapping
from typing import Protocol

from divault.chain import erc20
from divault.chain.answers import Reverted
from divault.chain.blockcache import Asked, BlockCache
from divault.chain.chain import Chain, ContractCall
from divault.chain.records import Malformed
from divault.chain.vault import MOST_AHEAD, VaultReader
from divault.errors import AccessDenied, ChainUnavailable, ModelUnknown, PaymentRejected
from divault.values import Address, BlockRef, GateType, Grant, ModelId, ModelInfo, Principal

_GAS_AHEAD, _TOGETHER = 100_000, 32
"""Of a balance that is read ahead, and how many in one batch: with so much gas an answer has 400 kB of JSON at most."""


class Gate(Protocol):
    """One way to decide. The rules about head, model and price are kept by `Gates`, not by implementations."""

    async def check(self, principal: Principal, model: ModelInfo, block: BlockRef) -> Grant:
        """A grant, from reads at exactly this block. Raises AccessDenied, ChainUnavailable."""
        ...


class OpenGate:
    """Lets everyone in who signed; the vault says so by its gate type, never by leaving fields empty."""

    async def check(self, principal: Principal, model: ModelInfo, block: BlockRef) -> Grant:
        """A grant."""
        return Grant(principal, model, block, have=0)


class TokenGate:
    """Lets in who holds at least the minimum of the model's ERC-20, now and `hold_blocks` ago."""

    def __init__(self, chain: Chain, *, cache_size: int = 65_536) -> None:
        """`cache_size` balances are remembered, about 300 bytes each."""
        self._chain = chain
        self._balances: BlockCache[bytes, int | str] = BlockCache(cache_size)
        self._asked: Asked[bytes, tuple[Address, Address]] = Asked(MOST_AHEAD)
        self._earlier: BlockCache[tuple[int, bytes], BlockRef | None] = BlockCache(cache_size)

    async def check(self, principal: Principal, model: ModelInfo, block: BlockRef) -> Grant:
        """A grant. Raises AccessDenied with what would open the gate, ChainUnavailable."""
        if model.token == Address.ZERO or model.min_balance == 0:
            raise AccessDenied(
                f"the gate of {model.model} names no token or no minimum, so nobody is let in: "
                "its owner has to set a token and a minimum, or declare the gate open",
                **_named(model, block),
            )
        have = await self._balance(principal.user, model, block)
        if have < model.min_balance:
            raise _short(principal, model, block, have)
        if model.hold_blocks:
            await self._require_held(principal, model, block)
        self._asked.note(model.token.raw + principal.user.raw, (model.token, principal.user))
        return Grant(principal, model, block, have)

    async def _require_held(self, principal: Principal, model: ModelInfo, block: BlockRef) -> None:
        height = max(0, block.number - model.hold_blocks)
        earlier = await self._earlier.get((height, block.hash.raw), lambda: self._chain.block_by_number(height))
        have = 0 if earlier is None else await self._balance(principal.user, model, earlier)
        if have < model.min_balance:
            raise AccessDenied(
                f"wallet {principal.user} held {have} of {model.token} at block {height}; {model.min_balance} must be "
                f"there for {model.hold_blocks} blocks: keep them and call again later",
                have=str(have),
                **_named(model, block),
            )

    async def _balance(self, user: Address, model: ModelInfo, block: BlockRef) -> int:
        token = model.token
        key = token.raw + user.raw + block.hash.raw
        balance = await self._balances.get(key, lambda: told_balance(self._chain, token, user, block))
        if isinstance(balance, int):
            return balance
        raise AccessDenied(
            f"the token {token} tells no balance at block {block.number} ({balance}), so the gate stays closed: "
            "the model's owner has to name a working ERC-20",
            **_named(model, block),
        )

    async def read_ahead(self, block: BlockRef) -> None:
        """Read the balances of those who were let in since the last time, at a head that is not used yet.

        A batch for each token, since one may answer anything, and with so little gas that all answers together stay far
        below what an endpoint may say at once. What is no plain balance is read again when it is asked for.
        """
        holders: dict[Address, list[Address]] = {}
        for token, user in self._asked.take():
            holders.setdefault(token, []).append(user)
        parts = [
            (token, users[start : start + _TOGETHER])
            for token, users in holders.items()
            for start in range(0, len(users), _TOGETHER)
        ]
        await asyncio.gather(*(self._read_together(token, users, block) for token, users in parts))

    async def _read_together(self, token: Address, users: list[Address], block: BlockRef) -> None:
        reads = [ContractCall(token, erc20.balance_of(user), _GAS_AHEAD) for user in users]
        with contextlib.suppress(ChainUnavailable):
            for user, returned in zip(users, await self._chain.calls(reads, block), strict=True):
                if isinstance(balance := _balance_in(returned), int):
                    self._balances.put(token.raw + user.raw + block.hash.raw, balance)


async def told_balance(chain: Chain, token: Address, user: Address, block: BlockRef) -> int | str:
    """The balance in raw units as the token tells it, or why there is none. Raises ChainUnavailable."""
    try:
        return _balance_in(await chain.call(token, erc20.balance_of(user), block))
    except Reverted as err:
        return _balance_in(err)


def _balance_in(returned: bytes | Reverted) -> int | str:
    if isinstance(returned, Reverted):
        return f"reverted: {returned.reason}"
    try:
        return erc20.parse_uint(returned)
    except Malformed as err:
        return str(err)


class Gates:
    """The gate of any model of one vault; what the service asks."""

    def __init__(
        self,
        chain: Chain,
        vault: VaultReader,
        payment_tokens: Collection[Address],
        *,
        gates: Mapping[GateType, Gate] | None = None,
    ) -> None:
        """`payment_tokens`: those in which this node serves prices. `gates` replaces the built-in ones."""
        self._chain = chain
        self._vault = vault
        self._payment_tokens = frozenset(payment_tokens)
        tokens = TokenGate(chain)
        built_in: dict[GateType, Gate] = {GateType.TOKEN: tokens, GateType.OPEN: OpenGate()}
        self._gates = built_in if gates is None else dict(gates)
        for work in (vault.read_ahead, tokens.read_ahead):
            chain.before_head(work)

    async def info(self, model: ModelId) -> ModelInfo:
        """What the vault says about the model at the head, active or not. Raises ModelUnknown, ChainUnavailable."""
        return await self._vault.model(model, await self._chain.head())

    async def check(self, principal: Principal, model: ModelId, block: BlockRef | None = None) -> Grant:
        """A grant at the head, or at exactly `block` where given.

        Raises AccessDenied (with have, need, token, block, block_hash), ModelUnknown (also: deactivated),
        PaymentRejected (a price in a token not served here), ChainUnavailable, ChainStale.
        """
        if block is not None:
            return await self._check_at(principal, model, block)
        head = await self._chain.head()
        try:
            return await self._check_at(principal, model, head)
        except (AccessDenied, ModelUnknown, PaymentRejected, ChainUnavailable):
            fresh = await self._chain.head(fresh=True)
            if fresh.hash == head.hash:
                raise
        return await self._check_at(principal, model, fresh)

    async def _check_at(self, principal: Principal, model: ModelId, block: BlockRef) -> Grant:
        info = await self._vault.model(model, block)
        if not info.active:
            raise ModelUnknown(f"{model} was deactivated by its owner: only he can reactivate it", model_id=model.text)
        if info.price.atomic and info.payment_token not in self._payment_tokens:
            raise PaymentRejected(
                f"{model} is priced in the token {info.payment_token}, which this node does not serve: "
                "use another node, or ask its operator to serve that token",
                price=str(info.price.atomic),
                token=str(info.payment_token),
                owner=str(info.owner),
                reason="unsupported_token",
            )
        gate = self._gates.get(info.gate)
        if gate is None:
            raise AccessDenied(f"this node has no gate of the kind that {model} uses: it stays closed")
        grant = await gate.check(principal, info, block)
        self._vault.note(model)
        return grant


def _named(model: ModelInfo, block: BlockRef) -> dict[str, str | int]:
    """Fields that every denial carries."""
    return {
        "need": str(model.min_balance),
        "token": str(model.token),
        "block": block.number,
        "block_hash": str(block.hash),
    }


def _short(principal: Principal, model: ModelInfo, block: BlockRef, have: int) -> AccessDenied:
    return AccessDenied(
        f"wallet {principal.user} holds {have} of {model.token}; {model.min_balance} needed at block {block.number}: "
        f"get {model.min_balance - have} more, then call again",
        have=str(have),
        **_named(model, block),
    )
