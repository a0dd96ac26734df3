"""Tests of load, faults and attacks. The run ends with a table of what each one tried and measured."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import pytest

FOUND = pytest.StashKey[list["Found"]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of this folder are slow: each module loads a service, in a process of its own."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.slow)


@dataclass
class Found:
    """One line of the table. tries: how often the fault was provoked; figure: what was measured, with its unit."""

    test: str
    case: str
    tries: int
    figure: str
    result: str = "failed"


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, int, str], None]:
    """record(case, tries, figure): adds a line to the table. Its result is whether the test passes."""

    def add(case: str, tries: int, figure: str) -> None:
        lines = request.config.stash.setdefault(FOUND, [])
        lines.append(Found(request.node.nodeid, case, tries, figure))

    return add


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and report.passed:
        for line in item.config.stash.get(FOUND, []):
            if line.test == item.nodeid:
                line.result = "held"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(FOUND, [])
    if not lines:
        return
    terminalreporter.section("faults")
    width = max(len(line.case) for line in lines)
    terminalreporter.write_line(f"{'case':{width}}  {'tries':>6}  result  figure")
    for line in sorted(lines, key=lambda line: line.case):
        terminalreporter.write_line(f"{line.case:{width}}  {line.tries:>6}  {line.result:6}  {line.figure}")
