"""The report in a real browser (headless Chromium): it draws, it answers, it asks for nothing from a network."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from bh_routing.evaluation.report import make_report
from bh_routing.evaluation.results import ResultsFolder
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
seen.push("headings " + document.querySelectorAll("h1").length);
seen.push("dark " + matchMedia("(prefers-color-scheme: dark)").matches);
const light = colour => {
  const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255).map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2] + 0.05;
};
const style = getComputedStyle(document.body), ink = light(style.color), ground = light(style.backgroundColor);
seen.push("contrast " + Math.floor(Math.max(ink / ground, ground / ink)));
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


def hostile_page(tmp_path: Path) -> Path:
    """The report of a folder that somebody else made: markup, templates, blanks and quotes in every text."""
    evil = [
        EVIL,
        "<img src=x onerror=window.injected=1>",
        "{{body}}",
        "my  label",
        "' onmouseover='window.injected=1",
        "</script>" + EVIL,
    ]
    folder = ResultsFolder(tmp_path / "elsewhere")
    folder.path.mkdir()
    results = make_results()
    for i, result in enumerate(results):
        for name in ("model", "device", "dtype", "threads", "seed", "window", "stride"):
            result[name] = evil[1]
        result["versions"] = {evil[1]: evil[5]}
        if i > 1:
            result["policy"] = evil[i] + " " * i + "x" * 150
        result["key"] = str(i)
        folder.append(result)
    folder.run_path.write_text(json.dumps(make_run() | {"model": "{{body}}" + evil[1]}))
    return probed(tmp_path / "hostile.html", make_report(folder.results(), folder.run()))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [500, 1200])
def test_a_hostile_folder(tmp_path: Path, width: int, dark: bool) -> None:
    """Nothing of it runs, the token view works, and the page is no wider than its window."""
    page = hostile_page(tmp_path)
    flags = (f"--window-size={width},2000", *(["--blink-settings=preferredColorScheme=0"] if dark else []))
    done = browse(tmp_path, page, "--dump-dom", *flags)
    found = re.search(r'<output id="probe">(.*?)</output>', done.stdout)
    assert found, done.stderr[-2000:]
    probe = dict(part.split(" ", 1) for part in found.group(1).split(" | "))
    assert probe["injected"] == "nothing"
    assert probe["changed"] == "true"
    assert probe["wider"] == "false"
    assert probe["dark"] == str(dark).lower()
    assert int(probe["headings"]) == 1
    assert int(probe["contrast"]) >= 7
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert complaints == []


def test_the_policy_stops_a_script_that_is_not_the_page_s_own(tmp_path: Path) -> None:
    """The second wall: even markup that got into the page unescaped would not run."""
    page = tmp_path / "page.html"
    html = make_report(make_results(), make_run())
    held = "<script>document.title = 'injected'</script><img src=x onerror=\"document.title='injected'\">"
    page.write_text(html.replace("</body>", held + "</body>"), encoding="utf-8")
    done = browse(tmp_path, page, "--dump-dom")
    assert "<title>injected" not in done.stdout
    assert done.stderr.count("violates the following Content Security Policy directive") >= 2


def test_the_page_is_drawn(tmp_path: Path, page: Path) -> None:
    picture = tmp_path / "page.png"
    browse(tmp_path, page, f"--screenshot={picture}", "--window-size=1200,2400", "--hide-scrollbars")
    head = picture.read_bytes()[:24]
    assert struct.unpack(">II", head[16:24]) == (1200, 2400)
    assert picture.stat().st_size > 30_000  # an empty page of that size takes about 10 kB
