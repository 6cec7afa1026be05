"""One self-contained HTML page of a results folder: tables, plots as inline SVG, the token view. No network.

Shape legend: L routed layers, E experts.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ..errors import ResultsError
from .report_plots import adaptive_rows, counts_plot, inline_svg, layers_plot, load_plot, pareto_plot, percent
from .results import FORMAT, check_result, check_run
from .summary import by_arithmetic, cells, datasets_of, measured_kl, summarise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..calibration.calibration import Calibration


def make_report(
    results: Sequence[dict[str, Any]], run: dict[str, Any], calibration: Calibration | None = None
) -> str:
    """The page as text.

    Parameters
    ----------
    results : sequence of dict
        From ``results.jsonl``.
    run : dict
        From ``run.json``.
    calibration : Calibration, optional
        Adds its picture: the null distributions, and whether held-out p-values are uniform.

    Raises
    ------
    ResultsError
        If there is no result, or one is none.
    MissingDependencyError
        Without matplotlib.
    """
    if not results:
        raise ResultsError("expected results to report on, got none; run `bh-routing evaluate` first.")
    try:
        results = [check_result(result) for result in results]
        run = check_run({"format": FORMAT, "model": results[0]["model"]} | run)
    except ValueError as error:
        raise ResultsError(f"there is no report of what is no result: {error}; measure it again.") from None
    sections = [_heading(results, run), *(_section(results, run, d) for d in datasets_of(results))]
    if calibration is not None:
        from ..calibration.plots import calibration_figure

        drawn = f"<div class='wide broad'>{inline_svg(calibration_figure(calibration))}</div>"
        sections.append(f"<h2>Calibration</h2><pre>{escape(repr(calibration))}</pre>{drawn}")
    template = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    script = template[template.index("<script>") + len("<script>") : template.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    filled = {
        "title": escape(f"Routing policies on {run['model']}"),
        "body": "\n".join(sections),
        "script": f"'sha256-{digest}'",  # this script and no other
    }
    return re.sub(
        r"\{\{(\w+)\}\}", lambda found: filled[found[1]], template
    )  # what is filled in is not read again


def _heading(results: Sequence[dict[str, Any]], run: dict[str, Any]) -> str:
    first = results[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return (
        f"<h1>Routing policies on {escape(run['model'])}</h1>"
        f"<p class='note'>{len(results)} result{'' if len(results) == 1 else 's'}, {escape(first['device'])}, {escape(first['dtype'])}, "
        f"{_said(first['threads'])} threads; {escape(versions)}; seed {_said(first['seed'])}.</p>"
    )


def _section(results: Sequence[dict[str, Any]], run: dict[str, Any], dataset: str) -> str:
    rows = summarise(results, dataset)
    first = rows[0]["result"]
    parts = [
        f"<h2>{escape(dataset)}</h2>",
        _policies(rows),
        f"<p class='note'>{first['tokens']:,} tokens in windows of {_said(first['window'])}, stride {_said(first['stride'])}. Perplexity "
        "per token; per word: the same loss spread over the words of the text. Changes are relative changes of "
        "perplexity with 95 % intervals of a paired bootstrap over 512-token blocks: what another stretch of the same "
        "kind of text would have given, nothing more. <em>vs top-k</em>: against plain top-k at the same number of "
        "experts; <em>within noise</em> where the interval holds 0. ★ marks the Pareto front: no policy has both fewer "
        "experts and a lower perplexity. Arithmetic: what experts and compensation multiply, in experts per token and layer; MB: "
        "of both, read for one token alone, in all layers. FLOPs: two per activated parameter that multiplies, attention "
        "scores left out.</p>",
        _plot(pareto_plot(rows, dataset)),
        _arithmetic(rows),
    ]
    if shown := adaptive_rows(rows):
        parts += [_plot(layers_plot(shown)), _plot(counts_plot(shown)), _balance(shown)]
        for row in shown:
            policy = escape(row["result"]["policy"])
            parts.append(f"<details><summary>{policy}</summary>{_plot(load_plot(row))}</details>")
    data = run.get("data", {}).get(first["dataset"], {})
    if first.get("text", data.get("digest")) == data.get(
        "digest"
    ):  # the folder shows the tokens of the last text
        parts.append(_token_view(rows, data.get("shown", [])))
    return "<section>" + "".join(parts) + "</section>"


def _policies(rows: Sequence[dict[str, Any]]) -> str:
    left = ("experts", "±", "arithmetic", "MB", "perplexity", "per word")
    right = ("accuracy", *measured_kl(rows), "M parameters", "MFLOPs", "tokens/s")
    lines = []
    for row in rows:
        changes = [percent(row["change"]), percent(row["against_topk"]), row["verdict"]]
        lines.append([_starred(row, "front"), *cells(row, *left), *changes, *cells(row, *right)])
    return _table(["policy", *left, "vs full", "vs top-k", "", *right], lines)


def _starred(row: dict[str, Any], front: str) -> str:
    return ("★ " if row[front] else "") + str(row["result"]["policy"])


def _arithmetic(rows: Sequence[dict[str, Any]]) -> str:
    """The policies by what they multiply, where that is said."""
    ranked = by_arithmetic(rows)
    if not ranked:
        return ""
    left, kl = ("arithmetic", "experts", "MB", "perplexity"), measured_kl(ranked)
    lines = [
        [_starred(row, "arithmetic_front"), *cells(row, *left), percent(row["change"]), *cells(row, *kl)]
        for row in ranked
    ]
    return (
        "<h3>At equal arithmetic</h3><p class='note'>The same policies by arithmetic: compare those that stand beside each "
        "other. ★: no policy has both less arithmetic and a lower perplexity.</p>"
        + _table(["policy", *left, "vs full", *kl], lines)
    )


_BALANCE = {  # heading -> (figure of a layer, format)
    "experts": ("mean_experts", ".2f"),
    "±": ("std_experts", ".2f"),
    "largest load / mean": ("load_imbalance", ".2f"),
    "own largest / mean": ("own_load_imbalance", ".2f"),
    "unused": ("unused_experts", "d"),
    "own unused": ("own_unused_experts", "d"),
    "kept of own": ("jaccard", ".1%"),
    "weight lost": ("lost_weight_share", ".1%"),
}


def _balance(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            "" if i else row["result"]["policy"],
            str(i),
            *("" if layer[k] is None else format(layer[k], f) for k, f in _BALANCE.values()),
        ]
        for row in rows
        for i, layer in enumerate(row["result"]["layers"])
    ]
    return (
        "<h3>Expert load and balance</h3><p class='note'>kept of own: overlap (Jaccard) of the experts that ran with "
        "the model's own top-k; weight lost: share of the router's own weight on experts that were dropped.</p>"
        + _table(["policy", "layer", *_BALANCE], lines)
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    lines = ("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _plot(figure: Figure) -> str:
    return f"<div class='wide'>{inline_svg(figure)}</div>"


def _said(value: object) -> str:
    """A setting, as text of a page."""
    return escape(str(value))


def _token_view(rows: Sequence[dict[str, Any]], tokens: Sequence[str]) -> str:
    """The text with every token shaded by its number of experts; counts per layer on hover and focus."""
    held = [r["result"] for r in adaptive_rows(rows, most=60) if any(map(any, r["result"]["shown_counts"]))]
    if not held or not tokens:
        return ""
    most = max(max(map(max, r["shown_counts"])) for r in held)
    # A browser joins the blanks of a label: the labels here are those that it shows, and no two the same.
    counts: dict[str, list[list[int]]] = {}
    for result in held:
        label = name = " ".join(result["policy"].split())
        while label in counts:
            label = f"{name} ({len(counts) + 1})"
        counts[label] = result["shown_counts"]
    data = json.dumps({"tokens": list(tokens), "labels": list(counts), "counts": counts, "most": most})
    # no "</script>" and no comment can begin within the data
    data = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    options = "".join(f"<option>{escape(label)}</option>" for label in counts)
    return (
        "<h3>Token view</h3><p class='note'>The stronger a token is shaded, the more experts it got on average over "
        "layers. Point at a token (or step through with Tab) to see every layer.</p>"
        f"<div class='tokens'><label>policy <select>{options}</select></label> <span class='scale'></span>"
        "<p class='text'></p><p class='layers' aria-live='polite'></p>"
        f"<script type='application/json'>{data}</script></div>"
    )
