"""The filter of system calls as the kernel reads it, for each architecture: numbers, decisions, arguments.

The program is run by a small interpreter here, since one machine can try one architecture; the numbers are compared
with those that Linux publishes (`syscalls.txt`).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from divault.workers import seccomp
from divault.workers.syscalls import TABLES, table_here

PID = 4711
ALLOW, KILL = 0x7FFF0000, 0x80000000
EPERM, ENOSYS = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
PUBLISHED = [line.split() for line in (Path(__file__).parent / "syscalls.txt").read_text().splitlines()[1:]]
MACHINES = list(TABLES)
BOTH = pytest.mark.parametrize("machine", MACHINES)


def published(machine: str) -> dict[str, int]:
    place = {"x86_64": 1, "aarch64": 2}[machine]
    return {row[0]: int(row[place]) for row in PUBLISHED if row[place] != "-"}


def decide(rules: seccomp.Rules, machine: str, number: int, *arguments: int, arch: int | None = None) -> int:
    """What the kernel does with this call: runs the program over its `struct seccomp_data`."""
    table = TABLES[machine]
    data = {0: number, 4: table.arch if arch is None else arch}
    for place, value in enumerate([*arguments, *[0] * (6 - len(arguments))]):
        data[16 + 8 * place] = value & 0xFFFFFFFF
        data[20 + 8 * place] = value >> 32 & 0xFFFFFFFF
    return interpret(seccomp.program(PID, rules, table), data)


def interpret(code: Sequence[tuple[int, int, int, int]], data: dict[int, int]) -> int:
    at, loaded = 0, 0
    while True:
        what, if_true, if_false, constant = code[at]
        at += 1
        if what == 0x20:
            loaded = data[constant]
        elif what == 0x06:
            return constant
        else:
            holds = {
                0x15: loaded == constant,
                0x25: loaded > constant,
                0x35: loaded >= constant,
                0x45: bool(loaded & constant),
            }[what]
            at += if_true if holds else if_false


@BOTH
def test_numbers_are_those_of_the_kernel(machine: str) -> None:
    told = published(machine)

    assert {name: told.get(name) for name in TABLES[machine].numbers} == dict(TABLES[machine].numbers)


def test_the_published_numbers_are_those_of_this_machines_headers() -> None:
    """Where a compiler's headers are: the list beside this file is no invention."""
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        return
    told = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+) (\d+)", header.read_text())}

    assert {name: told.get(name) for name in published("x86_64")} == published("x86_64")


@BOTH
@pytest.mark.parametrize("rules", [seccomp.WORKER, seccomp.OPENER], ids=["worker", "opener"])
def test_what_is_on_the_list_passes_and_all_else_is_refused(machine: str, rules: seccomp.Rules) -> None:
    numbers = published(machine)
    plain = {name for name in numbers if name not in rules.filtered}
    decided = {name: decide(rules, machine, numbers[name]) for name in plain}

    assert {name for name, answer in decided.items() if answer == ALLOW} == set(rules.allowed) & set(numbers)
    assert {answer for name, answer in decided.items() if name not in rules.allowed} == {EPERM}
    assert {decide(rules, machine, number) for number in range(463, 1000)} == {EPERM}, "calls of kernels to come"


@BOTH
def test_a_name_that_an_architecture_lacks_has_another_in_its_place(machine: str) -> None:
    """What libraries do by `open` or `poll` on one machine must work by its successor on the other."""
    successors = {
        "open": "openat", "stat": "newfstatat", "lstat": "newfstatat", "access": "faccessat", "getdents": "getdents64",
        "rename": "renameat", "mkdir": "mkdirat", "rmdir": "unlinkat", "creat": "openat", "link": "linkat",
        "unlink": "unlinkat", "symlink": "symlinkat", "readlink": "readlinkat", "dup2": "dup3", "pipe": "pipe2",
        "poll": "ppoll", "select": "pselect6", "epoll_wait": "epoll_pwait", "pause": "ppoll", "alarm": "setitimer",
        "getpgrp": "getpgid", "arch_prctl": "prctl",
    }  # fmt: skip
    lacking = [name for name in seccomp.WORKER.allowed if name not in TABLES[machine].numbers]
    known = {*seccomp.WORKER.allowed, *seccomp.WORKER.filtered}

    assert {successors[name] for name in lacking} <= known & set(TABLES[machine].numbers)


@BOTH
def test_another_architecture_and_another_set_of_numbers_end_the_process(machine: str) -> None:
    (other,) = [name for name in MACHINES if name != machine]
    read = TABLES[machine].numbers["read"]

    assert decide(seccomp.WORKER, machine, read) == ALLOW
    for arch in (TABLES[other].arch, 0x40000003, 0x40000028, 0):  # i386, 32-bit ARM
        assert decide(seccomp.WORKER, machine, read, arch=arch) == KILL
    assert decide(seccomp.WORKER, machine, 0x40000000 | read) == KILL
    assert decide(seccomp.WORKER, machine, 0xFFFFFFFF) == KILL


THREAD = 0x10000 | 0x800 | 0x100
"""CLONE_THREAD, CLONE_SIGHAND, CLONE_VM."""
ARGUMENTS = [
    ("clone", (THREAD,), ALLOW),
    ("clone", (17,), EPERM),  # a process
    ("clone", (THREAD | 0x10000000,), EPERM),  # a user namespace
    ("clone", (THREAD | 0x80,), EPERM),  # a time namespace
    ("clone3", (0, 88), ENOSYS),
    ("tgkill", (PID, 1, 9), ALLOW),
    ("tgkill", (1, 1, 9), EPERM),
    ("tgkill", (0, 1, 9), EPERM),
    ("prlimit64", (0, 7), ALLOW),
    ("prlimit64", (PID, 7), ALLOW),
    ("prlimit64", (1, 7), EPERM),
    ("sched_setaffinity", (0,), ALLOW),
    ("sched_setaffinity", (1,), EPERM),
    ("prctl", (15,), ALLOW),
    ("prctl", (4, 1), EPERM),  # PR_SET_DUMPABLE
    ("prctl", (1, 0), EPERM),  # PR_SET_PDEATHSIG
    ("ioctl", (0, 0x541B), ALLOW),
    ("ioctl", (0, 0x5412), EPERM),  # TIOCSTI
    ("ioctl", (0, 0x8901), EPERM),  # FIOSETOWN
    ("fcntl", (0, 3), ALLOW),
    ("fcntl", (0, 1033), EPERM),  # F_ADD_SEALS
    ("fcntl", (0, 8), EPERM),  # F_SETOWN
    ("fcntl", (0, 10), EPERM),  # F_SETSIG
    ("fcntl", (0, 1024), EPERM),  # F_SETLEASE
    ("getsockopt", (3, 1, 3), ALLOW),
    ("getsockopt", (3, 1, 77), EPERM),  # SO_PEERPIDFD
    ("getsockopt", (3, 6, 3), EPERM),  # of TCP
    ("sendto", (3, 0, 1, 0x4000), ALLOW),  # MSG_NOSIGNAL
    ("sendto", (3, 0, 1, 0x4001), EPERM),  # MSG_OOB
    ("recvfrom", (3, 0, 1, 0x1), EPERM),
]


@BOTH
@pytest.mark.parametrize(("name", "arguments", "answer"), ARGUMENTS)
def test_what_is_allowed_in_part_is_refused_in_the_other(
    machine: str, name: str, arguments: tuple[int, ...], answer: int
) -> None:
    number = TABLES[machine].numbers[name]

    assert answer == decide(seccomp.WORKER, machine, number, *arguments)
    # The kernel takes these arguments as 32 bits: what stands above must not change the answer.
    assert answer == decide(seccomp.WORKER, machine, number, *(value | 1 << 40 for value in arguments))


def test_the_process_that_opens_files_can_name_none() -> None:
    paths = {"open", "openat", "openat2", "creat", "stat", "newfstatat", "statx", "readlink", "readlinkat", "execve"}
    for machine in MACHINES:
        numbers = published(machine)
        for name in paths & set(numbers):
            assert decide(seccomp.OPENER, machine, numbers[name]) == EPERM
        assert decide(seccomp.OPENER, machine, numbers["fcntl"], 0, 1033) == ALLOW, "it seals what it made"
        assert decide(seccomp.OPENER, machine, numbers["fcntl"], 0, 8) == EPERM


def test_this_machine_has_the_table_of_its_name() -> None:
    table = table_here()

    assert table is not None
    assert seccomp.supported()
    assert seccomp.allowed_here(seccomp.WORKER) == len(set(seccomp.WORKER.allowed) & set(table.numbers))
