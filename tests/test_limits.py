"""Limits: who is slowed down, and whose limit is never spent by somebody else."""

from __future__ import annotations

import asyncio

import pytest

from divault.errors import Overloaded, RateLimited
from divault.limits import PeerLimits, RefusalBudget, WalletLimits
from divault.values import Address, Digest, Nonce, Principal, PrincipalKind, Usdc

ANN, BOB = Address(b"\x0a" * 20), Address(b"\x0b" * 20)


def principal(user: Address, nonce: int, body: str = "") -> Principal:
    request = Digest.keccak(user.raw + f"{nonce} {body}".encode())
    return Principal(user, PrincipalKind.BODY, request, Nonce(nonce.to_bytes(32, "big")), 0, 0, Usdc(0))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_a_wallet_that_spent_its_minute_is_told_when_to_come_back() -> None:
    clock = Clock()
    limits = WalletLimits(2, 10, clock=clock)
    for nonce in range(2):
        with limits.admit(principal(ANN, nonce)):
            pass

    with pytest.raises(RateLimited) as refused, limits.admit(principal(ANN, 9)):
        pass

    assert refused.value.data["retry_after"] == 30
    clock.now += 30
    with limits.admit(principal(ANN, 9)):
        pass


def test_a_clock_that_is_set_back_takes_no_tokens_away() -> None:
    clock = Clock()
    limits = PeerLimits(3, 0, clock=clock)
    limits.knock("a")
    clock.now -= 3600
    for _ in range(2):
        limits.knock("a")

    with pytest.raises(RateLimited) as refused:
        limits.knock("a")
    assert refused.value.data["retry_after"] == 20, "and gives none"


async def test_one_wallets_limit_is_not_anothers() -> None:
    limits = WalletLimits(1, 1, clock=Clock())
    with limits.admit(principal(ANN, 1)), limits.admit(principal(BOB, 1)):
        pass


async def test_runs_at_once_are_capped_and_copies_do_not_count() -> None:
    limits = WalletLimits(60, 1, clock=Clock())
    with limits.admit(principal(ANN, 1)):
        with limits.admit(principal(ANN, 1)):
            pass
        with pytest.raises(RateLimited), limits.admit(principal(ANN, 2)):
            pass
    with limits.admit(principal(ANN, 2)):
        pass


def test_other_requests_under_the_same_nonce_are_no_copies() -> None:
    limits = WalletLimits(4, 2, clock=Clock())
    with limits.admit(principal(ANN, 1, "a")), limits.admit(principal(ANN, 1, "b")):
        with pytest.raises(RateLimited, match="under way"), limits.admit(principal(ANN, 1, "c")):
            pass
        with limits.admit(principal(ANN, 1, "b")):
            pass
    for body in "cd":
        with limits.admit(principal(ANN, 1, body)):
            pass
    with pytest.raises(RateLimited, match="per minute"), limits.admit(principal(ANN, 1, "e")):
        pass


async def test_a_cancelled_run_gives_its_place_back() -> None:
    limits = WalletLimits(60, 1, clock=Clock())

    async def hang() -> None:
        with limits.admit(principal(ANN, 1)):
            await asyncio.sleep(60)

    task = asyncio.create_task(hang())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with limits.admit(principal(ANN, 2)):
        pass


def test_peers_and_bytes_in_flight_are_bounded() -> None:
    limits = PeerLimits(1, 100, clock=Clock())
    limits.knock("a")
    limits.knock("b")
    with pytest.raises(RateLimited):
        limits.knock("a")
    with limits.bytes_in_flight() as held:
        held.take(30)
        held.take(30)
        with limits.bytes_in_flight() as more:
            with pytest.raises(Overloaded):
                more.take(60)
            more.take(40)
        with pytest.raises(Overloaded):
            held.take(60)
    with limits.bytes_in_flight() as held:
        held.take(100)


def test_refusal_receipts_have_a_budget_per_peer_and_for_the_node() -> None:
    budget = RefusalBudget(2, 3, clock=Clock())
    budget.spend("a")
    budget.spend("a")
    with pytest.raises(RateLimited):
        budget.spend("a")
    budget.spend("b")
    with pytest.raises(RateLimited):
        budget.spend("c")
