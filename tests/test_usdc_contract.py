"""TestUSDC on a real EVM: EIP-3009 and EIP-2612 as the real one demands, once each, and only for who signed."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account
from eth_account.messages import encode_typed_data

from divault.chain import contracts
from divault.chain.wallet import Wallet
from divault.devnet import DevAccount, Devnet, start_devnet
from divault.errors import TransactionFailed
from divault.testing import TestChain
from divault.values import Address, Secret, Usdc

USDC = contracts.load("TestUSDC")
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
PAYEE = Address(b"\x42" * 20)
WORD = [("from", "address"), ("to", "address"), ("value", "uint256")]
AUTHORIZATION = [*WORD, ("validAfter", "uint256"), ("validBefore", "uint256"), ("nonce", "bytes32")]
FIELDS = {
    "TransferWithAuthorization": AUTHORIZATION,
    "ReceiveWithAuthorization": AUTHORIZATION,
    "CancelAuthorization": [("authorizer", "address"), ("nonce", "bytes32")],
    "Permit": [
        *(("owner", "address"), ("spender", "address"), ("value", "uint256")),
        *(("nonce", "uint256"), ("deadline", "uint256")),
    ],
}
BYTES_FORM = {
    "TransferWithAuthorization": "transferWithAuthorization(address,address,uint256,uint256,uint256,bytes32,bytes)",
    "ReceiveWithAuthorization": "receiveWithAuthorization(address,address,uint256,uint256,uint256,bytes32,bytes)",
    "CancelAuthorization": "cancelAuthorization(address,bytes32,bytes)",
    "Permit": "permit(address,address,uint256,uint256,bytes)",
}
VRS_FORM = {name: text.replace("bytes)", "uint8,bytes32,bytes32)") for name, text in BYTES_FORM.items()}


@pytest.fixture(scope="module")
def devnet() -> Iterator[Devnet]:
    with start_devnet(anvil=False) as devnet:
        yield devnet


@pytest.fixture
async def world(devnet: Devnet) -> AsyncIterator[TestChain]:
    world = await TestChain.deploy(devnet)
    await world.mint_usdc(world.consumer.address, Usdc.parse("10"))
    yield world
    await world.close()


def signature(world: TestChain, kind: str, message: dict[str, Any], key: Secret) -> bytes:
    """65 bytes by eth-account, an implementation of EIP-712 that isn't ours."""
    domain = {"name": "USD Coin", "version": "2", "chainId": world.chain.chain_id, "verifyingContract": str(world.usdc)}
    types = {kind: [{"name": name, "type": type_} for name, type_ in FIELDS[kind]]}
    signed = Account.sign_message(encode_typed_data(domain, types, message), key.reveal())
    return bytes(signed.signature)


def authorization(payer: DevAccount, **changes: Any) -> dict[str, Any]:
    message = {"from": str(payer.address), "to": str(PAYEE), "value": 1_000_000, "validAfter": 0, "validBefore": 2**40}
    return message | {"nonce": secrets.token_bytes(32)} | changes


async def submit(
    world: TestChain, kind: str, message: dict[str, Any], sig: bytes, *, vrs: bool = False, sender: Wallet | None = None
) -> Any:
    """By a stranger, who pays the gas."""
    values = [
        _value(message[name], type_) for name, type_ in FIELDS[kind] if not (kind == "Permit" and name == "nonce")
    ]
    tail = [sig[64], sig[:32], sig[32:64]] if vrs else [sig]
    return await (sender or world.stranger).invoke(
        USDC, world.usdc, (VRS_FORM if vrs else BYTES_FORM)[kind], *values, *tail
    )


def _value(value: Any, type_: str) -> Any:
    return Address.parse(value) if type_ == "address" else value


@pytest.fixture
def payer(devnet: Devnet) -> DevAccount:
    return devnet.accounts[1]  # the consumer


async def test_it_says_what_wallets_sign_for(world: TestChain) -> None:
    assert await world.publisher.read(USDC, world.usdc, "name") == "USD Coin"
    assert await world.publisher.read(USDC, world.usdc, "version") == "2"
    assert await world.publisher.read(USDC, world.usdc, "decimals") == 6


@pytest.mark.parametrize("vrs", [False, True], ids=["bytes", "vrs"])
async def test_authorized_transfer_moves_money_once(world: TestChain, payer: DevAccount, vrs: bool) -> None:
    message = authorization(payer)
    sig = signature(world, "TransferWithAuthorization", message, payer.key)
    receipt = await submit(world, "TransferWithAuthorization", message, sig, vrs=vrs)

    assert await world.balance(world.usdc, PAYEE) == 1_000_000
    assert await world.publisher.read(USDC, world.usdc, "authorizationState", payer.address, message["nonce"]) is True
    assert [e.name for e in USDC.events(receipt.logs, "AuthorizationUsed")] == ["AuthorizationUsed"]
    with pytest.raises(TransactionFailed, match="AuthorizationUsedOrCanceled"):
        await submit(world, "TransferWithAuthorization", message, sig, vrs=not vrs)
    assert await world.balance(world.usdc, PAYEE) == 1_000_000


@pytest.mark.parametrize("field", ["to", "value", "validBefore", "nonce"])
async def test_changed_authorization_is_refused(world: TestChain, payer: DevAccount, field: str) -> None:
    message = authorization(payer)
    sig = signature(world, "TransferWithAuthorization", message, payer.key)
    changed: dict[str, Any] = {
        "to": str(world.stranger.address),
        "value": 2,
        "validBefore": 2**41,
        "nonce": b"\x01" * 32,
    }

    with pytest.raises(TransactionFailed, match="SignatureRefused"):
        await submit(world, "TransferWithAuthorization", message | {field: changed[field]}, sig)


def _high_s(sig: bytes) -> bytes:
    s = ORDER - int.from_bytes(sig[32:64], "big")
    return sig[:32] + s.to_bytes(32, "big") + bytes([55 - sig[64]])  # 27 <-> 28


MALFORMED = {
    "high_s": _high_s,
    "v_0_or_1": lambda sig: sig[:64] + bytes([sig[64] - 27]),
    "compact": lambda sig: sig[:32] + bytes([sig[32] | (sig[64] - 27) << 7]) + sig[33:64],
    "longer": lambda sig: sig + b"\0",
    "empty": lambda sig: b"",
}


@pytest.mark.parametrize("name", sorted(MALFORMED))
async def test_only_65_bytes_with_low_s_and_v_27_or_28_count(world: TestChain, payer: DevAccount, name: str) -> None:
    message = authorization(payer)
    sig = MALFORMED[name](signature(world, "TransferWithAuthorization", message, payer.key))

    with pytest.raises(TransactionFailed, match="SignatureRefused"):
        await submit(world, "TransferWithAuthorization", message, sig)
    assert await world.balance(world.usdc, PAYEE) == 0


@pytest.mark.parametrize("name", ["high_s", "v_0_or_1"])
async def test_the_vrs_form_is_as_strict(world: TestChain, payer: DevAccount, name: str) -> None:
    message = authorization(payer)
    sig = MALFORMED[name](signature(world, "TransferWithAuthorization", message, payer.key))

    with pytest.raises(TransactionFailed, match="SignatureRefused"):
        await submit(world, "TransferWithAuthorization", message, sig, vrs=True)


async def test_window_is_open_between_its_ends_only(world: TestChain, payer: DevAccount) -> None:
    now = (await world.chain.head()).timestamp
    for window, reason in (
        ({"validAfter": now + 1000}, "AuthorizationNotYetValid"),
        ({"validBefore": now}, "AuthorizationExpired"),
    ):
        message = authorization(payer, **window)
        sig = signature(world, "TransferWithAuthorization", message, payer.key)
        with pytest.raises(TransactionFailed, match=reason):
            await submit(world, "TransferWithAuthorization", message, sig)


async def test_more_than_the_balance_moves_nothing_and_leaves_the_nonce(world: TestChain, payer: DevAccount) -> None:
    message = authorization(payer, value=10**12)
    sig = signature(world, "TransferWithAuthorization", message, payer.key)

    with pytest.raises(TransactionFailed, match="ERC20InsufficientBalance"):
        await submit(world, "TransferWithAuthorization", message, sig)
    assert await world.publisher.read(USDC, world.usdc, "authorizationState", payer.address, message["nonce"]) is False


@pytest.mark.parametrize("vrs", [False, True], ids=["bytes", "vrs"])
async def test_receive_form_is_for_the_payee_alone(world: TestChain, payer: DevAccount, vrs: bool) -> None:
    message = authorization(payer, to=str(world.publisher.address))
    sig = signature(world, "ReceiveWithAuthorization", message, payer.key)
    with pytest.raises(TransactionFailed, match="CallerNotPayee"):
        await submit(world, "ReceiveWithAuthorization", message, sig, vrs=vrs)
    with pytest.raises(TransactionFailed, match="SignatureRefused"):  # nor does it serve as the other kind
        await submit(world, "TransferWithAuthorization", message, sig, vrs=vrs)

    await submit(world, "ReceiveWithAuthorization", message, sig, vrs=vrs, sender=world.publisher)
    assert await world.balance(world.usdc, world.publisher.address) == 1_000_000


@pytest.mark.parametrize("vrs", [False, True], ids=["bytes", "vrs"])
async def test_cancelled_authorization_is_spent(world: TestChain, payer: DevAccount, vrs: bool) -> None:
    message = authorization(payer)
    cancel = {"authorizer": str(payer.address), "nonce": message["nonce"]}
    foreign = signature(world, "CancelAuthorization", cancel, world.devnet.accounts[2].key)
    with pytest.raises(TransactionFailed, match="SignatureRefused"):
        await submit(world, "CancelAuthorization", cancel, foreign, vrs=vrs)

    await submit(
        world, "CancelAuthorization", cancel, signature(world, "CancelAuthorization", cancel, payer.key), vrs=vrs
    )
    sig = signature(world, "TransferWithAuthorization", message, payer.key)
    with pytest.raises(TransactionFailed, match="AuthorizationUsedOrCanceled"):
        await submit(world, "TransferWithAuthorization", message, sig)


@pytest.mark.parametrize("vrs", [False, True], ids=["bytes", "vrs"])
async def test_permit_sets_the_allowance_once(world: TestChain, payer: DevAccount, vrs: bool) -> None:
    spender = world.stranger.address
    message = {"owner": str(payer.address), "spender": str(spender), "value": 77, "nonce": 0, "deadline": 2**40}
    sig = signature(world, "Permit", message, payer.key)
    await submit(world, "Permit", message, sig, vrs=vrs)

    assert await world.publisher.read(USDC, world.usdc, "allowance", payer.address, spender) == 77
    with pytest.raises(TransactionFailed, match="SignatureRefused"):  # its nonce is used
        await submit(world, "Permit", message, sig, vrs=vrs)


async def test_late_or_foreign_permit_is_refused(world: TestChain, payer: DevAccount) -> None:
    message = {"owner": str(payer.address), "spender": str(PAYEE), "value": 77, "nonce": 0, "deadline": 1}
    with pytest.raises(TransactionFailed, match="PermitExpired"):
        await submit(world, "Permit", message, signature(world, "Permit", message, payer.key))
    message["deadline"] = 2**40
    with pytest.raises(TransactionFailed, match="SignatureRefused"):
        await submit(world, "Permit", message, signature(world, "Permit", message, world.devnet.accounts[2].key))


async def test_contract_wallet_pays_by_eip_1271(world: TestChain, payer: DevAccount) -> None:
    artifact = json.loads((Path(__file__).parent / "abi" / "Wallet1271.json").read_text())
    wallet = await world.publisher.deploy_contract(contracts.of_artifact("Wallet1271", artifact), payer.address)
    await world.mint_usdc(wallet, Usdc.parse("3"))
    message = authorization(payer, **{"from": str(wallet)})
    foreign = signature(world, "TransferWithAuthorization", message, world.devnet.accounts[2].key)
    with pytest.raises(TransactionFailed, match="SignatureRefused"):
        await submit(world, "TransferWithAuthorization", message, foreign)

    await submit(
        world, "TransferWithAuthorization", message, signature(world, "TransferWithAuthorization", message, payer.key)
    )
    assert await world.balance(world.usdc, PAYEE) == 1_000_000
