"""One chain: its head, and everything else at a named block.

Rules:

1. `head` is at most `head_ttl_s` old; when it can't be read anew the answer is ChainUnavailable, never the old head.
   One that is still asked for is read again before its time is over, with what was asked at it (`before_head`), so
   that callers wait for neither.
2. A head whose own time is more than `max_head_age_s` behind the clock is refused (ChainStale), where that is set.
3. `call` is pinned to a block hash that must be canonical (EIP-1898): after a reorg an old hash decides nothing.
4. A revert is `Reverted`; whatever else goes wrong is ChainUnavailable. Nothing is read as zero or as empty instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from divault.chain import records
from divault.chain.answers import Refused, Request, Reverted
from divault.chain.multicall import aggregate, parse_aggregate
from divault.chain.records import Fees, Log, Malformed, Transaction, TransactionReceipt
from divault.chain.rpc import Rpc
from divault.errors import ChainStale, ChainUnavailable, TransactionFailed
from divault.telemetry import log
from divault.values import Address, BlockRef, Digest

T = TypeVar("T")
_log = log("chain")
BlockTag = Literal["latest", "safe", "finalized"]
_CALL_GAS = 25_000_000
"""Gas of a read: half of what nodes allow by default (50M), so that a hostile contract burns little of an endpoint."""
_AHEAD = 0.75
"""Part of its time to live, after which a head that is asked for is read again meanwhile."""
_CONTACT_RETRY_S = 0.25
"""How long a failed head read is answered with the same failure, so that waiting callers don't queue up timeouts."""


@dataclass(frozen=True, slots=True)
class ContractCall:
    """A read of a contract: `data` is selector and packed arguments."""

    to: Address
    data: bytes
    gas: int = _CALL_GAS


class Chain:
    """Reads of one chain through an `Rpc`. Safe for concurrent use within one event loop."""

    def __init__(
        self,
        rpc: Rpc,
        *,
        head_ttl_s: float = 1.0,
        max_head_age_s: float = 0.0,
        multicall: Address | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_head_age_s` 0 switches rule 2 off; `multicall` is the address of a Multicall3 to read through."""
        self.rpc = rpc
        self.head_ttl_s = head_ttl_s
        self.max_head_age_s = max_head_age_s
        self._multicall = multicall
        self._clock = clock
        self._monotonic = monotonic
        self._head: BlockRef | None = None
        self._head_asked_at = 0.0
        self._failure: tuple[float, ChainUnavailable] | None = None
        self._reading = asyncio.Lock()
        self._ahead: asyncio.Task[None] | None = None
        self._before: list[Callable[[BlockRef], Awaitable[None]]] = []

    @property
    def chain_id(self) -> int:
        """The chain id, configured or learned by `connect`. Raises ValueError before either."""
        if self.rpc.chain_id is None:
            raise ValueError("await connect() first: no chain id is configured")
        return self.rpc.chain_id

    async def connect(self) -> int:
        """The chain id, proved by an endpoint now. Raises ChainUnavailable."""
        return await self.rpc.connect()

    async def close(self) -> None:
        """Close the connections."""
        if self._ahead is not None:
            self._ahead.cancel()
            await asyncio.wait([self._ahead])
        await self.rpc.close()

    # --- the head -------------------------------------------------------------------------------------------------

    async def head(self, *, fresh: bool = False) -> BlockRef:
        """The newest block, at most `head_ttl_s` old; with `fresh`, asked for after this call began.

        Concurrent callers share one read. Raises ChainUnavailable, ChainStale.
        """
        now = self._monotonic()
        not_before = now if fresh else now - self.head_ttl_s
        known = self._known_head(not_before)
        if known is None:
            return await self._read_head(not_before)
        if self._ahead is None and now - self._head_asked_at > self.head_ttl_s * _AHEAD:
            self._ahead = asyncio.create_task(self._read_ahead(now))
        return known

    @property
    def last_head(self) -> BlockRef | None:
        """The newest block that was seen, however long ago."""
        return self._head

    def before_head(self, work: Callable[[BlockRef], Awaitable[None]]) -> None:
        """Call `work` with each new head that is read ahead, before it is used: to read what will be asked at it.

        It is waited for as long as the last head has time to live. Its ChainUnavailable is nobody's.
        """
        self._before.append(work)

    def _known_head(self, not_before: float) -> BlockRef | None:
        if self._head is None or self._head_asked_at < not_before:
            return None
        return self._checked_age(self._head)

    async def _read_head(self, not_before: float) -> BlockRef:
        async with self._reading:
            known = self._known_head(not_before)  # another caller may have read it while this one waited
            if known is not None:
                return known
            now = self._monotonic()
            if self._failure is not None and now - self._failure[0] < _CONTACT_RETRY_S:
                raise self._failure[1].copy() from self._failure[1]
            try:
                head = await self._newest()
            except ChainUnavailable as err:
                self._failure = (self._monotonic(), err)
                raise
            self._use(head, now)
        return self._checked_age(head)

    async def _read_ahead(self, not_before: float) -> None:
        left = self._head_asked_at + self.head_ttl_s - self._monotonic()
        try:
            async with asyncio.timeout(left):
                async with self._reading:
                    asked_at = self._monotonic()
                    head = None if self._head_asked_at >= not_before else await self._newest()
            if head is not None:
                await self._prepare(head)
                if self._head_asked_at < asked_at:
                    self._use(head, asked_at)
        except (TimeoutError, ChainUnavailable):  # whoever needs it when its time is over asks himself, and is told
            return
        finally:
            self._ahead = None

    async def _prepare(self, head: BlockRef) -> None:
        """Let others read what will be asked at this head. What they can't is read when it is asked for."""
        if self._head is None or head.hash == self._head.hash:
            return
        left = self._head_asked_at + self.head_ttl_s - self._monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left):
                for fault in await asyncio.gather(*(work(head) for work in self._before), return_exceptions=True):
                    if isinstance(fault, Exception) and not isinstance(fault, ChainUnavailable):
                        _log.error("reading ahead failed", exc_info=fault)

    async def _newest(self) -> BlockRef:
        return await self._ask(Request("eth_getBlockByNumber", ("latest", False), records.block))

    def _use(self, head: BlockRef, asked_at: float) -> None:
        self._head, self._head_asked_at, self._failure = head, asked_at, None

    def _checked_age(self, head: BlockRef) -> BlockRef:
        age = self._clock() - head.timestamp
        if 0 < self.max_head_age_s < age:
            raise ChainStale(
                f"the newest block, {head.number}, is {age:.0f} s old and {self.max_head_age_s:g} s are allowed: "
                "the RPC endpoint is behind; try again later",
                retry_after=5,
            )
        return head

    # --- reads at a block ------------------------------------------------------------------------------------------

    async def call(self, to: Address, data: bytes, block: BlockRef) -> bytes:
        """What the contract returns at exactly this block. Raises Reverted, ChainUnavailable (also: not canonical)."""
        try:
            return await self.rpc.call(_call_request(ContractCall(to, data), block))
        except Refused as err:
            raise _refusal("eth_call", err) from err

    async def run(self, code: bytes, block: BlockRef, *, sender: Address, gas: int) -> bytes:
        """What creation code returns when it runs after this block and deploys nothing.

        Raises Reverted (out of gas too), ChainUnavailable (also: not canonical).
        """
        fields = {"from": str(sender), "data": "0x" + code.hex(), "gas": hex(gas)}
        try:
            return await self.rpc.call(Request("eth_call", (fields, _at(block)), records.data))
        except Refused as err:
            raise _refusal("eth_call", err) from err

    async def calls(self, reads: Sequence[ContractCall], block: BlockRef) -> list[bytes | Reverted]:
        """Outcomes of several reads at one block, in one round trip (Multicall3 where configured, else a batch).

        Raises ChainUnavailable when any of them has no outcome.
        """
        if self._multicall is not None and len(reads) > 1:
            return await self._aggregate(self._multicall, reads, block)
        answers = await self.rpc.batch([_call_request(read, block) for read in reads])
        refused = next((answer for answer in answers if isinstance(answer, Refused)), None)
        if refused is not None:
            raise _refusal("eth_call", refused)
        return [answer for answer in answers if not isinstance(answer, Refused)]

    async def _aggregate(
        self, multicall: Address, reads: Sequence[ContractCall], block: BlockRef
    ) -> list[bytes | Reverted]:
        try:
            returned = await self.call(multicall, aggregate([(read.to, read.data) for read in reads]), block)
            return parse_aggregate(returned, len(reads))
        except (Reverted, Malformed) as err:
            raise ChainUnavailable(f"the Multicall3 at {multicall} does not work: check the setting") from err

    async def code(self, address: Address, block: BlockRef | None = None) -> bytes:
        """Code at the address, empty for an ordinary account. Raises ChainUnavailable."""
        return await self._ask(Request("eth_getCode", (str(address), _at(block)), records.data))

    async def balance(self, address: Address, block: BlockRef | None = None) -> int:
        """Native coin in wei. Raises ChainUnavailable."""
        return await self._ask(Request("eth_getBalance", (str(address), _at(block)), records.quantity))

    # --- transactions, blocks, logs ---------------------------------------------------------------------------------

    async def transaction(self, tx: Digest) -> Transaction | None:
        """The transaction, mined or pending; None if the endpoint doesn't know it. Raises ChainUnavailable."""
        return await self._ask(Request("eth_getTransactionByHash", (str(tx),), _about(tx, records.transaction, "hash")))

    async def receipt(self, tx: Digest) -> TransactionReceipt | None:
        """Its receipt, None while not mined; evidence only while its block is canonical. Raises ChainUnavailable."""
        return await self._ask(
            Request("eth_getTransactionReceipt", (str(tx),), _about(tx, records.receipt, "transaction_hash"))
        )

    async def block_by_number(self, which: int | BlockTag) -> BlockRef | None:
        """The canonical block at this height, or the newest that is safe or final. Raises ChainUnavailable."""
        if isinstance(which, int):
            return await self._ask(
                Request("eth_getBlockByNumber", (hex(which), False), _about(which, records.block, "number"))
            )
        return await self._ask(Request("eth_getBlockByNumber", (which, False), records.optional(records.block)))

    async def block_by_hash(self, block: Digest) -> BlockRef | None:
        """The block with this hash, canonical or not; None if unknown. Raises ChainUnavailable."""
        return await self._ask(Request("eth_getBlockByHash", (str(block), False), _about(block, records.block, "hash")))

    async def logs(
        self,
        addresses: Sequence[Address],
        topics: Sequence[Digest | None],
        blocks: BlockRef | tuple[int, int],
    ) -> tuple[Log, ...]:
        """Logs of one block (by hash) or of a range of heights, both ends included. Raises ChainUnavailable."""
        where: dict[str, Any] = (
            {"blockHash": str(blocks.hash)}
            if isinstance(blocks, BlockRef)
            else {"fromBlock": hex(blocks[0]), "toBlock": hex(blocks[1])}
        )
        where["address"] = [str(address) for address in addresses]
        where["topics"] = [None if topic is None else str(topic) for topic in topics]
        return await self._ask(Request("eth_getLogs", (where,), records.logs))

    # --- sending ---------------------------------------------------------------------------------------------------

    async def nonce(self, address: Address, *, mined: bool = False) -> int:
        """The next nonce of the account; pending transactions count unless `mined`. Raises ChainUnavailable."""
        at = "latest" if mined else "pending"
        return await self._ask(Request("eth_getTransactionCount", (str(address), at), records.quantity))

    async def fees(self) -> Fees:
        """What the chain asks for now. Raises ChainUnavailable."""
        requests: list[Request[int | None]] = [
            Request("eth_getBlockByNumber", ("latest", False), records.base_fee),
            Request("eth_gasPrice", (), records.quantity),
        ]
        base, price = await self.rpc.batch(requests)
        for answer in (base, price):
            if isinstance(answer, Reverted | Refused):
                raise _refusal("eth_gasPrice", answer)
        return Fees(base if isinstance(base, int) else None, price if isinstance(price, int) else 0)

    async def estimate_gas(self, sender: Address, to: Address | None, data: bytes, value: int = 0) -> int:
        """Gas that the transaction would use now. Raises Reverted, TransactionFailed, ChainUnavailable."""
        fields = {"from": str(sender), "data": "0x" + data.hex(), "value": hex(value)}
        if to is not None:
            fields["to"] = str(to)
        try:
            return await self.rpc.call(Request("eth_estimateGas", (fields,), records.quantity))
        except Refused as err:
            raise TransactionFailed(f"the node refuses the transaction: {err.message}", reason=err.message) from err

    async def replay(self, sender: Address, call: ContractCall, value: int, receipt: TransactionReceipt) -> None:
        """Run a mined transaction's call again after its block, to learn why it failed.

        Raises Reverted with the reason, ChainUnavailable.
        """
        fields = {"from": str(sender), "to": str(call.to), "data": "0x" + call.data.hex(), "value": hex(value)}
        where = {"blockHash": str(receipt.block_hash)}
        try:
            await self.rpc.call(Request("eth_call", (fields, where), records.data))
        except Refused as err:
            raise _refusal("eth_call", err) from err

    async def send_raw(self, raw: bytes) -> Digest:
        """Hash of the signed transaction, handed to the network; sending the same bytes again is harmless.

        Raises TransactionFailed when the node refuses it, ChainUnavailable when no node took it for certain.
        """
        tx = Digest.keccak(raw)
        try:
            answer = await self.rpc.call(Request("eth_sendRawTransaction", ("0x" + raw.hex(),), records.digest))
        except Reverted as err:  # nodes that mine at once report the failed execution here
            raise TransactionFailed(
                f"the transaction fails: {err.reason}", transaction=str(tx), reason=err.reason
            ) from err
        except Refused as err:
            if "already known" in err.message.lower() or "already imported" in err.message.lower():
                return tx
            raise TransactionFailed(
                f"the node refuses the transaction: {err.message}", transaction=str(tx), reason=err.message
            ) from err
        if answer != tx:
            raise ChainUnavailable("the RPC endpoint names another transaction than the one sent", retry_after=2)
        return tx

    async def _ask(self, request: Request[T]) -> T:
        try:
            return await self.rpc.call(request)
        except (Refused, Reverted) as err:
            raise _refusal(request.method, err) from err


def _call_request(read: ContractCall, block: BlockRef) -> Request[bytes]:
    fields = {"to": str(read.to), "data": "0x" + read.data.hex(), "gas": hex(read.gas)}
    return Request("eth_call", (fields, _at(block)), records.data)


def _at(block: BlockRef | None) -> str | dict[str, Any]:
    return "latest" if block is None else {"blockHash": str(block.hash), "requireCanonical": True}


def _refusal(method: str, err: Refused | Reverted) -> ChainUnavailable:
    return ChainUnavailable(f"the RPC endpoint refuses {method}: {err.message or 'no reason given'}", retry_after=2)


def _about(wanted: object, parse: Callable[[Any], T], name: str) -> Callable[[Any], T | None]:
    """A parser that gives None for null and refuses an answer whose field `name` isn't the one that was asked for."""

    def parsed(value: Any) -> T | None:
        if value is None:
            return None
        record = parse(value)
        if getattr(record, name) != wanted:
            raise Malformed("an answer about something else")
        return record

    return parsed
