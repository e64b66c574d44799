"""Other interfaces' requests are translated, large ones beside the loop; those of this project are not."""

from __future__ import annotations

import asyncio
import threading

import pytest
from msgspec.structs import replace

from divault.errors import InputInvalid
from divault.models.base import Description
from divault.service import NATIVE, Dialect
from divault.values import Digest, Output, SignedCall
from tests.worker_models import call, opened

SMALL, LARGE = b"x" * 1024, b"x" * (1 << 20)
DESCRIPTION = Description("sklearn", "classification", "cpu", {}, {}, {}, {})
MODEL = opened({})


def asked(body: bytes) -> SignedCall:
    return replace(call(MODEL, None), body=body)


def output(result: bytes) -> Output:
    return Output(result, {}, Digest.ZERO, 1)


@pytest.mark.parametrize(("words", "here"), [(SMALL, True), (LARGE, False)])
async def test_who_translates(words: bytes, here: bool) -> None:
    seen: list[bool] = []

    def note(given: object, *_: object) -> object:
        seen.append(threading.current_thread() is threading.main_thread())
        return given

    dialect = Dialect(note, note)  # type: ignore[arg-type]
    await dialect.asked(asked(words), DESCRIPTION)
    await dialect.told(output(words))

    assert seen == [here, here]


async def test_what_is_not_translated_waits_for_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncio, "to_thread", None)
    question, found = asked(LARGE), output(LARGE)

    assert await NATIVE.asked(question, DESCRIPTION) is question
    assert await NATIVE.told(found) is found


@pytest.mark.parametrize("words", [SMALL, LARGE])
async def test_a_refusal_is_the_same_for_both(words: bytes) -> None:
    def refuse(*_: object) -> SignedCall:
        raise InputInvalid("no", field="x")

    with pytest.raises(InputInvalid):
        await Dialect(refuse).asked(asked(words), DESCRIPTION)
