"""The table of a request's stages is the only way through them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from divault.payments import books
from divault.payments.stages import TRANSITIONS, Stage, check_move
from divault.values import Usdc
from tests.counter import Counter, signed

FINAL = (Stage.DONE, Stage.FAILED, Stage.CONSUMED)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(Stage, Stage)))
def test_a_move_outside_the_table_is_refused(before: Stage, after: Stage) -> None:
    if after in TRANSITIONS[before]:
        check_move(before, after)
        return
    with pytest.raises(ValueError, match="can't become"):
        check_move(before, after)


def test_what_is_final_stays() -> None:
    assert {frozenset()} == {TRANSITIONS[stage] for stage in FINAL}
    assert set(Stage) == set(TRANSITIONS)


@pytest.mark.parametrize("after", [stage for stage in Stage if stage is not Stage.UNSEEN])
async def test_an_answered_request_is_never_moved(tmp_path: Path, after: Stage) -> None:
    async with Counter(tmp_path) as counter:
        principal, call = signed(max_price=0)
        await counter.infer(call, price=Usdc(0))
        with pytest.raises(ValueError, match="done can't become"):
            await counter.state.write(lambda db: books.finish(db, principal, books.find(db, principal), after))

        assert await counter.rows("SELECT stage FROM request") == [("done",)]
