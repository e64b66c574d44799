"""Validity windows: one rule for all signed messages.

A window is half-open: at `expires` it is over. The skew of the clocks excuses only a start in the future; it never
makes a window longer.
"""

from __future__ import annotations

from divault.messages.reasons import refusal

CLOCK_SKEW_S = 5
"""Seconds by which a caller's clock may be ahead of ours."""
MAX_TTL_S = 300
"""Longest window of any signature, in seconds: how long a stolen, unused one is worth something."""


def require_window(start: int, expires: int, now: int, *, max_ttl_s: int, early: str) -> None:
    """Return only if `now` (unix seconds) lies in a window of a length that is allowed.

    Raises SignatureInvalid (`bad_window`, `ttl_too_long`) and SignatureExpired (`early`, the reason for a start in the
    future, or `expired`).
    """
    if start >= expires:
        raise refusal("bad_window", "the window ends before it begins: expiry has to be later than issue")
    if expires - start > max_ttl_s:
        raise refusal("ttl_too_long", f"the window is longer than {max_ttl_s} s: sign for a shorter one")
    if start > now + CLOCK_SKEW_S:
        raise refusal(early, f"the window begins {start - now} s from now: check your clock", now=now)
    if now >= expires:
        raise refusal("expired", f"the window ended {now - expires} s ago: sign again", now=now)
