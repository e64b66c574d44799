"""A JSON-RPC client that hides nothing: tests see the whole answer."""

from __future__ import annotations

import json
import time
import urllib.request
from typing import Any

from eth_account import Account

from divault.devnet import DevAccount, Devnet


def post(url: str, body: bytes) -> Any:
    """The decoded answer to these bytes, None for an empty one."""
    with urllib.request.urlopen(
        urllib.request.Request(url, body, {"Content-Type": "application/json"}), timeout=30
    ) as r:
        text = r.read()
    return json.loads(text) if text else None


class Node:
    """A devnet seen through its HTTP port."""

    def __init__(self, devnet: Devnet) -> None:
        self.devnet = devnet
        self.url = devnet.url
        self.accounts = devnet.accounts
        self._next = 0

    def answer(self, method: str, *params: Any) -> dict[str, Any]:
        self._next += 1
        answer = post(
            self.url,
            json.dumps({"jsonrpc": "2.0", "id": self._next, "method": method, "params": list(params)}).encode(),
        )
        assert answer["id"] == self._next
        assert ("result" in answer) != ("error" in answer)
        return answer

    def ask(self, method: str, *params: Any) -> Any:
        answer = self.answer(method, *params)
        assert "result" in answer, answer
        return answer["result"]

    def error(self, method: str, *params: Any) -> dict[str, Any]:
        answer = self.answer(method, *params)
        assert "error" in answer, answer
        return answer["error"]

    # --- transactions signed by eth-account, never by the node ---

    def sign(self, sender: DevAccount, **fields: Any) -> str:
        """Raw bytes in hex; nonce, gas, fees and chain id are filled in unless given."""
        fields = {"nonce": self.nonce(sender), "gas": 300_000, "value": 0, "chainId": self.devnet.chain_id} | fields
        if "gasPrice" not in fields and "maxFeePerGas" not in fields:
            fields |= {"maxFeePerGas": 10 * 10**9, "maxPriorityFeePerGas": 10**9}
        if isinstance(fields.get("to"), str):
            fields["to"] = bytes.fromhex(fields["to"][2:])
        return "0x" + bytes(Account.sign_transaction(fields, sender.key.reveal()).raw_transaction).hex()

    def nonce(self, sender: DevAccount) -> int:
        return int(self.ask("eth_getTransactionCount", str(sender.address), "pending"), 16)

    def send(self, sender: DevAccount, **fields: Any) -> dict[str, Any]:
        """The receipt of a transaction that was mined."""
        return self.receipt(self.ask("eth_sendRawTransaction", self.sign(sender, **fields)))

    def receipt(self, tx: str) -> dict[str, Any]:
        """Its receipt, as soon as there is one (anvil mines a moment after it answers)."""
        deadline = time.monotonic() + 10
        while (receipt := self.ask("eth_getTransactionReceipt", tx)) is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        return receipt

    def deploy(self, sender: DevAccount, code: bytes) -> str:
        receipt = self.send(sender, data=code, gas=5_000_000)
        assert receipt["status"] == "0x1"
        return receipt["contractAddress"]

    def balance(self, address: str, block: Any = "latest") -> int:
        return int(self.ask("eth_getBalance", address, block), 16)

    def head(self, *, full: bool = False) -> dict[str, Any]:
        return self.ask("eth_getBlockByNumber", "latest", full)
