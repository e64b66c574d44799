"""In CI a skipped test is a failure: what a machine lacks must not turn into a claim that was never checked."""

from __future__ import annotations

import os

import pytest


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Exit with 1 when CI is set and any test was skipped, and say which."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("CI") or reporter is None:
        return
    skipped = [report.nodeid for report in reporter.stats.get("skipped", [])]
    if skipped and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        session.config.stash[_SKIPPED] = skipped


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name the skipped tests that failed the run."""
    for nodeid in config.stash.get(_SKIPPED, ()):
        terminalreporter.write_line(f"skipped, which CI takes for a failure: {nodeid}", red=True)


_SKIPPED = pytest.StashKey[list[str]]()
