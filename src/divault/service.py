"""The pipeline and nothing else: from a signed call to an answer with a receipt.

`Service.infer` is the specification. Each step takes the proof that the step before it made (`values`), so a version
with one step left out, or two swapped, does not type-check; a test tries them all.

    SignedCall -> authenticate -> Principal -> gate -> Grant -> hold -> Hold
    Cid -> arriving -> Arrival (-> VerifiedBlob) -> open -> OpenedModel -> run -> Output -> charge -> Receipt
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from divault.auth import Authenticator
from divault.chain.gates import Gates
from divault.errors import CidMismatch, DivaultError, ModelNotLoaded, NotOperator, NotReady, SignatureIncomplete
from divault.ipfs.cid import parse_cid
from divault.limits import RefusalBudget, WalletLimits, WrongKeys
from divault.metrics import Lap, Metrics
from divault.models.base import Description, Piece
from divault.payments import Ledger, Payments, Wording
from divault.receipts import answer_body
from divault.sessions import Sessions
from divault.storage.cache import CiphertextCache, Freed
from divault.storage.fetcher import Fetcher
from divault.storage.kavach import KeyAccess
from divault.telemetry import log
from divault.values import (
    Address,
    Answer,
    Cid,
    Digest,
    Grant,
    Hold,
    ModelId,
    ModelInfo,
    OpenedModel,
    Output,
    Principal,
    PrincipalKind,
    SignedCall,
)
from divault.vault.keys import CallerKey, KeySearch, KeySource, NodeIdentity
from divault.workers.opening import Opener
from divault.workers.pool import Loaded, WorkerPool

_log = log("service")
T = TypeVar("T")
_LOAD_RETRY_S = 5
_RENAMED_RETRY_S = 1  # whoever comes next is checked at the block that names the other CID
_AGAIN = "send the same bytes again, or a load under a fresh nonce"
_AT_ONCE_BYTES = 16 * 1024  # translated on the loop; of more, all other callers would feel it


@dataclass(frozen=True, slots=True)
class Parts:
    """What a service is made of; `app` puts it together."""

    authenticator: Authenticator
    ledger: Ledger
    gates: Gates
    payments: Payments
    fetcher: Fetcher
    cache: CiphertextCache
    opener: Opener
    identity: NodeIdentity
    kavach: KeyAccess
    wrong_keys: WrongKeys
    workers: WorkerPool
    limits: WalletLimits
    refusals: RefusalBudget
    metrics: Metrics
    operators: frozenset[Address]
    sessions: Sessions
    load_wait_s: float
    """How long a call waits for other calls' loads of its model."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """A model that is loaded now: what the vault says of it, and what its worker says."""

    model: ModelInfo
    loaded: Loaded


@dataclass(frozen=True, slots=True)
class Dialect:
    """How an interface puts a question to a model and words its answer. What it raises is the caller's refusal.

    Large ones are translated in a thread: `ask` and `tell` share nothing with other calls.
    """

    ask: Callable[[SignedCall, Description], SignedCall] | None = None
    """The call with the input and parameters that this model takes. Raises InputInvalid."""
    tell: Callable[[Output], Output] | None = None
    """The output with the result that stands in the answer, and that its receipt covers. Raises ModelFailed."""
    wording: Wording = answer_body
    on_piece: Callable[[Piece], None] | None = None
    """Gets the pieces of an answer as they are made, where the caller wants them."""

    async def asked(self, call: SignedCall, description: Description) -> SignedCall:
        """The call as its model takes it. Raises what `ask` raises."""
        return call if self.ask is None else await _aside(len(call.body), self.ask, call, description)

    async def told(self, output: Output) -> Output:
        """The output as its caller reads it. Raises what `tell` raises."""
        return output if self.tell is None else await _aside(len(output.result), self.tell, output)


NATIVE = Dialect()
"""The routes of this project: nothing is translated."""


class Service:
    """One node's answers to signed calls. All methods are safe to call concurrently on one event loop."""

    def __init__(self, parts: Parts) -> None:
        self._authenticator = parts.authenticator
        self._ledger = parts.ledger
        self._gates = parts.gates
        self._payments = parts.payments
        self._fetcher = parts.fetcher
        self._cache = parts.cache
        self._opener = parts.opener
        self._identity = parts.identity
        self._kavach = parts.kavach
        self._wrong_keys = parts.wrong_keys
        self._workers = parts.workers
        self._limits = parts.limits
        self._refusals = parts.refusals
        self._metrics = parts.metrics
        self._operators = parts.operators
        self._sessions = parts.sessions
        self._load_wait_s = parts.load_wait_s
        self._loading: defaultdict[Digest, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def infer(self, call: SignedCall, *, load: bool, dialect: Dialect = NATIVE) -> Answer:
        """Run the model on the call's input, once, and answer with a signed receipt.

        `load` fetches and opens a model that is not loaded yet; without it such a model is `model_not_loaded`.
        `dialect` is the interface that the caller speaks.
        Every error after the signature that concerns money or access carries a receipt as its `evidence`.
        """
        lap = self._metrics.lap()
        principal = await self._authenticator.authenticate(call)
        lap("authenticate")
        with lap, _Named(principal):
            stored = await self._ledger.answered(principal)
            if stored is not None:
                return stored
            with self._limits.admit(principal):
                async with self._ledger.outcome(principal, call, self._refusals):
                    lap("known")
                    grant = await self._gates.check(principal, _model_of(call))
                    if not load:
                        self._require_loaded(grant)
                    lap("gate")
                    async with self._payments.hold(grant, call) as hold:
                        lap("hold")
                        opened = await self._open(hold.grant, call)
                        lap("open")
                        return await self._answer(opened, hold, call, dialect, lap)

    def _answer(
        self, opened: OpenedModel, hold: Hold, call: SignedCall, dialect: Dialect, lap: Lap
    ) -> Coroutine[Any, Any, Answer]:
        """Run the model and charge; for all of a priced answer whose pieces the caller began to get."""
        if dialect.on_piece is None or not hold.price.atomic:
            return self._charged(opened, hold, call, dialect, lap)
        pieces = _Handed(dialect.on_piece)
        return pieces.with_their_end(self._charged(opened, hold, call, replace(dialect, on_piece=pieces), lap))

    async def _charged(self, opened: OpenedModel, hold: Hold, call: SignedCall, dialect: Dialect, lap: Lap) -> Answer:
        """What the model made of the call, once it is paid for and on disk."""
        description = self._workers.description(opened)
        self._ledger.opened(hold, opened.plaintext_sha256, description.runtime)
        output = await self._workers.run(opened, hold, await dialect.asked(call, description), dialect.on_piece)
        lap("run")
        answer = await self._ledger.charge(hold, call, await dialect.told(output), dialect.wording)
        lap("charge")
        return answer

    async def load(self, call: SignedCall) -> LoadResult:
        """Fetch, verify, open and load the model, unless it is loaded already."""
        principal = await self._authenticator.authenticate(call)
        with _Named(principal), self._limits.admit(principal):
            grant = await self._gates.check(principal, _model_of(call))
            await self._ledger.consume(principal)
            opened = await self._open(grant, call)
            return LoadResult(grant.model, self._workers.describe(opened))

    async def unload(self, call: SignedCall) -> ModelId:
        """End the model's worker, for an operator or the model's owner."""
        principal = await self._authenticator.authenticate(call)
        model = _model_of(call)
        with _Named(principal):
            _require_signed(principal)
            if principal.user not in self._operators and principal.user != (await self._gates.info(model)).owner:
                raise NotOperator("only the model's owner or an operator of this node may unload it")
            await self._ledger.consume(principal)
            if not await self._workers.unload(model.key):
                raise ModelNotLoaded(f"{model} is not loaded here", model_id=model.text)
            return model

    async def clear_caches(self, call: SignedCall) -> tuple[int, Freed]:
        """Unload all models and drop all cached ciphertext, for an operator; how many models, and what was freed."""
        principal = await self._authenticator.authenticate(call)
        with _Named(principal):
            _require_signed(principal)
            if principal.user not in self._operators:
                raise NotOperator("only an operator of this node may clear its caches")
            await self._ledger.consume(principal)
            models = [loaded.model for loaded in self._workers.loaded()]
            for model in models:
                await self._workers.unload(model.key)
            return len(models), await asyncio.to_thread(self._cache.clear)

    async def sign_out(self, call: SignedCall) -> int:
        """End all sessions of the wallet that signed this; how many there were."""
        principal = await self._authenticator.authenticate(call)
        with _Named(principal):
            _require_signed(principal)
            await self._ledger.consume(principal)
            return await self._sessions.end_all(principal.user)

    async def result(self, call: SignedCall, request: Digest) -> Answer:
        """Give the stored answer of a request, to the wallet that signed it."""
        principal = await self._authenticator.authenticate(call)
        with _Named(principal):
            answer = await self._ledger.result(request, principal.user)
            await self._ledger.consume(principal)
            return answer

    async def _open(self, grant: Grant, call: SignedCall) -> OpenedModel:
        """Give the loaded model of the grant, after loading it if need be; one load of a model at a time."""
        cid, model = parse_cid(grant.model.cid), grant.model.model
        if call.cid is not None and call.cid != grant.model.cid:
            raise CidMismatch("the vault names another CID for this model", have=call.cid, need=grant.model.cid)
        found = self._workers.find(model, cid)
        if found is not None:
            return found
        async with self._turn_to_load(model):
            found = self._workers.find(model, cid)
            if found is not None:
                return found
            await self._require_named(grant)
            return await self._load(grant, cid, call)

    async def _require_named(self, grant: Grant) -> None:
        """Return unless another file is loaded and the vault names this one no more. Raises NotReady, ChainUnavailable.

        The owner changed the CID while the call waited: his old file must not take the place of the new one. The vault
        is asked, since the number of a block proves nothing: where a chain went back, a lower one may be the newer.
        """
        model = grant.model.model
        if self._workers.loaded_as(model) is None:
            return
        if (await self._gates.info(model)).cid != grant.model.cid:
            raise NotReady(f"the vault names another CID for {model} meanwhile: {_AGAIN}", retry_after=_RENAMED_RETRY_S)

    async def _load(self, grant: Grant, cid: Cid, call: SignedCall) -> OpenedModel:
        sources, search = self._keys(call)
        key = call.decryption_key
        with self._metrics.load():
            with self._wrong_keys.attempt(call.user, cid.text, key) if key is not None else nullcontext():
                async with self._fetcher.arriving(cid) as arrival:
                    opened = await self._opener.open(arrival, grant, sources, search)
            await self._workers.load(opened)
        _log.info("loaded", model_id=grant.model.model.text, cid=cid.text, bytes=opened.size)
        return opened

    @asynccontextmanager
    async def _turn_to_load(self, model: ModelId) -> AsyncIterator[None]:
        """A context in which nobody else loads the model. Raises NotReady when others take too long over it.

        Loads that fail one after the other would keep the last who waits, and what he reserved, for all their time.
        """
        lock = self._loading[model.key]
        try:
            async with asyncio.timeout(self._load_wait_s):
                await lock.acquire()
        except TimeoutError:
            raise NotReady(
                f"{model} is being loaded for other calls, for longer than {self._load_wait_s:g} s: {_AGAIN}",
                retry_after=_LOAD_RETRY_S,
            ) from None
        try:
            yield
        finally:
            lock.release()

    def _keys(self, call: SignedCall) -> tuple[list[KeySource], KeySearch | None]:
        """What may open the file: the caller's key, or his word at Kavach, else what was given to this node."""
        if call.decryption_key is not None:
            return [CallerKey(call.decryption_key), self._identity], None
        if call.lighthouse_authorization is not None:
            return [self._identity], self._kavach.of_caller(call.user, call.lighthouse_authorization)
        return [self._identity], self._kavach.of_node()

    def _require_loaded(self, grant: Grant) -> None:
        model = grant.model
        if self._workers.find(model.model, parse_cid(model.cid)) is None:
            raise ModelNotLoaded(
                f"{model.model} is not loaded here: POST /api/v1/models/load first, or call /api/v1/inference/run",
                model_id=model.model.text,
            )


async def _aside(size: int, work: Callable[..., T], *given: object) -> T:
    """What the work makes of so many bytes, which holds up nobody else."""
    return work(*given) if size <= _AT_ONCE_BYTES else await asyncio.to_thread(work, *given)


class _Handed:
    """Hands the pieces of a priced answer on. Once there was one, the answer is made and charged whoever leaves.

    Otherwise a caller who reads the last piece and hangs up, before the charge, would have had all of it for nothing.
    """

    def __init__(self, on_piece: Callable[[Piece], None]) -> None:
        self._on_piece = on_piece
        self._any = False

    def __call__(self, piece: Piece) -> None:
        self._any = True
        self._on_piece(piece)

    async def with_their_end(self, answering: Coroutine[Any, Any, Answer]) -> Answer:
        """The answer. Who is cancelled after the first piece waits for its end, and is cancelled only then."""
        work = asyncio.create_task(answering)
        left: asyncio.CancelledError | None = None
        while not work.done():
            try:
                await asyncio.wait([work])
            except asyncio.CancelledError as err:
                left = err
                if not self._any:
                    work.cancel()
        answer = work.result()  # an error of the run goes before the cancellation: there is a receipt for it
        if left is not None:
            raise left
        return answer


class _Named:
    """Gives every error in its context the id of the authenticated request."""

    __slots__ = ("_principal",)

    def __init__(self, principal: Principal) -> None:
        self._principal = principal

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, DivaultError):
            error.request_id = str(self._principal.request)


def _require_signed(principal: Principal) -> None:
    """Return only if the wallet signed this very request: a token that was stolen must not end anything here."""
    if principal.kind is PrincipalKind.SESSION:
        raise SignatureIncomplete(
            "a session is not enough for this: sign the request in the headers Signature-Input and Signature",
            missing=["signature-input", "signature"],
            malformed=[],
        )


def _model_of(call: SignedCall) -> ModelId:
    if call.model is None:
        raise TypeError("this route needs a call that names a model")
    return call.model
