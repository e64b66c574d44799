"""Answers and files that carry a receipt: the exact bytes of a result, and where the receipt is.

>>> body = answer_body("m1", b'{"label": "positive"}', {"type": "InferenceReceipt"}, "done")
>>> slice_result(body)
b'{"label": "positive"}'
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import msgspec

from divault.errors import BadRequest
from divault.messages import raw_members, strict_object
from divault.receipts.checksums import PRIVATE, checksums_without


def answer_body(model_id: str, result: bytes, envelope: dict[str, Any], message: str = "inference completed") -> bytes:
    """The body of a successful answer; `result` is JSON and stands in it byte for byte."""
    return msgspec.json.encode(
        {
            "status": "success",
            "model_id": model_id,
            "result": msgspec.Raw(result),
            "message": message,
            "receipt": envelope,
        }
    )


def slice_result(body: bytes) -> bytes:
    """The bytes of `result` as they stand in an answer's body. Raises BadRequest when there is none."""
    members = raw_members(body)
    if "result" not in members:
        raise BadRequest("the answer has no result", field="result")
    return members["result"]


def read_receipt(raw: bytes) -> tuple[dict[str, Any], bytes | None]:
    """The envelope in a file, and the exact result beside it if there is one.

    Takes an envelope, a whole answer, or a problem that carries a receipt. Raises BadRequest for anything else.
    """
    members = raw_members(raw)
    if "receipt_hash" in members:
        return strict_object(raw), None
    if "receipt" not in members:
        raise BadRequest("neither a receipt nor an answer with one", field="receipt")
    return strict_object(members["receipt"]), members.get("result")


def redact(envelope: dict[str, Any], *, keep: Container[str] = ()) -> dict[str, Any]:
    """The envelope without its private part, to be shown to others; what that part proved is then *not checked*.

    `keep` names private members to show after all: `input_salt` discloses the question, `output_salt` the answer.
    """
    dropped = tuple(member for member in PRIVATE if member not in keep)
    public = envelope | dict.fromkeys(dropped)
    if isinstance(envelope.get("checksums"), dict):
        public["checksums"] = checksums_without(dropped, envelope["checksums"])
    return public
