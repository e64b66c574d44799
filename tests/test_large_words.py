"""Large requests of other interfaces are translated beside the loop, small ones on it."""

from __future__ import annotations

import threading

import pytest

from divault.errors import InputInvalid
from divault.service import _aside


@pytest.mark.parametrize(("size", "here"), [(1024, True), (1 << 20, False)])
async def test_who_translates(size: int, here: bool) -> None:
    assert (await _aside(size, threading.current_thread) is threading.main_thread()) is here


async def test_a_refusal_of_large_words_is_the_same() -> None:
    def refuse() -> None:
        raise InputInvalid("no", field="x")

    for size in (1, 1 << 20):
        with pytest.raises(InputInvalid):
            await _aside(size, refuse)
