"""The gate: a check at a head seen before, and one at a new head against plain calls that nobody caches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any

from divault.chain import contracts, erc20
from divault.chain.chain import Chain
from divault.chain.gates import Gates
from divault.chain.rpc import Rpc
from divault.chain.vault import VaultReader
from divault.chain.wallet import Wallet
from divault.devnet import Devnet, start_devnet
from divault.values import Address, Digest, ModelId, Nonce, Principal, PrincipalKind, Secret, Usdc

_MODEL = ModelId.parse("bench")
_ROUNDS = 300
_WARM = 20_000


async def _prepare(owner: Wallet) -> tuple[Address, Address, Address]:
    """Vault, payment token and gate token, with one model that the owner himself may use."""
    usdc = await owner.deploy("TestUSDC")
    vault = await owner.deploy("ModelVault", usdc)
    token = await owner.deploy("ModelAccessToken", "Gate", "GATE", owner.address)
    await owner.invoke(contracts.load("ModelAccessToken"), token, "mint", owner.address, 100)
    arguments = (_MODEL, "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy", token, 0, 2, ["tag"], "1", 100)
    await owner.invoke(contracts.load("ModelVault"), vault, "registerModel", *arguments)
    return vault, usdc, token


async def _median_s(rounds: int, work: Callable[[], Awaitable[Any]]) -> float:
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        await work()
        taken.append(time.perf_counter() - start)
    return median(taken)


async def _measure(devnet: Devnet) -> list[dict[str, Any]]:
    chain = Chain(Rpc([Secret.of_text(devnet.url)], devnet.chain_id), head_ttl_s=3600)
    owner = Wallet(devnet.accounts[0].key, chain)
    vault, usdc, token = await _prepare(owner)
    caller = Principal(owner.address, PrincipalKind.BODY, Digest.ZERO, Nonce(bytes(32)), 0, 0, Usdc(0))
    vault_abi = contracts.load("ModelVault")
    entry, paid_in, gate = (vault_abi.encode(name, _MODEL) for name in ("getModelInfo", "paymentToken", "gate"))

    async def cold() -> None:
        """Everything anew, the head included."""
        await chain.head(fresh=True)
        await Gates(chain, VaultReader(chain, vault, usdc), [usdc]).check(caller, _MODEL)

    async def plain() -> None:
        """The same facts by one `eth_call` each, decoded by the ABI."""
        head = await chain.head(fresh=True)
        vault_abi.decode("getModelInfo", await chain.call(vault, entry, head))
        vault_abi.decode("paymentToken", await chain.call(vault, paid_in, head))
        vault_abi.decode("gate", await chain.call(vault, gate, head))
        erc20.parse_uint(await chain.call(token, erc20.balance_of(owner.address), head))

    gates = Gates(chain, VaultReader(chain, vault, usdc), [usdc])
    await chain.head(fresh=True)
    await gates.check(caller, _MODEL)
    calls = chain.rpc.calls
    warm_s = await _median_s(_WARM, lambda: gates.check(caller, _MODEL))
    warm_calls = chain.rpc.calls - calls
    plain_s, cold_s = await _median_s(_ROUNDS, plain), await _median_s(_ROUNDS, cold)
    await chain.close()
    against = f"five RPC calls, uncached: {plain_s * 1e3:.2f} ms"
    return [
        {
            "name": "gate, warm check",
            "figure": round(warm_s * 1e6, 2),
            "unit": "us",
            "yardstick": against,
            "ratio": round(warm_s / plain_s, 6),
            "target": "<= 20 us",
            "holds": warm_s <= 20e-6,
        },
        {
            "name": "gate, RPC calls of a warm check",
            "figure": warm_calls / _WARM,
            "unit": "calls",
            "yardstick": "uncached: 5 calls",
            "ratio": warm_calls / _WARM / 5,
            "target": "0",
            "holds": warm_calls == 0,
        },
        {
            "name": "gate, cold check",
            "figure": round(cold_s * 1e3, 3),
            "unit": "ms",
            "yardstick": against,
            "ratio": round(cold_s / plain_s, 3),
            "target": "<= yardstick",
            "holds": cold_s <= plain_s,
        },
    ]


def run() -> list[dict[str, Any]]:
    """Rows of the gate, on the embedded devnet over loopback."""
    with start_devnet() as devnet:
        return asyncio.run(_measure(devnet))
