"""The process that holds one model: confined first, then it loads, then it answers until the gateway hangs up.

Steps:

1. Read one frame that says which inherited descriptors are kept, and how much memory it may take.
2. `confine`, and say what was seen to hold: nothing of the model is read before that.
3. Read which files are the model's, recognise and load it; the libraries of its format alone are imported.
4. Answer frames, one at a time. Inputs are strict JSON; what a model gives is checked and copied before it is sent.

Whatever a model raises becomes a typed problem with its type's name and at most 200 escaped characters of its text.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import orjson

from divault import models
from divault.errors import DivaultError, InputInvalid, ModelFailed
from divault.models.base import Answer, Inputs, LoadedModel, Place, StreamingModel
from divault.models.runtimes import pin_threads
from divault.models.torch_runtime import require_device
from divault.values import MemoryFile
from divault.workers import strict_json, wire
from divault.workers.sandbox import Policy, confine

IDLE_ADDRESS_SPACE = 6 << 30
"""Libraries alone map up to 3 GiB (PyTorch with its threads' stacks and arenas); the rest is for working memory."""
IDLE_DATA = 3 << 30
ENVIRONMENT = frozenset(
    {
        "HF_HUB_OFFLINE",
        "JOBLIB_MULTIPROCESSING",
        "LANG",
        "LC_CTYPE",  # Python itself sets it at its start
        "GOMP_SPINCOUNT",
        "OMP_NUM_THREADS",
        "OMP_WAIT_POLICY",
        "OPENBLAS_NUM_THREADS",
        "PATH",
        "TOKENIZERS_PARALLELISM",
        "TORCHINDUCTOR_CACHE_DIR",
        "TRANSFORMERS_OFFLINE",
    }
)
_ERROR_TEXT, _NAME = 200, 80
T = TypeVar("T")
NOTHING = b"{}"
"""Description of a worker without files, which was only asked whether the device is there."""


def main() -> None:
    """Entry of a process of its own: the descriptor of its socket is the last argument."""
    work(int(sys.argv[-1]))


def work(channel: int) -> None:
    """Serve the gateway on this socket, and end the process."""
    with socket.socket(fileno=channel) as connection:
        limits = wire.receive(connection)
        if isinstance(limits, wire.Confine):
            checks = confine(_policy(limits, connection.fileno()))
            wire.send(connection, wire.Confined(id=limits.id, checks=checks))
            _serve(connection)
    # Teardown of the interpreter is of use to nobody, and libraries may hang in it.
    os._exit(0)


def _policy(order: wire.Confine, channel: int) -> Policy:
    return Policy(
        level=order.level,
        canary=order.canary,
        namespaces=order.namespaces,
        own_user=order.own_user,
        keep=(channel, *order.keep),
        environment=ENVIRONMENT,
        address_space=IDLE_ADDRESS_SPACE + order.memory_bytes,
        data=IDLE_DATA + order.memory_bytes,
    )


def _load(order: wire.Load) -> tuple[LoadedModel | None, wire.Reply]:
    if not order.files:
        there = _attempt("looking for the device", lambda: require_device(order.device))
        if isinstance(there, wire.Problem):
            return None, wire.Failed(id=order.id, problem=there)
        return None, wire.Ready(id=order.id, description=NOTHING)
    files = [MemoryFile(file.name, file.fd, file.size) for file in order.files]
    if order.recognise:
        found = _attempt("recognising the model", lambda: models.recognise(files, allow_code=order.allow_code).template)
        if isinstance(found, wire.Problem):
            return None, wire.Failed(id=order.id, problem=found)
        return None, wire.Known(id=order.id, template=found)

    def work() -> tuple[LoadedModel, bytes]:
        pin_threads(order.threads)  # not before the process is confined: some libraries start theirs at once
        model = models.load(files, Place(order.device, order.dtype), allow_code=order.allow_code)
        return model, orjson.dumps(model.description)

    loaded = _attempt("loading the model", work)
    if isinstance(loaded, wire.Problem):
        return None, wire.Failed(id=order.id, problem=loaded)
    model, description = loaded
    return model, wire.Ready(id=order.id, description=description)


def _serve(connection: socket.socket) -> None:
    order = wire.receive(connection)
    if not isinstance(order, wire.Load):
        return
    model, reply = _load(order)
    wire.send(connection, reply)
    # After a failure too: who ends at once might be seen to end before the answer is read.
    while (request := wire.receive(connection)) is not None:
        if isinstance(request, wire.Ping):
            wire.send(connection, wire.Pong(id=request.id))
        elif isinstance(request, wire.Run) and model is not None:
            items = [_streamed(connection, model, request)] if request.pieces else _answers(model, request.items)
            wire.send(connection, wire.Answers(id=request.id, items=items))


def _answers(model: LoadedModel, items: Sequence[wire.Item]) -> list[wire.Success | wire.Problem]:
    """Each caller's answer. All go through the model together; if that raises, each by himself."""
    read = [_attempt("the model", partial(_inputs, item)) for item in items]
    callers = [inputs for inputs in read if isinstance(inputs, Inputs)]
    if len(callers) > 1:
        found = _attempt("the model", lambda: _results(model, callers))
        if not isinstance(found, wire.Problem):
            return _in_order(read, found)
    return _in_order(read, [_attempt("the model", partial(_result, model, inputs)) for inputs in callers])


def _in_order(
    read: Sequence[Inputs | wire.Problem], found: Sequence[wire.Success | wire.Problem]
) -> list[wire.Success | wire.Problem]:
    """What was found for the callers whose input could be read, among what there is to say to the others."""
    answers = iter(found)
    return [inputs if isinstance(inputs, wire.Problem) else next(answers) for inputs in read]


def _inputs(item: wire.Item) -> Inputs:
    return Inputs(strict_json.parse(item.data, "input_data"), _parameters(item.parameters))


def _result(model: LoadedModel, inputs: Inputs) -> wire.Success:
    return _results(model, [inputs])[0]


def _results(model: LoadedModel, callers: Sequence[Inputs]) -> list[wire.Success]:
    answers = model.predict(callers)
    if len(answers) != len(callers):
        raise ModelFailed("the model gave another number of answers than there were callers", kind="answer_count")
    return [_success(answer) for answer in answers]


def _success(answer: Answer) -> wire.Success:
    try:
        return wire.Success(strict_json.dump(answer.result, wire.MAX_RESULT_BYTES), answer.rows)
    except ModelFailed as err:
        if err.data.get("kind") != "answer_too_large" or answer.rows < 2:
            raise
        raise InputInvalid(
            f"{err.detail}: send fewer than {answer.rows} items in one call",
            field="input_data",
            expected=f"fewer than {answer.rows} items",
        ) from None


def _streamed(connection: socket.socket, model: LoadedModel, request: wire.Run) -> wire.Success | wire.Problem:
    """The one caller's answer, after its pieces. A model that can't give pieces gives its answer whole."""
    if not hasattr(model, "stream") or len(request.items) != 1:
        return _answers(model, request.items)[0]
    streaming = cast("StreamingModel", model)

    def work() -> wire.Success:
        for part in streaming.stream(_inputs(request.items[0])):
            if isinstance(part, Answer):
                return _success(part)
            wire.send(connection, wire.Part(id=request.id, text=part.text, index=part.index))
            if wire.stop_comes(connection):
                raise ModelFailed("the caller went away", kind="stopped")
        raise ModelFailed("the model ended without an answer", kind="answer_count")

    return _attempt("the model", work)


def _attempt(what: str, work: Callable[[], T]) -> T | wire.Problem:
    """What `work` gives, or why it gave nothing: a model's load or one caller's request ends here."""
    try:
        return work()
    except DivaultError as err:
        return _problem(err)
    except MemoryError:
        return _problem(ModelFailed(f"{what} took more memory than this node gives it", kind="memory"))
    except Exception as err:  # noqa: BLE001 - whatever a library makes of somebody's file or input
        text = wire.escaped(str(err), _ERROR_TEXT)
        name = wire.escaped(type(err).__name__, _NAME)
        return _problem(ModelFailed(f"{what} raised {name}: {text}", kind="raised"))


def _parameters(raw: bytes | None) -> dict[str, Any]:
    return strict_json.parse_object(raw, "parameters") if raw is not None else {}


def _problem(err: DivaultError) -> wire.Problem:
    return wire.Problem(err.code, err.detail[: wire.MAX_TEXT], orjson.dumps(err.data))
