"""The containment corpus, run 1: with the policy on, no file that needs code loads, and none of its code runs.

Files are generated with canaries of this test and read in processes of their own by `sandbox_reader`. Outside evidence
decides: files in the open folder, connections, datagrams, and whether the canary process lives.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.vectors_root import vectors_root

FOLDER = vectors_root() / "sandbox"
CASES = json.loads((FOLDER / "manifest.json").read_text())["cases"]
IDS = [case["file"] for case in CASES]
BATCHES = 2
DEADLINE_S = 90
"""For a batch of some forty files; one that hangs fails the test."""


@dataclass(frozen=True, slots=True)
class Canaries:
    """What probes would touch."""

    settings: dict[str, Any]
    listeners: tuple[socket.socket, ...]
    process: subprocess.Popen[bytes]

    def touched(self) -> list[str]:
        """What was reached from outside."""
        found = [f"file {path.name}" for path in Path(self.settings["outside_dir"]).iterdir()]
        ready, _, _ = select.select(self.listeners, [], [], 0)
        found += [f"socket {one.family.name} {one.type.name}" for one in ready]
        return found if self.process.poll() is None else [*found, "process"]


@pytest.fixture(scope="module")
def canaries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Canaries]:
    folder = tmp_path_factory.mktemp("canaries")
    key = folder / "key"
    key.write_text("a key of nobody")
    key.chmod(0o600)
    outside = folder / "outside"
    outside.mkdir(mode=0o777)
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as unix,
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process,
    ):
        udp.bind(("127.0.0.1", 0))
        # Addresses of Unix sockets have 107 bytes; a path through the folder's descriptor is short wherever that is.
        home = os.open(folder, os.O_RDONLY)
        unix.bind(f"/proc/self/fd/{home}/listener")
        os.close(home)
        unix.listen()
        settings = {
            "key_file": str(key),
            "outside_dir": str(outside),
            "tcp_port": tcp.getsockname()[1],
            "udp_port": udp.getsockname()[1],
            "unix_path": str(folder / "listener"),
            "canary_pid": process.pid,
            "secret": "5e" * 16,
        }
        yield Canaries(settings, (tcp, udp, unix), process)
        process.kill()


@pytest.fixture(scope="module")
def corpus(canaries: Canaries, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model files, whose probes name our canaries."""
    folder = tmp_path_factory.mktemp("corpus")
    told = folder.parent / "canary.json"
    told.write_text(json.dumps(canaries.settings | {"model_dir": str(folder)}))
    subprocess.run(
        [sys.executable, str(FOLDER / "generate.py"), str(folder), str(told)],
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        timeout=DEADLINE_S,
        check=True,
    )
    return folder


@pytest.fixture(scope="module")
def readings(corpus: Path, canaries: Canaries) -> dict[str, dict[str, Any]]:
    """What the loaders made of every file."""
    environment = os.environ | {"DIVAULT_CANARY": canaries.settings["secret"], "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.vectors.sandbox_reader", str(corpus), *IDS[start::BATCHES]],
            env=environment,
            cwd=Path(__file__).parent.parent.parent,
            stdout=subprocess.PIPE,
        )
        for start in range(BATCHES)
    ]
    found: dict[str, dict[str, Any]] = {}
    try:
        for process in running:
            output, _ = process.communicate(timeout=DEADLINE_S)
            found |= {reading["file"]: reading for reading in map(json.loads, output.splitlines())}
    finally:
        for process in running:
            process.kill()
            process.wait()
    return found


def test_the_generated_corpus_is_the_one_of_the_manifest(corpus: Path) -> None:
    made = json.loads((corpus / "manifest.json").read_text())["cases"]

    assert [without_size(case) for case in made] == [without_size(case) for case in CASES]


def without_size(case: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in case.items() if name != "bytes"}


STRICTER = {"data_joblib_bomb", "data_tree_selfloop"}
"""Data that would hang or fill memory later on: this loader refuses them at once."""


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_loader_says_what_the_manifest_says(case: dict[str, Any], readings: dict[str, dict[str, Any]]) -> None:
    assert case["file"] in readings, "the process that read it ended on this file or before it"
    reading = readings[case["file"]]

    assert reading["compiled"] == []
    if case["needs_code"]:
        assert reading["model"]["verdict"] == "refused"
        assert "eval" in reading["model"]["seen"], "the refusal names the first global"
    elif case["policy_verdict"] == "error":
        assert reading.get("pickle", reading["model"])["verdict"] in {"error", "refused"}
        assert reading["model"]["verdict"] in {"error", "refused"}
    else:
        expected = {case["policy_verdict"]} | ({"refused"} if case["id"] == "data_joblib_bomb" else set())
        assert reading["pickle"]["verdict"] in expected


def test_no_canary_was_touched(readings: dict[str, dict[str, Any]], canaries: Canaries) -> None:
    assert len(readings) == len(CASES)
    assert canaries.touched() == []


def test_the_canaries_notice_a_touch(readings: dict[str, dict[str, Any]], canaries: Canaries) -> None:
    """Runs last: what we do here ourselves is what a probe would do."""
    assert canaries.touched() == []
    (Path(canaries.settings["outside_dir"]) / "file").touch()
    with socket.create_connection(("127.0.0.1", canaries.settings["tcp_port"]), timeout=5):
        pass
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", ("127.0.0.1", canaries.settings["udp_port"]))
    canaries.process.kill()
    canaries.process.wait()

    assert canaries.touched() == ["file file", "socket AF_INET SOCK_STREAM", "socket AF_INET SOCK_DGRAM", "process"]
