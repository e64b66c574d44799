"""Files, negatives and key shards made by the Lighthouse and Kavach packages."""

from __future__ import annotations

import hashlib
import io
import json
import struct

import pytest

from divault.errors import BadRequest, DivaultError, SealedFileDamaged, WrongKey
from divault.values import Secret
from divault.vault import lighthouse
from divault.vault.age import Identity
from divault.vault.kavach import FIELD_ORDER, KeyShard, recover_key
from divault.vault.keys import CallerKey, NodeIdentity, SealFormat, recognise
from divault.vault.sealed import open_stream, plain_size, read_preamble
from tests.vectors.test_age import Dribble
from tests.vectors_root import vectors_root

FOLDER = vectors_root() / "lighthouse"
VECTORS = json.loads((FOLDER / "vectors.json").read_text())
SHARDS = json.loads((FOLDER / "shards.json").read_text())
ODD_SIZES = (1, 15, 16, 17, 27, 28, 29)


@pytest.fixture(autouse=True)
def one_derivation_per_key(monkeypatch):
    """PBKDF2 costs 0.1 s: the same pair is derived once for all the ways of reading."""
    monkeypatch.setattr(lighthouse, "derive_key", _derived)


_real_derive = lighthouse.derive_key
_keys: dict[tuple[bytes, bytes], bytes] = {}


def _derived(text: bytes, salt: bytes) -> bytes:
    if (text, salt) not in _keys:
        _keys[text, salt] = _real_derive(text, salt)
    return _keys[text, salt]


def ways(data: bytes) -> list[io.RawIOBase | io.BytesIO]:
    """The file as a whole, and as a stream of unknown size in odd pieces (big files only in the largest ones)."""
    sizes = ODD_SIZES if len(data) < 100_000 else (1009, 65537)
    return [io.BytesIO(data), *(Dribble(data, size) for size in sizes)]


def source_of(password: str) -> CallerKey:
    return CallerKey(Secret.of_text(password))


@pytest.mark.parametrize("entry", VECTORS["files"], ids=lambda e: e["file"])
def test_file_opens_in_every_way_of_reading(entry):
    data = (FOLDER / entry["file"]).read_bytes()

    assert entry["ciphertext_sha256"] == hashlib.sha256(data).hexdigest()
    assert entry["plaintext_size"] == plain_size(read_preamble(io.BytesIO(data))[0], len(data))
    for way in ways(data):
        sink = io.BytesIO()
        assert entry["plaintext_size"] == open_stream(way, sink, [source_of(entry["password"])])
        assert entry["plaintext_sha256"] == hashlib.sha256(sink.getvalue()).hexdigest()


@pytest.mark.parametrize("entry", VECTORS["negative"], ids=lambda e: e["file"])
def test_negative_is_refused_in_every_way_of_reading(entry):
    data = (FOLDER / entry["file"]).read_bytes()
    expected, stage = (SealedFileDamaged, "header") if len(data) < 44 else (WrongKey, None)

    for way in ways(data):
        with pytest.raises(expected) as caught:
            open_stream(way, io.BytesIO(), [source_of(entry["password"])])
        assert stage == caught.value.data.get("stage")


def test_fourteen_files_and_eleven_negatives_are_there():
    assert (len(VECTORS["files"]), len(VECTORS["negative"])) == (14, 11)


def test_model_opens_and_computes():
    model = json.loads((FOLDER / "model.json").read_text())
    password = recover_key([KeyShard.parse(s) for s in model["key_shards"][:3]])
    sink = io.BytesIO()

    open_stream(io.BytesIO((FOLDER / model["file"]).read_bytes()), sink, [source_of(password)])

    assert model["password"] == password
    plain = sink.getvalue()
    assert model["plaintext_sha256"] == hashlib.sha256(plain).hexdigest()
    (length,) = struct.unpack("<Q", plain[:8])
    header, data = json.loads(plain[8 : 8 + length]), plain[8 + length :]
    tensors = {k: struct.unpack_from(f"<{(e - b) // 4}f", data, b) for k, (b, e) in offsets(header).items()}
    x = model["example"]["input"]
    rows = [tensors["weight"][i : i + len(x)] for i in range(0, len(tensors["weight"]), len(x))]
    products = [sum(w * v for w, v in zip(row, x, strict=True)) for row in rows]
    assert model["example"]["output"] == [p + b for p, b in zip(products, tensors["bias"], strict=True)]


def offsets(header: dict) -> dict[str, tuple[int, int]]:
    return {name: tuple(entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"}


def test_key_text_is_used_as_it_stands():
    entry = next(e for e in VECTORS["files"] if e["file"] == "node-15.enc")
    data = (FOLDER / entry["file"]).read_bytes()

    for other in (entry["password"].upper(), entry["password"] + "\n", " " + entry["password"]):
        with pytest.raises(WrongKey):
            open_stream(io.BytesIO(data), io.BytesIO(), [source_of(other)])


def test_sealed_here_opens_here_and_with_no_other_key():
    plain, sealed = bytes(range(256)) * 8200, io.BytesIO()
    assert len(plain) == lighthouse.seal(b"key", io.BytesIO(plain), sealed)
    sink = io.BytesIO()

    open_stream(io.BytesIO(sealed.getvalue()), sink, [source_of("key")])

    assert plain == sink.getvalue()
    assert len(plain) + 44 == len(sealed.getvalue())
    with pytest.raises(WrongKey):
        open_stream(io.BytesIO(sealed.getvalue()), io.BytesIO(), [source_of("kez")])
    with pytest.raises(BadRequest):
        lighthouse.seal(b"", io.BytesIO(plain), io.BytesIO())


def test_lighthouse_is_all_that_is_not_age():
    assert SealFormat.AGE is recognise(b"age-encryption.org/v1\n")
    assert SealFormat.LIGHTHOUSE is recognise(bytes(28))


@pytest.mark.parametrize("shards", SHARDS["sets"], ids=lambda s: s["name"])
def test_recovery_equals_the_sdk_for_right_and_wrong_subsets(shards):
    for case in shards["recover"]:
        picked = [KeyShard.parse(shards["key_shards"][i]) for i in case["shards"]]

        key = recover_key(picked)

        assert case["sdk_master_key"] == key
        assert case["equals_master"] == (key == shards["master_key"])


def test_all_recorded_recoveries_ran():
    assert sum(len(s["recover"]) for s in SHARDS["sets"]) == 38


@pytest.mark.parametrize("case", SHARDS["odd_recover_inputs"]["cases"], ids=lambda c: c["what"])
def test_odd_shards_are_refused_unless_the_values_are_fine(case):
    if case.get("result"):
        assert case["result"] == recover_key([KeyShard.parse(s) for s in case["shards"]])
    else:
        with pytest.raises(BadRequest):
            recover_key([KeyShard.parse(s) for s in case["shards"]])


def test_field_order_is_the_curves():
    from py_ecc.optimized_bls12_381 import curve_order

    assert int(SHARDS["field_modulus_hex"], 16) == curve_order == FIELD_ORDER


def test_errors_never_repeat_the_key():
    with pytest.raises(DivaultError) as caught:
        open_stream(io.BytesIO(bytes(100)), io.BytesIO(), [source_of("very secret words")])

    assert "secret" not in str(caught.value) + repr(caught.value.data)


def test_without_a_caller_key_it_is_a_wrong_key_and_says_what_to_send():
    with pytest.raises(WrongKey, match="decryption_key"):
        open_stream(io.BytesIO(bytes(100)), io.BytesIO(), [NodeIdentity(Identity.generate())])
