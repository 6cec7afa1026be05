"""One self-contained HTML page of a results folder: tables, plots as inline SVG, the token view. No network.

Shape legend: L routed layers, E experts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ..errors import RecordError
from .report_plots import (
    adaptive_rows,
    counts_plot,
    layers_plot,
    load_plot,
    p_value_plot,
    pareto_plot,
    percent,
)
from .summary import other_datasets, summarise, text_datasets
from .svg import Series, plot

if TYPE_CHECKING:
    from ..calibration.calibration import Calibration


def make_report(
    records: Sequence[dict[str, Any]], run: dict[str, Any], calibration: Calibration | None = None
) -> str:
    """The page as text.

    Parameters
    ----------
    records : sequence of dict
        From ``results.jsonl``.
    run : dict
        From ``run.json``.
    calibration : Calibration, optional
        Adds the null distributions and the calibration of the p-values.

    Raises
    ------
    RecordError
        If there is no record.
    """
    if not records:
        raise RecordError("expected records to report on, got none; run `bh-routing evaluate` first.")
    sections = [_heading(records, run)]
    for dataset in text_datasets(records):
        sections.append(_text_section(records, run, dataset))
    for dataset in other_datasets(records):
        sections.append(_accuracy_section(records, dataset))
    if calibration is not None:
        sections.append(_calibration_section(calibration))
    template = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    title = escape(f"Routing policies on {run.get('model', 'a model')}")
    return template.replace("{{title}}", title).replace("{{body}}", "\n".join(sections))


def _heading(records: Sequence[dict[str, Any]], run: dict[str, Any]) -> str:
    first = records[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return (
        f"<h1>Routing policies on {escape(str(run.get('model', first['model'])))}</h1>"
        f"<p class='note'>{len(records)} records, {escape(first['device'])}, {escape(first['dtype'])}, "
        f"{first['threads']} threads; {escape(versions)}; seed {first['seed']}.</p>"
    )


def _text_section(records: Sequence[dict[str, Any]], run: dict[str, Any], dataset: str) -> str:
    rows = summarise(records, dataset)
    parts = [f"<h2>{escape(dataset)}</h2>", _table(rows)]
    first = rows[0]["record"]
    parts.append(
        f"<p class='note'>{first['tokens']:,} tokens in windows of {first['window']}, stride {first['stride']}. Perplexity "
        "per token; per word: the same loss spread over the words of the text. Changes are relative changes of "
        "perplexity with 95 % intervals of a paired bootstrap over 512-token blocks: what another stretch of the same "
        "kind of text would have given, nothing more. <em>vs top-k</em>: against plain top-k at the same number of "
        "experts; <em>within noise</em> where the interval holds 0. ★ marks the Pareto front: no policy has both fewer "
        "experts and a lower perplexity. FLOPs: two per activated parameter that multiplies, attention scores left "
        "out.</p>"
    )
    if all(r["experts"] is None for r in rows):
        return "<section>" + "".join(parts) + "</section>"
    parts.append(pareto_plot(rows, dataset))
    if shown := adaptive_rows(rows):
        parts += [layers_plot(shown), counts_plot(shown)]
        parts.append("<h3>Expert load and balance</h3>" + _balance_table(shown))
        parts += [
            f"<details><summary>{escape(r['record']['policy'])}</summary>{load_plot(r)}</details>"
            for r in shown
        ]
    parts.append(_token_view(rows, run.get("data", {}).get(dataset, {}).get("shown", [])))
    return "<section>" + "".join(parts) + "</section>"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    kl = any(r["record"].get("kl") is not None for r in rows)
    heads = ["policy", "experts", "±", "perplexity", "per word", "vs full", "vs top-k", "", "accuracy"]
    heads += (["KL"] if kl else []) + ["M parameters", "MFLOPs", "tokens/s"]
    lines = []
    for row in rows:
        r = row["record"]
        cells = [
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
            _number(None if r["active_parameters"] is None else r["active_parameters"] / 1e6, ".2f"),
            _number(None if r["flops_per_token"] is None else r["flops_per_token"] / 1e6, ".2f"),
            _number(r["tokens_per_second"], ",.0f"),
        ]
        lines.append("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>")
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _balance_table(rows: Sequence[dict[str, Any]]) -> str:
    heads = [
        "policy",
        "layer",
        "experts",
        "±",
        "largest load / mean",
        "own",
        "unused",
        "own",
        "kept of own",
        "weight lost",
    ]
    lines = []
    for row in rows:
        for i, layer in enumerate(row["record"]["layers"]):
            cells = [
                row["record"]["policy"] if i == 0 else "",
                str(i),
                _number(layer["mean_experts"], ".2f"),
                _number(layer["std_experts"], ".2f"),
                _number(layer["load_imbalance"], ".2f"),
                _number(layer["own_load_imbalance"], ".2f"),
                str(layer["unused_experts"]),
                str(layer["own_unused_experts"]),
                _number(layer["jaccard"], ".1%"),
                _number(layer["lost_weight_share"], ".1%"),
            ]
            lines.append("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>")
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    return (
        "<p class='note'>kept of own: overlap (Jaccard) of the experts that ran with the model's own top-k; weight lost: "
        "share of the router's own weight on experts that were dropped.</p>"
        f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _token_view(rows: Sequence[dict[str, Any]], tokens: Sequence[str]) -> str:
    """The text with every token shaded by its number of experts; counts per layer on hover and focus."""
    held = {
        r["record"]["policy"]: r["record"]["shown_counts"]
        for r in adaptive_rows(rows, most=60)
        if r["record"]["shown_counts"]
    }
    if not held or not tokens:
        return ""
    most = max(max(map(max, counts)) for counts in held.values())
    data = json.dumps({"tokens": list(tokens), "counts": held, "most": most}, ensure_ascii=True)
    # no "</script>" and no comment can begin within the data
    data = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    options = "".join(f"<option>{escape(name)}</option>" for name in held)
    return (
        "<h3>Token view</h3><p class='note'>The darker a token, the more experts it got on average over layers. Point at "
        "a token (or step through with Tab) to see every layer.</p>"
        f"<div class='tokens'><label>policy <select>{options}</select></label> <span class='scale'></span>"
        "<p class='text'></p><p class='layers' aria-live='polite'></p>"
        f"<script type='application/json'>{data}</script></div>"
    )


def _accuracy_section(records: Sequence[dict[str, Any]], dataset: str) -> str:
    held = [r for r in records if r["dataset"] == dataset]
    names = {
        "last_word_accuracy": "last word",
        "last_word_perplexity": "last-word perplexity",
        "choice_accuracy": "accuracy",
        "choice_accuracy_normalised": "accuracy by length",
    }
    keys = [k for k in names if held[0].get(k) is not None]
    heads = ["policy", "experts", *(names[k] for k in keys), "± (binomial)"]
    lines = []
    for r in held:
        accuracy = r[keys[0]]
        error = math.sqrt(max(0.0, accuracy * (1 - accuracy)) / r["items"])
        cells = [r["policy"], _number(r["mean_experts_per_token"], ".2f")]
        cells += [_number(r[k], ".3f") for k in keys] + [f"{error:.3f}"]
        lines.append("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>")
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    return (
        f"<section><h2>{escape(dataset)}</h2><p class='note'>{held[0]['items']} items.</p><div class='wide'><table>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _calibration_section(calibration: Calibration) -> str:
    """The statistic of passed-over and selected experts, and how uniform the p-values of the passed-over ones are."""
    import torch

    parts = ["<h2>Calibration</h2>", f"<pre>{escape(repr(calibration))}</pre>"]
    kind = "logprob" if "logprob" in calibration.histograms else next(iter(calibration.histograms))
    sets = calibration.histograms[kind]
    series = []
    for name, title in (("unselected", "passed over"), ("selected", "selected")):
        counts_B = sets[name].counts_LEB.sum((0, 1)).double()
        edges_B = torch.as_tensor(sets[name].edges).double()
        step = max(1, len(counts_B) // 160)
        num = len(counts_B) // step
        pooled = counts_B[: num * step].view(num, step).sum(1)
        widths = (edges_B[step::step][:num] - edges_B[:-1:step][:num]).clamp_min(1e-12)
        density = pooled / pooled.sum().clamp_min(1) / widths
        centres = edges_B[:-1:step][:num] + widths / 2
        seen = (pooled > 0).nonzero().flatten()
        if len(seen):
            part = slice(int(seen[0]), int(seen[-1]) + 1)
            series.append(
                Series(
                    name=title, x=centres[part].tolist(), y=density[part].tolist(), line=True, points=False
                )
            )
    parts.append(
        plot(
            series,
            title=f"Null distribution: the statistic ({kind}) by the model's own choice, all layers",
            x_label=kind,
            y_label="density",
            y_from_zero=True,
        )
    )
    if calibration.reservoir is not None and calibration.reservoir.num:
        parts.append(p_value_plot(calibration))
    return "<section>" + "".join(parts) + "</section>"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
