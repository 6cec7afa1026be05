"""One self-contained HTML page of a results folder: tables, plots as inline SVG, the token view. No network.

Shape legend: L routed layers, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ..errors import ResultsError
from .report_plots import adaptive_rows, counts_plot, inline_svg, layers_plot, load_plot, pareto_plot, percent
from .summary import datasets_of, summarise

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
        If there is no result.
    MissingDependencyError
        Without matplotlib.
    """
    if not results:
        raise ResultsError("expected results to report on, got none; run `bh-routing evaluate` first.")
    sections = [_heading(results, run), *(_section(results, run, d) for d in datasets_of(results))]
    if calibration is not None:
        from ..calibration.plots import calibration_figure

        drawn = f"<div class='wide broad'>{inline_svg(calibration_figure(calibration))}</div>"
        sections.append(f"<h2>Calibration</h2><pre>{escape(repr(calibration))}</pre>{drawn}")
    template = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    title = escape(f"Routing policies on {run.get('model', 'a model')}")
    return template.replace("{{title}}", title).replace("{{body}}", "\n".join(sections))


def _heading(results: Sequence[dict[str, Any]], run: dict[str, Any]) -> str:
    first = results[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return (
        f"<h1>Routing policies on {escape(str(run.get('model', first['model'])))}</h1>"
        f"<p class='note'>{len(results)} results, {escape(first['device'])}, {escape(first['dtype'])}, "
        f"{first['threads']} threads; {escape(versions)}; seed {first['seed']}.</p>"
    )


def _section(results: Sequence[dict[str, Any]], run: dict[str, Any], dataset: str) -> str:
    rows = summarise(results, dataset)
    first = rows[0]["result"]
    parts = [
        f"<h2>{escape(dataset)}</h2>",
        _policies(rows),
        f"<p class='note'>{first['tokens']:,} tokens in windows of {first['window']}, stride {first['stride']}. Perplexity "
        "per token; per word: the same loss spread over the words of the text. Changes are relative changes of "
        "perplexity with 95 % intervals of a paired bootstrap over 512-token blocks: what another stretch of the same "
        "kind of text would have given, nothing more. <em>vs top-k</em>: against plain top-k at the same number of "
        "experts; <em>within noise</em> where the interval holds 0. ★ marks the Pareto front: no policy has both fewer "
        "experts and a lower perplexity. FLOPs: two per activated parameter that multiplies, attention scores left "
        "out.</p>",
        _plot(pareto_plot(rows, dataset)),
    ]
    if shown := adaptive_rows(rows):
        parts += [_plot(layers_plot(shown)), _plot(counts_plot(shown)), _balance(shown)]
        for row in shown:
            policy = escape(row["result"]["policy"])
            parts.append(f"<details><summary>{policy}</summary>{_plot(load_plot(row))}</details>")
    parts.append(_token_view(rows, run.get("data", {}).get(dataset, {}).get("shown", [])))
    return "<section>" + "".join(parts) + "</section>"


def _policies(rows: Sequence[dict[str, Any]]) -> str:
    kl = any(r["result"].get("kl") is not None for r in rows)
    heads = ["policy", "experts", "±", "perplexity", "per word", "vs full", "vs top-k", "", "accuracy"]
    heads += (["KL"] if kl else []) + ["M parameters", "MFLOPs", "tokens/s"]
    cells = []
    for row in rows:
        r = row["result"]
        cells.append(
            [
                ("★ " if row["front"] else "") + r["policy"],
                _number(row["experts"], ".2f"),
                _number(r["std_experts_per_token"], ".2f"),
                _number(row["perplexity"], ".3f"),
                _number(r["word_perplexity"], ".4g"),
                percent(row["change"]),
                percent(row["against_topk"]),
                row["verdict"],
                _number(r["token_accuracy"], ".2%"),
                *([_number(r["kl"], ".4f")] if kl else []),
                _number(r["active_parameters"], ".2f", 1e6),
                _number(r["flops_per_token"], ".2f", 1e6),
                _number(r["tokens_per_second"], ",.0f"),
            ]
        )
    return _table(heads, cells)


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
    cells = [
        ["" if i else row["result"]["policy"], str(i), *(_number(layer[k], f) for k, f in _BALANCE.values())]
        for row in rows
        for i, layer in enumerate(row["result"]["layers"])
    ]
    return (
        "<h3>Expert load and balance</h3><p class='note'>kept of own: overlap (Jaccard) of the experts that ran with "
        "the model's own top-k; weight lost: share of the router's own weight on experts that were dropped.</p>"
        + _table(["policy", "layer", *_BALANCE], cells)
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    lines = ("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _plot(figure: Figure) -> str:
    return f"<div class='wide'>{inline_svg(figure)}</div>"


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else format(value if unit == 1 else value / unit, form)


def _token_view(rows: Sequence[dict[str, Any]], tokens: Sequence[str]) -> str:
    """The text with every token shaded by its number of experts; counts per layer on hover and focus."""
    held = {
        r["result"]["policy"]: r["result"]["shown_counts"]
        for r in adaptive_rows(rows, most=60)
        if r["result"]["shown_counts"]
    }
    if not held or not tokens:
        return ""
    most = max(max(map(max, counts)) for counts in held.values())
    data = json.dumps({"tokens": list(tokens), "counts": held, "most": most}, ensure_ascii=True)
    # no "</script>" and no comment can begin within the data
    data = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    options = "".join(f"<option>{escape(name)}</option>" for name in held)
    return (
        "<h3>Token view</h3><p class='note'>The stronger a token is shaded, the more experts it got on average over "
        "layers. Point at a token (or step through with Tab) to see every layer.</p>"
        f"<div class='tokens'><label>policy <select>{options}</select></label> <span class='scale'></span>"
        "<p class='text'></p><p class='layers' aria-live='polite'></p>"
        f"<script type='application/json'>{data}</script></div>"
    )
