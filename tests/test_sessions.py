"""Sessions: a text signed once opens one, its token speaks for it, and both for this node and this page alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from divault.auth import Authenticator
from divault.errors import DivaultError, RateLimited, SessionInvalid, SignatureInvalid
from divault.messages import (
    SessionCall,
    SignInContext,
    address_of,
    compose,
    parse_key,
    personal_digest,
    signature_text,
)
from divault.messages.session_calls import LONGEST_S, resources_of
from divault.sessions import IDLE_S, NONCE_S, Home, Session, Sessions, Ticket, read_token
from divault.state import State
from divault.values import Address, Digest, Principal, PrincipalKind, Secret, SessionToken, SignedCall, Usdc

NODE_KEY = Secret(b"\x0d" * 32)
KEY, OTHER_KEY = parse_key("0x" + "4c" * 32), parse_key("0x" + "5d" * 32)
USER = address_of(KEY)
VAULT, TOKEN = Address(b"\x0e" * 20), Address(b"\x0f" * 20)
PAGE = "https://app.example:8443"
HOME = Home(31337, VAULT, Address(b"\x0d" * 20), "https://node.example.org", (PAGE, "*"), frozenset({TOKEN}))


@dataclass
class Clock:
    """Seconds that pass when a test says so."""

    now: int = 1_790_000_000

    def __call__(self) -> float:
        return float(self.now)


@dataclass
class Desk:
    """One node's sessions on a file that outlives it."""

    folder: Path
    clock: Clock = field(default_factory=Clock)
    monotonic: Clock = field(default_factory=Clock)
    state: State = field(init=False)
    sessions: Sessions = field(init=False)

    def open(self, **changed: Any) -> Sessions:
        self.state = State(self.folder / "ledger.sqlite3")
        self.sessions = self.of(**changed)
        return self.sessions

    def of(self, home: Home = HOME, key: Secret = NODE_KEY, **how: Any) -> Sessions:
        return Sessions(self.state, key, home, clock=self.clock, monotonic=self.monotonic, **how)

    async def restart(self) -> Sessions:
        await self.state.close()
        return self.open()

    def text(self, *, origin: str | None = None, expires_at: int = 0, **changed: Any) -> str:
        """What a wallet signs, with whatever a test has changed in it."""
        given = self.sessions.challenge(origin)
        context: dict[str, Any] = {"nonce": given.context.nonce, "now": given.context.now}
        context |= {"domain": given.context.domain, "origin": given.context.origin, "chain_id": given.context.chain_id}
        resources = changed.pop("resources", given.resources)
        user = changed.pop("user", USER)
        return compose(user, SignInContext(**context | changed), resources=resources, expires_at=expires_at)

    async def sign_in(self, text: str | None = None, key: Secret = KEY, **how: Any) -> Ticket:
        text = self.text() if text is None else text
        return await self.sessions.sign_in(text, signature_text(key, personal_digest(text)), **how)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    made = Desk(tmp_path)
    made.open()
    yield made
    await made.state.close()


async def reason(work: Any) -> str:
    with pytest.raises(DivaultError) as caught:
        await work
    return f"{caught.value.code} {caught.value.data.get('reason')}"


async def use(sessions: Sessions, token: Secret, origin: str | None = None) -> Session:
    return await sessions.of(read_token(token), origin)


class Contract:
    """Signers of a contract wallet that accepts everything; what they were asked."""

    def __init__(self) -> None:
        self.asked: list[Address] = []

    async def require(self, digest: Digest, signature: str, claimed: Address, peer: str) -> bool:
        self.asked.append(claimed)
        return True


# --- opening ----------------------------------------------------------------------------------------------------------


async def test_a_contract_wallets_session_is_over_after_five_minutes_also_after_a_restart(desk: Desk) -> None:
    signers = Contract()
    sessions = desk.of(signers=signers)
    ticket = await sessions.sign_in(desk.text(), "0x1234")
    assert (signers.asked, ticket.session.expires_at) == ([USER], desk.clock.now + 300)

    sessions = await desk.restart()
    assert (await use(sessions, ticket.token)).by_contract
    desk.clock.now += 300
    assert await reason(use(sessions, ticket.token)) == "session_invalid expired"


async def test_a_contract_is_not_asked_about_a_text_that_opens_nothing(desk: Desk) -> None:
    signers = Contract()
    sessions = desk.of(signers=signers)
    text = desk.text()
    await sessions.sign_in(text, "0x1234")
    for other in (text, desk.text(resources=[]), desk.text(nonce="0" * 64), desk.text(chain_id=1)):
        with pytest.raises(DivaultError):
            await sessions.sign_in(other, "0x1234")

    assert signers.asked == [USER]


async def test_a_key_s_session_is_known_as_one_after_a_restart(desk: Desk) -> None:
    ticket = await desk.sign_in()
    sessions = await desk.restart()

    assert not (await use(sessions, ticket.token)).by_contract


async def test_a_signed_text_opens_a_session_of_its_wallet(desk: Desk) -> None:
    given = desk.sessions.challenge(None, USER, {TOKEN: Usdc.parse("0.5")})
    assert given.message is not None
    ticket = await desk.sign_in(given.message)

    session = await use(desk.sessions, ticket.token)
    assert (session.user, session.origin) == (USER, "https://node.example.org")
    assert session.expires_at == desk.clock.now + LONGEST_S
    assert ticket.allowances == {TOKEN: Usdc(500_000)}
    assert "spend at most 0.5 of the token" in given.message
    assert read_token(ticket.token).user == USER


async def test_a_text_that_would_be_refused_is_not_offered(desk: Desk) -> None:
    with pytest.raises(SignatureInvalid, match=str(TOKEN)):
        desk.sessions.challenge(None, USER, {VAULT: Usdc(5)})


async def test_a_page_that_the_operator_named_signs_in_for_itself(desk: Desk) -> None:
    ticket = await desk.sign_in(desk.text(origin=PAGE), origin=PAGE)

    assert (await use(desk.sessions, ticket.token, PAGE)).origin == PAGE
    assert await reason(use(desk.sessions, ticket.token, "https://evil.example")) == "session_invalid wrong_origin"
    assert (await use(desk.sessions, ticket.token)).user == USER, "a program names no origin"


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "https://app.example", "http://app.example:8443", "*", "null"]
)
async def test_a_page_that_nobody_named_gets_no_nonce(desk: Desk, origin: str) -> None:
    with pytest.raises(SessionInvalid, match="DIVAULT_CORS_ORIGINS"):
        desk.sessions.challenge(origin)


async def test_a_page_cannot_send_what_another_page_had_signed(desk: Desk) -> None:
    assert await reason(desk.sign_in(desk.text(), origin=PAGE)) == "session_invalid wrong_origin"


def _resources(desk: Desk, **changed: Any) -> tuple[str, ...]:
    home = replace(HOME, **changed)
    return resources_of(home.node, home.vault, {})


REFUSED: dict[str, tuple[Callable[[Desk], str], str]] = {
    "for another node": (
        lambda desk: desk.text(resources=_resources(desk, node=Address(b"\x77" * 20))),
        "wrong_node node_mismatch",
    ),
    "for another vault": (
        lambda desk: desk.text(resources=_resources(desk, vault=Address(b"\x77" * 20))),
        "wrong_chain wrong_domain",
    ),
    "for no node at all": (lambda desk: desk.text(resources=()), "wrong_node node_mismatch"),
    "for another chain": (lambda desk: desk.text(chain_id=1), "wrong_chain wrong_chain"),
    "for another domain": (lambda desk: desk.text(domain="evil.example"), "wrong_chain wrong_domain"),
    "for another port": (lambda desk: desk.text(domain="node.example.org:444"), "wrong_chain wrong_domain"),
    "of another page's URI": (lambda desk: desk.text(domain="app.example:8443"), "signature_invalid wrong_uri"),
    "with a nonce that nobody gave": (lambda desk: desk.text(nonce="a" * 64), "signature_invalid wrong_nonce"),
    "with a nonce that was altered": (
        lambda desk: desk.text(nonce=desk.sessions.challenge(None).context.nonce[:-1] + "x"),
        "signature_invalid wrong_nonce",
    ),
    "two sums of a token": (
        lambda desk: desk.text(resources=(*_resources(desk), *(f"urn:div:spend:{TOKEN}:{n}" for n in (1, 2)))),
        "signature_invalid bad_message",
    ),
    "a sum that is none": (
        lambda desk: desk.text(resources=(*_resources(desk), f"urn:div:spend:{TOKEN}:0x10")),
        "signature_invalid bad_message",
    ),
    "a sum with a zero before it": (
        lambda desk: desk.text(resources=(*_resources(desk), f"urn:div:spend:{TOKEN}:010")),
        "signature_invalid bad_message",
    ),
    "a token that this node doesn't take": (
        lambda desk: desk.text(resources=(*_resources(desk), f"urn:div:spend:{VAULT}:5")),
        "signature_invalid bad_message",
    ),
    "a resource that nobody knows": (
        lambda desk: desk.text(resources=(*_resources(desk), "urn:div:admin:all")),
        "signature_invalid bad_message",
    ),
    "a second node": (
        lambda desk: desk.text(resources=(*_resources(desk), f"urn:div:node:{TOKEN}")),
        "signature_invalid bad_message",
    ),
    "over already": (lambda desk: desk.text(expires_at=desk.clock.now), "signature_expired expired"),
    "of tomorrow": (lambda desk: desk.text(now=desk.clock.now + 6), "signature_expired issued_in_future"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
async def test_a_text_that_is_not_for_here_opens_nothing(desk: Desk, case: str) -> None:
    made, expected = REFUSED[case]

    assert await reason(desk.sign_in(made(desk))) == expected
    assert await desk.state.read(lambda db: db.execute("SELECT count(*) FROM login").fetchone()[0]) == 0


async def test_other_resources_than_ours_are_left_alone(desk: Desk) -> None:
    assert await desk.sign_in(desk.text(resources=(*_resources(desk), "https://app.example/terms")))


async def test_only_the_wallet_in_the_text_signs_in(desk: Desk) -> None:
    assert await reason(desk.sign_in(key=OTHER_KEY)) == "signature_invalid signer_mismatch"


async def test_a_nonce_opens_one_session_and_in_time(desk: Desk) -> None:
    text = desk.text()
    late = desk.text()
    await desk.sign_in(text)

    assert await reason(desk.sign_in(text)) == "signature_invalid wrong_nonce"
    await desk.restart()
    assert await reason(desk.sign_in(text)) == "signature_invalid wrong_nonce", "not after a restart either"
    desk.clock.now += NONCE_S + 1
    assert await reason(desk.sign_in(late)) == "signature_invalid wrong_nonce"


async def test_of_many_that_sign_in_with_one_nonce_one_does(desk: Desk) -> None:
    nonce = desk.sessions.challenge(None).context.nonce
    texts = [desk.text(nonce=nonce, expires_at=desk.clock.now + 100 + n) for n in range(20)]
    ends = await asyncio.gather(*(desk.sign_in(text) for text in texts), return_exceptions=True)

    assert sum(isinstance(end, Ticket) for end in ends) == 1


async def test_signing_in_has_a_budget_per_peer(desk: Desk) -> None:
    for _ in range(60):
        await desk.sign_in(peer="198.51.100.7")
    with pytest.raises(RateLimited):
        await desk.sign_in(peer="198.51.100.7")
    assert await desk.sign_in(peer="198.51.100.8")
    desk.monotonic.now += 1
    assert await desk.sign_in(peer="198.51.100.7")


async def test_a_clock_that_is_set_back_keeps_nobody_from_signing_in(desk: Desk) -> None:
    await desk.sign_in(peer="198.51.100.7")
    desk.clock.now -= 3600

    assert await desk.sign_in(peer="198.51.100.7")
    assert await desk.sign_in(peer="198.51.100.8")


# --- using ------------------------------------------------------------------------------------------------------------


async def test_no_token_with_another_bit_or_spelling_counts(desk: Desk) -> None:
    token = (await desk.sign_in()).token.reveal().decode()
    head, body = token[:5], token[5:]
    altered = [head + body[:n] + ("A" if body[n] != "A" else "B") + body[n + 1 :] for n in range(len(body))]
    spelled = [token + "=", token + "\n", token[:-1], token + "A", body, token.upper(), head, ""]

    assert await use(desk.sessions, Secret.of_text(token))
    for text in (*altered, *spelled):
        assert await reason(use(desk.sessions, Secret.of_text(text))) == "session_invalid bad_token", text


@pytest.mark.parametrize(
    "changed", [{"chain_id": 1}, {"vault": Address(b"\x11" * 20)}, {"node": Address(b"\x12" * 20)}, {}]
)
async def test_a_token_counts_at_its_node_for_its_chain_and_vault_alone(desk: Desk, changed: dict[str, Any]) -> None:
    token = (await desk.sign_in()).token
    other = desk.of(replace(HOME, **changed), NODE_KEY if changed else Secret(b"\x0c" * 32))

    assert await reason(use(other, token)) == "session_invalid bad_token"


async def test_a_session_ends_when_it_idles_and_after_a_day(desk: Desk) -> None:
    idle, busy = (await desk.sign_in()).token, (await desk.sign_in()).token
    began = desk.clock.now
    while desk.clock.now + IDLE_S < began + LONGEST_S:
        desk.clock.now += IDLE_S
        await use(desk.sessions, busy)

    assert await reason(use(desk.sessions, idle)) == "session_invalid idle"
    desk.clock.now = began + LONGEST_S - 1
    assert await use(desk.sessions, busy)
    desk.clock.now += 1
    assert await reason(use(desk.sessions, busy)) == "session_invalid expired"


async def test_a_session_ends_when_its_text_says_so(desk: Desk) -> None:
    ticket = await desk.sign_in(desk.text(expires_at=desk.clock.now + 60))
    desk.clock.now += 59
    assert await use(desk.sessions, ticket.token)
    desk.clock.now += 1

    assert await reason(use(desk.sessions, ticket.token)) == "session_invalid expired"


async def test_a_session_outlives_the_process_and_its_last_use_does_too(desk: Desk) -> None:
    used, unused = (await desk.sign_in()).token, (await desk.sign_in()).token
    desk.clock.now += IDLE_S - 1
    await use(desk.sessions, used)
    sessions = await desk.restart()
    desk.clock.now += 2

    assert (await use(sessions, used)).user == USER
    assert await reason(use(sessions, unused)) == "session_invalid idle"


async def test_signing_out_ends_one_session_and_for_good(desk: Desk) -> None:
    one, other = (await desk.sign_in()).token, (await desk.sign_in()).token

    assert await desk.sessions.sign_out(read_token(one), None) == 1
    assert await reason(use(desk.sessions, one)) == "session_invalid signed_out"
    assert await reason(desk.sessions.sign_out(read_token(one), None)) == "session_invalid signed_out"
    sessions = await desk.restart()
    assert await reason(use(sessions, one)) == "session_invalid signed_out"
    assert await use(sessions, other)


async def test_signing_out_everywhere_ends_all_of_one_wallet(desk: Desk) -> None:
    mine = [(await desk.sign_in()).token for _ in range(3)]
    others = (await desk.sign_in(desk.text(user=address_of(OTHER_KEY)), OTHER_KEY)).token

    assert await desk.sessions.sign_out(read_token(mine[0]), None, everywhere=True) == 3
    for token in mine:
        assert await reason(use(desk.sessions, token)) == "session_invalid signed_out"
    assert await use(desk.sessions, others)


async def test_who_signs_in_while_all_are_signed_out_is_out(desk: Desk) -> None:
    """Whichever way the two meet: a token that is given out afterwards counts for nothing."""
    for pause in range(6):
        signing = asyncio.create_task(desk.sign_in())
        for _ in range(pause):
            await asyncio.sleep(0)
        ended = await desk.sessions.end_all(USER)
        token = (await signing).token
        if ended:
            assert await reason(use(desk.sessions, token)) == "session_invalid signed_out", pause
        else:
            assert await use(desk.sessions, token)
            assert await desk.sessions.end_all(USER) == 1


async def test_a_session_that_is_read_while_it_is_ended_is_out(desk: Desk) -> None:
    token = (await desk.sign_in()).token
    sessions = await desk.restart()  # which knows none by heart
    ending = asyncio.create_task(sessions.end_all(USER))
    uses = await asyncio.gather(*(use(sessions, token) for _ in range(5)), return_exceptions=True)
    await ending

    assert await reason(use(sessions, token)) == "session_invalid signed_out"
    assert len(uses) == 5


async def test_a_sign_out_that_was_not_written_is_none(desk: Desk) -> None:
    token = (await desk.sign_in()).token
    await use(desk.sessions, token)
    full = "CREATE TEMP TRIGGER full BEFORE UPDATE ON login BEGIN SELECT RAISE(ABORT, 'as a disk without room'); END"
    desk.state._writer.execute(full)
    assert (await reason(desk.sessions.sign_out(read_token(token), None))).startswith("not_ready")
    desk.state._writer.execute("DROP TRIGGER full")

    assert await use(desk.sessions, token)
    assert await desk.sessions.sign_out(read_token(token), None) == 1
    assert await reason(use(desk.sessions, token)) == "session_invalid signed_out"


async def test_what_a_token_proves_of_a_call(desk: Desk) -> None:
    node = Authenticator(HOME, desk.sessions, clock=desk.clock)
    one, other = await desk.sign_in(), await desk.sign_in()
    desk.clock.now += 100

    async def proved(ticket: Ticket, key: str | None, body: bytes = b"{}") -> Principal:
        proof = SessionToken(read_token(ticket.token), None, key)
        return await node.authenticate(SignedCall(USER, "POST", "/v1/x", body, proof, None, Usdc(7)))

    named, again, elsewhere = await proved(one, "k"), await proved(one, "k"), await proved(other, "k")
    unnamed = [await proved(one, None) for _ in range(2)]
    call = SessionCall(Digest.keccak(b"{}"), one.session.login, "POST", "/v1/x", "k")

    assert (named.user, named.kind, named.login, named.max_price) == (
        USER, PrincipalKind.SESSION, one.session.login, Usdc(7)
    )  # fmt: skip
    assert named.request == again.request == call.digest
    assert named.nonce == elsewhere.nonce, "a key is one wallet's, whatever session it comes by"
    assert named.request not in (elsewhere.request, (await proved(one, "k", b"[]")).request)
    assert named.expires_at == desk.clock.now + LONGEST_S, "and is remembered for a day"
    assert named.repeatable
    assert unnamed[0].nonce != unnamed[1].nonce
    assert not unnamed[0].repeatable
    assert " " in (unnamed[0].typed_message or {})["request_id"], "no header Idempotency-Key could say the same"


async def test_what_is_long_over_is_forgotten(desk: Desk) -> None:
    await desk.sign_in(desk.text(resources=(*_resources(desk), f"urn:div:spend:{TOKEN}:5")))
    desk.clock.now += LONGEST_S + 3601
    await desk.sign_in()

    def count(table: str) -> Any:
        return desk.state.look(lambda db: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])

    assert (count("login"), count("allowance")) == (1, 0)


@given(st.binary(max_size=300) | st.text(max_size=200).map(str.encode))
def test_no_bytes_make_a_token_raise_anything_else(raw: bytes) -> None:
    for token in (Secret(raw), Secret(b"div1_" + raw)):
        with contextlib.suppress(SessionInvalid):
            assert isinstance(read_token(token).user, Address)


async def test_a_token_is_not_in_any_row(desk: Desk) -> None:
    token = (await desk.sign_in()).token.reveal()
    await desk.state.close()
    kept = b"".join(path.read_bytes() for path in desk.folder.iterdir())
    desk.open()

    assert token not in kept
