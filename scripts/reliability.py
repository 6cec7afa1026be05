"""How often hostile and unusual input was tried, and how often the library held: `make reliability` writes docs/reliability.md.

Runs the tests of each kind, the slow ones too, and counts. A test that tries a number of seeded inputs says how many in its
parameter; every other test is one case. What is skipped (no Chromium, for example) is counted as skipped.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]

# Kind -> the tests that show it: files, and -k expressions where a file holds several kinds.
KINDS: dict[str, tuple[str, ...]] = {
    "Own files: calibrations, changed and well made of unsound content": (
        "tests/test_hostile_files.py -k mutated_calibrations",
        "tests/test_calibration_file.py",
    ),
    "Own files: routing logs": ("tests/test_hostile_files.py -k 'routing_logs or edited_log'",),
    "Own files: results and run.json": ("tests/test_hostile_files.py -k mutated_results",),
    "Own files: input of the report": (
        "tests/test_hostile_files.py -k 'report_input or sound_passes or checks or json'",
    ),
    "Foreign pickles": ("tests/test_pickled_arrays.py",),
    "The page in a browser": ("tests/browser",),
    "Disk and signals": (
        "tests/test_hostile_files.py -k 'disk or folder or links or writers or appenders or signal or opens or memory'",
    ),
    "The command line": ("tests/test_hostile_cli.py",),
    "p-values and procedures": ("tests/test_procedures.py", "tests/test_routing.py"),
    "Threads": ("tests/test_threads.py",),
    "Situations: adapters, masks, several forwards, odd routers": ("tests/test_situations.py",),
}
# What one test stands for, where that is more than one case: by its parameter's name.
TRIED = {"[many]": 10_000, "[few]": 150}
SEVERAL = {"test_a_hundred_thousand_rows": 100_000, "test_a_hundred_thousand_rows_by_definition": 100_000}
FEWER = {"test_mutated_report_input[many]": 300, "test_mutated_report_input[few]": 12}


def cases(name: str) -> int:
    """How many inputs a test tries."""
    if name in FEWER:
        return FEWER[name]
    rows = SEVERAL.get(name.partition("[")[0])
    return rows or next((n for mark, n in TRIED.items() if name.endswith(mark)), 1)


def run(asked: str) -> list[tuple[str, str]]:
    """(name, outcome) of every test; outcomes: held, failed, skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files, _, chosen = asked.partition(" -k ")
        if not (ROOT / files).exists():
            return []
        more = ["-k", chosen.strip("'")] if chosen else []
        command = [sys.executable, "-m", "pytest", "-q", files, *more, f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
        found = []
        for case in ElementTree.parse(report).iter("testcase"):
            outcomes = {child.tag for child in case}
            outcome = (
                "failed"
                if outcomes & {"failure", "error"}
                else "skipped"
                if "skipped" in outcomes
                else "held"
            )
            found.append((case.get("name", ""), outcome))
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs/reliability.md")
    arguments = parser.parse_args()
    rows, failed = [], 0
    for kind, tests in KINDS.items():
        found = [test for asked in tests for test in run(asked)]
        counts = {
            word: sum(cases(n) for n, outcome in found if outcome == word)
            for word in ("held", "failed", "skipped")
        }
        failed += counts["failed"]
        if found:
            tried = counts["held"] + counts["failed"]
            rows.append(f"| {kind} | {tried:,} | {counts['held']:,} | {counts['skipped'] or ''} |")
    page = arguments.output.read_text(encoding="utf-8")
    table = "\n".join(["| kind | tried | held | skipped |", "|---|---:|---:|---:|", *rows])
    page = re.sub(r"\| kind .*?(?=\n\n|\Z)", table, page, count=1, flags=re.DOTALL)
    arguments.output.write_text(page, encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
