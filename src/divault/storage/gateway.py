"""An IPFS HTTP gateway as a source: trustless answers (`format=raw|car`) and ranges of the plain file.

Both the URL parameters and the Accept header say what is asked for, since gateways look at one or the other. What
comes is accepted by its content, not by its Content-Type: the fetcher checks every block anyway.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from urllib.parse import urlsplit

from divault.errors import BlockTooLarge, SettingsInvalid, StorageFailed
from divault.ipfs import varint
from divault.ipfs.cid import parse_cid
from divault.storage._http import NO_BYTE_TIMEOUT_S, HttpClient, HttpFailed, Response
from divault.storage.source import Form, Piece, refused, short_answer
from divault.values import Cid

_RAW_TYPE = "application/vnd.ipld.raw"
_CAR_TYPE = "application/vnd.ipld.car; version=1; order=dfs; dups=y"
_CAR_QUERY = "format=car&car-version=1&car-order=dfs&car-dups=y"
_NEVER = {400, 405, 406, 415, 501}
_ABSENT = {404, 410, 412}
_DEFAULT_RETRY_S = 5.0
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.ASCII)
_EMPTY = parse_cid("bafkqaaa")
"""The identity CID of nothing: every trustless gateway answers it with 200 and no bytes."""


class GatewayStorage:
    """One gateway. Give the fetcher several, in the order in which they are to be asked."""

    def __init__(self, url: str, *, timeout_s: float = NO_BYTE_TIMEOUT_S) -> None:
        """`url` is the gateway's base, with or without `/ipfs`. Raises SettingsInvalid."""
        try:
            self._client = HttpClient(url, timeout_s=timeout_s)
        except HttpFailed as err:
            raise SettingsInvalid(
                f"a gateway is written like https://gateway.example: {err.detail}", setting="DIVAULT_GATEWAY_URLS"
            ) from err
        parts = urlsplit(url)
        self._base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/ipfs')}/ipfs/"
        self._name = parts.netloc
        self._trustless: bool | None = None

    @property
    def trustless(self) -> bool | None:
        """What the last probe found."""
        return self._trustless

    @property
    def name(self) -> str:
        """Host and port."""
        return self._name

    async def read(self, cid: Cid, ranges: Sequence[range] = (), form: Form = Form.CAR) -> AsyncGenerator[Piece, None]:
        """See `Storage.read`: one request per range."""
        try:
            for number, wanted in enumerate(ranges or [None]):
                pieces = self._answer(cid, wanted, form)
                if form is Form.CAR and number:
                    pieces = _without_header(pieces)
                async with aclosing(pieces):
                    async for piece in pieces:
                        yield piece
        except HttpFailed as err:
            raise refused(self._name, cid, err.reason, err.detail) from err

    async def probe(self) -> bool:
        """True when the gateway answers as a trustless one does; it is asked accordingly from then on.

        Raises StorageFailed when it answers nothing.
        """
        try:
            self._trustless = await short_answer(self, _EMPTY, Form.BLOCK, 0) == b""
        except BlockTooLarge:
            self._trustless = False
        except StorageFailed as err:
            if err.data["reason"] in ("unreachable", "timeout"):
                raise
            self._trustless = None if err.data["reason"] == "busy" else False
        return bool(self._trustless)

    def close(self) -> None:
        """Drop all connections."""
        self._client.close()

    async def _answer(self, cid: Cid, wanted: range | None, form: Form) -> AsyncGenerator[Piece, None]:
        query, headers = _question(wanted, form)
        response = await self._client.get(f"{self._base}{cid}{query}", headers)
        try:
            self._check_status(cid, response, wanted, form)
            body = response.pieces() if form is not Form.FILE else _cut_out(response, wanted)
            async with aclosing(body):
                async for piece in body:
                    yield piece
        finally:
            response.close()

    def _check_status(self, cid: Cid, response: Response, wanted: range | None, form: Form) -> None:
        status = response.status
        if status == 200 and form is Form.FILE and wanted is not None and wanted.start:
            raise refused(self._name, cid, "unranged", "answers a range with the whole file")
        if status == 200 or (status == 206 and form is Form.FILE and wanted is not None):
            return
        if status in _ABSENT:
            raise refused(self._name, cid, "not_found", f"has no such content (HTTP {status})")
        if status in _NEVER:
            raise refused(self._name, cid, "unsupported", f"does not answer {form.value} (HTTP {status})")
        if status == 429 or (status == 503 and "Retry-After" in response.headers):
            wait = _retry_after(response.headers.get("Retry-After", ""))
            raise refused(self._name, cid, "busy", f"asks to come back in {wait:g} s", retry_after=wait)
        raise refused(self._name, cid, f"http_{status}", f"answered HTTP {status}")


def _question(wanted: range | None, form: Form) -> tuple[str, dict[str, str]]:
    headers = {"User-Agent": "divault"}
    if form is Form.BLOCK:
        return "?format=raw", headers | {"Accept": _RAW_TYPE}
    if form is Form.CAR:
        scope = "" if wanted is None else f"&dag-scope=entity&entity-bytes={wanted.start}:{wanted.stop - 1}"
        return f"?{_CAR_QUERY}{scope}", headers | {"Accept": _CAR_TYPE}
    if wanted is None:
        return "", headers
    return "", headers | {"Range": f"bytes={wanted.start}-{wanted.stop - 1}"}


def _retry_after(text: str) -> float:
    return float(text) if re.fullmatch(r"[0-9]{1,9}", text) else _DEFAULT_RETRY_S


async def _cut_out(response: Response, wanted: range | None) -> AsyncGenerator[Piece, None]:
    """The wanted bytes of an answer that may be the range or, where ranges are ignored, the whole file."""
    first = _first_byte(response) if response.status == 206 else 0
    start, stop = (wanted.start - first, wanted.stop - first) if wanted is not None else (0, None)
    if start < 0:
        raise HttpFailed("unsupported", "answered another range")
    at = 0
    async with aclosing(response.pieces()) as pieces:
        async for piece in pieces:
            end = at + len(piece)
            if end > start:
                yield piece[max(0, start - at) : None if stop is None else stop - at]
            at = end
            if stop is not None and at >= stop:
                return
    if stop is not None:
        raise HttpFailed("cut", "the range ended early")


def _first_byte(response: Response) -> int:
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match is None:
        raise HttpFailed("unsupported", "sent a partial answer without a readable Content-Range")
    return int(match[1])


async def _without_header(pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
    """Sections alone, so that the answers to several ranges make one CAR."""
    head, left = bytearray(), -1
    async with aclosing(pieces):
        async for piece in pieces:
            if left < 0:
                head += piece
                try:
                    length, at = varint.read(head, 0, len(head))
                except varint.VarintIncomplete:
                    continue
                except ValueError as err:
                    raise HttpFailed("cut", "not a CAR") from err
                piece, left = bytes(head), at + length  # noqa: PLW2901  # the held-back start goes through the same cut
            skipped = min(left, len(piece))
            left -= skipped
            if len(piece) > skipped:
                yield piece[skipped:]
