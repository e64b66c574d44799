"""Structured logs that can't carry a secret, and request ids.

Rules:

1. Inputs, answers, keys, signatures and payment headers are never logged; a field of such a name is masked, whoever
   logs it.
2. Text that a stranger controls is escaped and cut, so that a log line stays one line.
3. Logs go to stdout and, when a log directory is configured, to `div-backend.log` in it.
"""

from __future__ import annotations

import logging
import logging.handlers
import secrets
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import structlog

LOG_FILE = "div-backend.log"
_MAX_TEXT = 512  # characters of one logged value: enough for a sentence, too short for a payload
_MASKED = frozenset(
    {
        "authorization", "body", "cookie", "decryption_key", "identity", "input", "input_data", "key",
        "lighthouse_authorization", "passphrase", "password", "payment-signature", "private_key", "result", "signature",
        "user_signature", "x-payment",
    }
)  # fmt: skip


def _mask(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in event.items():
        if name.lower() in _MASKED:
            event[name] = "***"
        elif isinstance(value, str) and name != "exception":
            event[name] = value[:_MAX_TEXT]  # control characters are escaped by the JSON renderer
    return event


def _to_stdlib(logger: logging.Logger, _: str, event: MutableMapping[str, Any]) -> str:
    level = logging.getLevelNamesMapping().get(str(event.get("level", "info")).upper(), logging.INFO)
    logger.log(level, str(_render_json(None, "", event)))
    raise structlog.DropEvent


_render_json = structlog.processors.JSONRenderer(sort_keys=False)


def configure_logs(log_dir: Path | None, *, debug: bool = False) -> None:
    """Send logs to stdout and, if `log_dir` is given, to a file that rotates at 50 MB (five are kept).

    `debug` lowers the level to DEBUG; answers to callers stay the same.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if log_dir is not None:
        log_dir.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.handlers.RotatingFileHandler(log_dir / LOG_FILE, maxBytes=50_000_000, backupCount=5))
    root = logging.getLogger("divault")
    root.propagate = False
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(message)s"))
        root.addHandler(handler)
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
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


def new_request_id() -> str:
    """Give a random id for a request that nobody signed (`0x` + 32 hex)."""
    return "0x" + secrets.token_hex(16)
