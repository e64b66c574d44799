"""What the node can really do right now: every probe does the thing it vouches for.

Probes are single-flight and run at most every 5 seconds, so that `/health` can't be used as a hammer; each result says
when it was checked. A probe that fails names what failed and never a secret or a path.

What only loads of models need is probed and shown. It decides nothing about readiness, nor makes anybody wait: a node
whose gateway is away answers the calls of the models that it has.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass

from divault.errors import DivaultError

MIN_INTERVAL_S = 5.0
PROBE_TIMEOUT_S = 5.0

Probe = Callable[[], Awaitable[str]]
"""Does the thing, returns a sentence about it; raises DivaultError when it can't."""


@dataclass(frozen=True, slots=True)
class Check:
    """One probe's last result."""

    name: str
    ok: bool
    detail: str
    checked_at: int
    """Unix seconds."""

    @property
    def word(self) -> str:
        """`active`, the published word, or `failed`."""
        return "active" if self.ok else "failed"


class Health:
    """The node's probes by name, and their last results."""

    def __init__(
        self,
        probes: Mapping[str, Probe],
        *,
        for_loads: Collection[str] = (),
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`for_loads`: names of what only loads of models need.

        `clock` says when a check was made; how old it is, `monotonic`: nobody sets that back.
        """
        self._names = tuple(probes)
        clocks = clock, monotonic
        self._calls = _Probing({name: probes[name] for name in self._names if name not in for_loads}, *clocks)
        self._loads = _Probing({name: probes[name] for name in self._names if name in for_loads}, *clocks)

    async def checks(self) -> tuple[Check, ...]:
        """Run all probes at once, unless they ran within the last 5 seconds."""
        found = {check.name: check for part in await asyncio.gather(self._calls(), self._loads()) for check in part}
        return tuple(found[name] for name in self._names)

    async def ready(self) -> bool:
        """Whether calls of models that are loaded can be served now."""
        return all(check.ok for check in await self._calls())


class _Probing:
    """Probes that run together, at most every 5 seconds."""

    def __init__(self, probes: Mapping[str, Probe], clock: Callable[[], float], monotonic: Callable[[], float]) -> None:
        self._probes = probes
        self._clock = clock
        self._monotonic = monotonic
        self._lock = asyncio.Lock()
        self._last: tuple[float, tuple[Check, ...]] | None = None

    async def __call__(self) -> tuple[Check, ...]:
        async with self._lock:
            if self._last is None or self._monotonic() - self._last[0] >= MIN_INTERVAL_S:
                found = await asyncio.gather(*(self._run(name, probe) for name, probe in self._probes.items()))
                self._last = (self._monotonic(), tuple(found))
            return self._last[1]

    async def _run(self, name: str, probe: Probe) -> Check:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                detail, ok = await probe(), True
        except TimeoutError:
            detail, ok = f"no answer within {PROBE_TIMEOUT_S:.0f} s", False
        except (DivaultError, OSError) as err:
            detail, ok = err.detail if isinstance(err, DivaultError) else type(err).__name__, False
        return Check(name, ok, detail, int(self._clock()))
