"""Cores and memory as control groups allow them: files as the kernel writes them, of both versions, nested, absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from divault.machine import cores, memory_bytes
from divault.settings import Settings

MIB = 1 << 20
V2 = "0::/system.slice/divault.service\n"
V1 = "9:name=systemd:/x\n4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/\n"


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


def machine(folder: Path, groups: str | None, **files: str) -> Path:
    """A root folder with these files of control groups."""
    (folder / "proc/self").mkdir(parents=True)
    if groups is not None:
        (folder / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = folder / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (V2, {"system.slice/divault.service/cpu.max": "250000 100000\n"}, 2),
        (V2, {"system.slice/divault.service/cpu.max": "max 100000\n"}, 8),
        (V2, {"system.slice/divault.service/cpu.max": "max 100000\n", "system.slice/cpu.max": "300000 100000\n"}, 3),
        (V2, {"cpu.max": "50000 100000\n"}, 1),  # half a core is one thread
        (V2, {"cpu.max": "6400000 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "400000 100000\n"}, 4),  # a container with a namespace of its own
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "200000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 2),
        (V1, {"cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "5\n"}, 8),
        (V1, {}, 8),
        (None, {}, 8),
        (V2, {"cpu.max": "\n"}, 8),
        (V2, {"cpu.max": "100000 0\n"}, 8),
        ("0::/user.slice/b\xfcro\x0b:x\n", {"user.slice/b\xfcro\x0b:x/cpu.max": "200000 100000\n"}, 2),
        ("no line\n0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("2:cpuacct,cpu:/\n", {"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)
def test_cores(tmp_path: Path, groups: str | None, files: dict[str, str], expected: int) -> None:
    assert cores(machine(tmp_path, groups, **files)) == expected


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (V2, {"system.slice/divault.service/memory.max": f"{64 * MIB}\n"}, 64 * MIB),
        (V2, {"memory.max": "max\n", "system.slice/memory.max": f"{32 * MIB}\n"}, 32 * MIB),
        (V1, {"memory/memory.limit_in_bytes": f"{16 * MIB}\n"}, 16 * MIB),
        (V1, {"memory/docker/abc/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        (V2, {"memory.max": "max\n"}, None),
        (None, {}, None),
    ],
)
def test_memory(tmp_path: Path, groups: str | None, files: dict[str, str], expected: int | None) -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_bytes(machine(tmp_path, groups, **files)) == (whole if expected is None else expected)


def test_the_budget_of_models_is_a_part_of_it() -> None:
    assert Settings.load({}, env_file=None).model_memory_bytes == memory_bytes() * 4 // 5
