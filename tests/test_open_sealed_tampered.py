"""A changed, cut or extended sealed file never opens, wherever the change is."""

from __future__ import annotations

import io
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from divault.errors import SealedFileDamaged, SealError, WrongKey
from divault.values import Secret
from divault.vault import stream
from divault.vault.keys import CallerKey, NodeIdentity
from divault.vault.sealed import open_stream, read_preamble
from tests.sealed_models import ME, lighthouse_sealed, sealed

PLAIN = os.urandom(16 * 65536 + 100)
AGE = sealed(PLAIN)
HEAD = read_preamble(io.BytesIO(AGE))[0].size
NODE = [NodeIdentity(ME)]
CHUNK = stream.SEALED_CHUNK


def opened(data: bytes) -> bytes:
    sink = io.BytesIO()
    open_stream(io.BytesIO(data), sink, NODE)
    return sink.getvalue()


def refused(data: bytes, stage: str) -> bytes:
    """Check that it is refused at this stage; what was released."""
    sink = io.BytesIO()
    with pytest.raises(SealedFileDamaged) as caught:
        open_stream(io.BytesIO(data), sink, NODE)
    assert stage == caught.value.data["stage"]
    return sink.getvalue()


def test_untouched_file_opens():
    assert opened(AGE) == PLAIN


@pytest.mark.parametrize("chunks", range(18))
def test_file_cut_at_a_chunk_boundary_is_damaged(chunks):
    if chunks == 17:
        assert opened(AGE[: HEAD + chunks * CHUNK]) == PLAIN
        return
    released = refused(AGE[: HEAD + chunks * CHUNK], "payload")

    assert PLAIN.startswith(released)
    assert len(released) <= max(0, chunks - 1) * 65536


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 100, 116])
def test_file_cut_inside_its_last_chunk_is_damaged(cut):
    refused(AGE[:-cut], "payload")


@pytest.mark.parametrize("tail", [b"\0", b"\n", bytes(16), bytes(65552), AGE])
def test_anything_behind_the_last_chunk_is_damage(tail):
    refused(AGE + tail, "payload")


def test_message_tells_cut_from_extended_from_altered():
    for data, words in (
        (AGE[: HEAD + 2 * CHUNK], "without its last chunk"),
        (sealed(bytes(65536)) + b"more", "data follows"),
        (AGE[: HEAD + 5] + b"\0\0" + AGE[HEAD + 7 :], "chunk 0"),
    ):
        with pytest.raises(SealedFileDamaged, match=words):
            open_stream(io.BytesIO(data), io.BytesIO(), NODE)


def test_swapped_repeated_and_dropped_chunks_are_damage():
    head, chunks = AGE[:HEAD], [AGE[i : i + CHUNK] for i in range(HEAD, len(AGE), CHUNK)]
    for order in ([1, 0, *range(2, 17)], [0, 0, *range(1, 17)], [*range(3), *range(4, 17)], [16], [0, 16]):
        refused(head + b"".join(chunks[i] for i in order), "payload")


def test_payload_of_another_file_with_the_same_key_holder_is_damage():
    other = sealed(PLAIN)
    refused(AGE[:HEAD] + other[HEAD:], "payload")
    refused(AGE[: HEAD - 16] + other[HEAD - 16 :], "payload")


SMALL = sealed(b"a small model")
SMALL_HEAD = read_preamble(io.BytesIO(SMALL))[0].size


@pytest.mark.parametrize("position", range(len(SMALL)))
def test_every_flipped_byte_is_noticed(position):
    spoilt = bytearray(SMALL)
    spoilt[position] ^= 0x01
    sink = io.BytesIO()

    with pytest.raises(SealError) as caught:
        open_stream(io.BytesIO(spoilt), sink, [*NODE])

    assert sink.getvalue() == b""
    if position >= SMALL_HEAD - 16:
        assert caught.value.data["stage"] == "payload"


@pytest.mark.parametrize("length", range(len(SMALL)))
def test_every_shortened_file_is_refused(length):
    with pytest.raises(SealedFileDamaged):
        open_stream(io.BytesIO(SMALL[:length]), io.BytesIO(), NODE)


def test_added_recipient_breaks_the_mac():
    header = SMALL[: SMALL_HEAD - 16]
    lines = header.split(b"\n")
    grafted = b"\n".join([lines[0], b"-> joint", b"", *lines[1:]])

    refused(grafted + SMALL[SMALL_HEAD - 16 :], "mac")


LIGHT = lighthouse_sealed(b"x" * 1000, b"k")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, len(LIGHT) - 1), st.integers(1, 255))
def test_lighthouse_change_of_one_byte_is_a_wrong_key_by_its_tag(position, flip):
    spoilt = bytearray(LIGHT)
    spoilt[position] ^= flip

    with pytest.raises(WrongKey):
        open_stream(io.BytesIO(spoilt), io.BytesIO(), [CallerKey(Secret(b"k"))])


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400), st.integers(1, 500))
def test_whatever_was_sealed_opens_to_the_same_in_any_read_size(plain, size):
    class Slow(io.BytesIO):
        def readinto(self, buffer):
            return super().readinto(memoryview(buffer)[:size])

    sink = io.BytesIO()
    open_stream(Slow(sealed(plain)), sink, NODE)

    assert plain == sink.getvalue()


class MeanSink:
    """Takes few bytes at a time."""

    def __init__(self) -> None:
        self.got = bytearray()

    def write(self, data):
        taken = bytes(data[:1000])
        self.got += taken
        return len(taken)


def test_sink_that_takes_little_gets_everything():
    sink = MeanSink()
    open_stream(io.BytesIO(sealed(PLAIN[:70_000])), sink, NODE)

    assert PLAIN[:70_000] == bytes(sink.got)
