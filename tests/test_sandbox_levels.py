"""Confinement, mechanism by mechanism: what is refused, what still works, a report that tells when one is missing."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from divault import app
from divault.errors import SettingsInvalid
from divault.settings import Settings
from divault.workers.confinement import Confinement
from divault.workers.libraries import library_paths
from divault.workers.pool import WorkerPool
from divault.workers.sandbox import CHECKS, STANDARD, level_of, missing_for
from divault.workers.selfcheck import namespaces_here

HEAD = """
import ctypes, errno, fcntl, json, os, socket, sys, threading
from divault.workers.sandbox import Policy, confine
settings = json.loads(sys.argv[1])
kept, model = os.open("/etc/hostname", os.O_RDONLY), os.memfd_create("model", os.MFD_ALLOW_SEALING)
os.write(model, b"weights")
fcntl.fcntl(model, fcntl.F_ADD_SEALS, 15)
line, far = socket.socketpair()
if settings.get("user"):
    os.setgroups([]); os.setresgid(*[settings["user"]] * 3); os.setresuid(*[settings["user"]] * 3)
checks = confine(Policy(
    level="standard", keep=(kept, model, line.fileno(), far.fileno()),
    environment=frozenset({"PATH", "LANG", "LC_CTYPE"}), address_space=4 << 30, data=1 << 30,
    canary=settings["canary"], namespaces=settings["namespaces"],
    leave_out=frozenset(settings.get("leave_out", ())),
))
"""
REPORT = HEAD + "print(json.dumps(checks))"


@pytest.fixture
def canary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = Confinement("standard")
    yield str(folder._canary)
    folder.close()


def environment() -> dict[str, str]:
    """Of such a process."""
    return {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONPATH": str(Path(app.__file__).parent.parent)}


def confined(script: str, canary: str, **settings: Any) -> Any:
    told = json.dumps({"canary": canary, "namespaces": namespaces_here(), **settings})
    done = subprocess.run(
        [sys.executable, "-c", script, told],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_everything_of_the_level_standard_is_enforced(canary: str) -> None:
    checks = confined(REPORT, canary)

    assert {name for name in STANDARD if checks[name] != "enforced"} == set()
    assert level_of(checks, "standard") == level_of(checks, "strict") == "standard"
    assert set(checks) == set(CHECKS)


def test_an_unprivileged_user_is_confined_as_well(canary: str) -> None:
    user = 54321 if os.getuid() == 0 else 0  # whoever is no root already stays who he is
    checks = confined(REPORT, canary, user=user)

    assert level_of(checks, "standard") == "standard", {k: v for k, v in checks.items() if v != "enforced"}


@pytest.mark.parametrize(
    ("mechanism", "shows"),
    [
        ("landlock", {"fs_read", "fs_write", "proc"}),
        ("seccomp", {"net_udp", "unix", "spawn"}),
        ("limits", {"mem_limit", "no_core_dump", "no_file_growth"}),
    ],
)
def test_a_mechanism_that_is_left_out_shows_in_the_report(canary: str, mechanism: str, shows: set[str]) -> None:
    checks = confined(REPORT, canary, leave_out=[mechanism])

    missing = {name for name in STANDARD if checks[name] != "enforced"}
    # As root and with all rights gone, a folder of root's may still keep the worker from writing.
    assert shows - {"fs_write", "proc"} <= missing
    assert level_of(checks, "standard") == "partial"


@pytest.mark.parametrize(("uid", "level"), [(0, "strict"), (1000, "standard")])
def test_a_node_that_is_not_root_is_strict_with_a_limit_on_threads_alone(
    uid: int, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root is held to none by the kernel; that is told, and keeps nobody from the rest."""
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    every = dict.fromkeys(CHECKS, "enforced")

    assert level_of(every, "strict") == "strict"
    assert level_of(every | {"proc_limit": "not_enforced"}, "strict") == level
    assert ("proc_limit" in missing_for("strict", {})) is (uid != 0)


def test_what_was_not_tried_is_not_claimed(canary: str) -> None:
    checks = confined(REPORT, "/nowhere/at/all")

    assert checks["fs_read"] == "unknown"  # a file that is not there is not refused
    assert level_of({}, "strict") == level_of(dict.fromkeys(CHECKS, "unknown"), "strict") == "partial"
    assert level_of(dict.fromkeys(CHECKS, "enforced"), "off") == "off"


# --- single acts ----------------------------------------------------------------------------------------------------

ACTS = {
    "chmod by path": "os.chmod('/etc/hostname', 0o644)",
    "fchmod on a descriptor opened for reading": "os.fchmod(kept, 0o644)",
    "chown": "os.fchown(kept, -1, -1)",
    "utime": "os.utime('/etc/hostname')",
    "extended attributes": "os.setxattr(kept, 'user.x', b'1')",
    "a lock on somebody's file": "fcntl.flock(kept, fcntl.LOCK_SH)",
    "a lease": "fcntl.fcntl(kept, 1024, 0)",
    "an owner for signals": "fcntl.fcntl(kept, 8, os.getppid())",
    "pinning the gateway to a core": "os.sched_setaffinity(os.getppid(), {0})",
    "limits of the gateway": "call(302, os.getppid(), 7, None, ctypes.create_string_buffer(16))",
    "a signal to the gateway": "os.kill(os.getppid(), 0)",
    "a signal to a thread of another process": "call(234, os.getppid(), os.getppid(), 0)",
    "memory outside the limits": "os.memfd_create('x')",
    "shared memory": "call(29, 0, 4096, 0o1600)",
    "user faults": "call(323, 0)",
    "io_uring": "call(425, 1, ctypes.create_string_buffer(120))",
    "the kernel's keys": "call(250, 0, 0, 0, 0, 0)",
    "bpf": "call(321, 0, None, 0)",
    "perf events": "call(298, None, 0, -1, -1, 0)",
    "another filter": "call(317, 0, 0, None)",
    "namespaces": "call(272, 0x10000000)",
    "mounting": "call(165, b'x', b'/', b'tmpfs', 0, None)",
    "chroot": "os.chroot('/')",
    "another user": "os.setuid(1)",
    "personality": "call(135, 0x0040000)",
    "reading another's memory": "call(310, os.getppid(), None, 0, None, 0, 0)",
    "ptrace": "call(101, 0x4206, os.getppid(), None, None)",
    "running a program": "os.execv('/bin/true', ['true'])",
    "a child": "os.fork()",
    "a TCP socket": "socket.socket()",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "a pair of sockets": "socket.socketpair()",
    "a file in a temporary folder": "os.open('/tmp/x', os.O_CREAT | os.O_WRONLY)",
    "a folder": "os.mkdir('/tmp/divault-x')",
    "a link": "os.symlink('/etc/hostname', '/tmp/divault-x')",
    "the list of a folder": "os.listdir('/etc')",
    "the passwords": "os.open('/etc/shadow', os.O_RDONLY)",
    "the host's sockets": "os.open('/proc/self/net/tcp', os.O_RDONLY)",
    "its own environment as it was started": "os.open('/proc/self/environ', os.O_RDONLY)",
    "a device": "os.open('/dev/tty', os.O_RDONLY)",
}
WORKS = {
    "threads": "t = threading.Thread(target=lambda: None); t.start(); t.join()",
    "libraries": "import decimal, zipfile, sqlite3",
    "its model's descriptor": "os.pread(model, 10, 0); open(f'/proc/self/fd/{model}').close()",
    "memory": "bytearray(100 << 20)",
    "its own memory map": "open('/proc/self/maps').read()",
    "the machine's cores": "os.sched_getaffinity(0); open('/proc/cpuinfo').read()",
    "randomness": "os.urandom(8); open('/dev/urandom', 'rb').read(1)",
    "clocks": "import time; time.sleep(0.001); time.clock_gettime(time.CLOCK_MONOTONIC)",
}
TRY = (
    HEAD
    + """
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    if libc.syscall(*arguments) < 0: raise OSError(ctypes.get_errno(), "refused")
found = {}
for name, act in settings["acts"].items():
    try:
        exec(act)
        found[name] = "done"
    except OSError as err:
        found[name] = errno.errorcode[err.errno]
print(json.dumps(found))
"""
)


def test_what_a_worker_must_not_do_is_refused_by_the_kernel(canary: str) -> None:
    found = confined(TRY, canary, acts=ACTS)

    assert {name: how for name, how in found.items() if how not in ("EPERM", "EACCES")} == {}
    assert len(found) == len(ACTS)


def test_what_a_worker_needs_works(canary: str) -> None:
    found = confined(TRY, canary, acts=WORKS)

    assert {name: how for name, how in found.items() if how != "done"} == {}


def test_the_calls_of_another_architecture_end_the_process(canary: str) -> None:
    told = json.dumps({"canary": canary, "namespaces": {}})
    script = f"{HEAD}\nctypes.CDLL(None).syscall(0x40000000 + 39)"
    environment = {"PATH": os.defpath, "PYTHONPATH": str(Path(app.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", script, told], env=environment, timeout=30, check=False)

    assert done.returncode == -31  # SIGSYS


def test_libraries_are_all_that_can_be_read() -> None:
    paths = library_paths()

    assert all(Path(path).exists() for path in paths)
    assert not any(str(Path.home()) == path or path in ("/", "/etc", "/root", "/home", "/tmp") for path in paths)


# --- the node -------------------------------------------------------------------------------------------------------


def node_pool(level: Any, *, allow_code: bool = False) -> WorkerPool:
    confinement = Confinement(level, allow_code=allow_code)
    return WorkerPool(predict_timeout_s=5, load_timeout_s=20, confinement=confinement)


async def start(monkeypatch: pytest.MonkeyPatch, path: str | None = None, **settings: str) -> str:
    """What the node makes of its settings at the start: the level. Raises SettingsInvalid."""
    chosen = Settings.load({"VAULT_CONTRACT_ADDRESS": "0x" + "11" * 20, **settings}, env_file=None)
    with monkeypatch.context() as patched:
        if path is not None:
            patched.setenv("PATH", path)
        pool = node_pool(chosen.divault_sandbox, allow_code=chosen.divault_allow_code_models)
    try:
        await app.require_sandbox(chosen, pool)
        return pool.sandbox_level
    finally:
        await pool.close()


async def test_auto_takes_the_best_that_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    best = "strict" if _namespaces_work() else "standard"

    assert await start(monkeypatch) == best
    assert await start(monkeypatch, path="/nowhere") == "standard"
    assert await start(monkeypatch, DIVAULT_SANDBOX="standard") == "standard"
    assert await start(monkeypatch, DIVAULT_SANDBOX="off") == "off"


async def test_a_level_that_is_not_reached_refuses_to_start_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsInvalid, match="bwrap is not installed") as caught:
        await start(monkeypatch, path="/nowhere", DIVAULT_SANDBOX="strict")
    assert caught.value.data["setting"] == "DIVAULT_SANDBOX"

    downgraded = {"DIVAULT_SANDBOX": "strict", "DIVAULT_SANDBOX_ALLOW_DOWNGRADE": "1"}
    assert await start(monkeypatch, path="/nowhere", **downgraded) == "standard"


async def test_without_namespaces_as_in_a_container_standard_is_reached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """There bwrap is installed and fails, as it does under a container's own filter."""
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    path = f"{tmp_path}:{os.defpath}"

    assert await start(monkeypatch, path=path) == "standard"
    with pytest.raises(SettingsInvalid, match="DIVAULT_SANDBOX=strict"):
        await start(monkeypatch, path=path, DIVAULT_SANDBOX="strict")


@pytest.mark.parametrize(
    ("setting", "place"),
    [
        ("DIVAULT_STATE_DIR", "state"),
        ("DIVAULT_NODE_KEY_FILE", "node.key"),
        ("DIVAULT_AGE_IDENTITY_FILE", "lib/../age.key"),
        ("MODEL_CACHE_DIR", "cache"),
        ("DIVAULT_LOG_DIR", "logs"),
    ],
)
def test_what_a_node_keeps_may_not_lie_where_models_read_libraries(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str, place: str
) -> None:
    """Landlock opens these folders whole, and the key files' modes keep nobody out who is the same user."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "way").symlink_to(sys.prefix)
    for folder in (sys.prefix, "/usr/local", str(tmp_path / "way")):
        with pytest.raises(SettingsInvalid, match=setting) as caught:
            app.Identities.of(Settings.load({setting: f"{folder}/{place}"}, env_file=None))
        assert caught.value.data["setting"] == setting
        assert [path.name for path in tmp_path.iterdir()] == ["way"], "not a key was written"

    assert app.Identities.of(Settings.load({setting: str(tmp_path / place)}, env_file=None)).address


async def test_code_needs_workers_that_are_confined(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await start(monkeypatch, DIVAULT_ALLOW_CODE_MODELS="1") in ("standard", "strict")
    with pytest.raises(SettingsInvalid, match="DIVAULT_ALLOW_CODE_MODELS"):
        await start(monkeypatch, DIVAULT_ALLOW_CODE_MODELS="1", DIVAULT_SANDBOX="off")


async def test_a_strict_worker_sees_neither_the_node_nor_its_files() -> None:
    if not _namespaces_work():
        return  # the tests above say what the node does then
    pool = node_pool("strict")
    try:
        assert await pool.prove_sandbox() == "strict"
        checks = pool.sandbox_report()["checks"]
    finally:
        await pool.close()

    counted = set() if _threads_are_counted_in_namespaces() else {"proc_limit"}
    assert {name for name, verdict in checks.items() if verdict != "enforced"} == {"own_user", *counted}


def _threads_are_counted_in_namespaces() -> bool:
    """What the kernel itself does there: who is root outside is held to no such limit."""
    limit = "import os, resource; resource.setrlimit(resource.RLIMIT_NPROC, (0, 0)); os.fork()"
    around = ("bwrap", "--unshare-all", "--uid", "65534", "--gid", "65534", "--ro-bind", "/", "/")
    return subprocess.run([*around, sys.executable, "-c", limit], capture_output=True, check=False).returncode != 0


def _namespaces_work() -> bool:
    bwrap = shutil.which("bwrap")
    trial = [bwrap or "", "--unshare-all", "--ro-bind", "/", "/", "/bin/true"]
    return bwrap is not None and subprocess.run(trial, capture_output=True, check=False).returncode == 0


async def test_a_pool_leaves_no_canary_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pool = node_pool("standard")
    assert len(list(tmp_path.glob("divault-canary-*"))) == 1
    await pool.close()
    await asyncio.sleep(0)

    assert list(tmp_path.iterdir()) == []
