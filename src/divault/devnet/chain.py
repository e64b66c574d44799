"""The embedded chain: blocks on an EVM in this process, for demos and tests. No I/O, no threads of its own.

Rules:

1. Every transaction is signed and checked as on a public chain: chain id, nonce, funds, intrinsic gas, fee cap.
2. While `automine` is on, a transaction that is ready is mined at once, in a block of its own.
3. A block's state can be read by its hash for the last `KEPT_BLOCKS` blocks; older state is refused, not guessed.
4. `revert` takes blocks back for good: their hashes mean nothing any more, and no later block ever repeats one.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from divault.devnet.answers import EXECUTION_REVERTED, SERVER_ERROR, RpcRefused, show
from divault.devnet.blocks import Block, Header, Receipt, bloom, list_root
from divault.devnet.machine import GAS_LIMIT, Machine, Message, Outcome, Surroundings
from divault.devnet.mempool import Mempool
from divault.devnet.transactions import SignedTransaction, parse
from divault.devnet.world import Account, Changes, World
from divault.keccak import keccak256

KEPT_BLOCKS = 10_000
"""How many blocks back state can be read: some hundred bytes per changed account or slot."""
SUGGESTED_TIP = 10**9
"""Wei per gas."""
_FIRST_BASE_FEE = 10**9
_MACHINES = 8
"""Older states kept ready to call; each costs a copy of the state."""
_ERROR_STRING = bytes.fromhex("08c379a0")  # Error(string)
_CALL_STIPEND = 2_300


@dataclass(frozen=True, slots=True)
class _Snapshot:
    number: int
    mark: int
    time_offset: int


class EmbeddedChain:
    """One chain. Not thread-safe: one thread calls it."""

    def __init__(
        self, chain_id: int, genesis: Iterable[tuple[bytes, Account]], *, clock: Callable[[], float] = time.time
    ) -> None:
        self.chain_id = chain_id
        self.automine = True
        self.pool = Mempool()
        self._clock = clock
        self._time_offset = 0
        self._next_timestamp: int | None = None
        self._mined = 0
        self._world = World()
        self._world.apply(Changes(dict(genesis)))
        self._machine = Machine(self._world, chain_id)
        self._older: OrderedDict[bytes, Machine] = OrderedDict()
        self._blocks: list[Block] = []
        self._marks: list[int] = []
        self._by_hash: dict[bytes, Block] = {}
        self._mined_in: dict[bytes, tuple[Block, int]] = {}
        self._snapshots: dict[int, _Snapshot] = {}
        self._append(self._seal([], self._timestamp(), bytes(32), _FIRST_BASE_FEE), 0)

    # --- looking ---------------------------------------------------------------------------------------------------

    @property
    def head(self) -> Block:
        """The newest block."""
        return self._blocks[-1]

    def block(self, number: int) -> Block | None:
        """The block at this height."""
        return self._blocks[number] if 0 <= number < len(self._blocks) else None

    def block_by_hash(self, digest: bytes) -> Block | None:
        """The block with this hash, while it is part of the chain."""
        return self._by_hash.get(digest)

    def mined(self, tx_hash: bytes) -> tuple[Block, int] | None:
        """Block and index of a mined transaction."""
        return self._mined_in.get(tx_hash)

    def next_nonce(self, sender: bytes) -> int:
        """The nonce to use next, waiting transactions counted."""
        return self.pool.next_nonce(sender, self._world.account(sender).nonce)

    def world(self, block: Block) -> World:
        """The state after this block. Raises RpcRefused when it is no longer kept."""
        return self._machine_at(block).world

    def pending_surroundings(self) -> Surroundings:
        """What a call sees that would run in the next block."""
        head = self.head.header
        return Surroundings(head.number + 1, self._timestamp(), head.prevrandao)

    # --- running without a trace -----------------------------------------------------------------------------------

    def call(
        self, message: Message, block: Block, overrides: Changes | None = None, around: Surroundings | None = None
    ) -> bytes:
        """What the message returns after this block. Raises RpcRefused; a revert has code 3 and its data."""
        machine = self._machine_at(block)
        around = around or block.header.surroundings()
        if message.to is None:
            outcome = machine.run_creation_code(overrides or Changes(), message, around)
        elif overrides is not None:
            outcome = machine.run_with(overrides, message, around)
        else:
            outcome = machine.run(message, around)
        return _returned(outcome)

    def estimate(self, message: Message, block: Block) -> int:
        """The gas limit with which the message succeeds after this block. Raises RpcRefused as `call` does."""
        machine, around = self._machine_at(block), self.pending_surroundings()
        most = machine.run(message, around)
        _returned(most)
        low = most.gas_used + most.gas_refunded
        # a call may keep back 1/64 of the gas per level, and a transfer of value needs its stipend
        guess = min(message.gas, (low + _CALL_STIPEND) * 64 // 63)

        def enough(gas: int) -> bool:
            return machine.run(replace(message, gas=gas), around).failure is None

        if enough(low):
            return low
        high = guess if enough(guess) else message.gas
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high

    # --- transactions and blocks -----------------------------------------------------------------------------------

    def submit(self, raw: bytes) -> bytes:
        """Hash of a transaction that was taken, and mined if it can be. Raises RpcRefused naming why not."""
        tx = parse(raw, self.chain_id)
        self._check(tx)
        self.pool.add(tx)
        if self.automine and next(self._ready(), None) is not None:
            self.mine()
        return tx.hash

    def mine(self, timestamp: int | None = None) -> Block:
        """The next block, with every transaction that is ready and fits. Raises RpcRefused for a time in the past."""
        if timestamp is not None:
            self.set_next_timestamp(timestamp)
        when, base_fee = self._timestamp(), self.head.header.next_base_fee()
        self._mined += 1
        prevrandao = keccak256(self.head.hash + self._mined.to_bytes(8, "big"))
        around = Surroundings(self.head.header.number + 1, when, prevrandao)
        began, receipts = self._world.mark, list[Receipt]()
        for tx in list(self._ready()):
            if tx.max_price >= base_fee and _gas(receipts) + tx.gas <= GAS_LIMIT:
                self.pool.remove(tx)
                receipts += self._execute(tx, around, base_fee, receipts)
        block = self._seal(receipts, when, prevrandao, base_fee)
        self._append(block, began)
        return block

    def _ready(self) -> Iterator[SignedTransaction]:
        return self.pool.ready(lambda sender: self._world.account(sender).nonce)

    def _check(self, tx: SignedTransaction) -> None:
        account = self._world.account(tx.sender)
        if tx.nonce < account.nonce:
            raise RpcRefused(SERVER_ERROR, f"nonce too low: next nonce {account.nonce}, tx nonce {tx.nonce}")
        if account.code:  # EIP-3607
            raise RpcRefused(SERVER_ERROR, "sender not an eoa")
        if tx.gas > GAS_LIMIT:
            raise RpcRefused(SERVER_ERROR, "exceeds block gas limit")
        if tx.gas < tx.intrinsic_gas():
            raise RpcRefused(SERVER_ERROR, f"intrinsic gas too low: have {tx.gas}, want {tx.intrinsic_gas()}")
        if tx.to is None and len(tx.data) > 49_152:  # EIP-3860
            raise RpcRefused(SERVER_ERROR, "max initcode size exceeded")
        if tx.max_price < self.head.header.next_base_fee():
            raise RpcRefused(SERVER_ERROR, "max fee per gas less than block base fee")
        cost = tx.gas * tx.max_price + tx.value
        if account.balance < cost:
            raise RpcRefused(
                SERVER_ERROR, f"insufficient funds for gas * price + value: balance {account.balance}, tx cost {cost}"
            )

    def _execute(
        self, tx: SignedTransaction, around: Surroundings, base_fee: int, before: list[Receipt]
    ) -> list[Receipt]:
        """The receipt, or nothing when it can't pay any more and is dropped."""
        if self._world.account(tx.sender).balance < tx.gas * tx.max_price + tx.value:
            return []
        price = tx.price(base_fee)
        message = Message(tx.sender, tx.to, tx.data, tx.value, tx.gas, price, tx.access_list)
        # an access list warms accounts beyond the reach of the undo: such a transaction gets a machine of its own
        machine = Machine(self._world, self.chain_id) if tx.access_list else self._machine
        outcome = machine.run(message, around)
        self._apply(_with_fees(outcome, tx, price - base_fee, price, self._world))
        gas = _gas(before) + outcome.gas_used
        logs = sum(len(receipt.logs) for receipt in before)
        return [Receipt(tx, outcome.failure is None, outcome.gas_used, gas, price, outcome.logs, logs, outcome.created)]

    def _seal(self, receipts: list[Receipt], timestamp: int, prevrandao: bytes, base_fee: int) -> Block:
        parent = self._blocks[-1] if self._blocks else None
        outcomes = list_root([receipt.consensus() for receipt in receipts])
        header = Header(
            parent=parent.hash if parent else bytes(32),
            state=keccak256((parent.header.state if parent else self.chain_id.to_bytes(32, "big")) + outcomes),
            transactions=list_root([receipt.tx.raw for receipt in receipts]),
            receipts=outcomes,
            bloom=bloom([log for receipt in receipts for log in receipt.logs]),
            number=len(self._blocks),
            gas_used=_gas(receipts),
            timestamp=timestamp,
            prevrandao=prevrandao,
            base_fee=base_fee,
        )
        return Block.make(header, receipts)

    def _append(self, block: Block, began: int) -> None:
        self._blocks.append(block)
        self._marks.append(began)
        self._by_hash[block.hash] = block
        self._next_timestamp = None
        for index, receipt in enumerate(block.receipts):
            self._mined_in[receipt.tx.hash] = (block, index)
        oldest = len(self._blocks) - KEPT_BLOCKS
        if oldest > 0:
            self._world.forget_before(self._marks[oldest])

    def _apply(self, changes: Changes) -> None:
        self._world.apply(changes)
        self._machine.apply(changes)

    # --- older states ----------------------------------------------------------------------------------------------

    def _machine_at(self, block: Block) -> Machine:
        if block is self.head:
            return self._machine
        machine = self._older.get(block.hash)
        if machine is None:
            try:  # the state after a block is the state when the next one began
                world = self._world.at(self._marks[block.header.number + 1])
            except ValueError as err:
                raise RpcRefused(SERVER_ERROR, f"missing trie node: {err}") from err
            machine = self._older[block.hash] = Machine(world, self.chain_id)
            if len(self._older) > _MACHINES:
                self._older.popitem(last=False)
        self._older.move_to_end(block.hash)
        return machine

    # --- control of time and state ---------------------------------------------------------------------------------

    def change(self, changes: Changes) -> None:
        """Set accounts or slots as they shall be from now on; the head's state changes without a new block."""
        self._apply(changes)

    def account(self, address: bytes) -> Account:
        """The account as it is now."""
        return self._world.account(address)

    def advance_time(self, seconds: int) -> int:
        """Total seconds by which the chain's clock is ahead, after moving it on."""
        self._time_offset += seconds
        return self._time_offset

    def set_next_timestamp(self, timestamp: int) -> None:
        """Time of the next block, and the chain's clock from there on. Raises RpcRefused for a time in the past."""
        if timestamp <= self.head.header.timestamp:
            raise RpcRefused(
                SERVER_ERROR, f"timestamp {timestamp} is not after the head's {self.head.header.timestamp}"
            )
        self._next_timestamp = timestamp
        self._time_offset = timestamp - int(self._clock())

    def _timestamp(self) -> int:
        # blocks of one second share its time: one more each would outrun the clock, and signed windows would expire
        earliest = self._blocks[-1].header.timestamp if self._blocks else 0
        return self._next_timestamp or max(earliest, int(self._clock()) + self._time_offset)

    def snapshot(self) -> int:
        """A name for the present state, good for one `revert`."""
        name = max(self._snapshots, default=-1) + 1
        self._snapshots[name] = _Snapshot(self.head.header.number, self._world.mark, self._time_offset)
        return name

    def revert(self, name: int) -> bool:
        """Back to the snapshot; False when there is none of this name. Waiting transactions are dropped."""
        snapshot = self._snapshots.get(name)
        if snapshot is None:
            return False
        try:
            self._world.undo_to(snapshot.mark)
        except ValueError as err:
            raise RpcRefused(SERVER_ERROR, f"missing trie node: {err}") from err
        self._snapshots = {other: kept for other, kept in self._snapshots.items() if other < name}
        self._take_back(snapshot.number)
        self._time_offset, self._next_timestamp = snapshot.time_offset, None
        self.pool.clear()
        self._older.clear()
        self._machine = Machine(self._world, self.chain_id)
        return True

    def _take_back(self, number: int) -> None:
        for block in self._blocks[number + 1 :]:
            del self._by_hash[block.hash]
            for receipt in block.receipts:
                del self._mined_in[receipt.tx.hash]
        del self._blocks[number + 1 :], self._marks[number + 1 :]


def _gas(receipts: list[Receipt]) -> int:
    return receipts[-1].cumulative_gas if receipts else 0


def _with_fees(outcome: Outcome, tx: SignedTransaction, tip: int, price: int, world: World) -> Changes:
    """The message's changes, and what the transaction itself does: nonce, fee, and the tip to the miner."""
    accounts = dict(outcome.changes.accounts)
    sender = accounts.get(tx.sender, world.account(tx.sender))
    accounts[tx.sender] = Account(tx.nonce + 1, sender.balance - outcome.gas_used * price, sender.code)
    miner = accounts.get(bytes(20), world.account(bytes(20)))
    accounts[bytes(20)] = Account(miner.nonce, miner.balance + outcome.gas_used * tip, miner.code)
    return Changes(accounts, outcome.changes.slots)


def _returned(outcome: Outcome) -> bytes:
    if outcome.failure is None:
        return outcome.output
    if outcome.failure != "revert":
        raise RpcRefused(SERVER_ERROR, _halt(outcome.failure))
    raise RpcRefused(EXECUTION_REVERTED, f"execution reverted{_reason(outcome.output)}", show(outcome.output))


def _halt(name: str) -> str:
    if name.startswith("OutOfGas"):
        return "out of gas"
    return f"EVM error: {name}"


def _reason(output: bytes) -> str:
    """`: text` where the output is a whole `Error(string)`."""
    body = output[4:]
    size = int.from_bytes(body[32:64], "big")
    if output[:4] != _ERROR_STRING or len(body) < 64 + size:
        return ""
    return ": " + body[64 : 64 + size].decode("utf-8", "replace")
