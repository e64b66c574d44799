"""The tests of `divault doctor`: each does what the node will do, and says cause and fix where it can't."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from divault import app
from divault.chain import configured
from divault.chain.chain import Chain
from divault.chain.rpc import Rpc
from divault.errors import DivaultError, SettingsInvalid, StorageFailed
from divault.settings import MB, Settings
from divault.state import State
from divault.storage.gateway import GatewayStorage
from divault.storage.kavach import Kavach
from divault.telemetry import LOG_FILE, log_file
from divault.traces import Traces
from divault.values import Usdc
from divault.workers.pool import WorkerPool

_MAX_CLOCK_OFFSET_S = 5  # signatures excuse a clock 5 s ahead, no more
_TIMEOUT_S = 15.0
_MIN_FREE_MB = 1000  # of the cache's disk: one model of the default largest size


@dataclass(frozen=True, slots=True)
class Finding:
    """One test's result, with the fix where it failed."""

    name: str
    ok: bool
    detail: str


async def diagnose(settings: Settings) -> list[Finding]:
    """Run every test; they don't depend on each other's success. Raises nothing for what a test finds."""
    rpc = Rpc.parse(settings.web3_provider_url, settings.divault_chain_id)
    chain = Chain(rpc, head_ttl_s=0)
    strict = Chain(rpc, head_ttl_s=0, max_head_age_s=settings.divault_head_max_age_seconds)  # for one test: one fault
    try:
        tests: list[tuple[str, Callable[[], Awaitable[str]]]] = [
            *((name, _written(settings, test)) for name, test in _WRITE.items()),
            ("address", lambda: _address(settings)),
            ("rpc", lambda: _rpc(strict)),
            ("vault", lambda: _vault(chain, settings)),
            ("payment token", lambda: _token(chain, settings)),
            ("clock", lambda: _clock(chain)),
            ("gateways", lambda: _gateways(settings)),
            ("sandbox", lambda: _sandbox(settings)),
        ]
        if settings.divault_device not in ("auto", "cpu"):
            tests.append(("device", lambda: _device(settings)))
        if settings.divault_otlp_endpoint is not None:
            tests.append(("traces", lambda: _traces(settings.divault_otlp_endpoint or "")))
        if settings.divault_kavach_delegation:
            tests.append(("key nodes", lambda: _key_nodes(settings)))
        return [await _run(name, test) for name, test in tests]
    finally:
        await chain.close()


async def _run(name: str, test: Callable[[], Awaitable[str]]) -> Finding:
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            return Finding(name, ok=True, detail=await test())
    except TimeoutError:
        return Finding(name, ok=False, detail=f"no answer within {_TIMEOUT_S:.0f} s")
    except (DivaultError, OSError) as err:
        return Finding(name, ok=False, detail=str(err))


def _written(settings: Settings, test: Callable[[Settings], Awaitable[str]]) -> Callable[[], Awaitable[str]]:
    """The test, which writes only where models can't read it."""

    async def apart() -> str:
        app.require_apart(settings)
        return await test(settings)

    return apart


async def _keys(settings: Settings) -> str:
    who = app.Identities.of(settings)
    return f"node {who.address}, models are sealed to {who.age.recipient}"


async def _state(settings: Settings) -> str:
    state = State(settings.divault_state_dir / app.LEDGER_FILE)
    try:
        receipts = await state.read(lambda db: db.execute("SELECT count(*) FROM receipt").fetchone()[0])
    finally:
        await state.close()
    return f"the ledger opens and holds {receipts} receipts"


async def _disk(settings: Settings) -> str:
    folder = settings.model_cache_dir
    probe = folder / f".doctor-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"x")
        finally:
            probe.unlink(missing_ok=True)
        room = os.statvfs(folder)
    except OSError as err:
        why = (
            "there is no room, free some"
            if err.errno in (errno.ENOSPC, errno.EDQUOT)
            else f"{err.strerror}; make it writable"
        )
        raise SettingsInvalid(f"the cache {folder} can't be written: {why} or set MODEL_CACHE_DIR elsewhere") from err
    free = room.f_bavail * room.f_frsize // MB
    if free < _MIN_FREE_MB:
        raise SettingsInvalid(
            f"{free} MB are free for the cache, {_MIN_FREE_MB} MB are needed: free some or set "
            "MODEL_CACHE_DIR elsewhere"
        )
    return f"the cache can be written, {free} MB are free"


async def _log(settings: Settings) -> str:
    if settings.divault_log_dir is None:
        return "it goes to standard output alone"
    log_file(settings.divault_log_dir).close()
    return f"{settings.divault_log_dir / LOG_FILE} can be written"


_WRITE = {"keys": _keys, "state": _state, "disk": _disk, "log": _log}
"""Tests that write, each under its name."""


async def _address(settings: Settings) -> str:
    with app.listen(settings) as listening:
        return f"{app.url_of(listening)} is free"


async def _traces(endpoint: str) -> str:
    await asyncio.to_thread(Traces.to(endpoint).close)
    return f"they go to {endpoint}, whether it answers or not"


async def _rpc(chain: Chain) -> str:
    head = await configured.newest(chain)
    return f"chain {chain.chain_id}, block {head.number}"


async def _vault(chain: Chain, settings: Settings) -> str:
    vault = settings.vault
    found = await configured.require_vault(chain, vault, await configured.newest(chain))
    return f"{vault} answers and lists {found.models} models"


async def _token(chain: Chain, settings: Settings) -> str:
    token, others = settings.payment_token, settings.divault_payment_tokens
    await configured.require_tokens(chain, token, others, await configured.newest(chain))
    return f"{', '.join(map(str, (token, *others)))}: {Usdc.DECIMALS} decimals"


async def _clock(chain: Chain) -> str:
    head = await configured.newest(chain)
    ahead = head.timestamp - time.time()
    if ahead > _MAX_CLOCK_OFFSET_S:
        raise SettingsInvalid(f"this clock is {ahead:.0f} s behind the newest block: set it (NTP)")
    return f"the newest block is {max(0.0, -ahead):.0f} s old"


async def _gateways(settings: Settings) -> str:
    """Each of them: one that does not answer costs every load time, so it is a fault although others serve."""
    if not settings.gateway_urls:
        raise SettingsInvalid(
            "none is set, so no model can be fetched: name one in DIVAULT_GATEWAY_URLS", setting="DIVAULT_GATEWAY_URLS"
        )
    answers, silent = [], []
    for url in settings.gateway_urls:
        gateway = GatewayStorage(url)
        try:
            kind = "trustless" if await gateway.probe() else "plain files only"
            answers.append(f"{gateway.name} ({kind})")
        except StorageFailed as err:
            silent.append(err.detail)
        finally:
            gateway.close()
    if silent:
        raise SettingsInvalid(
            f"{'; '.join(silent)}: start it or take it out of DIVAULT_GATEWAY_URLS"
            + (f"; {', '.join(answers)} answer" if answers else ""),
            setting="DIVAULT_GATEWAY_URLS",
        )
    return ", ".join(answers)


async def _key_nodes(settings: Settings) -> str:
    kavach = Kavach(settings.divault_lighthouse_encryption_url)
    try:
        return await kavach.probe()
    finally:
        await kavach.close()


async def _sandbox(settings: Settings) -> str:
    async with _workers(settings) as workers:
        await app.require_sandbox(settings, workers)
        whose = f"as this one's user ({shared.words})" if (shared := workers.shared_user) else "as users of their own"
        return f"workers are confined at the level {workers.sandbox_level}, {whose}"


async def _device(settings: Settings) -> str:
    async with _workers(settings) as workers:
        await workers.prove_sandbox()
        await workers.prove_device()
        return f"a worker sees {settings.divault_device}"


@asynccontextmanager
async def _workers(settings: Settings) -> AsyncIterator[WorkerPool]:
    workers = app.worker_pool(settings)
    try:
        yield workers
    finally:
        await workers.close()
