"""One call to a model in a pool, as a service makes it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from divault.values import BodySignature, Digest, Hold, Nonce, OpenedModel, SignedCall, Usdc
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
