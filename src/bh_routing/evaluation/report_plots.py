"""The plots of the report page, as matplotlib figures (the extra ``plot``), and how a figure gets into a page.

Shape legend: L routed layers, E experts.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .._lazy import needed
from .paired import Interval
from .summary import datasets_of, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 8  # policies in a plot of layers: more cannot be told apart
# Distinguishable without colour vision (after Okabe & Ito), and readable on a light and on a dark ground.
COLOURS = ("#3a87c8", "#d9701a", "#17a07a", "#b06fb0", "#a58a1f", "#cf4a5a", "#8a8a8a", "#5fb0d9")
MARKS = "osD^vPX*"
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "bh-routing",  # the same plot has the same identifiers, run by run
    "font.family": "sans-serif",
    "font.size": 10,
}
_NOTHING = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def new_figure(title: str, *, height: float, width: float = 7.5) -> Figure:
    """An empty figure of so many inches.

    Raises
    ------
    MissingDependencyError
        Without matplotlib.
    """
    made = needed("matplotlib.figure", "a plot, and the report that holds it,", "plot")
    figure: Figure = made.Figure(figsize=(width, height), dpi=110, layout="constrained")
    # A dollar sign would begin a formula.
    figure.suptitle(title.replace("$", r"\$"), fontsize=11, x=0.01, ha="left", wrap=True)
    return figure


def svg_text(figure: Figure, **settings: Any) -> str:
    """A figure as an SVG file, the same for the same figure; ``settings`` of matplotlib's ``savefig``."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata=_NOTHING, **settings)
    return buffer.getvalue()


def inline_svg(figure: Figure) -> str:
    """A figure as an element of an HTML page: transparent, its ink in the colour of the page's text."""
    text = svg_text(figure, transparent=True)
    text = text[text.index("<svg") :].replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    return text.replace("stroke: #000000", "stroke: currentColor")


def plots(results: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """The plots by name: ``pareto-DATASET``, ``layers-DATASET``, ``counts-DATASET``."""
    found = {}
    for i, dataset in enumerate(datasets_of(results)):
        rows = summarise(results, dataset)
        name = "".join(c if c.isalnum() or c in "-_" else "_" for c in dataset) or str(i)
        found[f"pareto-{name}"] = pareto_plot(rows, dataset)
        if shown := adaptive_rows(rows):
            found[f"layers-{name}"] = layers_plot(shown)
            found[f"counts-{name}"] = counts_plot(shown)
    return found


def pareto_plot(rows: Sequence[dict[str, Any]], dataset: str) -> Figure:
    """Change of perplexity against experts per token, with intervals; the policies of one name are one series."""
    usual = [r for r in rows if r["change"] is not None]
    # What ruins the model would squeeze everything else into one line: it is named instead of drawn.
    cuts = [r["change"].value for r in usual if family(r["result"]) == "topk"]
    typical = sorted(r["change"].value for r in usual)
    limit = max(0.1, 2 * max(cuts) if cuts else 6 * typical[len(typical) // 2] if typical else 1.0)
    beyond = sorted((r for r in usual if r["change"].value > limit), key=lambda r: -r["change"].value)
    drawn = [r for r in usual if r["change"].value <= limit]
    names = dict.fromkeys(family(r["result"]) for r in beyond)
    note = f" (beyond {limit:.0%}: {', '.join(names)})" if beyond else ""
    series = list(dict.fromkeys(family(r["result"]) for r in drawn))
    figure = new_figure(
        f"Rise of perplexity against experts per token, {dataset}{note}", height=3.8 + 0.09 * len(series)
    )
    axes = figure.subplots()
    for i, name in enumerate(series):
        held = [r for r in drawn if family(r["result"]) == name]
        changes = [r["change"] for r in held]
        axes.errorbar(
            [r["experts"] for r in held],
            [100 * c.value for c in changes],
            [[100 * (c.value - c.low) for c in changes], [100 * (c.high - c.value) for c in changes]],
            label=name,
            **_mark(i),
        )
    front = sorted((r["experts"], 100 * r["change"].value) for r in drawn if r["front"])
    if front:
        axes.step(
            *zip(*front, strict=True), where="post", color="#8a8a8a", ls="--", lw=1, label="Pareto front"
        )
    return _finished(
        axes,
        "experts per token (realised, mean over tokens and layers)",
        "perplexity against the full model, %",
    )


def layers_plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """Experts per token by layer."""
    means = {r["result"]["policy"]: [layer["mean_experts"] for layer in r["result"]["layers"]] for r in rows}
    return _lines("Experts per token by layer", means, "layer", "experts per token")


def counts_plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """Distribution of the number of experts over tokens and layers."""
    shares = {}
    for row in rows:
        histogram = row["result"]["count_histogram"]
        shares[row["result"]["policy"]] = [100 * n / (sum(histogram) or 1) for n in histogram]
    return _lines("How many experts tokens get (all layers)", shares, "experts", "tokens, %")


def load_plot(row: dict[str, Any]) -> Figure:
    """Load of every expert by layer, in order of the model's own: the policy's row under it."""
    cells, names = [], []
    for i, layer in enumerate(row["result"]["layers"]):
        order = sorted(range(len(layer["own_expert_load"])), key=lambda e: -layer["own_expert_load"][e])
        for name, key in ((f"layer {i}, own", "own_expert_load"), ("policy", "expert_load")):
            cells.append([100 * layer[key][e] / (layer["tokens"] or 1) for e in order])
            names.append(name)
    figure = new_figure(
        f"Expert load, {row['result']['policy']} against the model's own", height=0.9 + 0.17 * len(cells)
    )
    heat(figure.subplots(), cells, names, "experts, in order of the model's own load", "% of tokens")
    return figure


def heat(
    axes: Axes,
    cells: Sequence[Sequence[float]],
    names: Sequence[str],
    x_label: str,
    unit: str,
    most: float | None = None,
) -> None:
    """Rows of shaded cells with a scale of their values, up to ``most``; rows may differ in length."""
    width = max(map(len, cells))
    padded = [[*row, *[float("nan")] * (width - len(row))] for row in cells]
    image = axes.imshow(padded, cmap="viridis", vmin=0, vmax=most, aspect="auto", interpolation="none")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel(x_label)
    axes.spines[:].set_visible(False)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.colorbar(image, ax=axes, label=unit, pad=0.01)


def _lines(title: str, lines: Mapping[str, Sequence[float]], x_label: str, y_label: str) -> Figure:
    figure = new_figure(title, height=3.6)
    axes = figure.subplots()
    for i, (name, values) in enumerate(lines.items()):
        axes.plot(range(len(values)), values, label=name, **_mark(i))
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", integer=True)
    return _finished(axes, x_label, y_label)


def _mark(i: int) -> dict[str, Any]:
    again, place = divmod(i, len(COLOURS))  # a colour that comes again has another mark
    return {"color": COLOURS[place], "marker": MARKS[(place + again) % len(MARKS)], "ms": 4.5, "lw": 1.3}


def _finished(axes: Axes, x_label: str, y_label: str) -> Figure:
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(axis="y", color="#8a8a8a", alpha=0.3, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure = axes.get_figure(root=True)
    assert figure is not None
    handles, labels = axes.get_legend_handles_labels()
    labels = [label.replace("$", r"\$") for label in labels]
    if handles:
        columns = 1 if max(map(len, labels)) > 45 else 2
        figure.legend(handles, labels, loc="outside lower left", ncols=columns, fontsize=8.5, frameon=False)
    return figure


# ----------------------------------------------------------------------------------------------- helpers


def adaptive_rows(rows: Sequence[dict[str, Any]], most: int = MOST) -> list[dict[str, Any]]:
    """Rows whose numbers of experts vary, those nearest to half of the full model's first; a few."""
    full = max((r["experts"] for r in rows), default=0.0)
    varying = [r for r in rows if r["result"]["std_experts_per_token"] > 0]
    return sorted(varying, key=lambda r: abs(r["experts"] - full / 2))[:most]


def family(result: dict[str, Any]) -> str:
    """Policies that differ in nothing but their budget or parameter."""
    name, _, body = result["policy"].partition(":")
    numbers = ("experts=", "k=", "p=", "t=", "q=", "alpha=", "scale=")
    rest = [part for part in body.split(",") if part and not part.startswith(numbers)]
    return ", ".join([name, *rest])


def percent(value: Interval | None) -> str:
    if value is None:
        return ""
    if not value.known:
        return f"{value.value:+.1%}"
    return f"{value.value:+.1%} [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"
