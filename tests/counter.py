"""A small shop for ledger tests: a real ledger file, a chain in memory, signed calls, and the service's sentence."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from divault.chain.records import Log, Transaction, TransactionReceipt
from divault.messages import SessionCall
from divault.payments import Account, Ledger, Payments, Terms, TransferCredit, Wording, binding_of
from divault.payments.transfer import TRANSFER_TOPIC
from divault.receipts import ReceiptIssuer, answer_body
from divault.state import State
from divault.values import (
    UINT256_MAX,
    Address,
    Answer,
    BlockRef,
    BodySignature,
    Digest,
    GateType,
    Grant,
    Hold,
    ModelId,
    ModelInfo,
    Nonce,
    Output,
    Principal,
    PrincipalKind,
    Secret,
    SessionToken,
    SignedCall,
    TokenParts,
    TransferClaim,
    Usdc,
)

CHAIN_ID = 31337
KEY = Secret(bytes.fromhex("ccb49e9ab00b3a4d8b8e67c833ab2c0c6ffbcb55715dc8748556dc9c84c36042"))
NODE = Address.parse("0x05b7cc97C107184f736Dc0f04E6231593c821384")
VAULT = Address(b"\x01" * 20)
TOKEN, OWNER, USER, STRANGER = (Address(bytes([n]) * 20) for n in (2, 3, 4, 5))
PRICE = Usdc(10_000)
BINDING = binding_of(NODE, USER)
MODEL = ModelId.parse("m1")

Work = Callable[[Hold], Awaitable[bytes]]


def digest_of(text: object) -> Digest:
    return Digest.keccak(str(text).encode())


@dataclass
class TransfersInMemory:
    """A chain that holds what a test put there; block 100 is the head."""

    head_number: int = 100
    transactions: dict[Digest, Transaction] = field(default_factory=dict)
    receipts: dict[Digest, TransactionReceipt] = field(default_factory=dict)
    reorged: set[int] = field(default_factory=set)
    asked: int = 0
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def pay(
        self,
        amount: int,
        *,
        payer: Address = USER,
        owner: Address = OWNER,
        token: Address = TOKEN,
        block: int = 100,
        binding: Digest | None = BINDING,
    ) -> str:
        """A mined transfer; gives its hash as a caller writes it."""
        tx = digest_of(f"tx {next(self._numbers)}")
        tail = binding.raw if binding is not None else b""
        calldata = bytes.fromhex("a9059cbb") + bytes(12) + owner.raw + amount.to_bytes(32, "big") + tail
        where = self._hash(block)
        topics = (TRANSFER_TOPIC, Digest(bytes(12) + payer.raw), Digest(bytes(12) + owner.raw))
        log = Log(token, topics, amount.to_bytes(32, "big"), block, where, tx, 0)
        self.transactions[tx] = Transaction(tx, CHAIN_ID, payer, token, 0, 0, calldata, block, where)
        self.receipts[tx] = TransactionReceipt(tx, True, block, where, payer, token, None, 50_000, (log,))
        return str(tx)

    def _hash(self, number: int) -> Digest:
        return digest_of(f"block {number} {'other' if number in self.reorged else ''}")

    async def transaction(self, tx: Digest) -> Transaction | None:
        self.asked += 1
        await asyncio.sleep(0)
        return self.transactions.get(tx)

    async def receipt(self, tx: Digest) -> TransactionReceipt | None:
        await asyncio.sleep(0)
        return self.receipts.get(tx)

    async def block_by_number(self, which: int) -> BlockRef | None:
        return BlockRef(which, self._hash(which), int(time.time()) - 5) if which <= self.head_number else None

    async def head(self) -> BlockRef:
        return BlockRef(self.head_number, self._hash(self.head_number), int(time.time()))


def of_session(login: Digest, key: str | None, *, body: bytes = b"{}", tx: str | None = None) -> SignedCall:
    """A call that came by a session, with or without an idempotency key."""
    proof = SessionToken(TokenParts(USER, login, b"", Secret(b"")), None, key)
    paying = TransferClaim(tx) if tx is not None else None
    return SignedCall(
        USER, "POST", "/api/v1/inference", body, proof, MODEL, Usdc(UINT256_MAX), input_data=body, payment=paying
    )


def signed(
    *, tx: str | None = None, max_price: int = PRICE.atomic, user: Address = USER, nonce: object = None, body: str = "x"
) -> tuple[Principal, SignedCall]:
    """An authenticated call; without `nonce` a fresh one."""
    now = int(time.time())
    unique = Nonce(os.urandom(32) if nonce is None else digest_of(nonce).raw)
    call = SignedCall(
        user,
        "POST",
        "/api/v1/inference",
        b"{}",
        BodySignature("0x", unique, now, now + 60, digest_of(body)),
        MODEL,
        Usdc(max_price),
        input_data=b'{"text":"hi"}',
        payment=TransferClaim(tx) if tx is not None else None,
        peer="198.51.100.7",
    )
    return principal_of(call), call


def principal_of(call: SignedCall) -> Principal:
    """What authentication makes of it: a new proof each time, with the same request id."""
    proof = call.proof
    if isinstance(proof, SessionToken):
        return _principal_of_session(call, proof)
    assert isinstance(proof, BodySignature)
    request = Digest.keccak(proof.nonce.raw + proof.body_hash.raw + call.user.raw)
    return Principal(
        call.user, PrincipalKind.BODY, request, proof.nonce, proof.expires_at, proof.issued_at, call.max_price
    )


def _principal_of_session(call: SignedCall, proof: SessionToken) -> Principal:
    now, login, key = int(time.time()), proof.token.login, proof.idempotency_key
    made = SessionCall(Digest.keccak(call.body), login, call.method, call.path, key or os.urandom(8).hex())
    return Principal(
        call.user,
        PrincipalKind.SESSION,
        made.digest,
        Nonce(digest_of(made.request_id).raw),
        now + 86_400,
        now,
        call.max_price,
        login=login,
        repeatable=key is not None,
    )


def grant_of(principal: Principal, price: Usdc = PRICE, owner: Address = OWNER, token: Address = TOKEN) -> Grant:
    model = ModelInfo(
        MODEL, "bafkqaaa", Address(b"\x09" * 20), price, owner, True, 0, 1, 1, (), "1", 100, token, GateType.TOKEN
    )
    return Grant(principal, model, BlockRef(99, digest_of("block 99 "), int(time.time())), 100)


async def answer_yes(_: Hold) -> bytes:
    await asyncio.sleep(0)
    return b'{"label":"yes"}'


class Counter:
    """An open ledger and the sentence that the service says over it."""

    def __init__(self, folder: Path, chain: TransfersInMemory | None = None, **options: object) -> None:
        self.chain = chain or TransfersInMemory()
        self.state = State(folder / "ledger.sqlite3")
        self.ledger = Ledger(self.state, ReceiptIssuer(KEY, CHAIN_ID, VAULT), **options)  # type: ignore[arg-type]
        self.rail = TransferCredit(self.ledger, self.chain, Terms(frozenset({TOKEN})))
        self.payments = Payments(self.ledger, self.rail)
        self.runs = 0

    async def __aenter__(self) -> Counter:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.state.close()

    async def infer(
        self,
        call: SignedCall,
        work: Work = answer_yes,
        *,
        price: Usdc = PRICE,
        budget=None,
        wording: Wording = answer_body,
    ) -> Answer:
        principal = principal_of(call)
        stored = await self.ledger.answered(principal)
        if stored is not None:
            return stored
        async with self.ledger.outcome(principal, call, budget):
            grant = grant_of(principal, price)
            async with self.payments.hold(grant, call) as hold:
                self.runs += 1
                output = output_of(await work(hold))
                return await self.ledger.charge(hold, call, output, wording)

    async def allow(self, login: Digest, most: int, token: Address = TOKEN) -> None:
        """What `login` may spend, as signing in writes it."""
        row = (login.raw, token.raw, str(most))
        await self.state.write(lambda db: db.execute("INSERT INTO allowance(login, token, most) VALUES (?, ?, ?)", row))

    async def used(self, login: Digest) -> int:
        found = self.state.look(
            lambda db: db.execute("SELECT used FROM allowance WHERE login = ?", (login.raw,)).fetchone()
        )
        return int(found[0])

    async def credit(self, payer: Address = USER, owner: Address = OWNER) -> int:
        return (await self.ledger.credit(Account(CHAIN_ID, TOKEN, payer, owner))).atomic

    async def rows(self, sql: str) -> list[tuple]:
        return await self.state.read(lambda db: db.execute(sql.strip()).fetchall())

    async def chain_is_whole(self) -> int:
        """Check that the receipts have no gap and follow each other; gives their number."""
        rows = await self.rows("SELECT sequence, hash, previous FROM receipt ORDER BY sequence")
        assert [row[0] for row in rows] == list(range(len(rows)))
        assert [row[2] for row in rows] == [bytes(32), *(row[1] for row in rows)][: len(rows)]
        return len(rows)


def output_of(result: bytes) -> Output:
    return Output(result, {"adapter": "test", "device": "cpu"}, digest_of("plaintext"), 1)
