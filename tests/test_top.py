"""`divault top`: what its tables say of two looks at a node, and that it outlives the node's absence."""

from __future__ import annotations

import asyncio
import io
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from divault.cli.top import Reading, read, shown
from divault.errors import NotReady
from divault.metrics import Metrics, ModelFigures, Sources

MODEL = ModelFigures("m1", 3, 0.25, True, 2, (1, 2, 4), (5, 1, 0, 2), 40, 1.5, 12_000_000)
START = ("divault_process_start_time_seconds", ())


def step(**counts: tuple[int, int]) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Histograms of steps: how many values are within 1 ms, and within 500 ms."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for one, (quick, all_) in counts.items():
        found["divault_step_seconds_count", (("step", one),)] = all_
        for bound, count in (("0.001", quick), ("0.5", all_), ("+Inf", all_)):
            found["divault_step_seconds_bucket", (("le", bound), ("step", one))] = count
    return found


def text(now: Reading, before: Reading | None) -> str:
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(shown(now, before))
    return console.export_text()


class Figures(ThreadingHTTPServer):
    """Answers with figures so many times, and then with 503."""

    def __init__(self, answers: int) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.answers = answers
        self.looks = 0
        self.metrics = Metrics(Sources(lambda: [MODEL], lambda: (1000, 2), lambda: (77, 1.0), lambda: 4))
        self.metrics.request("/x", "POST", 503, 0.001, "overloaded")
        self.metrics.lap()("gate")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answering(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Figures)
        self.server.looks += 1
        body = self.server.metrics.text()
        self.send_response(200 if self.server.looks <= self.server.answers else 503)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Be silent."""


@contextmanager
def answering(answers: int) -> Iterator[Figures]:
    with Figures(answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_the_tables_show_rates_between_two_looks() -> None:
    with answering(1) as server:
        first = read(server.url)
    sums = "divault_model_pass_callers_sum"
    later = {key: value + 20 if key[0] == sums else value for key, value in first.samples.items()}
    told = text(Reading(12.0, later), Reading(10.0, first.samples))

    assert re.search(r"m1 +ready +3 +0\.25 +7\.5 +10\.0 +2 +12", told)
    assert re.search(r"overloaded +1 +0\.0", told)
    assert re.search(r"gate +1 +0\.0 +0\.1 ms +0\.1 ms", told)
    assert "block 77" in told
    assert "reserved 4" in told
    assert re.search(r"overloaded +1 *\n", text(first, None))


def test_times_are_those_since_the_look_before() -> None:
    before = Reading(10.0, {START: 1.0} | step(run=(1000, 1000)))
    now = Reading(11.0, {START: 1.0} | step(run=(1000, 1010)))
    idle = Reading(11.0, before.samples)

    assert re.search(r"run +1010 +10\.0 +500 ms +500 ms", text(now, before))
    assert re.search(r"run +1000 +0\.0 +1 ms +1 ms", text(idle, before))


def test_a_node_that_was_started_anew_counts_from_nothing() -> None:
    before = Reading(10.0, {START: 1.0} | step(run=(1000, 1000)))
    now = Reading(11.0, {START: 2.0} | step(run=(0, 1005)))

    assert re.search(r"run +1005 .*500 ms +500 ms", text(now, before))


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense", "http://[", "file:///dev/null"])
def test_where_no_figures_are_it_says_so(url: str) -> None:
    with pytest.raises(NotReady, match="DIVAULT_METRICS"):
        read(url)


@pytest.mark.parametrize(("answers", "told"), [(100, b"m1"), (1, b"no figures at")])
async def test_it_looks_until_it_is_interrupted(answers: int, told: bytes) -> None:
    with answering(answers) as server:
        process = await asyncio.create_subprocess_exec(
            *(str(Path(sys.executable).parent / "divault"), "top", server.url, "--interval", "0.2"),
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(20):
                while server.looks < 4:
                    await asyncio.sleep(0.05)
        finally:
            process.send_signal(signal.SIGINT)
            out, _ = await process.communicate()

    assert process.returncode == 0
    assert told in out
    assert b"callers/pass" in out
