"""What the routes of a node show and call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from divault.api.envelope import Envelopes
from divault.chain.gates import Gates
from divault.health import Health
from divault.payments import Ledger
from divault.service import Service
from divault.sessions import Sessions
from divault.workers.pool import WorkerPool


@dataclass(frozen=True, slots=True)
class Node:
    """The parts of one node."""

    service: Service
    envelopes: Envelopes
    sessions: Sessions
    health: Health
    gates: Gates
    ledger: Ledger
    workers: WorkerPool
    describe: Callable[[], Awaitable[dict[str, Any]]]
    """Body of `GET /api/v1/node`."""
    sandbox: Callable[[], dict[str, Any]]
    version: str
