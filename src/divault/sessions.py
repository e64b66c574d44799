"""Sessions: a wallet signs a text once (EIP-4361), and a token speaks for it for a while.

For browsers, notebooks and programs that can send a bearer token but sign nothing. Rules:

1. A token is an HMAC, by a key derived from the node's, over wallet, login, end and origin, for this node, chain and
   vault. It counts only together with its row in the ledger: signing out is on disk before it is answered, and holds
   after a restart.
2. The text names this node and its vault among its resources, beside domain, URI and chain: one that was signed for
   another node, or shown by it, opens nothing here. Its nonce was given out here and opens one session.
3. A session ends after 15 minutes without a call, after 24 hours in any case (a contract wallet's after 5 minutes), and
   when its text says so.
4. A call that a browser sends names its origin, which has to be the session's; others name none.
5. A session may spend nothing but what its text allows, in resources `urn:div:spend:<token>:<atomic units>`.

Who a session belongs to is proved here; what his call may do is decided where every other call's is.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
import secrets
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from divault.errors import DivaultError, NotReady, RateLimited, SessionInvalid, SignatureInvalid
from divault.limits import Buckets
from divault.messages import (
    SignInContext,
    SignInMessage,
    allowances_of,
    authority_of,
    bound_to,
    compose,
    refusal,
    require_signer,
)
from divault.messages.session_calls import LONGEST_BY_CONTRACT_S, LONGEST_S, OURS, resources_of, statement
from divault.messages.signatures import KeysOnly, Signers
from divault.state import Rows, State
from divault.values import Address, Digest, Secret, TokenParts, Usdc

IDLE_S = 900
"""Seconds without a call after which a session is over."""
NONCE_S = 600
"""Seconds in which a nonce has to come back with its signature."""
PREFIX = "div1_"
"""How every token begins: what else is sent as a bearer token is no session's."""
_KEYS = KeysOnly()
_SEEN_EVERY_S = 60  # how often a use is written down; after a restart a session may seem idle so much longer
_KEPT_S = 3600  # how long an ended session's row stays: longer than any run that it began
_FORGOTTEN_AT_ONCE = 100  # rows of old sessions that one sign-in removes
_KNOWN = 4_000  # sessions kept in memory, of at most 24 kB; others are read again
_MAC, _USER, _LOGIN, _END = 32, 20, 32, 8
_NONCE = re.compile(r"([0-9a-f]{8})([0-9a-f]{24})([0-9a-f]{32})", re.ASCII)
_PER_PEER, _PER_NODE = 60, 600  # sign-ins per minute: each is a row for a day


@dataclass(slots=True, eq=False)
class Session:
    """An open session; times in unix seconds."""

    login: Digest
    """EIP-191 digest of `message`: the session's id."""
    user: Address
    origin: str
    message: str
    """The text that the wallet signed, and its signature."""
    signature: str
    expires_at: int
    seen_at: int
    written_at: int
    """`seen_at` as it is on disk."""
    by_contract: bool
    """The wallet is a contract, which accepted the signature; no key made it."""
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Challenge:
    """What a wallet needs to sign in: fields of EIP-4361, and all of its text where the wallet's address is known."""

    context: SignInContext
    resources: tuple[str, ...]
    message: str | None


@dataclass(frozen=True, slots=True)
class Ticket:
    """A session just opened, and its token."""

    token: Secret
    session: Session
    allowances: Mapping[Address, Usdc]
    """What it may spend, by token."""


@dataclass(frozen=True, slots=True)
class Home:
    """Where sessions are opened: this node, the contracts it serves, and its public URL."""

    chain_id: int
    vault: Address
    node: Address
    url: str
    origins: tuple[str, ...] = ()
    """Web origins, beside the node's own, whose pages may ask wallets to sign in; what is no origin is left out."""
    tokens: frozenset[Address] = frozenset()
    """What this node takes payments in, and so what a session may be allowed to spend."""

    @property
    def origin(self) -> str:
        """Scheme and authority of the URL. Raises BadRequest when it is none."""
        return f"{self.url.partition('://')[0].lower()}://{authority_of(self.url)}"


class Sessions:
    """One node's sessions. Safe for concurrent use within one event loop."""

    def __init__(
        self,
        state: State,
        key: Secret,
        home: Home,
        *,
        signers: Signers = _KEYS,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`key`: the node's. `signers`: whose signatures open a session. `monotonic` counts how many sign in."""
        self._state = state
        self._home = home
        self._origins = (home.origin, *(origin for origin in home.origins if "://" in origin))
        self._signers = signers
        self._clock = clock
        scope = f"{home.chain_id}:{home.vault}:{home.node}".encode()
        self._key = HKDF(SHA256(), 64, None, b"divault/sessions/v1\0" + scope).derive(key.reveal())
        self._known: dict[Digest, Session] = {}
        self._peers, self._all = (Buckets(limit, clock=monotonic) for limit in (_PER_PEER, _PER_NODE))

    # --- signing in -----------------------------------------------------------------------------------------------

    def challenge(
        self, origin: str | None, user: Address | None = None, allowances: Mapping[Address, Usdc] | None = None
    ) -> Challenge:
        """A fresh nonce and what belongs around it, for the page at `origin`, or for a program.

        Raises SessionInvalid for a page that may not ask here, SignatureInvalid for tokens that are not taken.
        """
        if origin is not None and origin not in self._origins:
            raise SessionInvalid(
                "pages of this origin may not sign in here: its operator names them in DIVAULT_CORS_ORIGINS",
                reason="wrong_origin",
            )
        self._require_taken(allowances or {})
        now = int(self._clock())
        context = self._context(origin or self._home.origin, self._new_nonce(now), now)
        resources = resources_of(self._home.node, self._home.vault, allowances or {})
        said = statement(allowances or {})
        message = None if user is None else compose(user, context, statement=said, resources=resources)
        return Challenge(context, resources, message)

    async def sign_in(self, text: str, signature: str, *, origin: str | None = None, peer: str = "") -> Ticket:
        """The token of a new session, for the wallet that signed the text.

        Raises SignatureInvalid, SignatureExpired, WrongNode and WrongChain with the reason; SessionInvalid when the
        text is of another origin than the page that sent it; RateLimited; NotReady; what `Signers` raise.
        """
        message, now = SignInMessage.parse(text), int(self._clock())
        own = self._page_of(message)
        if origin not in (None, own):
            raise SessionInvalid(
                "the text was signed for another page than the one that sends it", reason="wrong_origin"
            )
        given = message.nonce if self._gave(message.nonce, now) else ""
        self._count(self._peers, peer, _PER_PEER)
        message.check(self._context(own, given, now))
        allowances = self._require_bound(message)
        if self._state.look(lambda db: _is_used(db, message.nonce)):
            raise _nonce_used()
        by_contract = await self._signers.require(message.digest, signature, message.address, peer)
        self._count(self._all, "node", _PER_NODE)
        latest = now + (LONGEST_BY_CONTRACT_S if by_contract else LONGEST_S)
        expires_at = int(min(latest, message.expires_at or latest))
        session = Session(message.digest, message.address, own, text, signature, expires_at, now, now, by_contract)
        await self._state.write(lambda db: _insert(db, session, message.nonce, allowances, now))
        return Ticket(self._token(session), session, allowances)

    # --- its calls ------------------------------------------------------------------------------------------------

    async def of(self, token: TokenParts, origin: str | None) -> Session:
        """The open session of a token, and note that it was used now.

        Raises SessionInvalid with the reason: `bad_token`, `signed_out`, `expired`, `idle`, `wrong_origin`.
        """
        now = int(self._clock())
        if not hmac.compare_digest(token.mac.reveal(), self._mac(token.covered)):
            raise SessionInvalid("this token was not given out by this node: sign in", reason="bad_token")
        session = self._known.get(token.login) or self._load(token.login)
        session = self._open(session, now)
        if origin is not None and origin != session.origin:
            raise SessionInvalid("the session was opened by another page: sign in here", reason="wrong_origin")
        session.seen_at = max(now, session.seen_at)
        if session.seen_at - session.written_at >= _SEEN_EVERY_S:
            session.written_at = seen = session.seen_at
            await self._state.write(
                lambda db: db.execute("UPDATE login SET seen_at = ? WHERE digest = ?", (seen, session.login.raw))
            )
            self._open(session, now)  # it may have been ended meanwhile
        return session

    async def sign_out(self, token: TokenParts, origin: str | None, *, everywhere: bool = False) -> int:
        """End the session, or all of its wallet's; gives how many that were. Raises as `of`, and NotReady."""
        session = await self.of(token, origin)
        if everywhere:
            return await self.end_all(session.user)
        return await self._end("digest", session.login.raw, lambda known: known.login == session.login)

    async def end_all(self, user: Address) -> int:
        """End all sessions of a wallet; gives how many that were. Raises NotReady."""
        return await self._end("user", user.raw, lambda known: known.user == user)

    async def _end(self, column: str, value: bytes, is_meant: Callable[[Session], bool]) -> int:
        query = f"UPDATE login SET ended = 1 WHERE {column} = ? AND ended = 0 AND expires_at > ?"  # noqa: S608 - no input
        now = int(self._clock())

        def work(db: sqlite3.Connection) -> int:
            # In one moment with the row: what is read of it before is among these, what is read after is ended.
            for known in self._known.values():
                known.ended = known.ended or is_meant(known)
            return db.execute(query, (value, now)).rowcount

        try:
            return await self._state.write(work)
        except NotReady:  # what the file holds is what counts
            for known in [known for known in self._known.values() if is_meant(known)]:
                del self._known[known.login]
            raise

    # --- inside ---------------------------------------------------------------------------------------------------

    @staticmethod
    def _count(buckets: Buckets, key: str, limit: int) -> None:
        if wait := buckets.take(key):
            raise RateLimited("too many sign-ins: use the session that you have", retry_after=wait, limit=limit)

    def _page_of(self, message: SignInMessage) -> str:
        """The origin that the text is for, among those that may be; the node's own for any other."""
        named = [origin for origin in self._origins if _authority(origin) == message.domain]
        exact = (origin for origin in named if message.uri == origin or message.uri.startswith(f"{origin}/"))
        return next(exact, named[0] if named else self._home.origin)

    def _context(self, origin: str, nonce: str, now: int) -> SignInContext:
        return SignInContext(_authority(origin), origin, self._home.chain_id, nonce, now)

    def _require_bound(self, message: SignInMessage) -> Mapping[Address, Usdc]:
        """What the text allows, if it is for this node and vault (rule 2). Raises WrongNode, WrongChain."""
        node, vault = bound_to(self._home.node, self._home.vault)
        if node not in message.resources:
            advice = f"the text has to name this node among its resources: {node}"
            raise refusal("node_mismatch", advice, node=str(self._home.node))
        if vault not in message.resources:
            advice = f"the text has to name the vault among its resources: {vault}"
            raise refusal("wrong_domain", advice, vault=str(self._home.vault))
        allowances = allowances_of(message.resources)
        ours = [resource for resource in message.resources if resource.startswith(OURS)]
        self._require_taken(allowances)
        if len(ours) != len(allowances) + 2:
            raise refusal("bad_message", f"resources {OURS}... name this node, its vault and sums to spend, each once")
        return allowances

    def _require_taken(self, allowances: Mapping[Address, Usdc]) -> None:
        if not allowances.keys() <= self._home.tokens:
            taken = ", ".join(map(str, sorted(self._home.tokens)))
            raise refusal("bad_message", f"this node takes payments in {taken or 'no token'}, and in no other")

    def _new_nonce(self, now: int) -> str:
        begin = f"{now:08x}{secrets.token_hex(12)}"
        return begin + self._nonce_mac(begin)

    def _gave(self, nonce: str, now: int) -> bool:
        match = _NONCE.fullmatch(nonce)
        if match is None or not hmac.compare_digest(match[3], self._nonce_mac(match[1] + match[2])):
            return False
        return 0 <= now - int(match[1], 16) <= NONCE_S

    def _nonce_mac(self, begin: str) -> str:
        return hmac.digest(self._key[32:], begin.encode(), "sha256").hex()[:32]

    def _token(self, session: Session) -> Secret:
        covered = (
            session.user.raw + session.login.raw + session.expires_at.to_bytes(_END, "big") + session.origin.encode()
        )
        raw = self._mac(covered) + covered
        return Secret.of_text(PREFIX + base64.urlsafe_b64encode(raw).decode().rstrip("="))

    def _mac(self, covered: bytes) -> bytes:
        return hmac.digest(self._key[:32], covered, "sha256")

    @staticmethod
    def _open(session: Session | None, now: int) -> Session:
        """The session, if it is open. Raises SessionInvalid."""
        if session is None or session.ended:
            raise SessionInvalid("this session was ended: sign in again", reason="signed_out")
        if now >= session.expires_at:
            raise SessionInvalid("this session has come to its end: sign in again", reason="expired")
        if now - session.seen_at > IDLE_S:
            raise SessionInvalid(f"this session had no call for {IDLE_S} s: sign in again", reason="idle")
        return session

    def _load(self, login: Digest) -> Session | None:
        # At once: between the look and the keeping nobody may sign out. The row is on disk, or nobody had its token.
        session = self._state.look(lambda db: _find(db, login))
        if session is not None:
            if len(self._known) >= _KNOWN:
                del self._known[next(iter(self._known))]
            self._known[login] = session
        return session


# --- tokens ---------------------------------------------------------------------------------------------------------


def read_token(token: Secret) -> TokenParts:
    """The parts of a token. One spelling each: what decodes to the same bytes is another text, and none.

    Raises SessionInvalid, reason `bad_token`.
    """
    text = token.reveal()
    body = text.removeprefix(PREFIX.encode())
    try:
        raw = base64.b64decode(body + b"=" * (-len(body) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    again = PREFIX.encode() + base64.urlsafe_b64encode(raw).rstrip(b"=")
    if len(raw) <= _MAC + _USER + _LOGIN + _END or not hmac.compare_digest(again, text):
        raise SessionInvalid("this is no token of a session: sign in", reason="bad_token")
    covered = raw[_MAC:]
    login = Digest(covered[_USER : _USER + _LOGIN])
    return TokenParts(Address(covered[:_USER]), login, covered, Secret(raw[:_MAC]))


def _authority(origin: str) -> str:
    return origin.partition("://")[2]


# --- rows -----------------------------------------------------------------------------------------------------------


def _insert(db: sqlite3.Connection, session: Session, nonce: str, allowances: Mapping[Address, Usdc], now: int) -> None:
    """Open the session, once for its nonce, and forget those that are long over. Raises SignatureInvalid."""
    over = db.execute("SELECT digest FROM login WHERE keep_until < ? LIMIT ?", (now, _FORGOTTEN_AT_ONCE)).fetchall()
    db.executemany("DELETE FROM allowance WHERE login = ?", over)
    db.executemany("DELETE FROM login WHERE digest = ?", over)
    keep_until = max(session.expires_at, now + NONCE_S) + _KEPT_S
    row = (
        session.login.raw,
        nonce,
        session.user.raw,
        session.origin,
        session.message,
        session.signature,
        session.expires_at,
        now,
        keep_until,
    )
    try:
        db.execute(
            "INSERT INTO login(digest, nonce, user, origin, message, signature, expires_at, seen_at, keep_until)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            row,
        )
    except sqlite3.IntegrityError:
        raise _nonce_used() from None
    for token, most in allowances.items():
        db.execute(
            "INSERT INTO allowance(login, token, most) VALUES (?, ?, ?)",
            (session.login.raw, token.raw, str(most.atomic)),
        )


def _is_used(db: Rows, nonce: str) -> bool:
    return db.execute("SELECT 1 FROM login WHERE nonce = ?", (nonce,)).fetchone() is not None


def _nonce_used() -> DivaultError:
    return refusal("wrong_nonce", "this nonce has opened a session already: ask for a new one")


def _find(db: Rows, login: Digest) -> Session | None:
    found = db.execute(
        "SELECT user, origin, message, signature, expires_at, seen_at, ended FROM login WHERE digest = ?", (login.raw,)
    ).fetchone()
    if found is None:
        return None
    user, origin, message, signature, expires_at, seen_at, ended = found
    wallet = Address(user)
    by_contract = not _is_signer(login, signature, wallet)  # somebody's it is, or there were no row
    times = (expires_at, seen_at, seen_at)
    return Session(login, wallet, origin, message, signature, *times, by_contract, ended=bool(ended))


def _is_signer(login: Digest, signature: str, wallet: Address) -> bool:
    try:
        require_signer(login, signature, wallet)
    except SignatureInvalid:
        return False
    return True
