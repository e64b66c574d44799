"""The routes by which a wallet opens and ends a session.

They touch no model; what a session may do is decided later, where every call is.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from divault.api import schemas
from divault.api.describing import body_of, documented, json_response
from divault.api.envelope import Incoming, require_json, session_token, single_headers, unsigned_object
from divault.api.hot import incoming_of
from divault.api.node import Node
from divault.errors import BadRequest, SessionInvalid
from divault.messages.sign_in import time_text
from divault.sessions import IDLE_S, NONCE_S, Challenge
from divault.values import Address, TokenParts, Usdc

_MAX_BYTES = 24 * 1024  # a text with a page of resources, escaped, and the longest signature of a contract wallet


def add_sign_in(router: APIRouter, node: Node) -> None:
    """Add the routes to a router."""

    @router.post(
        "/api/v1/auth/nonce",
        tags=["sessions"],
        openapi_extra=body_of(schemas.NonceBody, required=False),
        responses=documented(schemas.NonceAnswer, 401),
    )
    async def nonce(request: Request) -> Response:
        """A fresh nonce, and what else stands in the text that a wallet signs to open a session (EIP-4361)."""
        incoming = await incoming_of(request.scope, request.receive)
        body = _object(incoming)
        user = Address.parse(body["user_address"]) if "user_address" in body else None
        origin = single_headers(incoming).get("origin")
        return json_response(_shown(node.sessions.challenge(origin, user, _allowances(body.get("spend")))))

    @router.post(
        "/api/v1/auth/login",
        tags=["sessions"],
        openapi_extra=body_of(schemas.LoginBody),
        responses=documented(schemas.LoginAnswer, 401),
    )
    async def login(request: Request) -> Response:
        """Open a session: the signed text for a token, which goes into `Authorization: Bearer` from then on."""
        incoming = await incoming_of(request.scope, request.receive)
        body = _object(incoming)
        text, signature = (_text(body, name) for name in ("message", "signature"))
        origin = single_headers(incoming).get("origin")
        ticket = await node.sessions.sign_in(text, signature, origin=origin, peer=incoming.peer)
        session = ticket.session
        return json_response(
            {
                "status": "success",
                "message": "signed in: send the token as Authorization: Bearer",
                "token": ticket.token.reveal().decode(),
                "token_type": "Bearer",
                "user_address": str(session.user),
                "origin": session.origin,
                "expires_at": session.expires_at,
                "idle_seconds": IDLE_S,
                "spend": [
                    {"token": str(token), "amount": str(most.atomic)} for token, most in ticket.allowances.items()
                ],
            }
        )

    @router.post(
        "/api/v1/auth/logout",
        tags=["sessions"],
        openapi_extra=body_of(schemas.LogoutBody, required=False),
        responses=documented(schemas.LogoutAnswer, 401),
    )
    async def logout(request: Request) -> Response:
        """End the session of the token, or all of its wallet: with `everywhere`, or by a signature in the headers."""
        incoming = await incoming_of(request.scope, request.receive)
        if incoming.header("signature-input"):
            return _ended(await node.service.sign_out(node.envelopes.foreign(incoming, None)))
        everywhere = _object(incoming).get("everywhere", False)
        if type(everywhere) is not bool:
            raise BadRequest("everywhere is true or false", field="everywhere")
        headers = single_headers(incoming)
        ended = await node.sessions.sign_out(
            _required(session_token(headers)), headers.get("origin"), everywhere=everywhere
        )
        return _ended(ended)


def _ended(count: int) -> Response:
    return json_response({"status": "success", "message": f"sessions ended: {count}", "ended": count})


def _shown(challenge: Challenge) -> dict[str, Any]:
    context = challenge.context
    shown: dict[str, Any] = {
        "status": "success",
        "nonce": context.nonce,
        "domain": context.domain,
        "uri": f"{context.origin}/",
        "version": "1",
        "chain_id": context.chain_id,
        "issued_at": time_text(context.now),
        "resources": list(challenge.resources),
        "expires_in": NONCE_S,
    }
    return shown if challenge.message is None else shown | {"message": challenge.message}


def _object(incoming: Incoming) -> dict[str, Any]:
    """The body's members, none where there is no body."""
    if incoming.raw:
        require_json(incoming)
    return unsigned_object(incoming, _MAX_BYTES)


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str):
        raise BadRequest(f"{name} is text: the message as it was signed, and its signature", field=name)
    return value


def _allowances(value: Any) -> dict[Address, Usdc]:
    """What `spend` asks for: a list of {"token", "amount"}, of which the last of a token counts."""
    if value is None:
        return {}
    if not isinstance(value, list) or not all(
        isinstance(one, dict) and set(one) == {"token", "amount"} for one in value
    ):
        raise BadRequest('spend is [{"token": "0x...", "amount": "<atomic units>"}]', field="spend")
    return {Address.parse(one["token"]): Usdc.parse_atomic(one["amount"]) for one in value}


def _required(token: TokenParts | None) -> TokenParts:
    if token is None:
        raise SessionInvalid("send the session's token as Authorization: Bearer", reason="bad_token")
    return token
