"""`InferenceRequest`: what a wallet signs so that one node runs one model on one body, once, for a price.

    InferenceRequest(address user, address node, bytes32 modelId, string method, string path, bytes32 bodyHash,
                     uint256 maxPrice, bytes32 nonce, uint64 issuedAt, uint64 expiresAt)

in the domain `DIV Inference`, version 1, of the real chain and its ModelVault (EIP-712). `check` compares it with what
the node knows itself, in a fixed order; whether the nonce was used is not known here, since nothing here remembers.

>>> str(REQUEST.type_hash)
'0x8e7e0a3c92d5292169effabb17746e0f054d67f310770f68fb2a18b1df3a9524'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import msgspec

from divault.messages.reasons import refusal
from divault.messages.signatures import require_signer
from divault.messages.typed import Domain, Struct
from divault.messages.windows import MAX_TTL_S, require_window
from divault.values import Address, Digest, Nonce, Usdc

REQUEST = Struct(
    "InferenceRequest",
    "address user,address node,bytes32 modelId,string method,string path,bytes32 bodyHash,uint256 maxPrice,"
    "bytes32 nonce,uint64 issuedAt,uint64 expiresAt",
)


def request_domain(chain_id: int, vault: Address) -> Domain:
    """The domain of requests to the nodes that serve `vault`."""
    return Domain("DIV Inference", "1", chain_id, vault)


class RequestContext(msgspec.Struct, frozen=True):
    """What a node knows of a request without believing it: itself, the HTTP line, the body that came, the time."""

    node: Address
    method: str
    path: str
    """Raw path, percent-encoding as received, without a query."""
    body_hash: Digest
    now: int
    """Unix seconds, one reading per request."""
    model: Digest | None = None
    """Key of the model that the body names; None leaves the comparison out."""
    price: Usdc | None = None
    """None: the price isn't known yet, and is compared with `max_price` when it is."""
    max_ttl_s: int = MAX_TTL_S


class InferenceRequest(msgspec.Struct, frozen=True):
    """The struct with its values parsed; times in unix seconds, `max_price` in atomic units of the payment token."""

    user: Address
    node: Address
    model: Digest
    method: str
    path: str
    body_hash: Digest
    max_price: Usdc
    nonce: Nonce
    issued_at: int
    expires_at: int

    @classmethod
    def parse(cls, message: Any) -> Self:
        """From the `message` of typed data. Raises BadRequest that names the member."""
        values = REQUEST.parse(message)
        return cls(
            user=values["user"],
            node=values["node"],
            model=values["modelId"],
            method=values["method"],
            path=values["path"],
            body_hash=values["bodyHash"],
            max_price=Usdc(values["maxPrice"]),
            nonce=Nonce(values["nonce"].raw),
            issued_at=values["issuedAt"],
            expires_at=values["expiresAt"],
        )

    def digest(self, domain: Domain) -> Digest:
        """What the wallet signs; also the request's id."""
        return domain.digest(REQUEST.hash(self._values()))

    def message(self) -> dict[str, str]:
        """The `message` of the typed data, numbers as decimal strings."""
        return REQUEST.to_json(self._values())

    def typed_data(self, domain: Domain) -> dict[str, Any]:
        """Give what `eth_signTypedData_v4` of a wallet takes."""
        return REQUEST.typed_data(domain, self._values())

    def check(self, context: RequestContext) -> None:
        """Return only if the request is meant for this node, this call and this moment.

        Order: node, method, path, body, price, window, model. Raises WrongNode, SignatureInvalid, PriceChanged or
        SignatureExpired with the reason; the signature itself is `require_signer`'s.
        """
        if self.node != context.node:
            raise refusal("node_mismatch", f"signed for another node; this is {context.node}", node=str(context.node))
        if self.method != context.method:
            raise refusal("method_mismatch", "signed for another HTTP method")
        if self.path != context.path:
            raise refusal("path_mismatch", "signed for another path")
        if self.body_hash != context.body_hash:
            raise refusal("body_mismatch", "the body is not the one that was signed: sign the body as it is sent")
        if context.price is not None and context.price > self.max_price:
            have, need = str(self.max_price.atomic), str(context.price.atomic)
            raise refusal("price_above_max", "the price is above the signed maximum", have=have, need=need)
        require_window(
            self.issued_at, self.expires_at, context.now, max_ttl_s=context.max_ttl_s, early="issued_in_future"
        )
        if context.model is not None and self.model != context.model:
            raise refusal("body_mismatch", "the body names another model than the one that was signed")

    def _values(self) -> dict[str, Address | Digest | str | int]:
        return {
            "user": self.user,
            "node": self.node,
            "modelId": self.model,
            "method": self.method,
            "path": self.path,
            "bodyHash": self.body_hash,
            "maxPrice": self.max_price.atomic,
            "nonce": self.nonce,
            "issuedAt": self.issued_at,
            "expiresAt": self.expires_at,
        }


def verify_typed_data(
    typed_data: Mapping[str, Any], signature: str, claimed: Address, *, domain: Domain, context: RequestContext
) -> InferenceRequest:
    """The request that `claimed` signed, from the whole typed data (as it lies beside a receipt, or in a vector).

    On the wire the node fills in its own domain, address, method and path, so that a request to another node shows as
    `signer_mismatch`; here the finer reasons exist. Raises BadRequest, and as `InferenceRequest.check`.
    """
    have = Domain.parse(typed_data.get("domain"))
    request = InferenceRequest.parse(typed_data.get("message"))
    domain.require(have)
    request.check(context)
    if request.user != claimed:
        raise refusal("signer_mismatch", "signed by another wallet than the one that is claimed")
    require_signer(request.digest(domain), signature, request.user)
    return request
