"""A wallet that signs and sends transactions: for publishers, paying clients, the devnet and tests.

The node's pipeline never uses it. Rules:

1. A key leaves its `Secret` only for the moment of signing.
2. Fees: twice the base fee plus a tip of at most 1 gwei (EIP-1559), or the node's gas price as it stands; never a
   multiple of a suggested price, which some nodes feed back and so drive up. Over `max_fee_wei` nothing is sent.
3. `send` returns when the transaction is mined and succeeded; everything else raises and names the transaction.
4. What must not happen twice is signed first (`sign`), kept by the caller, and then delivered (`deliver`), as often as
   it takes: of all transactions with one nonce at most one is ever mined.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from divault.chain import contracts, erc20
from divault.chain.answers import Reverted
from divault.chain.chain import Chain, ContractCall
from divault.chain.contracts import Contract
from divault.chain.records import TransactionReceipt
from divault.errors import ChainUnavailable, TransactionFailed
from divault.messages.signatures import address_of
from divault.values import Address, Digest, Secret, Usdc

_TIP_LIMIT_WEI = 10**9
_POLL_S = (0.01, 1.0)
"""First and longest pause between looks for a receipt; doubling in between."""


@dataclass(frozen=True, slots=True)
class SignedTransaction:
    """A signed transaction. Whoever has `raw` can send it; it can be mined once."""

    hash: Digest
    nonce: int
    raw: bytes


class Wallet:
    """An account of a chain and its key. Sends concurrently; nonces are given out in order of sending."""

    def __init__(
        self, key: Secret, chain: Chain, *, timeout_s: float = 120.0, max_fee_wei: int = 1_000 * 10**9
    ) -> None:
        """`max_fee_wei` bounds the price per gas. Raises ValueError for bytes that are no secp256k1 key."""
        self._key = key
        self.chain = chain
        self.address = address_of(key)
        self._timeout_s = timeout_s
        self._max_fee_wei = max_fee_wei
        self._sending = asyncio.Lock()
        self._next_nonce = 0

    def __repr__(self) -> str:
        return f"Wallet({self.address})"

    async def send(
        self, to: Address | None, data: bytes = b"", *, value: int = 0, gas: int | None = None
    ) -> TransactionReceipt:
        """The receipt of a transaction that succeeded; `value` in wei, `gas` estimated unless given.

        Raises TransactionFailed (refused, reverted with its reason, or not mined in time), ChainUnavailable.
        """
        if gas is None:
            gas = await self._estimate(to, data, value)
        fees = await self._fees()
        async with self._sending:
            nonce = max(self._next_nonce, await self.chain.nonce(self.address))
            fields = {"to": None if to is None else str(to), "value": value, "gas": gas, "nonce": nonce, **fees}
            tx = await self._submit(self._sign({**fields, "data": data, "chainId": self.chain.chain_id}))
            self._next_nonce = nonce + 1
        receipt = await self._mined(tx)
        if not receipt.succeeded:
            reason = await self._why(ContractCall(to, data) if to else None, value, receipt)
            raise _failed(tx, reason)
        return receipt

    async def sign(
        self, contract: Contract, at: Address, function: str, *args: Any, nonce: int | None = None
    ) -> SignedTransaction:
        """A call that changes state, signed and not sent; `nonce` is that of an earlier one that it shall replace.

        Raises as `invoke`.
        """
        data = contract.encode(function, *args)
        gas = await self._gas(contract, at, function, data)
        fees = await self._fees()
        async with self._sending:
            if nonce is None:
                nonce = max(self._next_nonce, await self.chain.nonce(self.address))
                self._next_nonce = nonce + 1
        fields = {"to": str(at), "value": 0, "gas": gas, "nonce": nonce, "data": data, "chainId": self.chain.chain_id}
        raw = self._sign({**fields, **fees})
        return SignedTransaction(Digest.keccak(raw), nonce, raw)

    async def deliver(self, signed: SignedTransaction) -> TransactionReceipt:
        """The receipt of a transaction that `sign` gave, whether it was sent before or not.

        Raises TransactionFailed (refused, reverted, replaced by another, or not mined in time), ChainUnavailable.
        """
        receipt = await self.chain.receipt(signed.hash)
        if receipt is None and await self.chain.transaction(signed.hash) is None:
            if await self.chain.nonce(self.address, mined=True) > signed.nonce:
                raise TransactionFailed(
                    f"another transaction was mined in the place of {signed.hash}",
                    transaction=str(signed.hash),
                    reason="replaced",
                )
            await self._submit(signed.raw)
        receipt = receipt or await self._mined(signed.hash)
        if not receipt.succeeded:
            raise _failed(signed.hash, "reverted")
        return receipt

    async def deploy(self, name: str, *args: Any) -> Address:
        """Address of a new contract, by the name of its artifact. Raises as `deploy_contract`."""
        return await self.deploy_contract(contracts.load(name), *args)

    async def deploy_contract(self, contract: Contract, *args: Any) -> Address:
        """Address of a new instance of the contract. Raises ValueError, TransactionFailed, ChainUnavailable."""
        receipt = await self.send(None, contract.deployment(*args))
        if receipt.contract is None or not await self.chain.code(receipt.contract):
            raise TransactionFailed(
                f"{contract.name} has no code after its deployment", transaction=str(receipt.transaction_hash)
            )
        return receipt.contract

    async def invoke(self, contract: Contract, at: Address, function: str, *args: Any) -> TransactionReceipt:
        """The receipt of a call that changes state; a revert is told in the contract's own terms.

        Raises ValueError (arguments), TransactionFailed, ChainUnavailable.
        """
        data = contract.encode(function, *args)
        return await self.send(at, data, gas=await self._gas(contract, at, function, data))

    async def cost(self, contract: Contract, at: Address, function: str, *args: Any) -> tuple[int, int]:
        """Gas that the call would take at most, and the price of each in wei at most. Raises as `invoke`."""
        gas = await self._gas(contract, at, function, contract.encode(function, *args))
        fees = await self._fees()
        return gas, fees.get("gasPrice", fees.get("maxFeePerGas", 0))

    async def read(self, contract: Contract, at: Address, function: str, *args: Any) -> Any:
        """What the function returns at the newest block. Raises TransactionFailed when it reverts, ChainUnavailable."""
        head = await self.chain.head(fresh=True)
        try:
            returned = await self.chain.call(at, contract.encode(function, *args), head)
        except Reverted as err:
            reason = contract.explain(err)
            raise TransactionFailed(f"{contract.name}.{function} fails: {reason}", reason=reason) from err
        return contract.decode(function, returned)

    async def transfer(self, token: Address, to: Address, amount: int) -> TransactionReceipt:
        """The receipt of an ERC-20 transfer of raw units. Raises ValueError, TransactionFailed, ChainUnavailable."""
        return await self.send(token, erc20.transfer(to, amount))

    async def pay(self, token: Address, owner: Address, amount: Usdc, node: Address) -> TransactionReceipt:
        """The receipt of a transfer to the owner that counts as payment at `node` alone, by its trailing mark.

        Raises TransactionFailed (`insufficient_funds` where the wallet has less), ChainUnavailable.
        """
        mark = erc20.payment_mark(node, self.address)
        try:
            return await self.send(token, erc20.transfer(owner, amount.atomic, mark.raw))
        except TransactionFailed as err:
            if "transaction" not in err.data:  # nothing was sent; each token has words of its own for it
                await self._require_funds(token, amount, err)
            raise

    async def _require_funds(self, token: Address, amount: Usdc, failure: TransactionFailed) -> None:
        head = await self.chain.head(fresh=True)
        have = erc20.parse_uint(await self.chain.call(token, erc20.balance_of(self.address), head))
        if have < amount.atomic:
            raise TransactionFailed(
                f"{self.address} has {Usdc(have)} of the token {token} and would pay {amount}: send it "
                f"{Usdc(amount.atomic - have)} more",
                reason="insufficient_funds",
            ) from failure

    async def _gas(self, contract: Contract, at: Address, function: str, data: bytes) -> int:
        try:
            return _with_margin(await self.chain.estimate_gas(self.address, at, data))
        except Reverted as err:
            reason = contract.explain(err)
            raise TransactionFailed(f"{contract.name}.{function} fails: {reason}", reason=reason) from err

    async def _estimate(self, to: Address | None, data: bytes, value: int) -> int:
        try:
            return _with_margin(await self.chain.estimate_gas(self.address, to, data, value))
        except Reverted as err:
            raise TransactionFailed(f"the transaction would fail: {err.reason}", reason=err.reason) from err

    async def _fees(self) -> dict[str, int]:
        asked = await self.chain.fees()
        if asked.base is None:
            fees = {"gasPrice": asked.gas_price}
        else:
            tip = min(_TIP_LIMIT_WEI, max(0, asked.gas_price - asked.base))
            fees = {"maxFeePerGas": 2 * asked.base + tip, "maxPriorityFeePerGas": tip, "type": 2}
        price = fees.get("gasPrice", fees.get("maxFeePerGas", 0))
        if price > self._max_fee_wei:
            raise TransactionFailed(
                f"gas costs up to {price} wei, this wallet pays at most {self._max_fee_wei}: try later or allow more",
                reason="gas_price",
            )
        return fees

    def _sign(self, fields: dict[str, Any]) -> bytes:
        from eth_account import Account

        fields = {name: value for name, value in fields.items() if value is not None}
        return bytes(Account.sign_transaction(fields, self._key.reveal()).raw_transaction)

    async def _submit(self, raw: bytes) -> Digest:
        tx = Digest.keccak(raw)
        try:
            return await self.chain.send_raw(raw)
        except ChainUnavailable:  # it may have been taken, or not
            await asyncio.sleep(_POLL_S[1])
        try:
            return tx if await self.chain.transaction(tx) is not None else await self.chain.send_raw(raw)
        except ChainUnavailable as err:
            raise TransactionFailed(
                f"it is unknown whether transaction {tx} was sent: look it up before sending another",
                transaction=str(tx),
                reason="unknown",
            ) from err

    async def _mined(self, tx: Digest) -> TransactionReceipt:
        deadline = time.monotonic() + self._timeout_s
        pause, longest = _POLL_S
        while True:
            receipt = await self._receipt(tx)
            if receipt is not None:
                return receipt
            if time.monotonic() >= deadline:
                break
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)
        self._next_nonce = 0  # it may have been dropped: the chain says which nonce comes next
        raise TransactionFailed(
            f"transaction {tx} is not mined after {self._timeout_s:g} s: look it up before sending another",
            transaction=str(tx),
            reason="not_mined",
        )

    async def _receipt(self, tx: Digest) -> TransactionReceipt | None:
        try:
            return await self.chain.receipt(tx)
        except ChainUnavailable:  # the transaction is out: its hash must reach the caller, not a mere outage
            return None

    async def _why(self, call: ContractCall | None, value: int, receipt: TransactionReceipt) -> str:
        """The reason of a failure, by running the call again where it was mined; best effort."""
        if call is None:
            return "the constructor reverted"
        try:
            await self.chain.replay(self.address, call, value, receipt)
        except Reverted as err:
            return err.reason
        except ChainUnavailable:
            pass
        return "reverted without a reason (perhaps out of gas)"


def _failed(tx: Digest, reason: str) -> TransactionFailed:
    return TransactionFailed(f"transaction {tx} failed: {reason}", transaction=str(tx), reason=reason)


def _with_margin(gas: int) -> int:
    return gas + gas // 5  # estimates are exact for a state that the next block may have changed a little
