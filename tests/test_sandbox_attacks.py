"""What an attacker with any code of his choice tries from inside a worker, beside the corpus and the list of levels.

Calls are named and numbered by the kernel's own list (`syscalls.txt`) and made directly; the kernel must refuse them.
"""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from tests.test_sandbox_filter import published
from tests.test_sandbox_levels import HEAD, TRY, canary, confined, environment

__all__ = ["canary"]  # fixture
REFUSED = {
    # memory and programs that no rule counts
    "a program from memory": "call('execveat', kept, b'', None, None, 0x1000)",
    "a program, by descriptor": "os.execve(kept, ['x'], {})",
    "secret memory": "call('memfd_secret', 0)",
    "shared memory by key": "call('shmget', 0, 4096, 0o1600)",
    "semaphores": "call('semget', 0, 1, 0o1600)",
    "messages by key": "call('msgget', 0, 0o1600)",
    "queues of messages": "call('mq_open', b'x', os.O_CREAT | os.O_RDWR, 0o600, None)",
    "larger pipes": "fcntl.fcntl(os.pipe()[0], 1031, 1 << 20)",
    "sealing its model": "fcntl.fcntl(model, fcntl.F_ADD_SEALS, 0)",
    # other processes
    "a descriptor of a process": "os.pidfd_open(os.getppid())",
    "descriptors of another": "call('pidfd_getfd', kept, 0, 0)",
    "a signal by descriptor": "signal.pidfd_send_signal(kept, 0)",
    "a queued signal": "call('rt_sigqueueinfo', os.getppid(), 10, ctypes.create_string_buffer(128))",
    "a queued signal to a thread": "call('rt_tgsigqueueinfo', os.getppid(), os.getppid(), 10, bytes(128))",
    "a signal to a thread": "call('tkill', os.getppid(), 0)",
    "a signal to everybody": "os.kill(-1, 0)",
    "writing another's memory": "call('process_vm_writev', os.getppid(), None, 0, None, 0, 0)",
    "advice on another's memory": "call('process_madvise', kept, None, 0, 4, 0)",
    "moving another's pages": "call('migrate_pages', os.getppid(), 0, None, None)",
    "comparing with another": "call('kcmp', os.getpid(), os.getppid(), 0, 0, 0)",
    "being traced": "call('ptrace', 0, 0, None, None)",
    "a memory of its own, as a file": "os.open('/proc/self/mem', os.O_RDWR)",
    "another's memory, as a file": "os.open(f'/proc/{os.getppid()}/mem', os.O_RDONLY)",
    "another's program": "os.readlink(f'/proc/{os.getppid()}/exe')",
    "another's descriptors": "os.listdir(f'/proc/{os.getppid()}/fd')",
    "another's words": "os.open(f'/proc/{os.getppid()}/cmdline', os.O_RDONLY)",
    "the priority of another": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "the disk priority of another": "call('ioprio_set', 1, os.getppid(), 0)",
    "its own priority": "os.nice(-1)",
    "real time": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    "a child that shares its memory": "call('clone', 0x4111, 0, 0, 0, 0)",
    "a child by another way": "call('vfork')",
    "a group of its own": "os.setpgid(0, 0)",
    "a session of its own": "os.setsid()",
    # what it gave up
    "dumpable again": "prctl(4, 1)",
    "no death signal": "prctl(1, 0)",
    "a tracer of its choice": "prctl(0x59616D61, -1)",
    "keeping capabilities": "prctl(8, 1)",
    "secure bits": "prctl(28, 0)",
    "its memory's layout": "prctl(35, 1)",
    "capabilities": "call('capset', ctypes.create_string_buffer(8), ctypes.create_string_buffer(24))",
    "other groups": "os.setgroups([0])",
    "another user for files": "call('setfsuid', 0)",
    "higher limits": "must(libc.prlimit(0, resource.RLIMIT_NOFILE, (ctypes.c_uint64 * 2)(4096, 4096), None))",
    "fewer rules": "call('landlock_create_ruleset', None, 0, 1)",
    "namespaces of another": "call('setns', kept, 0)",
    # the kernel's less trodden parts
    "asynchronous reads": "call('io_setup', 1, ctypes.create_string_buffer(8))",
    "io_uring of another": "call('io_uring_enter', 0, 1, 0, 0, None, 0)",
    "watching files": "call('inotify_init1', 0)",
    "watching everything": "call('fanotify_init', 0, 0)",
    "timers that signal others": "call('timer_create', 1, None, ctypes.create_string_buffer(8))",
    "clocks as files": "call('timerfd_create', 1, 0)",
    "signals as files": "call('signalfd4', -1, bytes(8), 8, 0)",
    "policies of memory": "call('mbind', None, 0, 0, None, 0, 0)",
    "keys of the kernel": "call('add_key', b'user', b'x', b'y', 1, -2)",
    "the kernel's words": "call('syslog', 10, None, 0)",
    "handles past the path": "call('name_to_handle_at', kept, b'', bytes(200), bytes(8), 0x1000)",
    "opening by handle": "call('open_by_handle_at', kept, bytes(200), 0)",
    "opening with rules of its own": "call('openat2', -100, b'/usr', bytes(24), 24)",
    "a new kind of mount": "call('fsopen', b'tmpfs', 0)",
    "a copy of a mount": "call('open_tree', -100, b'/', 1)",
    "moving a mount": "call('move_mount', -100, b'/', -100, b'/', 0)",
    "another root": "call('pivot_root', b'/', b'/')",
    "copying without reading": "call('splice', kept, None, kept, None, 1, 0)",
    "giving memory to a pipe": "call('vmsplice', kept, None, 0, 0)",
    "sending a file": "call('sendfile', kept, model, None, 1)",
    # its socket
    "descriptors into its socket": "socket.send_fds(line, [b'x'], [kept])",
    "descriptors out of its socket": "line.recvmsg(1, 64, socket.MSG_DONTWAIT)",
    "data out of band": "line.send(b'x', socket.MSG_OOB)",
    "reading out of band": "line.recv(1, socket.MSG_OOB)",
    "a program for its socket": "line.setsockopt(socket.SOL_SOCKET, 26, bytes(16))",
    "a larger buffer": "line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 24)",
    "the process at the other end": "line.getsockopt(socket.SOL_SOCKET, 77)",
    "who is at the other end": "line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)",
    "an abstract socket": "socket.socket(socket.AF_UNIX).connect('\\0x')",
    "a socket of the virtual machine's host": "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
    "raw packets": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "the kernel's ciphers": "socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)",
    # descriptors and devices
    "an owner of a descriptor, in the new way": "fcntl.fcntl(kept, 15, bytes(8))",
    "another signal for a descriptor": "fcntl.fcntl(kept, 10, 10)",
    "news of a folder": "fcntl.fcntl(kept, 1026, 1)",
    "a lock of a process": "fcntl.lockf(model, fcntl.LOCK_SH)",
    "a lock of a descriptor": "fcntl.fcntl(model, 37, bytes(32))",
    "words into a terminal": "fcntl.ioctl(kept, 0x5412, b'x')",
    "a terminal": "fcntl.ioctl(kept, 0x540E, 0)",
    "flags of a file": "fcntl.ioctl(kept, 0x40086602, bytes(8))",
    "an owner of a descriptor, by ioctl": "fcntl.ioctl(kept, 0x8901, bytes(4))",
    "writing to a device": "os.open('/dev/null', os.O_WRONLY)",
    "a device of its own": "os.mknod(f'/tmp/divault-{os.getpid()}')",
    # files
    "a file without a name": "os.open('/tmp', os.O_TMPFILE | os.O_RDWR)",
    "a file among libraries": "os.open(os.path.dirname(os.__file__) + '/x', os.O_CREAT | os.O_WRONLY)",
    "changing a library": "os.open(os.__file__, os.O_WRONLY)",
    "shortening a library": "os.truncate(os.__file__, 1)",
    "moving a library": "os.rename(os.__file__, os.__file__ + 'x')",
    "removing a library": "os.unlink(os.__file__)",
    "a library out of its folder": "os.link(os.__file__, os.path.dirname(os.__file__) + f'/../{os.getpid()}')",
    "out through a descriptor": "os.open('..', os.O_RDONLY, dir_fd=os.open('/usr', os.O_PATH))",
    "out by a longer way": "os.open('/usr/../etc/hostname', os.O_RDONLY)",
    "writing back through its own descriptor": "os.open(f'/proc/self/fd/{kept}', os.O_RDWR)",
    "the node's mounts": "os.open('/proc/self/mountinfo', os.O_RDONLY)",
    "its own descriptors' positions": "os.listdir('/proc/self/fdinfo')",
    "its threads' memory": "os.open(f'/proc/self/task/{os.getpid()}/mem', os.O_RDONLY)",
    "settings of the kernel": "os.open('/proc/sys/kernel/hostname', os.O_RDONLY)",
    "the choice of the memory killer": "os.open('/proc/self/oom_score_adj', os.O_WRONLY)",
    "the machine's devices": "os.listdir('/sys/class')",
}
PRELUDE = """
import resource, signal
def must(result):
    if result < 0: raise OSError(ctypes.get_errno(), "refused")
def prctl(option, value): must(libc.prctl(option, value, 0, 0, 0))
numbered = call
def call(name, *arguments): numbered(settings["numbers"][name], *arguments)
"""


def attempt(acts: dict[str, str], canary: str, **settings: list[str]) -> dict[str, str]:
    start, tries = TRY.split("found = {}")
    found: dict[str, str] = confined(
        f"{start}{PRELUDE}found = {{}}{tries}", canary, acts=acts, numbers=published(platform.machine()), **settings
    )
    return found


def test_every_attack_is_refused_by_the_kernel(canary: str) -> None:
    found = attempt(REFUSED, canary)

    assert {name: how for name, how in found.items() if how not in ("EPERM", "EACCES")} == {}
    assert len(found) == len(REFUSED)


BITE = (
    "a descriptor of a process", "asynchronous reads", "clocks as files", "watching files", "data out of band",
    "a larger buffer", "the process at the other end", "who is at the other end", "dumpable again", "no death signal",
    "larger pipes", "a lock of a process", "another's words", "a file without a name",
)  # fmt: skip


def test_without_rules_the_attacks_succeed(canary: str) -> None:
    """A probe that can't succeed would prove nothing above. Those that would hurt this machine are left out."""
    found = attempt({name: REFUSED[name] for name in BITE}, canary, leave_out=["seccomp", "landlock"])

    assert {name: how for name, how in found.items() if how != "done"} == {}


def test_its_socket_still_carries_frames(canary: str) -> None:
    acts = {
        "sending": "line.sendall(b'x')",
        "its kind": "socket.socket(fileno=os.dup(line.fileno())).type",
        "the end": "line.shutdown(socket.SHUT_RDWR)",
    }

    assert set(attempt(acts, canary).values()) == {"done"}


OTHER_TABLE = """
import mmap
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]))  # mov eax, 20 (getpid); int 0x80; ret
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="machine code of x86-64")
def test_the_calls_of_the_old_architecture_end_the_process(canary: str) -> None:
    """Their numbers mean other calls: 11 is munmap on the list, and execve there."""
    done = subprocess.run(
        [sys.executable, "-c", HEAD + OTHER_TABLE, f'{{"canary": "{canary}", "namespaces": {{}}}}'],
        env=environment(),
        timeout=30,
        check=False,
    )

    assert done.returncode in (-31, -11), "SIGSYS, or SIGSEGV where the kernel has no such calls"
