r"""ERC-8128 header signatures: a wallet signs the raw HTTP request (RFC 9421, RFC 9530). The ERC is a draft.

For routes without a body and for machine clients; no canonical JSON is involved. The profile is strict:

1. `Signature-Input` and `Signature` hold one signature of one label, serialised canonically (RFC 8941).
2. Covered are `@authority`, `@method`, `@path`, `@query` when there is a query, `content-digest` when there is a body,
   and `divault-max-price` and `divault-payment` when those headers are there [`class_bound`]; further ones may be. The
   authority is the verifier's configured public one, whatever a Host header says.
3. Parameters: `created`, `expires`, `keyid` [`missing_headers`], `nonce` [`replayable_not_allowed`]; at most 60 s by
   default, 300 s in any case.
4. `keyid` is `eip155:<chain>:<lower-case address>` (CAIP-10) with `tag="erc8128"`, or the older
   `erc8128:<chain>:<address>`.
5. The signature base is signed through EIP-191; that digest is the request's id.
6. `divault-max-price` is what the caller agrees to pay, a decimal string of atomic units; absent means 0.
   `divault-payment` is the hash of a transfer that he claims.
7. A nonce is any text; its replay key is keccak256 of its UTF-8 (`nonce_of`).

>>> from divault.messages.signatures import address_of, parse_key
>>> key = parse_key("0x" + "11" * 32)
>>> message = HttpMessage("DELETE", "node.example.org", "/api/v1/cache")
>>> added = sign_headers(key, message, HeaderParameters(chain_id=1, created=100, expires=160, nonce="n-1"))
>>> proof = verify_headers(message.with_headers(added), HeaderPolicy(1, "node.example.org", now=101))
>>> proof.user == address_of(key), proof.max_price.atomic
(True, 0)
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

from divault.errors import BadRequest
from divault.messages.personal import personal_digest
from divault.messages.reasons import refusal
from divault.messages.signatures import address_of, require_signer, sign_digest
from divault.messages.windows import MAX_TTL_S, require_window
from divault.values import UINT256_MAX, Address, Digest, Nonce, Secret, Usdc

MAX_PRICE, PAYMENT = "divault-max-price", "divault-payment"
DEFAULT_TTL_S = 60
"""Longest window by default, in seconds: such a request is made by a program and sent at once."""

_LABEL = "eth"
_TAG = "erc8128"
_MAX_HEADER = 4096  # characters; a signature over every header a client could think of has 1000
_DERIVED = ("@authority", "@method", "@path", "@query")
_INPUT = re.compile(
    r"(?P<label>[a-z*][a-z0-9_.*-]{0,63})="
    r"(?P<params>\((?P<components>\"[^\" ]+\"(?: \"[^\" ]+\")*)\)(?P<rest>(?:;[a-z]+=(?:[0-9]+|\"[^\"]*\"))*))",
    re.ASCII,
)
_PARAMETER = re.compile(r";([a-z]+)=(?:(0|[1-9][0-9]{0,14})|\"([ !#-\[\]-~]{1,256})\")", re.ASCII)
_COMPONENT = re.compile(r"@authority|@method|@path|@query|[a-z0-9!#$%&'*+.^_`|~-]+", re.ASCII)
_KEYID = re.compile(r"(erc8128|eip155):(0|[1-9][0-9]{0,77}):(0x[0-9a-zA-Z]{1,64})", re.ASCII)
_SIGNATURE = re.compile(r"(?P<label>[a-z*][a-z0-9_.*-]{0,63})=:(?P<value>[A-Za-z0-9+/=]{0,11000}):", re.ASCII)  # 8 KiB
_VALUE = re.compile(r"[ -~]*", re.ASCII)
_KINDS = {"created": int, "expires": int, "nonce": str, "keyid": str, "tag": str}


@dataclass(frozen=True, slots=True)
class HttpMessage:
    """A request as its bytes are: raw path, raw query without `?` (None: there is none), lower-case header names."""

    method: str
    authority: str
    path: str
    query: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    def with_headers(self, added: Mapping[str, str]) -> HttpMessage:
        """The same request with these headers added."""
        return replace(self, headers={**self.headers, **added})


@dataclass(frozen=True, slots=True)
class HeaderPolicy:
    """What a verifier accepts: its chain, its own authority, its clock (unix seconds), its longest window."""

    chain_id: int
    authority: str
    now: int
    max_ttl_s: int = DEFAULT_TTL_S

    def __post_init__(self) -> None:
        if not 0 < self.max_ttl_s <= MAX_TTL_S:
            raise ValueError(f"the longest window is 1 to {MAX_TTL_S} s")


@dataclass(frozen=True, slots=True)
class HeaderParameters:
    """What a signer chooses; times in unix seconds, `nonce` 1 to 256 printable characters but quote and backslash."""

    chain_id: int
    created: int
    expires: int
    nonce: str
    max_price: Usdc | None = None
    payment: str | None = None


@dataclass(frozen=True, slots=True)
class HeaderProof:
    """What a header signature proves: who signed which request, until when, and for how much at most."""

    user: Address
    digest: Digest
    """EIP-191 digest of the signature base: what was signed, and the request's id."""
    signature: str
    nonce: Nonce
    expires: int
    max_price: Usdc


@dataclass(frozen=True, slots=True)
class _Input:
    """A parsed `Signature-Input` (rules 1, 3 and 4), not compared with anything yet."""

    label: str
    params: str
    components: tuple[str, ...]
    created: int
    expires: int
    nonce: str
    chain_id: int
    user: Address


def authority_of(url: str) -> str:
    """The `@authority` of a URL: host in lower case, with the port unless it is the scheme's own. Raises BadRequest."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as err:
        raise BadRequest("this is no URL") from err
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise BadRequest("a node's URL is http:// or https:// with a host")
    host = f"[{host}]" if ":" in host else host
    return host if port in (None, {"http": 80, "https": 443}[parts.scheme]) else f"{host}:{port}"


def nonce_of(text: str) -> Nonce:
    """The replay key of a header signature's nonce: keccak256 of its UTF-8."""
    return Nonce(Digest.keccak(text.encode()).raw)


def claimed_user(headers: Mapping[str, str]) -> Address:
    """The address that the headers name, unproved: to route and limit by. Raises SignatureInvalid."""
    return _parse_input(_header(headers, "signature-input")).user


def verify_headers(message: HttpMessage, policy: HeaderPolicy) -> HeaderProof:
    """The proof that the key of the address in `keyid` signed exactly this request. Raises as `read_headers`."""
    proof = read_headers(message, policy)
    require_signer(proof.digest, proof.signature, proof.user)
    return proof


def read_headers(message: HttpMessage, policy: HeaderPolicy) -> HeaderProof:
    """What the headers prove if `signature` is one of `user` over `digest`, which is not checked here.

    Raises SignatureInvalid, SignatureExpired and WrongChain with the reason; BadRequest for a malformed maximum price.
    """
    parsed = _parse_input(_header(message.headers, "signature-input"))
    signature = _parse_signature(_header(message.headers, "signature"), parsed.label)
    if parsed.chain_id != policy.chain_id:
        raise refusal("wrong_chain", f"signed for another chain; this is {policy.chain_id}", chain_id=policy.chain_id)
    _require_bound(message, parsed.components)
    require_window(parsed.created, parsed.expires, policy.now, max_ttl_s=policy.max_ttl_s, early="not_yet_valid")
    if "content-digest" in parsed.components and message.headers.get("content-digest") != _digest_header(message.body):
        raise refusal("digest_mismatch", "Content-Digest is not the sha-256 of the body that came")
    digest = personal_digest(_signature_base(message, parsed.components, parsed.params))
    if message.authority != policy.authority:
        raise refusal("signer_mismatch", f"not signed for a request to {policy.authority}")
    price = message.headers.get(MAX_PRICE)
    return HeaderProof(
        user=parsed.user,
        digest=digest,
        signature="0x" + signature.hex(),
        nonce=nonce_of(parsed.nonce),
        expires=parsed.expires,
        max_price=Usdc(0) if price is None else Usdc.parse_atomic(price),
    )


def sign_headers(key: Secret, message: HttpMessage, parameters: HeaderParameters) -> dict[str, str]:
    """The headers to add to a request so that `verify_headers` accepts it; CAIP-10 key id with tag."""
    added: dict[str, str] = {}
    if message.body:
        added["content-digest"] = _digest_header(message.body)
    if parameters.max_price is not None:
        added[MAX_PRICE] = str(parameters.max_price.atomic)
    if parameters.payment is not None:
        added[PAYMENT] = parameters.payment
    components = ["@authority", "@method", "@path", *(["@query"] if message.query is not None else []), *added]
    listed = " ".join(f'"{name}"' for name in components)
    keyid = f"eip155:{parameters.chain_id}:{str(address_of(key)).lower()}"
    params = (
        f"({listed});created={parameters.created};expires={parameters.expires}"
        f';nonce="{parameters.nonce}";keyid="{keyid}";tag="{_TAG}"'
    )
    base = _signature_base(message.with_headers(added), tuple(components), params)
    signature = base64.b64encode(sign_digest(key, personal_digest(base))).decode()
    return {**added, "signature-input": f"{_LABEL}={params}", "signature": f"{_LABEL}=:{signature}:"}


def _header(headers: Mapping[str, str], name: str) -> str:
    value = headers.get(name)
    if not value:
        raise refusal("missing_headers", f"the header {name} is missing: sign the request (ERC-8128)")
    return value


def _parse_input(text: str) -> _Input:
    match = _INPUT.fullmatch(text) if len(text) <= _MAX_HEADER else None
    if match is None:
        raise refusal("bad_message", "Signature-Input holds one canonical entry of the ERC-8128 profile")
    components = tuple(part[1:-1] for part in match["components"].split(" "))
    if len(set(components)) != len(components) or not all(_COMPONENT.fullmatch(c) for c in components):
        raise refusal("bad_message", "Signature-Input covers a component twice, or one that is not supported")
    values = _parse_parameters(match["rest"])
    if "nonce" not in values:
        raise refusal("replayable_not_allowed", "signatures without a nonce are not accepted")
    if not {"created", "expires", "keyid"} <= values.keys():
        raise refusal("missing_headers", "Signature-Input needs created, expires, nonce and keyid")
    chain_id, user = _parse_keyid(values["keyid"], values.get("tag"))
    created, expires = int(values["created"]), int(values["expires"])
    return _Input(match["label"], match["params"], components, created, expires, values["nonce"], chain_id, user)


def _parse_parameters(text: str) -> dict[str, str]:
    values: dict[str, str] = {}
    end = 0
    for match in _PARAMETER.finditer(text):
        name, number, string = match.groups()
        kind = int if number is not None else str
        if match.start() != end or _KINDS.get(name) is not kind or name in values:
            break
        values[name] = number if number is not None else string
        end = match.end()
    if end != len(text):
        raise refusal("bad_message", "parameters of a signature are created, expires, nonce, keyid and tag, once each")
    return values


def _parse_keyid(text: str, tag: str | None) -> tuple[int, Address]:
    match = _KEYID.fullmatch(text)
    if match is None:
        raise refusal("bad_message", "keyid is eip155:<chain>:<address> or erc8128:<chain>:<address>")
    scheme, chain, address = match.groups()
    if tag not in ((_TAG,) if scheme == "eip155" else (_TAG, None)):
        raise refusal("bad_message", f'a CAIP-10 keyid needs tag="{_TAG}"')
    if scheme == "eip155" and address != address.lower():
        raise refusal("bad_address", "the address of a CAIP-10 keyid is in lower case")
    if int(chain) > UINT256_MAX:
        raise refusal("wrong_chain", "keyid names no chain")
    return int(chain), Address.parse(address)


def _parse_signature(text: str, label: str) -> bytes:
    match = _SIGNATURE.fullmatch(text)
    if match is None or match["label"] != label:
        raise refusal("bad_message", f"Signature is {label}=:<base64>:, of the label in Signature-Input")
    try:
        return base64.b64decode(match["value"], validate=True)
    except (binascii.Error, ValueError) as err:
        raise refusal("bad_message", "Signature is not base64") from err


def _require_bound(message: HttpMessage, components: tuple[str, ...]) -> None:
    needed = {"@authority", "@method", "@path"}
    needed |= {"@query"} if message.query is not None else set()
    needed |= {"content-digest"} if message.body else set()
    needed |= {MAX_PRICE, PAYMENT} & set(message.headers)
    missing = sorted(needed - set(components))
    if missing:
        raise refusal("class_bound", f"the signature has to cover {', '.join(missing)}")


def _digest_header(body: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


def _signature_base(message: HttpMessage, components: tuple[str, ...], params: str) -> str:
    derived = {
        "@authority": message.authority,
        "@method": message.method,
        "@path": message.path,
        "@query": f"?{message.query or ''}",
    }
    lines = []
    for name in components:
        value = derived[name] if name in derived else _header(message.headers, name).strip(" \t")
        if not _VALUE.fullmatch(value):
            raise refusal("bad_message", "a covered component is not printable ASCII")
        lines.append(f'"{name}": {value}\n')
    return "".join(lines) + f'"@signature-params": {params}'
