"""The report as text: what it holds, that nothing from outside gets in as markup, that plots are well-formed XML."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bh_routing.calibration.passes import calibrate
from bh_routing.cli import main
from bh_routing.errors import MissingDependencyError, ResultsError
from bh_routing.evaluation.report import make_report
from bh_routing.evaluation.report_plots import inline_svg, load_plot, plots, svg_text
from bh_routing.evaluation.results import ResultsFolder
from bh_routing.evaluation.runner import RoutingExperimentRunner
from bh_routing.evaluation.summary import summarise
from report_cases import EVIL, TOKENS, make_result, make_results, make_run


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
    return make_report(make_results(), make_run())


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
            # "#": a shape within the same plot
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
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
    ):
        assert part in text
    assert "(beyond 10%: original)" in text  # named, not drawn: +123 %


def test_no_results() -> None:
    with pytest.raises(ResultsError, match="expected results to report on, got none"):
        make_report([], {})


def test_plots_are_well_formed() -> None:
    drawn, again = plots(make_results()), plots(make_results())
    assert set(drawn) == {"pareto-night", "layers-night", "counts-night"}
    for name, figure in drawn.items():
        text = svg_text(figure)
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert text == svg_text(again[name])  # the same, run by run
        inline = inline_svg(figure)
        assert inline.startswith("<svg")
        assert "stroke: currentColor" in inline


def test_every_policy_is_a_point_with_its_interval() -> None:
    (axes,) = plots(make_results())["pareto-night"].axes
    drawn = {bars.get_label(): bars for bars in axes.containers}
    assert set(drawn) == {"topk", f"bh, statistic={EVIL}", "bh"}  # "original" is beyond
    rows = {row["result"]["policy"]: row for row in summarise(make_results(), "night")}
    change = rows["topk:k=4"]["change"]
    line, _, (bars,) = drawn["topk"].lines
    assert (line.get_xdata()[0], line.get_ydata()[0]) == (4.0, 100 * change.value)
    assert bars.get_segments()[0][:, 1] == pytest.approx([100 * change.low, 100 * change.high])


def test_loads_are_ordered_by_the_models_own() -> None:
    (row,) = [r for r in summarise(make_results(), "night") if r["result"]["policy"] == "bh:experts=3"]
    image = load_plot(row).axes[0].images[0].get_array()
    layer = row["result"]["layers"][0]
    assert image.shape == (4, 8)
    assert image[0].tolist() == [100 * n / 4096 for n in sorted(layer["own_expert_load"], reverse=True)]
    assert image[1].tolist() == [100 * (round(4096 * x / 100) // 2) / 4096 for x in image[0]]


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        MissingDependencyError, match=r"needs matplotlib, .* pip install 'bh-routing\[plot\]'"
    ):
        make_report(make_results(), make_run())


def test_an_infinite_perplexity_is_shown() -> None:
    results = [make_result("full", 8.0, 0.0, 1), make_result("bh:experts=2", 2.0, 0.1, 2, perplexity=None)]
    assert "bh:experts=2" in make_report(results, make_run())


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
    assert "held-out null p-values" in page
    assert "\\u003c" in page  # the text has <b>the rain</b>, one character a token
    assert "<b>the rain" not in page

    calibration.save(tmp_path / "c.safetensors")
    asked = ["report", str(tmp_path / "r"), "-o", str(tmp_path / "x.html")]
    assert main([*asked, "--calibration", str(tmp_path / "c.safetensors")]) == 0
    again = (tmp_path / "x.html").read_text()
    assert "held-out null p-values" in again
    assert again.split("<h2>Calibration")[0] == page.split("<h2>Calibration")[0]
    assert "2 results" in " ".join(capsys.readouterr().out.split())  # wherever the line breaks
    assert main(["report", str(tmp_path)]) == 2
    assert "got no run.json there" in capsys.readouterr().err
    assert len(ResultsFolder(tmp_path / "r").results()) == 2
