"""Why a signed message was refused: one table from reason to error class.

A reason is a stable word (those of `vectors/auth`, and no others); the class behind it carries the code that clients
switch on. Everything that this package refuses for its meaning goes through `refusal`.

>>> refusal("high_s", "sign with low s").code
'signature_invalid'
>>> type(refusal("replay", "sign again with a fresh nonce")).__name__
'NonceUsed'
"""

from __future__ import annotations

from typing import Any

from divault.errors import (
    DivaultError,
    NonceUsed,
    PriceChanged,
    SignatureExpired,
    SignatureInvalid,
    WrongChain,
    WrongNode,
)

CLASSES: dict[str, type[DivaultError]] = {
    # the bytes of a signature or address
    "bad_hex": SignatureInvalid,
    "bad_length": SignatureInvalid,
    "bad_rs": SignatureInvalid,
    "bad_v": SignatureInvalid,
    "high_s": SignatureInvalid,
    "bad_address": SignatureInvalid,
    "bad_wrapper": SignatureInvalid,
    "signer_mismatch": SignatureInvalid,
    # what was signed
    "bad_message": SignatureInvalid,
    "method_mismatch": SignatureInvalid,
    "path_mismatch": SignatureInvalid,
    "body_mismatch": SignatureInvalid,
    "digest_mismatch": SignatureInvalid,
    "missing_headers": SignatureInvalid,
    "class_bound": SignatureInvalid,
    "replayable_not_allowed": SignatureInvalid,
    # for whom
    "node_mismatch": WrongNode,
    "wrong_chain": WrongChain,
    "wrong_domain": WrongChain,
    "wrong_uri": SignatureInvalid,
    "wrong_nonce": SignatureInvalid,
    # when
    "bad_window": SignatureInvalid,
    "ttl_too_long": SignatureInvalid,
    "too_old": SignatureExpired,
    "expired": SignatureExpired,
    "issued_in_future": SignatureExpired,
    "not_yet_valid": SignatureExpired,
    # once, and for how much
    "replay": NonceUsed,
    "price_above_max": PriceChanged,
}
"""Every reason there is, and the class that stands for it."""


def refusal(reason: str, detail: str, **data: Any) -> DivaultError:
    """The error for `reason`, to be raised; `detail` tells the caller what to do next."""
    return CLASSES[reason](detail, reason=reason, **data)
