"""The report as text: what it holds, that nothing from outside gets in as markup, that plots are well-formed XML."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bh_routing.calibration.passes import calibrate
from bh_routing.cli import main
from bh_routing.errors import RecordError
from bh_routing.evaluation.report import make_report
from bh_routing.evaluation.report_plots import plots
from bh_routing.evaluation.results import ResultsFolder
from bh_routing.evaluation.runner import RoutingExperimentRunner
from bh_routing.evaluation.svg import Series, heat, plot, shaded, ticks
from report_cases import EVIL, TOKENS, make_record, make_records, make_run


class Reader(HTMLParser):
    """Tags, their attributes, and the text outside of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.data.append(data)


@pytest.fixture(scope="module")
def page() -> str:
    return make_report(make_records(), make_run())


def test_everything_from_outside_is_escaped(page: str) -> None:
    assert EVIL not in page
    reader = Reader()
    reader.feed(page)
    scripts = [attributes for tag, attributes in reader.tags if tag == "script"]
    assert scripts == [{"type": "application/json"}, {}]
    assert f"Routing policies on a model {EVIL}" in reader.data  # there, as text


def test_nothing_is_asked_from_a_network(page: str) -> None:
    reader = Reader()
    reader.feed(page)
    for _, attributes in reader.tags:
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    links = set(re.findall(r"https?://[^\"'\s<>]+", page))
    assert links == {"http://www.w3.org/2000/svg"}  # the name of the SVG namespace
    assert "default-src 'none'" in page


def test_the_token_view_holds_the_tokens(page: str) -> None:
    held = re.search(r"<script type='application/json'>(.*?)</script>", page, re.DOTALL)
    assert held
    data = json.loads(held.group(1))
    assert data["tokens"] == TOKENS
    assert set(data["counts"]) == {f"bh:experts=4,statistic={EVIL}", "bh:experts=3"}
    assert all(len(row) == len(TOKENS) for rows in data["counts"].values() for row in rows)
    assert data["most"] <= 8


def test_what_the_page_says(page: str) -> None:
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    for part in (
        "★ full",
        "vs top-k",
        "better",
        "Expert load and balance",
        "Token view",
        "words",
        "40 items",
    ):
        assert part in text
    assert "(beyond 11%: original)" in text  # named, not drawn: +123 %


def test_no_records() -> None:
    with pytest.raises(RecordError, match="expected records to report on, got none"):
        make_report([], {})


def test_plots_are_well_formed() -> None:
    drawn = plots(make_records())
    assert set(drawn) == {"pareto-night", "layers-night", "counts-night"}
    for svg in drawn.values():
        root = ElementTree.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        numbers = [float(v) for e in root.iter() for k in ("cx", "x1", "x2") if (v := e.get(k))]
        assert numbers
        assert all(0 <= n <= 900 for n in numbers)


def test_every_point_is_drawn_once() -> None:
    svg = plot(
        [Series(name="a<b", x=[1, 2, 3], y=[1, float("nan"), 3]), Series(name="c", x=[1], y=[2])],
        title="t & u",
        x_label="x",
        y_label="y",
    )
    root = ElementTree.fromstring(svg)
    marks = [e for e in root.iter() if e.tag.endswith(("circle", "polygon"))]
    assert len(marks) == 3 + 2  # three finite points, two in the legend
    assert "nothing to show" in plot([], title="t", x_label="x", y_label="y")


def test_heat_and_shades() -> None:
    root = ElementTree.fromstring(heat([[0.0, 2.0]], title="h", names=["n"], labels=[["a", "<b>"]]))
    cells = [e for e in root.iter() if e.tag.endswith("rect")][1:]
    assert [c.get("fill") for c in cells] == [shaded(0), shaded(1)] == ["#ffffff", "#08519c"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 117), (0.001, 0.0013), (5, 5)])
def test_ticks_lie_between_the_ends(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 1 <= len(found) <= 8
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in found)


def test_an_infinite_perplexity_is_shown() -> None:
    records = [make_record("full", 8.0, 0.0, 1), make_record("bh:experts=2", 2.0, 0.1, 2, perplexity=None)]
    assert "bh:experts=2" in make_report(records, make_run())


def test_from_the_runner_and_the_command_line(tiny_olmoe: Any, tmp_path: Path, capsys: Any) -> None:
    from test_experiments import TEXT, Letters

    model = tiny_olmoe()
    calibration = calibrate(model, None, [Letters()(TEXT).input_ids], window=64, progress=False)
    runner = RoutingExperimentRunner(
        model, Letters(), ["topp:p=0.4"], {"night": TEXT}, tmp_path / "r", calibration=calibration, window=64
    )
    frame = runner.run_all_experiments()
    assert sorted(p.name for p in runner.visualize_results(frame)) == [
        "counts-night.svg",
        "layers-night.svg",
        "pareto-night.svg",
    ]
    page = runner.generate_report(frame).read_text()
    assert "p-values of passed-over experts" in page
    assert "\\u003c" in page  # the text has <b>the rain</b>, one character a token
    assert "<b>the rain" not in page

    calibration.save(tmp_path / "c.safetensors")
    asked = ["report", str(tmp_path / "r"), "-o", str(tmp_path / "x.html")]
    assert main([*asked, "--calibration", str(tmp_path / "c.safetensors")]) == 0
    again = (tmp_path / "x.html").read_text()
    assert "p-values of passed-over experts" in again
    assert again.split("<h2>Calibration")[0] == page.split("<h2>Calibration")[0]
    assert "2 records" in " ".join(capsys.readouterr().out.split())  # wherever the line breaks
    assert main(["report", str(tmp_path)]) == 2
    assert "got no run.json there" in capsys.readouterr().err
    assert len(ResultsFolder(tmp_path / "r").records()) == 2
