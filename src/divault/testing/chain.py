"""A development chain with vault, payment token and gate token deployed, and helpers that change it by transactions.

Everything is a signed raw transaction from a wallet, as on a public chain; nothing is set behind the chain's back.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self

from divault.chain import contracts
from divault.chain.chain import Chain
from divault.chain.records import TransactionReceipt
from divault.chain.rpc import Rpc
from divault.chain.wallet import Wallet
from divault.devnet import MULTICALL, Devnet, start_devnet
from divault.errors import ChainUnavailable
from divault.values import Address, ModelId, Secret, Usdc

VAULT = contracts.load("ModelVault")
TOKEN = contracts.load("ModelAccessToken")
USDC = contracts.load("TestUSDC")
WALLET_WEI = 10 * 10**18
"""Native coin of a fresh wallet: enough for thousands of transactions."""
OTHER_CATEGORY = 6


class TestChain:
    """A running chain with contracts. Bound to the event loop that deployed it.

    `publisher` owns the gate token and, unless told otherwise, the models; `consumer` and `stranger` have coins for gas
    and nothing else.
    """

    __test__ = False  # a class for tests, not a class of tests: pytest leaves it alone

    def __init__(self, devnet: Devnet, chain: Chain) -> None:
        """Use `start` or `deploy`."""
        self.devnet = devnet
        self.chain = chain
        self.vault = self.usdc = self.token = Address.ZERO
        self._make_wallets()

    @classmethod
    @asynccontextmanager
    async def start(cls, *, anvil: bool | None = None) -> AsyncIterator[Self]:
        """A chain of its own with everything deployed, stopped at the end of the block; `anvil` as in `start_devnet`.

        Raises SettingsInvalid when no chain can be started here.
        """
        async with await asyncio.to_thread(lambda: start_devnet(anvil=anvil)) as devnet:
            world = await cls.deploy(devnet)
            try:
                yield world
            finally:
                await world.close()

    @classmethod
    async def deploy(cls, devnet: Devnet) -> Self:
        """Fresh contracts on a running devnet, which may be shared. Close it; the devnet stays.

        Raises ChainUnavailable, TransactionFailed.
        """
        world = cls(
            devnet, Chain(Rpc([Secret.of_text(devnet.url)], devnet.chain_id), head_ttl_s=0.0, multicall=MULTICALL)
        )
        await world.chain.connect()  # before the first write: it is the chain that was asked for
        world.usdc = await world.publisher.deploy("TestUSDC")
        world.vault = await world.publisher.deploy("ModelVault", world.usdc)
        world.token = await world.deploy_token()
        return world

    async def close(self) -> None:
        """Close the connections to the chain."""
        await self.chain.close()

    # --- wallets and tokens ----------------------------------------------------------------------------------------

    async def wallet(self, *, tokens: int = 0, usdc: Usdc | None = None) -> Wallet:
        """A new wallet with coins for gas, this many raw gate tokens and this much test USDC."""
        wallet = Wallet(Secret(secrets.token_bytes(32)), self.chain)
        await self.publisher.send(wallet.address, value=WALLET_WEI)
        if tokens:
            await self.mint_tokens(wallet.address, tokens)
        if usdc is not None:
            await self.mint_usdc(wallet.address, usdc)
        return wallet

    async def deploy_token(self, name: str = "Gate", symbol: str = "GATE") -> Address:
        """Another gate token, owned by the publisher."""
        return await self.publisher.deploy("ModelAccessToken", name, symbol, self.publisher.address)

    async def mint_tokens(self, to: Address, amount: int, token: Address | None = None) -> TransactionReceipt:
        """Raw gate tokens for somebody."""
        return await self.publisher.invoke(TOKEN, token or self.token, "mint", to, amount)

    async def mint_usdc(self, to: Address, amount: Usdc) -> TransactionReceipt:
        """Test USDC for somebody."""
        return await self.publisher.invoke(USDC, self.usdc, "mint", to, amount)

    async def move_tokens(self, sender: Wallet, to: Address, amount: int) -> TransactionReceipt:
        """A holder passes raw gate tokens on."""
        return await sender.transfer(self.token, to, amount)

    async def balance(self, token: Address, holder: Address) -> int:
        """Raw units at the newest block."""
        balance: int = await self.publisher.read(TOKEN, token, "balanceOf", holder)
        return balance

    # --- models ----------------------------------------------------------------------------------------------------

    async def register(
        self, name: str, cid: str, *, price: Usdc | None = None, minimum: int = 1, token: Address | None = None
    ) -> ModelId:
        """A model of the publisher behind `minimum` raw units of `token` (default: the gate token)."""
        model = ModelId.parse(name)
        gate = token or self.token
        await self.call_vault(
            "registerModel", model, cid, gate, price or Usdc(0), OTHER_CATEGORY, list[str](), "1", minimum
        )
        return model

    async def register_open(self, name: str, cid: str, *, price: Usdc | None = None) -> ModelId:
        """A model of the publisher that anybody may use."""
        model = ModelId.parse(name)
        await self.call_vault("registerOpenModel", model, cid, price or Usdc(0), OTHER_CATEGORY, list[str](), "1")
        return model

    async def set_price(self, model: ModelId, price: Usdc) -> TransactionReceipt:
        """The publisher changes a price."""
        return await self.call_vault("updatePrice", model, price)

    async def set_cid(
        self, model: ModelId, cid: str, *, tags: Sequence[str] = (), version: str = "2"
    ) -> TransactionReceipt:
        """The publisher changes the content."""
        return await self.call_vault("updateModelMetadata", model, cid, list(tags), version)

    async def call_vault(self, function: str, *args: Any, sender: Wallet | None = None) -> TransactionReceipt:
        """Any function of the vault, by the publisher unless told otherwise. Raises TransactionFailed."""
        return await (sender or self.publisher).invoke(VAULT, self.vault, function, *args)

    async def read_vault(self, function: str, *args: Any) -> Any:
        """What a function of the vault returns at the newest block."""
        return await self.publisher.read(VAULT, self.vault, function, *args)

    # --- time and reorgs -------------------------------------------------------------------------------------------

    async def mine(self, blocks: int = 1) -> None:
        """So many blocks without transactions."""
        await self.rpc("anvil_mine", hex(blocks))

    async def advance_time(self, seconds: int) -> None:
        """The next block, this much later."""
        await self.rpc("evm_increaseTime", seconds)
        await self.mine()

    async def snapshot(self) -> str:
        """A name for the present state, for one `revert`."""
        return str(await self.rpc("evm_snapshot"))

    async def revert(self, snapshot: str) -> None:
        """Take back every block since: a reorg. Wallets made before know nonces that no longer hold: make them anew.

        Raises ChainUnavailable when there is no such snapshot.
        """
        if await self.rpc("evm_revert", snapshot) is not True:
            raise ChainUnavailable("there is no such snapshot: each serves one revert")
        self._make_wallets()

    async def rpc(self, method: str, *params: Any) -> Any:
        """Any JSON-RPC method of the devnet, e.g. `evm_setAutomine`."""
        return await asyncio.to_thread(self.devnet.rpc, method, *params)

    def _make_wallets(self) -> None:
        keys = [account.key for account in self.devnet.accounts[:3]]
        self.publisher, self.consumer, self.stranger = (Wallet(key, self.chain) for key in keys)
