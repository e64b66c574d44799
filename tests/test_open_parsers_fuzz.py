"""Every parser on the way to an opened model answers hostile bytes with a typed error, and round trips its own."""

from __future__ import annotations

import array
import base64
import fcntl
import io
import json
import os
import socket

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from divault.errors import BadRequest, DivaultError, ModelFailed, SealedFileDamaged, SealError, WrongKey
from divault.values import Secret
from divault.vault import age, bech32, header
from divault.vault.age import Identity, Passphrase, Recipient
from divault.vault.armor import BEGIN, END, ArmorReader
from divault.vault.header import Stanza, encode_header, parse_header
from divault.vault.keys import CallerKey, NodeIdentity
from divault.vault.sealed import open_stream, plain_size, read_preamble
from divault.vault.streams import fill
from divault.workers.opening import _checked_files, _Opened, _received
from tests.sealed_models import ME, memory_files_at_hand, sealed

FUZZ = settings(max_examples=200, deadline=None)
words = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)
stanzas = st.lists(
    st.builds(
        Stanza,
        words.filter(lambda kind: kind not in ("X25519", "scrypt")),
        st.lists(words, max_size=3).map(tuple),
        st.binary(max_size=200),
    ),
    min_size=1,
    max_size=5,
)


def tried(work):
    try:
        return work()
    except SealedFileDamaged as err:
        return err


@FUZZ
@given(stanzas, st.binary(max_size=50))
def test_header_round_trips_whatever_follows_it(items, rest):
    encoded = encode_header(items, lambda covered: bytes(32))

    parsed = parse_header(encoded + rest)

    assert (tuple(items), len(encoded), bytes(32)) == (parsed.stanzas, parsed.size, parsed.mac)
    assert encoded.startswith(parsed.covered + b" ")


@FUZZ
@given(st.data())
def test_damaged_header_parses_or_is_damaged(data):
    encoded = bytearray(sealed(b"")[:-32])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(encoded) - 1))
        encoded[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    parsed = tried(lambda: parse_header(bytes(encoded)))

    if isinstance(parsed, SealedFileDamaged):
        assert parsed.data["stage"] == "header"
        return
    again = encode_header(parsed.stanzas, lambda covered: parsed.mac)
    assert bytes(encoded[: parsed.size]) == again


@FUZZ
@given(st.binary(max_size=300))
def test_noise_is_never_opened(noise):
    for data in (noise, header.VERSION_LINE + noise, BEGIN + b"\n" + noise):
        with pytest.raises(SealError):
            open_stream(io.BytesIO(data), io.BytesIO(), [NodeIdentity(ME)])


def test_header_without_end_is_refused_at_its_limit():
    endless = header.VERSION_LINE + b"-> x\n" + (b"A" * 64 + b"\n") * 2000

    with pytest.raises(SealedFileDamaged, match="65536"):
        parse_header(endless)
    many = encode_header([Stanza("x", ("y",), bytes(32))] * 500, lambda covered: bytes(32))
    assert len(parse_header(many).stanzas) == 500


def test_work_factor_is_read_and_capped_before_any_scrypt(monkeypatch):
    calls = []
    monkeypatch.setattr(age.hashlib, "scrypt", lambda *a, **k: calls.append(k) or bytes(32))

    for factor, runs in (("20", 1), ("21", 0), ("99", 0), ("9223372036854775818", 0), ("+5", 0), ("05", 0), ("", 0)):
        calls.clear()
        stanza = Stanza("scrypt", (base64.b64encode(bytes(16)).decode().rstrip("="), factor), bytes(32))
        data = encode_header([stanza], lambda covered: bytes(32)) + bytes(48)
        with pytest.raises(WrongKey if runs else SealedFileDamaged):
            open_stream(io.BytesIO(data), io.BytesIO(), [CallerKey(Secret(b"pw"))])
        assert runs == len(calls)


# --- armor ---------------------------------------------------------------------------------------------------------


def armored(data: bytes, end: bytes = b"\n") -> bytes:
    text = base64.b64encode(data)
    return end.join([BEGIN, *(text[i : i + 64] for i in range(0, len(text), 64)), END]) + end


def unarmored(data: bytes) -> bytes:
    buffer = bytearray(len(data) + 10)
    return bytes(buffer[: fill(ArmorReader(io.BytesIO(data)), memoryview(buffer))])


@FUZZ
@given(st.binary(max_size=2000), st.sampled_from([b"\n", b"\r\n"]), st.sampled_from([b"", b" ", b"\r\n\t"]))
def test_armor_round_trips_with_space_around_it(data, end, space):
    assert data == unarmored(space + armored(data, end) + space)


@pytest.mark.parametrize("size", [0, 47, 48, 49, 48 * 1008, 48 * 1008 + 1, 200_000])
def test_armor_of_any_size(size):
    data = os.urandom(size)

    assert data == unarmored(armored(data))
    if size:
        with pytest.raises(SealedFileDamaged):
            unarmored(armored(data).replace(END, b""))


@FUZZ
@given(st.data())
def test_damaged_armor_is_the_same_file_or_damaged(data):
    spoilt = bytearray(armored(os.urandom(150)))
    at = data.draw(st.integers(0, len(spoilt) - 1))
    spoilt[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    plain = tried(lambda: unarmored(bytes(spoilt)))

    if isinstance(plain, SealedFileDamaged):
        assert plain.data["stage"] == "armor"
        return
    assert armored(plain).split() == bytes(spoilt).split()


def test_space_around_armor_is_bounded():
    assert unarmored(b"\n" * 1024 + armored(b"x")) == b"x"
    for data in (b"\n" * 1025 + armored(b"x"), armored(b"x") + b"\n" * 1100, armored(b"x") + b"x"):
        with pytest.raises(SealedFileDamaged):
            unarmored(data)


# --- keys ----------------------------------------------------------------------------------------------------------


@FUZZ
@given(st.binary(max_size=60))
def test_bech32_round_trips(data):
    text = bech32.encode("age", data)

    assert ("age", data) == bech32.decode(text) == bech32.decode(text.upper())


@FUZZ
@given(st.text(max_size=100))
def test_text_is_a_key_or_a_bad_request(text):
    for parse in (bech32.decode, Recipient.parse, Identity.parse):
        with pytest.raises(BadRequest) as caught:
            parse(text)
        assert not text or len(text) < 6 or text not in str(caught.value)


def test_keys_round_trip_and_every_changed_character_is_noticed():
    mine = Identity.generate()
    text, public = mine.reveal_text(), str(mine.recipient)

    assert text == Identity.parse(text).reveal_text()
    assert mine.recipient == Recipient.parse(public) == Identity.parse(text).recipient
    for spelled, parse in ((text, Identity.parse), (public, Recipient.parse)):
        for at in range(len(spelled)):
            with pytest.raises(BadRequest):
                parse(spelled[:at] + ("q" if spelled[at].lower() != "q" else "p") + spelled[at + 1 :])
        for other in (spelled.swapcase(), spelled + "q", spelled[:-1], " " + spelled, spelled + "\n"):
            with pytest.raises(BadRequest):
                parse(other)


def test_keys_do_not_print():
    mine = Identity.generate()

    assert "SECRET" not in repr(mine) + str(mine)
    assert mine.reveal_text() not in repr(mine)


def test_nothing_is_sealed_to_nobody_or_to_a_weak_key():
    passphrase = Passphrase(Secret(b"x"), work_factor=10)
    for recipients in ([], [passphrase, ME.recipient], [passphrase, passphrase], [Recipient(bytes(32))]):
        with pytest.raises(BadRequest):
            age.new_header(recipients)
    with pytest.raises(BadRequest):
        Passphrase(Secret(b""))


@FUZZ
@given(st.binary(max_size=100_000))
def test_plain_size_is_known_from_the_sealed_size(plain):
    data = sealed(plain[:3000])

    assert len(plain[:3000]) == plain_size(read_preamble(io.BytesIO(data))[0], len(data))


# --- what the opening process sends --------------------------------------------------------------------------------


def answered(data: bytes, descriptors: list[int]) -> DivaultError | _Opened:
    """What the gateway makes of a message of the opening process."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        near.setblocking(False)
        if descriptors:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
            far.sendmsg([data], rights)
        elif data:
            far.send(data)
        far.close()
        try:
            answer, received = _received(near)
        except DivaultError as err:
            return err
        try:
            _checked_files(answer, received, 1000)
        except DivaultError as err:
            return err
        finally:
            for descriptor in received:
                os.close(descriptor)
        return answer


def memory_file(size: int, seals: int = 0xF) -> int:
    descriptor = os.memfd_create("t", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def said(*files: tuple[str, int], **changes: object) -> bytes:
    told = [{"name": name, "size": size} for name, size in files]
    return json.dumps({"type": "opened", "sha256": "ab" * 32, "files": told} | changes).encode()


def test_true_answer_is_taken_and_its_lies_are_not():
    good, open_one, short = memory_file(5), memory_file(5, seals=0), memory_file(4)
    try:
        assert isinstance(answered(said(("a", 5)), [good]), _Opened)
        lies = [
            (said(("a", 5)), []),
            (said(("a", 5)), [good, good]),
            (said(("a", 5), ("b", 5)), [good]),
            (said(("a", 5)), [open_one]),
            (said(("a", 5)), [short]),
            (said(("a", 5)), [2]),
            (said(*[(f"{n}", 5) for n in range(129)]), [good] * 129),
            (said(*[(f"{n}", 5) for n in range(250)]), [good] * 250),
            (said(("", 5)), [good]),
            (said(("a", -1)), [good]),
            (said(("a", 5), sha256="zz"), [good]),
            (said(("a", 5), more=1), [good]),
            (said(), []),
            (b'{"type":"refused","code":"nonce_used","detail":"x","data":{}}', []),
            (b'{"type":"refused","code":"internal","detail":"x","data":{}}', [good]),
            (b'{"type":"refused","code":"wrong_key","detail":"' + b"x" * 501 + b'","data":{}}', []),
            (b"x" * 150_000, []),
            (b"", []),
        ]
        for data, descriptors in lies:
            error = answered(data, descriptors)
            assert isinstance(error, ModelFailed), data[:80]
            assert error.data["kind"] == "opening"
        big = memory_file(1001)
        assert isinstance(answered(said(("a", 1001)), [big]), ModelFailed)
        os.close(big)
    finally:
        for descriptor in (good, open_one, short):
            os.close(descriptor)
    assert memory_files_at_hand() == []


def test_reported_refusal_becomes_its_error():
    error = answered(b'{"type":"refused","code":"wrong_key","detail":"no","data":{"cid":"x","evil":1}}', [])

    assert isinstance(error, WrongKey)
    assert error.data == {"cid": "x"}


@FUZZ
@given(st.one_of(st.binary(min_size=1, max_size=200), st.builds(msgspec.json.encode, st.dictionaries(words, words))))
def test_any_other_message_is_a_crash(data):
    assert isinstance(answered(data, []), ModelFailed)
