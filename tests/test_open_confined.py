"""The process that holds a file's key can do its work and nothing else; where it could, it takes no key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import divault
from divault.errors import DivaultError, ModelFailed, TooLarge
from divault.vault.keys import NodeIdentity
from divault.workers import opening
from divault.workers.opening import Opener
from tests.sealed_models import ME, blob, contents, grant, sealed

ROOT = str(Path(divault.__file__).parent.parent)
TRY = """
import sys; sys.path.insert(0, sys.argv[1])
import ctypes, errno, fcntl, json, mmap, os, resource, signal, socket, threading
from divault.workers import opening_child
acts = json.loads(sys.argv[2])
kept, writable = os.open("/etc/hostname", os.O_RDONLY), os.memfd_create("kept")
pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
libc = ctypes.CDLL(None, use_errno=True)
def must(result):
    if result < 0: raise OSError(ctypes.get_errno(), "refused")
found = {"": opening_child.confine()}
for name, act in acts.items():
    try:
        exec(act)
        found[name] = "done"
    except OSError as err:
        found[name] = errno.errorcode[err.errno]
socket.send_fds(pair[0], [json.dumps(found).encode()], [])
os.write(1, pair[1].recv(1 << 16))
os._exit(0)
"""
REFUSED = {
    "a file": "os.open('/etc/hostname', os.O_RDONLY)",
    "a library": "os.open(os.__file__, os.O_RDONLY)",
    "its own memory": "os.open('/proc/self/mem', os.O_RDWR)",
    "a file of its parent": "os.open(f'/proc/{os.getppid()}/environ', os.O_RDONLY)",
    "a new file": "os.open('/tmp/divault-x', os.O_CREAT | os.O_WRONLY)",
    "the list of a folder": "os.listdir('/usr')",
    "whether a file is there": "os.stat('/etc/hostname')",
    "a link": "os.symlink('/etc/hostname', '/tmp/divault-x')",
    "removing": "os.unlink('/tmp/divault-none')",
    "modes": "os.fchmod(kept, 0o644)",
    "a TCP socket": "socket.socket()",
    "a UDP socket": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "a Unix socket": "socket.socket(socket.AF_UNIX)",
    "a pair of sockets": "socket.socketpair()",
    "options of its socket": "pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)",
    "descriptors from elsewhere": "pair[1].recvmsg(1, 100, socket.MSG_DONTWAIT)",
    "a child": "os.fork()",
    "a program": "os.execv('/bin/true', ['true'])",
    "a program from memory": "os.execve(writable, ['x'], {})",
    "a signal to its parent": "os.kill(os.getppid(), 0)",
    "a signal to itself": "os.kill(os.getpid(), 0)",
    "tracing": "must(libc.ptrace(0x4206, os.getppid(), None, None))",
    "reading its parent": "must(libc.process_vm_readv(os.getppid(), None, 0, None, 0, 0))",
    "another user": "os.setuid(1)",
    "dumpable again": "must(libc.prctl(4, 1, 0, 0, 0))",
    "no death signal": "must(libc.prctl(1, 0, 0, 0, 0))",
    "an owner for signals": "fcntl.fcntl(kept, fcntl.F_SETOWN, os.getppid())",
    "a lock": "fcntl.lockf(writable, fcntl.LOCK_EX)",
    "a copy of a descriptor": "os.dup(kept)",
    "a device's settings": "fcntl.ioctl(kept, 0x5401)",
    "io_uring": "must(libc.syscall(425, 1, ctypes.create_string_buffer(120)))",
    "more descriptors": "must(libc.prlimit(0, resource.RLIMIT_NOFILE, (ctypes.c_uint64 * 2)(4096, 4096), None))",
    "limits of its parent": "resource.prlimit(os.getppid(), resource.RLIMIT_CORE)",
}
WORKS = {
    "reading what it was given": "os.preadv(kept, [memoryview(bytearray(8))], 0); os.pread(kept, 8, 0)",
    "a sealed memory file": "f = opening_child.MemoryFile(); f.write(memoryview(b'x')); f.seal()",
    "threads": "t = threading.Thread(target=lambda: None); t.start(); t.join()",
    "memory": "bytearray(100 << 20)",
    "a lower limit": "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))",
}


def confined(acts: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", TRY, ROOT, json.dumps(acts)],
        env={"PATH": os.defpath, "LANG": "C.UTF-8"},
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_it_can_reach_neither_files_nor_network_nor_processes() -> None:
    found = confined(REFUSED)

    assert found.pop("") == [], "its own check says the same"
    assert {name: how for name, how in found.items() if how not in ("EPERM", "EACCES")} == {}
    assert len(found) == len(REFUSED)


def test_it_can_do_its_work() -> None:
    found = confined(WORKS)

    assert {name: how for name, how in found.items() if name and how != "done"} == {}


WITHOUT = """
import os, socket, sys
sys.path.insert(0, sys.argv[1])
from divault.workers import landlock, opening_child, seccomp
class Wary(socket.socket):
    def recv(self, *arguments):
        os._exit(9)  # it took the key
socket.socket = Wary
{without}
opening_child.main()
"""
SAYS = """
import sys
sys.path.insert(0, sys.argv[1])
from divault.workers import opening_child
opening_child._open = lambda *_: (_ for _ in ()).throw(opening_child.{error})
opening_child.main()
"""
NO_FILTER = "seccomp.install = lambda rules: None"


@pytest.mark.parametrize(
    ("without", "passed"),
    [
        (NO_FILTER, {"net_udp", "unix", "spawn"}),
        (f"{NO_FILTER}; landlock.restrict = lambda paths: None", {"fs_read", "net_tcp", "spawn"}),
        (f"{NO_FILTER}; seccomp.supported = lambda: False; landlock.restrict = lambda paths: None", {"fs_read"}),
    ],
)
async def test_where_it_is_not_confined_it_takes_no_key_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: str, passed: set[str]
) -> None:
    file = blob(tmp_path, sealed(b"weights"))
    command = (sys.executable, "-I", "-c", WITHOUT.format(without=without), ROOT)
    opener = Opener(max_model_bytes=10**6, timeout_s=20)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(opening, "_COMMAND", command)
            with pytest.raises(ModelFailed, match="took no key") as caught:
                await opener.open(file, grant(), [NodeIdentity(ME)])
        assert contents(await opener.open(file, grant(), [NodeIdentity(ME)])) == {"model": b"weights"}
    finally:
        opener.close()

    assert caught.value.data["kind"] == "opening"
    assert all(name in caught.value.detail for name in passed)


async def _said_by_one_that(raises: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DivaultError:
    monkeypatch.setattr(opening, "_COMMAND", (sys.executable, "-I", "-c", SAYS.format(error=raises), ROOT))
    opener = Opener(max_model_bytes=10**6, timeout_s=20)
    try:
        with pytest.raises(DivaultError) as caught:
            await opener.open(blob(tmp_path, sealed(b"weights")), grant(), [NodeIdentity(ME)])
    finally:
        opener.close()
    return caught.value


async def test_what_it_says_of_a_file_is_printable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raises = r"TooLarge('a\x1b[2Jname \u202e of a Größe', limit='x\x1b]0;y\x07', limit_bytes=7)"

    error = await _said_by_one_that(raises, tmp_path, monkeypatch)

    assert type(error) is TooLarge
    assert error.detail == r"a\x1b[2Jname \u202e of a Größe"
    assert error.data == {"limit": r"x\x1b]0;y\x07", "limit_bytes": 7}


async def test_it_can_report_no_error_of_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raises = "DivaultError('the node is ill')"

    error = await _said_by_one_that(raises, tmp_path, monkeypatch)

    assert type(error) is ModelFailed
    assert "ill" not in error.detail
