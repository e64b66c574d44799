"""The life of a signed request in the ledger: one table, and nothing moves outside it.

| stage | means | the same signed bytes again |
|---|---|---|
| unseen | its nonce was never used here | run |
| reserved | its run is under way, or its lease is | priced: `request_running`; free: `nonce_used` |
| released | priced, and its run ended with neither answer nor receipt; the credit is back | run |
| done | answered, and charged if it has a price | priced: the stored answer; free: `nonce_used` |
| failed | refused or failed with a receipt, nothing charged | priced: the same error and receipt; free: `nonce_used` |
| consumed | its nonce was used up by something that has no receipt | `nonce_used` |

Other bytes under a nonce that the ledger knows are `nonce_used` in every stage. A lease counts when nobody in this
process works on the run any more and nobody could end it: when it has run out, a priced request becomes released and a
free one consumed. That a run has begun is not written down: nothing would be decided by it. Nor is the reservation of a
free run, which is kept in memory and goes from unseen to its end in one move.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Stage(StrEnum):
    """Where a request stands."""

    UNSEEN = "unseen"
    RESERVED = "reserved"
    RELEASED = "released"
    DONE = "done"
    FAILED = "failed"
    CONSUMED = "consumed"


TRANSITIONS: Mapping[Stage, frozenset[Stage]] = {
    Stage.UNSEEN: frozenset({Stage.RESERVED, Stage.DONE, Stage.FAILED, Stage.CONSUMED}),
    # Back to unseen: a free run that was turned away (queue full, chain down); 429 and 503 use no nonce.
    Stage.RESERVED: frozenset({Stage.DONE, Stage.FAILED, Stage.RELEASED, Stage.CONSUMED, Stage.UNSEEN}),
    Stage.RELEASED: frozenset({Stage.RESERVED, Stage.FAILED}),
    Stage.DONE: frozenset(),
    Stage.FAILED: frozenset(),
    Stage.CONSUMED: frozenset(),
}
"""Every move that exists."""


def check_move(before: Stage, after: Stage) -> None:
    """Do nothing if the table has this move. Raises ValueError: a fault in the program, never in a request."""
    if after not in TRANSITIONS[before]:
        raise ValueError(f"a request that is {before} can't become {after}")
