"""A node that is told to stop finishes what runs, takes nothing new, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import aiohttp
import joblib
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsRegressor

from tests.e2e.conftest import World
from tests.worker_models import alive

pytestmark = pytest.mark.asyncio(loop_scope="session")


def slow_model(folder: Path) -> Path:
    """20,000 distances in 40 dimensions for each row: tens of milliseconds."""
    random = np.random.default_rng(2)
    points = random.normal(size=(20_000, 40))
    model = KNeighborsRegressor(5, algorithm="brute", metric="minkowski", p=3, n_jobs=1).fit(points, points[:, 0])
    path = folder / "slow.joblib"
    joblib.dump(model, path)
    return path


async def test_a_stopping_node_finishes_what_runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("stopping")
    settings = {"INFERENCE_TIMEOUT_SECONDS": "40"}
    async with world.other_node(folder, **settings) as node, aiohttp.ClientSession() as session:
        model = (await world.publish("stopping", await asyncio.to_thread(slow_model, folder), node=node)).text
        async with world.client(await world.consumer(), node) as client:
            await client.run(model, {"features": [0.0] * 40})
            pids = _children(node.process.pid)
            running = asyncio.create_task(client.run(model, {"features": [[0.1] * 40] * 200}))
            await asyncio.sleep(0.3)
            assert not running.done()
            node.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.1)
            with pytest.raises(aiohttp.ClientError):
                await session.get(node.url + "/health/live")
            result = await running

        assert len(result.output["predictions"]) == 200
        assert result.receipt["receipt"]["status"] == "1"
        assert await asyncio.wait_for(node.process.wait(), 60) == 0
        assert pids
        assert not any(alive(pid) for pid in pids)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
