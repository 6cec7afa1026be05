"""Writes what the suite found, for the table of families: ``pytest tests/conformance --families-record FILE``."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # for families_table

PROPERTIES = ("router", "scoring", "weights", "widen", "skip")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families-record", metavar="FILE", help="write the results per family to FILE (JSON)")


def pytest_configure(config: pytest.Config) -> None:
    # Only in the process that hears of every case; workers send their reports there.
    path = config.getoption("--families-record", None)
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Record(Path(path)))


class Record:
    """Collects outcomes and properties per family and writes them at the end."""

    def __init__(self, path: Path) -> None:
        from families_table import scan

        self.path, self.found = path, scan()
        self.families: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("::")[2]
        check, bracket, case = name.partition("[")
        relevant = report.when == "call" or (report.when == "setup" and report.outcome != "passed")
        family, _, implementation = case.rstrip("]").partition("-")
        ours = bracket and "test_conformance.py::" in report.nodeid and family in self.found
        if not ours or not relevant:
            return
        held = self.families.setdefault(family, {"checks": {}, "skipped": {}})
        held.update({key: value for key, value in report.user_properties if key in PROPERTIES})
        label = check.removeprefix("test_") + (f" ({implementation})" if implementation else "")
        outcome = "xfailed" if hasattr(report, "wasxfail") and report.outcome == "skipped" else report.outcome
        held["checks"][label] = outcome
        if outcome == "skipped" and isinstance(report.longrepr, tuple):
            held["skipped"][label] = report.longrepr[2].removeprefix("Skipped: ")

    def pytest_sessionfinish(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(
            {"transformers": metadata.version("transformers"), "families": self.families}, indent=1
        )
        self.path.write_text(text + "\n", encoding="utf-8")
