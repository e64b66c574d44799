"""`divault top`: what its tables say of two looks at a node, and that it outlives the node's absence."""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from divault.cli.top import Reading, _fitting, read, shown
from divault.errors import NotReady
from divault.metrics import STEPS, Metrics, ModelFigures, Sources

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
    console.print(shown(now, before, 150))
    return console.export_text()


class Figures(ThreadingHTTPServer):
    """Answers with figures at these looks, and at others with 503."""

    def __init__(self, answers: range) -> None:
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
        self.send_response(200 if self.server.looks in self.server.answers else 503)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Be silent."""


@contextmanager
def answering(answers: range) -> Iterator[Figures]:
    with Figures(answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_the_tables_show_rates_between_two_looks() -> None:
    with answering(range(1, 2)) as server:
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


@pytest.mark.parametrize(
    ("answers", "told"),
    [(range(1, 100), b"m1"), (range(1, 2), b"no figures at"), (range(3, 100), b"m1")],
    ids=["there", "away later", "away at first"],
)
async def test_it_looks_until_it_is_interrupted(answers: range, told: bytes) -> None:
    with answering(answers) as server:
        process = await asyncio.create_subprocess_exec(
            *(str(Path(sys.executable).parent / "divault"), "top", server.url, "--interval", "0.2"),
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(20):
                while server.looks < 5:
                    await asyncio.sleep(0.05)
        finally:
            process.send_signal(signal.SIGINT)
            out, _ = await process.communicate()

    assert process.returncode == 0
    assert told in out
    assert b"callers/pass" in out
    assert (b"no figures at" in out) is (told == b"no figures at")


async def test_once_at_a_node_that_is_away_fails() -> None:
    with answering(range(0)) as server:
        process = await asyncio.create_subprocess_exec(
            *(str(Path(sys.executable).parent / "divault"), "top", server.url, "--once"), stderr=asyncio.subprocess.PIPE
        )
        _, said = await process.communicate()

    assert process.returncode == 1
    assert b"no figures at" in said


# --- what has room ----------------------------------------------------------------------------------------------------


def model_names(count: int) -> list[str]:
    return [f"model-{number:03d}-of-somebody-with-a-long-name" for number in range(count)]


def reading(names: list[str], **waiting: int) -> Reading:
    """A node with these models and all that else takes room on the screen."""
    samples = {START: 1.0} | step(**dict.fromkeys(STEPS, (1, 1)))
    for code in (f"code_{number}" for number in range(12)):
        samples["divault_refusals_total", (("code", code),)] = 1
    samples["divault_refusals_total", (("code", "overloaded"),)] = 77
    samples["divault_refusals_total", (("code", "internal"),)] = 0
    for name in names:
        samples["divault_model_up", (("model", name),)] = 1
    for number, count in waiting.items():
        samples["divault_model_waiting", (("model", names[int(number[1:])]),)] = count
    return Reading(1.0, samples)


def screen(width: int, height: int, now: Reading | None, error: str = "") -> list[str]:
    """The lines of a terminal of this size."""
    sizes = {"width": width, "height": height, "force_terminal": True}
    console = Console(**sizes, record=True, file=io.StringIO(), markup=False, emoji=False)  # type: ignore[arg-type]
    console.print(_fitting(console, now, None, error))
    return console.export_text().splitlines()


@pytest.mark.parametrize("count", [30, 200])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 30), (200, 60)])
def test_of_many_models_the_busiest_are_on_the_screen_below_what_tells_of_the_node(
    width: int, height: int, count: int
) -> None:
    names = model_names(count)
    away = "no figures at http://127.0.0.1:1/metrics"
    told = screen(width, height, reading(names, m7=3, m29=9), away)
    there = "\n".join(told)

    assert len(told) <= height
    assert told[0] == away[:width].rstrip()
    assert all(f"\n{step}" in there for step in STEPS)
    assert "overloaded     77" in there
    assert "internal" not in there, "nobody was refused with it"
    assert all(name in there for name in ("requests 0", "gateway 0 MB", "99 % within", "waiting"))
    shown_of = [line.split()[0] for line in told if line.startswith("model-")]
    hidden = count - len(shown_of)
    if hidden:
        assert [one[:9] for one in shown_of[:2]] == ["model-029", "model-007"]
        assert f"+{hidden} more" in there
    else:
        assert shown_of == names, "in their order, where there is room for all"


def test_a_model_that_is_down_comes_first() -> None:
    names = model_names(100)
    now = reading(names, m5=9)
    down = Reading(1.0, {**now.samples, ("divault_model_up", (("model", names[88]),)): 0})
    rows = [line.split()[:2] for line in screen(100, 24, down) if line.startswith("model-")]

    assert [row[0][:9] for row in rows[:2]] == ["model-088", "model-005"]
    assert rows[0][1] == "down"


def test_a_node_that_was_never_there_is_waited_for_in_words() -> None:
    assert screen(80, 24, None, "no figures") == ["no figures"]


async def test_what_is_piped_has_every_model_and_its_whole_name() -> None:
    names = ["wine:100:q4", "[bold]x[/]", *model_names(60)]
    with answering(range(1, 2)) as server:
        server.metrics.sources.models = lambda: [replace(MODEL, model=name) for name in names]
        process = await asyncio.create_subprocess_exec(
            *(str(Path(sys.executable).parent / "divault"), "top", server.url, "--once"),
            stdout=asyncio.subprocess.PIPE,
            env={"PATH": os.defpath, "COLUMNS": "40"},
        )
        out, _ = await process.communicate()
    first = [line.split()[0] for line in out.decode().splitlines() if line.endswith(" 12")]

    assert first == sorted(names)
    assert "more" not in out.decode()
