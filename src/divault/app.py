"""The composition root: settings in, a running node out.

A node that can't keep its promises refuses to start and says why: chain out of reach or another one than configured, no
vault at its address, no payment token or one with other decimals, a sandbox level or a device that is not there, a
state that another process uses.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

import divault
from divault import keyfiles, messages
from divault.api import ApiLimits, Node, create_api
from divault.api.connection import Connection
from divault.api.envelope import MAX_SELF_SIGNED_BYTES, Envelopes
from divault.api.measured import Measured
from divault.auth import Authenticator
from divault.chain import configured
from divault.chain.chain import Chain
from divault.chain.contract_wallets import ContractWallets
from divault.chain.gates import Gates
from divault.chain.rpc import Rpc
from divault.chain.vault import VaultReader
from divault.errors import SettingsInvalid, StorageFailed
from divault.health import Health, Probe
from divault.limits import PeerLimits, RefusalBudget, WalletLimits, WrongKeys
from divault.messages import NodeDescriptor, authority_of
from divault.messages.session_calls import LONGEST_S
from divault.metrics import Metrics, Sources
from divault.models.base import Place
from divault.payments import Ledger, Payments, Terms, TransferCredit
from divault.receipts import ReceiptIssuer
from divault.service import Parts, Service
from divault.sessions import IDLE_S, Home, Sessions
from divault.settings import MB, Settings
from divault.state import State
from divault.storage.cache import CiphertextCache
from divault.storage.fetcher import Fetcher
from divault.storage.gateway import GatewayStorage
from divault.storage.kavach import Kavach, KeyAccess
from divault.telemetry import configure_logs, log
from divault.traces import Traces
from divault.values import Address, Digest, Receipt, Secret
from divault.vault.age import Identity
from divault.vault.keys import NodeIdentity
from divault.workers.confinement import Confinement
from divault.workers.libraries import library_paths
from divault.workers.opening import Opener
from divault.workers.pool import WorkerPool
from divault.workers.worker import Tuning

_log = log("app")
LEDGER_FILE = "ledger.sqlite3"
_BODIES_IN_FLIGHT = 16  # full-size bodies that may be held at once; beyond it 503
_USAGE_KEPT_S = 5.0
_NEW_OBJECTS = 10_000  # between two collections; a call makes about 300, nearly all of which end with it
RAILS = ("transfer",)


@dataclass(frozen=True, slots=True)
class Identities:
    """Who the node is: its signing key and the age identity that models are sealed to."""

    key: Secret
    address: Address
    age: Identity

    @classmethod
    def of(cls, settings: Settings) -> Identities:
        """Read the key files, or make them at the first start, where models can't read them. Raises SettingsInvalid."""
        require_apart(settings)
        key_by, age_by = (
            "DIVAULT_STATE_DIR" if file is None else name
            for name, file in (
                ("DIVAULT_NODE_KEY_FILE", settings.divault_node_key_file),
                ("DIVAULT_AGE_IDENTITY_FILE", settings.divault_age_identity_file),
            )
        )
        key = keyfiles.signing_key(settings.node_key_file, key_by)
        return cls(key, messages.address_of(key), keyfiles.identity(settings.age_identity_file, age_by))


@dataclass(frozen=True, slots=True)
class Contracts:
    """The chain, vault and payment token that this node works with, all proved to be there."""

    chain: Chain
    vault: Address
    token: Address


@asynccontextmanager
async def running(settings: Settings, url: str | None = None) -> AsyncIterator[Measured]:
    """A node's ASGI application while the context lasts; everything is closed after it, in reverse order.

    `url`: where callers reach it, unless `DIVAULT_PUBLIC_URL` says so. Raises SettingsInvalid, ChainUnavailable.
    """
    async with AsyncExitStack() as stack:
        contracts = await _contracts(settings, stack)
        identities = Identities.of(settings)
        public_url = settings.divault_public_url or url or f"http://127.0.0.1:{settings.port}"
        metrics = Metrics()
        node = await _node(settings, contracts, identities, metrics, public_url, stack)
        peers = PeerLimits(
            settings.divault_rate_limit_per_ip_per_minute, _BODIES_IN_FLIGHT * settings.divault_max_body_bytes
        )
        # Also so that the first fetch knows which gateways are trustless; nobody waits for one that is slow.
        probing = asyncio.create_task(node.health.checks())
        stack.callback(probing.cancel)
        yield create_api(
            node,
            ApiLimits(
                peers,
                settings.divault_max_body_bytes,
                metrics,
                metrics_for=settings.divault_metrics,
                traces=_traces(settings, stack),
                log_successes=settings.debug,
                cors_origins=settings.divault_cors_origins,
            ),
        )


def _traces(settings: Settings, stack: AsyncExitStack) -> Traces | None:
    if settings.divault_otlp_endpoint is None:
        return None
    traces = Traces.to(settings.divault_otlp_endpoint)
    stack.push_async_callback(asyncio.to_thread, traces.close)
    return traces


async def serve(settings: Settings, *, until_eof: bool = False) -> None:
    """Serve until SIGINT or SIGTERM; then finish what runs, and close. Raises as `running`.

    With `until_eof` also until standard input ends: a node must not outlive the program that started it.

    The log line `serving` names the URL; connections are accepted from then on.
    """
    require_apart(settings)
    configure_logs(settings.divault_log_dir, debug=settings.debug)
    listening = listen(settings)
    url = url_of(listening)
    async with running(settings, url) as app:
        config = uvicorn.Config(
            app,
            http=Connection.telling(app.refused),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=int(settings.inference_timeout_seconds) + 1,
        )
        _log.info("serving", url=url, version=divault.__version__)
        server = uvicorn.Server(config)
        if until_eof:
            await asyncio.get_running_loop().connect_read_pipe(lambda: _UntilEof(server), sys.stdin)
        _settle_memory()
        with _surviving_signals():
            await server.serve(sockets=[listening])


def _settle_memory() -> None:
    """Leave what the start made out of garbage collections: walking it again and again stops calls for 0.1 s a time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS)


@contextmanager
def _surviving_signals() -> Iterator[None]:
    """Keep the process alive when uvicorn, done, raises the signal that ended it once more: we still have to close."""
    loop, ending = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
    for sig in ending:
        loop.add_signal_handler(sig, lambda: None)
    try:
        yield
    finally:
        for sig in ending:
            loop.remove_signal_handler(sig)


class _UntilEof(asyncio.Protocol):
    """Ends the server when the pipe that it reads ends."""

    def __init__(self, server: uvicorn.Server) -> None:
        self._server = server

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the signature is asyncio's
        """Part of asyncio.Protocol."""
        self._server.should_exit = True


def listen(settings: Settings) -> socket.socket:
    """What the node accepts connections on. Raises SettingsInvalid naming HOST or PORT."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as err:
        if err.errno in (errno.EADDRINUSE, errno.EACCES):
            setting, fix = "PORT", "set PORT to a free port, over 1023 without the right to more"
        else:
            setting, fix = "HOST", "set HOST to an address of this machine, or to 0.0.0.0"
        why = (err.strerror or str(err)).partition(" (while")[0]  # the library says the address once more
        raise SettingsInvalid(
            f"can't listen on {settings.host}, port {settings.port} ({why}): {fix}", setting=setting
        ) from err


def url_of(listening: socket.socket) -> str:
    """Where this machine reaches it."""
    host, port = listening.getsockname()[:2]
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://[{here}]:{port}" if ":" in here else f"http://{here}:{port}"


async def _contracts(settings: Settings, stack: AsyncExitStack) -> Contracts:
    vault, token = settings.vault, settings.payment_token
    chain = Chain(
        Rpc.parse(settings.web3_provider_url, settings.divault_chain_id),
        head_ttl_s=settings.divault_head_ttl_seconds,
        max_head_age_s=settings.divault_head_max_age_seconds,
    )
    stack.push_async_callback(chain.close)
    head = await configured.newest(chain)
    await configured.require_vault(chain, vault, head)
    await configured.require_tokens(chain, token, settings.divault_payment_tokens, head)
    return Contracts(chain, vault, token)


async def _node(
    settings: Settings,
    contracts: Contracts,
    identities: Identities,
    metrics: Metrics,
    url: str,
    stack: AsyncExitStack,
) -> Node:
    chain, vault = contracts.chain, contracts.vault
    state = State(settings.divault_state_dir / LEDGER_FILE)
    stack.push_async_callback(state.close)
    lease_s = int(settings.divault_load_timeout_seconds + settings.inference_timeout_seconds) + 10
    issuer = ReceiptIssuer(identities.key, chain.chain_id, vault)
    ledger = Ledger(state, issuer, lease_s=lease_s, on_receipt=receipts_into(metrics))
    await ledger.recover()
    workers = worker_pool(settings)
    stack.push_async_callback(workers.close)
    await require_sandbox(settings, workers)
    await workers.prove_device()
    opener = Opener(max_model_bytes=settings.max_model_bytes, timeout_s=settings.divault_load_timeout_seconds)
    stack.callback(opener.close)
    cache = CiphertextCache(settings.model_cache_dir, settings.divault_cache_max_mb * MB)
    metrics.sources = Sources(workers.figures, _usage_of(cache), lambda: _head_of(chain), lambda: ledger.pending)
    gateways = [GatewayStorage(gateway) for gateway in settings.gateway_urls]
    for gateway in gateways:
        stack.callback(gateway.close)
    kavach, wrong_keys = Kavach(settings.divault_lighthouse_encryption_url), WrongKeys()
    stack.push_async_callback(kavach.close)
    tokens = frozenset({contracts.token, *settings.divault_payment_tokens})
    metrics.expect(tokens=map(str, tokens))
    terms = Terms(tokens, settings.divault_transfer_confirmations, settings.divault_transfer_max_age_seconds)
    rail = TransferCredit(ledger, chain, terms, sole_node_for=settings.divault_sole_node_for)
    gates = Gates(chain, VaultReader(chain, vault, contracts.token), tokens)
    home = Home(chain.chain_id, vault, identities.address, url, tuple(settings.divault_cors_origins), tokens)
    signers = ContractWallets(chain)
    sessions = Sessions(state, identities.key, home, signers=signers)
    authenticator = Authenticator(home, sessions, signers=signers)
    service = Service(
        Parts(
            authenticator=authenticator,
            ledger=ledger,
            gates=gates,
            payments=Payments(ledger, rail),
            fetcher=Fetcher(gateways, cache, max_model_bytes=settings.max_model_bytes),
            cache=cache,
            opener=opener,
            identity=NodeIdentity(identities.age),
            kavach=KeyAccess(kavach, wrong_keys, identities.key if settings.divault_kavach_delegation else None),
            wrong_keys=wrong_keys,
            workers=workers,
            limits=WalletLimits(settings.rate_limit_per_minute, settings.max_concurrent_inferences),
            refusals=RefusalBudget(),
            metrics=metrics,
            operators=frozenset(settings.divault_operators),
            sessions=sessions,
            # One load: it may open for so long, and then start for so long.
            load_wait_s=2 * settings.divault_load_timeout_seconds,
        )
    )
    return Node(
        service=service,
        envelopes=Envelopes(authenticator),
        sessions=sessions,
        health=Health(
            _probes(identities, gateways, workers, ledger, chain)
            | ({"key_nodes": kavach.probe} if settings.divault_kavach_delegation else {}),
            for_loads=("lighthouse_client", "key_nodes"),
        ),
        gates=gates,
        ledger=ledger,
        workers=workers,
        describe=_describer(settings, contracts, identities, url, workers),
        sandbox=workers.sandbox_report,
        version=divault.__version__,
    )


def worker_pool(settings: Settings) -> WorkerPool:
    """The workers of a node, of which none runs yet."""
    return WorkerPool(
        predict_timeout_s=settings.inference_timeout_seconds,
        load_timeout_s=settings.divault_load_timeout_seconds,
        place=Place(settings.divault_device, settings.divault_dtype),
        tuning=Tuning(threads=settings.divault_worker_threads) if settings.divault_worker_threads else None,
        memory_bytes=settings.model_memory_bytes,
        confinement=Confinement(settings.divault_sandbox, allow_code=settings.divault_allow_code_models),
    )


def receipts_into(metrics: Metrics) -> Callable[[Receipt], None]:
    """What counts each receipt that is issued, and what it charged."""

    def count(receipt: Receipt) -> None:
        fields = receipt.envelope["receipt"]
        metrics.receipt(receipt.status.name.lower(), int(fields["price"]), fields["token"])

    return count


def _usage_of(cache: CiphertextCache) -> Callable[[], tuple[int, int] | None]:
    """Bytes and entries of the cache, looked at once in five seconds; None while it can't be read."""
    known: tuple[float, tuple[int, int] | None] = (-_USAGE_KEPT_S, None)

    def usage() -> tuple[int, int] | None:
        nonlocal known
        if time.monotonic() - known[0] >= _USAGE_KEPT_S:
            try:
                found = cache.usage()
            except OSError:  # the other figures are worth having
                return None
            known = (time.monotonic(), (found.bytes, found.entries))
        return known[1]

    return usage


def _head_of(chain: Chain) -> tuple[int, float] | None:
    head = chain.last_head
    return None if head is None else (head.number, float(head.timestamp))


async def require_sandbox(settings: Settings, workers: WorkerPool) -> None:
    """Return only if a worker proves that it is confined as far as the operator asked. Raises SettingsInvalid."""
    wanted, have = settings.divault_sandbox, await workers.prove_sandbox()
    lacking = workers.sandbox_lacking(wanted)
    if wanted in ("strict", "standard") and have != wanted and not settings.divault_sandbox_allow_downgrade:
        raise SettingsInvalid(
            f"DIVAULT_SANDBOX={wanted}, but a worker here is confined at the level {have} (not "
            f"enforced: {lacking}): set auto, or DIVAULT_SANDBOX_ALLOW_DOWNGRADE=1 to accept that",
            setting="DIVAULT_SANDBOX",
        )
    if settings.divault_allow_code_models and have not in ("standard", "strict"):
        raise SettingsInvalid(
            f"DIVAULT_ALLOW_CODE_MODELS=1 needs workers that are confined at standard or strict; here it is {have}",
            setting="DIVAULT_ALLOW_CODE_MODELS",
        )
    if have not in ("standard", "strict"):
        _log.warning("workers are not fully confined", level=have, lacking=lacking, accepts="formats without code only")
    shared = workers.shared_user
    if shared is not None and shared.reason in ("no_capability", "not_mapped", "python_unreadable"):
        _log.warning("workers run as the node's user, which is root", why=shared.words)


def require_apart(settings: Settings) -> None:
    """Keys, ledger, cache and log don't lie where every worker reads libraries. Raises SettingsInvalid."""
    kept = {
        "DIVAULT_STATE_DIR": settings.divault_state_dir,
        "DIVAULT_NODE_KEY_FILE": settings.node_key_file,
        "DIVAULT_AGE_IDENTITY_FILE": settings.age_identity_file,
        "MODEL_CACHE_DIR": settings.model_cache_dir,
        "DIVAULT_LOG_DIR": settings.divault_log_dir,
    }
    for name, path in kept.items():
        if path is not None and any(path.resolve().is_relative_to(library) for library in library_paths()):
            raise SettingsInvalid(
                f"{name} lies among Python's files or the system's libraries, which every model may read: set another",
                setting=name,
            )


def _probes(
    identities: Identities, gateways: Sequence[GatewayStorage], workers: WorkerPool, ledger: Ledger, chain: Chain
) -> dict[str, Probe]:
    async def access() -> str:
        digest = Digest.keccak(str(time.time()).encode())
        messages.require_signer(digest, messages.signature_text(identities.key, digest), identities.address)
        return "signed and verified a message"

    async def storage() -> str:
        if not gateways:
            raise StorageFailed("no gateway is set to fetch from: DIVAULT_GATEWAY_URLS is empty", reason="no_source")
        found = await asyncio.gather(*map(_reachable, gateways))
        if not any(answers for answers, _ in found):
            raise StorageFailed(f"no gateway answers: {'; '.join(words for _, words in found)}")
        return "; ".join(words for _, words in found)

    async def engine() -> str:
        return await workers.probe()

    async def books() -> str:
        await ledger.pulse()
        return f"wrote durably; {await ledger.successes()} answers so far"

    async def head() -> str:
        block = await chain.head(fresh=True)
        return f"chain {chain.chain_id} at block {block.number}"

    return {
        "access_validator": access,
        "lighthouse_client": storage,
        "inference_engine": engine,
        "ledger": books,
        "chain": head,
    }


async def _reachable(gateway: GatewayStorage) -> tuple[bool, str]:
    """Whether it answers, and as what; the fetcher asks it accordingly from then on."""
    try:
        trustless = await gateway.probe()
    except StorageFailed as err:
        return False, err.detail
    return True, f"{gateway.name} answers" + ("" if trustless else ", plain files only")


def _describer(settings: Settings, contracts: Contracts, identities: Identities, url: str, workers: WorkerPool) -> Any:
    descriptor = NodeDescriptor(
        node=identities.address,
        age_recipient=str(identities.age.recipient),
        url=url,
        chain_id=contracts.chain.chain_id,
        vault=contracts.vault,
        not_before=int(time.time()),
    )
    body: dict[str, Any] = {
        "status": "success",
        "version": divault.__version__,
        "address": str(identities.address),
        "age_recipient": str(identities.age.recipient),
        "chain_id": contracts.chain.chain_id,
        "vault": str(contracts.vault),
        "payment_token": str(contracts.token),
        "payment_tokens": [str(contracts.token), *map(str, settings.divault_payment_tokens)],
        "rails": list(RAILS),
        "authority": authority_of(url),
        "url": url,
        "limits": {
            "self_signed_body_bytes": MAX_SELF_SIGNED_BYTES,
            "body_bytes": settings.divault_max_body_bytes,
            "model_bytes": settings.max_model_bytes,
            "inference_seconds": settings.inference_timeout_seconds,
            "calls_per_minute": settings.rate_limit_per_minute,
            "runs_at_once": settings.max_concurrent_inferences,
            "session_idle_seconds": IDLE_S,
            "session_seconds": LONGEST_S,
        },
        "descriptor": descriptor.sign(identities.key),
    }

    async def describe() -> dict[str, Any]:
        return body | {"sandbox": workers.sandbox_report()}

    return describe
