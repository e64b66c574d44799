"""Structured logs that can't carry a secret, and request ids.

Rules:

1. Inputs, answers, keys, signatures and payment headers are never logged; a field of such a name is masked, whoever
   logs it.
2. Text that a stranger controls is escaped and cut, so that a log line stays one line.
3. Of an exception its type and where it came from are logged, never its words: they may repeat what a caller sent.
   The same goes for what libraries log, of which there is one line each: their sentence, with numbers and types in it.
4. Lines that a stranger can cause are so many a second (`Lines`), whoever writes them; those of faults are all there.
5. Logs go to stdout and, when a log directory is configured, to `div-backend.log` in it.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import secrets
import sys
import time
import traceback
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, TextIO

import structlog

from divault.errors import SettingsInvalid

LOG_FILE = "div-backend.log"
_MAX_TEXT = 512  # characters of one logged value: enough for a sentence, too short for a payload
_MAX_FRAMES, _MAX_CAUSES = 30, 5  # of a logged exception
_IDS_AT_ONCE = 256
LINES_PER_SECOND = 50
_LIBRARIES = {"asyncio": logging.WARNING, "opentelemetry": logging.WARNING, "uvicorn": logging.ERROR}
"""Whose lines are lines of the log too, from which level. What uvicorn warns of is a refusal, told by `Measured`."""
_MASKED = frozenset(
    {
        "authorization", "body", "cookie", "decryption_key", "identity", "input", "input_data", "key",
        "lighthouse_authorization", "passphrase", "password", "payment-signature", "private_key", "result", "signature",
        "user_signature", "x-payment",
    }
)  # fmt: skip


def _mask(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in event.items():
        if name != "exception":
            event[name] = _masked(name, value)
    return event


def _masked(name: str, value: Any) -> Any:
    if name.lower() in _MASKED:
        return "***"
    if isinstance(value, str):
        return value[:_MAX_TEXT]  # control characters are escaped by the JSON renderer
    if isinstance(value, Mapping):
        return {str(inner): _masked(str(inner), of) for inner, of in value.items()}
    return value


def _without_words(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Rule 3."""
    found = event.pop("exc_info", None)
    error = sys.exc_info()[1] if found is True else found[1] if isinstance(found, tuple) else found
    if isinstance(error, BaseException):
        event["exception"] = _whence(error)
    return event


def _whence(error: BaseException) -> list[str]:
    """Type and frames of an exception and of its causes, the innermost frame last."""
    told: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(told) < _MAX_CAUSES:
        stack = traceback.StackSummary.extract(traceback.walk_tb(cause.__traceback__), lookup_lines=False)
        frames = [f"{'/'.join(Path(at.filename).parts[-3:])}:{at.lineno} {at.name}" for at in stack[-_MAX_FRAMES:]]
        told.append(" > ".join((f"{type(cause).__module__}.{type(cause).__qualname__}", *frames)))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return told


def _to_stdlib(logger: logging.Logger, _: str, event: MutableMapping[str, Any]) -> str:
    level = logging.getLevelNamesMapping().get(str(event.get("level", "info")).upper(), logging.INFO)
    logger.log(level, str(_render_json(None, "", event)))
    raise structlog.DropEvent


class Lines:
    """Lines of one kind, so many a second: who floods a node must fill no disk, nor cost more than he has to."""

    def __init__(self) -> None:
        self._second = 0
        self._written = 0
        self._unlogged = 0

    def one_more(self) -> bool:
        """Whether another line is written now; one that isn't is counted."""
        now = int(time.monotonic())
        if now != self._second:
            self._second, self._written = now, 0
        self._written += 1
        self._unlogged += self._written > LINES_PER_SECOND
        return self._written <= LINES_PER_SECOND

    def unlogged(self) -> dict[str, int]:
        """For the next line: how many were left out since the last one that said so."""
        count, self._unlogged = self._unlogged, 0
        return {"unlogged": count} if count else {}


class _Silent(logging.Handler):
    """Says that it can't write, and not what: Python's own handlers print the exception that is being handled."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802 - the signature is logging's
        """Part of logging.Handler."""
        error = sys.exc_info()[0]
        if sys.stderr is not None and error is not None:
            with contextlib.suppress(OSError, ValueError):  # it may be closed too
                sys.stderr.write(f"a line of the log could not be written: {error.__name__}\n")


class _ToStream(_Silent, logging.StreamHandler[TextIO]):
    """Standard output."""


class _ToFile(_Silent, logging.handlers.RotatingFileHandler):
    """The log file."""


class _OfLibraries(_Silent):
    """Makes what a library logs a line of ours: the first of its lines, since the others are its objects' words."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._lines = Lines()

    def emit(self, record: logging.LogRecord) -> None:
        """Part of logging.Handler."""
        if record.levelno < logging.ERROR and not self._lines.one_more():
            return
        said, told = _sentence(record).partition("\n")[0], self._lines.unlogged()
        log("libraries").log(record.levelno, said, library=record.name, exc_info=record.exc_info, **told)


def _sentence(record: logging.LogRecord) -> str:
    """What the library's code says, and of what it says it about numbers and types alone: a URL may hold a key."""
    if isinstance(record.args, Mapping):
        return str(record.msg)
    try:
        return str(record.msg) % tuple(map(_without_its_words, record.args or ()))
    except (TypeError, ValueError):  # a number was wanted where there is none
        return str(record.msg)


def _without_its_words(value: object) -> object:
    return value if isinstance(value, int | float) else f"({type(value).__name__})"


_render_json = structlog.processors.JSONRenderer(sort_keys=False)


def log_file(log_dir: Path) -> logging.Handler:
    """The log's file in this folder, opened. Raises SettingsInvalid where it can't be written."""
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        return _ToFile(log_dir / LOG_FILE, maxBytes=50_000_000, backupCount=5)
    except OSError as err:
        raise SettingsInvalid(
            f"{log_dir / LOG_FILE} can't be written ({err.strerror}): set DIVAULT_LOG_DIR to another folder, or empty",
            setting="DIVAULT_LOG_DIR",
        ) from err


def configure_logs(log_dir: Path | None, *, debug: bool = False) -> None:
    """Send logs to stdout and, if `log_dir` is given, to a file that rotates at 50 MB (five are kept).

    `debug` lowers the level to DEBUG; answers to callers stay the same. Raises SettingsInvalid as `log_file`.
    """
    handlers: list[logging.Handler] = [_ToStream(sys.stdout)]
    if log_dir is not None:
        handlers.append(log_file(log_dir))
    root = logging.getLogger("divault")
    root.propagate = False
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(message)s"))
        root.addHandler(handler)
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    for name, level in _LIBRARIES.items():
        library = logging.getLogger(name)
        library.handlers[:] = [_OfLibraries(level)]
        library.propagate = False
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _without_words,
            _mask,
            _to_stdlib,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if debug else logging.INFO),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def log(name: str) -> Any:
    """Get the structured logger of a part: `log("api").info("loaded", model_id="m1")`."""
    return structlog.get_logger(f"divault.{name}")


_ids: list[str] = []
"""Made in advance: one by one they would cost more than anything else that is counted of a request."""


def new_request_id() -> str:
    """Give a random id for a request that nobody signed (`0x` + 32 hex)."""
    try:
        return _ids.pop()
    except IndexError:
        digits = secrets.token_hex(16 * _IDS_AT_ONCE)
        _ids.extend(f"0x{digits[at : at + 32]}" for at in range(0, len(digits), 32))
        return _ids.pop()
