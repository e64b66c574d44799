"""Other recipients for a sealed file: who opens the result, what stays as it was, and what is refused."""

from __future__ import annotations

import io
import os
import random
import subprocess
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from divault.errors import BadRequest, SealedFileDamaged, UnsupportedModel, WrongKey
from divault.values import ModelId, Secret
from divault.vault import lighthouse
from divault.vault.age import Identity, Passphrase, Recipient, header_mac
from divault.vault.armor import ArmorReader
from divault.vault.header import MAX_HEADER_BYTES, Stanza, encode_header, parse_header
from divault.vault.keys import CallerKey, NodeIdentity
from divault.vault.rewrap import recipient_count, reseal, rewrap
from divault.vault.sealed import open_stream, seal_stream
from divault.vault.streams import Reader
from tests.test_open_age_command import age, command, identity_of, opened_here, sealed_here

MODEL = ModelId.parse("some-model")
CHUNK = 64 * 1024
SIZES = [0, 1, CHUNK, CHUNK * 4, CHUNK * 4 + 1, 300_000]
OWNER, NODE, OTHER, STRANGER = (Identity.generate() for _ in range(4))


def sealed(plain: bytes, *recipients: Recipient, model: ModelId | None = MODEL) -> bytes:
    out = io.BytesIO()
    seal_stream(io.BytesIO(plain), out, recipients, model)
    return out.getvalue()


def widened(data: bytes, *add: Recipient, owner: Identity = OWNER, model: ModelId | None = MODEL) -> bytes:
    out = io.BytesIO()
    size = rewrap(io.BytesIO(data), out, NodeIdentity(owner), add, model)
    assert size == len(out.getvalue())
    return out.getvalue()


def renewed(data: bytes, *recipients: Recipient, owner: Identity = OWNER, model: ModelId | None = MODEL) -> bytes:
    out = io.BytesIO()
    reseal(io.BytesIO(data), out, NodeIdentity(owner), recipients, model)
    return out.getvalue()


def opened(data: bytes, identity: Identity) -> bytes:
    return opened_here(data, NodeIdentity(identity))


# --- letting in -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_new_and_old_recipients_open_it_and_a_stranger_does_not(size: int) -> None:
    plain = os.urandom(size)
    wider = widened(sealed(plain, NODE.recipient, OWNER.recipient), OTHER.recipient)

    for identity in (OWNER, NODE, OTHER):
        assert opened(wider, identity) == plain
    with pytest.raises(WrongKey):
        opened(wider, STRANGER)


def test_stanzas_and_payload_stay_byte_for_byte_and_the_mac_is_new() -> None:
    before = sealed(b"model" * 50_000, NODE.recipient, OWNER.recipient)
    after = widened(before, OTHER.recipient)
    old, new = parse_header(before), parse_header(after)

    assert new.covered.startswith(old.covered[:-3])
    assert [stanza.kind for stanza in new.stanzas] == ["X25519", "X25519", "divault-model", "X25519"]
    assert after[new.size :] == before[old.size :]
    assert new.mac != old.mac
    assert (recipient_count(io.BytesIO(before)), recipient_count(io.BytesIO(after))) == (2, 3)


def test_the_age_command_opens_it_for_old_and_new(tmp_path: Path) -> None:
    plain = os.urandom(200_001)
    for name in ("old", "new", "stranger"):
        subprocess.run([command("age-keygen"), "-o", tmp_path / name], check=True, capture_output=True)
    old, new = (identity_of(tmp_path / name) for name in ("old", "new"))
    wider = widened(sealed(plain, old.recipient, OWNER.recipient), new.recipient)

    assert age("-d", "-i", tmp_path / "old", data=wider) == plain
    assert age("-d", "-i", tmp_path / "new", data=wider) == plain
    with pytest.raises(subprocess.CalledProcessError):
        age("-d", "-i", tmp_path / "stranger", data=wider)


@pytest.mark.parametrize("armor", [[], ["-a"]])
def test_file_of_the_age_command_is_widened_and_comes_out_binary(tmp_path: Path, armor: list[str]) -> None:
    subprocess.run([command("age-keygen"), "-o", tmp_path / "new"], check=True, capture_output=True)
    data = age("-r", str(OWNER.recipient), *armor, data=b"a model" * 30_000)
    wider = widened(data, identity_of(tmp_path / "new").recipient)

    assert wider.startswith(b"age-encryption.org/v1\n")
    assert age("-d", "-i", tmp_path / "new", data=wider) == b"a model" * 30_000


def test_again_and_again_until_the_header_is_full() -> None:
    crowd = [Identity.generate() for _ in range(600)]
    data = widened(sealed(b"model", OWNER.recipient), *(one.recipient for one in crowd))
    assert opened(data, crowd[-1]) == b"model"
    with pytest.raises(BadRequest, match=str(MAX_HEADER_BYTES)):
        widened(data, *(Identity.generate().recipient for _ in range(100)))


def test_a_recipient_named_twice_gets_one_stanza() -> None:
    data = widened(sealed(b"model", OWNER.recipient), OTHER.recipient, OTHER.recipient)

    assert recipient_count(io.BytesIO(data)) == 2


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_changed_header_byte_never_passes(data: st.DataObject) -> None:
    wider = bytearray(widened(sealed(b"model", OWNER.recipient), NODE.recipient))
    at = data.draw(st.integers(0, parse_header(bytes(wider)).size - 1))
    wider[at] ^= data.draw(st.integers(1, 255))

    with pytest.raises((SealedFileDamaged, WrongKey, UnsupportedModel)):
        opened(bytes(wider), NODE)


def test_a_stanza_slipped_in_by_somebody_else_fails_the_mac() -> None:
    data = sealed(b"model", OWNER.recipient)
    header = parse_header(data)
    forged = encode_header((*header.stanzas, Stanza("grease", (), b"")), lambda covered: header.mac)
    for change in (widened, renewed):
        with pytest.raises(SealedFileDamaged) as caught:
            change(forged + data[header.size :], OTHER.recipient)
        assert caught.value.data["stage"] == "mac"


class Slow(io.RawIOBase):
    """A source that gives what the dice say."""

    def __init__(self, data: bytes, dice: random.Random) -> None:
        self._file, self._dice = io.BytesIO(data), dice

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        piece = self._file.read(min(len(buffer), self._dice.randint(1, 100_000)))
        buffer[: len(piece)] = piece
        return len(piece)


class Grudging(io.BytesIO):
    """A sink that takes a part of what it is given."""

    def write(self, data) -> int:
        return super().write(bytes(data[: 1 + len(data) // 2]))


@settings(max_examples=60, deadline=None)
@given(
    size=st.one_of(st.integers(0, 300), st.integers(-2, 2).map(lambda by: CHUNK + by), st.integers(0, 6 * CHUNK)),
    old=st.integers(0, 3),
    new=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_any_size_any_recipients_any_pieces(size: int, old: int, new: int, seed: int) -> None:
    dice = random.Random(seed)
    plain = dice.randbytes(size)
    before, after = ([Identity.generate() for _ in range(count)] for count in (old, new))
    data = sealed(plain, OWNER.recipient, *(one.recipient for one in before))
    wider, anew = Grudging(), Grudging()
    add = [one.recipient for one in after]
    rewrap(Slow(data, dice), wider, NodeIdentity(OWNER), add, MODEL)

    assert reseal(Slow(wider.getvalue(), dice), anew, NodeIdentity(OWNER), add, MODEL) == size
    assert all(opened(wider.getvalue(), one) == plain for one in (OWNER, *before, *after))
    assert all(opened(anew.getvalue(), one) == plain for one in after)
    for one in (OWNER, *before):
        with pytest.raises(WrongKey):
            opened(anew.getvalue(), one)


@settings(max_examples=150, deadline=None)
@given(data=st.one_of(st.binary(max_size=400), st.binary(max_size=200).map(lambda b: b"age-encryption.org/v1\n" + b)))
def test_no_input_raises_anything_untyped(data: bytes) -> None:
    for change in (widened, renewed):
        with pytest.raises((BadRequest, SealedFileDamaged, WrongKey)):
            change(data, OTHER.recipient)
    with pytest.raises((BadRequest, SealedFileDamaged)):
        recipient_count(io.BytesIO(data))


# --- shutting out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_resealed_file_has_another_key_and_other_recipients(size: int) -> None:
    plain = os.urandom(size)
    before = sealed(plain, NODE.recipient, OTHER.recipient, OWNER.recipient)
    after = renewed(before, OTHER.recipient, OWNER.recipient)

    assert opened(after, OTHER) == opened(after, OWNER) == plain
    with pytest.raises(WrongKey):
        opened(after, NODE)
    assert opened(before, NODE) == plain, "the old file stays what it was"
    assert after[parse_header(after).size :][16:] != before[parse_header(before).size :][16:]


def test_the_shut_out_node_can_not_make_itself_a_stanza_with_the_old_key() -> None:
    before = sealed(b"model", NODE.recipient, OWNER.recipient)
    after = renewed(before, OWNER.recipient)
    old_key, header = NODE.unwrap(parse_header(before).stanzas), parse_header(after)
    stanzas = (*header.stanzas, NODE.recipient.wrap(old_key))
    forged = encode_header(stanzas, lambda covered: header_mac(old_key, covered)) + after[header.size :]

    with pytest.raises(SealedFileDamaged):
        opened(forged, NODE)


@pytest.mark.parametrize("at", [-1, -CHUNK - 17, -2 * CHUNK])
def test_a_damaged_payload_ends_the_resealing(at: int) -> None:
    data = bytearray(sealed(os.urandom(5 * CHUNK), OWNER.recipient))
    data[at] ^= 1
    with pytest.raises(SealedFileDamaged) as caught:
        renewed(bytes(data), OTHER.recipient)
    assert caught.value.data["stage"] == "payload"
    with pytest.raises(SealedFileDamaged):
        renewed(bytes(data[:at]), OTHER.recipient)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    size = 24 << 20
    with (tmp_path / "sealed").open("wb") as file:
        seal_stream(io.BytesIO(bytes(size)), file, [OWNER.recipient], MODEL)
    for change in (rewrap, reseal):
        with (tmp_path / "sealed").open("rb", buffering=0) as source, (tmp_path / "out").open("wb") as sink:
            tracemalloc.start()
            change(source, sink, NodeIdentity(OWNER), [OTHER.recipient], MODEL)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 4 << 20


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [widened, renewed])
def test_who_opens_nothing_changes_nothing(change) -> None:
    with pytest.raises(WrongKey, match="sealed to 2 others"):
        change(sealed(b"model", NODE.recipient, OWNER.recipient), OTHER.recipient, owner=STRANGER)


@pytest.mark.parametrize("change", [widened, renewed])
def test_passphrase_file_is_refused_by_name(change) -> None:
    data = sealed_here(b"model", Passphrase(Secret.of_text("correct horse"), work_factor=10))
    with pytest.raises(BadRequest, match="passphrase"):
        change(data, OTHER.recipient)
    with pytest.raises(BadRequest, match="passphrase"):
        rewrap(io.BytesIO(data), io.BytesIO(), CallerKey(Secret.of_text("correct horse")), [OTHER.recipient])


@pytest.mark.parametrize("change", [widened, renewed])
def test_lighthouse_file_is_kavachs(change) -> None:
    data = io.BytesIO()
    lighthouse.seal(b"key", io.BytesIO(b"model" * 100), data)
    with pytest.raises(BadRequest, match="Kavach"):
        change(data.getvalue(), OTHER.recipient)


@pytest.mark.parametrize("change", [widened, renewed])
def test_file_of_another_model_is_refused(change) -> None:
    data = sealed(b"model", OWNER.recipient, model=ModelId.parse("another-model"))
    with pytest.raises(UnsupportedModel):
        change(data, OTHER.recipient)


def test_nobody_and_points_of_low_order_are_refused() -> None:
    data = sealed(b"model", OWNER.recipient)
    for change in (widened, renewed):
        with pytest.raises(BadRequest):
            change(data)
        with pytest.raises(BadRequest, match="low order"):
            change(data, Recipient(bytes(32)))


def test_a_seal_that_names_no_model_stays_so_when_widened_and_names_it_when_renewed() -> None:
    data = sealed(b"model", OWNER.recipient, model=None)

    assert [s.kind for s in parse_header(widened(data, OTHER.recipient)).stanzas] == ["X25519", "X25519"]
    assert [s.kind for s in parse_header(renewed(data, OTHER.recipient)).stanzas] == ["X25519", "divault-model"]


def test_a_reader_of_armor_is_a_source_like_any_other() -> None:
    source: Reader = ArmorReader(io.BytesIO(age("-a", "-r", str(OWNER.recipient), data=b"model")))
    out, plain = io.BytesIO(), io.BytesIO()
    rewrap(source, out, NodeIdentity(OWNER), [OTHER.recipient])

    assert open_stream(io.BytesIO(out.getvalue()), plain, [NodeIdentity(OTHER)]) == 5
