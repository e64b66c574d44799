"""Fifty models and ten thousand callers: what a flood on two models and a model that dies cost everybody else."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.many_models import Seen, crowd

_MODELS, _CALLERS = 50, 10_000


async def _measure() -> tuple[Seen, Seen]:
    async with crowd(_MODELS) as many:
        await many.serve(1000, trouble=False)
        return await many.serve(_CALLERS, trouble=False), await many.serve(_CALLERS, trouble=True)


def run() -> list[dict[str, Any]]:
    """Rows of fairness."""
    calm, troubled = asyncio.run(_measure())
    ratio = troubled.p99() / calm.p99()
    told, of = f"without trouble: {calm.p99() * 1e3:.0f} ms", f"of {_CALLERS}"
    refused, crossed = troubled.refused.total(), len(troubled.crossed)
    name = f"{_MODELS} models, {_CALLERS:,} callers, a flood and a model that dies"
    rows: list[tuple[str, float, str, str, float | None, str, bool]] = [
        (f"{name}: p99 of the others", troubled.p99() * 1e3, "ms", told, ratio, "<= 2 x yardstick", ratio <= 2),
        ("the same: others that were refused", refused, "calls", of, None, "0", refused == 0),
        ("the same: answers that were somebody else's", crossed, "calls", of, None, "0", crossed == 0),
    ]
    return [
        {
            "name": name,
            "figure": round(figure, 1),
            "unit": unit,
            "yardstick": against,
            "ratio": None if share is None else round(share, 2),
            "target": target,
            "holds": bool(holds),
        }
        for name, figure, unit, against, share, target, holds in rows
    ]
