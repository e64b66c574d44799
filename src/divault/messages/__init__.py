"""The exact structures that wallets and nodes sign, parsed and checked strictly. No I/O, no clock, no memory.

| module | what |
|---|---|
| `signatures` | secp256k1: strict parsing, recovery, signing; keys and addresses |
| `reasons` | why something was refused, and the error class of each reason |
| `personal` | EIP-191 `personal_sign` |
| `typed` | EIP-712 domains and flat structs |
| `requests` | `InferenceRequest`, the signature inside a JSON body |
| `bodies` | strict JSON and its canonical hash (RFC 8785) |
| `headers` | ERC-8128: header signatures over the raw request (RFC 9421) |
| `sign_in` | EIP-4361, Sign-In with Ethereum |
| `session_calls` | what a session's text says, and a receipt of its calls |
| `wrappers` | ERC-6492 wrappers, parsed only |
| `nodes` | `NodeDescriptor`, a node's signed word on who it is |
| `windows` | the one rule for validity windows |
"""

from divault.messages.bodies import (
    UNSIGNED,
    body_hash,
    canonical,
    raw_members,
    strict_json,
    strict_object,
)
from divault.messages.headers import (
    HeaderParameters,
    HeaderPolicy,
    HeaderProof,
    HttpMessage,
    authority_of,
    claimed_user,
    nonce_of,
    read_headers,
    sign_headers,
    verify_headers,
)
from divault.messages.nodes import NodeDescriptor
from divault.messages.personal import personal_digest
from divault.messages.reasons import refusal
from divault.messages.requests import InferenceRequest, RequestContext, request_domain, verify_typed_data
from divault.messages.session_calls import SessionCall, allowances_of, bound_to
from divault.messages.sign_in import SignInContext, SignInMessage, compose
from divault.messages.signatures import (
    SigningKey,
    address_of,
    parse_key,
    recover,
    require_signer,
    sign_digest,
    signature_bytes,
    signature_text,
)
from divault.messages.typed import Domain, Struct
from divault.messages.windows import CLOCK_SKEW_S, MAX_TTL_S
from divault.messages.wrappers import WrappedSignature, unwrap

__all__ = [
    "CLOCK_SKEW_S",
    "MAX_TTL_S",
    "UNSIGNED",
    "Domain",
    "HeaderParameters",
    "HeaderPolicy",
    "HeaderProof",
    "HttpMessage",
    "InferenceRequest",
    "NodeDescriptor",
    "RequestContext",
    "SessionCall",
    "SignInContext",
    "SignInMessage",
    "SigningKey",
    "Struct",
    "WrappedSignature",
    "address_of",
    "allowances_of",
    "authority_of",
    "body_hash",
    "bound_to",
    "canonical",
    "claimed_user",
    "compose",
    "nonce_of",
    "parse_key",
    "personal_digest",
    "raw_members",
    "read_headers",
    "recover",
    "refusal",
    "request_domain",
    "require_signer",
    "sign_digest",
    "sign_headers",
    "signature_bytes",
    "signature_text",
    "strict_json",
    "strict_object",
    "unwrap",
    "verify_headers",
    "verify_typed_data",
]
