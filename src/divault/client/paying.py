"""How a client pays: from its wallet straight to the model's owner, by what the vault itself says."""

from __future__ import annotations

from divault.chain.chain import Chain
from divault.chain.rpc import Rpc
from divault.chain.vault import VaultReader
from divault.chain.wallet import Wallet
from divault.errors import PriceChanged
from divault.values import Address, Digest, ModelId, Secret, Usdc


class Payer:
    """A wallet on the chain of one vault. Owner, price and token come from the chain, never from a node's offer."""

    def __init__(self, rpc: str, key: Secret, chain_id: int, vault: Address) -> None:
        self._chain = Chain(Rpc.parse(Secret.of_text(rpc), chain_id), head_ttl_s=0)
        self._wallet = Wallet(key, self._chain)
        self._vault = VaultReader(self._chain, vault)

    async def pay(self, model: ModelId, node: Address, limit: Usdc, tokens: frozenset[Address]) -> Digest:
        """Pay one call of the model at the node; gives the transaction. Waits until it is mined.

        `tokens`: payment tokens that the caller accepts. Raises PriceChanged over `limit` or in another token,
        TransactionFailed, ChainUnavailable.
        """
        info = await self._vault.model(model, await self._chain.head(fresh=True))
        if info.price > limit or info.payment_token not in tokens:
            raise PriceChanged(
                f"the vault asks {info.price} of the token {info.payment_token} for {model}; allowed are {limit} of "
                + " or ".join(map(str, sorted(tokens))),
                have=str(limit.atomic),
                need=str(info.price.atomic),
                token=str(info.payment_token),
            )
        return (await self._wallet.pay(info.payment_token, info.owner, info.price, node)).transaction_hash

    async def close(self) -> None:
        """Close connections."""
        await self._chain.close()
