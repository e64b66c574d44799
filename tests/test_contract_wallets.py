"""Contract wallets: whose signature counts, asked of a real chain, and what asking may cost."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
import pytest_asyncio

from divault.chain.chain import Chain
from divault.chain.contract_wallets import MAX_SIGNATURE, ContractWallets
from divault.chain.rpc import Rpc
from divault.errors import ChainUnavailable, RateLimited, SignatureInvalid
from divault.messages import address_of, parse_key, signature_text
from divault.testing import TestChain
from divault.values import Address, Digest, Secret
from tests.contract_wallets import Factory, deployed, odd, wrap

pytestmark = pytest.mark.asyncio(loop_scope="module")
OWNER, OTHER = parse_key("0x" + "4c" * 32), parse_key("0x" + "5d" * 32)
DIGEST, ANOTHER = Digest.keccak(b"a request"), Digest.keccak(b"another")
VAULT = Address(b"\x0e" * 20)
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world() -> AsyncIterator[TestChain]:
    async with TestChain.start() as chain:
        yield chain


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def factory(world: TestChain) -> Factory:
    return await Factory.on(world)


def signers(world: TestChain, **limits: int) -> ContractWallets:
    return ContractWallets(world.chain, **limits, clock=Clock())


async def reason(asked: ContractWallets, signature: str, wallet: Address, digest: Digest = DIGEST) -> str | None:
    """Why it is refused; None when it is not."""
    try:
        assert await asked.require(digest, signature, wallet, "peer") is True, "by a contract"
    except SignatureInvalid as err:
        return str(err.data["reason"])
    return None


@pytest_asyncio.fixture(loop_scope="module")
async def unreachable() -> AsyncIterator[Chain]:
    chain = Chain(Rpc([Secret.of_text("http://127.0.0.1:9")], 31337))
    yield chain
    await chain.close()


async def test_a_key_is_never_a_question_to_the_chain(unreachable: Chain) -> None:
    asked = ContractWallets(unreachable, per_peer=1)
    for _ in range(5):
        assert await asked.require(DIGEST, signature_text(OWNER, DIGEST), address_of(OWNER), "peer") is False


async def test_without_an_answer_nobody_is_let_in(unreachable: Chain) -> None:
    with pytest.raises(ChainUnavailable):
        await ContractWallets(unreachable).require(DIGEST, signature_text(OTHER, DIGEST), address_of(OWNER), "peer")


async def test_a_wallet_takes_what_its_owner_signed_and_nothing_else(world: TestChain) -> None:
    wallet, asked = await deployed(world, OWNER), signers(world)

    for digest in (ANOTHER, DIGEST):  # the refusal of a signature is for one digest and one wallet
        expected = None if digest == DIGEST else "signer_mismatch"
        assert await reason(asked, signature_text(OWNER, DIGEST), wallet, digest) == expected
    assert await reason(asked, signature_text(OTHER, DIGEST), wallet) == "signer_mismatch"
    assert await reason(asked, signature_text(OWNER, DIGEST), await deployed(world, OTHER)) == "signer_mismatch"
    assert await reason(asked, signature_text(OWNER, DIGEST), wallet) is None, "what another wallet refused"
    assert await reason(asked, "0x", wallet) == "bad_length"
    assert await reason(asked, "0x123", wallet) == "bad_hex"


async def test_keys_keep_their_strict_rules(world: TestChain) -> None:
    """What a contract's own check of keys might take, is not taken for an account that has no contract."""
    raw, user = bytes.fromhex(signature_text(OWNER, DIGEST)[2:]), address_of(OWNER)
    high = raw[:32] + (ORDER - int.from_bytes(raw[32:64], "big")).to_bytes(32, "big") + bytes([55 - raw[64]])
    asked = signers(world)

    assert await reason(asked, "0x" + high.hex(), user) == "high_s"
    assert await reason(asked, "0x" + raw[:64].hex() + "25", user) == "bad_v"
    assert await reason(asked, "0x" + raw.hex() + "00", user) == "bad_length"
    assert await reason(asked, signature_text(OTHER, DIGEST), user) == "signer_mismatch"


async def test_a_wallet_that_is_not_deployed_yet_signs_with_what_deploys_it(world: TestChain, factory: Factory) -> None:
    wallet, asked = await factory.wallet(OWNER), signers(world)

    assert await reason(asked, factory.wrap(DIGEST, OWNER, OWNER), wallet) is None
    assert await world.chain.code(wallet) == b"", "asking deployed nothing"
    assert await reason(asked, factory.wrap(DIGEST, OTHER, OWNER), wallet) == "signer_mismatch"
    assert await reason(asked, factory.wrap(DIGEST, OTHER, OTHER), wallet) == "signer_mismatch", "of another wallet"
    assert await reason(asked, factory.wrap(ANOTHER, OWNER, OWNER), wallet) == "signer_mismatch"
    assert await reason(asked, signature_text(OWNER, DIGEST), wallet) == "signer_mismatch", "and nothing deploys it"
    assert await reason(asked, factory.wrap(DIGEST, OTHER, OTHER), address_of(OWNER)) == "signer_mismatch"


async def test_a_wrapped_signature_still_counts_when_the_wallet_is_deployed(world: TestChain, factory: Factory) -> None:
    salt = Digest.keccak(b"deployed")
    wallet, asked = await factory.wallet(OWNER, salt), signers(world)
    await factory.create(OWNER, salt)

    assert await reason(asked, factory.wrap(DIGEST, OWNER, OWNER, salt), wallet) is None
    assert await reason(asked, signature_text(OWNER, DIGEST), wallet) is None
    assert await reason(asked, factory.wrap(DIGEST, OTHER, OWNER, salt), wallet) == "signer_mismatch"


async def test_wrappers_are_read_strictly(world: TestChain, factory: Factory) -> None:
    wallet, asked = await factory.wallet(OWNER), signers(world)
    good = bytes.fromhex(factory.wrap(DIGEST, OWNER, OWNER)[2:])
    moved = good[:32] + (0x80).to_bytes(32, "big") + good[64:]

    assert await reason(asked, "0x" + moved.hex(), wallet) == "bad_wrapper"
    assert await reason(asked, "0x" + (good[:-32] + bytes(32) + good[-32:]).hex(), wallet) == "bad_wrapper"
    assert await reason(asked, wrap(Address.ZERO, b"", b""), wallet) == "signer_mismatch"
    assert await reason(asked, wrap(factory.address, bytes(MAX_SIGNATURE), b""), wallet) == "bad_length"


@pytest.mark.parametrize("kind", range(9))
async def test_no_other_answer_is_a_yes(world: TestChain, kind: int) -> None:
    """Reverts, endless loops, nothing, a cut or padded magic value, true, a megabyte, writes, yes to simulations."""
    assert await reason(signers(world), signature_text(OWNER, DIGEST), await odd(world, kind)) == "signer_mismatch"


async def test_who_burns_all_gas_is_refused_like_any_other(world: TestChain) -> None:
    """Where nothing were left to say no with, endpoints would give an error, which says nothing."""
    greedy = await odd(world, 1)

    assert await reason(signers(world), wrap(greedy, b"", bytes(65)), greedy) == "signer_mismatch"


async def test_a_contract_that_takes_anything_lets_anybody_be_it(world: TestChain) -> None:
    assert await reason(signers(world), "0x00", await odd(world, 9)) is None


async def test_questions_are_counted_per_peer_and_keys_are_not(world: TestChain) -> None:
    wallet, asked = await deployed(world, OWNER), signers(world, per_peer=2, per_node=3)
    for digest in (DIGEST, ANOTHER):
        assert await asked.require(digest, signature_text(OWNER, digest), wallet, "a") is True
    with pytest.raises(RateLimited) as limited:
        await asked.require(DIGEST, signature_text(OWNER, DIGEST), wallet, "a")

    assert limited.value.data["retry_after"] > 0
    assert await asked.require(DIGEST, signature_text(OWNER, DIGEST), wallet, "b") is True, "another peer"
    with pytest.raises(RateLimited):  # and now the node has asked enough
        await asked.require(DIGEST, signature_text(OWNER, DIGEST), wallet, "c")
    assert await asked.require(DIGEST, signature_text(OWNER, DIGEST), address_of(OWNER), "a") is False


async def test_a_refusal_is_remembered_for_a_while(world: TestChain) -> None:
    clock = Clock()
    asked = ContractWallets(world.chain, per_peer=1, clock=clock)
    salt = Digest.keccak(b"later")
    factory = await Factory.on(world)
    wallet = await factory.wallet(OWNER, salt)
    plain = signature_text(OWNER, DIGEST)

    assert await reason(asked, plain, wallet) == "signer_mismatch"
    assert await reason(asked, plain, wallet) == "signer_mismatch", "and not one question too many"
    with pytest.raises(RateLimited):
        await asked.require(ANOTHER, signature_text(OWNER, ANOTHER), wallet, "peer")
    await factory.create(OWNER, salt)
    clock.now = 60.0
    assert await reason(asked, plain, wallet) is None, "and not for ever"


class Slow:
    """A chain whose answers come when a test says so; counts the questions that are under way."""

    def __init__(self, answer: bytes = b"\x00") -> None:
        self.answer = answer
        self.go = asyncio.Event()
        self.now = self.most = 0

    async def head(self) -> None:
        return None

    async def run(self, *_: Any, **__: Any) -> bytes:
        self.now += 1
        self.most = max(self.most, self.now)
        await self.go.wait()
        self.now -= 1
        return self.answer


def of(chain: Slow) -> ContractWallets:
    return ContractWallets(cast("Chain", chain))


async def test_few_questions_are_under_way_and_the_rest_wait_or_are_told() -> None:
    chain = Slow()
    asked = of(chain)

    async def ask(peer: int, number: int) -> str:
        try:
            await asked.require(Digest.keccak(bytes([peer, number])), "0x00", address_of(OWNER), str(peer))
        except RateLimited:
            return "limited"
        except SignatureInvalid:
            return "refused"
        return "let in"

    one = [asyncio.create_task(ask(0, number)) for number in range(10)]
    many = [asyncio.create_task(ask(peer, number)) for peer in range(1, 11) for number in range(4)]
    await asyncio.sleep(0.05)
    assert (chain.most, sum(task.done() for task in one), sum(task.done() for task in many)) == (4, 6, 12)
    many[0].cancel()
    chain.go.set()
    found = await asyncio.gather(*one, *many, return_exceptions=True)

    assert [found.count("limited"), found.count("refused"), found.count("let in")] == [18, 31, 0]
    assert chain.most == 4
    assert await ask(0, 99) == "refused", "and then there is room again"


async def test_an_endpoint_that_says_neither_yes_nor_no_lets_nobody_in() -> None:
    for answer in (b"", b"\x02", b"\x01" * 2, bytes(31) + b"\x01"):
        chain = Slow(answer)
        chain.go.set()
        with pytest.raises(ChainUnavailable):
            await of(chain).require(DIGEST, "0x00", address_of(OWNER), "peer")


async def test_a_refusal_keeps_nothing_of_its_request() -> None:
    """An error that is kept by a frame that it passed through keeps all frames above it, until garbage is collected."""

    class Text(str):
        __slots__ = ("__weakref__",)

    chain = Slow()
    chain.go.set()
    asked, kept = of(chain), []

    async def request(signature: str) -> None:
        body, told = Text("a body"), Text(signature)
        kept.extend((weakref.ref(body), weakref.ref(told)))
        await asked.require(DIGEST, told, address_of(OWNER), "peer")

    gc.disable()
    try:
        for signature in (signature_text(OTHER, DIGEST), signature_text(OTHER, DIGEST), wrap(VAULT, b"", b"")):
            try:
                await request(signature)
            except SignatureInvalid:
                continue
            pytest.fail("it was let in")
        assert [ref() for ref in kept] == [None] * 6
    finally:
        gc.enable()
