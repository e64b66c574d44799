"""Fifty models and ten thousand callers: what a flood and a hostile model cost everybody else.

Once over the whole node, with real models, HTTP, signatures, a token gate and receipts, under the limits that a node
has without being told; and once over the pool of workers alone, where the models echo and die.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from bench.serving import serving
from divault.cli.top import read
from tests import many_wallets
from tests.many_models import Seen, crowd

_MODELS, _CALLERS, _AT_ONCE = 50, 10_000, 32
_LIMITS = {
    "RATE_LIMIT_PER_MINUTE": "60",
    "MAX_CONCURRENT_INFERENCES": "10",
    "DIVAULT_RATE_LIMIT_PER_IP_PER_MINUTE": "6000",
    "INFERENCE_TIMEOUT_SECONDS": "1",
}


async def _pool() -> tuple[Seen, Seen]:
    async with crowd(_MODELS) as many:
        await many.serve(1000, trouble=False)
        return await many.serve(_CALLERS, trouble=False), await many.serve(_CALLERS, trouble=True)


async def _node(folder: Path) -> tuple[many_wallets.Seen, many_wallets.Seen, float]:
    """What callers saw without trouble and with it, and how much more memory the models took after it."""
    async with serving(_CALLERS + 2, **_LIMITS) as world:
        models = []
        for number in range(_MODELS):
            (folder / "model.onnx").write_bytes(many_wallets.adder(number))
            models.append(await world.publish(f"m{number}", folder / "model.onnx"))
        (folder / "model.onnx").write_bytes(many_wallets.endless())
        hostile = await world.publish("hostile", folder / "model.onnx")
        async with many_wallets.town(world.node.url, models, await world.signers(), hostile, at_once=_AT_ONCE) as town:
            await town.serve(trouble=False)  # the first call of each wallet reads its balance from the chain
            calm, before = await town.serve(trouble=False), await asyncio.to_thread(_memory, world.node.url)
            troubled = await town.serve(trouble=True)
        return calm, troubled, await asyncio.to_thread(_memory, world.node.url) / before


def _memory(url: str) -> float:
    return read(url).value("divault_model_memory_bytes")


def _rows(name: str, calm: Any, troubled: Any) -> list[dict[str, Any]]:
    ratio, of = troubled.p99() / calm.p99(), f"of {_CALLERS}"
    told = f"without trouble: {calm.p99() * 1e3:.0f} ms"
    refused, crossed = troubled.refused.total(), len(troubled.crossed)
    limit = "<= 2 x yardstick"
    return [
        _row(
            f"{name}: p99 of the others", f"{troubled.p99() * 1e3:.0f} ms", told, limit, ratio=ratio, holds=ratio <= 2
        ),
        _row("the same: others that were refused", f"{refused} calls", of, "0", holds=refused == 0),
        _row("the same: answers that were somebody else's", f"{crossed} calls", of, "0", holds=crossed == 0),
    ]


def _row(
    name: str, figure: str, against: str, target: str, *, holds: bool, ratio: float | None = None
) -> dict[str, Any]:
    number, unit = figure.split()
    return {
        "name": name,
        "figure": float(number),
        "unit": unit,
        "yardstick": against,
        "ratio": None if ratio is None else round(ratio, 2),
        "target": target,
        "holds": holds,
    }


def run() -> list[dict[str, Any]]:
    """Rows of fairness."""
    crowd_of = f"{_MODELS} models, {_CALLERS:,} wallets"
    with tempfile.TemporaryDirectory() as folder:
        calm, troubled, grown = asyncio.run(_node(Path(folder)))
    name = f"a node over HTTP, {crowd_of}, one that floods and a model without end"
    rows = _rows(name, calm, troubled)
    told = "the same: memory of all models, as a part of what it was"
    rows.append(_row(told, f"{grown:.2f} x", "before the trouble", "<= 1.2", holds=grown <= 1.2))
    name = f"the pool of workers alone, {crowd_of}, a flood and a model that dies"
    return [*rows, *_rows(name, *asyncio.run(_pool()))]
