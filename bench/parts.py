"""The parts that no signed call can do without, for `bench_parts` and the yardstick that puts them together."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Sequence

import joblib
import orjson
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression

from divault import models
from divault.messages import SigningKey, signature_text
from divault.models.base import CPU
from divault.values import Digest, MemoryFile, Secret
from divault.workers import child, wire

KEY, DIGEST = Secret(b"\x4c" * 32), Digest.keccak(b"a request")
SIGNER, SIGNATURE = SigningKey(KEY), signature_text(KEY, DIGEST)
ROW: list[float] = load_breast_cancer().data[0].tolist()
BODY = orjson.dumps({"model_id": "m1", "user_address": "0x" + "ab" * 20, "input_data": {"features": ROW}})
_ENVELOPE = os.urandom(640)


def rows_of_call(number: int, *, signed: bool) -> Callable[[sqlite3.Connection], object]:
    """What an answered free call writes: its receipt, and where it was signed its nonce."""
    user, nonce, request = os.urandom(20), os.urandom(32), os.urandom(32)

    def work(db: sqlite3.Connection) -> None:
        db.execute(
            "INSERT INTO receipt(log, sequence, hash, previous, request, user, model, status, envelope)"
            " VALUES (1, ?, ?, ?, ?, ?, ?, 1, ?)",
            (number, request, request, request, user, nonce, _ENVELOPE),
        )
        if signed:
            db.execute(
                "INSERT INTO request(user, nonce, digest, stage, priced, keep_until) VALUES (?, ?, ?, 'done', 0, ?)",
                (user, nonce, request, 1_790_000_000 + number // 1000),
            )

    return work


def model_pass() -> Callable[[Sequence[bytes]], list[bytes]]:
    """What a worker does between two frames: the answers to these inputs."""
    data = load_breast_cancer()
    fd = os.memfd_create("model")
    with os.fdopen(os.dup(fd), "wb") as file:
        joblib.dump(LogisticRegression(max_iter=5000).fit(data.data, data.target), file)
    model = models.load([MemoryFile("model.joblib", fd, os.fstat(fd).st_size)], CPU)

    def answers(inputs: Sequence[bytes]) -> list[bytes]:
        items = [wire.Item(one, None) for one in inputs]
        return [_result(answer) for answer in child._answers(model, items)]  # noqa: SLF001 - the worker's own step

    return answers


def _result(answer: object) -> bytes:
    if not isinstance(answer, wire.Success):
        raise TypeError(f"the model answered {answer!r}")
    return bytes(answer.result)
