"""What a publisher's machine remembers: private, durable, one at a time, and refused when damaged."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from divault.chain.wallet import SignedTransaction
from divault.errors import NotReady, SettingsInvalid
from divault.ipfs.cid import parse_cid
from divault.publishing import Publication, Publications, SealedTo, Source, Stage
from divault.values import Address, Digest, ModelId
from divault.vault.age import Identity

CID = parse_cid("bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy")
MODEL = ModelId.parse("some-model")
VAULT = Address(b"\x07" * 20)


@pytest.fixture
def sealed() -> Publication:
    nodes = (SealedTo("https://node.example", Address(b"\x01" * 20), Identity.generate().recipient),)
    return Publication(
        model=MODEL,
        chain_id=8453,
        vault=VAULT,
        source=Source("/somewhere/model.onnx", Digest(b"\x02" * 32)),
        nodes=nodes,
        owner=Identity.generate().recipient,
        size=1234,
        sha256=Digest(b"\x03" * 32),
    )


def registered(publication: Publication) -> Publication:
    return replace(
        publication, stage=Stage.REGISTERED, cid=CID, profile="unixfs-v1-2025", transaction=Digest(b"\x04" * 32)
    )


def test_every_stage_comes_back_as_it_was_saved(tmp_path: Path, sealed: Publication) -> None:
    records = Publications(tmp_path / "published")
    stored = replace(sealed, stage=Stage.STORED, cid=CID, sent=SignedTransaction(Digest(b"\x04" * 32), 7, b"\xf8raw"))

    for publication in (sealed, stored):
        records.save(publication)
        assert publication == records.unfinished(8453, VAULT, MODEL)
        assert records.find(8453, VAULT, MODEL) is None


def test_registered_publication_ends_the_unfinished_one_and_its_sealed_file(tmp_path: Path, sealed) -> None:
    records = Publications(tmp_path / "published")
    records.save(sealed)
    records.sealed_path(sealed).write_bytes(b"sealed")
    records.save(registered(sealed))

    assert registered(sealed) == records.find(8453, VAULT, MODEL)
    assert records.unfinished(8453, VAULT, MODEL) is None
    assert not records.sealed_path(sealed).exists()


def test_next_publication_leaves_the_registered_one_until_it_is_registered(tmp_path: Path, sealed) -> None:
    records = Publications(tmp_path / "published")
    records.save(registered(sealed))
    records.save(replace(sealed, size=99))

    assert registered(sealed) == records.find(8453, VAULT, MODEL)
    assert records.unfinished(8453, VAULT, MODEL).size == 99


@pytest.mark.parametrize(
    "where", [(1, VAULT, MODEL), (8453, Address(b"\x08" * 20), MODEL), (8453, VAULT, ModelId.parse("other"))]
)
def test_other_chain_vault_or_model_has_a_record_of_its_own(tmp_path: Path, sealed, where) -> None:
    records = Publications(tmp_path / "published")
    records.save(registered(sealed))

    assert records.find(*where) is None


def test_records_are_private(tmp_path: Path, sealed: Publication) -> None:
    records = Publications(tmp_path / "published")
    with records.locked(8453, VAULT, MODEL):
        records.save(sealed)

    assert stat.S_IMODE((tmp_path / "published").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "published").iterdir()} == {0o600}


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: b"",
        lambda file: file[: len(file) // 2],
        lambda file: file.replace(b'"version": 1', b'"version": 2'),
        lambda file: file.replace(b"age1", b"age2"),
        lambda file: file.replace(b'"sealed"', b'"stored"'),
        lambda file: file.replace(b"8453", b"8454"),
        lambda file: b"\xff" + file,
        lambda file: json.dumps(json.loads(file) | {"more": 1}).encode(),
    ],
    ids=["empty", "cut", "newer version", "recipient", "no cid", "another chain", "no text", "unknown field"],
)
def test_damaged_record_is_refused_by_name(tmp_path: Path, sealed: Publication, damage) -> None:
    records = Publications(tmp_path)
    records.save(sealed)
    (path,) = tmp_path.glob("*.json")
    path.write_bytes(damage(path.read_bytes()))

    with pytest.raises(SettingsInvalid, match=path.name):
        records.unfinished(8453, VAULT, MODEL)


def test_two_processes_are_kept_apart_until_the_first_one_ends(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from divault.publishing import Publications\n"
        "from divault.values import Address, ModelId\n"
        "with Publications(Path(sys.argv[1])).locked(8453, Address(b'\\x07' * 20), ModelId.parse('some-model')):\n"
        "    print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(NotReady, match="already"), Publications(tmp_path).locked(8453, VAULT, MODEL):
            pytest.fail("never both")
        with Publications(tmp_path).locked(8453, VAULT, ModelId.parse("another-model")):
            pass
        other.kill()
        other.wait()

    with Publications(tmp_path).locked(8453, VAULT, MODEL):
        pass


def test_folder_that_cannot_be_written_is_a_typed_error(tmp_path: Path, sealed: Publication) -> None:
    (tmp_path / "file").write_text("no folder")

    with pytest.raises(SettingsInvalid, match="can't be"):
        Publications(tmp_path / "file").save(sealed)
