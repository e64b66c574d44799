"""What a worker is asked for its callers, and what its words are worth: each answer checked, each refusal typed."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import orjson

from divault.errors import BadRequest, DivaultError
from divault.messages import canonical
from divault.models.base import Description
from divault.workers import wire
from divault.workers.queue import Job

_LONGEST_NAME = 200


def request_for(jobs: Sequence[Job]) -> wire.Request:
    """What a worker is asked for these callers: to run their items, or to say that it is there."""
    items = [job.item for job in jobs if job.item is not None]
    if not items:
        return wire.Ping(id=wire.new_id())
    return wire.Run(id=wire.new_id(), items=items, pieces=jobs[0].on_piece is not None)


def answers_of(reply: wire.Reply, jobs: Sequence[Job]) -> list[wire.Success | DivaultError]:
    """What the worker said to each of these callers. Raises ModelFailed."""
    if jobs[0].item is None:
        wire.expect(reply, wire.Pong)
        return [wire.Success(b"null", 0)]
    items = wire.expect(reply, wire.Answers).items
    if len(items) != len(jobs):
        raise wire.broken("it answered another number of callers than it was asked for")
    return [_outcome(item) for item in items]


def _outcome(item: wire.Success | wire.Problem) -> wire.Success | DivaultError:
    if isinstance(item, wire.Problem):
        return wire.reported(item, wire.RUN_ERRORS)
    wire.check_json(item.result)
    return item


def described(raw: bytes) -> Description:
    """What the worker says of its model, typed, and such that it can be shown and hashed. Raises ModelFailed."""
    wire.check_json(raw)
    try:
        description = msgspec.json.decode(raw, type=Description)
        canonical(dict(description.runtime))
        orjson.dumps(description)
    except (msgspec.MsgspecError, orjson.JSONEncodeError, BadRequest):
        raise wire.broken("what it says of its model is malformed") from None
    names = (description.format, description.task, description.device)
    if not all(name.isprintable() and len(name) <= _LONGEST_NAME for name in names):
        raise wire.broken("what it says of its model is too long, or can't be printed")
    if not 1 <= description.together <= wire.MAX_TOGETHER:
        raise wire.broken("it takes another number of callers together than there may be")
    return description
