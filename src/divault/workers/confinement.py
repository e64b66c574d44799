"""How far the workers of a node are confined: what was asked for, and what a real worker saw to hold.

A level is never taken from a kernel's version or a setting: at the start a worker without a model is confined and tries
what is forbidden. `auto` takes the best level that is proven so. Every later worker proves it again, before it is told
of its model; nothing that a process says after that is taken for a proof.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from divault.models.base import Place
from divault.values import MemoryFile
from divault.workers import landlock, seccomp, wire
from divault.workers.process import Process
from divault.workers.sandbox import CHECKS, Level, level_of, missing_for
from divault.workers.selfcheck import namespaces_here
from divault.workers.users import Shared, why_shared

Requested = Literal["auto", "strict", "standard", "off"]


class Confinement:
    """The state of one pool. `close` removes the canary file."""

    def __init__(self, requested: Requested = "auto", *, allow_code: bool = False) -> None:
        self.requested = requested
        self.allow_code = allow_code
        self.level: Level = "standard" if requested == "auto" else requested
        """What workers are started with."""
        self.checks: Mapping[str, str] = dict.fromkeys(CHECKS, "unknown")
        """As the newest worker saw them; nothing is claimed before."""
        self.why_not_strict = ""
        self._bwrap = shutil.which("bwrap")
        self._folder = Path(tempfile.mkdtemp(prefix="divault-canary-"))
        self._folder.chmod(0o755)
        self._canary = self._folder / "canary"
        self._canary.write_text("Nothing is secret here; a worker that reads this is not confined.\n", encoding="ascii")
        self._canary.chmod(0o644)
        self._namespaces = namespaces_here()
        self._why_shared = why_shared()

    @property
    def effective(self) -> str:
        """The level that was seen to hold."""
        return level_of(self.checks, self.level)

    @property
    def separate(self) -> str | None:
        """The program that gives workers namespaces of their own, where they are to have them."""
        return self._bwrap if self.level == "strict" else None

    @property
    def why_shared(self) -> Shared | None:
        """Why workers have the user of the node; None where each has one of its own."""
        if self.level == "standard":
            return self._why_shared
        words = "workers in namespaces are nobody there" if self.level == "strict" else "workers are not confined"
        return Shared("namespaces" if self.level == "strict" else "off", words)

    def candidates(self) -> tuple[Level, ...]:
        """The levels to try at the start, the best first."""
        if self.requested in ("standard", "off"):
            return (self.requested,)
        if self._bwrap is None:
            self.why_not_strict = "bwrap is not installed"
            return ("standard",)
        return ("strict", "standard")

    def missing(self, level: str) -> list[str]:
        """What keeps this level from being reached, by the names of the checks."""
        return missing_for(level, self.checks)

    async def confine(self, process: Process, memory_bytes: int) -> Mapping[str, str]:
        """Have a new process confine itself, and give what it saw to hold. Raises ModelFailed.

        `memory_bytes`: what it may map beyond what an idle one needs.
        """
        order = wire.Confine(
            id=wire.new_id(),
            keep=[file.fd for file in process.files],
            memory_bytes=memory_bytes,
            level=self.level,
            canary=str(self._canary),
            namespaces=self._namespaces,
            own_user=self.why_shared is None,
        )
        checks = wire.expect(await process.ask(order), wire.Confined).checks
        if checks.keys() != set(CHECKS):
            raise wire.broken("it tells of other checks than there are")
        self.checks = checks
        return checks

    def order(
        self, files: Sequence[MemoryFile], place: Place, threads: int, checks: Mapping[str, str], *, recognise: bool
    ) -> wire.Load:
        """What a worker that proved these `checks` is told to load. `recognise`: only to say what these files are."""
        return wire.Load(
            id=wire.new_id(),
            files=[wire.File(file.name, file.fd, file.size) for file in files],
            device=place.device,
            dtype=place.dtype,
            threads=threads,
            allow_code=self.allow_code and level_of(checks, self.level) in ("standard", "strict"),
            recognise=recognise,
        )

    def report(self) -> dict[str, Any]:
        """For `/health` and `/api/v1/node`: what was asked for, what holds, and by which means."""
        confined = self.level != "off"
        return {
            "requested": self.requested,
            "effective": self.effective,
            "checks": dict(self.checks),
            "shared_user": self.why_shared.reason if self.why_shared else None,
            "landlock_abi": landlock.abi() if confined else 0,
            "seccomp_allowed": seccomp.allowed_here(seccomp.WORKER) if confined and seccomp.supported() else 0,
            "memory_mechanism": "rlimit" if confined else "none",
        }

    def close(self) -> None:
        """Remove the canary."""
        shutil.rmtree(self._folder, ignore_errors=True)
