"""Errors as RFC 9457 `application/problem+json`, and the one table of their HTTP statuses.

Members: `type`, `title`, `status`, `detail`, `code`, `error` (the code again, for published clients), `request_id`, and
the error's own data fields. A refusal or failure that has a receipt carries it as `receipt`.
"""

from __future__ import annotations

import base64
from http import HTTPStatus
from typing import Any

import orjson
from starlette.responses import Response

from divault.errors import DivaultError
from divault.telemetry import log, new_request_id

_log = log("api")
MEDIA_TYPE = "application/problem+json"
_OPENAI, _PROTOCOL = "/v1/", "/v2/"
"""Where the routes of OpenAI's interface begin, and those of the Open Inference Protocol."""
_TYPE_BASE = "urn:divault:error:"

STATUS: dict[str, int] = {
    "bad_request": 400,
    "wrong_key": 400,
    "sealed_file_damaged": 400,
    "unsupported_model": 400,
    "signature_incomplete": 401,
    "signature_invalid": 401,
    "session_invalid": 401,
    "nonce_used": 401,
    "signature_expired": 401,
    "wrong_node": 401,
    "wrong_chain": 401,
    "payment_required": 402,
    "access_denied": 403,
    "not_operator": 403,
    "model_not_loaded": 404,
    "model_unknown": 404,
    "result_unknown": 404,
    "route_unknown": 404,
    "method_not_allowed": 405,
    "request_running": 409,
    "payment_pending": 409,
    "settlement_pending": 409,
    "price_changed": 409,
    "cid_mismatch": 409,
    "too_large": 413,
    "sign_headers": 413,
    "input_invalid": 422,
    "rate_limited": 429,
    "internal": 500,
    "storage_failed": 502,
    "model_failed": 502,
    "chain_unavailable": 503,
    "chain_stale": 503,
    "overloaded": 503,
    "not_ready": 503,
    "deadline_exceeded": 504,
}
"""Every code that can reach a caller of the API, with its HTTP status."""

AUTHENTICATE = 'DIV-EIP712 realm="divault", Signature realm="divault", Bearer realm="divault"'
"""`WWW-Authenticate` of every 401: the two envelopes that prove a caller, and the token of a session."""


def problem(error: DivaultError, request_id: str) -> dict[str, Any]:
    """Build the members of the problem document."""
    status = STATUS.get(error.code, 500)
    body: dict[str, Any] = {
        "type": _TYPE_BASE + error.code,
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": error.detail,
        "code": error.code,
        "error": error.code,
        "request_id": request_id,
        "actor": error.actor.value,
    }
    body.update({name: value for name, value in error.data.items() if name not in body})
    if error.evidence is not None:
        body["receipt"] = error.evidence
    return body


def problem_response(error: DivaultError, request_id: str, path: str = "") -> Response:
    """Build the response, with the headers that its status demands, in the form of the interface under `path`."""
    body = problem(error, request_id)
    if path.startswith(_OPENAI):
        body["error"] = openai_error(body)
    elif path.startswith(_PROTOCOL):
        body["error"] = f"{error.code}: {error.detail}"  # all that its clients show
    headers = {"x-request-id": request_id, "divault-code": error.code, "cache-control": "no-store"}
    if body["status"] == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = AUTHENTICATE
    if "retry_after" in error.data:
        headers["retry-after"] = str(max(1, round(float(error.data["retry_after"]))))
    if "allowed" in error.data:
        headers["allow"] = str(error.data["allowed"])
    if error.code == "payment_required":
        headers["payment-required"] = _payment_header(body)
    return Response(orjson.dumps(body), body["status"], headers, MEDIA_TYPE)


def openai_error(body: dict[str, Any]) -> dict[str, Any]:
    """Build the object that clients of OpenAI's interface read; everything else stands beside it."""
    return {"message": body["detail"], "type": body["title"], "code": body["code"], "param": body.get("field")}


def failure_response(error: Exception, path: str) -> Response:
    """Build the response to a fault of the node itself, which goes into its log."""
    request_id = new_request_id()
    _log.error("internal error", request_id=request_id, exc_info=error)
    return problem_response(DivaultError("the node made a mistake; its log has this request id"), request_id, path)


def _payment_header(body: dict[str, Any]) -> str:
    """Encode the offer as base64 JSON: x402 v2 clients read the header, not the body."""
    offer = {
        "x402Version": 2,
        "error": body["detail"],
        "resource": body.get("resource"),
        "accepts": body.get("accepts", []),
    }
    return base64.b64encode(orjson.dumps(offer)).decode()
