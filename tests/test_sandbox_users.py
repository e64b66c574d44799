"""As root each worker has a user of its own, where that user can read Python; where not, the report says so.

Real nodes' pools in a Python that every user can read. Where the tests don't run as root, nothing is given and nothing
is claimed.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from divault.workers import users
from divault.workers.privileges import FIRST_USER
from tests import public_python
from tests.worker_models import alive, dumped

ROOT = os.geteuid() == 0
ROWS = np.random.default_rng(5).normal(size=(60, 3))
TARGET = (ROWS[:, 0] > 0).astype(int)
AROUND = (str(Path(__file__).parent.parent), sysconfig.get_path("purelib"))
NODE = """
import asyncio, json, sys
from pathlib import Path
sys.path += sys.argv[1:3]
from divault.workers.confinement import Confinement
from divault.workers.pool import WorkerPool
from tests.worker_models import alive, answer, opened

async def main(folder, row):
    pool = WorkerPool(predict_timeout_s=20, load_timeout_s=60, confinement=Confinement("standard"))
    try:
        told = {"level": await pool.prove_sandbox(), "report": pool.sandbox_report(), "workers": {}}
        for file in sorted(folder.iterdir()):
            model = opened(file.read_bytes(), file.name)
            loaded = await pool.load(model)
            told["workers"][file.name] = [loaded.pid, await answer(pool, model, {"features": row})]
        print(json.dumps(told), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            await pool.unload(opened(b"", line.strip()).model.key)
            print(json.dumps("unloaded"), flush=True)
    finally:
        await pool.close()

asyncio.run(main(Path(sys.argv[3]), json.loads(sys.argv[4])))
"""


@pytest.fixture(scope="module")
def public() -> Iterator[Path]:
    """The program of a Python that every user can read."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # others reach it there
        folder = Path(name)
        folder.chmod(0o755)
        yield public_python.make(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose worker is started, and one whose worker is forked."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "started").write_bytes(dumped(LogisticRegression().fit(ROWS, TARGET)))
    trees = lightgbm.train({"objective": "binary", "verbose": -1}, lightgbm.Dataset(ROWS, TARGET), 2)
    (folder / "forked").write_text(trees.model_to_string())
    return folder


class Node:
    """A pool in a process of its own."""

    def __init__(self, program: Path, models: Path) -> None:
        command = [program, "-I", "-B", "-c", NODE, *AROUND, models, json.dumps(ROWS[0].tolist())]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/")

    def told(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def unload(self, name: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        return self.told()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def status(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.split() for name, _, value in (line.partition(":") for line in lines)}


def processes_of(pid: int) -> str:
    line = next(line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if "processes" in line)
    return line.split()[2]


async def all_gone(pids: list[int]) -> bool:
    for _ in range(500):
        if not any(alive(pid) for pid in pids):
            return True
        await asyncio.sleep(0.01)
    return False


async def test_each_worker_has_a_user_of_its_own_and_ends_with_its_node(public: Path, models: Path) -> None:
    node, forked = Node(public, models), -1
    try:
        told = node.told()
        started, forked = told["workers"]["started"][0], told["workers"]["forked"][0]
        pids = [pid for pid, _ in told["workers"].values()]
        seen = [status(pid) for pid in pids]
        limits = [processes_of(pid) for pid in pids]
        assert node.unload("started") == "unloaded"
        assert alive(forked)
        assert await all_gone([started]), "the node ends processes of other users"
        os.kill(forked, signal.SIGSTOP)  # it can't see the end of its socket: the kernel alone ends it
        os.kill(node.process.pid, signal.SIGKILL)
        assert await all_gone([forked]), "who has another user than his node ends with it all the same"
    finally:
        node.end()
        if alive(forked):
            os.kill(forked, signal.SIGCONT)

    assert told["level"] == "standard"
    assert [answer is not None for _, answer in told["workers"].values()] == [True, True]
    if not ROOT:
        assert (told["report"]["shared_user"], told["report"]["checks"]["own_user"]) == ("not_root", "not_enforced")
        return
    assert told["report"]["shared_user"] is None
    assert {told["report"]["checks"][name] for name in ("own_user", "proc_limit")} == {"enforced"}
    for pid, found in zip(pids, seen, strict=True):
        assert found["Uid"] == found["Gid"] == [str(FIRST_USER + pid)] * 4
        assert (found["Groups"], found["CapEff"], found["Seccomp"]) == ([], ["0" * 16], ["2"])
    assert limits == ["64", "64"]


async def test_where_others_cannot_read_python_workers_keep_the_nodes_user_and_say_so(
    public: Path, tmp_path: Path
) -> None:
    (public.parent.parent).chmod(0o700)
    node = Node(public, tmp_path)
    try:
        report = node.told()["report"]
    finally:
        node.end()
        (public.parent.parent).chmod(0o755)

    assert report["effective"] == "standard", "no level needs it"
    assert report["shared_user"] == ("python_unreadable" if ROOT else "not_root")
    assert (report["checks"]["own_user"], report["checks"]["proc_limit"]) == ("not_enforced", "not_enforced")


COUNT = """
import os, sys
from divault.workers.process import bubblewrap
confined = (
    "import os; from divault.workers.sandbox import Policy, confine; "
    "print(confine(Policy('strict', (), frozenset(os.environ), 4 << 30, 1 << 30))['proc_limit'])"
)
os.execvp("bwrap", ["bwrap", *bubblewrap(1), sys.executable, "-I", "-B", "-c", confined])
"""


def test_threads_in_namespaces_are_counted_where_the_node_is_not_root(public: Path) -> None:
    """The limit is set for root as well, and the kernel holds root to none: a thread too many has to be refused."""
    trial = [shutil.which("bwrap") or "/bin/false", "--unshare-all", "--ro-bind", "/", "/", "/bin/true"]
    if subprocess.run(trial, capture_output=True, check=False).returncode != 0:
        return  # there is no level with namespaces then
    command = [public, "-I", "-B", "-c", COUNT]
    nobody: dict[str, Any] = {"user": 54321, "group": 54321, "extra_groups": []} if ROOT else {}
    counted = subprocess.run(command, capture_output=True, text=True, cwd="/", check=True, **nobody).stdout

    assert counted == "enforced\n"
    if ROOT and Path("/proc/self/uid_map").read_text().split() == ["0", "0", str(2**32 - 1)]:
        counted = subprocess.run(command, capture_output=True, text=True, cwd="/", check=True).stdout
        assert counted == "not_enforced\n"


READ = """
import json, os, sys
from divault.workers.sandbox import Policy, confine
secret, own_user = sys.argv[1], sys.argv[2] == "own"
checks = confine(Policy("standard", (), frozenset(os.environ), 4 << 30, 1 << 30, own_user=own_user))
try:
    open(secret).read()
    print(json.dumps([checks["own_user"], "read"]))
except PermissionError:
    print(json.dumps([checks["own_user"], "refused"]))
"""


def test_a_file_of_the_nodes_user_among_libraries_is_closed_to_a_user_of_its_own(public: Path) -> None:
    """Landlock opens those folders whole: their modes count, and what is root's is root's without capabilities too."""
    if not ROOT:
        return  # the tests above say what such a node tells
    secret = public.parent.parent / "lib" / "secret"
    secret.touch(0o600)

    found = [
        json.loads(subprocess.run([public, "-I", "-c", READ, secret, how], capture_output=True, check=True).stdout)
        for how in ("own", "shared")
    ]

    assert found == [["enforced", "refused"], ["not_enforced", "read"]]


def test_root_without_capabilities_gives_no_users(public: Path) -> None:
    """It could not end a worker of another user."""
    script = "from divault.workers import privileges, users; privileges.drop_capabilities(); print(users.why_shared())"
    told = subprocess.run([public, "-I", "-c", script], capture_output=True, text=True, check=True).stdout

    assert ("no_capability" if ROOT else "not_root") in told


def test_numbers_that_a_namespace_lacks_are_not_given() -> None:
    assert users._mapped("         0          0 4294967295\n")
    assert not users._mapped("         0       1000          1\n         1     100000      65536\n")
    assert not users._mapped(f"0 0 {FIRST_USER + 1000}\n"), "every process id has to have its number"
    assert not users._mapped("")


def test_what_is_closed_to_others_is_named(tmp_path: Path) -> None:
    top = Path(tempfile.mkdtemp(dir="/tmp"))  # others reach it there
    try:
        top.chmod(0o755)
        packages = top / "way" / "packages"
        packages.mkdir(parents=True)
        module = packages / "module.py"
        module.touch(0o644)
        (top / "link").symlink_to(packages)
        assert users.closed_to_others([str(packages), str(top / "link")]) is None

        for closed, mode in ((module, 0o640), (packages, 0o754), (top / "way", 0o750)):
            before = closed.stat().st_mode
            closed.chmod(mode)
            assert users.closed_to_others([str(packages)]) == closed
            assert users.closed_to_others([str(top / "link")]) == (
                closed if closed == top / "way" else top / "link" / closed.relative_to(packages)
            )
            closed.chmod(before)
    finally:
        subprocess.run(["rm", "-r", top], check=True)
