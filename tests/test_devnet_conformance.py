"""What every devnet answers, whichever program runs it: the same tests on the embedded chain and on anvil."""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Iterator

import pytest
from eth_account import Account

from divault.chain import contracts
from divault.devnet import DEVNET_CHAIN_ID, MULTICALL, rlp, start_devnet
from divault.devnet.blocks import list_root
from divault.keccak import keccak256
from tests.jsonrpc import Node, post

USDC = contracts.load("TestUSDC")
TRANSFER = "0xddf252ad1be2c89b69c2b068fc378daa952ba7f163c4a11628f55a4df523b3ef"


@pytest.fixture(scope="module", params=["embedded", "anvil"])
def chain(request: pytest.FixtureRequest) -> Iterator[Node]:
    with start_devnet(anvil=request.param == "anvil") as devnet:
        node = Node(devnet)
        assert node.ask("eth_chainId") == hex(DEVNET_CHAIN_ID)  # before the first write: is it ours?
        assert devnet.name == request.param
        yield node


@pytest.fixture(scope="module")
def usdc(chain: Node) -> str:
    return chain.deploy(chain.accounts[0], USDC.deployment())


@pytest.fixture
def node(chain: Node, usdc: str) -> Iterator[Node]:
    """The chain, put back to where it was after the test."""
    before = chain.ask("evm_snapshot")
    yield chain
    assert chain.ask("evm_revert", before) is True


def mint(node: Node, usdc: str, to: str, amount: int) -> dict:
    return node.send(node.accounts[0], to=usdc, data=USDC.encode("mint", to.lower(), amount))


def balance_call(usdc: str, holder: str) -> dict[str, str]:
    return {"to": usdc, "data": "0x" + USDC.encode("balanceOf", holder.lower()).hex()}


def usdc_balance(node: Node, usdc: str, holder: str, where: object = "latest") -> int:
    return int(node.ask("eth_call", balance_call(usdc, holder), where), 16)


# --- the chain and its blocks ----------------------------------------------------------------------------------------


def test_accounts_are_funded_and_the_clock_is_ours(node: Node) -> None:
    assert all(node.balance(str(account.address)) > 10**21 for account in node.accounts)
    assert abs(int(node.head()["timestamp"], 16) - time.time()) < 60
    assert node.ask("net_version") == str(DEVNET_CHAIN_ID)
    assert isinstance(node.ask("web3_clientVersion"), str)


def test_block_hash_is_the_hash_of_the_header_and_names_its_parent(node: Node) -> None:
    for number in range(int(node.ask("eth_blockNumber"), 16) + 1):
        block = node.ask("eth_getBlockByNumber", hex(number), False)

        assert block["hash"] == "0x" + keccak256(rlp.encode(header_fields(block))).hex()
        assert block == node.ask("eth_getBlockByHash", block["hash"], False)
        if number:
            assert block["parentHash"] == node.ask("eth_getBlockByNumber", hex(number - 1), False)["hash"]


HEADER = (
    *("parentHash", "sha3Uncles", "miner", "stateRoot", "transactionsRoot", "receiptsRoot", "logsBloom"),
    *("difficulty", "number", "gasLimit", "gasUsed", "timestamp", "extraData", "mixHash", "nonce"),
    *("baseFeePerGas", "withdrawalsRoot", "blobGasUsed", "excessBlobGas", "parentBeaconBlockRoot"),
)
NUMBERS = {"difficulty", "number", "gasLimit", "gasUsed", "timestamp", "baseFeePerGas", "blobGasUsed", "excessBlobGas"}


def header_fields(block: dict) -> list[bytes | int]:
    fields = [int(block[n], 16) if n in NUMBERS else bytes.fromhex(block[n][2:]) for n in HEADER]
    return [*fields, bytes.fromhex(block["requestsHash"][2:])] if "requestsHash" in block else fields  # Prague's


def test_unknown_blocks_are_null_and_unknown_transactions_too(node: Node) -> None:
    assert node.ask("eth_getBlockByNumber", "0xffffff", False) is None
    assert node.ask("eth_getBlockByHash", "0x" + "ab" * 32, False) is None
    assert node.ask("eth_getTransactionReceipt", "0x" + "ab" * 32) is None
    assert node.ask("eth_getTransactionByHash", "0x" + "ab" * 32) is None


def test_safe_and_finalized_lie_behind_the_head(node: Node) -> None:
    node.ask("anvil_mine", hex(80))
    head = int(node.ask("eth_blockNumber"), 16)
    safe, final = (int(node.ask("eth_getBlockByNumber", tag, False)["number"], 16) for tag in ("safe", "finalized"))

    assert (head - safe, head - final) == (32, 64)


# --- transactions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"gasPrice": 10 * 10**9},
        {"maxFeePerGas": 10 * 10**9, "maxPriorityFeePerGas": 10**9},
        {"gasPrice": 10 * 10**9, "type": 1, "accessList": [{"address": "0x" + "77" * 20, "storageKeys": [0]}]},
    ],
    ids=["legacy", "eip1559", "access-list"],
)
def test_signed_transactions_move_value_and_cost_exactly_their_gas(node: Node, fields: dict) -> None:
    sender, to = node.accounts[1], "0x" + "66" * 20
    before = node.balance(str(sender.address))
    receipt = node.send(sender, to=to, value=12345, **fields)
    tx = node.ask("eth_getTransactionByHash", receipt["transactionHash"])
    block = node.ask("eth_getBlockByHash", receipt["blockHash"], True)
    used, price = int(receipt["gasUsed"], 16), int(receipt["effectiveGasPrice"], 16)

    assert receipt["status"] == "0x1"
    assert used == 21_000 + (2_400 + 1_900 if fields.get("type") == 1 else 0)
    assert node.balance(to) == 12345
    assert node.balance(str(sender.address)) == before - 12345 - used * price
    assert price == min(10 * 10**9, int(block["baseFeePerGas"], 16) + int(fields.get("maxPriorityFeePerGas", 10**10)))
    assert (tx["from"].lower(), tx["to"].lower()) == (str(sender.address).lower(), to)
    assert (tx["value"], tx["blockHash"], tx["transactionIndex"]) == (hex(12345), receipt["blockHash"], "0x0")
    assert [t["hash"] for t in block["transactions"]] == [receipt["transactionHash"]]


def test_transaction_for_another_chain_is_refused(node: Node) -> None:
    raw = node.sign(node.accounts[1], to="0x" + "66" * 20, value=1, chainId=1)

    assert node.error("eth_sendRawTransaction", raw)["code"] < 0
    assert node.balance("0x" + "66" * 20) == 0


def test_used_nonce_is_refused(node: Node) -> None:
    sender = node.accounts[1]
    used = node.nonce(sender)
    node.send(sender, to="0x" + "66" * 20, value=1)

    error = node.error("eth_sendRawTransaction", node.sign(sender, to="0x" + "66" * 20, value=2, nonce=used))

    assert "nonce" in error["message"].lower()


def test_nonce_gap_waits_for_the_one_before(node: Node) -> None:
    sender = node.accounts[1]
    first = node.nonce(sender)
    later = node.ask("eth_sendRawTransaction", node.sign(sender, to="0x" + "66" * 20, value=2, nonce=first + 1))

    assert node.ask("eth_getTransactionReceipt", later) is None
    node.ask("eth_sendRawTransaction", node.sign(sender, to="0x" + "66" * 20, value=1, nonce=first))
    node.receipt(later)
    assert node.balance("0x" + "66" * 20) == 3


def test_sender_without_funds_is_refused(node: Node) -> None:
    poor = Account.create()
    fields = {"nonce": 0, "gas": 21_000, "gasPrice": 10**10, "to": "0x" + "66" * 20, "value": 1, "chainId": 77001}
    raw = "0x" + bytes(Account.sign_transaction(fields, poor.key).raw_transaction).hex()

    assert "insufficient funds" in node.error("eth_sendRawTransaction", raw)["message"].lower()


def test_too_little_gas_and_too_low_a_fee_are_refused(node: Node) -> None:
    sender = node.accounts[1]

    assert "gas" in node.error("eth_sendRawTransaction", node.sign(sender, to="0x" + "66" * 20, gas=20_999))["message"]
    low = node.sign(sender, to="0x" + "66" * 20, maxFeePerGas=1, maxPriorityFeePerGas=1)
    assert "fee" in node.error("eth_sendRawTransaction", low)["message"]


@pytest.mark.parametrize("raw", ["0x", "0x02", "0xc0", "0x02f8", "0xff00", "0x04c0", "0x" + "00" * 100, "zz", "0x123"])
def test_garbage_transactions_are_refused(node: Node, raw: str) -> None:
    assert node.error("eth_sendRawTransaction", raw)["code"] < 0


def test_failed_transaction_is_mined_charged_and_leaves_no_trace(node: Node, usdc: str) -> None:
    sender = node.accounts[2]
    before = node.balance(str(sender.address))
    receipt = node.send(sender, to=usdc, data=USDC.encode("transfer", "0x" + "66" * 20, 1))

    assert receipt["status"] == "0x0"
    assert receipt["logs"] == []
    assert node.balance(str(sender.address)) == before - int(receipt["gasUsed"], 16) * int(
        receipt["effectiveGasPrice"], 16
    )
    assert usdc_balance(node, usdc, "0x" + "66" * 20) == 0


def test_gas_of_contract_calls_is_the_chain_s(node: Node, usdc: str) -> None:
    """Cold slots on every transaction and refunds capped: the figures are those of a public Cancun chain."""
    holder, other = node.accounts[3], "0x" + "67" * 20
    mint(node, usdc, str(holder.address), 1200)
    first = node.send(holder, to=usdc, data=USDC.encode("transfer", other, 400))
    second = node.send(holder, to=usdc, data=USDC.encode("transfer", other, 400))
    emptied = node.send(holder, to=usdc, data=USDC.encode("transfer", other, 400))

    used = [int(receipt["gasUsed"], 16) for receipt in (first, second, emptied)]
    assert used[0] - used[1] == 17_100  # a slot that goes from zero to something, once
    assert used[1] - used[2] == 4_800  # the refund for clearing the sender's slot


def test_waiting_transaction_has_no_receipt_until_it_is_mined(node: Node) -> None:
    node.ask("evm_setAutomine", False)
    try:
        sender = node.accounts[4]
        tx = node.ask("eth_sendRawTransaction", node.sign(sender, to="0x" + "66" * 20, value=1))

        assert node.ask("eth_getTransactionReceipt", tx) is None
        assert node.ask("eth_getTransactionByHash", tx)["blockHash"] is None
        assert node.nonce(sender) == int(node.ask("eth_getTransactionCount", str(sender.address), "latest"), 16) + 1
        node.ask("evm_mine")
        assert node.ask("eth_getTransactionReceipt", tx)["status"] == "0x1"
    finally:
        node.ask("evm_setAutomine", True)


def test_several_transactions_share_a_block(node: Node, usdc: str) -> None:
    """Enough of them for every shape of node in the tries behind the two roots, computed here from what was sent."""
    node.ask("evm_setAutomine", False)
    try:
        data = USDC.encode("mint", "0x" + "66" * 20, 5)
        start = node.nonce(node.accounts[0])
        raws = [node.sign(node.accounts[0], to=usdc, data=data, nonce=start + offset) for offset in range(20)]
        hashes = [node.ask("eth_sendRawTransaction", raw) for raw in raws]
        node.ask("evm_mine")
    finally:
        node.ask("evm_setAutomine", True)
    block = node.head()
    receipts = [node.ask("eth_getTransactionReceipt", tx) for tx in block["transactions"]]

    assert block["transactions"] == hashes
    assert [receipt["transactionIndex"] for receipt in receipts] == [hex(i) for i in range(20)]
    assert [log["logIndex"] for receipt in receipts for log in receipt["logs"]] == [hex(i) for i in range(20)]
    assert receipts[-1]["cumulativeGasUsed"] == block["gasUsed"]
    assert node.ask("eth_getBlockReceipts", block["number"]) == receipts
    assert usdc_balance(node, usdc, "0x" + "66" * 20) == 100
    assert block["transactionsRoot"] == "0x" + list_root([bytes.fromhex(raw[2:]) for raw in raws]).hex()
    assert block["receiptsRoot"] == "0x" + list_root([receipt_bytes(receipt) for receipt in receipts]).hex()
    blooms = [int(receipt["logsBloom"], 16) for receipt in receipts]
    assert int(block["logsBloom"], 16) == functools.reduce(operator.or_, blooms) != 0


def receipt_bytes(receipt: dict) -> bytes:
    logs = [[raw(log["address"]), [raw(topic) for topic in log["topics"]], raw(log["data"])] for log in receipt["logs"]]
    numbers = [int(receipt["status"], 16), int(receipt["cumulativeGasUsed"], 16)]
    return raw("0x0" + receipt["type"][2:]) + rlp.encode([*numbers, raw(receipt["logsBloom"]), logs])


def raw(text: str) -> bytes:
    return bytes.fromhex(text[2:])


# --- calls -----------------------------------------------------------------------------------------------------------


def test_call_at_an_old_block_sees_the_old_state(node: Node, usdc: str) -> None:
    holder = str(node.accounts[5].address)
    old = node.head()
    mint(node, usdc, holder, 700)
    new = node.head()
    mint(node, usdc, holder, 1)

    assert usdc_balance(node, usdc, holder, {"blockHash": old["hash"]}) == 0
    assert usdc_balance(node, usdc, holder, {"blockHash": new["hash"], "requireCanonical": True}) == 700
    assert usdc_balance(node, usdc, holder, new["number"]) == 700
    assert usdc_balance(node, usdc, holder, {"blockNumber": old["number"]}) == 0
    assert usdc_balance(node, usdc, holder, "latest") == usdc_balance(node, usdc, holder, "pending") == 701


def test_account_fields_at_an_old_block(node: Node) -> None:
    sender = node.accounts[5]
    old = node.head()["number"]
    before = node.balance(str(sender.address))
    created = node.deploy(sender, USDC.deployment())

    assert node.balance(str(sender.address), old) == before > node.balance(str(sender.address))
    assert node.ask("eth_getCode", created, old) == "0x"
    assert node.ask("eth_getCode", created, "latest") != "0x"
    assert int(node.ask("eth_getTransactionCount", str(sender.address), old), 16) == node.nonce(sender) - 1


def test_call_at_a_block_that_was_taken_back_is_an_error(node: Node, usdc: str) -> None:
    holder = str(node.accounts[6].address)
    snapshot = node.ask("evm_snapshot")
    receipt = mint(node, usdc, holder, 9)
    orphan = receipt["blockHash"]
    assert usdc_balance(node, usdc, holder, {"blockHash": orphan}) == 9

    assert node.ask("evm_revert", snapshot) is True
    mint(node, usdc, holder, 4)

    assert node.head()["number"] == receipt["blockNumber"]
    assert node.head()["hash"] != orphan
    assert node.error("eth_call", balance_call(usdc, holder), {"blockHash": orphan, "requireCanonical": True})
    assert node.error("eth_getLogs", {"blockHash": orphan})
    assert node.ask("eth_getBlockByHash", orphan, False) is None
    assert node.ask("eth_getTransactionReceipt", receipt["transactionHash"]) is None
    assert usdc_balance(node, usdc, holder) == 4


def test_revert_restores_balances_nonces_and_time(node: Node) -> None:
    sender = node.accounts[6]
    state = (node.balance(str(sender.address)), node.nonce(sender), node.head()["hash"])
    snapshot = node.ask("evm_snapshot")
    node.send(sender, to="0x" + "66" * 20, value=5)
    node.ask("evm_increaseTime", 1000)
    node.ask("evm_mine")

    assert node.ask("evm_revert", snapshot) is True
    assert state == (node.balance(str(sender.address)), node.nonce(sender), node.head()["hash"])
    assert node.ask("evm_revert", snapshot) is False  # each serves once


def test_revert_of_a_call_carries_code_3_and_its_data(node: Node, usdc: str) -> None:
    call = {
        "to": usdc,
        "from": str(node.accounts[7].address),
        "data": "0x" + USDC.encode("transfer", "0x" + "66" * 20, 5).hex(),
    }
    error = node.error("eth_call", call, "latest")

    assert error["code"] == 3
    assert error["message"].startswith("execution reverted")
    assert error["data"].startswith("0x" + keccak256(b"ERC20InsufficientBalance(address,uint256,uint256)")[:4].hex())
    assert node.error("eth_estimateGas", call)["data"] == error["data"]


def test_code_override_and_deployless_call(node: Node) -> None:
    returns_42 = "0x602a60005260206000f3"
    nowhere = "0x" + "99" * 20

    assert int(node.ask("eth_call", {"to": nowhere}, "latest", {nowhere: {"code": returns_42}}), 16) == 42
    assert node.ask("eth_call", {"to": nowhere}, "latest") == "0x"  # no trace of it
    assert int(node.ask("eth_call", {"data": returns_42}, "latest"), 16) == 42
    assert (
        node.ask("eth_call", {"data": "0x60016000f3"}, "latest") == "0x00"
    )  # one byte, as an ERC-6492 validator gives


def test_state_override_changes_one_call_only(node: Node, usdc: str) -> None:
    holder = str(node.accounts[7].address).lower()
    slot = (
        "0x" + keccak256(bytes(12) + bytes.fromhex(holder[2:]) + bytes(32)).hex()
    )  # OpenZeppelin: _balances is slot 0
    override = {usdc: {"stateDiff": {slot: "0x" + (77).to_bytes(32, "big").hex()}}}

    assert int(node.ask("eth_call", balance_call(usdc, holder), "latest", override), 16) == 77
    assert usdc_balance(node, usdc, holder) == 0


def test_multicall_is_there(node: Node, usdc: str) -> None:
    multicall = contracts.load("Multicall")
    holder = str(node.accounts[5].address).lower()
    mint(node, usdc, holder, 31)
    calls = [(usdc, False, USDC.encode("balanceOf", holder)), (usdc, True, b"\xde\xad\xbe\xef")]
    returned = node.ask("eth_call", {"to": str(MULTICALL), "data": "0x" + multicall.encode("aggregate3", calls).hex()})
    results = multicall.decode("aggregate3", bytes.fromhex(returned[2:]))

    assert results[0] == (True, (31).to_bytes(32, "big"))
    assert results[1][0] is False
    strict = [(usdc, False, b"\xde\xad\xbe\xef")]
    assert node.error("eth_call", {"to": str(MULTICALL), "data": "0x" + multicall.encode("aggregate3", strict).hex()})


def test_estimate_is_enough_and_not_much_more(node: Node, usdc: str) -> None:
    sender = node.accounts[0]
    data = USDC.encode("mint", "0x" + "66" * 20, 1)
    estimated = int(
        node.ask("eth_estimateGas", {"from": str(sender.address), "to": usdc, "data": "0x" + data.hex()}), 16
    )
    receipt = node.send(sender, to=usdc, data=data, gas=estimated)

    assert receipt["status"] == "0x1"
    assert int(receipt["gasUsed"], 16) <= estimated <= 1.05 * int(receipt["gasUsed"], 16)
    deployment = {"from": str(sender.address), "data": "0x" + USDC.deployment().hex()}
    assert 10**6 < int(node.ask("eth_estimateGas", deployment), 16) < 2 * 10**6
    assert (
        int(node.ask("eth_estimateGas", {"from": str(sender.address), "to": "0x" + "66" * 20, "value": "0x1"}), 16)
        == 21000
    )


# --- logs and fees ---------------------------------------------------------------------------------------------------


def test_logs_by_block_range_address_and_topic(node: Node, usdc: str) -> None:
    one, two = ("0x" + "61" * 20, "0x" + "62" * 20)
    first = mint(node, usdc, one, 1)
    second = mint(node, usdc, two, 2)
    span = {"fromBlock": first["blockNumber"], "toBlock": "latest"}
    to_two = "0x" + "00" * 12 + "62" * 20

    def values(**fields: object) -> list[int]:
        return [int(log["data"], 16) for log in node.ask("eth_getLogs", fields)]

    assert values(**span) == [1, 2]
    assert values(**span, address=usdc, topics=[TRANSFER]) == [1, 2]
    assert values(**span, address=["0x" + "63" * 20, usdc], topics=[TRANSFER, None, to_two]) == [2]
    assert values(**span, topics=[[TRANSFER, "0x" + "00" * 32], [], [to_two]]) == [2]
    assert values(blockHash=first["blockHash"]) == [1]
    assert values(blockHash=second["blockHash"], address=usdc) == [2]
    assert values() == [2]  # the head alone
    assert values(**span, address="0x" + "63" * 20) == []
    assert values(**span, topics=[TRANSFER, None, None, TRANSFER]) == []
    log = node.ask("eth_getLogs", {"blockHash": first["blockHash"]})[0]
    assert log == first["logs"][0]
    assert (log["removed"], log["transactionHash"]) == (False, first["transactionHash"])


@pytest.mark.parametrize(
    "fields",
    [
        {"blockHash": "0x" + "ab" * 32},
        {"blockHash": "0x" + "ab" * 32, "fromBlock": "0x1"},
        {"address": "0x12"},
        {"topics": ["0x12"]},
    ],
)
def test_bad_log_filters_are_refused(node: Node, fields: dict) -> None:
    assert node.error("eth_getLogs", fields)["code"] < 0


def test_fee_history_continues_into_the_next_block(node: Node, usdc: str) -> None:
    mint(node, usdc, "0x" + "61" * 20, 1)
    history = node.ask("eth_feeHistory", "0x2", "latest", [50])
    node.ask("evm_mine")

    assert len(history["baseFeePerGas"]) == 3
    assert len(history["gasUsedRatio"]) == 2
    assert history["reward"][-1] == [hex(10**9)]
    assert history["baseFeePerGas"][-1] == node.head()["baseFeePerGas"]
    assert int(node.ask("eth_gasPrice"), 16) > int(node.head()["baseFeePerGas"], 16)
    assert int(node.ask("eth_maxPriorityFeePerGas"), 16) > 0


# --- control ---------------------------------------------------------------------------------------------------------


def test_time_moves_as_told_and_never_back(node: Node) -> None:
    then = int(node.head()["timestamp"], 16)
    node.ask("evm_setNextBlockTimestamp", then + 500)
    node.ask("evm_mine")
    assert int(node.head()["timestamp"], 16) == then + 500

    node.ask("evm_increaseTime", 3600)
    node.ask("evm_mine")
    assert int(node.head()["timestamp"], 16) >= then + 4000
    assert node.error("evm_setNextBlockTimestamp", then)["code"] < 0


def test_many_blocks_do_not_run_ahead_of_the_clock(node: Node) -> None:
    """A chain ahead of the wall clock would call fresh payments expired."""
    for _ in range(30):
        node.ask("evm_mine")

    assert int(node.head()["timestamp"], 16) <= time.time() + 2


def test_code_and_balance_can_be_set(node: Node) -> None:
    place = "0x" + "98" * 20
    node.ask("anvil_setCode", place, "0x602a60005260206000f3")
    node.ask("anvil_setBalance", place, hex(5))

    assert node.ask("eth_getCode", place, "latest") == "0x602a60005260206000f3"
    assert node.balance(place) == 5
    assert int(node.ask("eth_call", {"to": place}, "latest"), 16) == 42


# --- the wire --------------------------------------------------------------------------------------------------------


def test_batch_is_answered_item_by_item(node: Node) -> None:
    body = (
        b'[{"jsonrpc":"2.0","id":7,"method":"eth_chainId","params":[]},'
        b'{"jsonrpc":"2.0","id":"x","method":"no_such","params":[]}]'
    )
    first, second = post(node.url, body)

    assert (first["id"], first["result"]) == (7, hex(DEVNET_CHAIN_ID))
    assert (second["id"], second["error"]["code"]) == ("x", -32601)


@pytest.mark.parametrize(
    "body", [b"{", b"", b"\xff\xfe", b"nonsense", b'{"jsonrpc":"2.0","id":1}', b"[]", b"17", b'"x"']
)
def test_malformed_requests_get_an_error_and_the_chain_lives_on(node: Node, body: bytes) -> None:
    answer = post(node.url, body)
    answer = answer[0] if isinstance(answer, list) else answer

    assert answer["error"]["code"] in (-32700, -32600, -32603, -32601)
    assert node.ask("eth_chainId") == hex(DEVNET_CHAIN_ID)


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("eth_getBalance", ["0x12", "latest"]),
        ("eth_getBalance", []),
        ("eth_getBalance", ["0x" + "11" * 20, "newest"]),
        ("eth_call", [{"to": "0x" + "11" * 20, "data": "0x1"}, "latest"]),
        ("eth_call", [{"to": "0x" + "11" * 20}, {"blockHash": "0x" + "ab" * 32}]),
        ("eth_call", [{"to": "0x" + "11" * 20}, "0xffffff"]),
        ("eth_getBlockByHash", ["0x12", False]),
        ("eth_getTransactionReceipt", ["nothing"]),
        ("evm_revert", ["0x3039"]),
    ],
)
def test_wrong_parameters_get_an_error(node: Node, method: str, params: list) -> None:
    if method == "evm_revert":
        assert node.ask(method, *params) is False
    else:
        assert node.error(method, *params)["code"] < 0
