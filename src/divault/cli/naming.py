"""How a node is named on the command line: its URL, and with `#0xADDRESS` behind it who must be there."""

from __future__ import annotations

from urllib.parse import urlsplit

from divault.errors import BadRequest, SignatureInvalid
from divault.values import Address


def named_node(text: str) -> tuple[str, str | None]:
    """The URL, and the address if one is named. Raises BadRequest, also for a `#` with nothing behind it."""
    url, pin, address = text.partition("#")
    if not _is_url(url):
        raise BadRequest(
            f"{text} is no node: it is a URL that begins with http:// or https://, as in http://127.0.0.1:8000 or "
            "https://node.example#0xADDRESS",
            field="node",
        )
    if not pin:
        return url, None
    try:
        return url, str(Address.parse(address))
    except SignatureInvalid as err:
        raise BadRequest(
            f"behind the # of {text} there is no address: {err.detail}; without one leave the # out",
            field="node",
        ) from err


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port, or of brackets
        return False
