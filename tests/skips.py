"""In CI (the environment variable ``CI`` is set) a skipped test fails the session; the reasons below are allowed."""

from __future__ import annotations

import os

import pytest

GPU_MISSING = "no GPU"
TRITON_MISSING = "no Triton (it comes with CUDA builds of torch)"
ALLOWED_SKIPS = (GPU_MISSING, TRITON_MISSING)


def pytest_configure(config: pytest.Config) -> None:
    # Workers of pytest-xdist send their reports to the controller, which alone judges.
    if os.environ.get("CI") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SkipsAreFailures(), "skips_are_failures")


class SkipsAreFailures:
    """Collects the skips that are not allowed, fails the session on them and lists them at its end."""

    def __init__(self) -> None:
        self.skips: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._judge(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._judge(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.skips and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.skips:
            terminalreporter.section("skipped tests are failures in CI")
            for skip in self.skips:
                terminalreporter.line(skip)

    def _judge(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(allowed in reason for allowed in ALLOWED_SKIPS):
            self.skips.append(f"{report.nodeid}: {reason}")
