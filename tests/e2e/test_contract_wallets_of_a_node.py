"""A contract wallet at a real node: it signs in each of the three ways, is let in by its own tokens, and pays."""

from __future__ import annotations

import base64
import json
import secrets
import time
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from divault import messages, receipts
from divault.chain import erc20
from divault.chain.wallet import Wallet as Sender
from divault.errors import ReceiptInvalid
from divault.messages import HttpMessage, InferenceRequest, address_of, body_hash, request_domain, signature_text
from divault.receipts import Outcome
from divault.values import Address, Digest, ModelId, Nonce, Secret, Usdc
from tests.contract_wallets import Factory, contract, deployed
from tests.e2e.conftest import MINIMUM, World
from tests.e2e.test_http_identity import RUN, signer

pytestmark = pytest.mark.asyncio(loop_scope="session")


@dataclass(frozen=True)
class Wallet:
    """A wallet with the gate's tokens, whose owner has money for gas."""

    world: World
    address: Address
    owner: Secret

    def sign(self, digest: Digest) -> str:
        return signature_text(self.owner, digest)

    def body(self, model: ModelId) -> dict[str, Any]:
        data = {"features": self.world.trained.rows[0]}
        return {"model_id": model.text, "user_address": str(self.address), "input_data": data}

    async def request(self, model: ModelId, *, limit: int = 0, **more: Any) -> tuple[dict[str, Any], Digest]:
        """A body without its signature, and the digest to sign."""
        node = await signer(self.world, self.owner)
        body, now = self.body(model) | more, int(time.time())
        asked = InferenceRequest(
            user=self.address,
            node=node.node,
            model=model.key,
            method="POST",
            path=RUN,
            body_hash=body_hash(body),
            max_price=Usdc(limit),
            nonce=Nonce(secrets.token_bytes(32)),
            issued_at=now - 1,
            expires_at=now + 60,
        )
        window = {"nonce": str(asked.nonce), "issued_at": asked.issued_at, "expires_at": asked.expires_at}
        return body | window | {"max_price": str(limit)}, asked.digest(request_domain(node.chain_id, node.vault))

    async def call(self, model: ModelId, **more: Any) -> tuple[int, dict[str, Any]]:
        """Run the model by a signed body."""
        body, digest = await self.request(model, **more)
        return await post(self.world, body | {"user_signature": self.sign(digest)})


async def post(world: World, body: dict[str, Any], **headers: str) -> tuple[int, dict[str, Any]]:
    told = {"content-type": "application/json", **headers}
    status, answer, _ = await world.request("POST", RUN, data=json.dumps(body).encode(), headers=told)
    return status, answer


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def wallet(world: World) -> Wallet:
    owner = await world.consumer(tokens=0)
    address = await deployed(world.chain, owner)
    await world.chain.mint_tokens(address, MINIMUM)
    return Wallet(world, address, owner)


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def model(world: World) -> ModelId:
    return await world.publish("for-contract-wallets")


def outcome(envelope: dict[str, Any]) -> Outcome:
    """Of the step that looks at the request's signature, where no other step failed."""
    found = {step.name: step.outcome for step in receipts.check(envelope)}
    asked = found.pop("request_signature")
    assert Outcome.FAILED not in found.values(), found
    return asked


async def test_a_signed_body_is_answered_and_the_receipt_says_that_no_key_signed_it(
    wallet: Wallet, model: ModelId
) -> None:
    status, answer = await wallet.call(model)

    assert status == 200, answer
    envelope = answer["receipt"]
    assert envelope["receipt"]["user"] == str(wallet.address)
    assert envelope["request_signer"] == "contract"
    assert outcome(envelope) is Outcome.NOT_CHECKED
    with pytest.raises(ReceiptInvalid) as undisclosed:
        receipts.require_valid(receipts.check(envelope | {"request_signer": None}))
    assert undisclosed.value.data["field"] == "request_signature", "it has to be said"


async def test_the_signature_of_another_is_refused(wallet: Wallet, model: ModelId) -> None:
    body, digest = await wallet.request(model)
    stranger = Secret(secrets.token_bytes(32))

    status, answer = await post(wallet.world, body | {"user_signature": signature_text(stranger, digest)})
    assert (status, answer["code"], answer["reason"]) == (401, "signature_invalid", "signer_mismatch")
    assert (await post(wallet.world, body | {"user_signature": wallet.sign(digest)}))[0] == 200, "nothing was used up"
    status, answer = await post(wallet.world, body | {"user_signature": wallet.sign(digest)})
    assert (status, answer["code"]) == (401, "nonce_used")


async def test_the_gate_asks_for_the_wallets_tokens_and_not_its_owners(world: World, model: ModelId) -> None:
    owner = await world.consumer()
    empty = Wallet(world, await deployed(world.chain, owner), owner)

    status, answer = await empty.call(model)

    assert (status, answer["code"], answer["have"]) == (403, "access_denied", "0")


async def test_a_wallet_that_is_not_deployed_yet_is_a_caller_too(world: World, model: ModelId) -> None:
    factory, owner = await Factory.on(world.chain), Secret(secrets.token_bytes(32))
    future = Wallet(world, await factory.wallet(owner), owner)
    await world.chain.mint_tokens(future.address, MINIMUM)
    body, digest = await future.request(model)

    status, answer = await post(world, body | {"user_signature": factory.wrap(digest, owner, owner)})

    assert (status, answer.get("code")) == (200, None)
    assert answer["receipt"]["receipt"]["user"] == str(future.address)


async def test_a_request_signed_in_headers_is_answered(wallet: Wallet, model: ModelId) -> None:
    world, node = wallet.world, await signer(wallet.world, wallet.owner)
    raw = json.dumps(wallet.body(model)).encode()
    made = node.headers("POST", RUN, raw, Usdc(0))
    keyid = str(address_of(wallet.owner)).lower()
    told = {name: value.replace(keyid, str(wallet.address).lower()) for name, value in made.items()}
    policy = messages.HeaderPolicy(node.chain_id, node.authority, int(time.time()))
    digest = messages.read_headers(HttpMessage("POST", node.authority, RUN, None, told, raw), policy).digest

    def signature(of: str) -> dict[str, str]:
        return told | {"signature": f"eth=:{base64.b64encode(bytes.fromhex(of[2:])).decode()}:"}

    headers = {"content-type": "application/json"}
    status, answer, _ = await world.request("POST", RUN, data=raw, headers=headers | told)
    assert (status, answer["reason"]) == (401, "signer_mismatch"), "the owner's own request names another user"
    foreign = signature(signature_text(Secret(secrets.token_bytes(32)), digest))
    assert (await world.request("POST", RUN, data=raw, headers=headers | foreign))[0] == 401
    own = signature(wallet.sign(digest))
    status, answer, _ = await world.request("POST", RUN, data=raw, headers=headers | own)
    assert status == 200, answer
    assert answer["receipt"]["receipt"]["user"] == str(wallet.address)


async def test_a_session_lasts_five_minutes_and_its_receipts_say_so(wallet: Wallet, model: ModelId) -> None:
    world = wallet.world
    _, offered, _ = await world.request("POST", "/api/v1/auth/nonce", json={"user_address": str(wallet.address)})
    text, stranger = offered["message"], Secret(secrets.token_bytes(32))
    digest = messages.personal_digest(text)
    foreign = {"message": text, "signature": signature_text(stranger, digest)}
    own = {"message": text, "signature": wallet.sign(digest)}
    assert (await world.request("POST", "/api/v1/auth/login", json=foreign))[0] == 401
    status, login, _ = await world.request("POST", "/api/v1/auth/login", json=own)
    assert status == 200, login
    assert login["expires_at"] <= int(time.time()) + 300

    body = {"model_id": model.text, "input_data": wallet.body(model)["input_data"]}
    status, answer = await post(world, body, authorization=f"Bearer {login['token']}")

    assert status == 200, answer
    assert answer["receipt"]["receipt"]["user"] == str(wallet.address)
    assert outcome(answer["receipt"]) is Outcome.NOT_CHECKED


async def test_it_pays_for_a_call(wallet: Wallet) -> None:
    world, price = wallet.world, Usdc.parse("0.02")
    model = await world.publish("priced-for-contract-wallets", price="0.02")
    await world.chain.mint_usdc(wallet.address, Usdc.parse("1"))
    node = (await signer(world, wallet.owner)).node
    owner = world.chain.publisher.address
    payment = contract("Wallet1271").encode("execute", world.chain.usdc, erc20.transfer(owner, price.atomic))
    mark = erc20.payment_mark(node, wallet.address).raw
    sent = await Sender(wallet.owner, world.chain.chain).send(wallet.address, payment + mark)
    claim = {"tx_hash": str(sent.transaction_hash)}

    unpaid = await wallet.call(model, limit=price.atomic)
    paid = await wallet.call(model, limit=price.atomic, payment=claim)
    again = await wallet.call(model, limit=price.atomic, payment=claim)

    assert (unpaid[0], unpaid[1]["code"]) == (402, "payment_required")
    assert paid[0] == 200, paid
    assert paid[1]["receipt"]["receipt"]["payer"] == str(wallet.address)
    assert again[0] in (402, 409), "one transfer pays once"
