"""What only the embedded chain promises: strictness beyond anvil's, kept history, roots, and never a crash."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from divault.chain import contracts
from divault.devnet import Devnet, rlp, start_devnet
from divault.devnet import chain as chain_module
from divault.devnet.answers import RpcRefused
from divault.devnet.blocks import list_root
from divault.devnet.chain import EmbeddedChain
from divault.devnet.rpc import JsonRpc
from divault.devnet.transactions import parse
from divault.devnet.world import Account, Changes, World
from divault.errors import ChainUnavailable, SettingsInvalid, TransactionFailed
from divault.keccak import keccak256
from tests.jsonrpc import Node, post

USDC = contracts.load("TestUSDC")
CURVE_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
SINK = "0x" + "66" * 20


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with start_devnet(anvil=False) as devnet:
        yield Node(devnet)


# --- signatures ------------------------------------------------------------------------------------------------------


def test_high_s_is_refused(node: Node) -> None:
    """The same signature in its other form (EIP-2); the original goes through."""
    original = node.sign(node.accounts[1], to=SINK, value=1)
    items = rlp.decode(bytes.fromhex(original[2:])[1:])
    assert isinstance(items, list)
    parity, s = items[-3], items[-1]
    assert isinstance(s, bytes)
    flipped = CURVE_ORDER - int.from_bytes(s, "big")
    malleated = b"\x02" + rlp.encode([*items[:-3], b"" if parity else b"\x01", items[-2], flipped])

    error = node.error("eth_sendRawTransaction", "0x" + malleated.hex())

    assert (error["code"], "high_s" in error["message"]) == (-32000, True)
    assert node.receipt(node.ask("eth_sendRawTransaction", original))["status"] == "0x1"


@pytest.mark.parametrize("change", [{"r": 0}, {"s": 0}, {"r": CURVE_ORDER}, {"v": 2}])
def test_signature_out_of_range_is_refused(node: Node, change: dict) -> None:
    items = rlp.decode(bytes.fromhex(node.sign(node.accounts[1], to=SINK)[2:])[1:])
    assert isinstance(items, list)
    for name, value in change.items():
        items[{"v": -3, "r": -2, "s": -1}[name]] = value.to_bytes((value.bit_length() + 7) // 8, "big")

    assert node.error("eth_sendRawTransaction", "0x02" + rlp.encode(items).hex())["code"] == -32000


def test_legacy_without_replay_protection_is_refused(node: Node) -> None:
    fields = [0, 10**10, 21_000, bytes(20), 0, b"", 27, 1, 1]

    assert "EIP-155" in node.error("eth_sendRawTransaction", "0x" + rlp.encode(fields).hex())["message"]


def test_same_bytes_twice_are_known_and_a_cheaper_replacement_is_refused(node: Node) -> None:
    node.ask("evm_setAutomine", False)
    sender = node.accounts[2]
    start = node.nonce(sender)
    raw = node.sign(sender, to=SINK, value=1, nonce=start)
    first = node.ask("eth_sendRawTransaction", raw)

    assert node.error("eth_sendRawTransaction", raw)["message"] == "already known"
    same_price = node.sign(sender, to=SINK, value=2, nonce=start)
    assert "underpriced" in node.error("eth_sendRawTransaction", same_price)["message"]
    dearer = node.sign(sender, to=SINK, value=3, nonce=start, maxFeePerGas=20 * 10**9, maxPriorityFeePerGas=2 * 10**9)
    second = node.ask("eth_sendRawTransaction", dearer)
    node.ask("evm_mine")
    node.ask("evm_setAutomine", True)
    assert node.ask("eth_getTransactionByHash", first) is None
    assert node.ask("eth_getTransactionReceipt", second)["status"] == "0x1"


# --- history ---------------------------------------------------------------------------------------------------------


def counter_chain(writes: int) -> tuple[EmbeddedChain, bytes]:
    """A chain whose account at 0x77... holds the number of the block in its balance."""
    chain, place = EmbeddedChain(1, []), b"\x77" * 20
    for number in range(1, writes + 1):
        chain.mine()
        chain.change(Changes({place: Account(balance=number)}))
    return chain, place


def test_every_old_block_answers_with_its_own_state() -> None:
    chain, place = counter_chain(40)

    for number in (0, 1, 39, 40, 7, 20):  # more of them than machines are kept
        block = chain.block(number)
        assert block is not None
        assert chain.world(block).account(place).balance == number


def test_state_beyond_the_bound_is_refused_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_module, "KEPT_BLOCKS", 5)
    chain, place = counter_chain(20)
    kept, gone = chain.block(16), chain.block(10)
    assert kept is not None
    assert gone is not None

    assert chain.world(kept).account(place).balance == 16
    with pytest.raises(RpcRefused, match="no longer kept"):
        chain.world(gone)


def test_blocks_after_a_revert_never_repeat_those_before_it() -> None:
    chain = EmbeddedChain(1, [], clock=lambda: 1000.0)
    seen = set()
    for _ in range(3):
        snapshot = chain.snapshot()
        seen |= {chain.mine().hash, chain.mine().hash}
        assert chain.revert(snapshot)

    assert len(seen) == 6


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=4), max_size=12))
def test_undo_gives_back_exactly_what_was(steps: list[list[tuple[int, int]]]) -> None:
    world, marks, states = World(), [], []
    for step in steps:
        marks.append(world.mark)
        states.append({i: world.slot(b"a", i) for i in range(4)})
        world.apply(Changes(slots={(b"a", index): value for index, value in step}))
    for mark, state in zip(marks, states, strict=True):
        assert {i: world.at(mark).slot(b"a", i) for i in range(4)} == state
    for mark, state in reversed(list(zip(marks, states, strict=True))):
        world.undo_to(mark)
        assert {i: world.slot(b"a", i) for i in range(4)} == state


def test_selfdestruct_in_the_creating_transaction_leaves_nothing(node: Node) -> None:
    """EIP-6780: only then is an account deleted. CODE: store 1 at slot 1, destroy itself in favour of the sink."""
    gone = "60016001557366" + "66" * 19 + "ff"
    receipt = node.send(node.accounts[3], data=bytes.fromhex(gone), gas=200_000)

    assert receipt["status"] == "0x1"
    assert node.ask("eth_getCode", receipt["contractAddress"], "latest") == "0x"
    assert int(node.ask("eth_getStorageAt", receipt["contractAddress"], "0x1", "latest"), 16) == 0


def test_clearing_a_slot_and_writing_it_again_costs_what_it_costs(node: Node) -> None:
    """Transient and warm state of one transaction never leaks into the next: equal work, equal gas."""
    usdc = node.deploy(node.accounts[0], USDC.deployment())
    holder = node.accounts[4]
    node.send(node.accounts[0], to=usdc, data=USDC.encode("mint", str(holder.address).lower(), 10**6))
    data = USDC.encode("transfer", SINK, 1)
    node.send(holder, to=usdc, data=data)

    assert len({node.send(holder, to=usdc, data=data)["gasUsed"] for _ in range(4)}) == 1


# --- roots -----------------------------------------------------------------------------------------------------------


def test_trie_root_of_known_lists() -> None:
    """The empty trie of the yellow paper, and one leaf by hand; larger ones are compared with anvil's blocks."""
    leaf = rlp.encode([bytes([0x20]) + rlp.encode(0), b"x" * 40])

    assert list_root([]).hex() == "56e81f171bcc55a6ff8345e692c0f86e5b48e01b996cadc001622fb5e363b421"
    assert list_root([b"x" * 40]) == keccak256(leaf)


# --- the wire --------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_bytes_get_an_answer(data: bytes) -> None:
    answer = RPC.answer(data)

    assert answer == b"" or isinstance(json.loads(answer), dict | list)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(["latest", "0x1", SINK, "0x" + "00" * 32]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["to", "data", "blockHash", "topics"]), inner)
    ),
    max_leaves=6,
)
RPC = JsonRpc(EmbeddedChain(1, []))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(set(RPC._table()) - {"anvil_mine", "hardhat_mine"})), JSON)
def test_any_parameters_get_a_result_or_a_plain_error(method: str, params: object) -> None:
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
    answer = json.loads(RPC.answer(body))

    assert ("result" in answer) != ("error" in answer)
    assert answer.get("error", {}).get("code") != -32603, answer


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300) | st.binary(max_size=100).map(lambda tail: b"\x02\xf8" + tail))
def test_any_transaction_bytes_are_parsed_or_refused(raw: bytes) -> None:
    with pytest.raises(RpcRefused):
        parse(raw, 1)


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.binary(max_size=70), lambda inner: st.lists(inner, max_size=5), max_leaves=20))
def test_rlp_round_trip(item: rlp.Item) -> None:
    assert rlp.decode(rlp.encode(item)) == item


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_rlp_decodes_one_spelling_only(data: bytes) -> None:
    try:
        item = rlp.decode(data)
    except ValueError:
        return
    assert rlp.encode(item) == data


def test_notifications_are_carried_out_in_silence(node: Node) -> None:
    before = int(node.ask("eth_blockNumber"), 16)

    assert post(node.url, b'{"jsonrpc":"2.0","method":"evm_mine","params":[]}') is None
    assert int(node.ask("eth_blockNumber"), 16) == before + 1


def test_only_post_is_answered(node: Node) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught, urllib.request.urlopen(node.url):
        pass
    caught.value.close()

    assert caught.value.code == 405


# --- starting and stopping -------------------------------------------------------------------------------------------


def test_closing_ends_thread_and_port() -> None:
    before = set(threading.enumerate())
    with start_devnet(anvil=False) as devnet:
        assert devnet.rpc("eth_blockNumber") == "0x0"
        assert set(threading.enumerate()) > before
    devnet.close()  # a second time

    assert set(threading.enumerate()) == before
    with pytest.raises(ChainUnavailable):
        devnet.rpc("eth_blockNumber")


def test_taken_port_is_named(node: Node) -> None:
    port = int(node.url.rpartition(":")[2])

    with pytest.raises(SettingsInvalid, match=str(port)):
        start_devnet(anvil=False, port=port)


def test_two_devnets_live_side_by_side_and_each_knows_itself() -> None:
    with start_devnet(anvil=False) as one, start_devnet(anvil=False, chain_id=77002) as other:
        one.rpc("evm_mine")

        assert (one.rpc("eth_chainId"), other.rpc("eth_chainId")) == (hex(77001), hex(77002))
        assert (one.rpc("eth_blockNumber"), other.rpc("eth_blockNumber")) == ("0x1", "0x0")
        with pytest.raises(TransactionFailed, match="no_such"):
            one.rpc("no_such")


def test_keys_of_the_accounts_are_not_shown(node: Node) -> None:
    assert isinstance(node.devnet, Devnet)
    assert "***" in repr(node.accounts[0])
    assert node.accounts[0].key.reveal().hex() not in repr(node.accounts)
