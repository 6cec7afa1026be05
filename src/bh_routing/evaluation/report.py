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
from .paired import Interval
from .summary import other_datasets, summarise, text_datasets
from .svg import Series, heat, plot

if TYPE_CHECKING:
    from ..calibration import Calibration

MOST = 8  # policies in a plot of layers: more cannot be told apart


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


def plots(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The plots by name, as SVG text: ``pareto-DATASET``, ``layers-DATASET``, ``counts-DATASET``."""
    found = {}
    for i, dataset in enumerate(text_datasets(records)):
        rows = summarise(records, dataset)
        name = "".join(c if c.isalnum() or c in "-_" else "_" for c in dataset) or str(i)
        found[f"pareto-{name}"] = pareto_plot(rows, dataset)
        if shown := _adaptive(rows):
            found[f"layers-{name}"] = layers_plot(shown)
            found[f"counts-{name}"] = counts_plot(shown)
    return found


# ------------------------------------------------------------------------------------------------- plots


def pareto_plot(rows: Sequence[dict[str, Any]], dataset: str) -> str:
    """Change of perplexity against experts per token, with intervals; the policies of one name are one series."""
    families: dict[str, list[dict[str, Any]]] = {}
    usual = [r for r in rows if r["experts"] is not None and r["change"] is not None]
    # What ruins the model would squeeze everything else into one line: it is named instead of drawn.
    cuts = [r["change"].value for r in usual if _family(r["record"]) == "topk"]
    typical = sorted(r["change"].value for r in usual)
    limit = max(0.1, 2 * max(cuts) if cuts else 6 * typical[len(typical) // 2] if typical else 1.0)
    beyond = [r for r in usual if r["change"].value > limit]
    for row in usual:
        if row not in beyond:
            families.setdefault(_family(row["record"]), []).append(row)
    series = [
        Series(
            name=name,
            x=[r["experts"] for r in held],
            y=[100 * r["change"].value for r in held],
            low=[100 * r["change"].low for r in held],
            high=[100 * r["change"].high for r in held],
            labels=[
                f"{r['record']['policy']}: {r['experts']:.2f} experts, {_percent(r['change'])}" for r in held
            ],
            line=len(held) > 1,
        )
        for name, held in families.items()
    ]
    note = ""
    if beyond:
        names = dict.fromkeys(_family(r["record"]) for r in sorted(beyond, key=lambda r: -r["change"].value))
        note = f" (beyond {limit:.0%}: {', '.join(names)})"
    front = [(r["experts"], 100 * r["change"].value) for r in usual if r["front"] and r not in beyond]
    return plot(
        series,
        title=f"Rise of perplexity against experts per token, {dataset}{note}",
        x_label="experts per token (realised, mean over tokens and layers)",
        y_label="perplexity against the full model",
        width=900,
        height=440,
        percent=True,
        front=front,
    )


def layers_plot(rows: Sequence[dict[str, Any]]) -> str:
    """Experts per token by layer."""
    depth = max(len(r["record"]["layers"]) for r in rows)
    return plot(
        [
            Series(
                name=r["record"]["policy"],
                x=list(range(len(r["record"]["layers"]))),
                y=[layer["mean_experts"] for layer in r["record"]["layers"]],
                line=True,
            )
            for r in rows
        ],
        title="Experts per token by layer",
        x_label="layer",
        y_label="experts per token",
        y_from_zero=True,
        x_names=[str(i) for i in range(depth)] if depth <= 32 else (),
    )


def counts_plot(rows: Sequence[dict[str, Any]]) -> str:
    """Distribution of the number of experts over tokens and layers."""
    series = []
    for row in rows:
        histogram = row["record"]["count_histogram"]
        total = sum(histogram) or 1
        series.append(
            Series(
                name=row["record"]["policy"],
                x=list(range(len(histogram))),
                y=[100 * n / total for n in histogram],
                line=True,
            )
        )
    return plot(
        series,
        title="How many experts tokens get (all layers)",
        x_label="experts",
        y_label="tokens",
        percent=True,
        y_from_zero=True,
    )


def load_plot(row: dict[str, Any]) -> str:
    """Load of every expert by layer, sorted: the policy's row under the model's own."""
    rows: list[list[float]] = []
    names: list[str] = []
    labels: list[list[str]] = []
    for i, layer in enumerate(row["record"]["layers"]):
        order = sorted(range(len(layer["own_expert_load"])), key=lambda e: -layer["own_expert_load"][e])
        for title, key in ((f"layer {i}, own", "own_expert_load"), ("policy", "expert_load")):
            load, tokens = layer[key], layer["tokens"] or 1
            rows.append([load[e] / tokens for e in order])
            names.append(title)
            labels.append([f"expert {e}: {load[e] / tokens:.1%} of tokens" for e in order])
    return heat(
        rows,
        title=f"Expert load, {row['record']['policy']} against the model's own",
        names=names,
        labels=labels,
    )


# ---------------------------------------------------------------------------------------------- sections


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
    if shown := _adaptive(rows):
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
            _percent(row["change"]),
            _percent(row["against_topk"]),
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
        for r in _adaptive(rows, most=60)
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
        parts.append(_p_value_plot(calibration))
    return "<section>" + "".join(parts) + "</section>"


def _p_value_plot(calibration: Calibration) -> str:
    """Shares of p-values below p on kept tokens, per layer: on the diagonal they are uniform."""
    import torch

    reservoir = calibration.reservoir
    assert reservoir is not None
    grid = [i / 40 for i in range(41)]
    series = []
    layers = range(calibration.num_layers)
    if calibration.num_layers > MOST:
        layers = [round(i * (calibration.num_layers - 1) / (MOST - 1)) for i in range(MOST)]  # type: ignore[assignment]
    for i in layers:
        top = calibration.layers[i].top_k
        logits_NE = reservoir.logits_NLE[:2048, i].float()
        own_NK = reservoir.experts_NLK[:2048, i, :top].long()
        passed_NE = torch.ones_like(logits_NE, dtype=torch.bool).scatter(-1, own_NK, False)
        p = calibration.p_values(logits_NE, i)[passed_NE]
        series.append(
            Series(
                name=f"layer {i}",
                x=grid,
                y=[float((p <= x).double().mean()) for x in grid],
                line=True,
                points=False,
            )
        )
    series.append(Series(name="uniform", x=[0.0, 1.0], y=[0.0, 1.0], line=True, points=False))
    return plot(
        series,
        title="p-values of passed-over experts on kept calibration tokens",
        x_label="p",
        y_label="share of p-values at most p",
        width=720,
        height=440,
    )


# ----------------------------------------------------------------------------------------------- helpers


def _adaptive(rows: Sequence[dict[str, Any]], most: int = MOST) -> list[dict[str, Any]]:
    """Rows with counted experts whose numbers vary, those nearest to half of the full model's first; a few."""
    full = max((r["experts"] or 0.0 for r in rows), default=0.0)
    varying = [r for r in rows if r["record"]["layers"] and (r["record"]["std_experts_per_token"] or 0.0) > 0]
    return sorted(varying, key=lambda r: abs(r["experts"] - full / 2))[:most]


def _family(record: dict[str, Any]) -> str:
    """Policies that differ in nothing but their budget or parameter."""
    name, _, body = record["policy"].partition(":")
    numbers = ("experts=", "k=", "p=", "t=", "q=", "alpha=", "scale=")
    rest = [part for part in body.split(",") if part and not part.startswith(numbers)]
    return ", ".join([name, *rest])


def _percent(value: Interval | None) -> str:
    if value is None:
        return ""
    return f"{value.value:+.1%} [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
