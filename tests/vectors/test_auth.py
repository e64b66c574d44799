"""`vectors/auth`: verdict and reason of every case, and every digest recomputed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest

from divault.errors import DivaultError
from divault.messages import (
    HeaderPolicy,
    HttpMessage,
    InferenceRequest,
    RequestContext,
    SignInContext,
    SignInMessage,
    body_hash,
    personal_digest,
    refusal,
    request_domain,
    require_signer,
    strict_object,
    unwrap,
    verify_headers,
    verify_typed_data,
)
from divault.messages.signatures import signature_bytes
from divault.messages.typed import Domain
from divault.values import Address, ModelId, Usdc
from tests.vectors_root import vectors_root

SET: dict[str, Any] = json.loads((vectors_root() / "auth" / "vectors.json").read_text())
Vector = dict[str, Any]


def personal(vector: Vector) -> None:
    """EIP-191 texts, and spellings of an address."""
    require_signer(personal_digest(vector["message"]), vector["signature"], Address.parse(vector["address"]))


def typed(vector: Vector) -> None:
    """`InferenceRequest` with its whole typed data, and the nonces that were used before."""
    context, typed_data = vector["context"], vector["typed_data"]
    members = strict_object(context["body"].encode())
    request = verify_typed_data(
        typed_data,
        vector["signature"],
        Address.parse(vector["address"]),
        domain=request_domain(context["chain_id"], Address.parse(context["verifying_contract"])),
        context=RequestContext(
            node=Address.parse(context["node"]),
            method=context["method"],
            path=context["path"],
            body_hash=body_hash(members),
            now=context["now"],
            model=ModelId.parse(members["model_id"]).key,
            price=Usdc(context["price"]),
            max_ttl_s=context["max_ttl_s"],
        ),
    )
    if str(request.nonce) in context["used_nonces"]:  # remembered by the ledger, after the signature
        raise refusal("replay", "used before")


def headers(vector: Vector) -> None:
    """ERC-8128."""
    request, context = vector["request"], vector["context"]
    url = urlsplit(request["url"])
    message = HttpMessage(
        method=request["method"],
        authority=url.netloc,
        path=url.path,
        query=url.query or None,
        headers=request["headers"],
        body=(request.get("body") or "").encode(),
    )
    policy = HeaderPolicy(context["chain_id"], context["authority"], context["now"], context["max_validity_s"])
    if verify_headers(message, policy).user != Address.parse(vector["address"]):
        raise refusal("signer_mismatch", "another wallet")


def sign_in(vector: Vector) -> None:
    """EIP-4361."""
    context = SignInContext(**vector["context"])
    message = SignInMessage.parse(vector["message"])
    message.check(context)
    if message.address != Address.parse(vector["address"]):
        raise refusal("signer_mismatch", "another wallet")
    require_signer(message.digest, vector["signature"], message.address)


VERIFIERS: dict[str, Callable[[Vector], None]] = {
    "eip191": personal,
    "address": personal,
    "eip712": typed,
    "erc8128": headers,
    "siwe": sign_in,
}


def verdict(vector: Vector) -> tuple[bool, str | None]:
    try:
        VERIFIERS[vector["scheme"]](vector)
    except DivaultError as err:
        return False, err.data["reason"]
    return True, None


@pytest.mark.parametrize(
    "vector",
    [v for v in SET["vectors"] if "accept" in v["expect"]],
    ids=lambda v: f"{v['id']}-{v['scheme']}-{v['case']}",
)
def test_verdict_and_reason(vector: Vector) -> None:
    accepted, reason = verdict(vector)

    assert vector["expect"]["accept"] == accepted
    assert reason in (vector["expect"]["reason"] or "").split("|") or (accepted and reason is None)


@pytest.mark.parametrize("vector", [v for v in SET["vectors"] if "digest" in v], ids=lambda v: v["id"])
def test_digest_is_recomputed(vector: Vector) -> None:
    typed_data = vector["typed_data"]
    request = InferenceRequest.parse(typed_data["message"])

    assert vector["digest"] == str(request.digest(Domain.parse(typed_data["domain"])))


def parsed(vector: Vector) -> dict[str, Any]:
    """What `unwrap` makes of an ERC-6492 signature, in the words of the vectors."""
    try:
        wrapped = unwrap(signature_bytes(vector["signature"]))
    except DivaultError as err:
        return {"error": err.data["reason"]}
    if wrapped is None:
        return {"is6492": False}
    inner = {"calldata": "0x" + wrapped.calldata.hex(), "inner": "0x" + wrapped.inner.hex()}
    return {"is6492": True, "factory": str(wrapped.factory), **inner}


@pytest.mark.parametrize("vector", [v for v in SET["vectors"] if "parse" in v["expect"]], ids=lambda v: v["id"])
def test_wrapper_is_parsed(vector: Vector) -> None:
    expected, found = vector["expect"]["parse"], parsed(vector)

    assert vector["scheme"] == "erc6492_parse"
    assert found == expected or (expected == {"error_or_6492": True} and found.get("is6492", True))


def test_every_vector_is_judged() -> None:
    """A scheme that nobody here knows must not pass unseen."""
    assert set(VERIFIERS) | {"erc6492_parse"} >= {vector["scheme"] for vector in SET["vectors"]}
    assert all("accept" in vector["expect"] or "parse" in vector["expect"] for vector in SET["vectors"])
