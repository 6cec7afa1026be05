"""README and docs/: the code runs, the links lead somewhere, and every figure names the command that printed it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


def anchors(page: Path) -> set[str]:
    """Heading anchors as GitHub forms them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_are_filled(page):
    text = page.read_text()
    blocks = re.findall(r"<!-- begin (\S+): ([^\n]+) -->\n(.*?)<!-- end (\S+) -->", text, re.DOTALL)
    assert len(blocks) == text.count("<!-- begin ") == text.count("<!-- end ")
    for begin, command, content, end in blocks:
        assert begin == end
        assert content.strip(), f"{begin} is empty: run {command}"


def test_readme_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    level, *telemetry = run.stdout.rstrip().split("\n")[-8:]
    assert re.fullmatch(r"[1-7]\.\d\d experts per token, at level 0\.\d{3}", level)
    assert telemetry[0].startswith("Telemetry: 4 routers, ")
    assert telemetry[-1].startswith("all ")


def test_readme_output_is_of_this_model():
    """The demo's table in README.md was printed with the calibration that ships."""
    text = (ROOT / "README.md").read_text()
    assert re.search(r"^own top-8 +8\.00 ± 0\.00 ", text, re.MULTILINE)
    for k in (6, 4, 3, 2):
        assert re.search(rf"^BH, {k} experts +\d\.\d\d ± ", text, re.MULTILINE)
        assert re.search(rf"^top-{k} +{k}\.00 ± 0\.00 ", text, re.MULTILINE)
