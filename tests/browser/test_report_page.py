"""The report in a real browser (headless Chromium): it draws, it answers, it asks for nothing from a network."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from bh_routing.evaluation.report import make_report
from report_cases import EVIL, make_results, make_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --virtual-time-budget=4000 "
    "--host-resolver-rules=MAP*~NOTFOUND --enable-logging=stderr"
).replace("MAP*~NOTFOUND", "MAP * ~NOTFOUND")

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

# Appended to the page: works the token view as a person would, and writes down what it then shows.
PROBE = """
const seen = [];
const view = document.querySelector(".tokens"), select = view.querySelector("select");
const tokens = () => [...view.querySelectorAll(".text span")];
seen.push("tokens " + tokens().length);
tokens()[1].dispatchEvent(new Event("mouseenter"));
seen.push("told " + view.querySelector(".layers").textContent);
const before = tokens().map(t => t.style.background).join();
select.selectedIndex = 1; select.dispatchEvent(new Event("change"));
seen.push("changed " + (before !== tokens().map(t => t.style.background).join()));
seen.push("injected " + (window.injected === undefined ? "nothing" : "something"));
seen.push("plots " + document.querySelectorAll("svg").length);
seen.push("wider " + (document.documentElement.scrollWidth > document.documentElement.clientWidth));
const out = document.createElement("output"); out.id = "probe"; out.textContent = seen.join(" | ");
document.body.append(out);
"""


def browse(tmp_path: Path, page: Path, *more: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    return subprocess.run(
        [BROWSER, *_flags(), f"--user-data-dir={tmp_path / 'profile'}", *more, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def _flags() -> list[str]:
    """The rule for the resolver holds spaces."""
    head, _, _ = FLAGS.partition("--host-resolver-rules=")
    return [*head.split(), "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr"]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    return probed(path, make_report(make_results(), make_run()))


def probed(path: Path, html: str) -> Path:
    """The page with the probe, which its policy lets run by its hash as it does the page's own script."""
    digest = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    html = html.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    path.write_text(html.replace("</body>", f"<script>{PROBE}</script></body>"), encoding="utf-8")
    return path


def test_the_page_works(tmp_path: Path, page: Path) -> None:
    done = browse(tmp_path, page, "--dump-dom")
    found = re.search(r'<output id="probe">(.*?)</output>', done.stdout)
    assert found, done.stderr[-2000:]
    probe = dict(part.split(" ", 1) for part in found.group(1).split(" | "))
    assert int(probe["tokens"]) == len(make_run()["data"]["night"]["shown"])
    assert "layer 0: " in probe["told"]
    assert "layer 1: " in probe["told"]
    assert probe["changed"] == "true"
    assert probe["injected"] == "nothing"
    assert int(probe["plots"]) >= 4
    assert probe["wider"] == "false"
    assert EVIL not in done.stdout.split("<script")[0]
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert complaints == []


def test_the_page_is_drawn(tmp_path: Path, page: Path) -> None:
    picture = tmp_path / "page.png"
    browse(tmp_path, page, f"--screenshot={picture}", "--window-size=1200,2400", "--hide-scrollbars")
    head = picture.read_bytes()[:24]
    assert struct.unpack(">II", head[16:24]) == (1200, 2400)
    assert picture.stat().st_size > 30_000  # an empty page of that size takes about 10 kB
