"""Every error that divault raises on purpose: one tree, one stable code per leaf.

Rules:

1. A class says *what went wrong*; its `code` never changes once released, and clients may switch on it.
2. `actor` says who has to act; the message says what he should do next.
3. Data (`have`, `need`, `block`, ...) travels in named fields, declared by the class; another name is a `TypeError`.
4. No message and no field holds a key, a signature, a path of the node or another caller's data.
5. Errors know nothing of HTTP: the one table of statuses is in `divault.api.problems`.
6. An error collects what belongs to one caller's request, so no object is raised to two: each gets a `copy`.

>>> err = AccessDenied("hold 100 more of 0xT0", have="0", need="100")
>>> err.code, err.data["need"]
('access_denied', '100')
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Any, ClassVar, Self


class Actor(StrEnum):
    """Who can mend it."""

    CALLER = "caller"
    OWNER = "owner of the model"
    OPERATOR = "operator of the node"
    NOBODY = "nobody: try again later"


class DivaultError(Exception):
    """Base of the tree; `detail` is a sentence for people, `data` the same facts for programs."""

    code: ClassVar[str] = "internal"
    actor: ClassVar[Actor] = Actor.OPERATOR
    receipt: ClassVar[bool] = False
    """True when an authenticated caller of a run gets a signed refusal or failure receipt for it."""
    fields: ClassVar[tuple[str, ...]] = ()

    def __init__(self, detail: str, /, **data: Any) -> None:
        unknown = set(data) - set(self.all_fields())
        if unknown:
            raise TypeError(f"{type(self).__name__} has no field {sorted(unknown)}; it has {self.all_fields()}")
        super().__init__(detail)
        self.detail = detail
        self.data: dict[str, Any] = data
        self.evidence: dict[str, Any] | None = None
        """Envelope of the signed receipt of this refusal or failure, once there is one."""
        self.request_id: str | None = None
        """Digest of the authenticated request that met this error."""

    def copy(self) -> Self:
        """The same error for another caller (rule 6), without the receipt and the request of this one's."""
        return type(self)(self.detail, **self.data)

    @classmethod
    def all_fields(cls) -> tuple[str, ...]:
        """Names of the data this class may carry, inherited ones first."""
        names: dict[str, None] = {}
        for base in reversed(cls.__mro__):
            names.update(dict.fromkeys(vars(base).get("fields", ())))
        return tuple(names)


# --- the request itself -------------------------------------------------------------------------------------------


class RequestError(DivaultError):
    """The request can't be served as it stands; the caller changes it."""

    actor = Actor.CALLER


class BadRequest(RequestError):
    """Malformed: not JSON, a wrong type, a duplicate key, an unknown encoding."""

    code = "bad_request"
    fields: ClassVar[tuple[str, ...]] = ("field",)


class RouteUnknown(RequestError):
    """No such route."""

    code = "route_unknown"


class MethodNotAllowed(RequestError):
    """The route doesn't answer this HTTP method."""

    code = "method_not_allowed"
    fields: ClassVar[tuple[str, ...]] = ("allowed",)


class TooLarge(RequestError):
    """Body, model or answer over a limit; `limit_bytes` names it."""

    code = "too_large"
    fields: ClassVar[tuple[str, ...]] = ("limit_bytes", "have_bytes", "limit")


class SignHeaders(RequestError):
    """A body that carries its own signature is over 64 KiB: sign headers (ERC-8128) instead."""

    code = "sign_headers"
    fields: ClassVar[tuple[str, ...]] = ("limit_bytes", "have_bytes")


class InputInvalid(RequestError):
    """The model does not take this input; the data says what it takes."""

    code = "input_invalid"
    receipt = True
    fields: ClassVar[tuple[str, ...]] = ("field", "expected", "example")


# --- identity -----------------------------------------------------------------------------------------------------


class Unauthenticated(RequestError):
    """The caller did not prove who he is."""

    fields: ClassVar[tuple[str, ...]] = ("reason",)


class SignatureIncomplete(Unauthenticated):
    """Fields of the signature are missing or malformed: sign `typed_data`, send `send` with the body again."""

    code = "signature_incomplete"
    fields: ClassVar[tuple[str, ...]] = ("missing", "malformed", "typed_data", "send")


class SignatureInvalid(Unauthenticated):
    """The signature does not prove this request; `reason` is one of the stable words of `docs/reference/errors.md`."""

    code = "signature_invalid"


class SessionInvalid(Unauthenticated):
    """The session's token does not count, or not any more; `reason` says why: sign in again."""

    code = "session_invalid"


class NonceUsed(Unauthenticated):
    """This nonce or Idempotency-Key was used before by this wallet: send a fresh one."""

    code = "nonce_used"


class SignatureExpired(Unauthenticated):
    """Outside the validity window of the signature."""

    code = "signature_expired"
    fields: ClassVar[tuple[str, ...]] = ("now",)


class WrongNode(Unauthenticated):
    """Signed for another node."""

    code = "wrong_node"
    fields: ClassVar[tuple[str, ...]] = ("node",)


class WrongChain(Unauthenticated):
    """Signed for another chain or another vault."""

    code = "wrong_chain"
    fields: ClassVar[tuple[str, ...]] = ("chain_id", "vault")


# --- access -------------------------------------------------------------------------------------------------------


class AccessDenied(RequestError):
    """The gate of the model is closed for this wallet. `have` and `need` are raw token units, as decimal text."""

    code = "access_denied"
    receipt = True
    fields: ClassVar[tuple[str, ...]] = ("have", "need", "token", "block", "block_hash")


class NotOperator(RequestError):
    """Only an operator of the node, or the owner of the model where the route says so, may do this."""

    code = "not_operator"


class ModelNotLoaded(RequestError):
    """The model is not loaded here: load it, or call `inference/run`."""

    code = "model_not_loaded"
    fields: ClassVar[tuple[str, ...]] = ("model_id",)


class ModelUnknown(RequestError):
    """No such model in the vault, or its owner deactivated it."""

    code = "model_unknown"
    receipt = True
    fields: ClassVar[tuple[str, ...]] = ("model_id",)


class CidMismatch(RequestError):
    """The CID asked for is not the one that the vault names."""

    code = "cid_mismatch"
    receipt = True
    fields: ClassVar[tuple[str, ...]] = ("have", "need")


class ResultUnknown(RequestError):
    """No stored result under this id for this wallet."""

    code = "result_unknown"


# --- money --------------------------------------------------------------------------------------------------------


class PaymentError(RequestError):
    """Something about the payment; nothing was charged."""

    fields: ClassVar[tuple[str, ...]] = ("reason",)


class PaymentRequired(PaymentError):
    """The model has a price and no payment came along; `accepts` lists how to pay."""

    code = "payment_required"
    fields: ClassVar[tuple[str, ...]] = (
        "price",
        "price_usdc",
        "token",
        "owner",
        "rails",
        "accepts",
        "x402Version",
        "resource",
    )


class PaymentRejected(PaymentRequired):
    """A payment was presented and does not pay for this call; `reason` says why."""

    receipt = True


class PaymentPending(PaymentError):
    """The payment isn't final yet: send the same bytes again after `retry_after` seconds. Do not pay again."""

    code = "payment_pending"
    actor = Actor.NOBODY
    fields: ClassVar[tuple[str, ...]] = ("retry_after",)


class SettlementPending(PaymentError):
    """Settlement is under way with an unknown end. Do not pay again."""

    code = "settlement_pending"
    actor = Actor.NOBODY
    fields: ClassVar[tuple[str, ...]] = ("retry_after", "transaction")


class PriceChanged(PaymentError):
    """The price is above what was signed: `have` is that and `need` the price, both atomic."""

    code = "price_changed"
    receipt = True
    fields: ClassVar[tuple[str, ...]] = ("have", "need", "token", "block")


class AllowanceExceeded(PriceChanged):
    """The price is above what the session may still spend, `have`. Nothing is used up: its key may come again."""

    receipt = False


class RequestRunning(PaymentError):
    """The same paid request is running: ask again after `retry_after` seconds with the same bytes."""

    code = "request_running"
    actor = Actor.NOBODY
    fields: ClassVar[tuple[str, ...]] = ("retry_after",)


# --- the sealed model ---------------------------------------------------------------------------------------------


class SealError(DivaultError):
    """The sealed file and the key do not fit together; `file` names which, where the model is a folder of them."""

    receipt = True
    fields: ClassVar[tuple[str, ...]] = ("cid", "file")


class WrongKey(SealError):
    """No key at hand opens this file."""

    code = "wrong_key"
    actor = Actor.CALLER


class SealedFileDamaged(SealError):
    """The file itself is malformed, cut or altered; `stage` is armor, header, mac or payload."""

    code = "sealed_file_damaged"
    actor = Actor.OWNER
    fields: ClassVar[tuple[str, ...]] = ("stage",)


class UnsupportedModel(SealError):
    """What came out of the seal is not a model that this node loads; `seen` names what it is."""

    code = "unsupported_model"
    actor = Actor.OWNER
    fields: ClassVar[tuple[str, ...]] = ("seen", "supported")


# --- storage ------------------------------------------------------------------------------------------------------


class StorageFailed(DivaultError):
    """The content could not be fetched, or what came is not what the CID names."""

    code = "storage_failed"
    actor = Actor.OPERATOR
    receipt = True
    fields: ClassVar[tuple[str, ...]] = ("cid", "gateway", "reason", "retry_after")


class ContentInvalid(StorageFailed):
    """Bytes or structure that the CID rules refuse; nothing of it was used. `reason` is the class's own name."""

    def __init__(self, detail: str, /, **data: Any) -> None:
        data.setdefault("reason", type(self).__name__)
        super().__init__(detail, **data)


class InvalidCID(ContentInvalid):
    """Text or binary CID that does not parse strictly."""

    actor = Actor.OWNER


class UnsupportedHash(ContentInvalid):
    """A hash function outside the policy."""


class InsecureHash(ContentInvalid):
    """A digest shorter than its hash function gives."""


class UnsupportedCodec(ContentInvalid):
    """A codec other than raw and dag-pb."""


class HashMismatch(ContentInvalid):
    """A block whose bytes do not match its multihash."""


class CarMalformed(ContentInvalid):
    """A CAR header, varint or section that breaks the format."""


class Truncated(ContentInvalid):
    """The stream ended inside a header or section."""


class BlockTooLarge(ContentInvalid):
    """A block over 2 MiB, by its declared length."""


class MissingBlock(ContentInvalid):
    """The DAG needs a block that never came."""


class TooManyExtraBytes(ContentInvalid):
    """More unasked-for bytes than the cap allows."""


class DagPbMalformed(ContentInvalid):
    """A dag-pb node that breaks the strict protobuf rules."""


class UnixFSInvalid(ContentInvalid):
    """Sizes, types or HAMT parameters that contradict each other."""


class NotAFile(ContentInvalid):
    """A directory or other node where a file is needed."""


class NotADirectory(ContentInvalid):
    """A file where a directory is needed."""


class SymlinkRefused(ContentInvalid):
    """Symbolic links are never followed."""


class UnsafeName(ContentInvalid):
    """A directory entry whose name could leave the directory."""


class DuplicateName(UnsafeName):
    """Two directory entries with one name."""


class DepthExceeded(ContentInvalid):
    """A DAG deeper than the limit."""


class TooManyNodes(ContentInvalid):
    """A DAG with more node visits than the limit."""


class TooManyLinks(ContentInvalid):
    """A node with more links than the limit."""


class SizeExceeded(ContentInvalid):
    """A file over the size limit, refused from its root block."""

    fields: ClassVar[tuple[str, ...]] = ("limit_bytes", "have_bytes")


# --- running ------------------------------------------------------------------------------------------------------


class ModelFailed(DivaultError):
    """The model raised, died or answered something that can't be sent. Nothing was charged."""

    code = "model_failed"
    actor = Actor.OWNER
    receipt = True
    fields: ClassVar[tuple[str, ...]] = ("kind",)


class DeadlineExceeded(DivaultError):
    """The work was stopped at its deadline. Nothing was charged."""

    code = "deadline_exceeded"
    actor = Actor.CALLER
    receipt = True
    fields: ClassVar[tuple[str, ...]] = ("limit_s",)


# --- the node and its surroundings --------------------------------------------------------------------------------


class Unavailable(DivaultError):
    """The node can't decide or serve now; it never guesses."""

    actor = Actor.NOBODY
    fields: ClassVar[tuple[str, ...]] = ("retry_after",)


class ChainUnavailable(Unavailable):
    """No RPC endpoint answered as it must."""

    code = "chain_unavailable"


class ChainStale(Unavailable):
    """The newest block known is too old to decide on."""

    code = "chain_stale"


class Overloaded(Unavailable):
    """A queue is full."""

    code = "overloaded"


class NotReady(Unavailable):
    """The node is starting or stopping, or a part of it is down."""

    code = "not_ready"


class RateLimited(RequestError):
    """Too many requests from this wallet or address."""

    code = "rate_limited"
    fields: ClassVar[tuple[str, ...]] = ("retry_after", "limit")


# --- off the wire: configuration, publishing, checking ------------------------------------------------------------


class SettingsInvalid(DivaultError):
    """A setting is missing, unknown or contradicts another; the message names it and the fix."""

    code = "settings_invalid"
    fields: ClassVar[tuple[str, ...]] = ("setting",)


class ReceiptInvalid(DivaultError):
    """A receipt that does not hold; `field` is the first one that is wrong."""

    code = "receipt_invalid"
    actor = Actor.CALLER
    fields: ClassVar[tuple[str, ...]] = ("field",)


class TransactionFailed(DivaultError):
    """A transaction was refused, reverted or not mined in time."""

    code = "transaction_failed"
    actor = Actor.CALLER
    fields: ClassVar[tuple[str, ...]] = ("transaction", "reason")


class NodeUntrusted(DivaultError):
    """The node is not the one that was pinned, or its answers are not signed by it."""

    code = "node_untrusted"
    actor = Actor.CALLER
    fields: ClassVar[tuple[str, ...]] = ("have", "need")


def error_classes() -> Iterator[type[DivaultError]]:
    """All classes of the tree, depth first, in the order of this file."""
    stack: list[type[DivaultError]] = [DivaultError]
    while stack:
        cls = stack.pop()
        yield cls
        stack.extend(reversed(cls.__subclasses__()))


def from_code(code: str, detail: str, data: dict[str, Any] | None = None) -> DivaultError:
    """The error that a node reported by `code`, with the fields this version knows; an unknown code gives the base."""
    cls = next((c for c in error_classes() if vars(c).get("code") == code), DivaultError)
    return cls(detail, **{k: v for k, v in (data or {}).items() if k in cls.all_fields()})
