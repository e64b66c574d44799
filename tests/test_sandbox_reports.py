"""What a node tells of its workers' confinement is told before a model's first byte: no model can change it."""

from __future__ import annotations

import os
from signal import SIGKILL

import pytest

from divault.errors import ModelFailed, UnsupportedModel
from divault.workers.sandbox import CHECKS
from tests.code_models import INPUT, code_model
from tests.test_worker_templates import back
from tests.worker_calls import MakePool, confined_pool, run

__all__ = ["confined_pool"]  # a fixture
LIE = """
for variables in frames():
    for value in variables.values():
        if isinstance(value, dict) and "net_ns" in value:
            value.update(dict.fromkeys(value, VERDICT), more="enforced")
"""
FORGE = """
from divault.workers import wire
send = wire.send
wire.send = lambda line, reply: send(line, wire.Confined(id=reply.id, checks=dict.fromkeys(CHECKS, "enforced")))
"""


@pytest.mark.parametrize("verdict", ["enforced", "not_enforced"])
async def test_a_model_that_rewrites_its_own_process_changes_nothing_of_the_report(
    confined_pool: MakePool, verdict: str
) -> None:
    pool = confined_pool(True)
    await pool.prove_sandbox()
    before = pool.sandbox_report()
    liar = code_model(LIE.replace("VERDICT", repr(verdict)))
    loaded = await pool.load(liar)
    await run(pool, liar, INPUT)

    assert pool.sandbox_report() == before
    assert loaded.sandbox == pool.sandbox_level == "standard"
    assert before["checks"]["net_ns"] == "not_enforced"
    assert before["checks"].keys() == set(CHECKS)


async def test_a_model_that_says_how_it_is_confined_is_broken(confined_pool: MakePool) -> None:
    pool = confined_pool(True)
    await pool.prove_sandbox()
    before = pool.sandbox_report()
    with pytest.raises(ModelFailed) as caught:
        await pool.load(code_model(FORGE.replace("CHECKS", repr(CHECKS))))

    assert caught.value.data["kind"] == "protocol"
    assert pool.sandbox_report() == before


async def test_a_liar_keeps_no_other_model_from_its_code(confined_pool: MakePool) -> None:
    pool = confined_pool(True)
    await pool.prove_sandbox()
    first = await pool.load(code_model("", "first"))
    await pool.load(code_model(LIE.replace("VERDICT", "'not_enforced'"), "liar"))
    await pool.load(code_model("", "second"))
    os.kill(first.pid or 0, SIGKILL)
    await back(pool, "first", first.pid)

    assert {one.model.text: one.state for one in pool.loaded()} == dict.fromkeys(("first", "liar", "second"), "ready")


async def test_code_runs_only_where_its_own_process_proved_enough(
    confined_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another worker proved counts for that one alone."""
    pool = confined_pool(True)
    await pool.prove_sandbox()
    monkeypatch.setattr(pool._confinement, "_canary", "/nowhere/at/all")
    with pytest.raises(UnsupportedModel):
        await pool.load(code_model(""))

    assert pool.sandbox_level == "partial"
