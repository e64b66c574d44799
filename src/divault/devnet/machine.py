"""The EVM: pyrevm 0.3.7 over a `World`, one message at a time, each leaving the state as it was.

Rules:

1. Every run starts from a clean journal (cold accounts, original storage values), so gas is what a chain charges; what
   a run changed is read from the journal, then undone, and comes back as `Changes` for the caller to apply.
2. pyrevm's journal is known only as text. Its format belongs to the pinned version; a text that does not parse raises.
3. Nonce and fee of a transaction are the caller's business: pyrevm handles them for creations only.

Limits of this machine: BASEFEE reads 0, BLOCKHASH is not the chain's, and a call from an address with code is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pyrevm import EVM, AccountInfo, BlockEnv, CfgEnv, Env, ExecutionResult, Log, TxEnv

from divault.devnet.answers import INTERNAL, SERVER_ERROR, RpcRefused
from divault.devnet.transactions import AccessList
from divault.devnet.world import NOBODY, Account, Changes, World

GAS_LIMIT = 30_000_000
"""Of a block, and of a call that names none."""
_SCRATCH = bytes.fromhex("de90105e55ca11" + "00" * 12 + "01")
"""Where creation code runs in a call without `to`: its return data comes back whole, whatever it is."""
_STATE = re.compile(r"^JournaledState \{ state: \{(.*)\}, transient_storage: \{", re.DOTALL)
_ACCOUNT = re.compile(
    r"0x(?P<address>[0-9a-f]{40}): Account \{ info: AccountInfo \{ balance: (?P<balance>\d+), nonce: (?P<nonce>\d+), "
    r"code_hash: 0x[0-9a-f]{64}, code: (?:None|Some\(Bytecode \{ bytecode: 0x(?P<code>[0-9a-f]*), state: "
    r"(?:Raw|Analysed \{ len: (?P<size>\d+), jump_map: JumpMap \{ map: \"[0-9a-f]*\" \} \}) \}\)) \}, "
    r"storage: \{(?P<storage>[^}]*(?:\}, \d+: StorageSlot [^}]*)*\}?)\}, status: AccountStatus\((?P<status>[^)]*)\) \}"
)
_SLOT = re.compile(r"(\d+): StorageSlot \{ previous_or_original_value: (\d+), present_value: (\d+) \}")
_REVERT = re.compile(r"Revert \{ gas_used: \d+, output: 0x([0-9a-f]*) \}")
_HALT = re.compile(r"Halt \{ reason: (\w+)")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The block that a message runs in."""

    number: int
    timestamp: int
    prevrandao: bytes
    coinbase: bytes = bytes(20)


@dataclass(frozen=True, slots=True)
class Message:
    """What to run: a call, or with `to` None a creation."""

    sender: bytes
    to: bytes | None
    data: bytes = b""
    value: int = 0
    gas: int = GAS_LIMIT
    gas_price: int = 0
    access_list: AccessList = ()


@dataclass(frozen=True, slots=True)
class RawLog:
    """An event as emitted."""

    address: bytes
    topics: tuple[bytes, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a message did. `failure` is None, `revert` or the name of the halt; then `changes` and `logs` are empty.

    `changes` holds what the message itself changed: no fee, no nonce of a plain call.
    """

    failure: str | None
    output: bytes
    gas_used: int
    gas_refunded: int
    logs: tuple[RawLog, ...]
    changes: Changes
    created: bytes | None


class Machine:
    """An EVM over one `World`, which it never changes; `apply` tells it of changes made there."""

    def __init__(self, world: World, chain_id: int) -> None:
        self.world = world
        self._evm = EVM(env=Env(cfg=CfgEnv(chain_id=chain_id)), gas_limit=GAS_LIMIT, spec_id="CANCUN")
        self._load(Changes(world.accounts, world.slots))

    def apply(self, changes: Changes) -> None:
        """Take over changes that were applied to the world."""
        self._load(changes)

    def run(self, message: Message, around: Surroundings) -> Outcome:
        """The outcome of the message, and no trace of it in the state. Raises RpcRefused where it can't even start."""
        checkpoint = self._evm.snapshot()
        try:
            return self._run(message, around)
        finally:
            self._evm.revert(checkpoint)
            self._evm.reset_transient_storage()

    def run_with(self, overrides: Changes, message: Message, around: Surroundings) -> Outcome:
        """As `run`, on a state that differs by `overrides` for this one message."""
        back = Changes(
            {address: self.world.account(address) for address in overrides.accounts},
            {slot: self.world.slots.get(slot, 0) for slot in overrides.slots},
        )
        self._load(overrides)
        try:
            return self.run(message, around)
        finally:
            self._load(back)

    def run_creation_code(self, overrides: Changes, message: Message, around: Surroundings) -> Outcome:
        """What creation code returns, run in place: for calls that deploy nothing (ERC-6492 validators)."""
        accounts = {**overrides.accounts, _SCRATCH: Account(nonce=1, code=message.data)}
        there = Message(message.sender, _SCRATCH, b"", message.value, message.gas)
        return self.run_with(Changes(accounts, overrides.slots), there, around)

    def _load(self, changes: Changes) -> None:
        for address, account in changes.accounts.items():
            info = AccountInfo(nonce=account.nonce, balance=account.balance, code=account.code)  # type: ignore[call-arg]  # the stub omits balance
            self._evm.insert_account_info(_text(address), info)
        for (address, index), value in changes.slots.items():
            # the first slot of an account goes to the database and leaves the account loaded in the journal, where a
            # second one would go: so each is inserted on its own and the journal put back
            checkpoint = self._evm.snapshot()
            self._evm.insert_account_storage(_text(address), index, value)
            self._evm.revert(checkpoint)

    def _run(self, message: Message, around: Surroundings) -> Outcome:
        self._prepare(message, around)
        created: bytes | None = None
        try:
            if message.to is None:  # price 0: with one, pyrevm would book fees here that it doesn't book for calls
                text = self._evm.deploy(_text(message.sender), message.data, message.value, message.gas, 0)
                created, output = bytes.fromhex(text[2:]), b""
            else:
                call = (_text(message.sender), _text(message.to), message.data, message.value)
                output = self._evm.message_call(*call, message.gas, message.gas_price)
        except RuntimeError as err:
            return self._failed(str(err))
        result = self._result()
        logs = tuple(_log(log) for log in result.logs)
        return Outcome(None, output, result.gas_used, result.gas_refunded, logs, self._changes(), created)

    def _prepare(self, message: Message, around: Surroundings) -> None:
        self._evm.set_block_env(
            BlockEnv(
                number=around.number,
                coinbase=_text(around.coinbase),
                timestamp=around.timestamp,
                prevrandao=around.prevrandao,
                gas_limit=GAS_LIMIT,
            )
        )
        access = [(_text(address), list(slots)) for address, slots in message.access_list]
        self._evm.set_tx_env(TxEnv(caller=_text(message.sender), access_list=access))

    def _failed(self, text: str) -> Outcome:
        revert, halt = _REVERT.search(text), _HALT.search(text)
        if not revert and not halt:
            raise RpcRefused(SERVER_ERROR, _plain(text))
        failure = "revert" if revert else halt.group(1) if halt else ""
        output = bytes.fromhex(revert.group(1)) if revert else b""
        return Outcome(failure, output, self._result().gas_used, 0, (), Changes(), None)

    def _result(self) -> ExecutionResult:
        if self._evm.result is None:
            raise RpcRefused(INTERNAL, "the EVM gave no result")
        return self._evm.result

    def _changes(self) -> Changes:
        text = self._evm.journal_str
        state = _STATE.match(text)
        if state is None:
            raise RpcRefused(INTERNAL, "the EVM's journal has an unknown format: pyrevm 0.3.7 is expected")
        changes, end = Changes(), 0
        for found in _ACCOUNT.finditer(state.group(1)):
            if found.start() != end + 2 * (end > 0):
                break
            end = found.end()
            self._take(found, changes)
        if end != len(state.group(1)):
            raise RpcRefused(INTERNAL, "an account in the EVM's journal has an unknown format")
        return changes

    def _take(self, found: re.Match[str], changes: Changes) -> None:
        address = bytes.fromhex(found["address"])
        before = self.world.account(address)
        if "SelfDestructed" in found["status"]:
            changes.accounts[address] = NOBODY
            changes.slots.update(self.world.slots_of(address))
            return
        code = _code(found) if "Created" in found["status"] else before.code
        after = Account(int(found["nonce"]), int(found["balance"]), code)
        if after != before:
            changes.accounts[address] = after
        for index, old, new in _SLOT.findall(found["storage"]):
            if old != new:
                changes.slots[address, int(index)] = int(new)


def _code(found: re.Match[str]) -> bytes:
    code = bytes.fromhex(found["code"] or "")
    return code[: int(found["size"])] if found["size"] else code  # analysed code carries 33 zeros of padding


def _log(log: Log) -> RawLog:
    topics, data = log.data
    return RawLog(bytes.fromhex(log.address[2:]), tuple(topics), data)


def _plain(text: str) -> str:
    if "LackOfFund" in text:
        return "insufficient funds for gas * price + value"
    return f"the call can't run: {text[:200]}"


def _text(address: bytes) -> str:
    return "0x" + address.hex()
