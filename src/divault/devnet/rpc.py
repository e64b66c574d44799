"""JSON-RPC 2.0 over the embedded chain: bytes in, bytes out, whatever the bytes are. No I/O.

Methods answer as the large nodes do; a method that isn't here is refused by name (-32601). Control methods keep the
names of the common development nodes (`evm_*`, `anvil_*`, `hardhat_*`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from divault.devnet import answers
from divault.devnet.answers import (
    INTERNAL,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    PARSE_ERROR,
    SERVER_ERROR,
    RpcRefused,
    data,
    invalid,
    mapping,
    quantity,
    show,
)
from divault.devnet.blocks import Block
from divault.devnet.chain import SUGGESTED_TIP, EmbeddedChain
from divault.devnet.logs import LogFilter
from divault.devnet.machine import GAS_LIMIT, Message
from divault.devnet.world import Account, Changes

CLIENT_VERSION = "divault-devnet/1/pyrevm-0.3.7"
_SAFE_DEPTH = 32
_FINAL_DEPTH = 64
"""Blocks behind the head that count as safe and final, one and two epochs."""
_MAX_FEE_HISTORY = 1_024
_MAX_MINED_AT_ONCE = 10_000
_CALL_KEYS = {"from", "to", "data", "input", "value", "gas", "gasPrice", "maxFeePerGas", "maxPriorityFeePerGas"}
_IGNORED_CALL_KEYS = {"nonce", "chainId", "type", "accessList"}
_Params = list[Any]


class JsonRpc:
    """The methods of one chain. `answer` never raises."""

    def __init__(self, chain: EmbeddedChain) -> None:
        self._chain = chain
        self._methods = self._table()

    def answer(self, body: bytes) -> bytes:
        """The response body to a request body; empty where only notifications came."""
        try:
            request = orjson.loads(body)
        except orjson.JSONDecodeError:
            return orjson.dumps(_failed(None, RpcRefused(PARSE_ERROR, "parse error: the body is not JSON")))
        if not isinstance(request, list):
            answered = self._one(request)
            return b"" if answered is None else orjson.dumps(answered)
        if not request:
            return orjson.dumps(_failed(None, RpcRefused(INVALID_REQUEST, "invalid request: an empty batch")))
        several = [answered for item in request if (answered := self._one(item)) is not None]
        return orjson.dumps(several) if several else b""

    def _one(self, request: Any) -> dict[str, Any] | None:
        """The response object, None for a notification."""
        if not isinstance(request, dict) or not isinstance(request.get("method"), str):
            return _failed(None, RpcRefused(INVALID_REQUEST, "invalid request: an object with a method is expected"))
        number = request.get("id")
        try:
            result = self._call(request["method"], request.get("params", []))
        except RpcRefused as err:
            response = _failed(number, err)
        except Exception as err:  # noqa: BLE001 - a request ends here: a fault of the devnet is an answer, never a crash
            response = _failed(number, RpcRefused(INTERNAL, f"internal error: {type(err).__name__}: {err}"))
        else:
            response = {"jsonrpc": "2.0", "id": number, "result": result}
        return response if "id" in request else None

    def _call(self, method: str, params: Any) -> Any:
        if method not in self._methods:
            raise RpcRefused(METHOD_NOT_FOUND, f"the method {method[:80]} does not exist/is not available")
        least, most, function = self._methods[method]
        if not isinstance(params, list):
            raise invalid("expected a list")
        while len(params) > least and params[-1] is None:
            params = params[:-1]
        if not least <= len(params) <= most:
            raise invalid(f"{method} takes {least} to {most} parameters, got {len(params)}")
        return function(params)

    def _table(self) -> Mapping[str, tuple[int, int, Callable[[_Params], Any]]]:
        """Each method with its least and largest number of parameters."""
        chain = self._chain
        looking: dict[str, tuple[int, int, Callable[[_Params], Any]]] = {
            "web3_clientVersion": (0, 0, lambda _: CLIENT_VERSION),
            "net_version": (0, 0, lambda _: str(chain.chain_id)),
            "net_listening": (0, 0, lambda _: True),
            "eth_chainId": (0, 0, lambda _: hex(chain.chain_id)),
            "eth_syncing": (0, 0, lambda _: False),
            "eth_accounts": (0, 0, lambda _: []),
            "eth_blockNumber": (0, 0, lambda _: hex(chain.head.header.number)),
            "eth_gasPrice": (0, 0, lambda _: hex(chain.head.header.next_base_fee() + SUGGESTED_TIP)),
            "eth_maxPriorityFeePerGas": (0, 0, lambda _: hex(SUGGESTED_TIP)),
            "eth_feeHistory": (2, 3, self._fee_history),
            "eth_getBlockByNumber": (1, 2, lambda p: self._block_json(self._tagged(p[0]), p)),
            "eth_getBlockByHash": (1, 2, lambda p: self._block_json(chain.block_by_hash(data(p[0], 32)), p)),
            "eth_getBlockReceipts": (1, 1, self._block_receipts),
            "eth_getBalance": (1, 2, lambda p: hex(self._account(p).balance)),
            "eth_getCode": (1, 2, lambda p: show(self._account(p).code)),
            "eth_getTransactionCount": (1, 2, self._transaction_count),
            "eth_getStorageAt": (2, 3, self._storage_at),
            "eth_getTransactionByHash": (1, 1, self._transaction),
            "eth_getTransactionReceipt": (1, 1, self._receipt),
            "eth_getLogs": (1, 1, self._logs),
            "eth_call": (1, 3, self._eth_call),
            "eth_estimateGas": (1, 3, self._estimate),
            "eth_sendRawTransaction": (1, 1, lambda p: show(chain.submit(data(p[0])))),
        }
        control: dict[str, tuple[int, int, Callable[[_Params], Any]]] = {
            "evm_snapshot": (0, 0, lambda _: hex(chain.snapshot())),
            "evm_revert": (1, 1, lambda p: chain.revert(quantity(p[0]))),
            "evm_mine": (0, 1, self._mine_one),
            "anvil_mine": (0, 2, self._mine_many),
            "evm_setAutomine": (1, 1, self._set_automine),
            "evm_increaseTime": (1, 1, lambda p: chain.advance_time(quantity(p[0]))),
            "evm_setNextBlockTimestamp": (1, 1, lambda p: chain.set_next_timestamp(quantity(p[0]))),
            "anvil_setBalance": (2, 2, lambda p: self._set(p[0], balance=quantity(p[1]))),
            "anvil_setCode": (2, 2, lambda p: self._set(p[0], code=data(p[1]))),
            "anvil_setNonce": (2, 2, lambda p: self._set(p[0], nonce=quantity(p[1]))),
            "anvil_setStorageAt": (3, 3, self._set_storage),
        }
        aliases = {name.replace("anvil_", "hardhat_"): entry for name, entry in control.items()}
        return {**looking, **control, **aliases}

    # --- blocks and accounts ---------------------------------------------------------------------------------------

    def _tagged(self, tag: Any) -> Block | None:
        head = self._chain.head.header.number
        numbers = {
            "latest": head,
            "pending": head,
            "earliest": 0,
            "safe": max(0, head - _SAFE_DEPTH),
            "finalized": max(0, head - _FINAL_DEPTH),
        }
        return self._chain.block(numbers[tag] if isinstance(tag, str) and tag in numbers else quantity(tag))

    def _at(self, where: Any) -> Block:
        """The block of a tag, number, hash or EIP-1898 object, which must be part of the chain."""
        if isinstance(where, str) and len(where) == 66:  # 0x and 32 bytes: no height is that large
            where = {"blockHash": where}
        block = self._named(where) if isinstance(where, dict) else self._tagged(where)
        if block is None:
            raise RpcRefused(SERVER_ERROR, "header not found")
        return block

    def _named(self, where: dict[str, Any]) -> Block | None:
        if "blockHash" in where and "blockNumber" not in where:
            return self._chain.block_by_hash(data(where["blockHash"], 32))
        if "blockNumber" in where and "blockHash" not in where:
            return self._tagged(where["blockNumber"])
        raise invalid("a block is named by blockHash or by blockNumber")

    def _block_json(self, block: Block | None, params: _Params) -> dict[str, Any] | None:
        full = params[1] if len(params) > 1 else False
        if type(full) is not bool:
            raise invalid("the second parameter is true or false")
        return None if block is None else block.to_json(self._chain.chain_id, full=full)

    def _block_receipts(self, params: _Params) -> list[dict[str, Any]]:
        block = self._at(params[0])
        return [block.receipt_json(index) for index in range(len(block.receipts))]

    def _account(self, params: _Params) -> Account:
        block = self._at(params[1] if len(params) > 1 else "latest")
        return self._chain.world(block).account(data(params[0], 20))

    def _transaction_count(self, params: _Params) -> str:
        if params[1:] == ["pending"]:
            return hex(self._chain.next_nonce(data(params[0], 20)))
        return hex(self._account(params).nonce)

    def _storage_at(self, params: _Params) -> str:
        block = self._at(params[2] if len(params) > 2 else "latest")
        index = int.from_bytes(data(params[1]), "big") if len(str(params[1])) == 66 else quantity(params[1])
        return f"0x{self._chain.world(block).slot(data(params[0], 20), index):064x}"

    def _fee_history(self, params: _Params) -> dict[str, Any]:
        newest = self._at(params[1]).header.number
        count = min(quantity(params[0]), _MAX_FEE_HISTORY, newest + 1)
        percentiles = params[2] if len(params) > 2 else []
        if not isinstance(percentiles, list) or not all(
            isinstance(p, int | float) and 0 <= p <= 100 for p in percentiles
        ):
            raise invalid("percentiles are numbers from 0 to 100")
        blocks = [b for n in range(newest - count + 1, newest + 1) if (b := self._chain.block(n)) is not None]
        history: dict[str, Any] = {
            "oldestBlock": hex(newest - count + 1),
            "baseFeePerGas": [hex(b.header.base_fee) for b in blocks]
            + [hex(b.header.next_base_fee()) for b in blocks[-1:]],
            "gasUsedRatio": [b.header.gas_used / GAS_LIMIT for b in blocks],
        }
        if percentiles:
            history["reward"] = [[hex(_tip_at(block, p)) for p in percentiles] for block in blocks]
        return history

    # --- transactions and logs -------------------------------------------------------------------------------------

    def _transaction(self, params: _Params) -> dict[str, Any] | None:
        digest = data(params[0], 32)
        mined = self._chain.mined(digest)
        if mined is not None:
            return mined[0].transaction_json(mined[1], self._chain.chain_id)
        waiting = self._chain.pool.get(digest)
        nowhere = {"blockHash": None, "blockNumber": None, "transactionIndex": None}
        return None if waiting is None else {**waiting.to_json(self._chain.chain_id), **nowhere}

    def _receipt(self, params: _Params) -> dict[str, Any] | None:
        mined = self._chain.mined(data(params[0], 32))
        return None if mined is None else mined[0].receipt_json(mined[1])

    def _logs(self, params: _Params) -> list[dict[str, Any]]:
        fields = mapping(params[0])
        wanted = LogFilter.parse(fields)
        return [log for block in self._range(fields) for log in wanted.matching(block)]

    def _range(self, fields: dict[str, Any]) -> list[Block]:
        if fields.get("blockHash") is not None:
            if fields.get("fromBlock") is not None or fields.get("toBlock") is not None:
                raise invalid("blockHash stands alone, without fromBlock and toBlock")
            return [self._at({"blockHash": fields["blockHash"]})]
        head = self._chain.head.header.number
        first, last = (self._height(fields.get(name) or "latest") for name in ("fromBlock", "toBlock"))
        if first > last:
            raise invalid("invalid block range: fromBlock is after toBlock")
        return [b for n in range(first, min(last, head) + 1) if (b := self._chain.block(n)) is not None]

    def _height(self, tag: Any) -> int:
        """A height, which may lie beyond the head."""
        named = self._tagged(tag)
        return quantity(tag) if named is None else named.header.number

    # --- calls -----------------------------------------------------------------------------------------------------

    def _eth_call(self, params: _Params) -> str:
        where = params[1] if len(params) > 1 else "latest"
        overrides = self._overrides(params[2], self._at(where)) if len(params) > 2 else None
        around = self._chain.pending_surroundings() if where == "pending" else None
        return show(self._chain.call(_message(params[0]), self._at(where), overrides, around))

    def _estimate(self, params: _Params) -> str:
        return hex(self._chain.estimate(_message(params[0]), self._at(params[1] if len(params) > 1 else "latest")))

    def _overrides(self, fields: Any, block: Block) -> Changes:
        world, changes = self._chain.world(block), Changes()
        for text, given in mapping(fields).items():
            address, wanted = data(text, 20), mapping(given)
            unknown = wanted.keys() - {"balance", "nonce", "code", "state", "stateDiff"}
            if unknown or {"state", "stateDiff"} <= wanted.keys():
                raise invalid("an override holds balance, nonce, code, and either state or stateDiff")
            changes.accounts[address] = _overridden(world.account(address), wanted)
            if "state" in wanted:
                changes.slots.update(world.slots_of(address))
            for index, value in mapping(wanted.get("state", wanted.get("stateDiff", {}))).items():
                slot = int.from_bytes(data(index, 32), "big")
                changes.slots[address, slot] = int.from_bytes(data(value, 32), "big")
        return changes

    # --- control ---------------------------------------------------------------------------------------------------

    def _mine_one(self, params: _Params) -> str:
        given = params[0] if params else None
        if isinstance(given, dict):
            given = given.get("timestamp")
        self._chain.mine(None if given is None else quantity(given))
        return "0x0"

    def _mine_many(self, params: _Params) -> None:
        count = quantity(params[0]) if params else 1
        interval = quantity(params[1]) if len(params) > 1 else None
        if count > _MAX_MINED_AT_ONCE:
            raise invalid(f"at most {_MAX_MINED_AT_ONCE} blocks at once")
        for _ in range(count):
            self._chain.mine(None if interval is None else self._chain.head.header.timestamp + max(1, interval))

    def _set_automine(self, params: _Params) -> None:
        if type(params[0]) is not bool:
            raise invalid("automine is true or false")
        self._chain.automine = params[0]

    def _set(self, text: Any, **fields: Any) -> None:
        address = data(text, 20)
        self._chain.change(Changes({address: _replaced(self._chain.account(address), fields)}))

    def _set_storage(self, params: _Params) -> bool:
        value = int.from_bytes(data(params[2], 32), "big")
        self._chain.change(Changes(slots={(data(params[0], 20), quantity(params[1])): value}))
        return True


def _failed(number: Any, refused: RpcRefused) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": number, "error": refused.to_json()}


def _message(fields: Any) -> Message:
    given = {key: value for key, value in mapping(fields).items() if value is not None}
    unknown = given.keys() - _CALL_KEYS - _IGNORED_CALL_KEYS
    if unknown:
        raise invalid(f"a call has no field {min(unknown)!r}")
    if "data" in given and "input" in given and given["data"] != given["input"]:
        raise invalid("data and input differ")
    return Message(
        sender=data(given.get("from", show(bytes(20))), 20),
        to=data(given["to"], 20) if "to" in given else None,
        data=data(given.get("input", given.get("data", "0x"))),
        value=quantity(given.get("value", "0x0")),
        gas=min(quantity(given.get("gas", GAS_LIMIT)), GAS_LIMIT),
    )


def _overridden(account: Account, wanted: dict[str, Any]) -> Account:
    fields: dict[str, Any] = {name: quantity(wanted[name]) for name in ("balance", "nonce") if name in wanted}
    if "code" in wanted:
        fields["code"] = data(wanted["code"])
    return _replaced(account, fields)


def _replaced(account: Account, fields: dict[str, Any]) -> Account:
    balance, nonce = fields.get("balance", account.balance), fields.get("nonce", account.nonce)
    if nonce >= 2**64 - 1:
        raise answers.invalid("a nonce has less than 64 bits")
    return Account(nonce, balance, fields.get("code", account.code))


def _tip_at(block: Block, percentile: float) -> int:
    """Tip per gas paid at this percentile of the block's gas; 0 for an empty block."""
    paid = sorted((receipt.price - block.header.base_fee, receipt.gas_used) for receipt in block.receipts)
    passed = 0
    for tip, gas in paid:
        passed += gas
        if passed >= percentile / 100 * block.header.gas_used:
            return tip
    return 0
