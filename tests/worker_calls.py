"""One call to a model in a pool, as a service makes it, and pools whose confinement lets code run or not."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from msgspec.structs import replace

from divault.values import BodySignature, Digest, Hold, Nonce, OpenedModel, SignedCall, Usdc
from divault.workers.confinement import Confinement
from divault.workers.pool import WorkerPool
from tests.sealed_models import SOMEBODY, grant


async def run(pool: WorkerPool, model: OpenedModel, data: Any) -> Any:
    """The model's answer, parsed. Raises what the pool raises."""
    proven = grant()
    proven = replace(proven, model=replace(proven.model, model=model.model, cid=model.cid.text))
    hold = Hold(proven, Usdc(0), SOMEBODY, None, 0)
    proof = BodySignature("", Nonce(bytes(32)), 0, 0, Digest.ZERO)
    call = SignedCall(SOMEBODY, "POST", "/", b"", proof, model.model, Usdc(0), input_data=json.dumps(data).encode())
    return json.loads((await pool.run(model, hold, call)).result)


MakePool = Callable[[bool], WorkerPool]


@pytest.fixture
async def confined_pool() -> AsyncIterator[MakePool]:
    """Pools at `standard`; the argument is whether formats that carry code may run."""
    pools: list[WorkerPool] = []

    def pool(allow: bool) -> WorkerPool:
        confinement = Confinement("standard", allow_code=allow)
        pools.append(WorkerPool(predict_timeout_s=20, load_timeout_s=60, confinement=confinement))
        return pools[-1]

    yield pool
    for one in pools:
        await one.close()
