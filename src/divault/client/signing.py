"""Requests as they go out, signed: in the body (EIP-712), or in headers (ERC-8128) for a large body or none."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Any

import orjson

from divault import messages
from divault.client.transport import Exchange
from divault.errors import BadRequest
from divault.messages import (
    HeaderParameters,
    HeaderPolicy,
    HttpMessage,
    InferenceRequest,
    body_hash,
    request_domain,
    sign_headers,
    strict_object,
    verify_headers,
)
from divault.messages.headers import DEFAULT_TTL_S
from divault.receipts import input_bytes
from divault.values import Address, Digest, ModelId, Nonce, Secret, Usdc

WINDOW_S = 120
"""Validity of a signature: long enough for a cold load of a model, well under the 300 s that nodes take."""
BODY_SIGNATURE_LIMIT = 64 * 1024 - 1024
"""Nodes canonicalise bodies up to 64 KiB; 1 KiB is left for the signature's own members."""
ISSUED_AGO_S = 2  # a clock a little ahead of the node's must not make a fresh signature come from the future


@dataclass(frozen=True, slots=True)
class Signed:
    """A request whose bytes are final: sent again unchanged it is the same request."""

    exchange: Exchange
    id: Digest
    expires_at: int
    covered: bytes | None
    """What the receipt's input hash covers: the exact bytes of `input_data`, and of `parameters` where sent."""


@dataclass(frozen=True, slots=True)
class Signer:
    """A wallet's key and the node and vault that its signatures are for."""

    key: Secret
    node: Address
    chain_id: int
    vault: Address
    authority: str
    """Host and port under which the node is known to header signatures."""

    def post(self, path: str, model: ModelId, body: dict[str, Any], limit: Usdc) -> Signed:
        """Sign a POST. Raises BadRequest for values that JSON can't carry."""
        try:
            raw = _json(body)
            covered = _covered(body) if "input_data" in body else None
        except TypeError as err:
            raise BadRequest(f"the input can't be sent as JSON: {err}", field="input_data") from err
        if len(raw) > BODY_SIGNATURE_LIMIT:
            exchange, request, expires_at = self._in_headers("POST", path, raw, limit)
        else:
            exchange, request, expires_at = self._in_body(path, model, raw, limit)
        return Signed(exchange, request, expires_at, covered)

    def bare(self, method: str, path: str) -> Signed:
        """Sign a request without a body."""
        exchange, request, expires_at = self._in_headers(method, path, b"", Usdc(0))
        return Signed(exchange, request, expires_at, None)

    def headers(self, method: str, path: str, raw: bytes, limit: Usdc, payment: str | None = None) -> dict[str, str]:
        """The headers that sign a request of any interface, over its raw body (ERC-8128)."""
        exchange, _, _ = self._in_headers(method, path, raw, limit, payment)
        return dict(exchange.headers or {})

    def _in_body(self, path: str, model: ModelId, raw: bytes, limit: Usdc) -> tuple[Exchange, Digest, int]:
        members = strict_object(raw)
        issued_at = int(time.time()) - ISSUED_AGO_S
        request = InferenceRequest(
            user=messages.address_of(self.key),
            node=self.node,
            model=model.key,
            method="POST",
            path=path,
            body_hash=body_hash(members),
            max_price=limit,
            nonce=Nonce(secrets.token_bytes(32)),
            issued_at=issued_at,
            expires_at=issued_at + WINDOW_S,
        )
        digest = request.digest(request_domain(self.chain_id, self.vault))
        envelope = {
            "nonce": str(request.nonce),
            "issued_at": request.issued_at,
            "expires_at": request.expires_at,
            "max_price": str(limit.atomic),
            "user_signature": messages.signature_text(self.key, digest),
        }
        signed = raw[:-1] + b"," + orjson.dumps(envelope)[1:]
        return Exchange("POST", path, signed), digest, request.expires_at

    def _in_headers(
        self, method: str, path: str, raw: bytes, limit: Usdc, payment: str | None = None
    ) -> tuple[Exchange, Digest, int]:
        created = int(time.time()) - ISSUED_AGO_S
        message = HttpMessage(method, self.authority, path, body=raw)
        parameters = HeaderParameters(
            self.chain_id, created, created + DEFAULT_TTL_S, secrets.token_hex(16), limit if raw else None, payment
        )
        headers = sign_headers(self.key, message, parameters)
        policy = HeaderPolicy(self.chain_id, self.authority, now=created)
        proof = verify_headers(message.with_headers(headers), policy)  # gives the request's id, and checks ourselves
        return Exchange(method, path, raw, headers), proof.digest, proof.expires


def _json(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def _covered(body: dict[str, Any]) -> bytes:
    parameters = _json(body["parameters"]) if "parameters" in body else None
    return input_bytes(_json(body["input_data"]), parameters)
