"""A small world on a real chain: vault, payment token, gate token, funded wallets, and an RPC that counts."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from divault.chain import contracts
from divault.chain.answers import Request
from divault.chain.chain import Chain
from divault.chain.gates import Gates
from divault.chain.rpc import Rpc
from divault.chain.vault import VaultReader
from divault.chain.wallet import Wallet
from divault.devnet import Devnet, start_devnet
from divault.values import Address, Digest, ModelId, Nonce, Principal, PrincipalKind, Secret, Usdc

CID = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"


def principal(user: Address) -> Principal:
    """A caller whose signature counts as checked; these tests begin behind `auth`."""
    return Principal(user, PrincipalKind.BODY, Digest.ZERO, Nonce(bytes(32)), 0, 0, Usdc(0))


@dataclass
class World:
    """Contracts deployed by `owner`, who also owns the models."""

    devnet: Devnet
    chain: Chain
    owner: Wallet
    usdc: Address
    vault: Address
    token: Address
    gates: Gates = field(init=False)

    def __post_init__(self) -> None:
        self.gates = self.new_gates()

    def new_gates(self, chain: Chain | None = None) -> Gates:
        """Gates that remember nothing yet."""
        chain = chain or self.chain
        return Gates(chain, VaultReader(chain, self.vault, self.usdc), [self.usdc])

    def new_chain(self, **options: Any) -> Chain:
        """Another client of the same node; close it."""
        return Chain(Rpc([Secret.of_text(self.devnet.url)], self.chain.chain_id), **options)

    async def wallet(self, tokens: int = 0) -> Wallet:
        """A fresh wallet with coins for gas and this many raw gate tokens."""
        wallet = Wallet(Secret(secrets.token_bytes(32)), self.chain)
        await self.owner.send(wallet.address, value=10**18)
        if tokens:
            await self.mint(wallet.address, tokens)
        return wallet

    async def mint(self, to: Address, amount: int, token: Address | None = None) -> None:
        """Raw gate tokens for somebody."""
        await self.owner.invoke(contracts.load("ModelAccessToken"), token or self.token, "mint", to, amount)

    async def register(self, name: str, *, minimum: int = 100, price: int = 0, token: Address | None = None) -> ModelId:
        """A model behind `minimum` of `token` (the gate token unless named)."""
        model = ModelId.parse(name)
        arguments = (model, CID, token or self.token, price, 2, ["tabular", "test"], "1.0.0", minimum)
        await self.owner.invoke(contracts.load("ModelVault"), self.vault, "registerModel", *arguments)
        return model

    async def vault_call(self, function: str, *arguments: Any) -> None:
        """The owner changes something in the vault."""
        await self.owner.invoke(contracts.load("ModelVault"), self.vault, function, *arguments)

    async def rpc(self, method: str, *params: Any) -> Any:
        """A method of the test chain itself, e.g. `evm_snapshot`."""
        return await self.chain.rpc.call(Request(method, params, lambda value: value))


@pytest.fixture(scope="module", params=["embedded", "anvil"])
def both_devnets(request: pytest.FixtureRequest) -> Iterator[Devnet]:
    """One chain per test file, and the file's tests on each kind."""
    with start_devnet(anvil=request.param == "anvil") as devnet:
        yield devnet


@pytest.fixture
async def world(both_devnets: Devnet) -> AsyncIterator[World]:
    """Contracts of its own for every test."""
    world = await build(both_devnets)
    yield world
    await world.chain.close()


async def build(devnet: Devnet) -> World:
    """Deploy everything. The head is read anew by every check: each transaction makes a block."""
    chain = Chain(Rpc([Secret.of_text(devnet.url)], devnet.chain_id), head_ttl_s=0.0)
    assert await chain.connect() == devnet.chain_id  # before the first write
    owner = Wallet(devnet.accounts[0].key, chain)
    usdc = await owner.deploy("TestUSDC")
    vault = await owner.deploy("ModelVault", usdc)
    token = await owner.deploy("ModelAccessToken", "Gate", "GATE", owner.address)
    return World(devnet, chain, owner, usdc, vault, token)
