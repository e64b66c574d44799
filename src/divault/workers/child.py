"""The worker: one process, one model, one socket.

It is started clean by `process`, moves its descriptors into place (3: the socket, from 4 on: the model's files), gives
up what it doesn't need (`confine`), loads the model and answers one question at a time until its socket ends. It holds
no key and knows no chain, ledger or caller.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import tempfile
from typing import NoReturn

import msgspec

from divault.errors import DivaultError, ModelFailed
from divault.models import answers, formats, inputs
from divault.models.files import ModelFile
from divault.workers import wire
from divault.workers.confine import confine, settle

_MAX_QUESTION = 64 << 20
"""The gateway's own limit on bodies is lower; this only bounds a mistake."""
_TEXT = 200


def main() -> NoReturn:
    """Entry of the process: the last argument lists the descriptors, socket first. Ends with the socket."""
    numbers = settle([int(text) for text in sys.argv[-1].split(",")])
    # Nothing is writable, so nothing may look for a place to write.
    tempfile.tempdir = "/nonexistent"
    with socket.socket(fileno=numbers[0]) as connection:
        Worker(connection, numbers[1:]).serve()
    os._exit(0)


class Worker:
    """Answers the questions of the gateway."""

    def __init__(self, connection: socket.socket, descriptors: list[int]) -> None:
        self._connection = connection
        self._descriptors = descriptors
        self._model: formats.LoadedModel | None = None

    def serve(self) -> None:
        """Answer until the gateway closes the socket. Raises ProtocolError, which ends the process."""
        while (question := self._next()) is not None:
            self._connection.sendall(wire.pack(self._answer(question)))

    def _next(self) -> wire.Question | None:
        header = self._exactly(wire.HEADER.size)
        if header is None:
            return None
        (length,) = wire.HEADER.unpack(header)
        if length > _MAX_QUESTION:
            raise wire.ProtocolError("a question over the limit")
        body = self._exactly(length)
        return None if body is None else wire.read_question(bytes(body))

    def _exactly(self, count: int) -> bytearray | None:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            taken = self._connection.recv_into(view)
            if not taken:
                return None
            view = view[taken:]
        return data

    def _answer(self, question: wire.Question) -> wire.Reply:
        try:
            return self._work(question)
        except ModelFailed as err:
            return wire.Failed(wire.VERSION, question.id, err.data.get("kind", "model"), _escaped(err.detail))
        except DivaultError as err:
            return wire.Refused(wire.VERSION, question.id, err.code, err.detail[:2000], msgspec.json.encode(err.data))
        except Exception as err:  # noqa: BLE001  # whatever a model raises is an answer: its name and a short text
            return wire.Failed(wire.VERSION, question.id, _escaped(type(err).__name__)[:100], _escaped(str(err)))

    def _work(self, question: wire.Question) -> wire.Reply:
        match question:
            case wire.Start():
                report = confine(question.policy)
                return wire.Ready(wire.VERSION, question.id, report.level, report.checks)
            case wire.Load():
                return self._load(question)
            case wire.Run():
                return self._run(question)
            case wire.Ping():
                return wire.Pong(wire.VERSION, question.id)

    def _load(self, question: wire.Load) -> wire.Reply:
        files = [
            ModelFile(note.name, descriptor, note.size)
            for note, descriptor in zip(question.files, self._descriptors, strict=True)
        ]
        self._model = formats.load(files, formats.Device(threads=question.threads))
        # What is there now stays: the collector need not walk it again at every run.
        gc.collect()
        gc.freeze()
        return wire.Loaded(wire.VERSION, question.id, msgspec.json.encode(self._model.description))

    def _run(self, question: wire.Run) -> wire.Reply:
        model = self._model
        if model is None:
            raise wire.ProtocolError("a run before a load")
        batch = inputs.parse(model.takes, question.input, question.parameters)
        rows = len(batch.rows)
        result = answers.encode(model.predict(batch), rows, alone=batch.alone)
        if len(result) > question.most:
            raise ModelFailed(
                f"the answer has {len(result)} bytes, at most {question.most} are sent: ask for fewer rows", kind="answer"
            )
        return wire.Result(wire.VERSION, question.id, result, rows)


def _escaped(text: str) -> str:
    """At most 200 printable ASCII characters."""
    return text[:_TEXT].encode("unicode_escape").decode("ascii")[:_TEXT]


if __name__ == "__main__":
    main()
