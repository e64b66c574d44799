"""What a model's worker did, and how fast it is."""

from __future__ import annotations

from dataclasses import dataclass, field

SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Upper bounds of the sizes of passes that are counted."""


@dataclass(slots=True)
class Figures:
    """Of one model, since it was loaded."""

    passes: list[int] = field(default_factory=lambda: [0] * (len(SIZES) + 1))
    """How many passes had at most so many callers as `SIZES` says; the last: more."""
    callers: int = 0
    busy_s: float = 0.0
    restarts: int = 0
    mean_s: float = 0.0
    """Recent mean of what a caller costs."""

    def count(self, callers: int, seconds: float) -> None:
        """Note a pass."""
        self.passes[sum(callers > bound for bound in SIZES)] += 1
        self.callers += callers
        self.busy_s += seconds
        share = min(1.0, 0.1 * callers) if self.mean_s else 1.0
        self.mean_s += share * (seconds / callers - self.mean_s)
