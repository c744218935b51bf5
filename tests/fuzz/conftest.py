"""Hypothesis' profiles, and the table of outcomes: few fixed inputs in ``make test``, many in ``make fuzz``."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from support.fuzzing import OUTCOMES, Outcomes

EXAMPLES = {"test": 25, "fuzz": 500}
"""Profile → inputs of each test. ``test`` tries the same ones in every run."""

for name, examples in EXAMPLES.items():
    settings.register_profile(
        name,
        max_examples=examples,
        derandomize=name == "test",
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )
settings.load_profile(os.environ.get("FUZZ_PROFILE", "test"))


@pytest.fixture
def outcomes(request: pytest.FixtureRequest) -> Iterator[Outcomes]:
    """Judges and counts a test's inputs; ``@pytest.mark.accepted_raw(PART, …)`` lists raw errors that are known."""
    marker = request.node.get_closest_marker("accepted_raw")
    outcomes = Outcomes(marker.args if marker else ())
    yield outcomes
    request.node.user_properties.append(("outcomes", dict(outcomes.counts)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for group in terminalreporter.stats.values() for report in group]
    ended = [report for report in reports if getattr(report, "when", None) == "teardown"]
    properties = {report.nodeid: dict(report.user_properties) for report in ended}
    rows = {nodeid: Counter(found["outcomes"]) for nodeid, found in properties.items() if "outcomes" in found}
    if not rows or os.environ.get("FUZZ_PROFILE") != "fuzz":
        return
    terminalreporter.section("outcomes of bad inputs")
    rows["all"] = sum(rows.values(), Counter())
    terminalreporter.line(f"| input | tried | {' | '.join(OUTCOMES)} |")
    terminalreporter.line("| --- " * (len(OUTCOMES) + 2) + "|")
    for nodeid, counts in rows.items():
        cells = [str(counts[outcome]) for outcome in OUTCOMES]
        terminalreporter.line(f"| {nodeid.rpartition('::')[2]} | {counts.total()} | {' | '.join(cells)} |")
