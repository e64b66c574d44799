"""Every case of `vectors/ipfs`: the outcome, and the class of the refusal."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from divault.errors import ContentInvalid, InvalidCID, MissingBlock
from divault.ipfs.car import CarReader, car_header, car_section
from divault.ipfs.cid import cid_bytes, parse_cid, parse_cid_bytes
from divault.ipfs.dagpb import decode_node
from divault.ipfs.importer import UNIXFS_V0_2015, UNIXFS_V1_2025, Importer, Profile
from divault.ipfs.limits import Limits
from divault.ipfs.verifier import CarStream, Verifier
from divault.ipfs.walk import file_bytes, file_size, raw_cid, walk
from tests.test_fetch_faults import SCENARIOS
from divault.storage.folders import read_folder
from tests.vectors_root import vectors_root

FOLDER = vectors_root() / "ipfs"
VECTORS: dict[str, Any] = json.loads((FOLDER / "vectors.json").read_text(encoding="utf-8"))
ASSUMED = VECTORS["limits_assumed"]
LIMIT_NAMES = {
    "max_block": "max_block_bytes",
    "max_depth": "max_depth",
    "max_size": "max_size_bytes",
    "max_nodes": "max_visits",
    "max_header": "max_car_header_bytes",
    "max_links": "max_links",
    "max_extra_bytes": "max_extra_bytes",
    "max_entries": "max_entries",
}


class MemoryOutput:
    """Verified bytes by path."""

    def __init__(self) -> None:
        self.files: dict[str, bytearray] = {}

    def begin(self, path: str, size: int) -> None:
        self.files[path] = bytearray()

    def node(self, multihash: bytes, shell: object) -> None:
        pass

    def write(self, path: str, offset: int, data: bytes) -> None:
        file = self.files[path]
        file.extend(bytes(max(0, offset + len(data) - len(file))))
        file[offset : offset + len(data)] = data

    def read(self, path: str, offset: int, size: int) -> bytes:
        return bytes(self.files.get(path, b"")[offset : offset + size])


def car_of(case: dict[str, Any]) -> bytes:
    data = (FOLDER / case["file"]).read_bytes()
    return gzip.decompress(data) if case.get("gzip") else data


def limits_of(case: dict[str, Any]) -> Limits:
    asked = ASSUMED | (case.get("limits") or {})
    return replace(Limits(), **{LIMIT_NAMES[name]: value for name, value in asked.items()})


def whole(data: bytes) -> Iterable[bytes]:
    return [data]


def random_pieces(data: bytes) -> Iterator[bytes]:
    chance, at = random.Random(1), 0
    while at < len(data):
        size = chance.choice((1, 2, 7, 100, 1500, 65536))
        yield data[at : at + size]
        at += size


def single_bytes(data: bytes) -> Iterable[bytes]:
    return (data[i : i + 1] for i in range(len(data))) if len(data) < 65536 else [data]


def described(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def outcome(case: dict[str, Any], pieces: Iterable[bytes]) -> dict[str, Any] | str:
    """What came out, as `expect` spells it, or the names of the error's class and its parents."""
    output = MemoryOutput()
    try:
        verifier = Verifier(parse_cid(case["root"]), output, limits_of(case), directory=case["op"] == "dir")
        stream = CarStream(verifier)
        for piece in pieces:
            stream.feed(piece)
        stream.finish()
        verifier.finish()
    except ContentInvalid as err:
        return type(err).__name__
    files = {path: bytes(data) for path, data in output.files.items()}
    assert verifier.complete
    assert verifier.files == {path: len(data) for path, data in files.items()}
    if case["op"] == "dir":
        return {"entries": {path: described(data) for path, data in files.items()}}
    return described(files[""])


@pytest.mark.parametrize("split", [whole, random_pieces, single_bytes])
@pytest.mark.parametrize("case", VECTORS["car"], ids=lambda case: case["id"])
def test_car_has_the_expected_outcome(case: dict[str, Any], split: Callable[[bytes], Iterable[bytes]]) -> None:
    expect = case["expect"]

    have = outcome(case, split(car_of(case)))

    if isinstance(have, str):
        assert have in expect.get("error_any_of", []) + (case.get("alt_errors") or []), case["note"]
    else:
        assert have in (expect, case.get("alt_ok"))


@pytest.mark.parametrize("case", VECTORS["dag_pb"], ids=lambda case: case["id"])
def test_dag_pb_node_is_read_as_its_codec_fixture_says(case: dict[str, Any]) -> None:
    block, expect = bytes.fromhex(case["hex"]), case["expect"]
    if "error" in expect:
        with pytest.raises(ContentInvalid) as caught:
            decode_node(block)

        assert type(caught.value).__name__ == expect["error"]
        return

    node = decode_node(block)

    links = [(parse_cid_bytes(raw_cid(link.cid)).text, link.name, link.tsize) for link in node.links]
    data = None if node.data is None else block[node.data[0] : node.data[1]].hex()
    assert expect["data_hex"] == data
    assert [
        (e["hash"], None if e["name"] is None else e["name"].encode(), e["tsize"]) for e in expect["links"]
    ] == links


@pytest.mark.parametrize("case", VECTORS["cid_strings"], ids=lambda case: case.get("name") or case["cid"][:12])
def test_cid_text_is_read_strictly(case: dict[str, Any]) -> None:
    expect = case["expect"]
    if "error" in expect:
        with pytest.raises(InvalidCID):
            parse_cid(case["cid"])
        return

    cid = parse_cid(case["cid"])

    have = {"version": cid.version, "codec": cid.codec, "hash_code": cid.hash_code, "digest_hex": cid.digest.hex()}
    assert expect == have
    assert parse_cid_bytes(cid_bytes(cid)) == parse_cid(parse_cid_bytes(cid_bytes(cid)).text)


def partly_verified(case: dict[str, Any]) -> tuple[Verifier, MemoryOutput, bool]:
    """After the partial CAR: the verifier, its output, and whether the range is there in full.

    Three of the recorded answers lack leaves of their range: that gateway loses its way in nested nodes.
    """
    output = MemoryOutput()
    verifier = Verifier(parse_cid(case["root"]), output, Limits())
    stream = CarStream(verifier)
    for piece in random_pieces(car_of(case)):
        stream.feed(piece)
    stream.finish()
    first, end = case["from"], case["to"] + 1
    gaps = [want for want in verifier.missing() if want.offset < end and first < want.offset + (want.size or 0)]
    return verifier, output, not gaps


def full_car(case: dict[str, Any]) -> bytes:
    (source,) = [car for car in VECTORS["car"] if car["root"] == case["root"]]
    return car_of(source)


@pytest.mark.parametrize("case", VECTORS["ranges"], ids=lambda case: case["id"])
def test_partial_car_gives_its_range_or_says_what_is_missing(case: dict[str, Any]) -> None:
    verifier, output, covered = partly_verified(case)
    if not covered:
        with pytest.raises(MissingBlock):
            verifier.finish()
        CarStream(verifier).feed(full_car(case))

    have = output.read("", case["from"], case["to"] + 1 - case["from"])

    assert verifier.size == case["total"]
    assert case["expect"] == described(have)
    assert verifier.complete is not covered


@pytest.mark.parametrize("case", VECTORS["ranges"], ids=lambda case: case["id"])
def test_our_partial_car_is_the_reference_gateways_byte_for_byte(case: dict[str, Any]) -> None:
    root, ranges = parse_cid(case["root"]), [range(case["from"], case["to"] + 1)]
    blocks = {section.cid.multihash: bytes(section.data) for section in CarReader().feed(full_car(case))}

    have = car_header([cid_bytes(root)]) + b"".join(
        car_section(raw_cid(piece.cid), piece.block) for piece in walk(root, blocks.__getitem__, ranges)
    )

    _, _, covered = partly_verified(case)
    assert (car_of(case) == have) is covered
    assert case["expect"] == described(b"".join(file_bytes(root, blocks.__getitem__, ranges)))
    assert case["total"] == file_size(root, blocks.__getitem__)


def profile_of(params: dict[str, Any]) -> Profile | None:
    """The importer's options as one of our profiles; None for layouts that we only read."""
    if "profile" in params:
        return {profile.name: profile for profile in (UNIXFS_V1_2025, UNIXFS_V0_2015)}[params["profile"]]
    reads_only = {"leafType", "reduceSingleLeafToSelf", "repeat", "mode", "mtime", "shardSplitThresholdBytes"}
    if params.get("layout") == "trickle" or reads_only & params.keys():
        return None
    chunk = params.get("chunk", 1024 * 1024)
    return Profile(
        "vector", params["cidVersion"], chunk, raw_leaves=params["rawLeaves"], width=params.get("width", 1024)
    )


IMPORTED = [
    case
    for case in VECTORS["car"]
    if case["op"] == "file" and case.get("params") and profile_of(case["params"]) and case["id"] != "mode-mtime"
]


@pytest.mark.parametrize("case", IMPORTED, ids=lambda case: case["id"])
def test_importer_builds_the_reference_importers_root(case: dict[str, Any]) -> None:
    output, profile, blocks = MemoryOutput(), profile_of(case["params"]), {}
    verifier = Verifier(parse_cid(case["root"]), output, limits_of(case))
    CarStream(verifier).feed(car_of(case))
    assert profile is not None
    importer = Importer([profile], emit=lambda block: blocks.update({block.cid: bytes(block.data)}))
    for piece in random_pieces(bytes(output.files.get("", b""))):
        importer.update(piece)

    root = importer.finish()[profile]

    assert case["root"] == str(root)
    sections = {raw_cid(section.cid): bytes(section.data) for section in CarReader().feed(car_of(case))}
    assert sections == blocks


@pytest.mark.parametrize("case", VECTORS["http_scenarios"], ids=lambda case: case["id"])
async def test_http_scenario_ends_as_described(case: dict[str, Any], tmp_path: Path) -> None:
    await SCENARIOS[case["id"]](tmp_path)


def test_every_group_of_the_vectors_is_read(vectors_dir: Path) -> None:
    assert vectors_dir / "ipfs" == FOLDER
    assert all(VECTORS[group] for group in ("car", "ranges", "dag_pb", "cid_strings", "http_scenarios"))


FOLDERS = [case for case in VECTORS["car"] if case["op"] == "dir"]
ABOUT_FILES = {"HashMismatch", "Truncated", "MissingBlock", "CarMalformed", "SizeExceeded", "TooManyExtraBytes"}


@pytest.mark.parametrize("case", FOLDERS, ids=lambda case: case["id"])
def test_a_listing_names_what_a_full_reading_finds(case: dict[str, Any]) -> None:
    """Names, shards and limits are judged alike, whether the files' bytes are wanted or not."""
    expect = case["expect"]
    try:
        found: set[str] | str = {
            name for name, _ in read_folder(parse_cid(case["root"]), car_of(case), limits_of(case)).files
        }
    except ContentInvalid as err:
        found = type(err).__name__

    if "entries" in expect:
        assert found == set(expect["entries"])
    elif isinstance(found, str):
        assert found in expect["error_any_of"] + (case.get("alt_errors") or [])
    else:
        assert set(expect["error_any_of"]) <= ABOUT_FILES | {"UnixFSInvalid", "BlockTooLarge"}
