"""The real service over a real ledger and a pool that a test makes: callers, chain and storage are played."""

from __future__ import annotations

from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

from msgspec.structs import replace

from divault.ipfs.cid import parse_cid
from divault.limits import RefusalBudget, WalletLimits
from divault.metrics import Metrics
from divault.service import Parts, Service
from divault.values import OpenedModel, Principal, SignedCall, Usdc
from tests.counter import MODEL, PRICE, Counter, grant_of, principal_of
from tests.worker_models import opened

CID = "bafkqaaa"
"""Of the model that `counter.grant_of` grants."""


def model_of_the_counter() -> OpenedModel:
    """A model under the name and CID that `counter.grant_of` grants."""
    return replace(opened(b"any", name=MODEL.text), cid=parse_cid(CID))


async def _authenticate(call: SignedCall) -> Principal:
    return principal_of(call)


def service_of(
    counter: Counter, workers: Any, *, price: Usdc = PRICE, opener: Any = None, load_wait_s: float = 60.0
) -> Service:
    """A service whose models cost `price`; `opener` opens one that is not loaded."""

    async def check(principal: Principal, _: object) -> Any:
        return grant_of(principal, price)

    @asynccontextmanager
    async def arriving(_: object) -> Any:
        yield None

    return Service(
        Parts(
            authenticator=SimpleNamespace(authenticate=_authenticate),  # type: ignore[arg-type]
            ledger=counter.ledger,
            gates=SimpleNamespace(check=check),  # type: ignore[arg-type]
            payments=counter.payments,
            fetcher=SimpleNamespace(arriving=arriving),  # type: ignore[arg-type]
            cache=None,  # type: ignore[arg-type]
            opener=opener,
            identity=None,  # type: ignore[arg-type]
            kavach=SimpleNamespace(of_node=lambda: None),  # type: ignore[arg-type]
            wrong_keys=None,  # type: ignore[arg-type]
            workers=workers,
            limits=WalletLimits(6000, 100),
            refusals=RefusalBudget(),
            metrics=Metrics(),
            operators=frozenset(),
            sessions=None,  # type: ignore[arg-type]
            load_wait_s=load_wait_s,
        )
    )
