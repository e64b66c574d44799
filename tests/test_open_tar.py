"""The tar inside a seal: plain files with safe names, and nothing else."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from divault.errors import UnsupportedModel
from divault.vault.archive import MAX_ENTRIES, MAX_FILES, Member, is_tar, list_members
from tests.sealed_models import tar_of


def listed(data: bytes) -> list[Member]:
    return list_members(lambda offset, count: data[offset : offset + count], len(data))


def refusal(data: bytes) -> str:
    with pytest.raises(UnsupportedModel) as caught:
        listed(data)
    return caught.value.data["seen"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_sees(form):
    files = {"config.json": b"{}", "a/" + "x" * 60 + "/" + "y" * 90 + "/w.bin": os.urandom(5000), "empty": b""}
    if form != tarfile.USTAR_FORMAT:
        files["größe/名.txt"] = b"names"
        files["n" * 190] = b"long"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5
            archive.addfile(info, io.BytesIO(data))
    data = out.getvalue()

    assert files == {m.name: data[m.offset : m.offset + m.size] for m in listed(data)}


def test_folder_packed_by_the_tar_command(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "sub" / "w.bin").write_bytes(b"w" * 3000)
    data = subprocess.run(["tar", "-C", tmp_path, "-cf", "-", "."], check=True, capture_output=True).stdout

    assert {"config.json", "sub/w.bin"} == {m.name for m in listed(data)}
    assert is_tar(data)


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/../x",
        "a/..",
        "..",
        "/etc/passwd",
        "//x",
        "a//b",
        "a/./b",
        "././a",
        "a\\b",
        "C:\\x",
        "a\nb",
        "a\x1b[2J",
        "a\u202eb",
        "a\u200bb",
        "",
        "x" * 201,
        "é" * 101,
    ],
)
def test_unsafe_name_is_refused_and_the_nearest_safe_one_is_not(name):
    assert refusal(tar_of([("ok", b"1"), (name, b"2")])) in {
        "tar with an unsafe name",
        "tar with a name over 200 bytes",
    }
    assert [m.name for m in listed(tar_of([("..x", b""), ("a/.b", b""), ("x" * 200, b"")]))] == [
        "..x",
        "a/.b",
        "x" * 200,
    ]


@pytest.mark.parametrize(
    ("kind", "seen"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a pipe"),
        (tarfile.CONTTYPE, "an entry of an unknown type"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file"),
        (b"M", "an entry of an unknown type"),
    ],
)
def test_everything_but_files_and_folders_is_refused(kind, seen):
    def spoil(info: tarfile.TarInfo) -> None:
        if info.name == "bad":
            info.type, info.linkname, info.size = kind, "/etc/passwd", 0

    assert f"tar with {seen}" == refusal(tar_of([("ok", b"1"), ("bad", b"")], change=spoil))


@pytest.mark.parametrize(
    "names", [("a", "a"), ("Model.bin", "model.BIN"), ("straße", "STRASSE"), ("é", "e\u0301"), ("./a", "a")]
)
def test_two_files_of_one_name_are_refused(names):
    assert refusal(tar_of([(n, b"1") for n in names])) == "tar with two files of one name"


def test_file_that_is_also_a_folder_is_refused():
    assert refusal(tar_of([("a", b"1"), ("A/b", b"2")])) == "tar with a file that is also a folder"
    assert len(listed(tar_of([("a", b"1"), ("ab/b", b"2")]))) == 2


def test_number_of_files_and_entries_is_bounded():
    assert len(listed(tar_of([(str(n), b"") for n in range(MAX_FILES)]))) == MAX_FILES
    assert refusal(tar_of([(str(n), b"") for n in range(MAX_FILES + 1)])) == f"tar with more than {MAX_FILES} files"

    def folder(info: tarfile.TarInfo) -> None:
        info.type = tarfile.DIRTYPE

    folders = tar_of([(str(n), b"") for n in range(MAX_ENTRIES + 1)], change=folder)
    assert refusal(folders) == f"tar with more than {MAX_ENTRIES} entries"
    assert refusal(tar_of([("d", b"")], change=folder)) == "tar with no file at all"


def test_damage_in_the_middle_is_not_the_end():
    good = tar_of([("a", b"1"), ("b", b"2"), ("c", b"3")])
    second = good.index(b"b\0")
    for position in (second, second + 150, second + 257, second + 124):
        spoilt = bytearray(good)
        spoilt[position] ^= 0x01
        assert refusal(bytes(spoilt)) == "tar with a damaged header, or no end"


def test_cut_and_extended_archives_are_refused():
    good = tar_of([("a", b"x" * 600)])
    assert [Member("a", 512, 600)] == listed(good[: 512 + 1024 + 1024])

    for data in (
        good[:512],
        good[:1000],
        good[: 512 + 1024],
        good[: 512 + 1024 + 512],
        good + b"x",
        good + bytes(2 << 20),
    ):
        refusal(data)


def test_size_beyond_the_archive_and_negative_size_are_refused():
    def sized(field: bytes) -> bytes:
        data = bytearray(tar_of([("a", b"x" * 600)]))
        data[124:136] = field
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
        return bytes(data)

    assert [Member("a", 512, 600)] == listed(sized(b"\x80" + (600).to_bytes(11, "big")))
    for field in (
        b"\xff" * 12,
        b"\x80" + b"\xff" * 11,
        b"77777777777\0",
        b"-0000000001\0",
        b"0000 000000\0",
        b"\0" * 12,
    ):
        refusal(sized(field))


def pax(records: bytes) -> bytes:
    """An archive whose only file is preceded by this extended header."""
    plain = tar_of([("a", b"x" * 600)])
    header = tarfile.TarInfo("h")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    return header.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512) + plain


@pytest.mark.parametrize(
    "records",
    [
        b"11 path=../",
        b"12 path=../\n",
        b"11 path=/x\n",
        b"16 size=9999999\n",
        b"12 size=-60\n",
        b"13 size=1e10\n",
        b"9 path=b\n9 path=c\n",
        b"99 path=b\n",
        b"0 path=b\n",
        b"4 a=\n",
        b"junk",
        b"25 GNU.sparse.major=1\n\n",
        b"22 GNU.sparse.major=1\n",
        b"9 path=\xff\n",
    ],
)
def test_extended_headers_are_held_to_the_same_rules(records):
    refusal(pax(records))


def test_extended_header_may_name_the_file():
    assert [m.name for m in listed(pax(b"9 path=b\n"))] == ["b"]
    assert [m.name for m in listed(pax(b"20 comment=hi there\n"))] == ["a"]


def test_global_header_may_not_rename_everything():
    def with_global(records: bytes) -> bytes:
        header = tarfile.TarInfo("g")
        header.type, header.size = tarfile.XGLTYPE, len(records)
        return header.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512) + tar_of([("a", b"1")])

    assert refusal(with_global(b"9 path=b\n")) == "tar with a name or size for all entries"
    assert [m.name for m in listed(with_global(b"20 comment=hi there\n"))] == ["a"]


def test_content_that_only_looks_like_tar_is_none():
    assert not is_tar(b"")
    assert not is_tar(bytes(512))
    assert not is_tar(bytes(257) + b"ustar" + bytes(250))
    assert not is_tar(tar_of([("a", b"1")])[:511])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_change_gives_members_inside_the_archive_or_a_typed_refusal(data):
    archive = bytearray(tar_of([("a", b"x" * 600), ("größe", b"y")]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(archive) - 1))
        archive[at] = data.draw(st.integers(0, 255))
    try:
        members = listed(bytes(archive))
    except UnsupportedModel:
        return

    assert all(m.offset + m.size <= len(archive) for m in members)
    assert all(".." not in m.name.split("/") and not m.name.startswith("/") for m in members)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=3000))
def test_noise_is_refused(noise):
    refusal(noise)
