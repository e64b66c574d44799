"""Values that are parsed once at the edge and frozen from then on, and the proofs that the pipeline hands along.

Rules:

1. Past the edge no function takes an address, CID, amount or nonce as `str` or `int`.
2. One spelling is accepted; everything else is rejected, never repaired.
3. A proof type (second half) is constructed in exactly one module, the one that did the work it proves; a test
   walks the syntax trees and holds every module to that.

>>> Usdc.parse("0.02").atomic
20000
>>> str(ModelId.parse("m1").key)
'0x83267a439473d40c510063b30f7c06d1e3bf496ea5e34c5e3290dfc7dc527ce1'
"""

from __future__ import annotations

import hmac
import re
from decimal import Decimal
from enum import IntEnum, StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, Self

from msgspec import Struct

from divault.errors import BadRequest, SignatureInvalid
from divault.keccak import keccak256

_HEX32 = re.compile(r"0x[0-9a-f]{64}", re.ASCII)
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}", re.ASCII)
_MODEL_TEXT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}", re.ASCII)
_AMOUNT = re.compile(r"[0-9]{1,60}(\.[0-9]{1,6})?", re.ASCII)
_ATOMIC = re.compile(r"0|[1-9][0-9]{0,77}", re.ASCII)
UINT256_MAX = 2**256 - 1


class Address(Struct, frozen=True, order=True):
    """An account or contract of an EVM chain: 20 bytes. Compare these, never text."""

    raw: bytes

    ZERO: ClassVar[Address]

    def __post_init__(self) -> None:
        if len(self.raw) != 20:
            raise ValueError("an address has 20 bytes")

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `0x` + 40 hex digits: all lower, all upper or exact EIP-55, not zero.

        Raises SignatureInvalid (reason `bad_address`) for anything else.
        """
        if not isinstance(text, str) or len(text) != 42:
            raise SignatureInvalid("an address is 0x and 40 hex digits", reason="bad_address")
        return cls(_raw_address(text))

    def __str__(self) -> str:
        """EIP-55 spelling."""
        return _checksummed(self.raw)

    def __repr__(self) -> str:
        return f"Address({self})"


@lru_cache(maxsize=16_384)  # a caller's address comes twice in each of his requests
def _raw_address(text: str) -> bytes:
    if not _ADDRESS.fullmatch(text):
        raise SignatureInvalid("an address is 0x and 40 hex digits", reason="bad_address")
    digits, value = text[2:], Address(bytes.fromhex(text[2:]))
    if digits not in (digits.lower(), digits.upper()) and str(value) != text:
        raise SignatureInvalid(
            f"the checksum of this address is wrong; write {str(value).lower()}", reason="bad_address"
        )
    if value == Address.ZERO:
        raise SignatureInvalid("the zero address is nobody", reason="bad_address")
    return value.raw


@lru_cache(maxsize=16_384)  # a request spells the same few addresses a dozen times, at 12 us each
def _checksummed(raw: bytes) -> str:
    digits = raw.hex()
    mask = keccak256(digits.encode()).hex()
    return "0x" + "".join(c.upper() if m >= "8" else c for c, m in zip(digits, mask, strict=False))


Address.ZERO = Address(bytes(20))


class Digest(Struct, frozen=True, order=True):
    """32 bytes: a hash, a block or transaction id, a bytes32 of a contract."""

    raw: bytes

    ZERO: ClassVar[Digest]

    def __post_init__(self) -> None:
        if len(self.raw) != 32:
            raise ValueError("a digest has 32 bytes")

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `0x` + 64 lower-case hex digits. Raises BadRequest."""
        if not isinstance(text, str) or not _HEX32.fullmatch(text):
            raise BadRequest("expected 0x and 64 lower-case hex digits")
        return cls(bytes.fromhex(text[2:]))

    @classmethod
    def keccak(cls, data: bytes) -> Self:
        """Keccak-256 of the bytes."""
        return cls(keccak256(data))

    def __str__(self) -> str:
        return "0x" + self.raw.hex()


Digest.ZERO = Digest(bytes(32))


class Nonce(Digest, frozen=True):
    """32 random bytes that a wallet uses once."""


class ModelId(Struct, frozen=True):
    """A model's name and its key in the vault.

    `key` is keccak256 of the UTF-8 text, unless the text is `0x` + 64 hex digits, which is the key itself.
    All state is keyed by `key`.
    """

    text: str
    key: Digest

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `[A-Za-z0-9][A-Za-z0-9._:-]{0,127}` or `0x` + 64 lower-case hex digits. Raises BadRequest."""
        if isinstance(text, str) and _HEX32.fullmatch(text):
            return cls(text, Digest(bytes.fromhex(text[2:])))
        if not isinstance(text, str) or not _MODEL_TEXT.fullmatch(text):
            raise BadRequest(
                "model_id is 1 to 128 letters, digits and . _ : - (starting with a letter or digit), or 0x and 64 hex",
                field="model_id",
            )
        return cls(text, Digest.keccak(text.encode()))

    def __str__(self) -> str:
        return self.text


class Usdc(Struct, frozen=True, order=True):
    """An amount in atomic units of a token with 6 decimals (1 USDC = 1,000,000)."""

    atomic: int

    DECIMALS: ClassVar[int] = 6

    def __post_init__(self) -> None:
        if type(self.atomic) is not int or not 0 <= self.atomic <= UINT256_MAX:
            raise ValueError("an amount is a whole number of atomic units, 0 to 2^256 - 1")

    @classmethod
    def parse(cls, text: str) -> Self:
        """From text in token units, `"0.02"`. Raises TypeError for numbers (is 1 a dollar or an atom?), ValueError."""
        if not isinstance(text, str):
            raise TypeError('write a price as text in USDC, for example "0.02"')
        if not _AMOUNT.fullmatch(text):
            raise ValueError('a price is digits with at most six decimals, for example "0.02"')
        return cls(int(Decimal(text).scaleb(cls.DECIMALS)))

    @classmethod
    def parse_atomic(cls, text: str) -> Self:
        """From a decimal string of atomic units, as on the wire. Raises BadRequest."""
        if not isinstance(text, str) or not _ATOMIC.fullmatch(text) or int(text) > UINT256_MAX:
            raise BadRequest("expected a decimal string of atomic units")
        return cls(int(text))

    def __str__(self) -> str:
        whole, rest = divmod(self.atomic, 10**self.DECIMALS)
        return f"{whole}.{rest:06d}".rstrip("0").rstrip(".")


class Cid(Struct, frozen=True):
    """A parsed content id; `divault.ipfs.parse_cid` makes them. Blocks match by (hash_code, digest), not by text."""

    text: str
    version: Literal[0, 1]
    codec: int
    hash_code: int
    digest: bytes

    def __str__(self) -> str:
        return self.text


class Secret:
    """Bytes that can't be printed, pickled, hashed or compared in variable time.

    `wipe` overwrites this copy: exposure is minimised, not erased (Python may hold others).
    """

    __slots__ = ("_value",)

    def __init__(self, value: bytes | bytearray) -> None:
        self._value = bytearray(value)

    @classmethod
    def of_text(cls, text: str) -> Self:
        """The UTF-8 bytes of the text, unchanged."""
        return cls(text.encode())

    def reveal(self) -> bytes:
        """A copy of the bytes. Keep it local and short-lived."""
        return bytes(self._value)

    def wipe(self) -> None:
        """Overwrite with zeros."""
        self._value[:] = bytes(len(self._value))

    def __len__(self) -> int:
        return len(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value, other._value)

    __hash__ = None  # type: ignore[assignment]  # a hash would leak equality into tables

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a Secret can't be pickled or copied")

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise TypeError("a Secret can't be pickled or copied")


class BlockRef(Struct, frozen=True):
    """A block by hash; the number is a hint for people, since it means another block after a reorg."""

    number: int
    hash: Digest
    timestamp: int


class GateType(IntEnum):
    """How the vault's gate field is read. TOKEN: ERC-20 balance; OPEN: no token needed."""

    TOKEN = 0
    OPEN = 1


class ModelInfo(Struct, frozen=True):
    """What the vault says about a model at one block: the published tuple, payment token and gate."""

    model: ModelId
    cid: str
    token: Address
    price: Usdc
    owner: Address
    active: bool
    total_inferences: int
    created_at: int
    updated_at: int
    tags: tuple[str, ...]
    version: str
    min_balance: int
    payment_token: Address
    gate: GateType
    hold_blocks: int = 0
    """The balance must have been there this many blocks ago as well."""


# --- the pipeline's proofs, in the order in which they arise ------------------------------------------------------


class BodySignature(Struct, frozen=True):
    """EIP-712 `InferenceRequest` fields that came inside the JSON body."""

    signature: str
    nonce: Nonce
    issued_at: int
    expires_at: int
    body_hash: Digest
    chain_id: int | None = None
    vault: Address | None = None


class HeaderSignature(Struct, frozen=True):
    """ERC-8128 headers over the raw request (RFC 9421); lower-case header names."""

    headers: dict[str, str]
    query: str | None
    chain_id: int | None = None
    vault: Address | None = None


class TokenParts(Struct, frozen=True):
    """What the token of a session says, unproved. `sessions.read_token` makes them."""

    user: Address
    login: Digest
    covered: bytes
    """The bytes of the token that its MAC is over."""
    mac: Secret


class SessionToken(Struct, frozen=True):
    """The token of a session that a wallet opened by signing in (EIP-4361), as it came with a call."""

    token: TokenParts
    origin: str | None
    """The `Origin` header that browsers add; None for other programs."""
    idempotency_key: str | None
    """The caller's name for this call, by which it is run and charged once."""
    chain_id: int | None = None
    vault: Address | None = None


class TransferClaim(Struct, frozen=True):
    """A plain token transfer, claimed by its transaction hash (text as sent, checked by the rail)."""

    tx_hash: str


class SignedCall(Struct, frozen=True):
    """A request whose fields parsed and whose signature nobody has checked yet. `api.envelope` makes them."""

    user: Address
    method: str
    path: str
    body: bytes
    proof: BodySignature | HeaderSignature | SessionToken
    model: ModelId | None
    """None on routes that touch no model (results, cache)."""
    max_price: Usdc
    input_data: bytes | None = None
    """The JSON value of `input_data`, exactly as its bytes stood in the body."""
    parameters: bytes | None = None
    payment: TransferClaim | None = None
    decryption_key: Secret | None = None
    lighthouse_authorization: Secret | None = None
    """The caller's Kavach signature or `jwt:` token, with which this node may fetch the key in his name."""
    cid: str | None = None
    peer: str = ""
    """Network address of the caller, for the limits that come before and beside identity."""
    covered: bytes | None = None
    """What the receipt's input hash covers where that is not `input_data`: a whole body of another interface."""
    limit_s: float | None = None
    """How long the caller waits for the run, its turn included; no signature covers it."""


class PrincipalKind(StrEnum):
    """Which envelope proved the caller."""

    BODY = "eip712"
    HEADERS = "erc8128"
    SESSION = "session"


class Principal(Struct, frozen=True):
    """Proof that `user` signed exactly this call for this node, now, or opened the session that it came by.

    Made by `auth` alone.
    """

    user: Address
    kind: PrincipalKind
    request: Digest
    """The request id, which is the digest that was signed: EIP-712's, or EIP-191's of the ERC-8128 signature base; for
    sessions that of `messages.SessionCall`.
    """
    nonce: Nonce
    expires_at: int
    received_at: int
    max_price: Usdc
    typed_message: dict[str, Any] | None = None
    """For the private part of a receipt: the `InferenceRequest` message (JSON form), or a session's call with the text
    that opened the session; None for header signatures.
    """
    signature: str | None = None
    """Over `request`; of a session: over the text that opened it."""
    login: Digest | None = None
    """Which session the call came by."""
    repeatable: bool = True
    """Whether the same request can come again; a session's call can with an `Idempotency-Key` only."""
    by_contract: bool = False
    """The user is a contract wallet, and its contract accepted `signature`; no key did."""


class Grant(Struct, frozen=True):
    """Proof that the model is active and its gate open for the principal at `block`. Made by `chain` alone."""

    principal: Principal
    model: ModelInfo
    block: BlockRef
    have: int
    """The balance that opened the gate, raw units; 0 for an open gate."""


class Hold(Struct, frozen=True):
    """Proof that this run is reserved, durably and once, and paid for if it has a price. Made by `payments` alone."""

    grant: Grant
    price: Usdc
    payer: Address
    """Zero for a free model."""
    payment_key: str | None
    lease_until: int


class VerifiedBlob(Struct, frozen=True, weakref=True):
    """Proof that the file at `path` is, byte for byte, what `cid` names. Made by `storage` alone.

    While the object lives, the cache does not evict the file.
    """

    cid: Cid
    path: Path
    size: int


class VerifiedFolder(Struct, frozen=True):
    """Proof of what the directory `cid` holds: paths and content ids of its files, in order. `storage` makes it."""

    cid: Cid
    files: tuple[tuple[str, Cid], ...]


class MemoryFile(Struct, frozen=True):
    """A sealed memory file (memfd): its name inside the model, its descriptor in this process, its size in bytes."""

    name: str
    fd: int
    size: int


class OpenedModel(Struct, frozen=True):
    """Proof that the plaintext in `files` came out of the seal of `cid`, authenticated to its end.

    Made by `workers.opening` alone. Whoever holds it owns the descriptors and closes them.
    """

    model: ModelId
    cid: Cid
    plaintext_sha256: Digest
    size: int
    files: tuple[MemoryFile, ...]


class Output(Struct, frozen=True):
    """Proof that the loaded model ran on these inputs. Made by `workers` alone."""

    result: bytes
    """The JSON value of the answer, exactly as it will stand in the response body."""
    runtime: dict[str, Any]
    """adapter, arch, determinism, device, dtype, libraries, threads: what could change an answer."""
    plaintext_sha256: Digest
    rows: int


class ReceiptStatus(IntEnum):
    """Outcome of a request that concerned money or access."""

    OK = 1
    FAILED = 2
    REFUSED = 3
    TIMED_OUT = 4
    PARTIAL = 5


class Receipt(Struct, frozen=True):
    """A signed, chained outcome, durable before anybody sees it. Made by `receipts` alone."""

    envelope: dict[str, Any]
    hash: Digest
    sequence: int
    status: ReceiptStatus


class Answer(Struct, frozen=True):
    """A finished request: the exact bytes of the response body, and its receipt."""

    body: bytes
    receipt: Receipt | None
