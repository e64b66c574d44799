"""The age vectors: every binary and armored file gives exactly its class, and never releases more than it may."""

from __future__ import annotations

import hashlib
import io
import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from divault.errors import BadRequest, SealedFileDamaged, SealError, WrongKey
from divault.values import Secret
from divault.vault.age import Identity
from divault.vault.armor import ArmorReader
from divault.vault.keys import CallerKey, KeySource, NodeIdentity
from divault.vault.sealed import open_stream, read_preamble
from divault.vault.streams import Reader, fill
from tests.vectors_root import vectors_root

KNOWN_KEYS = {"expect", "payload", "file key", "identity", "passphrase", "armored", "compressed", "comment"}
NOTHING = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True)
class Case:
    name: str
    fields: dict[str, list[str]]
    body: bytes

    @property
    def armored(self) -> bool:
        return self.fields.get("armored") == ["yes"]

    @property
    def hybrid(self) -> bool:
        return any(i.startswith("AGE-SECRET-KEY-PQ-1") for i in self.fields.get("identity", []))

    @property
    def expect(self) -> str:
        return self.fields["expect"][0]

    def sources(self) -> list[KeySource]:
        identities = [NodeIdentity(Identity.parse(text)) for text in self.fields.get("identity", [])]
        return [*identities, *(CallerKey(Secret.of_text(text)) for text in self.fields.get("passphrase", []))]


def read_case(path: Path) -> Case:
    head, _, body = path.read_bytes().partition(b"\n\n")
    fields: dict[str, list[str]] = {}
    for line in head.decode().split("\n"):
        key, _, value = line.partition(": ")
        fields.setdefault(key, []).append(value)
    if fields.get("compressed") == ["zlib"]:
        body = zlib.decompress(body)
    return Case(path.name, fields, body)


def all_cases() -> list[Case]:
    paths = sorted(p for p in (vectors_root() / "age").iterdir() if p.name != "README.md")
    return [case for case in map(read_case, paths) if set(case.fields) <= KNOWN_KEYS]


CASES = all_cases()
SELECTED = [case for case in CASES if not case.hybrid]


def test_every_vector_is_either_run_or_hybrid():
    binary = [case for case in SELECTED if not case.armored]
    armored = [case for case in SELECTED if case.armored]
    hybrid = [case for case in CASES if case.hybrid]

    assert (len(binary), len(armored), len(hybrid)) == (92, 32, 19)


def outcome(case: Case, source: Reader) -> tuple[str, bytes]:
    """The class in the vectors' words, and everything that was released."""
    sink = io.BytesIO()
    try:
        open_stream(source, sink, case.sources())
    except WrongKey:
        return "no match", sink.getvalue()
    except SealedFileDamaged as err:
        word = {"mac": "HMAC"}.get(err.data["stage"], err.data["stage"])
        return f"{word} failure", sink.getvalue()
    return "success", sink.getvalue()


def releasable(case: Case) -> list[str]:
    """Hashes of all prefixes of chunks that authenticate in either role, shortest first: an independent reading."""
    binary = io.BytesIO(case.body)
    preamble, payload = read_preamble(ArmorReader(binary) if case.armored else binary)
    rest = bytearray(len(case.body))
    del rest[fill(payload, memoryview(rest)) :]
    file_key = bytes.fromhex(case.fields["file key"][0])
    aead = ChaCha20Poly1305(HKDF(SHA256(), 32, preamble.salt, b"payload").derive(file_key))
    prefix, hashes, counter = hashlib.sha256(), [NOTHING], 0
    while rest:
        chunk, rest = bytes(rest[:65552]), rest[65552:]
        plain = next(
            (p for last in (b"\x00", b"\x01") if (p := chunk_or_none(aead, counter, last, chunk)) is not None), None
        )
        if plain is None:
            break
        prefix.update(plain)
        hashes.append(prefix.hexdigest())
        counter += 1
    return hashes


def chunk_or_none(aead: ChaCha20Poly1305, counter: int, last: bytes, chunk: bytes) -> bytes | None:
    try:
        return aead.decrypt(counter.to_bytes(11, "big") + last, chunk, None)
    except InvalidTag:
        return None


class Dribble(io.RawIOBase):
    """A source that gives a few bytes at a time."""

    def __init__(self, data: bytes, size: int) -> None:
        self._inner = io.BytesIO(data)
        self._size = size

    def readinto(self, buffer):
        return self._inner.readinto(memoryview(buffer)[: self._size])


@pytest.mark.parametrize("case", SELECTED, ids=lambda case: case.name)
def test_vector_gives_its_class_and_no_more_than_its_plaintext(case: Case):
    expected = case.fields.get("payload", [NOTHING])[0]

    got, released = outcome(case, io.BytesIO(case.body))

    assert case.expect == got
    digest = hashlib.sha256(released).hexdigest()
    if digest != expected:
        # Our decoder knows where the file ends: it refuses a chunk in the wrong role, which others release first.
        assert got == "payload failure"
        hashes = releasable(case)
        assert hashes.index(digest) < hashes.index(expected)


@pytest.mark.parametrize("size", [1, 17, 4097])
def test_class_does_not_depend_on_the_sizes_of_reads(size: int):
    for case in SELECTED:
        if len(case.body) < 3000:
            assert (case.name, case.expect) == (case.name, outcome(case, Dribble(case.body, size))[0])


def test_hybrid_identities_are_refused_by_name_of_their_spelling():
    identities = {text for case in CASES if case.hybrid for text in case.fields["identity"] if "-PQ-" in text}

    assert identities
    for text in identities:
        with pytest.raises(BadRequest):
            Identity.parse(text)


def test_no_vector_raises_anything_but_the_errors_of_sealed_files():
    for case in CASES:
        sources = [CallerKey(Secret.of_text("x"))]
        if case.fields.get("passphrase"):
            continue  # scrypt vectors ran above; their work factors cost time
        with pytest.raises(SealError):
            open_stream(io.BytesIO(case.body), io.BytesIO(), sources)
