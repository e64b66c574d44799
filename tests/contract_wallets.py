"""Contract wallets on the test chain, and what their owners sign."""

from __future__ import annotations

import json
from pathlib import Path

from eth_abi.abi import encode

from divault.chain import contracts
from divault.chain.contracts import Contract
from divault.messages import address_of, signature_text
from divault.testing import TestChain
from divault.values import Address, Digest, Secret

MAGIC = bytes.fromhex("6492" * 16)


def contract(name: str) -> Contract:
    """A test contract by its name."""
    text = (Path(__file__).parent / "abi" / f"{name}.json").read_text(encoding="utf-8")
    return contracts.of_artifact(name, json.loads(text))


async def deployed(chain: TestChain, owner: Secret) -> Address:
    """A wallet for which this key signs."""
    return await chain.publisher.deploy_contract(contract("Wallet1271"), address_of(owner))


async def odd(chain: TestChain, kind: int) -> Address:
    """A contract that answers like no wallet should; 9 says yes to everybody."""
    return await chain.publisher.deploy_contract(contract("OddWallet"), kind)


class Factory:
    """Wallets at addresses that are known before they are there."""

    def __init__(self, chain: TestChain, address: Address) -> None:
        self._chain = chain
        self._contract = contract("WalletFactory")
        self.address = address

    @classmethod
    async def on(cls, chain: TestChain) -> Factory:
        return cls(chain, await chain.publisher.deploy_contract(contract("WalletFactory")))

    async def wallet(self, owner: Secret, salt: Digest = Digest.ZERO) -> Address:
        """Where the owner's wallet will be."""
        found: Address = await self._chain.publisher.read(
            self._contract, self.address, "addressOf", address_of(owner), salt
        )
        return found

    def creation(self, owner: Secret, salt: Digest = Digest.ZERO) -> bytes:
        """Calldata that deploys it."""
        return self._contract.encode("create", address_of(owner), salt)

    async def create(self, owner: Secret, salt: Digest = Digest.ZERO) -> None:
        """Deploy it."""
        await self._chain.publisher.send(self.address, self.creation(owner, salt))

    def wrap(self, digest: Digest, signer: Secret, owner: Secret, salt: Digest = Digest.ZERO) -> str:
        """`signer`'s signature for the wallet of `owner`, wrapped with what deploys it (ERC-6492)."""
        return wrap(self.address, self.creation(owner, salt), bytes.fromhex(signature_text(signer, digest)[2:]))


def wrap(factory: Address, calldata: bytes, inner: bytes) -> str:
    """The text of an ERC-6492 signature."""
    return "0x" + (encode(["address", "bytes", "bytes"], [factory.raw, calldata, inner]) + MAGIC).hex()
